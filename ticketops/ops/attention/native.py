"""Masked attention on the CPU in C++: csrc/cpu/attention.cpp."""

import torch
from torch import Tensor

from ticketops.ops.attention.reference import Gradients, Positions
from ticketops.ops.extension import address, checked, dropout_arguments, native, refusal, run
from ticketops.ops.memory import empty

__all__ = ["backward", "checked_bias", "forward", "refusal"]


def _view(name: str, x: Tensor, like: Tensor, rows: int | None = None) -> tuple[Tensor, tuple[int, int, int]]:
    """Checks a [T, H, D] tensor, or one with another number of rows. Returns it, or a copy, to be kept alive during the
    call; and its address and two strides."""
    shape = like.shape if rows is None else (rows, *like.shape[1:])
    if x.dtype != like.dtype or x.shape != shape or x.device != like.device or x.stride(2) != 1:
        x = checked(name, x, like.dtype, *shape)
    if x.dtype == torch.bfloat16 and (x.data_ptr() | 2 * x.stride(0) | 2 * x.stride(1)) % 4 and x.shape[2] % 2 == 0:
        # The kernels read pairs of elements.
        x = x.clone(memory_format=torch.contiguous_format)
    return x, (address(x), x.stride(0), x.stride(1))


def checked_bias(bias: Tensor | None, heads: int) -> tuple[Tensor | None, int]:
    """Checks a position bias.

    Args:
        bias: [H, 2 R + 1], or None.
        heads: H.

    Returns:
        The bias, or a copy, to be kept alive during the call; and R.
    """
    if bias is None:
        return None, 0
    return checked("position_bias", bias, torch.float32, heads, bias.shape[1]), bias.shape[1] // 2


def _position_views(positions: Positions, like: Tensor) -> tuple[list[Tensor], list[int]]:
    """Checks position tables. Returns them, or copies, to be kept alive during the call; and the kernels' argument."""
    rows = next((len(x) for x in positions if x is not None), 1)
    names = ("position_keys", "position_queries")
    views = [None if x is None else _view(name, x, like, rows) for name, x in zip(names, positions, strict=True)]
    alive = [view[0] for view in views if view is not None]
    return alive, [number for view in views for number in ((0, 0, 0) if view is None else view[1])] + [rows // 2]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    head_mask: Tensor | None,
    seed: Tensor | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    first_tokens: bool = False,
    bias: Tensor | None = None,
    positions: Positions = (None, None),
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ticketops.ops.attention.reference.forward.

    Args:
        first_tokens: True computes the first token of each sequence only.

    Returns:
        out [T, H, D], 0 for tokens that are not computed; and the log-sum-exp of the scaled scores [T, H].
    """
    tokens, heads, head_dim = q.shape
    batch = lengths.shape[0]
    (q, q_view), (k, k_view), (v, v_view) = _view("q", q, q), _view("k", k, q), _view("v", v, q)
    starts = checked("starts", starts, torch.int32, batch)
    lengths = checked("lengths", lengths, torch.int32, batch)
    real = checked("real", real, torch.bool, tokens)
    head_mask = checked("head_mask", head_mask, torch.float32, heads)
    bias, reach = checked_bias(bias, heads)
    _tables, position_views = _position_views(positions, q)
    out = empty((tokens, heads, head_dim), q.dtype)
    lse = empty((tokens, heads))
    run(
        native.attention_forward,
        *(q.dtype == torch.bfloat16, *q_view, *k_view, *v_view, address(out), address(lse)),
        *(address(starts), address(lengths), address(real), address(head_mask), address(bias), reach, position_views),
        *(batch, tokens, heads, head_dim, max_length),
        *(max_length if window is None else window, first_tokens, scale, *dropout_arguments(seed, dropout_p)),
    )
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    head_mask: Tensor | None,
    seed: Tensor | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    gradients: Tensor | None = None,
    window: int | None = None,
    first_tokens: bool = False,
    bias: Tensor | None = None,
    positions: Positions = (None, None),
    real: Tensor | None = None,
) -> Gradients:
    """See ticketops.ops.attention.reference.backward.

    Args:
        gradients: contiguous [T, 3, H, D] to write dq, dk and dv to; None allocates three tensors.
        first_tokens: as in `forward`; dout of the other tokens is not read.

    Returns:
        dq, dk and dv, each [T, H, D]; the sums of <dOut, O> and of |<dOut, O>| over each sequence, both [B, H]; and the
        gradients of the bias, the position keys and the position queries in float32, None for each that is not there.
    """
    tokens, heads, head_dim = q.shape
    batch = lengths.shape[0]
    (dout, dout_view), (q, q_view) = _view("dout", dout, q), _view("q", q, q)
    (k, k_view), (v, v_view) = _view("k", k, q), _view("v", v, q)
    out = checked("out", out, q.dtype, tokens, heads, head_dim)
    lse = checked("lse", lse, torch.float32, tokens, heads)
    starts = checked("starts", starts, torch.int32, batch)
    lengths = checked("lengths", lengths, torch.int32, batch)
    real = checked("real", real, torch.bool, tokens)
    head_mask = checked("head_mask", head_mask, torch.float32, heads)
    bias, reach = checked_bias(bias, heads)
    _tables, position_views = _position_views(positions, q)
    if gradients is None:
        dq, dk, dv = (empty((tokens, heads, head_dim), q.dtype) for _ in range(3))
    else:
        dq, dk, dv = checked("gradients", gradients, q.dtype, tokens, 3, heads, head_dim).unbind(1)
    signed, absolute = (empty((batch, heads)) for _ in range(2))
    dbias, dkeys, dqueries = (None if x is None else empty(x.shape) for x in (bias, *positions))
    run(
        native.attention_backward,
        *(q.dtype == torch.bfloat16, *dout_view, *q_view, *k_view, *v_view, address(out), address(lse)),
        *(address(starts), address(lengths), address(real), address(head_mask), address(bias), reach, position_views),
        *(address(dq), address(dk), address(dv), dq.stride(0), address(signed), address(absolute), address(dbias)),
        [address(dkeys), address(dqueries)],
        *(batch, tokens, heads, head_dim, max_length),
        *(max_length if window is None else window, first_tokens, scale, *dropout_arguments(seed, dropout_p)),
    )
    return dq, dk, dv, signed, absolute, dbias, dkeys, dqueries
