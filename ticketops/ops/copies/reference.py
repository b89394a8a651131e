"""Gathering and scattering slices in plain PyTorch, one tensor after the other."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ticketops.ops.copies import Slices


def refusal(device: torch.device, dtype: torch.dtype) -> None:
    """Never refuses: plain PyTorch runs everywhere."""


@torch.no_grad()
def gather(slices: list[Slices], out: list[Tensor]) -> None:
    """See ticketops.ops.copies.gather."""
    for each, copy in zip(slices, out, strict=True):
        copy.copy_(_divided(each.tensor, each).index_select(each.dim, each.index).view(each.shape))


@torch.no_grad()
def scatter(slices: list[Slices], values: list[Tensor]) -> None:
    """See ticketops.ops.copies.scatter."""
    for each, value in zip(slices, values, strict=True):
        parts = value.unflatten(each.dim, (len(each.index), -1)) if value.numel() else None
        if parts is not None:
            _divided(each.tensor, each).index_copy_(each.dim, each.index, parts)


def prepared(slices: list[Slices], parts: list[Tensor], back: bool) -> Callable[[], None]:
    """Prepares copies that run repeatedly, as long as no tensor gets new memory.

    Args:
        slices: slices of tensors.
        parts: for each element of `slices` a tensor with its slices side by side.
        back: True copies `parts` into the tensors (scatter), False out of them (gather).

    Returns:
        A function that runs the copies.
    """
    return partial(scatter if back else gather, slices, parts)


def _divided(tensor: Tensor, slices: Slices) -> Tensor:
    return tensor.unflatten(slices.dim, (slices.groups, tensor.shape[slices.dim] // slices.groups))
