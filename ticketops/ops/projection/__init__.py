"""Linear projections of selected heads: q, k and v of some heads only, and the output projection of their contexts.

    rows:     out[t] = x[t] W[r]^T + b[r]        columns:   out[t] = x[t] W[:, r]^T

r are the rows, or columns, of the selected groups (heads), which all have one width. Rows and columns that are not
selected are not read, and their gradients are 0.

There are two implementations. Compaction copies the selected rows out of the weights, and multiplies at cuBLAS's speed;
the copies of weights and of their gradients are a dozen launches, whose time does not depend on the number of tokens.
The indexed kernels read and write selected rows in place, in one launch forward for q, k and v together and three
backward, at the speed of a Triton product. So the kernels are faster for few tokens and compaction for many; `indexed`
decides. Both serve tickets that change at every step. For a final ticket, `shrink` removes pruned heads from the
weights, and neither is needed.
"""

import importlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import backends, private
from ticketops.ops.products import compute_dtype
from ticketops.ops.projection import reference
from ticketops.ops.registration import autocast, check_devices, define, same_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
#: Smallest group width for the indexed kernels: narrower rows would be read in pieces below 32 bytes, a GPU's smallest
#: memory transaction.
LEAST_INDEXED_WIDTH = 16


@private.assume_constant_result
def _most_indexed_tokens(device: torch.device, dtype: torch.dtype) -> int:
    """Returns the largest number of tokens for which the indexed kernels are used instead of compaction.

    0 on a CPU, where compaction always wins: a launch costs nothing there, and the copies are about 1 % of a training
    step of MiniLM on 32 rows of RTE (0.9 %) or SST-2 (1.4 %). On a GPU the number is in the table of Triton
    configurations, by family and dtype.
    """
    if backends.choose("projection", device, dtype)[0] != "triton":
        return 0
    from ticketops.ops import triton_common, triton_configs

    return triton_configs.most_indexed_tokens(triton_common.capability(device), dtype)


def indexed(x: Tensor, width: int) -> bool:
    """True if products with selected rows or columns of weights run by the indexed kernels; False if by compaction.
    `ops.ffn` has the same rule.

    Args:
        x: [.., C] tokens, before autocast.
        width: number of rows (or columns) per group.
    """
    return width >= LEAST_INDEXED_WIDTH and math.prod(x.shape[:-1]) <= _most_indexed_tokens(x.device, compute_dtype(x))


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
        x: [.., C] tokens; float64, float32, bfloat16 or float16.
        weights: weights of q, k and v, each [count * D, C]; x's dtype, or float32 under autocast.
        biases: biases of q, k and v, each [count * D], or three None.
        groups: int64 [K] on x's device, indices of the selected heads, ascending and unique.
        count: number of heads in the weights.

    Returns:
        q, k and v, each [.., K * D] in x's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes or dtypes that do not fit together.
        UnsupportedError: a dtype that no backend serves.
    """
    names = ("x", "wq", "wk", "wv", "bq", "bk", "bv", "groups")
    check_devices("project_rows", names, (x, *weights, *biases, groups))
    rows, channels = weights[0].shape
    _check("project_rows", x, channels, rows, groups, count)
    if not indexed(x, rows // count):
        return reference.rows(x, weights, biases, groups, count)
    shape = x.shape[:-1]
    (x,) = autocast(x.flatten(0, -2))
    check_weights("project_rows", x, (*weights, *(bias for bias in biases if bias is not None)))
    qkv = _project_rows_op(x, *weights, *biases, groups, count)
    return tuple(y.view(*shape, y.shape[1]) for y in qkv)


def project_columns(x: Tensor, weight: Tensor, groups: Tensor, count: int) -> Tensor:
    """Applies the output projection to the contexts of the selected heads, without a bias.

    Args:
        x: [.., K * D] contexts of the selected heads.
        weight: [C, count * D]; x's dtype, or float32 under autocast.
        groups: int64 [K] on x's device, indices of the selected heads, ascending and unique.
        count: number of heads in the weight.

    Returns:
        [.., C] in x's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes or dtypes that do not fit together.
        UnsupportedError: a dtype that no backend serves.
    """
    check_devices("project_columns", ("x", "weight", "groups"), (x, weight, groups))
    channels, columns = weight.shape
    _check("project_columns", x, len(groups) * (columns // count), columns, groups, count)
    if not indexed(x, columns // count):
        return reference.columns(x, weight, groups, count)
    shape = x.shape[:-1]
    (x,) = autocast(x.flatten(0, -2))
    check_weights("project_columns", x, (weight,))
    return _project_columns_op(x, weight, groups, count).view(*shape, channels)


def check_weights(name: str, x: Tensor, weights: Sequence[Tensor]) -> None:
    """Checks the dtypes and devices of weights for the indexed kernels. These cast float32 weights block by block to
    the dtype of the tokens, as autocast does, without a copy.

    Args:
        name: name of the op.
        x: the op's tokens.
        weights: weights and biases.

    Raises:
        InputError: the weights' dtype is neither x's nor float32, or they are on another device.
        UnsupportedError: the dtype is not supported.
    """
    same_dtype(name, DTYPES, x=x)
    same_dtype(name, DTYPES, **{f"weight {i}": weight for i, weight in enumerate(weights)})
    weight = weights[0]
    if weight.dtype not in (x.dtype, torch.float32) or weight.device != x.device:
        raise InputError(
            f"{name} needs weights of x's dtype or float32 on x's device, got {weight.dtype} on {weight.device} for x: "
            f"{x.dtype} on {x.device}"
        )


def _kernels():
    # Imported on first use: Triton may be missing where the indexed kernels cannot run.
    return importlib.import_module("ticketops.ops.projection.triton")


def _rows(x, wq, wk, wv, bq, bk, bv, groups, count):
    weights = [w.contiguous() for w in (wq, wk, wv)]
    biases = None if bq is None else [b.contiguous() for b in (bq, bk, bv)]
    return tuple(_kernels().into(x, weights, biases, groups, count))


def _fake_rows(x, wq, wk, wv, bq, bk, bv, groups, count):
    width = wq.shape[0] // count
    return tuple(x.new_empty((x.shape[0], groups.shape[0] * width)) for _ in range(3))


def _rows_backward(dq, dk, dv, x, wq, wk, wv, groups, count, wanted):
    gradients, weights = (dq, dk, dv), [w.contiguous() for w in (wq, wk, wv)]
    dx = _kernels().out_of(gradients, weights, groups, count) if wanted[0] else x.new_empty(0)
    parameters = picked_gradients(gradients, x, weights, groups, count, wanted[1:])
    return dx, *(wq.new_empty(0) if parameter is None else parameter for parameter in parameters)


def picked_gradients(
    dys: Sequence[Tensor],
    x: Tensor,
    weights: Sequence[Tensor],
    groups: Tensor,
    count: int,
    wanted: Sequence[bool],
) -> list[Tensor | None]:
    """Computes the gradients of the weights and biases of q, k and v of selected groups, with the indexed kernels.

    Args:
        dys: gradients of the projections, each [T, K * D].
        x: [T, C], the projections' input.
        weights: weights of q, k and v, each [count * D, C].
        groups: int64 [K], indices of the selected groups.
        count: number of groups in the weights.
        wanted: six flags: gradients to compute, of the three weights and then of the three biases.

    Returns:
        Six gradients in that order, None for those not wanted.
    """
    found: list[Tensor | None] = [None] * 6
    places = [i for i in range(3) if wanted[i]]
    if places:
        new = [torch.empty(weights[i].shape, dtype=weights[i].dtype, device=x.device) for i in places]
        # The kernel sums the gradients of the biases in the same pass.
        sums = [torch.empty(len(w), dtype=w.dtype, device=x.device) for w in new]
        _kernels().gradients([dys[i] for i in places], x, new, sums, groups, count)
        for i, weight, bias in zip(places, new, sums, strict=True):
            found[i], found[3 + i] = weight, bias if wanted[3 + i] else None
    for i in range(3):
        if wanted[3 + i] and not wanted[i]:
            some = dys[i].sum(0, dtype=torch.float32).view(len(groups), -1)
            whole = some.new_zeros((count, some.shape[1])).index_copy_(0, groups, some)
            found[3 + i] = whole.flatten().to(weights[i].dtype)
    return found


def _fake_rows_backward(dq, dk, dv, x, wq, wk, wv, groups, count, wanted):
    shapes = (x.shape, *(wq.shape,) * 3, *(wq.shape[:1],) * 3)
    tensors = (x, *(wq, wk, wv) * 2)
    return tuple(
        like.new_empty(shape if there else (0,)) for like, shape, there in zip(tensors, shapes, wanted, strict=True)
    )


def _setup_rows(ctx, inputs, output):
    x, wq, wk, wv, _, _, _, groups, ctx.count = inputs
    ctx.save_for_backward(x, wq, wk, wv, groups)


def _rows_gradients(ctx, *gradients):
    x, *weights, groups = ctx.saved_tensors
    width = weights[0].shape[0] // ctx.count
    # The loss may not depend on all three of q, k and v.
    gradients = [x.new_zeros((x.shape[0], groups.shape[0] * width)) if g is None else g for g in gradients]
    wanted = list(ctx.needs_input_grad[:7])
    found = _project_rows_backward_op(*gradients, x, *weights, groups, ctx.count, wanted)
    return *(gradient if there else None for gradient, there in zip(found, wanted, strict=True)), None, None


def _columns(x, weight, groups, count):
    return _kernels().out_of([x], [weight.contiguous().t()], groups, count)


def _fake_columns(x, weight, groups, count):
    return x.new_empty((x.shape[0], weight.shape[0]))


def _columns_backward(dout, x, weight, groups, count, wanted):
    weight = weight.contiguous()
    dx = _kernels().into(dout, [weight.t()], None, groups, count)[0] if wanted[0] else x.new_empty(0)
    dweight = torch.empty(weight.shape if wanted[1] else (0,), dtype=weight.dtype, device=x.device)
    if wanted[1]:
        _kernels().gradients([x], dout, [dweight.t()], None, groups, count)
    return dx, dweight


def _fake_columns_backward(dout, x, weight, groups, count, wanted):
    return tuple(like.new_empty(like.shape if there else (0,)) for like, there in zip((x, weight), wanted, strict=True))


def _setup_columns(ctx, inputs, output):
    x, weight, groups, ctx.count = inputs
    ctx.save_for_backward(x, weight, groups)


def _columns_gradients(ctx, dout):
    wanted = list(ctx.needs_input_grad[:2])
    found = _project_columns_backward_op(dout, *ctx.saved_tensors, ctx.count, wanted)
    return *(gradient if there else None for gradient, there in zip(found, wanted, strict=True)), None, None


_WEIGHTS = "Tensor wq, Tensor wk, Tensor wv"
_project_rows_op = define(
    f"project_rows(Tensor x, {_WEIGHTS}, Tensor? bq, Tensor? bk, Tensor? bv, Tensor groups, int count) "
    "-> (Tensor, Tensor, Tensor)",
    _rows,
    _fake_rows,
    _rows_gradients,
    _setup_rows,
)
_project_rows_backward_op = define(
    f"project_rows_backward(Tensor dq, Tensor dk, Tensor dv, Tensor x, {_WEIGHTS}, Tensor groups, int count, "
    "bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _rows_backward,
    _fake_rows_backward,
)
_project_columns_op = define(
    "project_columns(Tensor x, Tensor weight, Tensor groups, int count) -> Tensor",
    _columns,
    _fake_columns,
    _columns_gradients,
    _setup_columns,
)
_project_columns_backward_op = define(
    "project_columns_backward(Tensor dout, Tensor x, Tensor weight, Tensor groups, int count, bool[] wanted) "
    "-> (Tensor, Tensor)",
    _columns_backward,
    _fake_columns_backward,
)
