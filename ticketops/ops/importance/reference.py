"""Reference implementation of accumulating and ranking importance, in plain PyTorch: float64, and no fused
multiply-adds, so that every operation is rounded by itself."""

import numpy as np
import torch
from torch import Tensor

from ticketops.ops.importance import Partials, Ranking, Sums


def refusal(device: torch.device, dtype: torch.dtype) -> None:
    """Never refuses: plain PyTorch runs everywhere."""


def score(sums: Sums, partials: Partials, rank: bool) -> Ranking | None:
    """See ticketops.ops.importance.accumulate and, where `rank`, ticketops.ops.importance.rank."""
    for totals, layers in ((sums.heads, partials.heads), (sums.ffns, partials.ffns)):
        for total, partial in zip(totals, layers, strict=True):
            if partial is not None:
                examples = 1 if partials.whole else len(partial) // partials.group
                total.add_(_sum(partial, partials), alpha=examples)
    if not rank:
        return None
    heads = normalized(sums.heads / _counts(sums.head_counts, sums.heads)[:, None])
    ffns = sums.ffns / _counts(sums.ffn_counts, sums.ffns)
    return Ranking(heads, ffns, torch.argsort(heads.flatten(), stable=True), torch.argsort(ffns, stable=True))


def normalized(scores: Tensor) -> Tensor:
    """Divides the scores of each layer by their l2 norm, so that they are comparable across layers.

    Args:
        scores: float64 [layers, heads].

    Returns:
        float64 [layers, heads]; a layer of zeros stays zeros.
    """
    squares = scores * scores
    # Results must not depend on a library in the last bits. A cumulative sum has a fixed order. For square roots on a
    # CPU torch uses MKL, which rounds some of them wrong; numpy uses the processor's instruction.
    squares = squares.cumsum(1)[:, -1:]
    norm = torch.from_numpy(np.sqrt(squares.numpy())) if squares.device.type == "cpu" else squares.sqrt()
    return scores / torch.where(norm == 0, 1.0, norm)


def _sum(partial: Tensor, partials: Partials) -> Tensor:
    if partials.group > 1:
        partial = partial.unflatten(0, (-1, partials.group)).sum(1, dtype=torch.float64)
    if partials.whole:
        partial = partial.sum(0, keepdim=True, dtype=torch.float64)
    # The 1-norm is the sum of absolute values in one kernel.
    return torch.linalg.vector_norm(partial, ord=1, dim=0, dtype=torch.float64)


def _counts(counts: list[int], totals: Tensor) -> Tensor:
    return torch.tensor(counts, dtype=torch.float64).to(totals.device, non_blocking=True)
