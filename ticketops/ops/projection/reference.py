"""Projections over selected heads by compaction: their rows or columns are copied out of the weights, dense products do
the rest, and torch's autograd scatters the gradients back. The definition of what the indexed kernels compute."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Says why this backend cannot serve a device and dtype; the reference serves all.

    Returns:
        None.
    """
    return None


def rows(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], groups: Tensor, count: int
) -> tuple[Tensor, ...]:
    """See ticketops.ops.projection.project_rows."""

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.view(count, -1, weight.shape[1]).index_select(0, groups).flatten(0, 1)
        return functional.linear(
            x, weight, None if bias is None else bias.view(count, -1).index_select(0, groups).flatten()
        )

    return tuple(project(weight, bias) for weight, bias in zip(weights, biases, strict=True))


def columns(x: Tensor, weight: Tensor, groups: Tensor, count: int) -> Tensor:
    """See ticketops.ops.projection.project_columns."""
    return functional.linear(x, weight.view(len(weight), count, -1).index_select(1, groups).flatten(1))
