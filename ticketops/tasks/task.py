"""Task: rows to train on and to score on, the head that answers them, and the metrics that score its answers."""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

import datasets
import numpy as np
import transformers
from transformers import DataCollatorWithPadding, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ticketops.errors import InputError, UnsupportedError, spelled
from ticketops.tasks.losses import ClassWeights, WeightedLoss
from ticketops.tasks.metrics import Metric
from ticketops.tasks.sampling import hold_out


@dataclass(frozen=True, eq=False)
class Task(abc.ABC):
    """A data set to fine-tune on, with the head that it needs and the metrics that score a model on it.

    This is the interface of all kinds of tasks. A class of your own derives from it (or from the class of a kind) and
    defines `head`, `num_labels`, `encode`, `score` and `majority`; `ticketops.search(task=...)` takes an instance.
    Other columns of the rows than these are yours, and part of the task's identity.

    Attributes:
        name: name of the task in reports and records.
        kind: what the task asks for, such as "classification"; any word for a class of your own.
        labels: label names by id; empty where there are none.
        columns: names of the text columns of the rows.
        metrics: names of the metrics; the first one selects the super ticket.
        train: training rows, with the text columns and `label`.
        validation: rows whose score selects the super ticket.
        validation_name: source of the validation rows, such as `validation`, `dev` or `held out of reviews.csv`.
        report: held-out rows whose score is reported; None if the validation rows serve both purposes.
        report_name: source of the report rows.
        test: rows of the data's own test split if it is not used: its labels are hidden (no column `label`), or
            other rows report. Else None.
        remarks: sentences for the user: how the data were read, if that is not obvious, and what looks wrong in them.
        functions: metrics of the user's own among `metrics`: name -> function.
    """

    name: str
    kind: str
    labels: tuple[str, ...]
    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    train: datasets.Dataset
    validation: datasets.Dataset
    validation_name: str
    report: datasets.Dataset | None = None
    report_name: str = ""
    test: datasets.Dataset | None = None
    remarks: tuple[str, ...] = ()
    functions: Mapping[str, Metric] = dataclasses.field(default_factory=dict)

    #: Auto class of transformers that makes the model with the task's head; empty for a model without one.
    head: ClassVar[str]
    #: True if the texts are lists of words, which the tokenizer must not split again.
    gives_words: ClassVar[bool] = False
    #: True if `score` calls `functions`.
    takes_functions: ClassVar[bool] = False

    @property
    @abc.abstractmethod
    def num_labels(self) -> int:
        """Width of the head's output, or its number of outputs."""

    @property
    def segments(self) -> int:
        """Number of texts in one input of the model: 1, or 2 for pairs."""
        return len(self.columns)

    @property
    def sequences_per_example(self) -> int:
        """Number of sequences that the model reads for one example of its loss: above 1 for multiple choice."""
        return 1

    @property
    def grouped_by(self) -> tuple[str, ...]:
        """Columns whose equal values keep rows together when rows are held out, so that no text is on both sides."""
        return self.columns

    @property
    def metric(self) -> str:
        """Name of the metric that selects the super ticket; higher is better."""
        return self.metrics[0]

    @property
    def metric_choices(self) -> tuple[str, ...]:
        """Names of the metrics that can select the super ticket."""
        return self.metrics

    @abc.abstractmethod
    def encode(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        scored: bool,
    ) -> dict[str, Any]:
        """Turns rows into inputs of the model, not padded.

        Args:
            batch: column name -> value of each row.
            indices: number of each row in its split.
            tokenizer: tokenizer of the model.
            max_length: maximum number of tokens in an input, special tokens included.
            scored: True for rows that `score` will score; False for training rows, which have the model's arguments
                alone.

        Returns:
            Argument of the model -> value of each input, labels included; with `scored` also what `score` needs.
        """

    @abc.abstractmethod
    def score(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
        """Scores a model's answers on a split.

        Args:
            logits: as `logits` returns them, one entry for each input.
            inputs: what `encode` made of the rows.
            rows: the rows.

        Returns:
            Metric -> value, higher for better, for each name in `metrics`.

        Raises:
            InputError: a logit is NaN or infinite, or the shape does not fit the task.
        """

    def row_results(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> np.ndarray | None:
        """What each row contributes to `metric`, from which intervals over rows and scores of halves are computed.

        Args:
            logits, inputs, rows: as in `score`.

        Returns:
            Array [rows, ...] of one of the forms in `ticketops.searching.resampling`; None if the task does not know.
        """
        return None

    @abc.abstractmethod
    def majority(self, split: datasets.Dataset | None = None) -> float:
        """Score that a model reaches without reading, by one constant answer.

        Args:
            split: rows to score on; the validation rows by default.

        Returns:
            The value of `metric`.
        """

    def with_validation(self, share: float, seed: int) -> Self:
        """Holds a share of the training rows out for validation.

        Args:
            share: share of the rows, in (0, 1); at least one row.
            seed: seed of the choice.

        Returns:
            The task whose validation rows have no text in common with its training rows.
        """
        count = max(1, round(share * len(self.train)))
        train, validation = hold_out(self.train, self.grouped_by, count, seed)
        return dataclasses.replace(self, train=train, validation=validation)

    def with_metric(self, name: str, function: Metric | None = None) -> Self:
        """Chooses the metric that selects the super ticket; the others are reported beside it.

        Args:
            name: name of the metric: one of `metric_choices`, or any name for a function.
            function: takes labels and predictions; None for a metric of the task's.

        Raises:
            InputError: the task has no such metric, or takes no functions.
        """
        choices = ", ".join(self.metric_choices)
        if function is not None and not self.takes_functions:
            raise InputError(
                f"task {self.name} ({self.kind}) takes no metric function: choose {spelled('metric')} from {choices}"
            )
        if function is None and name not in self.metric_choices:
            function_too = ", or give a function in Python" if self.takes_functions else ""
            raise InputError(
                f"{spelled('metric')} {name!r} does not suit task {self.name} ({self.kind}): choose from "
                f"{choices}{function_too}"
            )
        functions = self.functions if function is None else {**self.functions, name: function}
        metrics = (name, *(metric for metric in self.metrics if metric != name))
        return dataclasses.replace(self, metrics=metrics, functions=functions)

    def loss_function(self, class_weights: ClassWeights | None) -> WeightedLoss | None:
        """The loss that a model trains with, and that importance is recorded of, where it is not the head's own.

        Args:
            class_weights: "balanced", or a weight for each label; None for none.

        Returns:
            None for the head's own loss, or a function like a Trainer's `compute_loss_func`: it takes the model's
            outputs, the labels and, where several batches make a step, the number of their labels.

        Raises:
            InputError: the task has no classes to weigh, or the weights do not fit them.
        """
        if class_weights is None:
            return None
        raise InputError(
            f"{spelled('class_weights')} is given for task {self.name}, and {self.kind} has no classes to weigh: leave "
            "it out"
        )

    def configure(self, config: PretrainedConfig) -> None:
        """Writes the task's labels into a model's configuration.

        Args:
            config: configuration of the model; changed in place.
        """
        config.num_labels = self.num_labels
        if self.labels:
            config.id2label = dict(enumerate(self.labels))
            config.label2id = {label: number for number, label in enumerate(self.labels)}

    def check_model(self, config: PretrainedConfig) -> None:
        """Checks that the architecture has the task's head.

        Args:
            config: configuration of the model.

        Raises:
            UnsupportedError: transformers has no such head for it.
        """
        if type(config) not in getattr(transformers, self.head)._model_mapping:
            raise UnsupportedError(
                f"transformers has no {self.head.removeprefix('AutoModelFor')} head for {config.model_type}, which "
                f"task {self.name} ({self.kind}) needs: choose another model"
            )

    def with_model(self, folder: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Self, PreTrainedTokenizerBase]:
        """Takes from a model's folder what the task needs beside the encoder; most tasks need nothing.

        Args:
            folder: folder of the model.
            tokenizer: its tokenizer.

        Returns:
            The task, and the tokenizer to use.
        """
        return self, tokenizer

    def make_model(self, config: PretrainedConfig) -> PreTrainedModel:
        """Makes a model with the task's head and random float32 weights.

        Args:
            config: configuration of the model, as `configure` leaves it.
        """
        model: PreTrainedModel = getattr(transformers, self.head).from_config(config, dtype="float32")
        return model

    def product(self, model: PreTrainedModel) -> Any:
        """What users want of a trained model, which is saved: most often the model itself.

        Args:
            model: model that `make_model` made.
        """
        return model

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Any:
        """Makes the function that pads inputs to a batch of tensors.

        Args:
            tokenizer: tokenizer of the model.
        """
        return DataCollatorWithPadding(tokenizer)

    def logits(self, predictions: Any) -> np.ndarray:
        """The outputs of the head that `score` needs, as one array.

        Args:
            predictions: `predictions` of a Trainer: an array, or a tuple of arrays whose first one is the logits.

        Returns:
            Floats [inputs, ...].
        """
        return np.asarray(predictions[0] if isinstance(predictions, tuple) else predictions)

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over all rows and the split of each, as part of a trial's identity."""
        digest = hashlib.sha256(json.dumps([self.kind, self.labels, self.columns, self.metrics]).encode())
        splits = {"train": self.train, "validation": self.validation, "report": self.report}
        for role, rows in (splits | ({"test": self.test} if self.test is not None else {})).items():
            digest.update(f"\n{role}\n".encode())
            for batch in rows.iter(batch_size=1_000) if rows is not None else ():
                known = [column for column in (*self.columns, "label") if column in batch]
                columns = [*known, *sorted(batch.keys() - {*known})]
                digest.update(json.dumps([batch[column] for column in columns], default=str).encode())
        return digest.hexdigest()

    def describe(self) -> str:
        """Describes the task in one line: rows and use of each split, labels, metrics, score of a constant answer."""
        rows = f"{len(self.train):,} training and {len(self.validation):,} validation rows ({self.validation_name})"
        if self.report is not None:
            rows += f", {len(self.report):,} report rows" + (f" ({self.report_name})" if self.report_name else "")
        if self.test is not None:
            hidden = "" if "label" in self.test.column_names else " without labels"
            rows += f", {len(self.test):,} test rows{hidden}, which are not used"
        what = "" if self.kind == "classification" else f", {self.kind}"
        if self.labels:
            names = ", ".join(self.labels[:6]) + (", ..." if len(self.labels) > 6 else "")
            what += f", {len(self.labels)} labels ({names})"
        majority = self.majority()
        return "; ".join(
            [
                f"{self.name}: {rows}{what}, metrics {', '.join(self.metrics)}"
                + (f", majority {self.metric} {majority:.3f}" if majority else ""),
                *self.remarks,
            ]
        )

    def own_scores(self, labels: Any, predictions: Any) -> dict[str, float]:
        """Scores by the metrics of the user's own.

        Args:
            labels: what is right, one entry a row.
            predictions: what a model answers.

        Raises:
            InputError: a function fails, or returns no finite number.
        """
        return {name: function(labels, predictions) for name, function in self.functions.items()}

    def check_finite(self, logits: np.ndarray) -> None:
        """Checks a model's outputs.

        Args:
            logits: floats [inputs, ...].

        Raises:
            InputError: one is NaN or infinite.
        """
        bad = np.flatnonzero(~np.isfinite(logits).reshape(len(logits), -1).all(axis=1))
        if bad.size:
            raise InputError(
                f"{bad.size} of {len(logits)} predictions for task {self.name} are NaN or infinite, the first in row "
                f"{bad[0]}: the training diverged; lower the learning rate or use a wider dtype"
            )


def check_fast(tokenizer: PreTrainedTokenizerBase, task: Task) -> None:
    """Checks that a tokenizer says which part of a text each token is.

    Args:
        tokenizer: tokenizer of the model.
        task: the task that needs to know.

    Raises:
        UnsupportedError: it is a slow one.
    """
    if not tokenizer.is_fast:
        raise UnsupportedError(
            f"task {task.name} ({task.kind}) needs a fast tokenizer, with a tokenizer.json, and the model has none: "
            "choose another model"
        )
