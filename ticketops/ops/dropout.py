"""Counter-based dropout. A hash of (seed, query row, head, key) decides if an attention weight is kept, and a hash of
(seed, row, column) if an element of a matrix is. So all backends draw the same mask, and the backward pass recomputes
the mask instead of storing it."""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B


def _signed(word: int) -> int:
    """Reinterprets a 32-bit word as int32, because torch has no unsigned arithmetic on some devices."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _mix_(x: Tensor) -> Tensor:
    """Scrambles int32 words in place: two rounds of xor-shift and multiply (the `lowbias32` constants of the
    hash-prospector search)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(_MIX_1))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def draw_seed(device: torch.device, calls: int = 1) -> Tensor:
    """Draws seeds for dropout calls from torch's generator, so that torch.manual_seed makes them reproducible.

    The seed is a tensor, so that each replay of a captured CUDA graph draws a new one.

    Args:
        device: device that the dropout runs on.
        calls: number of seeds. On a CPU, one draw of n seeds gives the same seeds as n draws of one.

    Returns:
        int64 [calls], non-negative, below 2**62.
    """
    return torch.randint(2**62, (calls,), dtype=torch.int64, device=device)


def keep_threshold(p: float) -> int:
    """Converts a dropout probability to the integer threshold that all backends use: an element is dropped if the upper
    24 bits of its 32-bit hash are below it.

    Args:
        p: dropout probability, 0 <= p < 1.

    Returns:
        An integer in [0, 2**24].
    """
    return math.ceil(p * (1 << 24))


def row_keys(seed: Tensor | None, first_row: int, rows: int, heads: Tensor, num_heads: int) -> Tensor:
    """Computes the part of the dropout hash that depends on the query row and head:
    mix(row * num_heads + head + lo) ^ hi, see `keep_mask`.

    Args:
        seed: int64 [1], seed of this call; never None if p > 0.
        first_row: index of the first row in the flat token matrix.
        rows: number of rows.
        heads: int64 [h], indices of the heads.
        num_heads: H, number of heads in the call, pruned ones included.

    Returns:
        int32 [h, rows].
    """
    assert seed is not None
    word = int(seed.item())
    numbers = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=heads.device)
    keys = (numbers[None, :] * num_heads + heads[:, None]).to(torch.int32).add_(_signed(word))
    return _mix_(keys).bitwise_xor_(_signed(word >> 32))


def kept(row_keys: Tensor, keys: slice, p: float) -> Tensor:
    """Computes the dropout mask of a block of attention weights: mix(row key + key * 0x9E3779B9) >> 8 >=
    ceil(p * 2**24).

    Args:
        row_keys: int32 [h, queries], result of `row_keys` for rows of one sequence.
        keys: range of key positions; key j is the j-th token of the sequence.
        p: dropout probability.

    Returns:
        bool [h, queries, keys], True if the weight is kept.
    """
    columns = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=row_keys.device) * _signed(_GOLDEN)
    words = _mix_(row_keys[:, :, None] + columns)
    return (words >> 8).bitwise_and_(0xFFFFFF) >= keep_threshold(p)


def keep_mask(
    seed: Tensor | None, first_row: int, queries: int, heads: Tensor, num_heads: int, keys: int, p: float
) -> Tensor:
    """Computes the dropout mask of the attention weights of one sequence.

    word(row, head, key) = mix(mix(row * num_heads + head + lo) ^ hi + key * 0x9E3779B9) in wrapping 32-bit arithmetic,
    where `lo` and `hi` are the lower and upper 32 bits of the seed. A weight is kept if word >> 8 >= ceil(p * 2**24).

    Args:
        seed: int64 [1], seed of this call; never None if p > 0.
        first_row: index of the sequence's first row in the flat token matrix.
        queries: number of query rows.
        heads: int64 [h], indices of the heads.
        num_heads: H, number of heads in the call. Pruned heads count, so pruning one does not change the masks of the
            others.
        keys: number of keys; key j is the j-th token of the sequence.
        p: dropout probability.

    Returns:
        bool [h, queries, keys], True if the weight is kept.
    """
    return kept(row_keys(seed, first_row, queries, heads, num_heads), slice(0, keys), p)


def keep_elements(seed: Tensor | None, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """Computes the dropout mask of a matrix: `keep_mask` of one sequence with one head and the columns as keys.

    Args:
        seed: int64 [1], seed of this call.
        rows: T, number of rows.
        columns: C, number of columns.
        p: dropout probability.
        device: device of the result.

    Returns:
        bool [T, C], True if the element is kept.
    """
    assert seed is not None
    head = torch.zeros(1, dtype=torch.int64, device=device)
    return keep_mask(seed, 0, rows, head, 1, columns, p)[0]
