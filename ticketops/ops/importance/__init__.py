"""Accumulation of importance over batches, and ranking of all heads and all FFNs. On a GPU both take one launch.

    total[l, h] += examples * sum over examples |sum over the example's rows of partial[row, h]|
    score[l, h] = average[l, h] / l2 norm of average[l, :],   average = total / count

The same for FFNs, without the norm. The factor `examples` undoes the mean over the batch in the loss. Rankings are in
ascending order; equal scores are ordered by layer, then head, and NaN is last.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ticketops.ops.backends import implementation

__all__ = ["Partials", "Ranking", "Sums", "accumulate", "rank"]


@dataclass
class Sums:
    """Totals and counts of the importance recorded so far.

    Attributes:
        heads: float64 [layers, heads], totals of heads (or of neurons).
        ffns: float64 [layers], totals of FFNs; [0] if FFNs are not ranked.
        head_counts: for each layer, the number of examples (or batches) in the totals of its heads.
        ffn_counts: for each layer, the number of examples (or batches) in the total of its FFN.
    """

    heads: Tensor
    ffns: Tensor
    head_counts: list[int]
    ffn_counts: list[int]


@dataclass(frozen=True)
class Partials:
    """Importance partials of one batch, to be added to the totals.

    Attributes:
        heads: for each layer a floating-point tensor [B, heads], or None.
        ffns: for each layer a floating-point tensor [B], or None; an empty list if FFNs are not ranked.
        group: number of consecutive rows of the batch that make up one example.
        whole: True takes the absolute value of the batch's sum, False of each example's sum.
    """

    heads: Sequence[Tensor | None]
    ffns: Sequence[Tensor | None]
    group: int = 1
    whole: bool = False


@dataclass(frozen=True)
class Ranking:
    """Scores and ascending order of all structures, on the device of the sums.

    Attributes:
        head_scores: float64 [layers, heads], layer-normalised averages.
        ffn_scores: float64 [layers], averages.
        head_order: int64 [layers * heads], heads numbered layer * heads + head, least important first.
        ffn_order: int64 [layers], layers, least important FFN first.
    """

    head_scores: Tensor
    ffn_scores: Tensor
    head_order: Tensor
    ffn_order: Tensor


def accumulate(sums: Sums, partials: Partials) -> None:
    """Adds one batch's partials to the totals, in place and without waiting for the device. The caller updates the
    counts.

    Args:
        sums: totals to add to.
        partials: partials of one batch, any floating-point dtype, on the device of the totals.
    """
    _implementation(sums, partials).score(sums, partials, False)


def rank(sums: Sums, partials: Partials | None = None) -> Ranking:
    """Ranks all structures, without waiting for the device.

    Args:
        sums: totals, in which every layer has been recorded at least once.
        partials: partials to add first, in the same launch, or None. The counts in `sums` already include them.

    Returns:
        The ranking.

    Source: arXiv 2105.12002, section 3.
    """
    partials = partials or Partials([None] * len(sums.head_counts), [None] * len(sums.ffn_counts))
    return _implementation(sums, partials).score(sums, partials, True)


def _implementation(sums: Sums, partials: Partials) -> Any:
    recorded = (x for x in (*partials.heads, *partials.ffns) if x is not None)
    # The kernel reads float32 and narrower dtypes; any float64 partial goes to the reference.
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in recorded) else torch.float32
    return implementation("importance", sums.heads.device, dtype)
