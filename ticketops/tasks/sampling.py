"""Seeded, stratified subsets of rows; a larger subset contains a smaller one."""

import json
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np


def spread(rows: datasets.Dataset, seed: int) -> np.ndarray:
    """Orders rows so that every prefix has, to within rounding, the label shares of the whole.

    Args:
        rows: rows with a `label`; only class ids are stratified, not numbers, lists, or rows without one.
        seed: seed of the shuffling.

    Returns:
        Row numbers in the new order, int64 [rows].
    """
    shuffled = np.random.default_rng(seed).permutation(len(rows))
    kind = rows.features.get("label")
    if not (isinstance(kind, datasets.ClassLabel) or (isinstance(kind, datasets.Value) and "int" in kind.dtype)):
        return shuffled
    labels = np.asarray(rows["label"][:])[shuffled]
    classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)[1:]
    by_class = np.argsort(classes, kind="stable")
    rank = np.empty_like(by_class)
    rank[by_class] = np.arange(len(rows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    # Row k of the n rows of its class gets the place (k + 1/2) / n; ties keep their shuffled order.
    return shuffled[np.argsort((rank + 0.5) / sizes[classes], kind="stable")]


def take(rows: datasets.Dataset, count: int, seed: int) -> datasets.Dataset:
    """Takes a seeded, stratified subset in the rows' own order; a larger count contains a smaller one.

    Args:
        rows: the rows to choose from.
        count: number of rows to take, at most `len(rows)`.
        seed: seed of the choice.

    Returns:
        The chosen rows.
    """
    return rows.select(np.sort(spread(rows, seed)[:count]))


def hold_out(
    rows: datasets.Dataset, columns: Sequence[str], count: int, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Splits rows into two parts that have no text in common.

    Args:
        rows: the rows to split.
        columns: columns whose equal values keep rows together: the text columns, or the paragraph of questions.
        count: number of rows to hold out; a few more are held out where several rows have the same text.
        seed: seed of the choice.

    Returns:
        The remaining rows and the held-out rows, each in their original order.
    """
    texts = list(zip(*(map(_hashable, rows[column][:]) for column in columns), strict=True))
    chosen = {texts[i] for i in spread(rows, seed)[:count]}
    held = np.array([text in chosen for text in texts], dtype=bool)
    return rows.select(np.flatnonzero(~held)), rows.select(np.flatnonzero(held))


def _hashable(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
