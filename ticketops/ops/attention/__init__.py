"""Masked multi-head attention over (start, length) sequences, as one autograd op for all backends.

    out[t, h] = head_mask[h] * sum_j dropout(softmax_j(scale * <q[t, h], k[j, h]> + bias[h, j - t])) v[j, h],
    j over t's sequence

With a window, j is limited to |t - j| <= window, and keys outside it are not computed. The bias is 0 unless it is
given.

A head whose mask is 0 is not computed: its output and all its gradients, that of the mask included, are 0. With O the
output before the mask, the gradient of the mask is sum <dOut, O>. The backward pass computes <dOut, out> anyway, as the
softmax's delta, so importance costs only a sum over it.
"""

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.backends import implementation
from ticketops.ops.dropout import draw_seed
from ticketops.ops.packing import Sequences
from ticketops.ops.registration import autocast, define, same_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


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

    Returns:
        [T, H, D], contiguous, in q's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes, dtypes or values that do not fit together.
        UnsupportedError: a dtype that no backend serves.

    Source:
        Liang et al. 2021, section 3; the delta identity of flash attention's backward pass.
    """
    q, k, v = autocast(q, k, v)
    same_dtype("attention", DTYPES, q=q, k=k, v=v)
    if q.ndim != 3 or q.shape != k.shape or q.shape != v.shape:
        raise InputError(f"attention needs q, k, v of one shape [T, H, D], got {[tuple(x.shape) for x in (q, k, v)]}")
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if head_mask is not None and head_mask.shape != (q.shape[1],):
        raise InputError(f"head_mask must have shape [{q.shape[1]}], one value a head, got {tuple(head_mask.shape)}")
    if importance is not None and importance.shape != (len(sequences), q.shape[1]):
        raise InputError(f"importance must have shape [{len(sequences)}, {q.shape[1]}], got {tuple(importance.shape)}")
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
    seed = draw_seed(q.device) if dropout_p else None
    dtype = _statistics_dtype(q.dtype)
    out, _ = _attention_op(
        q,
        k,
        v,
        sequences.starts,
        sequences.lengths,
        None if head_mask is None else head_mask.to(dtype),
        None if position_bias is None else position_bias.to(dtype),
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


def _forward(
    q, k, v, starts, lengths, head_mask, bias, importance, seed, max_length, scale, dropout_p, per_token, window
):
    with torch.autocast(q.device.type, enabled=False):
        return implementation("attention", q.device, q.dtype).forward(
            q, k, v, starts, lengths, head_mask, seed, max_length, scale, dropout_p, window=window, bias=bias
        )


def _fake_forward(
    q, k, v, starts, lengths, head_mask, bias, importance, seed, max_length, scale, dropout_p, per_token, window
):
    tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((tokens, heads), dtype=_statistics_dtype(q.dtype))


def _backward(dout, q, k, v, out, lse, starts, lengths, head_mask, bias, seed, max_length, scale, dropout_p, window):
    with torch.autocast(q.device.type, enabled=False):
        *others, dbias = implementation("attention", q.device, q.dtype).backward(
            *(dout, q, k, v, out, lse, starts, lengths, head_mask, seed, max_length, scale, dropout_p),
            window=window,
            bias=bias,
        )
    return *others, lse.new_empty(0) if dbias is None else dbias


def _fake_backward(
    dout, q, k, v, out, lse, starts, lengths, head_mask, bias, seed, max_length, scale, dropout_p, window
):
    partials = [q.new_empty((lengths.shape[0], q.shape[1]), dtype=_statistics_dtype(q.dtype)) for _ in range(2)]
    return (
        *(q.new_empty(q.shape) for _ in range(3)),
        *partials,
        partials[0].new_empty(0 if bias is None else bias.shape),
    )


def _setup_context(ctx, inputs, output):
    q, k, v, starts, lengths, head_mask, bias, importance, seed, *ctx.settings, ctx.per_token, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output, starts, lengths, head_mask, bias, seed)
    ctx.importance_dtype = None if importance is None else importance.dtype


def _gradients(ctx, dout, _):
    *tensors, head_mask, bias, seed = ctx.saved_tensors
    dq, dk, dv, signed, absolute, dbias = _attention_backward_op(
        dout, *tensors, head_mask, bias, seed, *ctx.settings, ctx.window
    )
    dmask = signed.sum(0) if head_mask is not None and ctx.needs_input_grad[5] else None
    partial = None
    if ctx.importance_dtype is not None:
        partial = (absolute if ctx.per_token else signed).to(ctx.importance_dtype)
    dq, dk, dv = (x if there else None for x, there in zip((dq, dk, dv), ctx.needs_input_grad[:3], strict=True))
    dbias = dbias if bias is not None and ctx.needs_input_grad[6] else None
    return dq, dk, dv, None, None, dmask, dbias, partial, None, None, None, None, None, None


_attention_op = define(
    "attention(Tensor q, Tensor k, Tensor v, Tensor starts, Tensor lengths, Tensor? head_mask, Tensor? bias, "
    "Tensor? importance, Tensor? seed, SymInt max_length, float scale, float dropout_p, bool per_token, "
    "int? window) -> (Tensor, Tensor)",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
)
_attention_backward_op = define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor starts, "
    "Tensor lengths, Tensor? head_mask, Tensor? bias, Tensor? seed, SymInt max_length, float scale, float dropout_p, "
    "int? window) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
