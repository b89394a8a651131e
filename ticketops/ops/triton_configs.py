"""Tile sizes of every Triton kernel, by GPU family, dtype, head dimension and sequence length. The table is looked up;
nothing is autotuned at run time.

Every entry is compiled ahead of time for sm_80, sm_90 and sm_100, with dropout and a mask, and none spills a register.
`ticketops doctor --kernels` prints registers, shared memory and programs per multiprocessor; bench/results/kernels-*.md
has them, and python_tests/aot checks every entry. The entries for Hopper, 16-bit dtypes and head dimensions up to 64
were chosen by timing all candidates (`python -m bench.gpu.tiles`, results in bench/results/tiles-<device>.json); such
an entry names the file in `Tile.timed`. No other entry has been timed.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """Block sizes and launch settings of a kernel.

    Attributes:
        rows: rows of a block: queries in the attention kernels, tokens in the others.
        columns: columns of a block: keys in the attention kernels, neurons or channels in the others.
        warps: warps per program.
        stages: number of software pipeline stages.
        registers: upper limit of registers per thread, so that more programs fit a multiprocessor; None for no limit.
        timed: file in bench/results with the timings that the tile was chosen by; None if the tile has not been timed.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    registers: int | None = None
    timed: str | None = None


@dataclass(frozen=True)
class AttentionTiles:
    """Tiles of the attention kernels for one GPU family, dtype size and range of head dimensions.

    Attributes:
        forward: tiles of the forward kernel by the length of the longest sequence that each serves, ascending.
        row_backward: tiles of the backward kernel that holds a whole sequence, ascending. The first one with enough
            rows for the longest sequence is used; without one, the kernels for dq and dkdv run instead.
        dq: tile of the kernel that loops over keys.
        dkdv: tile of the kernel that loops over queries.
        short: tiles for dq and dkdv if sequences have at most SHORT tokens on average; None to use `dq` and `dkdv`.
    """

    forward: dict[int, Tile]
    row_backward: tuple[Tile, ...]
    dq: Tile
    dkdv: Tile
    short: tuple[Tile, Tile] | None = None


#: Mean sequence length, in tokens, up to which the backward pass uses `AttentionTiles.short`.
SHORT = 32
#: A block of more than 64 rows is used for a whole sequence in the backward pass only if sequences fill this fraction
#: of it on average. Times of the whole-sequence kernel against dq and dkdv: 132 and 164 us for sequences of 128 tokens;
#: 196 and 171 us for lengths as in RTE, half of 128; 829 and 293 us for lengths as in SST-2, a tenth of 128 (16,384
#: tokens, 12 heads, bfloat16, dropout; tiles-nvidia-h200.json).
FILLED = 0.75


#: Key in `AttentionTiles.forward` of the tile for sequences longer than all other keys.
LONGER = 2**31

_H200 = "tiles-nvidia-h200.json"
_SHORT_FORWARD = {16: Tile(16, 16, 1, 1), 32: Tile(32, 32, 2, 1)}
_SHORT_BACKWARD = (Tile(16, 16, 1, 1), Tile(32, 32, 2, 1))
_WIDE_SHORT_BACKWARD = (Tile(16, 16, 1, 1), Tile(32, 32, 4, 1), Tile(64, 64, 4, 1))

#: Keys: GPU family (see `family`), bytes per element, largest head dimension. Attention over sequences of BERT's
#: lengths is bound by memory, so tiles are small enough for several programs per multiprocessor where registers allow
#: it. Blocks of 64 rows also waste less work on padding in batches of mixed lengths.
ATTENTION: dict[tuple[int, int, int], AttentionTiles] = {
    # A whole-sequence backward block of 128 x 128 spills on sm_80, where both accumulators are in registers.
    (8, 2, 64): AttentionTiles(
        {**_SHORT_FORWARD, LONGER: Tile(64, 64, 4, 2)},
        (*_SHORT_BACKWARD, Tile(64, 64, 4, 1)),
        Tile(64, 32, 4, 2),
        Tile(32, 64, 4, 2),
    ),
    (8, 2, 128): AttentionTiles(
        {**_SHORT_FORWARD, LONGER: Tile(64, 64, 8, 2)}, _WIDE_SHORT_BACKWARD, Tile(64, 64, 8, 2), Tile(64, 64, 8, 2)
    ),
    (9, 2, 64): AttentionTiles(
        {
            **_SHORT_FORWARD,
            128: Tile(64, 32, 4, 3, timed=_H200),
            LONGER: Tile(128, 64, 8, 3, timed=_H200),
        },
        (*_SHORT_BACKWARD, Tile(64, 64, 4, 1, timed=_H200), Tile(128, 128, 8, 1, timed=_H200)),
        Tile(64, 32, 4, 3, timed=_H200),
        Tile(64, 64, 4, 1, timed=_H200),
        (Tile(32, 32, 4, 2, timed=_H200), Tile(32, 32, 4, 2, timed=_H200)),
    ),
    (9, 2, 128): AttentionTiles(
        {**_SHORT_FORWARD, 64: Tile(64, 32, 4, 2), LONGER: Tile(128, 64, 8, 2)},
        (*_WIDE_SHORT_BACKWARD, Tile(128, 128, 8, 1)),
        Tile(64, 64, 8, 2),
        Tile(32, 64, 8, 2),
    ),
    # float32 products run on CUDA cores with both operands in registers, so the tiles are small.
    (8, 4, 64): AttentionTiles(
        {LONGER: Tile(32, 32, 8, 1)},
        (Tile(16, 16, 4, 1), Tile(32, 32, 4, 1)),
        Tile(16, 32, 8, 1),
        Tile(32, 32, 8, 1),
    ),
    (8, 4, 128): AttentionTiles(
        {LONGER: Tile(16, 16, 4, 1)},
        (Tile(16, 16, 8, 1),),
        Tile(16, 16, 8, 1),
        Tile(16, 32, 8, 1),
    ),
}
# Blackwell keeps accumulators in tensor memory, which leaves more registers.
ATTENTION |= {
    (10, 2, 64): AttentionTiles(
        {**_SHORT_FORWARD, 128: Tile(64, 64, 4, 2), LONGER: Tile(128, 64, 8, 2, registers=128)},
        (*_SHORT_BACKWARD, Tile(64, 64, 4, 1), Tile(128, 128, 8, 1)),
        Tile(64, 64, 4, 2),
        Tile(64, 64, 4, 2),
    ),
    (10, 2, 128): ATTENTION[9, 2, 128],
}
ATTENTION |= {(major, 4, width): ATTENTION[8, 4, width] for major in (9, 10) for width in (64, 128)}

#: Entries of ATTENTION that differ for attention within a window. Its bounds take registers too, and Triton 3.6 would
#: spill with the tiles above.
WINDOWED: dict[tuple[int, int, int], AttentionTiles] = {
    (8, 2, 64): replace(ATTENTION[8, 2, 64], dkdv=Tile(32, 32, 4, 2)),
    (9, 2, 64): replace(ATTENTION[9, 2, 64], dkdv=Tile(32, 64, 4, 2)),
    (10, 2, 64): replace(ATTENTION[10, 2, 64], dkdv=Tile(32, 64, 4, 2)),
}

#: Entries that differ for attention with a position bias, with or without a window. Its addresses take registers, and
#: the kernels that sum its gradient need at least as many columns as rows.
BIASED: dict[tuple[int, int, int], AttentionTiles] = {
    (8, 2, 64): AttentionTiles(
        {**_SHORT_FORWARD, LONGER: Tile(64, 32, 4, 2)},
        (*_SHORT_BACKWARD, Tile(64, 64, 4, 1)),
        Tile(32, 32, 4, 2),
        Tile(32, 32, 4, 2),
    ),
    (8, 2, 128): replace(
        ATTENTION[8, 2, 128],
        forward={16: Tile(16, 16, 1, 1), 32: Tile(32, 32, 4, 1), LONGER: Tile(64, 64, 8, 2)},
        row_backward=(Tile(16, 16, 1, 1), Tile(32, 32, 4, 1), Tile(64, 64, 8, 1)),
    ),
    (9, 2, 64): replace(WINDOWED[9, 2, 64], row_backward=(*_SHORT_BACKWARD, Tile(64, 64, 4, 1)), dq=Tile(64, 64, 4, 2)),
    (9, 2, 128): replace(ATTENTION[9, 2, 128], row_backward=_WIDE_SHORT_BACKWARD),
    (10, 2, 64): AttentionTiles(
        {**_SHORT_FORWARD, LONGER: Tile(64, 64, 4, 2)},
        (*_SHORT_BACKWARD, Tile(64, 64, 4, 1)),
        Tile(64, 64, 8, 1),
        Tile(32, 64, 4, 2),
    ),
    (10, 2, 128): replace(ATTENTION[9, 2, 128], row_backward=_WIDE_SHORT_BACKWARD),
    **{(major, 4, 64): replace(ATTENTION[8, 4, 64], forward={LONGER: Tile(16, 32, 8, 1)}) for major in (8, 9, 10)},
}

#: Square tiles for attention with position tables, by the same keys: of the forward kernel, of those for dq and dkdv,
#: and of that for the tables' gradients.
POSITIONED: dict[tuple[int, int, int], tuple[Tile, Tile, Tile, Tile]] = {
    (8, 2, 64): (Tile(32, 32, 4, 1),) * 4,
    (9, 2, 64): (Tile(64, 64, 8, 1), Tile(32, 32, 4, 1), Tile(32, 32, 4, 1), Tile(32, 32, 8, 1)),
    (10, 2, 64): (Tile(64, 64, 8, 1), Tile(64, 64, 8, 1), *(Tile(32, 32, 4, 1),) * 2),
    **{(major, 2, 128): (Tile(32, 32, 8, 1),) * 4 for major in (8, 9, 10)},
    # Wider heads would spill.
    **{(major, 4, 64): (Tile(16, 16, 8, 1),) * 4 for major in (8, 9, 10)},
}

#: Tokens x neurons of the pointwise FFN kernels.
FFN = Tile(32, 128, 4, 1, timed=_H200)
#: The same for a gated FFN, whose kernels also read and write the gate.
GATED_FFN = Tile(16, 64, 4, 1)
#: Elements copied by one program, of slices of weights.
SLICES = Tile(1, 1024, 4, 1)
#: Columns summed by one program of the LayerNorm's second stage.
NORM_FINISH = Tile(32, 64, 4, 1)


def family(capability: tuple[int, int]) -> int:
    """Returns the GPU family whose entries of the tables serve a GPU.

    Args:
        capability: compute capability, e.g. (9, 0).

    Returns:
        9 for Hopper, 10 for data-centre Blackwell, 8 for all others: these lack the matrix units of both and have no
        more shared memory than Ampere GPUs.
    """
    return capability[0] if capability[0] in (9, 10) else 8


def power_of_two(n: int, least: int = 16) -> int:
    """Rounds a size up to a power of two.

    Args:
        n: a size.
        least: lower limit, itself a power of two; 16 is the minimum for operands of `tl.dot`.

    Returns:
        The smallest power of two that is at least n and at least `least`.
    """
    return max(least, 1 << max(0, n - 1).bit_length())


def _key(capability: tuple[int, int], dtype: torch.dtype, head_dim: int) -> tuple[int, int, int]:
    return family(capability), dtype.itemsize, 64 if head_dim <= 64 else 128


def _attention(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, windowed: bool, biased: bool
) -> AttentionTiles:
    key = _key(capability, dtype, head_dim)
    return (biased and BIASED.get(key)) or (windowed and WINDOWED.get(key)) or ATTENTION[key]


def attention_forward(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    max_length: int,
    windowed: bool = False,
    biased: bool = False,
    positioned: bool = False,
) -> Tile:
    """Returns the tile of the attention forward kernel.

    Args:
        capability: compute capability.
        dtype: dtype of q, k and v.
        head_dim: D.
        max_length: length of the longest sequence in tokens.
        windowed: True if attention is limited to a window.
        biased: True if a position bias is added to the scores.
        positioned: True if there are position tables.
    """
    if positioned:
        return POSITIONED[_key(capability, dtype, head_dim)][0]
    tiles = _attention(capability, dtype, head_dim, windowed, biased).forward
    return next(tile for longest, tile in tiles.items() if longest >= max_length)


def attention_backward(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    max_length: int,
    windowed: bool = False,
    mean_length: float = LONGER,
    biased: bool = False,
    positioned: bool = False,
) -> tuple[Tile, ...]:
    """Returns the tiles of the attention backward kernels.

    Args:
        capability: compute capability.
        dtype: dtype of q, k and v.
        head_dim: D.
        max_length: length of the longest sequence in tokens.
        windowed: True if attention is limited to a window.
        mean_length: mean length of the sequences in tokens.
        biased: True if a position bias is added to the scores.
        positioned: True if there are position tables.

    Returns:
        One tile, for the kernel that holds a whole sequence, if the sequences fit its block and fill enough of it. Else
        two tiles, for the kernel of dq and the kernel of dk and dv. With position tables always three, the last one for
        the kernel of the tables' gradients.
    """
    if positioned:
        return POSITIONED[_key(capability, dtype, head_dim)][1:]
    tiles = _attention(capability, dtype, head_dim, windowed, biased)
    whole = next((tile for tile in tiles.row_backward if tile.rows >= max_length), None)
    if whole is not None and (whole.rows <= 64 or mean_length >= FILLED * whole.rows):
        return (whole,)
    if tiles.short is not None and mean_length <= SHORT:
        return tiles.short
    return tiles.dq, tiles.dkdv


def norm_forward(channels: int) -> Tile:
    """Returns the tile of the LayerNorm's forward kernel: whole rows, at least 1024 elements per program.

    Args:
        channels: C.
    """
    return _whole_rows(channels, 4)


def norm_backward(channels: int) -> Tile:
    """Returns the tile of the LayerNorm's backward kernel, which keeps three sums over rows in registers.

    Args:
        channels: C.
    """
    return _whole_rows(channels, 8)


@cache
def _whole_rows(channels: int, warps: int) -> Tile:
    columns = power_of_two(channels)
    return Tile(
        max(1, 1024 // columns), columns, warps if columns <= 2048 else 16, 1, timed=_H200 if columns == 1024 else None
    )
