"""Tables with an entry for each bucket of distances between two tokens: the relative-position bias of T5 and MPNet, and
the position vectors of DeBERTa."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from ticketops.errors import InputError


def bucketed_bias(table: Tensor, max_length: int, *, max_distance: int = 128) -> Tensor:
    """Looks up the bias of every distance, in the form that `ticketops.ops.attention` takes. Layers that share a table
    share the result.

    Args:
        table: [H, buckets], an entry for each head and bucket; float. Differentiable.
        max_length: length of the longest sequence in tokens.
        max_distance: distance, in tokens, from which on all distances of one sign are in one bucket.

    Returns:
        [H, 2 * max_length - 1] in the table's dtype, from distance 1 - max_length to max_length - 1; one column for
        max_length 0.

    Raises:
        InputError: a table of another shape, or a max_distance that leaves no distances between the exact buckets and
            the last.

    Source:
        Raffel et al. 2020 (arXiv 1910.10683), section 2.1; bidirectional.
    """
    if table.ndim != 2 or table.shape[1] < 4 or table.shape[1] % 2:
        raise InputError(f"table must have shape [heads, an even number of at least 4 buckets], got {[*table.shape]}")
    if max_distance <= table.shape[1] // 4:
        raise InputError(
            f"max_distance must be more than a quarter of the {table.shape[1]} buckets, which have one distance each, "
            f"got {max_distance}"
        )
    reach = max(max_length, 1) - 1
    distances = torch.arange(-reach, reach + 1, device=table.device)
    return functional.embedding(_buckets(distances, table.shape[1], max_distance), table.t()).t()


def position_vectors(
    table: Tensor, max_length: int, *, buckets: int | None, max_distance: int
) -> tuple[Tensor, Tensor | None]:
    """Selects the vectors that the distances of a batch need from DeBERTa's table of relative positions. Projected, and
    looked up at the returned places, they are what `ticketops.ops.attention` takes as position keys and queries.

    Args:
        table: [2 S, C], a vector for each bucket of distances from -S to S - 1, counted from the key to the query.
            Differentiable.
        max_length: length of the longest sequence in tokens.
        buckets: number of buckets for distances of one sign, of which half have one distance each and the others are
            logarithmic; None if all buckets have one distance.
        max_distance: distance, in tokens, behind which logarithmic buckets end.

    Returns:
        Vectors [P, C]; and int64 [2 max_length - 1], the place among them of each distance from the query to the key,
        from 1 - max_length to max_length - 1, or None if the vectors are in that order. max_length 0 counts as 1.

    Source:
        He et al. 2021 (arXiv 2006.03654), section 3.1; the logarithmic buckets are those of DeBERTa-v2.
    """
    span, reach = len(table) // 2, max(max_length, 1) - 1
    if reach < span and (buckets is None or reach <= buckets // 2):
        return table[span - reach : span + reach + 1].flip(0), None
    distances = torch.arange(reach, -reach - 1, -1, device=table.device)
    if buckets is not None:
        distances = _logarithmic(distances, buckets // 2, max_distance)
    return table, (distances + span).clamp(0, 2 * span - 1)


def _logarithmic(distances: Tensor, half: int, max_distance: int) -> Tensor:
    """Returns DeBERTa's bucket of each distance: up to `half` it is the distance itself."""
    far = distances.abs().clamp_min(half - 1)
    # In this order of operations, so that rounding puts every distance where transformers puts it.
    scale = torch.log(torch.tensor((max_distance - 1) / half, device=distances.device))
    large = torch.ceil(torch.log(far / half) / scale * (half - 1)).long() + half
    return torch.where(far <= half, distances, large * distances.sign())


def _buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Returns the bucket of each distance from a query to a key: half of the buckets for keys at the query and before
    it, half for keys behind it. Half of these have one distance each, the others are logarithmic."""
    half = buckets // 2
    exact, far = half // 2, distances.abs()
    # In this order of operations, so that rounding puts every distance where transformers puts it.
    logarithmic = torch.log(far.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    large = (exact + logarithmic.long()).clamp_max(half - 1)
    return (distances > 0) * half + torch.where(far < exact, far, large)
