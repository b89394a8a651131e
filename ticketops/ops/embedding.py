"""The way into the encoder on a CPU: rows of an embedding table, and dropout.

torch's own spend more time there than a small encoder's layers: the gradient of a table is nearly all zeros, written to
memory that the system maps and takes back page by page at every step, and a dropout's mask is drawn on one thread.
"""

import math

import torch
from torch import Tensor

from ticketops.ops import backends
from ticketops.ops.dropout import draw_seed
from ticketops.ops.extension import address, checked, dropout_arguments, native, run
from ticketops.ops.memory import empty
from ticketops.ops.registration import define


def serves_embedding(x: Tensor) -> bool:
    """Whether `embedding` and `dropout` run here; where they do not, torch's own serve.

    Args:
        x: the table, or what is to be dropped.
    """
    # The residual's LayerNorm is their neighbour: both are of the extension, or neither.
    return backends.native_on_cpu(x.device, x.dtype, "residual")


def embedding(weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Rows of a table.

    Args:
        weight: [V, C], float32 or bfloat16, on the CPU.
        ids: int64 or int32 [..].
        padding_idx: a row without a gradient; None for none.

    Returns:
        [.., C].
    """
    return torch.ops.ticketops.embedding(weight, ids, -1 if padding_idx is None else padding_idx)


def dropout(x: Tensor, p: float) -> Tensor:
    """Sets elements to 0 with probability p and divides the others by 1 - p.

    Args:
        x: [.., C], float32 or bfloat16, on the CPU.
        p: in (0, 1).

    Returns:
        Of x's shape, contiguous.
    """
    return torch.ops.ticketops.dropout(x, draw_seed(x.device), p)


def _embed(weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    return torch.embedding(weight, ids)


def _embed_backward(dout: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    channels = dout.shape[-1]
    ids = ids.flatten().long()
    dout = checked("dout", dout.reshape(-1, channels), dout.dtype, len(ids), channels)
    ids = checked("ids", ids, torch.int64, len(dout))
    gradient = empty((rows, channels), dout.dtype)
    run(
        native.embedding_gradient,
        *(dout.dtype == torch.bfloat16, address(ids), address(dout), address(gradient), rows, len(ids), channels),
        padding_idx,
    )
    return gradient


def _save_ids(ctx, inputs, output):
    weight, ids, ctx.padding_idx = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _embedding_gradients(ctx, dout):
    (ids,) = ctx.saved_tensors
    return torch.ops.ticketops.embedding_backward(dout, ids, ctx.rows, ctx.padding_idx), None, None


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    x = checked("x", x, x.dtype, *x.shape)
    out = torch.empty_like(x)
    run(
        native.dropout_rows,
        *(x.dtype == torch.bfloat16, address(x), address(out), rows, columns, *dropout_arguments(seed, p)),
    )
    return out


def _save_seed(ctx, inputs, output):
    _, seed, ctx.p = inputs
    ctx.save_for_backward(seed)


def _drop_gradients(ctx, dout):
    (seed,) = ctx.saved_tensors
    return torch.ops.ticketops.dropout(dout, seed, ctx.p), None, None


define(
    "embedding(Tensor weight, Tensor ids, int padding_idx) -> Tensor",
    _embed,
    lambda weight, ids, padding_idx: weight.new_empty((*ids.shape, weight.shape[1])),
    _embedding_gradients,
    _save_ids,
)
define(
    "embedding_backward(Tensor dout, Tensor ids, SymInt rows, int padding_idx) -> Tensor",
    _embed_backward,
    lambda dout, ids, rows, padding_idx: dout.new_empty((rows, dout.shape[-1])),
)
define(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    _drop,
    lambda x, seed, p: x.new_empty(x.shape),
    _drop_gradients,
    _save_seed,
)
