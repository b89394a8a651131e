"""The way into the encoder on a CPU: rows of an embedding table, LayerNorm and dropout.

torch's own spend more time there than a small encoder's layers: the gradient of a table is nearly all zeros, written to
memory that the system maps and takes back page by page at every step, as are the results of all three, and a dropout's
mask is drawn on one thread.
"""

import math

import torch
from torch import Tensor

from ticketops.ops import backends
from ticketops.ops.dropout import draw_seed
from ticketops.ops.extension import address, checked, dropout_arguments, native, run
from ticketops.ops.memory import empty
from ticketops.ops.registration import define
from ticketops.ops.residual import native as residual


def serves_embedding(x: Tensor) -> bool:
    """Whether `embedding`, `layer_norm` and `dropout` run here; where they do not, torch's own serve.

    Args:
        x: the table, or the tokens.
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


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of each token.

    Args:
        x: [.., C], float32 or bfloat16, on the CPU.
        weight, bias: [C].
        eps: added to the variance.

    Returns:
        Of x's shape and dtype, contiguous.
    """
    out, _, _ = torch.ops.ticketops.layer_norm(x.reshape(-1, x.shape[-1]), weight, bias, eps)
    return out.view(x.shape)


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
    out = empty((ids.numel(), weight.shape[1]), weight.dtype)
    return torch.index_select(weight, 0, ids.flatten(), out=out).view(*ids.shape, weight.shape[1])


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


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return residual.forward(None, x, None, weight, bias, None, 0.0, eps)


def _norm_backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    _, dx, _, dweight, dbias = residual.backward(dout, None, x, None, weight, mean, rstd, None, 0.0)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _save_statistics(ctx, inputs, output):
    x, weight, _, _ = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _norm_gradients(ctx, dout, *_):
    return *torch.ops.ticketops.layer_norm_backward(dout, *ctx.saved_tensors), None


def _drop(x: Tensor, seed: Tensor, p: float) -> Tensor:
    columns = x.shape[-1]
    rows = math.prod(x.shape[:-1])
    x = checked("x", x, x.dtype, *x.shape)
    out = empty(x.shape, x.dtype)
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
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _norm,
    lambda x, weight, bias, eps: (
        x.new_empty(x.shape),
        *(x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2)),
    ),
    _norm_gradients,
    _save_statistics,
)
define(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    lambda dout, x, weight, mean, rstd: (x.new_empty(x.shape), *(torch.empty_like(weight) for _ in range(2))),
)
define(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    _drop,
    lambda x, seed, p: x.new_empty(x.shape),
    _drop_gradients,
    _save_seed,
)
