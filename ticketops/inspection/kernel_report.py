"""Registers, spills and shared memory of the Triton kernels on any GPU. The launches that the ops would make are
compiled ahead of time, and the numbers are read from the machine code. Needs no GPU."""

import hashlib
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ticketops.files import write_atomically
from ticketops.ops.attention import triton as attention
from ticketops.ops.ffn import ACTIVATIONS
from ticketops.ops.ffn import triton as ffn
from ticketops.ops.layer.copies import Table
from ticketops.ops.residual import triton as residual
from ticketops.ops.rotary import triton as rotary
from ticketops.ops.triton_common import INTERPRETED, compile_options, recorded_launches
from ticketops.ops.triton_configs import Tile

TARGETS = ((8, 0), (9, 0), (10, 0))
#: Shared memory available to one program, in bytes, by major compute capability. Consumer GPUs have less (99 KiB for
#: 8.6, 8.9 and 12.0).
SHARED_LIMIT = {8: 163 * 1024, 9: 227 * 1024, 10: 227 * 1024}
#: Limits per multiprocessor, the same for all of these GPUs: registers, warps, programs; and the bytes of shared memory
#: that the system reserves per program.
_REGISTERS, _WARPS, _PROGRAMS, _SHARED_RESERVED = 65536, 64, 32, 1024
#: Columns of the table that are read from machine code.
_RESOURCES = ("registers", "spill_bytes", "shared_bytes", "per_multiprocessor", "matrix_unit")
_POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Launch:
    """A kernel launch, with everything needed to compile it.

    Attributes:
        kernel: the function decorated with triton.jit.
        tile: block sizes and launch settings.
        arguments: the kernel's arguments by name; tensors are on the meta device.
        target: compute capability to compile for.
        case: dtype and shape of the call, for the table.
    """

    kernel: Any
    tile: Tile
    arguments: dict[str, Any]
    target: tuple[int, int]
    case: dict[str, str]


@dataclass(frozen=True)
class Compiled:
    """Resources of a compiled launch.

    Attributes:
        registers: registers per thread.
        spills: bytes of spilled registers, stores and loads together.
        shared: bytes of shared memory per program.
        matrix_unit: instruction that multiplies matrices: wgmma, tcgen05, mma or none.
    """

    registers: int
    spills: int
    shared: int
    matrix_unit: str


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _recorder(launches: list[Launch], target: tuple[int, int], case: dict[str, str]) -> Callable[..., None]:
    return lambda kernel, tile, arguments: launches.append(Launch(kernel, tile, arguments, target, case))


def attention_launches(
    target: tuple[int, int],
    dtype: torch.dtype,
    head_dim: int,
    length: int,
    *,
    options: bool = True,
    window: int | None = None,
    sequences: int = 2,
    biased: bool = False,
    positioned: bool = False,
    holes: bool = False,
) -> list[Launch]:
    """Lists the launches of one attention call, forward and backward.

    Args:
        target: compute capability.
        dtype: dtype of q, k and v.
        head_dim: D.
        length: length of the longest sequence in tokens.
        options: True turns dropout and a head mask on.
        window: number of tokens to either side that a token attends to, or None.
        sequences: number of sequences in the batch, which has 2 * `length` tokens.
        biased: True adds a position bias.
        positioned: True adds position keys and position queries.
        holes: True keeps holes among the tokens.

    Returns:
        One launch per kernel.
    """
    q = torch.empty((2 * length, 12, head_dim), dtype=dtype, device="meta")
    lse = torch.empty((2 * length, 12), device="meta")
    starts = torch.empty(sequences, dtype=torch.int32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    head_mask = torch.empty(12, device="meta") if options else None
    settings = (starts, starts, head_mask, seed, length, head_dim**-0.5, 0.1 if options else 0.0)
    bias = torch.empty((12, 2 * length - 1), device="meta") if biased else None
    vectors = q.new_empty((2 * length - 1, *q.shape[1:])) if positioned else None
    real = torch.empty(2 * length, dtype=torch.bool, device="meta") if holes else None
    kind = ("" if window is None else ", window") + (", bias" if biased else "") + (", vectors" if positioned else "")
    kind += ", holes" if holes else ""
    case = {"dtype": _name(dtype), "case": f"D={head_dim} S={length}{kind}"}
    launches: list[Launch] = []
    with recorded_launches(target, _recorder(launches, target, case)):
        terms: dict[str, Any] = {"window": window, "bias": bias, "positions": (vectors, vectors), "real": real}
        attention.forward(q, q, q, *settings, **terms)
        attention.backward(q, q, q, q, q, lse, *settings, **terms)
    return launches


def ffn_launches(
    target: tuple[int, int],
    dtype: torch.dtype,
    activation: str = "gelu",
    *,
    masks: bool = True,
    weight_gradients: bool = True,
    token_sums: bool = True,
    neuron_sums: bool = True,
    gated: bool = False,
    dropout_p: float = 0.0,
) -> list[Launch]:
    """Lists the launches of one FFN call, forward and backward.

    Args:
        target: compute capability.
        dtype: dtype of the tokens and weights.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        masks: True passes both masks.
        weight_gradients: True if the weights are trained.
        token_sums: True if the FFN's importance is recorded.
        neuron_sums: True if the neurons' importance is recorded.
        gated: True for a gated FFN without biases.
        dropout_p: probability of dropping an activation.

    Returns:
        One launch per kernel.
    """
    x = torch.empty((256, 768), dtype=dtype, device="meta")
    first = 2 * 3072 if gated else 3072
    shapes = ((first, 768), (first,), (768, 3072), (768,))
    w1, b1, w2, b2 = (x.new_empty(shape) for shape in shapes)
    biases = (None, None) if gated else (b1, b2)
    hidden = x.new_empty((256, 3072))
    pre = torch.cat((hidden, hidden), 1) if gated else hidden
    starts = torch.empty(2, dtype=torch.int32, device="meta")
    ffn_mask = torch.empty((), device="meta") if masks else None
    neuron_mask = torch.empty(hidden.shape[1], device="meta") if masks else None
    wanted: tuple[Any, ...] = ([True] + [weight_gradients] * 4, token_sums, neuron_sums, False)
    kind = (", gated" if gated else "") + (", dropout" if dropout_p else "")
    case = {"dtype": _name(dtype), "case": activation + kind}
    dropout: Any = {"seed": torch.empty(1, dtype=torch.int64, device="meta"), "dropout_p": dropout_p}
    launches: list[Launch] = []
    with recorded_launches(target, _recorder(launches, target, case)):
        weights = (w1, biases[0], w2, biases[1], ffn_mask, neuron_mask, activation)
        ffn.forward(x, *weights, **dropout)
        ffn.backward(x, x, pre, hidden, x, w1, w2, starts, starts, *weights[4:], *wanted, **dropout)
    return launches


def slices_launches(
    target: tuple[int, int], dtype: torch.dtype, weight_dtype: torch.dtype | None = None
) -> list[Launch]:
    """Lists the launches that copy the weights of some of a layer's heads and neurons, and spread their gradients.

    Args:
        target: compute capability.
        dtype: dtype of the copies.
        weight_dtype: dtype of the weights; None for that of the copies.

    Returns:
        One launch for the heads and one for the neurons, forward and backward.
    """
    square, vector = (torch.empty(shape, dtype=weight_dtype or dtype, device="meta") for shape in ((768, 768), (768,)))
    w1, w2 = square.new_empty((3072, 768)), square.new_empty((768, 3072))
    heads, neurons = (torch.empty(kept, dtype=torch.int64, device="meta") for kept in (6, 1001))
    kind = f" of {_name(weight_dtype)} weights" if weight_dtype else ""
    by_heads = [*((x, 0) for x in (square,) * 3 + (vector,) * 3), (square, 1)]
    by_neurons = [(w1, 0), (w1[:, 0].contiguous(), 0), (w2, 1)]
    launches: list[Launch] = []
    for case, tensors, groups, index in (("heads", by_heads, 12, heads), ("neurons", by_neurons, 3072, neurons)):
        copies, spread = Table(), Table()
        for tensor, dim in tensors:
            part = copies.select(tensor, dim, groups, index, dtype)
            spread.spread(part.to(tensor.dtype), tensor, dim, groups, index)
        with recorded_launches(target, _recorder(launches, target, {"dtype": _name(dtype), "case": case + kind})):
            copies.run()
            spread.run()
    return launches


def residual_launches(
    target: tuple[int, int], dtype: torch.dtype, channels: int = 768, *, options: bool = True, wide: bool = False
) -> list[Launch]:
    """Lists the launches of one residual_norm call, forward and backward.

    Args:
        target: compute capability.
        dtype: dtype of the tokens.
        channels: C.
        options: True turns a bias and dropout on.
        wide: True for a float32 residual and a second, 16-bit copy of the result, as in a layer under autocast.

    Returns:
        One launch per kernel.
    """
    x = torch.empty((256, channels), dtype=dtype, device="meta")
    vector, mean = torch.empty(channels, device="meta"), torch.empty(256, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    bias, dropout_p = (vector, 0.1) if options else (None, 0.0)
    launches: list[Launch] = []
    stream, half = (x.float(), x) if wide else (x, None)
    case = {"dtype": _name(dtype), "case": f"C={channels}" + (", float32 residual" if wide else "")}
    with recorded_launches(target, _recorder(launches, target, case)):
        residual.forward(x, stream, bias, vector, vector, seed, dropout_p, 1e-12, half)
        residual.backward(stream, x, stream, bias, vector, mean, mean, seed, dropout_p)
    return launches


def norm_first_launches(target: tuple[int, int], dtype: torch.dtype, channels: int = 768) -> list[Launch]:
    """Lists the launches that a layer with LayerNorm first has beside those of others, forward and backward: rotary
    positions, and the ends of its sublayers.

    Args:
        target: compute capability.
        dtype: dtype of the matrix products. That of the tokens is float32, as under autocast.
        channels: C.

    Returns:
        One launch per kernel and place.
    """
    x = torch.empty((256, channels), dtype=dtype, device="meta")
    stream, vector, mean = x.float(), torch.empty(channels, device="meta"), torch.empty(256, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta")
    qkv, angles = x.new_empty((256, 3, channels // 64, 64)), torch.empty((256, 64), device="meta")
    launches: list[Launch] = []
    # The LayerNorm before attention, that before the FFN, and the end of the layer.
    places = (("first", None, vector, 0.0), ("middle", x, vector, 0.1), ("last", x, None, 0.1))
    for place, sublayer, gamma, dropout_p in places:
        case = {"dtype": _name(dtype), "case": f"C={channels}, LayerNorm first, {place}"}
        with recorded_launches(target, _recorder(launches, target, case)):
            residual.forward_before(sublayer, stream, None, gamma, None, seed, dropout_p, 1e-5, dtype)
            dnormed, statistics = (None, None) if gamma is None else (x, mean)
            residual.first_stage(
                dnormed, sublayer, stream, None, gamma, statistics, statistics, seed, dropout_p, stream, dtype
            )
    with recorded_launches(target, _recorder(launches, target, {"dtype": _name(dtype), "case": "D=64"})):
        rotary.turn_(qkv, angles, angles)
        rotary.turn_(qkv, angles, angles, back=True)
    return launches


def shipped_launches(targets: Iterable[tuple[int, int]] = TARGETS) -> Iterator[Launch]:
    """Lists the launches of every kernel in every configuration of ticketops.ops.triton_configs, as BERT, ModernBERT,
    MPNet and DeBERTa would make them.

    Args:
        targets: compute capabilities.

    Returns:
        The launches, each configuration once.
    """
    for target in targets:
        seen = set()
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for head_dim in (32, 64, 128) if dtype != torch.float16 else (64,):
                # ModernBERT's and MPNet's heads are of size 64. Most layers of ModernBERT have a window, those of MPNet
                # a bias.
                kinds = [(None, False), (64, False), (None, True)] if head_dim == 64 else [(None, False)]
                for window, biased in kinds:
                    lengths = [(16, 2), (32, 2), (64, 2), (128, 4), (128, 16)] if window is None else []
                    for length, sequences in (*lengths, (128, 2), (512, 2)):
                        for launch in attention_launches(
                            target, dtype, head_dim, length, window=window, sequences=sequences, biased=biased
                        ):
                            key = (launch.kernel.__name__, dtype, head_dim, window, biased, launch.tile)
                            if key not in seen:
                                seen.add(key)
                                yield launch
                if dtype != torch.float16 and (dtype, head_dim) != (torch.float32, 128):
                    yield from attention_launches(target, dtype, head_dim, 128, positioned=True)
            if dtype != torch.float16:
                # Only where attention depends on distances are holes kept.
                for terms in ({"window": 64}, {"biased": True}, {"positioned": True}):
                    yield from attention_launches(target, dtype, 64, 128, holes=True, **terms)
            for activation in ACTIVATIONS if dtype == torch.bfloat16 else ("gelu",):
                yield from ffn_launches(target, dtype, activation)
            # Without the last kernel, the second stage of the sums, which is the same with a gate.
            for dropout_p in (0.0, 0.1):
                yield from ffn_launches(target, dtype, gated=True, dropout_p=dropout_p)[:2]
            yield from slices_launches(target, dtype)
            for channels in (384, 768, 1024):
                yield from residual_launches(target, dtype, channels)
        yield from residual_launches(target, torch.bfloat16, wide=True)
        yield from norm_first_launches(target, torch.bfloat16)
        yield from slices_launches(target, torch.bfloat16, torch.float32)


def kernel_table(
    progress: Callable[[str], None] | None = None,
    targets: Iterable[tuple[int, int]] = TARGETS,
    kept: Iterable[dict[str, Any]] = (),
) -> list[dict[str, Any]]:
    """Compiles every configuration of every kernel. Takes minutes the first time, then Triton's cache serves it.

    Args:
        progress: called with a description of each launch before it is compiled.
        targets: compute capabilities.
        kept: rows of an earlier table by the same Triton. A launch with the digest of one is not compiled again.

    Returns:
        One row per kernel, target and configuration, with keys kernel, target, dtype, case, tile, warps, stages,
        registers, spill_bytes, shared_bytes, per_multiprocessor (number of programs that fit one multiprocessor),
        matrix_unit, timed (file with the timings that the configuration was chosen by) and digest (of everything that
        Triton compiles: the kernel's source, its arguments' types and constants, the options and the target).
    """
    rows = []
    resources = {row["digest"]: {name: row[name] for name in _RESOURCES} for row in kept}
    for launch in shipped_launches(targets):
        name = f"{launch.kernel.__module__.split('.')[-2]}.{launch.kernel.__name__.removesuffix('_kernel')}"
        target = "sm_{}{}".format(*launch.target)
        key = digest(launch)
        if key not in resources:
            if progress is not None:
                progress(f"{name} for {target}, {launch.case['dtype']} {launch.case['case']}")
            compiled = compile_launch(launch)
            values = (
                compiled.registers,
                compiled.spills,
                compiled.shared,
                _per_multiprocessor(compiled, launch),
                compiled.matrix_unit,
            )
            resources[key] = dict(zip(_RESOURCES, values, strict=True))
        rows.append(
            {
                "kernel": name,
                "target": target,
                **launch.case,
                "tile": f"{launch.tile.rows}x{launch.tile.columns}",
                "warps": launch.tile.warps,
                "stages": launch.tile.stages,
                **resources[key],
                "timed": launch.tile.timed or "by no GPU",
                "digest": key,
            }
        )
    return rows


def _per_multiprocessor(compiled: Compiled, launch: Launch) -> int:
    """Returns the number of programs that fit one multiprocessor. Registers are allocated in steps of 8 per thread."""
    warps = launch.tile.warps
    shared = SHARED_LIMIT[launch.target[0]] + _SHARED_RESERVED
    return min(
        _REGISTERS // (-(-compiled.registers // 8) * 8 * 32 * warps),
        _WARPS // warps,
        _PROGRAMS,
        shared // (compiled.shared + _SHARED_RESERVED),
    )


def write_table(
    rows: list[dict[str, Any]], folder: Path, compiler: str = "Triton", version: str = triton.__version__
) -> Path:
    """Writes a table of kernels as kernels-<compiler>-<version>.json and .md; for Triton as kernels-<version>.

    Args:
        rows: result of `kernel_table` or `cuda_table`.
        folder: folder to write to.
        compiler: compiler of the kernels, "Triton" or "nvcc".
        version: version of the compiler.

    Returns:
        The path of the .md file.
    """
    stem = f"kernels-{version}" if compiler == "Triton" else f"kernels-{compiler}-{version}"
    record = {compiler.lower(): version, "torch": torch.__version__, "measured_on_gpu": False, "rows": rows}
    write_atomically(folder / f"{stem}.json", json.dumps(record, indent=1) + "\n")
    columns = [name for name in rows[0] if name != "digest"]
    lines = [
        f"# {compiler} {version} kernels, compiled ahead of time",
        "",
        "Registers of a thread, bytes spilled and bytes of shared memory of every shipped configuration.",
        "Compiled only: no number of this comes from a run on a GPU.",
        "",
        "| " + " | ".join(columns) + " |",
        "|" + " --- |" * len(columns),
        *("| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows),
    ]
    path = folder / f"{stem}.md"
    write_atomically(path, "\n".join(lines) + "\n")
    return path


def compile_launch(launch: Launch) -> Compiled:
    """Compiles a launch to machine code, as Triton does on the target GPU. Repeated calls are served from Triton's
    cache.

    Args:
        launch: the launch.

    Returns:
        The resources that the compiled kernel uses.

    Raises:
        RuntimeError: TRITON_INTERPRET=1 is set, so that kernels are not compiled.
    """
    if INTERPRETED:
        raise RuntimeError("kernels cannot be compiled under TRITON_INTERPRET=1: unset it")
    compiled = triton.compile(_source(launch), target=_gpu(launch), options=compile_options(launch.tile))
    ptx = compiled.asm["ptx"]
    registers, local = _resources(compiled.asm["cubin"])
    units = {"wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma", "mma": "mma.sync"}
    unit = next((name for name, instruction in units.items() if instruction in ptx), "none")
    return Compiled(registers, _spills(ptx, launch.target) if local else 0, compiled.metadata.shared, unit)


def digest(launch: Launch) -> str:
    """Returns a digest of everything that Triton compiles for a launch.

    Args:
        launch: the launch.
    """
    parts = _source(launch).hash(), str(_gpu(launch)), str(compile_options(launch.tile))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _gpu(launch: Launch) -> GPUTarget:
    major, minor = launch.target
    return GPUTarget("cuda", 10 * major + minor, 32)


def _source(launch: Launch) -> ASTSource:
    """Returns the kernel specialised to a launch's arguments, as Triton specialises it on the target GPU."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        specialized = isinstance(value, int) and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialized and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = _POINTERS[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (specialized and value % 16 == 0):
            attributes[i,] = [["tt.divisibility", 16]]
    return ASTSource(launch.kernel, signature, constexprs=constants, attrs=attributes)


def _tool(name: str) -> str:
    return str(getattr(triton.knobs.nvidia, name).path)


def _resources(cubin: bytes) -> tuple[int, int]:
    """Reads registers per thread and bytes of local memory per thread, which holds spills, from machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


def _spills(ptx: str, target: tuple[int, int]) -> int:
    """Returns the bytes that ptxas reports as spilled, stores and loads together."""
    major, minor = target
    architecture = f"sm_{10 * major + minor}{'a' if major >= 9 else ''}"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        report = subprocess.run(
            [
                _tool("ptxas" if major < 9 else "ptxas_blackwell"),
                "-v",
                f"--gpu-name={architecture}",
                str(source),
                "-o",
                str(source.with_suffix(".cubin")),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
    return sum(int(size) for size in re.findall(r"(\d+) bytes spill", report.stderr))
