"""Selection of the backend that runs an op. TICKETOPS_BACKEND=reference|native|triton overrides it."""

import importlib
import importlib.util
from functools import cache
from types import ModuleType

import torch

from ticketops.errors import UnsupportedError
from ticketops.ops import private
from ticketops.ops.building import switch

OPS = ("attention", "ffn", "residual", "rows", "importance", "copies")
#: The ops that serve every dtype alike.
ANY_DTYPE = ("rows", "importance", "copies")
#: Backends by device type, in order of preference. A backend of an op is the module ticketops.ops.<op>.<backend>. It
#: has the op's functions (mostly `forward` and `backward`) and `refusal(device, dtype)`, which returns None, or the
#: reason why the backend cannot serve a call. `reference` serves every device and dtype.
BACKENDS: dict[str, tuple[str, ...]] = {
    # On a CPU Triton only has its interpreter, so it comes last and runs on request only.
    "cpu": ("native", "reference", "triton"),
    "cuda": ("triton", "native", "reference"),
}
_NAMES = ("auto", *sorted({name for names in BACKENDS.values() for name in names}))
#: Module names that differ from the backend's: the native kernels for GPUs are in `cuda.py`.
_MODULES = {("native", "cuda"): "cuda"}


def requested() -> str:
    """Reads TICKETOPS_BACKEND.

    Returns:
        A backend's name, or "auto" if the variable is unset.

    Raises:
        UnsupportedError: the variable's value is not the name of a backend.
    """
    return switch("TICKETOPS_BACKEND", _NAMES) or "auto"


def choose(op: str, device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """Chooses the backend that runs an op.

    Args:
        op: one of OPS.
        device: device of the op's tensors.
        dtype: dtype of the op's tensors.

    Returns:
        The backend's name and the reason for the choice, in words.

    Raises:
        UnsupportedError: TICKETOPS_BACKEND names a backend that cannot serve this device or dtype.
    """
    wanted = requested()
    refusals: list[str] = []
    absent: list[str] = []
    for backend in BACKENDS.get(device.type, ("reference",)):
        if wanted not in ("auto", backend):
            continue
        if not _has_kernels(op, backend, device.type):
            # Not every backend has kernels for every op; the next one, at last plain PyTorch, takes such an op.
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
    """Returns the backend module that runs an op.

    Args:
        op: one of OPS.
        device: device of the op's tensors.
        dtype: dtype of the op's tensors.

    Returns:
        The module with the op's functions, mostly `forward` and `backward`.
    """
    return _module(op, choose(op, device, dtype)[0], device.type)


@private.assume_constant_result
def common(*ops: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the backend that all the given ops share. torch.compile treats the result as a constant.

    Args:
        ops: names from OPS.
        device: device of the ops' tensors.
        dtype: dtype of the ops' tensors.

    Returns:
        The backend's name; None if the ops run on different backends.
    """
    names = {choose(op, device, dtype)[0] for op in ops}
    return names.pop() if len(names) == 1 else None


def explain() -> list[dict[str, str]]:
    """Lists the chosen backend for every op, available device and dtype, for `ticketops doctor`.

    Returns:
        One row per combination, with keys op, device, dtype, backend and why. `backend` is "none" if a call would be
        refused.

    Raises:
        UnsupportedError: the value of TICKETOPS_BACKEND is not the name of a backend.
    """
    # Checked once here; otherwise a misspelt name would come out as one refusal per row.
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
