"""A task: rows to train on, rows to score on, and the metrics that score them."""

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import datasets
import numpy as np
import numpy.typing as npt
from scipy import stats
from sklearn import metrics as sklearn_metrics

from ticketops.errors import InputError

Kind = Literal["classification", "regression"]


def _accuracy(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(np.mean(labels == predictions))


def _f1(labels: np.ndarray, predictions: np.ndarray) -> float:
    # `labels=[1]` keeps a split without the positive class at 0 rather than an error.
    return float(sklearn_metrics.f1_score(labels, predictions, labels=[1], average="macro", zero_division=0.0))


def _matthews(labels: np.ndarray, predictions: np.ndarray) -> float:
    return float(sklearn_metrics.matthews_corrcoef(labels, predictions))


def _correlation(function: Callable[..., Any]) -> Callable[[np.ndarray, np.ndarray], float]:
    def score(labels: np.ndarray, predictions: np.ndarray) -> float:
        if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
            return 0.0
        # scipy warns of nearly constant input, where the correlation may underflow to NaN; that counts as 0.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = float(function(labels, predictions).statistic)
        return value if np.isfinite(value) else 0.0

    return score


METRICS: Mapping[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "matthews_correlation": _matthews,
    "pearson": _correlation(stats.pearsonr),
    "spearman": _correlation(stats.spearmanr),
}


def features(kind: Kind, labels: Sequence[str], columns: Sequence[str]) -> datasets.Features:
    """Column types of a task's rows.

    Args:
        kind: "classification" or "regression".
        labels: label names by id; unused for regression.
        columns: names of the text columns.

    Returns:
        Strings for the text columns, a class label or a float32 for `label`.
    """
    label = datasets.ClassLabel(names=list(labels)) if kind == "classification" else datasets.Value("float32")
    return datasets.Features({column: datasets.Value("string") for column in columns} | {"label": label})


@dataclass(frozen=True, eq=False)
class Task:
    """A data set to fine-tune on, with the metrics that score a model on it.

    Attributes:
        name: GLUE name, or name of the file or folder.
        kind: "classification" (cross entropy over `labels`) or "regression" (one number).
        labels: label names by id; empty for regression.
        columns: names of the one or two text columns.
        metrics: names of the metrics; the first one selects the super ticket.
        train: training rows, with the text columns and `label`.
        validation: rows whose score selects the super ticket.
        validation_name: source of the validation rows, such as `validation`, `dev` or `held out of reviews.csv`.
        report: held-out rows whose score is reported; None if the validation rows serve both purposes.
        report_name: source of the report rows.
        test: rows of the data's own test split if it is not used: its labels are hidden (no column `label`), or
            other rows report. Else None.
        remarks: sentences for the user: how the data were read, if that is not obvious, and what looks wrong in them.
    """

    name: str
    kind: Kind
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

    @property
    def metric(self) -> str:
        """Name of the metric that selects the super ticket; higher is better."""
        return self.metrics[0]

    @property
    def num_labels(self) -> int:
        """The width of the model's output: the number of classes, 1 for regression."""
        return len(self.labels) if self.kind == "classification" else 1

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 over all rows and the split of each, as part of a trial's identity."""
        digest = hashlib.sha256(json.dumps([self.kind, self.labels, self.columns, self.metrics]).encode())
        splits = {"train": self.train, "validation": self.validation, "report": self.report}
        for role, rows in (splits | ({"test": self.test} if self.test is not None else {})).items():
            digest.update(f"\n{role}\n".encode())
            for batch in rows.iter(batch_size=1_000) if rows is not None else ():
                columns = [column for column in (*self.columns, "label") if column in batch]
                digest.update(json.dumps([batch[column] for column in columns]).encode())
        return digest.hexdigest()

    def compute(self, predictions: npt.ArrayLike, labels: npt.ArrayLike) -> dict[str, float]:
        """Scores a model's outputs.

        Args:
            predictions: logits [rows, num_labels]; for regression [rows] or [rows, 1].
            labels: class ids [rows], or numbers [rows] for regression.

        Returns:
            Metric -> value: fractions in [0, 1], correlations in [-1, 1]; constant predictions have correlation 0.

        Raises:
            InputError: the shapes do not fit the task, there are no rows, or a prediction is NaN or infinite.
        """
        scores, targets = np.asarray(predictions, dtype=np.float64), np.asarray(labels)
        if self.kind == "regression" and scores.ndim == 1:
            scores = scores[:, None]
        if scores.shape != (targets.size, self.num_labels) or targets.ndim != 1 or targets.size == 0:
            raise InputError(
                f"predictions of shape {np.shape(predictions)} with labels of shape {targets.shape} do not fit task "
                f"{self.name}: give [rows, {self.num_labels}] and [rows], at least one row"
            )
        bad = np.flatnonzero(~np.isfinite(scores).all(axis=1))
        if bad.size:
            raise InputError(
                f"{bad.size} of {targets.size} predictions for task {self.name} are NaN or infinite, the first in row "
                f"{bad[0]}: the training diverged; lower the learning rate or use a wider dtype"
            )
        outputs = scores.argmax(axis=1) if self.kind == "classification" else scores[:, 0]
        return {metric: METRICS[metric](targets, outputs) for metric in self.metrics}

    def majority(self, split: datasets.Dataset | None = None) -> float:
        """Score of always predicting a split's most frequent label.

        Args:
            split: rows to score on; the validation rows by default.

        Returns:
            The value of `metric`; 0 for correlations.
        """
        if self.kind == "regression":
            return 0.0
        labels = np.asarray((self.validation if split is None else split)["label"][:])
        constant = np.full_like(labels, np.bincount(labels, minlength=self.num_labels).argmax())
        return METRICS[self.metric](labels, constant)

    def describe(self) -> str:
        """Describes the task in one line: rows and use of each split, labels, metrics, score of the majority label."""
        rows = f"{len(self.train):,} training and {len(self.validation):,} validation rows ({self.validation_name})"
        if self.report is not None:
            rows += f", {len(self.report):,} report rows" + (f" ({self.report_name})" if self.report_name else "")
        if self.test is not None:
            hidden = "" if "label" in self.test.column_names else " without labels"
            rows += f", {len(self.test):,} test rows{hidden}, which are not used"
        remarks = "".join(f"; {remark}" for remark in self.remarks)
        if self.kind == "regression":
            return f"{self.name}: {rows}, regression, metrics {', '.join(self.metrics)}{remarks}"
        names = ", ".join(self.labels[:6]) + (", ..." if self.num_labels > 6 else "")
        return (
            f"{self.name}: {rows}, {self.num_labels} labels ({names}), metrics {', '.join(self.metrics)}, "
            f"majority {self.metric} {self.majority():.3f}{remarks}"
        )
