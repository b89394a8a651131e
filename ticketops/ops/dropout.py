"""Counter-based dropout: whether an attention weight is kept is a function of (seed, query row, head, key), and whether
an element of a matrix is kept is one of (seed, row, column), so that every backend draws the same mask and the backward
pass replays it instead of storing it."""

import math

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9
_MIX_1 = 0x7FEB352D
_MIX_2 = 0x846CA68B


def _signed(word: int) -> int:
    """The int32 that has the same bits as a 32-bit word, since torch lacks unsigned arithmetic on every device."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word


def _mix_(x: Tensor) -> Tensor:
    """Scrambles int32 words in place: two rounds of xor-shift and multiply (the `lowbias32` constants of the
    hash-prospector search)."""
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(_signed(_MIX_1))
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(_signed(_MIX_2))
    return x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF))


def draw_seed(device: torch.device, calls: int = 1) -> Tensor:
    """Draws the seeds of dropout calls from torch's own generator, so that torch.manual_seed governs them.

    Args:
        device: where the calls run; a tensor seed keeps a captured CUDA graph drawing anew.
        calls: how many; on a CPU one draw for several gives what as many draws for one would.

    Returns:
        int64 [calls], non-negative, below 2**62.
    """
    return torch.randint(2**62, (calls,), dtype=torch.int64, device=device)


def keep_threshold(p: float) -> int:
    """The number of 2**-24 steps below which a word's upper 24 bits mean "dropped"; one rule for every backend.

    Args:
        p: dropout probability, 0 <= p < 1.

    Returns:
        An integer in [0, 2**24].
    """
    return math.ceil(p * (1 << 24))


def row_keys(seed: Tensor | None, first_row: int, rows: int, heads: Tensor, num_heads: int) -> Tensor:
    """What a row of attention weights takes from the seed: mix(row * num_heads + head + lo) ^ hi, see `keep_mask`.

    Args:
        seed: int64 [1] of this call, never None where p > 0.
        first_row: the first row in the flat token matrix.
        rows: how many rows from there.
        heads: int64 [h], which heads.
        num_heads: H, heads of the whole call.

    Returns:
        int32 [h, rows].
    """
    assert seed is not None
    word = int(seed.item())
    numbers = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=heads.device)
    keys = (numbers[None, :] * num_heads + heads[:, None]).to(torch.int32).add_(_signed(word))
    return _mix_(keys).bitwise_xor_(_signed(word >> 32))


def kept(row_keys: Tensor, keys: slice, p: float) -> Tensor:
    """Which weights of these rows are kept: mix(row key + key * 0x9E3779B9) >> 8 >= ceil(p * 2**24).

    Args:
        row_keys: int32 [h, queries] of one sequence.
        keys: which of its keys, start and stop; key j is the j-th token of the sequence.
        p: dropout probability.

    Returns:
        bool [h, queries, keys].
    """
    columns = torch.arange(keys.start, keys.stop, dtype=torch.int32, device=row_keys.device) * _signed(_GOLDEN)
    words = _mix_(row_keys[:, :, None] + columns)
    return (words >> 8).bitwise_and_(0xFFFFFF) >= keep_threshold(p)


def keep_mask(
    seed: Tensor | None, first_row: int, queries: int, heads: Tensor, num_heads: int, keys: int, p: float
) -> Tensor:
    """The dropout mask of one sequence.

    word(row, head, key) = mix(mix(row * num_heads + head + lo) ^ hi + key * 0x9E3779B9) in 32-bit wrapping arithmetic,
    where `lo` and `hi` are the halves of the seed; kept where word >> 8 >= ceil(p * 2**24).

    Args:
        seed: int64 [1] of this call, never None where p > 0.
        first_row: the sequence's first row in the flat token matrix.
        queries: its number of query rows.
        heads: int64 [h], which heads.
        num_heads: H, heads of the whole call (pruned ones included, so that a mask of 0 leaves the other heads' draws
            alone).
        keys: its number of keys; key j is the j-th token of the sequence.
        p: dropout probability.

    Returns:
        bool [h, queries, keys], True where the weight is kept.
    """
    return kept(row_keys(seed, first_row, queries, heads, num_heads), slice(0, keys), p)


def keep_elements(seed: Tensor | None, rows: int, columns: int, p: float, device: torch.device) -> Tensor:
    """The dropout mask of a matrix: `keep_mask` of one sequence with a single head, its columns for keys.

    Args:
        seed: int64 [1] of this call.
        rows: T.
        columns: C.
        p: dropout probability.
        device: where the mask is wanted.

    Returns:
        bool [T, C], True where the element is kept.
    """
    assert seed is not None
    head = torch.zeros(1, dtype=torch.int64, device=device)
    return keep_mask(seed, 0, rows, head, 1, columns, p)[0]
