"""The native extension, or why it is not there, and how tensors reach it: as addresses, after everything about them has
been checked."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops.building import load, switch
from ticketops.ops.dropout import keep_threshold

_Given = TypeVar("_Given", Tensor, Tensor | None)
_DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64)


def _load() -> tuple[Any, str]:
    extension, reason = load(
        "ticketops._native", ["TICKETOPS_NATIVE"], "the native extension", "with a C++ compiler at hand"
    )
    if reason is not None:
        return None, reason
    if not extension.isas():
        return None, "the native extension needs a processor with AVX2 and FMA"
    if isa := switch("TICKETOPS_ISA", extension.isas()):
        extension.use_isa(isa)
    threads = "torch's threads" if extension.threads_available() else "one thread, since no OpenMP runtime was found"
    return extension, f"{extension.isa()}, {threads}"


native, status = _load()


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why the native kernels cannot serve a device and dtype.

    Args:
        device: where the tensors lie.
        dtype: their dtype.

    Returns:
        The reason, or None.
    """
    if native is None:
        return status
    if device.type != "cpu":
        return f"its kernels do not run on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
    return None


def checked(name: str, x: _Given, dtype: torch.dtype, *shape: int) -> _Given:
    """Makes sure that a tensor is what a kernel will take it for.

    Args:
        name: what to call it in a message.
        x: the tensor, or None.
        dtype: what it must have.
        shape: likewise.

    Returns:
        The tensor, contiguous (a copy if it was not); None for None.

    Raises:
        InputError: it is something else.
    """
    if x is None:
        return None
    if dtype not in _DTYPES:
        # Where the caller takes the tensor's own for what it must have.
        raise InputError(f"the native kernels do not take {name} as {dtype}: give float32 or bfloat16")
    if not x.is_cpu or x.dtype != dtype or x.shape != shape or x.layout != torch.strided:
        raise InputError(
            f"the native kernel needs {name} as {dtype} {list(shape)} on the CPU, got {x.dtype} {list(x.shape)} on "
            f"{x.device}"
        )
    return x.contiguous()


def address(x: Tensor | None) -> int:
    """Where a tensor's elements lie.

    Args:
        x: a tensor that outlives the call it is passed to, or None.

    Returns:
        The address, 0 for None.

    Raises:
        InputError: it does not lie in the CPU's memory.
        UnsupportedError: it has no memory, as under a tracer.
    """
    if x is None:
        return 0
    if not x.is_cpu or x.layout is not torch.strided:
        raise InputError(f"the native kernels need strided tensors on the CPU, got {list(x.shape)} on {x.device}")
    try:
        return x.data_ptr()
    except RuntimeError as error:
        raise UnsupportedError(
            f"the native kernels cannot read a {type(x).__name__} without memory of its own, as under a tracer or a "
            "transform: set TICKETOPS_BACKEND=reference"
        ) from error


def dropout_arguments(seed: Tensor | None, p: float) -> tuple[int, int, float]:
    """What the kernels take for a dropout.

    Args:
        seed: int64 [1], None without dropout.
        p: dropout probability.

    Returns:
        The seed, the threshold of dropout.keep_threshold and p.
    """
    if not p:
        return 0, 0, 0.0
    assert seed is not None
    return int(seed.item()) & 0xFFFFFFFFFFFFFFFF, keep_threshold(p), p


def run(kernel: Callable[..., None], *arguments: bool | float | Sequence[Any]) -> None:
    """Runs a kernel on as many threads as torch uses.

    Args:
        kernel: a function of the extension.
        arguments: all but the last, which is the number of threads.

    Raises:
        InputError: the sequences reach outside the tensors or overlap.
    """
    try:
        kernel(*arguments, torch.get_num_threads())
    except ValueError as error:
        raise InputError(str(error)) from None
