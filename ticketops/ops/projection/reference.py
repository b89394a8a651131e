"""Projections of selected heads by compaction: their rows or columns are copied out of the weights and multiplied
densely, and torch's autograd scatters the gradients back. The reference for the indexed kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None: the reference serves every device and dtype."""
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
