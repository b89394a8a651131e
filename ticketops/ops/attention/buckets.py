"""The relative-position bias of T5 and MPNet: a table with an entry for each bucket of distances between two tokens."""

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


def _buckets(distances: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Returns the bucket of each distance from a query to a key: half of the buckets for keys at the query and before
    it, half for keys behind it. Half of these have one distance each, the others are logarithmic."""
    half = buckets // 2
    exact, far = half // 2, distances.abs()
    # In this order of operations, so that rounding puts every distance where transformers puts it.
    logarithmic = torch.log(far.clamp_min(1).float() / exact) / math.log(max_distance / exact) * (half - exact)
    large = (exact + logarithmic.long()).clamp_max(half - 1)
    return (distances > 0) * half + torch.where(far < exact, far, large)
