"""Which implementation of an op runs, and why. TICKETOPS_BACKEND=reference|native|triton overrides the choice."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from ticketops.errors import UnsupportedError
from ticketops.ops.building import switch

OPS = ("attention", "ffn", "projection", "residual", "rows", "importance", "copies")
#: Those of them that do the same for every dtype.
ANY_DTYPE = ("rows", "importance", "copies")
#: The backends of each device, the preferred one first. A backend of an op is the module ticketops.ops.<op>.<backend>
#: with the op's functions (mostly `forward` and `backward`) and `refusal(device, dtype)`, which says why it cannot
#: serve a call or None; `reference` serves every device and dtype.
BACKENDS: dict[str, tuple[str, ...]] = {
    # On the CPU Triton only interprets, and is never chosen by itself.
    "cpu": ("native", "reference", "triton"),
    "cuda": ("triton", "native", "reference"),
}
_NAMES = ("auto", *sorted({name for names in BACKENDS.values() for name in names}))
#: The native extension's kernels for GPUs stand in modules of their own.
_MODULES = {("native", "cuda"): "cuda"}


def requested() -> str:
    """The backend that TICKETOPS_BACKEND asks for.

    Returns:
        A backend's name, or "auto".

    Raises:
        UnsupportedError: the variable names no backend.
    """
    return switch("TICKETOPS_BACKEND", _NAMES) or "auto"


def choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Decides which backend runs an op.

    Args:
        op: one of OPS.
        device: where the tensors lie.
        dtype: their dtype.

    Returns:
        The backend's name and the reason in words.

    Raises:
        UnsupportedError: TICKETOPS_BACKEND asks for a backend that cannot run this.
    """
    wanted = requested()
    refusals: list[str] = []
    absent: list[str] = []
    for backend in BACKENDS.get(device.type, ("reference",)):
        if wanted not in ("auto", backend):
            continue
        if not _has_kernels(op, backend, device.type):
            # Not every op has kernels of every backend; plain PyTorch serves beside those that have.
            absent.append(f"{backend} has no kernels for {op}")
            continue
        try:
            refusal = _module(op, backend, device.type).refusal(device, dtype)
        except ModuleNotFoundError as missing:
            refusal = f"{missing.name} is not installed"
        if refusal is None:
            if wanted == backend:
                return backend, "TICKETOPS_BACKEND asks for it"
            return backend, "; ".join([*refusals, *absent]) or f"the preferred backend on {device.type}"
        refusals.append(f"{backend} is out: {refusal}")
    if wanted != "auto" and (refusals or wanted not in BACKENDS.get(device.type, ())):
        detail = "; ".join(refusals) or f"it does not serve {device.type}"
        raise UnsupportedError(
            f"TICKETOPS_BACKEND={wanted} cannot run {op} on {device.type} in {dtype}: {detail}; unset it"
        )
    return "reference", "; ".join([f"the plain-PyTorch reference serves {device.type}", *refusals])


def _name(op: str, backend: str, device: str) -> str:
    return f"ticketops.ops.{op}.{_MODULES.get((backend, device), backend)}"


@cache
def _has_kernels(op: str, backend: str, device: str) -> bool:
    return importlib.util.find_spec(_name(op, backend, device)) is not None


@cache
def _module(op: str, backend: str, device: str = "cpu") -> ModuleType:
    return importlib.import_module(_name(op, backend, device))


def implementation(op: str, device: torch.device, dtype: torch.dtype) -> ModuleType:
    """The module whose `forward` and `backward` run an op.

    Args:
        op: one of OPS.
        device: where the tensors lie.
        dtype: their dtype.

    Returns:
        The module.
    """
    return _module(op, choose(op, device, dtype)[0], device.type)


@torch.compiler.assume_constant_result
def common(*ops: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """The backend that computes all of some ops; a constant to torch.compile.

    Args:
        ops: of OPS.
        device: where the tensors lie.
        dtype: their dtype.

    Returns:
        Its name; None where they have different ones.
    """
    names = {choose(op, device, dtype)[0] for op in ops}
    return names.pop() if len(names) == 1 else None


def explain() -> list[dict[str, str]]:
    """What `ticketops doctor` prints: for every op, device at hand and dtype, the backend that would run and why.

    Returns:
        One row a combination, with keys op, device, dtype, backend, why; backend is "none" where a call would be
        refused.

    Raises:
        UnsupportedError: TICKETOPS_BACKEND names no backend.
    """
    # A name of no backend is an error of its own, not one of each op.
    requested()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = []
    for device in devices:
        for op in OPS:
            dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
            for dtype in dtypes[:1] if op in ANY_DTYPE else dtypes:
                try:
                    backend, why = choose(op, torch.device(device), dtype)
                except UnsupportedError as error:
                    backend, why = "none", str(error)
                rows.append(
                    {
                        "op": op,
                        "device": device,
                        "dtype": "any" if op in ANY_DTYPE else str(dtype).removeprefix("torch."),
                        "backend": backend,
                        "why": why,
                    }
                )
    return rows
