"""Masked multi-head attention over (start, length) sequences, as one autograd op for all backends.

    out[t, h] = head_mask[h] * sum_j dropout(softmax_j(scale * score[t, j, h] + bias[h, j - t])) v[j, h],
    score[t, j, h] = <q[t, h], k[j, h]> + <q[t, h], keys[j - t, h]> + <k[j, h], queries[j - t, h]>,
    j over t's sequence

With a window, j is limited to |t - j| <= window, and keys outside it are not computed. A hole, a row of a sequence that
is not real, neither attends nor is attended to: its output and its gradients are 0. The bias, the position keys and
the position queries are 0 unless they are given.

A head whose mask is 0 is not computed: its output and all its gradients, that of the mask included, are 0. With O the
output before the mask, the gradient of the mask is sum <dOut, O>. The backward pass computes <dOut, out> anyway, as the
softmax's delta, so importance costs only a sum over it.
"""

import torch
from torch import Tensor

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops.backends import implementation
from ticketops.ops.dropout import draw_seed
from ticketops.ops.packing import Sequences
from ticketops.ops.registration import autocast, define, same_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_POSITIONS = ("position_keys", "position_queries")


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    *,
    head_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    importance: Tensor | None = None,
    per_token: bool = False,
    window: int | None = None,
    position_bias: Tensor | None = None,
    position_keys: Tensor | None = None,
    position_queries: Tensor | None = None,
) -> Tensor:
    """Computes self-attention within each sequence, with one mask value per head.

    Args:
        q: [T, H, D] queries, any strides; float64, float32, bfloat16 or float16.
        k: [T, H, D] keys, same dtype.
        v: [T, H, D] values, same dtype.
        sequences: rows of each sequence; the output of rows outside all sequences is 0.
        head_mask: [H], multiplies each head's output; None means ones. Differentiable.
        dropout_p: probability in [0, 1) of dropping an attention weight.
        scale: multiplies the scores; None means D ** -0.5.
        importance: [B, H] float tensor that requires a gradient, as a sink: its values are not read, and its gradient
            is the importance of each sequence and head, sum_t <dOut, O>, or sum_t |<dOut, O>| with `per_token`.
        per_token: True sums the absolute values of the tokens' terms.
        window: number of tokens to either side that a token attends to; None for the whole sequence.
        position_bias: [H, 2 R + 1] float with R at least the longest sequence - 1: element R + d is added to the scaled
            scores of a query and the key d tokens behind it. None adds nothing. Differentiable. See `bucketed_bias`.
        position_keys: [2 R + 1, H, D] in q's dtype, any strides, with R at least the longest sequence - 1: a query's
            product with row R + d is added to its product with the key d tokens behind it, before the scale. None adds
            nothing. Differentiable. Not together with a window or position_bias.
        position_queries: the same for the key's product with row R + d; of the same shape.

    Returns:
        [T, H, D], contiguous, in q's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes, dtypes or values that do not fit together.
        UnsupportedError: a dtype that no backend serves, or position vectors together with a window or a bias.

    Source:
        Liang et al. 2021, section 3; the delta identity of flash attention's backward pass. The position vectors: He
        et al. 2021 (DeBERTa, arXiv 2006.03654), section 3.1.
    """
    given = {name: x for name, x in zip(_POSITIONS, (position_keys, position_queries), strict=True) if x is not None}
    q, k, v, *vectors = autocast(q, k, v, *given.values())
    given = dict(zip(given, vectors, strict=True))
    same_dtype("attention", DTYPES, q=q, k=k, v=v, **given)
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise InputError(f"attention needs q, k, v of one shape [T, H, D], got {[tuple(x.shape) for x in (q, k, v)]}")
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if head_mask is not None and head_mask.shape != (q.shape[1],):
        raise InputError(f"head_mask must have shape [{q.shape[1]}], one value a head, got {tuple(head_mask.shape)}")
    if importance is not None and importance.shape != (len(sequences), q.shape[1]):
        raise InputError(f"importance must have shape [{len(sequences)}, {q.shape[1]}], got {tuple(importance.shape)}")
    real = sequences.real
    if real is not None and (real.shape != q.shape[:1] or real.dtype != torch.bool):
        raise InputError(f"sequences.real must be bool [{len(q)}], a flag a row, got {real.dtype} {[*real.shape]}")
    if window is not None:
        if window < 0:
            raise InputError(f"window must be at least 0, or None for the whole sequence, got {window}")
        if window >= sequences.max_length - 1:
            # The window covers every sequence, so use the cheaper kernels without one.
            window = None
    if position_bias is not None:
        least = 2 * sequences.max_length - 1
        if position_bias.ndim != 2 or len(position_bias) != q.shape[1] or position_bias.shape[1] % 2 == 0:
            raise InputError(
                f"position_bias must have shape [{q.shape[1]}, 2 R + 1], a row a head, got {[*position_bias.shape]}"
            )
        if position_bias.shape[1] < least:
            raise InputError(
                f"position_bias must have at least {least} columns for sequences of {sequences.max_length} tokens, got "
                f"{position_bias.shape[1]}"
            )
    if given and (window is not None or position_bias is not None):
        other = "a window" if window is not None else "a position_bias"
        raise UnsupportedError(f"attention does not serve {' and '.join(given)} together with {other}: leave one out")
    rows = 0
    for name, table in given.items():
        rows = rows or len(table)
        if table.ndim != 3 or table.shape[1:] != q.shape[1:] or len(table) % 2 == 0 or len(table) != rows:
            raise InputError(
                f"{name} must have shape [2 R + 1, {q.shape[1]}, {q.shape[2]}], a row a distance as the other table "
                f"has, got {[*table.shape]}"
            )
        if rows < 2 * sequences.max_length - 1:
            raise InputError(
                f"{name} must have at least {2 * sequences.max_length - 1} rows for sequences of "
                f"{sequences.max_length} tokens, got {rows}"
            )
    seed = draw_seed(q.device) if dropout_p else None
    dtype = _statistics_dtype(q.dtype)
    out, _ = _attention_op(
        q,
        k,
        v,
        sequences.starts,
        sequences.lengths,
        real,
        None if head_mask is None else head_mask.to(dtype),
        None if position_bias is None else position_bias.to(dtype),
        *map(given.get, _POSITIONS),
        importance,
        seed,
        sequences.max_length,
        q.shape[-1] ** -0.5 if scale is None else scale,
        dropout_p,
        per_token,
        window,
    )
    return out


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(q, k, v, starts, lengths, real, head_mask, bias, keys, queries, importance, seed, *settings):
    max_length, scale, dropout_p, _, window = settings
    with torch.autocast(q.device.type, enabled=False):
        return implementation("attention", q.device, q.dtype).forward(
            *(q, k, v, starts, lengths, head_mask, seed, max_length, scale, dropout_p),
            window=window,
            bias=bias,
            positions=(keys, queries),
            real=real,
        )


def _fake_forward(q, *_):
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((tokens, heads), dtype=_statistics_dtype(q.dtype))


def _backward(dout, q, k, v, out, lse, starts, lengths, real, head_mask, bias, keys, queries, seed, *settings):
    max_length, scale, dropout_p, window = settings
    with torch.autocast(q.device.type, enabled=False):
        *others, dbias, dkeys, dqueries = implementation("attention", q.device, q.dtype).backward(
            *(dout, q, k, v, out, lse, starts, lengths, head_mask, seed, max_length, scale, dropout_p),
            window=window,
            bias=bias,
            positions=(keys, queries),
            real=real,
        )
    # Sums over the batch, which half precision rounds once.
    positions = (None if x is None else x.to(q.dtype) for x in (dkeys, dqueries))
    return *others, *(lse.new_empty(0) if x is None else x for x in (dbias, *positions))


def _fake_backward(dout, q, k, v, out, lse, starts, lengths, real, head_mask, bias, keys, queries, *_):
    dtype = _statistics_dtype(q.dtype)
    partials = [q.new_empty((lengths.shape[0], q.shape[1]), dtype=dtype) for _ in range(2)]
    return (
        *(q.new_empty(q.shape) for _ in range(3)),
        *partials,
        *(partials[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in (bias, keys, queries)),
    )


#: Number of the op's tensors in front of the importance sink.
_DIFFERENTIABLE = 10


def _setup_context(ctx, inputs, output):
    *tensors, importance, seed = inputs[: _DIFFERENTIABLE + 2]
    *ctx.settings, ctx.per_token, ctx.window = inputs[_DIFFERENTIABLE + 2 :]
    ctx.save_for_backward(*tensors[:3], *output, *tensors[3:], seed)
    ctx.importance_dtype = None if importance is None else importance.dtype


def _gradients(ctx, dout, _):
    dq, dk, dv, signed, absolute, *by_distance = _attention_backward_op(
        dout, *ctx.saved_tensors, *ctx.settings, ctx.window
    )
    partial = None
    if ctx.importance_dtype is not None:
        partial = (absolute if ctx.per_token else signed).to(ctx.importance_dtype)
    found = (dq, dk, dv, None, None, None, signed.sum(0) if ctx.needs_input_grad[6] else None, *by_distance)
    wanted = ctx.needs_input_grad[:_DIFFERENTIABLE]
    return *(x if there else None for x, there in zip(found, wanted, strict=True)), partial, *(None,) * 6


_TENSORS = "Tensor starts, Tensor lengths, Tensor? real, Tensor? head_mask, Tensor? bias, Tensor? keys, Tensor? queries"
_attention_op = define(
    f"attention(Tensor q, Tensor k, Tensor v, {_TENSORS}, Tensor? importance, Tensor? seed, SymInt max_length, "
    "float scale, float dropout_p, bool per_token, int? window) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
)
_attention_backward_op = define(
    f"attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, {_TENSORS}, Tensor? seed, "
    f"SymInt max_length, float scale, float dropout_p, int? window) -> ({', '.join(['Tensor'] * 8)})",
    _backward,
    _fake_backward,
)
