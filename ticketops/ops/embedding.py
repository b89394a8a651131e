"""Embedding lookup, LayerNorm and dropout in front of the encoder on a CPU, as single ops and as one fused op.

In a small encoder torch's versions of these take longer than the encoder's layers. The gradient of an embedding table
is nearly all zeros, yet the whole table is written at every step, to memory that the system maps and unmaps page by
page (the results of all three ops lie in such memory). And torch draws a dropout mask on one thread.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ticketops.ops import backends
from ticketops.ops.dropout import draw_seed
from ticketops.ops.extension import address, checked, dropout_arguments, native, run
from ticketops.ops.memory import empty
from ticketops.ops.registration import check_devices, define
from ticketops.ops.residual import native as residual


def serves_embedding(x: Tensor) -> bool:
    """True if the ops of this module can run on a tensor's device and dtype. Otherwise use torch's own.

    Args:
        x: the embedding table, or the tokens.
    """
    # These ops and the LayerNorm of ops.residual are in the same extension.
    return backends.common("residual", device=x.device, dtype=x.dtype) == "native"


def embedding(weight: Tensor, ids: Tensor, padding_idx: int | None) -> Tensor:
    """Looks up rows of an embedding table.

    Args:
        weight: [V, C], the table; float32 or bfloat16, on the CPU.
        ids: int64 or int32 [..], indices of rows.
        padding_idx: index of a row that gets no gradient, or None.

    Returns:
        [.., C].
    """
    return _embedding_op(weight, ids, -1 if padding_idx is None else padding_idx)


def embeddings(
    tables: Sequence[Tensor | None],
    ids: Sequence[Tensor | None],
    padding: Sequence[int | None],
    weight: Tensor,
    bias: Tensor,
    *,
    dropout_p: float,
    eps: float,
) -> Tensor:
    """Computes dropout(LayerNorm(word + token type + position)) in one pass over memory, and its gradients in another.

    Args:
        tables: [V, C] each, the tables of words, token types and positions, the latter two possibly None; float32 or
            bfloat16, on the CPU.
        ids: int64 or int32, one shape [..], indices into each table; None for a table that is None.
        padding: for each table, the index of a row that gets no gradient, or None.
        weight, bias: [C], the LayerNorm's parameters; any floating dtype.
        dropout_p: dropout probability in [0, 1).
        eps: added to the variance.

    Returns:
        [.., C].

    Raises:
        InputError: an id is outside its table, or tensors are on different devices.
    """
    names = (*_SOURCES, "ids", "token_type_ids", "position_ids", "weight", "bias")
    check_devices("embeddings", names, (*tables, *ids, weight, bias))
    seed = draw_seed(weight.device) if dropout_p else None
    skipped = [-1 if row is None else row for row in padding]
    return _embeddings_op(*tables, *ids, weight, bias, seed, skipped, dropout_p, eps)[0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Applies LayerNorm to each token.

    Args:
        x: [.., C], float32 or bfloat16, on the CPU.
        weight, bias: [C], the LayerNorm's parameters.
        eps: added to the variance.

    Returns:
        Contiguous tensor of x's shape and dtype.
    """
    out, _, _ = _layer_norm_op(x.reshape(-1, x.shape[-1]), weight, bias, eps)
    return out.view(x.shape)


def dropout(x: Tensor, p: float) -> Tensor:
    """Sets elements to 0 with probability p and divides the others by 1 - p.

    Args:
        x: [.., C], float32 or bfloat16, on the CPU.
        p: dropout probability in (0, 1).

    Returns:
        Contiguous tensor of x's shape and dtype.
    """
    return _dropout_op(x, draw_seed(x.device), p)


def embedding_gradient(dout: Tensor, ids: Tensor, rows: int, padding_idx: int) -> Tensor:
    """Computes the gradient of an embedding table: for each row of the table the sum of the rows of `dout` that were
    looked up there.

    Args:
        dout: [.., C], gradient of the looked-up rows; float32 or bfloat16, on the CPU.
        ids: int64 or int32 [..], the index of the table's row that each row of `dout` belongs to.
        rows: number of rows in the table.
        padding_idx: index of a row whose gradient stays 0; -1 for none.

    Returns:
        [rows, C] in dout's dtype.

    Raises:
        InputError: an id is outside the table.
    """
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


def _embed(weight: Tensor, ids: Tensor, padding_idx: int) -> Tensor:
    out = empty((*ids.shape, weight.shape[1]), weight.dtype)
    torch.index_select(weight, 0, ids.flatten(), out=out.view(-1, weight.shape[1]))
    return out


_SOURCES = ("word", "token_type", "position")


def _sources(
    tables: Sequence[Tensor | None], ids: Sequence[Any]
) -> tuple[list[Tensor], list[tuple[int, int]], list[int]]:
    """Checks the tables and ids. Returns the checked tensors, which must live as long as their addresses are used; the
    (table, ids) addresses; and the number of rows of each table. Without positions the
    order of addresses and numbers is reversed: the kernels need the last table."""
    word = tables[0]
    assert word is not None
    kept_alive: list[Tensor] = []
    addresses, sizes = [], []
    for name, table, places in zip(_SOURCES, tables, ids, strict=True):
        if table is None:
            addresses.append((0, 0))
            sizes.append(0)
            continue
        table = checked(f"the {name} table", table, word.dtype, table.shape[0], word.shape[1])
        places = checked(f"ids of the {name} table", places.flatten().long(), torch.int64, ids[0].numel())
        kept_alive += [table, places]
        addresses.append((address(table), address(places)))
        sizes.append(table.shape[0])
    order = slice(None) if tables[-1] is not None else slice(None, None, -1)
    return kept_alive, addresses[order], sizes[order]


def _embed_all(*arguments):
    *sources, weight, bias, seed, _, dropout_p, eps = arguments
    (_, channels), dtype, tokens = sources[0].shape, sources[0].dtype, sources[3].numel()
    _held, addresses, sizes = _sources(sources[:3], sources[3:])
    out = empty((*sources[3].shape, channels), dtype)
    mean, rstd = empty(tokens), empty(tokens)
    # The LayerNorm may have another dtype than the tables.
    gamma, beta = (checked("gamma and beta", vector.float(), torch.float32, channels) for vector in (weight, bias))
    run(
        native.embeddings_forward,
        *(dtype == torch.bfloat16, addresses, sizes, residual.norm(gamma, beta, mean, rstd), address(out)),
        *(tokens, channels, eps, *dropout_arguments(seed, dropout_p)),
    )
    return out, mean, rstd


def _embed_all_backward(dout, *arguments):
    *sources, weight, mean, rstd, seed, skipped, dropout_p, wanted = arguments
    (_, channels), dtype, tokens = sources[0].shape, sources[0].dtype, sources[3].numel()
    _held, addresses, sizes = _sources(sources[:3], sources[3:])
    gamma = checked("gamma", weight.float(), torch.float32, channels)
    mean, rstd = (checked("mean and rstd", vector, torch.float32, tokens) for vector in (mean, rstd))
    dout = checked("dout", dout.reshape(-1, channels), dtype, tokens, channels)
    dz = empty((tokens, channels), dtype)
    dgamma, dbeta = empty(channels), empty(channels)
    run(
        native.embeddings_backward,
        *(dtype == torch.bfloat16, address(dout), addresses, sizes, residual.norm(gamma, None, mean, rstd)),
        *(address(dz), address(dgamma), address(dbeta), tokens, channels, *dropout_arguments(seed, dropout_p)),
    )
    gradients = [
        embedding_gradient(dz, ids, len(table), row) if table_wanted else dz.new_empty(0)
        for table, ids, row, table_wanted in zip(sources[:3], sources[3:], skipped, wanted, strict=True)
    ]
    return *gradients, dgamma.to(weight.dtype), dbeta.to(weight.dtype)


def _save_sources(ctx, inputs, output):
    *sources, weight, bias, seed, ctx.skipped, ctx.dropout_p, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(*sources, weight, *output[1:], seed)


def _all_gradients(ctx, dout, *_):
    wanted = ctx.needs_input_grad[:3]
    *tables, dweight, dbias = _embeddings_backward_op(
        dout, *ctx.saved_tensors, ctx.skipped, ctx.dropout_p, list(wanted)
    )
    gradients = (table if there else None for table, there in zip(tables, wanted, strict=True))
    dweight, dbias = (
        x.to(dtype) if there else None
        for x, dtype, there in zip(
            (dweight, dbias), (dweight.dtype, ctx.bias_dtype), ctx.needs_input_grad[6:8], strict=True
        )
    )
    return *gradients, None, None, None, dweight, dbias, None, None, None, None


def _save_ids(ctx, inputs, output):
    weight, ids, ctx.padding_idx = inputs
    ctx.rows = weight.shape[0]
    ctx.save_for_backward(ids)


def _embedding_gradients(ctx, dout):
    (ids,) = ctx.saved_tensors
    return _embedding_backward_op(dout, ids, ctx.rows, ctx.padding_idx), None, None


def _norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, ...]:
    return residual.forward(None, x, None, weight, bias, None, 0.0, eps)


def _norm_backward(dout: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, ...]:
    _, dx, _, dweight, dbias = residual.backward(dout, None, x, None, weight, mean, rstd, None, 0.0)
    return dx, dweight.to(weight.dtype), dbias.to(weight.dtype)


def _save_statistics(ctx, inputs, output):
    x, weight, bias, _ = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, weight, *output[1:])


def _norm_gradients(ctx, dout, *_):
    dx, dweight, dbias = _layer_norm_backward_op(dout, *ctx.saved_tensors)
    gradients = zip((dx, dweight, dbias.to(ctx.bias_dtype)), ctx.needs_input_grad[:3], strict=True)
    return *(gradient if there else None for gradient, there in gradients), None


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
    return _dropout_op(dout, seed, ctx.p), None, None


_embedding_op = define(
    "embedding(Tensor weight, Tensor ids, int padding_idx) -> Tensor",
    _embed,
    lambda weight, ids, padding_idx: weight.new_empty((*ids.shape, weight.shape[1])),
    _embedding_gradients,
    _save_ids,
)
_embedding_backward_op = define(
    "embedding_backward(Tensor dout, Tensor ids, SymInt rows, int padding_idx) -> Tensor",
    embedding_gradient,
    lambda dout, ids, rows, padding_idx: dout.new_empty((rows, dout.shape[-1])),
)
_layer_norm_op = define(
    "layer_norm(Tensor x, Tensor weight, Tensor bias, float eps) -> (Tensor, Tensor, Tensor)",
    _norm,
    lambda x, weight, bias, eps: (
        x.new_empty(x.shape),
        *(x.new_empty(x.shape[:1], dtype=torch.float32) for _ in range(2)),
    ),
    _norm_gradients,
    _save_statistics,
)
_layer_norm_backward_op = define(
    "layer_norm_backward(Tensor dout, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
    _norm_backward,
    lambda dout, x, weight, mean, rstd: (x.new_empty(x.shape), *(torch.empty_like(weight) for _ in range(2))),
)
_dropout_op = define(
    "dropout(Tensor x, Tensor seed, float p) -> Tensor",
    _drop,
    lambda x, seed, p: x.new_empty(x.shape),
    _drop_gradients,
    _save_seed,
)
_TABLES = "Tensor word, Tensor? token_type, Tensor? position, Tensor ids, Tensor? token_type_ids, Tensor? position_ids"
_embeddings_op = define(
    f"embeddings({_TABLES}, Tensor weight, Tensor bias, Tensor? seed, int[] skipped, float dropout_p, float eps) "
    "-> (Tensor, Tensor, Tensor)",
    _embed_all,
    lambda word, token_type, position, ids, *others: (
        word.new_empty((*ids.shape, word.shape[1])),
        *(word.new_empty(ids.numel(), dtype=torch.float32) for _ in range(2)),
    ),
    _all_gradients,
    _save_sources,
)
_embeddings_backward_op = define(
    f"embeddings_backward(Tensor dout, {_TABLES}, Tensor weight, Tensor mean, Tensor rstd, Tensor? seed, "
    "int[] skipped, float dropout_p, bool[] wanted) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _embed_all_backward,
    lambda dout, *arguments: (
        *(
            torch.empty_like(table) if wanted else dout.new_empty(0)
            for table, wanted in zip(arguments[:3], arguments[-1], strict=True)
        ),
        *(torch.empty_like(arguments[6]) for _ in range(2)),
    ),
)
