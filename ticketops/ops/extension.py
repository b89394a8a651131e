"""Access to the compiled CPU extension. Kernels take raw addresses, so every tensor is checked before it is passed."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops.building import load, switch
from ticketops.ops.dropout import keep_threshold

_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)
_DTYPES = (torch.float32, torch.bfloat16, torch.int32, torch.int64, torch.bool)


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


#: The extension module (None if unavailable), and a description of it or the reason why it is unavailable.
native, status = _load()


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why the native kernels cannot serve a device and dtype.

    Args:
        device: device of the tensors.
        dtype: dtype of the tensors.

    Returns:
        The reason, or None if they can.
    """
    if native is None:
        return status
    if device.type != "cpu":
        return f"its kernels do not run on {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it has no kernels for {str(dtype).removeprefix('torch.')}"
    return None


def checked(name: str, x: _OptionalTensor, dtype: torch.dtype, *shape: int) -> _OptionalTensor:
    """Checks the device, dtype and shape of a tensor before a kernel gets its address.

    Args:
        name: name of the tensor in error messages.
        x: the tensor, or None.
        dtype: required dtype.
        shape: required shape.

    Returns:
        The tensor, or a contiguous copy if it is not contiguous; None for None.

    Raises:
        InputError: the device, dtype, layout or shape differs.
    """
    if x is None:
        return None
    if dtype not in _DTYPES:
        # A caller may pass the tensor's own dtype as the required one, which the kernels may lack.
        raise InputError(f"the native kernels do not take {name} as {dtype}: give float32 or bfloat16")
    if not x.is_cpu or x.dtype != dtype or x.shape != shape or x.layout != torch.strided:
        raise InputError(
            f"the native kernel needs {name} as {dtype} {list(shape)} on the CPU, got {x.dtype} {list(x.shape)} on "
            f"{x.device}"
        )
    return x.contiguous()


def address(x: Tensor | None) -> int:
    """Returns the address of a tensor's first element.

    Args:
        x: a tensor that the caller keeps alive while the address is used, or None.

    Returns:
        The address; 0 for None.

    Raises:
        InputError: the tensor is not a strided tensor on the CPU.
        UnsupportedError: the tensor has no memory, e.g. a tracer's fake tensor.
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
    """Converts dropout settings to the three arguments that kernels take.

    Args:
        seed: int64 [1]; None if p is 0.
        p: dropout probability.

    Returns:
        The seed, the result of `dropout.keep_threshold`, and p.
    """
    if not p:
        return 0, 0, 0.0
    assert seed is not None
    return int(seed.item()) & 0xFFFFFFFFFFFFFFFF, keep_threshold(p), p


def run(kernel: Callable[..., None], *arguments: bool | float | Sequence[Any]) -> None:
    """Runs a kernel on as many threads as torch uses.

    Args:
        kernel: a function of the extension.
        arguments: the kernel's arguments except the last, the number of threads, which is added here.

    Raises:
        InputError: the kernel refused a value, e.g. sequences that overlap or reach outside the tensors.
    """
    try:
        kernel(*arguments, torch.get_num_threads())
    except ValueError as error:
        raise InputError(str(error)) from None
