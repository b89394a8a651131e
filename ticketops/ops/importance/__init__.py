"""Running sums of importance partials, and the ranking of all heads and of all FFNs; on a GPU both in one launch.

    total[l, h] += examples * sum over examples |sum over the example's rows of partial[row, h]|
    score[l, h] = average[l, h] / l2 norm of average[l, :],   average = total / count

FFNs likewise, without the norm. The loss is a mean over the batch, hence the factor. Rankings are ascending; equal
scores rank by layer, then head, NaN last.
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
    """What has been recorded.

    Attributes:
        heads: float64 [layers, heads], totals; of neurons just as well.
        ffns: float64 [layers], totals; [0] where there are none to be ranked.
        head_counts: examples (or batches) recorded of each layer's heads.
        ffn_counts: the same of each layer's FFN.
    """

    heads: Tensor
    ffns: Tensor
    head_counts: list[int]
    ffn_counts: list[int]


@dataclass(frozen=True)
class Partials:
    """One batch's partials, not yet in the sums.

    Attributes:
        heads: of each layer floating [B, heads], or None.
        ffns: of each layer floating [B], or None; none where the sums have none.
        group: consecutive rows that make up one example.
        whole: the absolute value is taken of the batch's sum, not of each example's.
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
        head_order: int64 [layers * heads], heads as layer * heads + head, the least important first.
        ffn_order: int64 [layers], layers.
    """

    head_scores: Tensor
    ffn_scores: Tensor
    head_order: Tensor
    ffn_order: Tensor


def accumulate(sums: Sums, partials: Partials) -> None:
    """Adds one batch's partials to the totals, in place and without waiting for the device; counts are the caller's.

    Args:
        sums: the running sums.
        partials: of any floating dtype, on the device of the sums.
    """
    _implementation(sums, partials).score(sums, partials, False)


def rank(sums: Sums, partials: Partials | None = None) -> Ranking:
    """Ranks all structures, without waiting for the device.

    Args:
        sums: every layer was recorded at least once.
        partials: to be added first, in the same launch; the counts include them.

    Returns:
        The ranking.

    Source: arXiv 2105.12002, section 3.
    """
    partials = partials or Partials([None] * len(sums.head_counts), [None] * len(sums.ffn_counts))
    return _implementation(sums, partials).score(sums, partials, True)


def _implementation(sums: Sums, partials: Partials) -> Any:
    given = (x for x in (*partials.heads, *partials.ffns) if x is not None)
    # Only float64 partials have more digits than the kernel reads.
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in given) else torch.float32
    return implementation("importance", sums.heads.device, dtype)
