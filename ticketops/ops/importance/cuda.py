"""Sums and ranking of importance on the GPU, one launch for all layers: csrc/cuda/importance.cu."""

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import cuda_extension as cuda
from ticketops.ops.importance import Partials, Ranking, Sums, reference


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why this kernel cannot serve a device and dtype of partials, or None."""
    if reason := cuda.refusal(device):
        return reason
    return "its kernel reads float32" if dtype == torch.float64 else None


def score(sums: Sums, partials: Partials, rank: bool) -> Ranking | None:
    """See ticketops.ops.importance.accumulate and, where `rank`, ticketops.ops.importance.rank."""
    layers, heads = sums.heads.shape
    if layers > cuda.kernels.max_layers or layers * heads > cuda.kernels.max_structures:
        # The kernel takes one argument per layer, and a single block ranks all structures; larger models exceed both.
        return reference.score(sums, partials, rank)
    device = sums.heads.device
    shapes = {"heads": (layers, heads), "ffns": (len(sums.ffn_counts),)}
    for (name, shape), totals in zip(shapes.items(), (sums.heads, sums.ffns), strict=True):
        if not cuda.checked(f"the totals of {name}", totals, device, torch.float64, *shape).is_contiguous():
            raise InputError(f"the CUDA kernel needs the totals of {name} contiguous, since they are changed in place")
    # These references keep the tensors alive until the kernel is queued.
    head_partials = [_checked(x, heads, device) for x in partials.heads]
    ffn_partials = [_checked(x, None, device) for x in partials.ffns]
    ranking = None
    if rank:
        scores = torch.empty_like(sums.heads), torch.empty_like(sums.ffns)
        orders = (torch.empty(n, dtype=torch.int64, device=device) for n in (layers * heads, len(sums.ffn_counts)))
        ranking = Ranking(*scores, *orders)
    results = (ranking.head_scores, ranking.ffn_scores, ranking.head_order, ranking.ffn_order) if ranking else ()
    cuda.run(
        cuda.kernels.importance,
        device,
        heads,
        _table(head_partials, sums.head_counts),
        _table(ffn_partials, sums.ffn_counts),
        partials.group,
        partials.whole,
        sums.heads.data_ptr(),
        sums.ffns.data_ptr(),
        *([x.data_ptr() for x in results] or [0] * 4),
    )
    return ranking


def _checked(partial: Tensor | None, heads: int | None, device: torch.device) -> Tensor | None:
    if partial is None:
        return None
    shape = (len(partial),) if heads is None else (len(partial), heads)
    if partial.device != device:
        partial = partial.to(device)
    return cuda.checked("a partial", partial.float(), device, torch.float32, *shape).contiguous()


def _table(partials: list[Tensor | None], counts: list[int]) -> list[tuple[int, int, int]]:
    return [
        (0, 0, count) if x is None or not x.numel() else (x.data_ptr(), len(x), count)
        for x, count in zip(partials, counts, strict=True)
    ]
