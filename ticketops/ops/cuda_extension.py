"""The CUDA part of the native extension, or why it is not there, and how tensors reach it: as addresses, after
everything about them has been checked."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError, TicketopsError
from ticketops.ops.building import load


def _load() -> tuple[Any, str]:
    extension, reason = load(
        "ticketops._cuda", ["TICKETOPS_NATIVE", "TICKETOPS_CUDA"], "the CUDA kernels", "with nvcc at hand"
    )
    return extension, reason or f"built for {extension.built_for}"


#: The module, whose attribute `device` is the type of device that it runs on: "cuda", but "cpu" where tests emulate it.
kernels, status = _load()


@cache
def _problem(extension: Any, index: int | None) -> str | None:
    # Emulated, it runs on no numbered device.
    if index is None:
        return extension.problem()
    with torch.cuda.device(index):
        return extension.problem()


def refusal(device: torch.device) -> str | None:
    """Says why the CUDA kernels cannot serve a device.

    Args:
        device: where the tensors lie.

    Returns:
        The reason, or None.
    """
    if kernels is None:
        return status
    if device.type != kernels.device:
        return f"its kernels do not run on {device.type}"
    index = device.index
    if device.type == "cuda" and index is None:
        if not torch.cuda.is_available():
            return "there is no GPU that torch can use"
        index = torch.cuda.current_device()
    problem = _problem(kernels, index)
    return problem and f"its kernels cannot run on this GPU ({problem})"


def checked(
    name: str, x: Tensor, device: torch.device, dtypes: torch.dtype | tuple[torch.dtype, ...], *shape: int
) -> Tensor:
    """Makes sure that a tensor is what a kernel will take it for.

    Args:
        name: what to call it in a message.
        x: the tensor.
        device: where the kernel is to run.
        dtypes: what it may have.
        shape: what it must have.

    Returns:
        The tensor, its last dimension contiguous (a copy if it was not).

    Raises:
        InputError: it is something else.
    """
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    there = x.device == device and device.type == kernels.device and x.layout == torch.strided
    if not there or x.dtype not in dtypes or x.shape != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"the CUDA kernel needs {name} as {kinds} {list(shape)} on {device}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    # A dimension of one element may have any stride, which then means nothing.
    return x if x.ndim and (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()


def run(kernel: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Queues a kernel on torch's current stream of a device.

    Args:
        kernel: a function of the extension.
        device: the device of all its tensors.
        arguments: all but the last, which is the stream.

    Raises:
        TicketopsError: the launch failed.
    """
    try:
        if device.type == "cuda":
            with torch.cuda.device(device):
                kernel(*arguments, torch.cuda.current_stream(device).cuda_stream)
        else:
            kernel(*arguments, 0)
    except RuntimeError as error:
        raise TicketopsError(f"the CUDA kernel {kernel.__name__} failed on {device}: {error}") from error
