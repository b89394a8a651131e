"""Tasks on whole texts: classification, regression, and several labels a text."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import numpy as np
import numpy.typing as npt
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from ticketops.errors import InputError
from ticketops.tasks.losses import ClassWeights, WeightedLoss, balanced_weights, read_weights
from ticketops.tasks.metrics import METRICS
from ticketops.tasks.task import Task

_PROBLEM_TYPES: Mapping[str, Any] = {
    "classification": "single_label_classification",
    "regression": "regression",
    "multi-label": "multi_label_classification",
}
# Metrics that suit a kind.
_METRICS: Mapping[str, tuple[str, ...]] = {
    "classification": ("accuracy", "macro_f1", "micro_f1", "matthews_correlation"),
    "regression": ("pearson", "spearman"),
    "multi-label": ("micro_f1", "macro_f1", "accuracy"),
}


def features(kind: str, labels: Sequence[str], columns: Sequence[str]) -> datasets.Features:
    """Column types of a sequence task's rows.

    Args:
        kind: "classification", "regression" or "multi-label".
        labels: label names by id; unused for regression.
        columns: names of the text columns.

    Returns:
        Strings for the text columns; for `label` a class label, a float32, or a list of class labels.
    """
    one = datasets.Value("float32") if kind == "regression" else datasets.ClassLabel(names=list(labels))
    label = datasets.List(one) if kind == "multi-label" else one
    return datasets.Features({column: datasets.Value("string") for column in columns} | {"label": label})


@dataclass(frozen=True, eq=False)
class SequenceTask(Task):
    """Classification ("classification"), one number ("regression"), or any number of labels a text ("multi-label").

    The rows have one or two text columns and `label`: a class id, a float, or a list of class ids.

    Attributes:
        threshold: probability from which on a label of a multi-label task is predicted, in (0, 1).
    """

    threshold: float = 0.5

    head: ClassVar[str] = "AutoModelForSequenceClassification"
    takes_functions: ClassVar[bool] = True

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for regression."""
        return 1 if self.kind == "regression" else len(self.labels)

    @property
    def metric_choices(self) -> tuple[str, ...]:
        """The metrics that suit the kind; "accuracy" of several labels counts rows of which all labels are right."""
        choices = _METRICS[self.kind]
        # Of the second of two classes.
        return (*choices, "f1") if self.kind == "classification" and len(self.labels) == 2 else choices

    def loss_function(self, class_weights: ClassWeights | None) -> WeightedLoss | None:
        """Weighs classes, or the rows that have a label against those that have not."""
        if class_weights is None or self.kind == "regression":
            return super().loss_function(class_weights)
        several = self.kind == "multi-label"
        labels = self.train["label"][:]
        if several:
            having = self._multi_hot(labels).sum(axis=0)
            lacking = len(labels) - having
            balanced = np.where(having * lacking > 0, lacking / np.maximum(having, 1), 1.0)
        else:
            balanced = balanced_weights(np.asarray(labels), self.num_labels)
        return WeightedLoss(read_weights(class_weights, self.labels, balanced), several)

    def configure(self, config: PretrainedConfig) -> None:
        """Writes labels and problem type, which decides the loss."""
        super().configure(config)
        config.problem_type = _PROBLEM_TYPES[self.kind]

    def encode(
        self,
        batch: Mapping[str, Sequence[Any]],
        indices: Sequence[int],
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        scored: bool,
    ) -> dict[str, Any]:
        """Tokenizes texts or pairs of texts; labels are int64, float32, or multi-hot float32 [num_labels]."""
        tokens = tokenizer(*(batch[column] for column in self.columns), truncation=True, max_length=max_length)
        if self.kind == "multi-label":
            return {**tokens, "labels": list(self._multi_hot(batch["label"]))}
        dtype = np.int64 if self.kind == "classification" else np.float32
        return {**tokens, "labels": np.asarray(batch["label"], dtype=dtype)}

    def score(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> dict[str, float]:
        """Scores logits [rows, num_labels] as `compute` does."""
        return self.compute(logits, np.asarray(inputs["labels"]))

    def compute(self, predictions: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
        """Scores a model's outputs.

        Args:
            predictions: logits [rows, num_labels]; for regression [rows] or [rows, 1].
            labels: class ids [rows], numbers [rows] for regression, or multi-hot [rows, num_labels].

        Returns:
            Metric -> value: fractions in [0, 1], correlations in [-1, 1]; constant predictions have correlation 0.

        Raises:
            InputError: the shapes do not fit the task, there are no rows, or a prediction is NaN or infinite.
        """
        scores, targets = np.asarray(predictions, dtype=np.float64), np.asarray(labels)
        if self.kind == "regression" and scores.ndim == 1:
            scores = scores[:, None]
        rows = targets.shape[:1]
        shape = (*rows, self.num_labels) if self.kind == "multi-label" else rows
        if scores.shape != (*rows, self.num_labels) or targets.shape != shape or targets.size == 0:
            wanted = f"[rows, {self.num_labels}]"
            raise InputError(
                f"predictions of shape {np.shape(predictions)} with labels of shape {targets.shape} do not fit task "
                f"{self.name}: give {wanted} and {wanted if len(shape) == 2 else '[rows]'}, at least one row"
            )
        self.check_finite(scores)
        return self._evaluate(targets, self._outputs(scores))

    def row_results(self, logits: np.ndarray, inputs: datasets.Dataset, rows: datasets.Dataset) -> np.ndarray:
        """Label and prediction of each row, [rows, 2] or, of several labels, [rows, 2, num_labels]."""
        outputs = self._outputs(np.asarray(logits, np.float64).reshape(len(logits), -1))
        return np.stack([np.asarray(inputs["labels"]), outputs], axis=1)

    def majority(self, split: datasets.Dataset | None = None) -> float:
        """Score of always predicting a split's most frequent label or labels, or the mean of its numbers."""
        rows = (self.validation if split is None else split)["label"][:]
        if self.kind == "regression":
            numbers = np.asarray(rows, np.float32)
            return self._evaluate(numbers, np.full_like(numbers, numbers.mean()))[self.metric]
        if self.kind == "classification":
            labels = np.asarray(rows)
            constant = np.full_like(labels, np.bincount(labels, minlength=self.num_labels).argmax())
            return self._evaluate(labels, constant)[self.metric]
        targets = self._multi_hot(rows)
        right = np.sort(targets.sum(axis=0))[::-1].cumsum()
        # Micro F1 of the most frequent 1, 2, ... labels.
        micro = 2 * right / (len(rows) * np.arange(1, self.num_labels + 1) + targets.sum())
        frequent = np.argsort(-targets.sum(axis=0), kind="stable")
        return max(
            self._evaluate(targets, np.tile(np.isin(np.arange(self.num_labels), chosen), (len(rows), 1)).astype(int))[
                self.metric
            ]
            for chosen in ((), frequent[: micro.argmax() + 1], frequent)
        )

    def _outputs(self, scores: np.ndarray) -> np.ndarray:
        """Class ids [rows], numbers [rows] or multi-hot [rows, num_labels] of logits [rows, num_labels]."""
        if self.kind == "multi-label":
            return (scores >= math.log(self.threshold / (1 - self.threshold))).astype(np.float32)
        return scores.argmax(axis=1) if self.kind == "classification" else scores[:, 0]

    def _evaluate(self, labels: np.ndarray, outputs: np.ndarray) -> dict[str, float]:
        known = {name: METRICS[name](labels, outputs) for name in self.metrics if name not in self.functions}
        return {**known, **self.own_scores(labels, outputs)}

    def _multi_hot(self, labels: Sequence[Sequence[int]]) -> np.ndarray:
        found = np.zeros((len(labels), self.num_labels), np.float32)
        for row, ids in enumerate(labels):
            found[row, list(ids)] = 1
        return found
