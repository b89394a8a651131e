"""python -m bench.gpu.tiles [--output DIR] [--only forward_kernel,dq_kernel,...] [--repeat MS]

Times each Triton kernel alone with every candidate tile, on BERT-base's shapes in bfloat16, to choose the entries of
ticketops.ops.triton_configs. Writes tiles-<device>.json, and prints for each kernel and workload the table's tile and
the fastest three.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from bench.contenders import Shape
from bench.gpu.machine import ROOT, Row, machine, stem
from bench.lengths import draw, rows_of
from ticketops.files import write_atomically
from ticketops.ops import triton_common, triton_configs
from ticketops.ops.attention import triton as attention
from ticketops.ops.ffn import triton as ffn
from ticketops.ops.residual import triton as residual
from ticketops.ops.triton_configs import Tile

HEADS, HEAD_DIM, CHANNELS, NEURONS, TOKENS = 12, 64, 768, 3072, 16384
Launch = tuple[Any, int, Tile, dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A kernel on a workload.

    Attributes:
        kernel: name of the kernel's function.
        workload: description of the inputs.
        module: module that launches the kernel.
        entry: attribute of triton_configs that determines its tile.
        value: function from a tile to a value of that attribute that selects the tile.
        call: runs the op, which launches the kernel and perhaps others.
        tiles: candidates.
    """

    kernel: str
    workload: str
    module: Any
    entry: str
    value: Callable[[Tile], Any]
    call: Callable[[], object]
    tiles: list[Tile]


def _grid(rows: tuple, columns: tuple, warps: tuple, stages: tuple, registers: tuple = (None,)) -> list[Tile]:
    return [Tile(r, c, w, s, registers=g) for r, c, w, s, g in product(rows, columns, warps, stages, registers)]


FORWARD = (
    _grid((32,), (32, 64), (2, 4), (1, 2))
    + _grid((64,), (32, 64, 128), (4,), (1, 2, 3))
    + _grid((64,), (64, 128), (4,), (1, 2), (128,))
    + _grid((128,), (32, 64, 128), (8,), (2, 3), (None, 128))
    + _grid((128,), (64, 128), (4,), (2, 3))
)
ROW_BACKWARD = {
    64: _grid((64,), (64,), (4, 8), (1,), (None, 128)),
    128: _grid((128,), (128,), (8, 16), (1,), (None, 128)),
}
TILED_BACKWARD = (
    _grid((32,), (32, 64), (4,), (1, 2, 3))
    + _grid((64,), (32, 64, 128), (4,), (1, 2, 3))
    + _grid((128,), (32, 64), (4, 8), (1, 2, 3))
    + _grid((64,), (128,), (8,), (1, 2))
    + _grid((128,), (128,), (8,), (1, 2))
)
NORM = [Tile(rows, 1024, warps, 1) for rows in (1, 2, 4) for warps in (2, 4, 8)]
FFN = _grid((8, 16, 32, 64), (64, 128, 256), (4, 8), (1,))


def _shape(lengths: tuple[int, ...]) -> Shape:
    return Shape(lengths, CHANNELS, HEADS, NEURONS, layers=1)


def _randn(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda").bfloat16()


def _attention_cases() -> Iterator[Case]:
    tasks = {f"{TOKENS // n} x {n}": str(n) for n in (64, 128, 256, 512)}
    tasks |= {f"lengths of {task}": task for task in ("sst2", "rte")}
    for (work, task), dropout_p in product(tasks.items(), (0.0, 0.1)):
        shape = _shape(draw(task, rows_of(task, TOKENS)))
        q, k, v, dout = (_randn(shape.tokens, HEADS, HEAD_DIM) for _ in range(4))
        sequences = shape.sequences
        seed = torch.tensor([5], device="cuda") if dropout_p else None
        spans = (sequences.starts, sequences.lengths)
        options = (None, seed, sequences.max_length, HEAD_DIM**-0.5, dropout_p)

        def forward(x: tuple = (q, k, v), spans: tuple = spans, options: tuple = options) -> tuple[Tensor, Tensor]:
            return attention.forward(*x, *spans, *options)

        out, lse = forward()

        def backward(
            x: tuple = (dout, q, k, v, out, lse), spans: tuple = spans, options: tuple = options
        ) -> tuple[Tensor, ...]:
            return attention.backward(*x, *spans, *options)

        name = f"{work}, dropout {dropout_p}"
        most = triton_configs.power_of_two(sequences.max_length)
        tiles = [tile for tile in FORWARD if tile.rows <= most]
        yield Case("forward_kernel", name, attention, "attention_forward", lambda tile: lambda *a: tile, forward, tiles)
        if most in ROW_BACKWARD:
            yield Case(
                "row_backward_kernel",
                name,
                attention,
                "attention_backward",
                lambda tile: lambda *a: (tile,),
                backward,
                ROW_BACKWARD[most],
            )
        for kernel in ("dq_kernel", "dkdv_kernel"):
            yield Case(
                kernel,
                name,
                attention,
                "attention_backward",
                lambda tile: lambda *a: (tile, tile),
                backward,
                [tile for tile in TILED_BACKWARD if max(tile.rows, tile.columns) <= most],
            )


def _pointwise_cases() -> Iterator[Case]:
    for tokens in (2048, TOKENS):
        lengths = _shape((128,) * (tokens // 128)).sequences
        x, w1, w2 = _randn(tokens, CHANNELS), _randn(NEURONS, CHANNELS), _randn(CHANNELS, NEURONS)
        b1, b2 = _randn(NEURONS), _randn(CHANNELS)
        results = ffn.forward(x, w1, b1, w2, b2, None, None, "gelu")

        def ffn_forward(x: tuple = (x, w1, b1, w2, b2)) -> object:
            return ffn.forward(*x, None, None, "gelu")

        def ffn_backward(
            x: tuple = (x, *results, x, w1, w2), spans: tuple = (lengths.starts, lengths.lengths)
        ) -> object:
            return ffn.backward(*x, *spans, None, None, "gelu", [True] * 5, True, False, False)

        name = f"{tokens} tokens"
        for kernel, call in (("forward_kernel", ffn_forward), ("backward_kernel", ffn_backward)):
            yield Case(kernel, f"FFN, {name}", ffn, "FFN", lambda tile: tile, call, FFN)
        # As under autocast, which keeps the residual in float32.
        stream, gradient = (torch.randn((tokens, CHANNELS), device="cuda") for _ in range(2))
        seed, gamma = torch.tensor([5], device="cuda"), torch.ones(CHANNELS, device="cuda")
        _, mean, rstd = residual.forward(x, stream, b2, gamma, gamma, seed, 0.1, 1e-5)

        def norm_forward(x: tuple = (x, stream, b2, gamma, gamma, seed, 0.1, 1e-5)) -> object:
            return residual.forward(*x)

        def norm_backward(x: tuple = (gradient, x, stream, b2, gamma, mean, rstd, seed, 0.1)) -> object:
            return residual.backward(*x)

        for kernel, entry, call in (
            ("forward_kernel", "norm_forward", norm_forward),
            ("backward_kernel", "norm_backward", norm_backward),
        ):
            yield Case(kernel, f"LayerNorm, {name}", residual, entry, lambda tile: lambda channels: tile, call, NORM)


def cases() -> Iterator[Case]:
    """Yields every kernel and workload to time."""
    yield from _attention_cases()
    yield from _pointwise_cases()


def launches(case: Case, tile: Tile | None) -> list[Launch]:
    """Runs a case and records the launches of its kernel.

    Args:
        case: kernel and workload.
        tile: tile of the kernel; None for the table's.

    Returns:
        The arguments of each launch.
    """
    found: list[Launch] = []

    def record(kernel: Any, programs: int, its_tile: Tile, **arguments: Any) -> None:
        if kernel.fn.__name__ == case.kernel:
            found.append((kernel, programs, its_tile, arguments))
        triton_common.launch(kernel, programs, its_tile, **arguments)

    value = getattr(triton_configs, case.entry) if tile is None else case.value(tile)
    with mock.patch.object(case.module, "launch", record), mock.patch.object(triton_configs, case.entry, value):
        case.call()
    return found


def timed(case: Case, tile: Tile | None, repeat: int) -> Row:
    """Times a case's kernel.

    Args:
        case: kernel and workload.
        tile: tile of the kernel; None for the table's.
        repeat: milliseconds of repeats.

    Returns:
        The row; a tile that the GPU cannot run has a note in place of times.
    """
    row: Row = {"kernel": case.kernel, "workload": case.workload, "shipped": tile is None}
    if tile is not None:
        row["tile"] = asdict(tile)
    try:
        found = launches(case, tile)
        if not found:
            return {**row, "ms": None, "note": "not launched"}
        ((kernel, programs, its_tile, arguments),) = found
        median, low, high = triton.testing.do_bench(
            lambda: triton_common.launch(kernel, programs, its_tile, **arguments),
            warmup=repeat // 4,
            rep=repeat,
            quantiles=[0.5, 0.2, 0.8],
        )
    # Tiles that do not fit fail with exceptions of any class.
    except Exception as error:
        return {**row, "ms": None, "note": f"{type(error).__name__}: {str(error)[:100]}"}
    return {**row, "tile": asdict(its_tile), "ms": median, "ms_q20": low, "ms_q80": high}


def _short(row: Row) -> str:
    tile = Tile(**row["tile"])
    extra = f" registers {tile.registers}" * bool(tile.registers)
    return f"{1e3 * row['ms']:.1f} us {tile.rows}x{tile.columns} w{tile.warps} s{tile.stages}{extra}"


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.tiles", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--output", type=Path, default=ROOT / "bench" / "results", help="folder for the results")
    parser.add_argument("--only", help="names of kernels, separated by commas (default: all)")
    parser.add_argument("--repeat", type=int, default=20, help="milliseconds of repeats for each tile (default: 20)")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench.gpu.tiles needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    rows: list[Row] = []
    for case in cases():
        if options.only and case.kernel not in options.only.split(","):
            continue
        mine = [timed(case, tile, options.repeat) for tile in (None, *case.tiles)]
        rows += mine
        shipped, best = mine[:1], sorted((row for row in mine[1:] if row["ms"] is not None), key=lambda row: row["ms"])
        entries = [_short(row) for row in [*shipped, *best[:3]] if row["ms"] is not None]
        print(f"{case.kernel}, {case.workload}: {' | '.join(entries) or mine[0]['note']}", flush=True)
    place = machine("bf16")
    options.output.mkdir(parents=True, exist_ok=True)
    # One line per row: there are over a thousand.
    lines = ",\n".join(map(json.dumps, rows))
    path = options.output / f"tiles-{stem(place['device'])}.json"
    write_atomically(path, f'{{"machine": {json.dumps(place)},\n"rows": [\n{lines}\n]}}\n')
    return 0


if __name__ == "__main__":
    sys.exit(main())
