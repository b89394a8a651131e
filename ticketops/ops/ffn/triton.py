"""Masked FFN on a GPU: matrix products by cuBLAS, with one fused Triton kernel between them in each direction.

GEMM and GELU are not fused: FlashAttention measured cuBLASLt's own fused GELU as slower on H100 than a plain product
followed by a pointwise kernel, and a Triton GEMM is slower than cuBLAS to begin with. The first bias is added in
cuBLAS's epilogue (torch.addmm). The pointwise kernels do everything else, at 2.6 TB/s in each direction, of 4.8 in the
data sheet of the H200 (16,384 tokens, 3,072 neurons, bfloat16; tiles-nvidia-h200.json). `make gpu` compares this with
torch.compile; there are no results of that yet.

Both masks are folded into the activations: with m the FFN mask and n the neuron mask, hidden = m n act(pre) gives
out = hidden W2^T + m b2 and dW2 = dOut^T hidden, so that no tensor of the output's size is multiplied by m. The masks
are on the device, and reading them on the host would wait for the GPU. So with a mask of 0 the products still run, on
zeros, while the first pointwise kernel skips its loads. This matters to direct callers of the op only: a layer does not
call it for an FFN that a ticket prunes, and compacts the weights of the neurons that a ticket keeps. A gate is the
second half of the columns of the first product.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ticketops.ops import triton_configs
from ticketops.ops.dropout import keep_threshold
from ticketops.ops.triton_common import (
    UNALIGNED,
    Part,
    cdiv,
    dropout_keeps,
    dropout_rows,
    launch,
    linear,
    owned_rows,
    refusal,
    transposed,
)

__all__ = ["backward", "forward", "refusal"]


class Wanted(NamedTuple):
    """Flags for the sums that a backward pass is to compute.

    Attributes:
        db1, db2: gradients of the biases.
        tokens: sums of <dOut, Y> over each sequence's tokens.
        neurons: sums of G * H over each sequence's tokens, per neuron.
        absolute: True sums absolute values in `neurons`.
    """

    db1: bool
    db2: bool
    tokens: bool
    neurons: bool
    absolute: bool


class Parts(NamedTuple):
    """Partial sums that `activation_backward` returns and `finish` adds up; None for sums that are not wanted.

    Attributes:
        db1: float32 [parts, N], parts of db1.
        db2: float32 [parts, C], parts of db2.
        terms: float32 [T], <dOut, Y> of each token.
    """

    db1: Tensor | None
    db2: Tensor | None
    terms: Tensor | None


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Computes the activation and its derivative of float32 values."""
    if ACTIVATION == "relu":
        return tl.maximum(x, 0.0), tl.where(x > 0.0, 1.0, 0.0)
    if ACTIVATION == "silu":
        gate = tl.sigmoid(x)
        return x * gate, gate + x * gate * (1.0 - gate)
    if ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 = sigmoid(2 u), which needs no tanh.
        TWO_ROOT_2_OVER_PI: tl.constexpr = 1.5957691216057308
        gate = tl.sigmoid(TWO_ROOT_2_OVER_PI * (x + 0.044715 * x * x * x))
        slope = TWO_ROOT_2_OVER_PI * (1.0 + 0.134145 * x * x)
        return x * gate, gate + x * gate * (1.0 - gate) * slope
    cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * cdf, cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def load_masks(p_ffn_mask, p_neuron_mask, o_n, m_n):
    """Loads the mask value of the FFN and those of a block of neurons; 1 if there is no mask."""
    ffn_mask = 1.0
    if p_ffn_mask is not None:
        ffn_mask = tl.load(p_ffn_mask)
    b_neuron_mask = tl.full(o_n.shape, 1.0, tl.float32)
    if p_neuron_mask is not None:
        b_neuron_mask = tl.load(p_neuron_mask + o_n, mask=m_n, other=0.0)
    return ffn_mask, b_neuron_mask


@triton.jit
def rows_to_load(b_scale, rows):
    """Returns `rows`, or 0 if the masks of all neurons of a block are 0. As a limit on rows, this skips loads without
    making loads along the neurons narrower."""
    return tl.where(tl.max(tl.where(b_scale != 0.0, 1, 0), 1) > 0, rows, 0)


@triton.jit(do_not_specialize=["tokens", "threshold", "keep_scale"])
def forward_kernel(
    p_pre,
    p_hidden,
    p_ffn_mask,
    p_neuron_mask,
    p_seed,
    tokens,
    neurons,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """hidden = m n dropout(act(pre)) on a block of tokens and neurons; the gate, if any, multiplies act(pre)."""
    width = neurons * 2 if GATED else neurons
    column_blocks = tl.cdiv(neurons, COLUMNS)
    i_row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS
    o_r = tl.arange(0, ROWS)
    o_n = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_n = o_n < neurons
    o_x = o_r[:, None] * neurons + o_n[None, :]
    m_x = (i_row + o_r < tokens)[:, None] & m_n[None, :]
    ffn_mask, b_neuron_mask = load_masks(p_ffn_mask, p_neuron_mask, o_n, m_n)
    b_scale = (ffn_mask * b_neuron_mask)[None, :]
    # [ROWS, COLUMNS]
    m_load = (i_row + o_r < rows_to_load(b_scale, tokens))[:, None] & m_n[None, :]
    p_block = p_pre + i_row * width + o_r[:, None] * width + o_n[None, :]
    b_act, _ = activate(tl.load(p_block, mask=m_load, other=0.0).to(tl.float32), ACTIVATION)
    if GATED:
        b_act *= tl.load(p_block + neurons, mask=m_load, other=0.0).to(tl.float32)
    if p_seed is not None:
        m_keep = dropout_keeps(dropout_rows(p_seed, i_row, o_r, 0, 1)[:, None], o_n[None, :], threshold)
        b_act = tl.where(m_keep, b_act * keep_scale, 0.0)
    b_hidden = tl.where(b_scale == 0.0, 0.0, b_act * b_scale)
    tl.store(p_hidden + i_row * neurons + o_x, b_hidden.to(p_hidden.dtype.element_ty), mask=m_x)


# The backward kernels. With m the FFN's mask, n the neurons' and H = act(A):
#
#     G = dOut W2 (cuBLAS),   dA = m n G act'(A),   db1 = sum dA,   db2 = m sum dOut,
#     dL/dm = sum <dOut, Y> = sum <dOut, out> / m,   dL/dn = sum m G H;
#
# with a gate U, H = act(A) U, dA = m n G U act'(A) and dU = m n G act(A). With dropout, R = keep / (1 - p) multiplies
# H, dA and dU.


@triton.jit
def reduce_output_side(
    p_dout,
    p_out,
    p_db2,
    p_terms,
    i_part,
    stride_dt,
    stride_dc,
    tokens,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Reads dOut of a block of tokens once. Computes its sum over tokens, for db2, and <dOut, out> of each token."""
    i_row = i_part.to(tl.int64) * ROWS
    o_r = tl.arange(0, ROWS)
    m_r = i_row + o_r < tokens
    b_terms = tl.zeros([ROWS], tl.float32)
    for i_c in range(0, channels, COLUMNS):
        o_c = i_c + tl.arange(0, COLUMNS)
        m_c = o_c < channels
        m_x = m_r[:, None] & m_c[None, :]
        # [ROWS, COLUMNS]
        p_block = p_dout + i_row * stride_dt + o_r[:, None].to(tl.int64) * stride_dt + o_c[None, :] * stride_dc
        b_do = tl.load(p_block, mask=m_x, other=0.0).to(tl.float32)
        if p_db2 is not None:
            tl.store(p_db2 + i_part.to(tl.int64) * channels + o_c, tl.sum(b_do, 0), mask=m_c)
        if p_terms is not None:
            p_block = p_out + i_row * channels + o_r[:, None] * channels + o_c[None, :]
            b_terms += tl.sum(b_do * tl.load(p_block, mask=m_x, other=0.0).to(tl.float32), 1)
    if p_terms is not None:
        tl.store(p_terms + i_row + o_r, b_terms, mask=m_r)


@triton.jit(
    do_not_specialize=["tokens", "batch", "output_parts", "threshold", "keep_scale"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def backward_kernel(
    p_gradient,
    p_target,
    p_pre,
    p_db1,
    p_by_neuron,
    p_dout,
    p_out,
    p_db2,
    p_terms,
    p_starts,
    p_lengths,
    p_ffn_mask,
    p_neuron_mask,
    p_seed,
    stride_dt,
    stride_dc,
    tokens,
    batch,
    neurons,
    channels,
    output_parts,
    threshold,
    keep_scale,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    ABSOLUTE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Computes dA from G, in place unless gated, and the partial sums for both biases and the importance.

    The first `output_parts` programs reduce dOut. Each of the others computes a block of neurons and tokens; if sums by
    sequence and neuron are wanted, a block of neurons and all rows that one sequence owns.
    """
    pid = tl.program_id(0)
    if pid < output_parts:
        reduce_output_side(p_dout, p_out, p_db2, p_terms, pid, stride_dt, stride_dc, tokens, channels, ROWS, COLUMNS)
        return
    column_blocks = tl.cdiv(neurons, COLUMNS)
    i_part = (pid - output_parts) // column_blocks
    o_n = (pid - output_parts) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_n = o_n < neurons
    ffn_mask, b_neuron_mask = load_masks(p_ffn_mask, p_neuron_mask, o_n, m_n)
    b_scale = (ffn_mask * b_neuron_mask)[None, :]
    if p_by_neuron is not None:
        own_first, last = owned_rows(p_starts, p_lengths, batch, tokens, i_part)
        first = own_first.to(tl.int64)
        start = tl.load(p_starts + i_part)
        end = start + tl.load(p_lengths + i_part)
    else:
        first = i_part.to(tl.int64) * ROWS
        last = tl.minimum(first + ROWS, tokens)
    width = neurons * 2 if GATED else neurons
    b_db1 = tl.zeros([COLUMNS], tl.float32)
    b_dc = tl.zeros([COLUMNS], tl.float32)
    b_sum = tl.zeros([COLUMNS], tl.float32)
    o_r = tl.arange(0, ROWS)
    for i_row in range(first, last, ROWS):
        o_x = o_r[:, None] * neurons + o_n[None, :]
        m_x = (i_row + o_r < last)[:, None] & m_n[None, :]
        # [ROWS, COLUMNS]
        b_g = tl.load(p_gradient + i_row * neurons + o_x, mask=m_x, other=0.0).to(tl.float32)
        # Offsets within a block have 32 bits; only the address of its first element has 64.
        o_pre = o_r[:, None] * width + o_n[None, :]
        p_block = p_pre + i_row * width
        b_act, b_slope = activate(tl.load(p_block + o_pre, mask=m_x, other=0.0).to(tl.float32), ACTIVATION)
        if p_seed is not None:
            m_keep = dropout_keeps(dropout_rows(p_seed, i_row, o_r, 0, 1)[:, None], o_n[None, :], threshold)
            b_g = tl.where(m_keep, b_g * keep_scale, 0.0)
        if GATED:
            b_gate = tl.load(p_block + neurons + o_pre, mask=m_x, other=0.0).to(tl.float32)
            b_du = tl.where(b_scale == 0.0, 0.0, b_g * b_act * b_scale)
            p_block = p_target + i_row * width
            tl.store(p_block + neurons + o_pre, b_du.to(p_target.dtype.element_ty), mask=m_x)
            b_dc += tl.sum(b_du, 0)
            b_act *= b_gate
            b_slope *= b_gate
        b_da = tl.where(b_scale == 0.0, 0.0, b_g * b_slope * b_scale)
        if GATED:
            tl.store(p_block + o_pre, b_da.to(p_target.dtype.element_ty), mask=m_x)
        else:
            tl.store(p_gradient + i_row * neurons + o_x, b_da.to(p_gradient.dtype.element_ty), mask=m_x)
        b_db1 += tl.sum(b_da, 0)
        if p_by_neuron is not None:
            m_own = (i_row + o_r >= start) & (i_row + o_r < end)
            b_term = tl.where(m_own[:, None] & (b_scale != 0.0), b_g * b_act * ffn_mask, 0.0)
            b_sum += tl.sum(tl.abs(b_term) if ABSOLUTE else b_term, 0)
    if p_db1 is not None:
        tl.store(p_db1 + i_part.to(tl.int64) * width + o_n, b_db1, mask=m_n)
        if GATED:
            tl.store(p_db1 + i_part.to(tl.int64) * width + neurons + o_n, b_dc, mask=m_n)
    if p_by_neuron is not None:
        tl.store(p_by_neuron + i_part.to(tl.int64) * neurons + o_n, b_sum, mask=m_n)


@triton.jit
def sum_parts(p_parts, p_sum, parts, width, scale, i_block, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Computes scale * the sum over parts of [parts, width] on a block of columns, always in the same order."""
    o_r = tl.arange(0, ROWS).to(tl.int64)
    o_c = i_block * COLUMNS + tl.arange(0, COLUMNS)
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_part in range(0, parts, ROWS):
        p_block = p_parts + (i_part + o_r)[:, None] * width + o_c[None, :]
        b_sum += tl.load(p_block, mask=(i_part + o_r < parts)[:, None] & (o_c < width)[None, :], other=0.0)
    b_total = tl.where(scale == 0.0, 0.0, tl.sum(b_sum, 0) * scale)
    tl.store(p_sum + o_c, b_total.to(p_sum.dtype.element_ty), mask=o_c < width)


@triton.jit(
    do_not_specialize=["parts", "output_parts", "more_parts", "batch"], do_not_specialize_on_alignment=UNALIGNED
)
def finish_kernel(
    p_parts1,
    p_db1,
    p_parts2,
    p_db2,
    p_parts3,
    p_more,
    p_terms,
    p_signed,
    p_absolute,
    p_starts,
    p_lengths,
    p_ffn_mask,
    parts,
    output_parts,
    more_parts,
    batch,
    neurons,
    channels,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Second stage of all sums: adds up the parts of the biases' gradients, and <dOut, Y> over each sequence's
    tokens."""
    pid = tl.program_id(0)
    ffn_mask = tl.full([], 1.0, tl.float32)
    if p_ffn_mask is not None:
        ffn_mask = tl.load(p_ffn_mask)
    if pid < batch:
        if p_terms is not None:
            start = tl.load(p_starts + pid).to(tl.int64)
            length = tl.load(p_lengths + pid)
            o_r = tl.arange(0, ROWS * COLUMNS)
            b_signed = tl.zeros([ROWS * COLUMNS], tl.float32)
            b_absolute = tl.zeros([ROWS * COLUMNS], tl.float32)
            for i_row in range(0, length, ROWS * COLUMNS):
                b_term = tl.load(p_terms + start + i_row + o_r, mask=i_row + o_r < length, other=0.0)
                b_signed += b_term
                b_absolute += tl.abs(b_term)
            # With a mask of 0, out is 0, so the sums are 0 with any finite factor.
            inverse = 1.0 / tl.where(ffn_mask == 0.0, 1.0, ffn_mask)
            tl.store(p_signed + pid, tl.sum(b_signed, 0) * inverse)
            tl.store(p_absolute + pid, tl.sum(b_absolute, 0) * tl.abs(inverse))
        return
    i_block = pid - batch
    if p_db1 is not None:
        blocks = tl.cdiv(neurons, COLUMNS)
        if i_block < blocks:
            sum_parts(p_parts1, p_db1, parts, neurons, 1.0, i_block, ROWS, COLUMNS)
            return
        i_block -= blocks
    if p_db2 is not None:
        blocks = tl.cdiv(channels, COLUMNS)
        if i_block < blocks:
            sum_parts(p_parts2, p_db2, output_parts, channels, ffn_mask, i_block, ROWS, COLUMNS)
            return
        i_block -= blocks
    if p_more is not None:
        sum_parts(p_parts3, p_more, more_parts, channels, 1.0, i_block, ROWS, COLUMNS)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    seed: Tensor | Part | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ticketops.ops.ffn; two matrix products and one launch.

    Returns:
        out [T, C]; the first layer's output [T, N] ([T, 2N] if gated); and the second layer's input, the activations
        multiplied by both masks [T, N].
    """
    gated = w1.shape[0] != w2.shape[1]
    pre = linear(x, w1, b1)
    tokens, neurons = pre.shape[0], pre.shape[1] // (1 + gated)
    hidden = torch.empty((tokens, neurons), dtype=pre.dtype, device=pre.device)
    tile = triton_configs.GATED_FFN if gated else triton_configs.FFN
    launch(
        forward_kernel,
        cdiv(tokens, tile.rows) * cdiv(neurons, tile.columns),
        tile,
        p_pre=pre,
        p_hidden=hidden,
        p_ffn_mask=ffn_mask,
        p_neuron_mask=None if neuron_mask is None else neuron_mask.contiguous(),
        p_seed=seed if dropout_p else None,
        tokens=tokens,
        neurons=neurons,
        threshold=keep_threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p),
        ACTIVATION=activation,
        GATED=gated,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    bias = b2 if b2 is None or ffn_mask is None else (b2 * ffn_mask).to(b2.dtype)
    return linear(hidden, w2, bias), pre, hidden


def backward(
    dout: Tensor,
    out: Tensor | None,
    pre: Tensor | None,
    hidden: Tensor | None,
    x: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    starts: Tensor,
    lengths: Tensor,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    wanted: Sequence[bool],
    token_sums: bool,
    neuron_sums: bool,
    neuron_absolute: bool,
    seed: Tensor | Part | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ticketops.ops.ffn.reference.backward; four matrix products (for the gradient of the activations, dx, dw1 and
    dw2) and two launches, or one if no sum is wanted."""
    through = neuron_sums or any(wanted[:3])
    dx, dw1, dw2 = (dout.new_empty(0), *(w1.new_empty(0) for _ in range(2)))
    if not through:
        # No gradient of the activations is wanted, but the kernel still computes the sums over tokens.
        gradient = pre = dout.new_empty((dout.shape[0], 0))
    else:
        gradient = torch.mm(dout, w2)
    assert pre is not None
    sums = Wanted(wanted[2], wanted[4], token_sums, neuron_sums, neuron_absolute)
    if not through:
        neuron_mask = None
    dpre, parts, by_neuron = activation_backward(
        *(gradient, dout, out, pre, starts, lengths, ffn_mask, neuron_mask, activation, sums),
        seed=seed,
        dropout_p=dropout_p,
    )
    (*vectors, _), *sums_by_sequence = finish(parts, starts, lengths, ffn_mask, w1.dtype)
    db1, db2 = (w1.new_empty(0) if vector is None else vector for vector in vectors)
    signed, absolute, by_neuron = (
        dout.new_empty(0, dtype=torch.float32) if x is None else x for x in (*sums_by_sequence, by_neuron)
    )
    if wanted[0]:
        dx = torch.mm(dpre, w1)
    if wanted[1]:
        assert x is not None
        dw1 = torch.mm(transposed(dpre), x)
    if wanted[3]:
        assert hidden is not None
        dw2 = torch.mm(transposed(dout), hidden)
    return dx, dw1, db1, dw2, db2, signed, absolute, by_neuron


def activation_backward(
    gradient: Tensor,
    dout: Tensor,
    out: Tensor | None,
    pre: Tensor,
    starts: Tensor,
    lengths: Tensor,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    wanted: Wanted,
    seed: Tensor | Part | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Parts, Tensor | None]:
    """Computes the part of the backward pass between its matrix products; one launch.

    Args:
        gradient: [T, N], gradient of the second layer's input; overwritten.
        dout: [T, C].
        out: [T, C]; may be None if the sums over tokens are not wanted.
        pre: [T, N]; [T, 2N] if gated.
        starts, lengths, ffn_mask, neuron_mask, activation: as in `backward`.
        wanted: sums to compute.
        seed, dropout_p: as in `backward`.

    Returns:
        The gradient of `pre`; partial sums for `finish`; and the sums of G * H [B, N], None if not wanted.
    """
    (tokens, channels), (_, neurons), batch = dout.shape, gradient.shape, lengths.shape[0]
    first, gated = pre.shape[1], pre.shape[1] != neurons

    def sums(there: bool, *shape: int) -> Tensor | None:
        return torch.empty(shape, dtype=torch.float32, device=dout.device) if there else None

    tile = triton_configs.GATED_FFN if gated else triton_configs.FFN
    row_blocks = cdiv(tokens, tile.rows)
    column_blocks = cdiv(neurons, tile.columns)
    by_neuron = sums(wanted.neurons, batch, neurons)
    by_sequence = wanted.neurons and batch > 0
    parts = batch if by_sequence else row_blocks
    output_parts = row_blocks if wanted.db2 or wanted.tokens else 0
    found = Parts(sums(wanted.db1, parts, first), sums(wanted.db2, output_parts, channels), sums(wanted.tokens, tokens))
    dpre = torch.empty_like(pre) if gated else gradient
    launch(
        backward_kernel,
        parts * column_blocks + output_parts,
        tile,
        p_gradient=gradient,
        p_target=dpre if gated else None,
        p_pre=pre,
        p_db1=found.db1,
        p_by_neuron=by_neuron if by_sequence else None,
        p_dout=dout,
        p_out=out if wanted.tokens else None,
        p_db2=found.db2,
        p_terms=found.terms,
        p_starts=starts.contiguous(),
        p_lengths=lengths.contiguous(),
        p_ffn_mask=ffn_mask,
        p_neuron_mask=None if neuron_mask is None else neuron_mask.contiguous(),
        p_seed=seed if dropout_p else None,
        stride_dt=dout.stride(0),
        stride_dc=dout.stride(1),
        tokens=tokens,
        batch=batch,
        neurons=neurons,
        channels=channels,
        output_parts=output_parts,
        threshold=keep_threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p),
        ACTIVATION=activation,
        GATED=gated,
        ABSOLUTE=wanted.absolute,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return dpre, found, by_neuron


def finish(
    parts: Parts,
    starts: Tensor,
    lengths: Tensor,
    ffn_mask: Tensor | None,
    dtype: torch.dtype,
    more: Tensor | None = None,
    into: Sequence[Any] | None = None,
) -> tuple[Sequence[Any], Tensor | None, Tensor | None]:
    """Adds up the partial sums of `activation_backward`; one launch, or none if there are no sums.

    Args:
        parts: partial sums from `activation_backward`.
        starts, lengths, ffn_mask: as in `backward`.
        dtype: dtype of db1 and db2.
        more: further partial sums to add up in the same launch, float32 [parts, C] with as many columns as `parts.db2`;
            or None.
        into: db1, db2 and the sum of `more` to write to, None for each without parts; None allocates them.

    Returns:
        (db1 [N], db2 [C], the sum of `more` in float32), each None if it has no parts; and the sums of <dOut, Y> and of
        |<dOut, Y>| over each sequence's tokens, both [B], None if `parts.terms` is.
    """
    sources = (parts.db1, parts.db2, more)
    if into is None:
        into = [
            None if x is None else torch.empty(x.shape[1], dtype=kind, device=x.device)
            for x, kind in zip(sources, (dtype, dtype, torch.float32), strict=True)
        ]
    db1, db2, total = into
    batch = lengths.shape[0]
    signed, absolute = (
        None if parts.terms is None else torch.empty(batch, dtype=torch.float32, device=lengths.device) for _ in "ab"
    )
    if any(x is not None for x in (*sources, parts.terms)):
        tile = triton_configs.FFN
        counts, widths = zip(*((0, 0) if x is None else x.shape for x in sources), strict=True)
        launch(
            finish_kernel,
            batch + sum(cdiv(width, tile.columns) for width in widths),
            tile,
            p_parts1=parts.db1,
            p_db1=db1,
            p_parts2=parts.db2,
            p_db2=db2,
            p_parts3=more,
            p_more=total,
            p_terms=parts.terms,
            p_signed=signed,
            p_absolute=absolute,
            p_starts=starts.contiguous(),
            p_lengths=lengths.contiguous(),
            p_ffn_mask=ffn_mask,
            parts=counts[0],
            output_parts=counts[1],
            more_parts=counts[2],
            batch=batch,
            neurons=widths[0],
            channels=max(widths[1:]),
            ROWS=tile.rows,
            COLUMNS=tile.columns,
        )
    return into, signed, absolute
