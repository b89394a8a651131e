"""Timing, correctness gates, and the description of the machine."""

import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
#: Part of a device name -> (dense 16-bit floating-point operations, bytes of memory traffic) per second, from data
#: sheets.
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
    """Device, dtype and scale of a run.

    Attributes:
        device: "cuda", or "cpu" for Triton's interpreter.
        dtype: dtype of all tensors.
        tiny: True for shapes small enough for the interpreter, two repeats, and no ratios.
        keep: takes each row as it is measured.
    """

    device: str
    dtype: torch.dtype
    tiny: bool
    keep: Callable[[Row], None] = lambda row: None

    def randn(self, *shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, device=self.device) * scale).to(self.dtype).requires_grad_()

    def compile(self, function: Callable, mode: str | None = None) -> Callable:
        if self.tiny:
            # A tiny run only checks that the code runs; Inductor would take minutes.
            return torch.compile(function, backend="eager")
        return torch.compile(function, mode=mode)


@dataclass(frozen=True)
class Work:
    """The least work of a computation: floating-point operations, and bytes read from and written to memory."""

    operations: float
    bytes: float


def milliseconds(call: Callable[[], object], setting: Setting) -> tuple[float, float, float]:
    """Returns the median, 20 % and 80 % quantile of a call's milliseconds. On a GPU the first call is not timed, and
    the L2 cache is cleared before each, as it is cold between the layers of a model. On a CPU, in Triton's interpreter,
    the only call is timed."""
    if setting.device == "cuda":
        import triton

        return tuple(triton.testing.do_bench(call, warmup=20, rep=100, quantiles=list(QUANTILES)))
    start = time.perf_counter()
    call()
    taken = 1e3 * (time.perf_counter() - start)
    return taken, taken, taken


def measured(row: Row, call: Callable[[], Callable[[], object]], work: Work | None, setting: Setting) -> Row:
    """Times one contender. If it fails, the row has a note in place of times.

    Args:
        row: fields that identify the measurement.
        call: builds the function to time.
        work: least work of the function, for rates and the share of the machine's peak; None for neither.
        setting: device and dtype of the run.

    Returns:
        The row with milliseconds (median and quantiles) and rates, which the setting keeps, too.
    """
    row = _timed(row, call, work, setting)
    setting.keep(row)
    return row


def _timed(row: Row, call: Callable[[], Callable[[], object]], work: Work | None, setting: Setting) -> Row:
    place = "  {bench}, {workload}, {pass}, {contender}".format_map(row)
    try:
        # sdpa backends that refuse an input warn about every reason.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            median, low, high = milliseconds(call(), setting)
    # Contenders refuse shapes and machines with exceptions of any class.
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no message"])[0]
        print(f"{place}: failed", flush=True)
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


def gate(
    actual: Iterable[Tensor], same: Iterable[Tensor], exact: Iterable[Tensor], terms: float = 0.0, slack: float = 1.0
) -> str:
    """Compares results with float64. The error of the first, the output, may be twice that of plain PyTorch in the same
    dtype; the errors of the others, gradients, three times.

    Args:
        actual: results to check.
        same: results of plain PyTorch in the same dtype.
        exact: results of plain PyTorch in float64.
        terms: size of the terms that results are sums of, where they may cancel.
        slack: factor on all bounds, for code of others that is only to compute the same thing.

    Returns:
        "green", or a description of the first error that is too large.
    """
    for i, (ours, plain, true) in enumerate(zip(actual, same, exact, strict=True)):
        error, allowed = ((x.double() - true).abs().max().item() for x in (ours, plain))
        floor = 4 * torch.finfo(plain.dtype).eps * max(true.abs().max().item(), terms)
        if not error <= slack * ((2 if i == 0 else 3) * allowed + floor):
            return f"red: result {i} errs by {error:.2e}, plain PyTorch by {allowed:.2e}"
    return "green"


def compare(ours: Callable[..., Tensor], plain: Callable[..., Tensor], values: list[Tensor], setting: Setting) -> str:
    """Compares a function's output and the gradients of all its arguments with float64, as `gate` does.

    Args:
        ours, plain: functions of `values` to compare; the output has the shape of the first argument.
        values: arguments of both.
        setting: device and dtype of the run.

    Returns:
        "green", or a description of the first error that is too large.
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
    """Returns a builder for `measured` of a function that runs the forward and backward pass of `call`.

    Args:
        call: function of the leaves.
        leaves: arguments of `call`.
        gradient: gradient of its output.
        inputs: tensors whose gradients are computed; None for the leaves.
    """
    return lambda: lambda: torch.autograd.grad(call(*leaves), inputs or leaves, gradient)


def stem(device: str) -> str:
    """Converts a device's name, as torch gives it, to the form in names of result files: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def machine(setting: Setting) -> Row:
    """Describes device, versions and commit, for every file of results."""
    import triton

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
