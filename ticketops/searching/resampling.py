"""Metrics of any choice of a split's rows, computed from what each row contributes: for intervals and for halves.

A row's result is an array: one number, of which the metric is the mean; a label and a prediction, [2] or, of several
labels, [2, labels]; or the counts of right, predicted and true entities, [3].
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from scipy import sparse

#: Number of random splits of the validation rows into halves, one that chooses and one that reports.
HALVINGS = 50
_ENTITIES = ("entity_f1", "entity_precision", "entity_recall")
_CORRELATIONS = ("pearson", "spearman")
_COUNTED = ("accuracy", "f1", "macro_f1", "micro_f1", "matthews_correlation")
#: Products of models and weights are computed for so many numbers of weights, over all models, at a time.
_BLOCK = 100_000_000


def can_resample(metric: str, results: np.ndarray) -> bool:
    """True if a metric can be computed for any choice of rows from their results.

    Args:
        metric: name of the metric.
        results: result of each row, see above.
    """
    if results.ndim == 2 and results.shape[1] == 1:
        return True
    if results.ndim == 2 and results.shape[1] == 3:
        return metric in _ENTITIES
    return metric in _COUNTED or (metric in _CORRELATIONS and results.ndim == 2)


def resampled(metric: str, results: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Scores models on several choices of rows.

    Args:
        metric: name of the metric, one that `can_resample`.
        results: of each model, the result of each row.
        weights: how often each choice takes each row, [choices, rows].

    Returns:
        Scores [models, choices]. Spearman's correlation is that of the ranks among all rows.
    """
    if not results:
        return np.zeros((0, len(weights)))
    weights = np.asarray(weights, np.float32)
    found = np.empty((len(results), len(weights)), np.float32)
    # All blocks have columns for the same classes.
    classes = 1 + int(max(each.max(initial=0) for each in results)) if metric in _COUNTED else 0
    step = max(1, _BLOCK // weights.size)
    for start in range(0, len(results), step):
        block = results[start : start + step]
        columns, score = _score(metric, block, classes)
        # A sparse matrix takes a dense one only at its right side.
        sums = np.asarray(
            (weights @ columns).T if isinstance(columns, np.ndarray) else columns.T @ weights.T, np.float64
        )
        found[start : start + step] = score(sums.reshape(len(block), -1, len(weights)), weights.sum(axis=1))
    return found


def compact(results: np.ndarray) -> np.ndarray:
    """The results of rows in fewer bytes: small whole numbers as int8, others as int32, real numbers as float32."""
    if np.issubdtype(results.dtype, np.floating):
        return results.astype(np.float32)
    return results.astype(np.int8 if results.size and np.abs(results).max() < 128 else np.int32)


def halvings(rows: int) -> np.ndarray:
    """Draws the splits of rows into halves, the same for all models.

    Args:
        rows: number of rows.

    Returns:
        True for the rows of the first half, [HALVINGS, rows]. The second half has one row more where rows are odd.
    """
    generator = np.random.default_rng(rows)
    return generator.permuted(np.tile(np.arange(rows) < rows // 2, (HALVINGS, 1)), axis=1)


def halves_of(rows: int) -> np.ndarray:
    """Both halves of each of the splits, as `resampled` takes them, [2 * HALVINGS, rows]."""
    first = halvings(rows)
    return np.stack([first, ~first], axis=1).reshape(-1, rows)


def _score(metric: str, results: Sequence[np.ndarray], classes: int) -> tuple:
    """Columns that are summed over rows, models one after the other, and the function of the sums and of the number
    of rows. Single labels are below `classes`."""
    if results[0].shape[1:] == (2, 1):
        # scikit-learn takes a single label for two classes.
        results = [each[..., 0] for each in results]
    shape = results[0].shape[1:]
    if shape == (1,):
        return _stacked(results), lambda sums, rows: sums[:, 0] / rows
    if shape == (3,):
        return _stacked(results), lambda sums, rows: _entities(metric, sums)
    if metric == "accuracy":
        right = [(each[:, 0] == each[:, 1]).reshape(len(each), -1).all(axis=1, keepdims=True) for each in results]
        return _stacked(right), lambda sums, rows: sums[:, 0] / rows
    if metric in _CORRELATIONS:
        return _stacked([_moments(metric, each) for each in results]), _correlation
    if len(shape) == 2:
        counts = [np.concatenate([each[:, 0] * each[:, 1], each[:, 1], each[:, 0]], axis=1) for each in results]
        return _stacked(counts), lambda sums, rows: _classes(metric, sums, rows, several=True)
    # Not loaded for metrics that need none.
    from scipy import sparse

    counts = [_one_hot(each, classes) for each in results]
    return sparse.hstack(counts, format="csc"), lambda sums, rows: _classes(metric, sums, rows, several=False)


def _stacked(columns: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.asarray(each, np.float32) for each in columns], axis=1)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """A quotient; 0 where there is nothing below."""
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _entities(metric: str, sums: np.ndarray) -> np.ndarray:
    right, predicted, true = sums[:, 0], sums[:, 1], sums[:, 2]
    below = {"entity_f1": (predicted + true) / 2, "entity_precision": predicted, "entity_recall": true}[metric]
    return _ratio(right, below)


def _moments(metric: str, results: np.ndarray) -> np.ndarray:
    """Both numbers of each row, their squares and their product, scaled for float32."""
    pairs = np.asarray(results, np.float64)
    if metric == "spearman":
        # Half a second of every process that reads a run, most of which have no ranks.
        from scipy.stats import rankdata

        pairs = np.stack([rankdata(column) for column in pairs.T], axis=1)
    spread = pairs.std(axis=0)
    x, y = ((pairs - pairs.mean(axis=0)) / np.where(spread > 0, spread, 1.0)).T
    return np.stack([x, y, x * x, y * y, x * y], axis=1)


def _correlation(sums: np.ndarray, rows: np.ndarray) -> np.ndarray:
    x, y, xx, yy, xy = np.moveaxis(sums / rows, 1, 0)
    # Rounding of the sums leaves a constant column a variance of this size.
    spread = np.maximum(xx - x * x, 0.0) * np.maximum(yy - y * y, 0.0)
    return np.where(spread > 1e-10, _ratio(xy - x * y, np.sqrt(spread)), 0.0)


def _one_hot(results: np.ndarray, classes: int) -> "sparse.csc_array":
    """One column per class for right answers, for predictions, and for labels."""
    from scipy import sparse

    labels, predictions = np.asarray(results, np.int64).T
    rows = np.arange(len(results))
    right = labels == predictions
    places = np.concatenate([labels[right], classes + predictions, 2 * classes + labels])
    numbers = np.concatenate([rows[right], rows, rows])
    ones = np.ones(len(places), np.float32)
    return sparse.csc_array((ones, (numbers, places)), shape=(len(results), 3 * classes))


def _classes(metric: str, sums: np.ndarray, rows: np.ndarray, several: bool) -> np.ndarray:
    """Metrics of right answers, predictions and labels by class, [models, 3 * classes, choices]."""
    right, predicted, true = np.split(sums, 3, axis=1)
    f1 = _ratio(2 * right, predicted + true)
    if metric == "f1":
        return f1[:, 1] if f1.shape[1] > 1 else np.zeros_like(f1[:, 0])
    if metric == "micro_f1":
        return _ratio(2 * right.sum(axis=1), (predicted + true).sum(axis=1))
    if metric == "macro_f1":
        # Of one label a row, classes that are neither predicted nor true do not count.
        known = np.ones_like(f1) if several else (predicted + true > 0).astype(f1.dtype)
        return _ratio((f1 * known).sum(axis=1), known.sum(axis=1))
    # Matthews' correlation of any number of classes, as in scikit-learn.
    covariance = right.sum(axis=1) * rows - (predicted * true).sum(axis=1)
    spread = (rows**2 - (predicted**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1))
    return np.divide(covariance, np.sqrt(spread), out=np.zeros_like(covariance), where=spread > 0)
