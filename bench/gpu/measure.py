"""Timing, correctness gates and the record of a machine."""

import platform
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
#: Dense 16-bit matrix operations and bytes of memory a second, from the maker's data sheets, by part of a device name.
PEAKS = {
    "A100-SXM4-80GB": (312e12, 2.04e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 NVL": (835e12, 3.9e12),
    "H200": (989e12, 4.8e12),
    "B200": (2250e12, 8.0e12),
}
QUANTILES = (0.5, 0.2, 0.8)
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What a run measures on.

    Attributes:
        device: "cuda", or "cpu" in Triton's interpreter.
        dtype: of all tensors.
        tiny: shapes that the interpreter can bear, two repeats, no ratios.
    """

    device: str
    dtype: torch.dtype
    tiny: bool

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).requires_grad_()

    def compile(self, function: Callable, mode: str | None = None) -> Callable:
        if self.tiny:
            # The interpreter's run only shows that the way through is clear; Inductor would take minutes.
            return torch.compile(function, backend="eager")
        return torch.compile(function, mode=mode)


@dataclass(frozen=True)
class Work:
    """What a computation cannot do without: floating-point operations, and bytes to and from memory."""

    operations: float
    bytes: float


def milliseconds(call: Callable[[], object], setting: Setting) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile of a call's time; on a GPU with a cold cache, as between the layers of a model."""
    if setting.device == "cuda":
        return tuple(triton.testing.do_bench(call, warmup=20, rep=100, quantiles=list(QUANTILES)))
    times = []
    for _ in range(2):
        start = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times), min(times), max(times)


def measured(row: Row, call: Callable[[], Callable[[], object]], work: Work | None, setting: Setting) -> Row:
    """One row of results; a contender that cannot run here has a note in place of figures.

    Args:
        row: what identifies the measurement.
        call: builds what is timed.
        work: for rates and the share of the machine's floor.
        setting: the run.

    Returns:
        The row with its figures.
    """
    place = "  {bench}, {workload}, {pass}, {contender}".format_map(row)
    try:
        # Those that refuse warn of every reason.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            timed = call()
            timed()
            median, low, high = milliseconds(timed, setting)
    # Contenders refuse shapes and machines with exceptions of all kinds.
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        print(f"{place}: does not run here", flush=True)
        return {**row, "ms": None, "note": f"{type(error).__name__}: {first[:160]}"}
    print(f"{place}: {median:.3f} ms", flush=True)
    figures = {"ms": median, "ms_q20": low, "ms_q80": high}
    if work is not None and setting.device == "cuda":
        seconds = median / 1e3
        figures |= {"tflops": work.operations / seconds / 1e12, "gb_per_s": work.bytes / seconds / 1e9}
        peaks = next((peak for name, peak in PEAKS.items() if name in torch.cuda.get_device_name()), None)
        if peaks is not None:
            figures["share_of_floor"] = max(work.operations / peaks[0], work.bytes / peaks[1]) / seconds
    return {**row, **figures}


def gate(actual: Iterable[Tensor], same: Iterable[Tensor], exact: Iterable[Tensor]) -> str:
    """Compares results with float64: the first may err twice as much as plain PyTorch in the same dtype, the others,
    gradients, three times.

    Returns:
        "green", or what is wrong.
    """
    for i, (ours, plain, true) in enumerate(zip(actual, same, exact, strict=True)):
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, plain))
        floor = 4 * torch.finfo(plain.dtype).eps * true.abs().max().item()
        if not error <= (2 if i == 0 else 3) * allowed + floor:
            return f"red: result {i} errs by {error:.2e}, plain PyTorch by {allowed:.2e}"
    return "green"


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], values: list[Tensor], setting: Setting) -> str:
    """Holds a call's output and the gradients of all its arguments against float64, as `gate` does.

    Args:
        ours, plain: of the same arguments; their output has the first one's shape.
        values: the arguments.
        setting: the run.

    Returns:
        "green", or what is wrong.
    """
    gradient = torch.randn_like(values[0])

    def run(call: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in values]
        out = call(*leaves)
        return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    return gate(run(ours, setting.dtype), run(plain, setting.dtype), run(plain, torch.float64))


def both_passes(
    call: Callable[..., Tensor], leaves: list[Tensor], gradient: Tensor, inputs: list[Tensor] | None = None
) -> Callable[[], Callable[[], object]]:
    """Builds what `measured` times: a call's forward and backward pass.

    Args:
        call: of the leaves.
        leaves: its arguments.
        gradient: of its output.
        inputs: whose gradients are formed; the leaves'.

    Returns:
        The builder.
    """
    return lambda: lambda: torch.autograd.grad(call(*leaves), inputs or leaves, gradient)


def stem(device: str) -> str:
    """A device's name as files of results have it.

    Args:
        device: as torch names it.
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def machine(setting: Setting) -> Row:
    """The record that every file of results carries."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "device": "Triton interpreter on the CPU",
        "dtype": str(setting.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }
    if setting.device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return record
