"""The tile of every Triton kernel, by GPU family, dtype, head dimension and length: one table, looked up and never
searched at run time.

What supports the entries: each is compiled ahead of time for sm_80, sm_90 and sm_100 with dropout and a mask on, and
none spills a register; `ticketops doctor --kernels` prints registers, shared memory and how many programs a
multiprocessor holds, bench/results/kernels-*.md keeps that, and python_tests/aot holds every entry to it. Those of
Hopper for 16 bits and heads of up to 64 were chosen by timings: `python -m bench.gpu.tiles` times every candidate, into
bench/results/tiles-<device>.json, and an entry that a timing has chosen names that file (`Tile.timed`, printed with the
rest). No other entry has been timed.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch


@dataclass(frozen=True)
class Tile:
    """How a kernel cuts its work.

    Attributes:
        rows: rows of a block: queries in the attention kernels, tokens in the others.
        columns: columns of a block: keys in the attention kernels, neurons or channels in the others.
        warps: warps of a program.
        stages: depth of software pipelining.
        depth: of a product's inner dimension taken at a time, where neither rows nor columns are it.
        registers: limit of a thread's registers that the compiler keeps to without spilling, so that more programs
            share a multiprocessor; None leaves it free.
        timed: the file in bench/results whose timing chose the tile; None where no GPU has timed it, and only what the
            compiler made of it supports it.
    """

    rows: int
    columns: int
    warps: int
    stages: int
    depth: int = 0
    registers: int | None = None
    timed: str | None = None


@dataclass(frozen=True)
class AttentionTiles:
    """The attention kernels' tiles for one GPU family, dtype size and range of head dimensions.

    Attributes:
        forward: by the longest sequence served, ascending.
        row_backward: ascending; the first that holds the longest sequence, else dq and dkdv tile it.
        dq: for the kernel that walks over keys.
        dkdv: for the kernel that walks over queries.
        short: for dq and dkdv where sequences have SHORT tokens on average; None for the same.
    """

    forward: dict[int, Tile]
    row_backward: tuple[Tile, ...]
    dq: Tile
    dkdv: Tile
    short: tuple[Tile, Tile] | None = None


#: Sequences of so many tokens on average have smaller tiles in the backward pass.
SHORT = 32
#: Which part of a block of more than 64 rows a sequence must fill on average for the backward pass to take it whole: of
#: 128 x 128 tokens the whole takes 132 us, dq and dkdv 164; of RTE's lengths, half of 128, 196 and 171; of SST-2's, a
#: tenth, 829 and 293 (16,384 tokens, 12 heads, bfloat16, dropout; tiles-nvidia-h200.json).
FILLED = 0.75


#: Of `AttentionTiles.forward`: the entry for sequences longer than all others.
LONGER = 2**31

_H200 = "tiles-nvidia-h200.json"
_SHORT_FORWARD = {16: Tile(16, 16, 1, 1), 32: Tile(32, 32, 2, 1)}
_SHORT_BACKWARD = (Tile(16, 16, 1, 1), Tile(32, 32, 2, 1))
_WIDE_SHORT_BACKWARD = (Tile(16, 16, 1, 1), Tile(32, 32, 4, 1), Tile(64, 64, 4, 1))

#: By family (see `family`), bytes of an element and the largest head dimension served. Attention of BERT's lengths
#: waits for memory, so several programs share a multiprocessor where registers allow it; and a block of 64 rows leaves
#: less of a ragged batch's work to rows that are not there.
ATTENTION: dict[tuple[int, int, int], AttentionTiles] = {
    # A whole 128 x 128 backward spills on sm_80, whose products keep both accumulators in registers.
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
    # Products in float32 run on the plain cores with both operands in registers, hence the small tiles.
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
# Blackwell's accumulators lie in a memory of their own and leave the registers free.
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

#: What differs where there is a window, whose bounds take registers too: Triton 3.6 would spill with the tiles above.
WINDOWED: dict[tuple[int, int, int], AttentionTiles] = {
    (8, 2, 64): replace(ATTENTION[8, 2, 64], dkdv=Tile(32, 32, 4, 2)),
    (9, 2, 64): replace(ATTENTION[9, 2, 64], dkdv=Tile(32, 64, 4, 2)),
    (10, 2, 64): replace(ATTENTION[10, 2, 64], dkdv=Tile(32, 64, 4, 2)),
}

#: Tokens x neurons of the pointwise FFN kernels.
FFN = Tile(32, 128, 4, 1, timed=_H200)
#: The same where a gate is read and written beside the activations.
GATED_FFN = Tile(16, 64, 4, 1)
#: Blocks of the indexed projections' products, by family and bytes of an element.
PROJECTION: dict[tuple[int, int], Tile] = {
    (8, 2): Tile(128, 128, 8, 3, 32),
    (9, 2): Tile(128, 64, 4, 3, 64, timed=_H200),
    (10, 2): Tile(128, 128, 8, 3, 64),
    **{(major, 4): Tile(64, 64, 8, 2, 16) for major in (8, 9, 10)},
}
#: Rows x channels of one group in the gradient's second stage.
PROJECTION_FINISH = Tile(32, 64, 8, 1)
#: Up to how many tokens the indexed projections are chosen over compaction, by family and bytes of an element. They
#: save some 25 launches a layer, which wait for the host. On an H200 the three kernels of q, k and v, with half of
#: BERT-base's heads, take 82 us together for 2,048 tokens and 366 for 16,384 (tiles-nvidia-h200.json). For products of
#: compacted weights some 15 and 125 us, besides 60 of copies, are an estimate from 700 TFLOP/s: `make gpu` measures
#: both ways at 4k to 64k tokens, which no GPU has done yet. In float32 a Triton product runs far behind cuBLAS.
MOST_INDEXED_TOKENS: dict[tuple[int, int], int] = {
    **{(major, 2): 4096 for major in (8, 9, 10)},
    **{(major, 4): 0 for major in (8, 9, 10)},
}
#: Columns summed by one program of the LayerNorm's second stage.
NORM_FINISH = Tile(32, 64, 4, 1)


def family(capability: tuple[int, int]) -> int:
    """The part of the table that serves a GPU.

    Args:
        capability: compute capability.

    Returns:
        9 for Hopper, 10 for data-centre Blackwell, 8 for all others, which have neither's matrix units nor more shared
        memory than an Ampere GPU.
    """
    return capability[0] if capability[0] in (9, 10) else 8


def power_of_two(n: int, least: int = 16) -> int:
    """The block size that holds n.

    Args:
        n: a size.
        least: the smallest block, 16 for operands of matrix products.

    Returns:
        The smallest power of two that is at least n and `least`.
    """
    return max(least, 1 << max(0, n - 1).bit_length())


def _attention(capability: tuple[int, int], dtype: torch.dtype, head_dim: int, windowed: bool) -> AttentionTiles:
    key = family(capability), dtype.itemsize, 64 if head_dim <= 64 else 128
    return (windowed and WINDOWED.get(key)) or ATTENTION[key]


def attention_forward(
    capability: tuple[int, int], dtype: torch.dtype, head_dim: int, max_length: int, windowed: bool = False
) -> Tile:
    """The forward kernel's tile.

    Args:
        capability: compute capability.
        dtype: of q, k and v.
        head_dim: D.
        max_length: tokens of the longest sequence.
        windowed: attention reaches no further than a window.

    Returns:
        The tile.
    """
    tiles = _attention(capability, dtype, head_dim, windowed).forward
    return next(tile for longest, tile in tiles.items() if longest >= max_length)


def attention_backward(
    capability: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    max_length: int,
    windowed: bool = False,
    mean_length: float = LONGER,
) -> tuple[Tile] | tuple[Tile, Tile]:
    """The backward kernels' tiles.

    Args:
        capability: compute capability.
        dtype: of q, k and v.
        head_dim: D.
        max_length: tokens of the longest sequence.
        windowed: attention reaches no further than a window.
        mean_length: tokens for each sequence.

    Returns:
        One tile where whole sequences fit a program and fill it, else those for dq and for dk with dv.
    """
    tiles = _attention(capability, dtype, head_dim, windowed)
    whole = next((tile for tile in tiles.row_backward if tile.rows >= max_length), None)
    if whole is not None and (whole.rows <= 64 or mean_length >= FILLED * whole.rows):
        return (whole,)
    if tiles.short is not None and mean_length <= SHORT:
        return tiles.short
    return tiles.dq, tiles.dkdv


def projection(capability: tuple[int, int], dtype: torch.dtype) -> Tile:
    """The tile of the indexed projections and of their weight gradient.

    Args:
        capability: compute capability.
        dtype: of the tokens.

    Returns:
        The tile.
    """
    return PROJECTION[family(capability), dtype.itemsize]


def most_indexed_tokens(capability: tuple[int, int], dtype: torch.dtype) -> int:
    """Up to how many tokens the indexed projections are chosen over compaction.

    Args:
        capability: compute capability.
        dtype: of the tokens.

    Returns:
        The number.
    """
    return MOST_INDEXED_TOKENS[family(capability), dtype.itemsize]


def norm_forward(channels: int) -> Tile:
    """The tile of the LayerNorm's forward kernel: whole rows, at least 1024 elements a program.

    Args:
        channels: C.

    Returns:
        The tile.
    """
    return _whole_rows(channels, 4)


def norm_backward(channels: int) -> Tile:
    """The tile of the LayerNorm's backward kernel, which keeps three sums over rows in registers.

    Args:
        channels: C.

    Returns:
        The tile.
    """
    return _whole_rows(channels, 8)


@cache
def _whole_rows(channels: int, warps: int) -> Tile:
    columns = power_of_two(channels)
    return Tile(
        max(1, 1024 // columns), columns, warps if columns <= 2048 else 16, 1, timed=_H200 if columns == 1024 else None
    )
