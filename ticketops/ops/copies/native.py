"""Gathering and scattering slices on the CPU, on all threads: csrc/cpu/copies.cpp."""

import math
from types import ModuleType

import torch
from torch import Tensor

from ticketops.ops import extension
from ticketops.ops.copies import Slices, reference


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why this kernel cannot serve a device, or None; it moves bytes of any dtype."""
    return extension.refusal(device, torch.float32)


@torch.no_grad()
def gather(slices: list[Slices], out: list[Tensor]) -> None:
    """See ticketops.ops.copies.gather."""
    for each, part in zip(slices, out, strict=True):
        _copy(each, part, scatter=False)


@torch.no_grad()
def scatter(slices: list[Slices], values: list[Tensor]) -> None:
    """See ticketops.ops.copies.scatter."""
    for each, part in zip(slices, values, strict=True):
        _copy(each, part, scatter=True)


def _copy(slices: Slices, part: Tensor, scatter: bool) -> None:
    tensor, dim = slices.tensor, slices.dim
    if not part.numel():
        return
    if not (tensor.is_contiguous() and part.is_contiguous() and tensor.layout == torch.strided):
        plain: ModuleType = reference
        (plain.scatter if scatter else plain.gather)([slices], [part])
        return
    index = slices.index.contiguous()
    slice_bytes = math.prod(tensor.shape[dim:]) // slices.groups * tensor.element_size()
    extension.run(
        extension.native.copy_slices,
        *(tensor.data_ptr(), part.data_ptr(), index.data_ptr(), math.prod(tensor.shape[:dim]), slices.groups),
        *(len(index), slice_bytes, scatter),
    )
    # Autograd must hear of what was written behind its back.
    torch.autograd.graph.increment_version(tensor if scatter else part)
