"""Linear projections of selected heads: q, k and v of some heads only, and the output projection of their contexts.

    rows:     out[t] = x[t] W[r]^T + b[r]        columns:   out[t] = x[t] W[:, r]^T

r are the rows, or columns, of the selected groups (heads), which all have one width. The selected rows or columns are
copied out of the weights and multiplied densely, on every device, and autograd spreads the gradients over zeros. The op
of a whole layer (ops.layer) does the same in fewer launches. For a final ticket, `shrink` removes pruned heads from the
weights, and nothing is copied.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ticketops.errors import InputError
from ticketops.ops.registration import check_devices


def _check(name: str, x: Tensor, channels: int, structures: int, groups: Tensor, count: int) -> None:
    if x.shape[-1] != channels or groups.ndim != 1 or groups.dtype != torch.int64 or structures % count:
        raise InputError(
            f"{name} needs x [.., {channels}], int64 groups [K] and {structures} structures in equal groups, got x "
            f"{list(x.shape)}, {groups.dtype} groups {list(groups.shape)} and {count} groups"
        )


def project_rows(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    groups: Tensor,
    count: int,
) -> tuple[Tensor, ...]:
    """Projects tokens to q, k and v of the selected heads.

    Args:
        x: [.., C] tokens.
        weights: weights of q, k and v, each [count * D, C]; x's dtype, or any under autocast.
        biases: biases of q, k and v, each [count * D], or three None.
        groups: int64 [K] on x's device, indices of the selected heads, ascending and unique.
        count: number of heads in the weights.

    Returns:
        q, k and v, each [.., K * D] in x's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes or devices that do not fit together.
    """
    names = ("x", "wq", "wk", "wv", "bq", "bk", "bv", "groups")
    check_devices("project_rows", names, (x, *weights, *biases, groups))
    rows, channels = weights[0].shape
    _check("project_rows", x, channels, rows, groups, count)

    def project(weight: Tensor, bias: Tensor | None) -> Tensor:
        weight = weight.unflatten(0, (count, -1)).index_select(0, groups).flatten(0, 1)
        bias = None if bias is None else bias.unflatten(0, (count, -1)).index_select(0, groups).flatten()
        return functional.linear(x, weight, bias)

    return tuple(project(weight, bias) for weight, bias in zip(weights, biases, strict=True))


def project_columns(x: Tensor, weight: Tensor, groups: Tensor, count: int) -> Tensor:
    """Applies the output projection to the contexts of the selected heads, without a bias.

    Args:
        x: [.., K * D] contexts of the selected heads.
        weight: [C, count * D]; x's dtype, or any under autocast.
        groups: int64 [K] on x's device, indices of the selected heads, ascending and unique.
        count: number of heads in the weight.

    Returns:
        [.., C] in x's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes or devices that do not fit together.
    """
    check_devices("project_columns", ("x", "weight", "groups"), (x, weight, groups))
    columns = weight.shape[1]
    _check("project_columns", x, len(groups) * (columns // count), columns, groups, count)
    return functional.linear(x, weight.unflatten(1, (count, -1)).index_select(1, groups).flatten(1))
