"""Access to the compiled CUDA extension. Kernels take raw addresses, so every tensor is checked before it is passed."""

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


#: The extension module (None if unavailable) and a description or the reason. The module's attribute `device` is the
#: device type that it runs on: "cuda", or "cpu" in the emulation that tests use.
kernels, status = _load()


@cache
def _problem(extension: Any, index: int | None) -> str | None:
    # The emulation runs on the CPU, which has no device index.
    if index is None:
        return extension.problem()
    with torch.cuda.device(index):
        return extension.problem()


def refusal(device: torch.device) -> str | None:
    """Returns the reason why the CUDA kernels cannot serve a device.

    Args:
        device: device of the tensors.

    Returns:
        The reason, or None if they can.
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
    """Checks the device, dtype and shape of a tensor before a kernel gets its address.

    Args:
        name: name of the tensor in error messages.
        x: the tensor.
        device: device that the kernel runs on.
        dtypes: accepted dtype or dtypes.
        shape: required shape.

    Returns:
        The tensor, or a contiguous copy if its last dimension is not contiguous.

    Raises:
        InputError: the device, dtype, layout or shape differs.
    """
    dtypes = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    on_device = x.device == device and device.type == kernels.device and x.layout == torch.strided
    if not on_device or x.dtype not in dtypes or x.shape != shape:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise InputError(
            f"the CUDA kernel needs {name} as {kinds} {list(shape)} on {device}, got {x.dtype} "
            f"{list(x.shape)} on {x.device}"
        )
    # The stride of a dimension of one element is arbitrary and has no effect.
    return x if x.ndim and (x.stride(-1) == 1 or x.shape[-1] <= 1) else x.contiguous()


def run(kernel: Callable[..., None], device: torch.device, *arguments: Any) -> None:
    """Queues a kernel on torch's current stream of a device.

    Args:
        kernel: a function of the extension.
        device: device of all the kernel's tensors.
        arguments: the kernel's arguments except the last, the stream, which is added here.

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
