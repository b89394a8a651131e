"""Gathering and scattering slices in plain PyTorch, one tensor after the other."""

import torch
from torch import Tensor

from ticketops.ops.copies import Slices


def refusal(device: torch.device, dtype: torch.dtype) -> None:
    """Never refuses: plain PyTorch runs everywhere."""


def gather(slices: list[Slices]) -> list[Tensor]:
    """See ticketops.ops.copies.gather."""
    return [_divided(each.tensor.detach(), each).index_select(each.dim, each.index).view(each.shape) for each in slices]


@torch.no_grad()
def scatter(slices: list[Slices], values: list[Tensor]) -> None:
    """See ticketops.ops.copies.scatter."""
    for each, value in zip(slices, values, strict=True):
        parts = value.unflatten(each.dim, (len(each.index), -1)) if value.numel() else None
        if parts is not None:
            _divided(each.tensor, each).index_copy_(each.dim, each.index, parts)


def _divided(tensor: Tensor, slices: Slices) -> Tensor:
    return tensor.unflatten(slices.dim, (slices.groups, tensor.shape[slices.dim] // slices.groups))
