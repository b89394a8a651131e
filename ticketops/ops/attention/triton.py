"""Masked attention as Triton kernels: one program per sequence, head and block of query (or key) rows.

If the longest sequence fits one block, there is one program per sequence and head, and the backward pass is a single
kernel that holds the whole score matrix and so needs no separate pass for delta. Longer sequences are tiled, with one
kernel for dQ and one for dK and dV. No kernel uses atomics, so results are deterministic. With a window, the tiled
kernels skip tiles that are entirely outside it; without one, that code is compiled away. With position tables, all
sequences are tiled, in square blocks, and a third kernel computes the tables' gradients.

The head mask is on the device, and reading it on the host would wait for the GPU. So the grid has programs for all
heads; those of a head whose mask is 0 write zeros and return before they load anything else. Each grid has one extra
"head", whose programs write zeros to the rows outside all sequences.

float32 inputs are multiplied in float32, unless torch.backends.cuda.matmul.fp32_precision is "tf32". So a fine-tuning
run in float32 differs from the reference by rounding only, and one setting controls these kernels and torch's own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ticketops.errors import UnsupportedError
from ticketops.ops import triton_configs
from ticketops.ops.attention.reference import Gradients, Positions
from ticketops.ops.dropout import keep_threshold
from ticketops.ops.triton_common import (
    UNALIGNED,
    Part,
    capability,
    cdiv,
    clear,
    dropout_keeps,
    dropout_rows,
    launch,
    owned_gaps,
    product_precision,
    refusal,
    thirds,
    zero_gaps,
)
from ticketops.ops.triton_configs import Tile

__all__ = ["backward", "forward", "refusal"]

MAX_HEAD_DIM = 128
MAX_BLOCK = 128


@triton.jit
def load_rows(p_x, i_row, o_rows, m_rows, i_head, stride_t, stride_h, stride_d, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Loads rows i_row + o_rows of one head of a [T, H, D] tensor as a block [rows, BLOCK_D], 0 where masked. Only the
    first row's offset has 64 bits, see `_operand`."""
    o_d = tl.arange(0, BLOCK_D)
    p_first = p_x + i_row * stride_t + i_head.to(tl.int64) * stride_h
    o_x = o_rows[:, None] * stride_t + o_d[None, :] * stride_d
    return tl.load(p_first + o_x, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def load_bias(p_bias, i_head, o_distance, reach):
    """Loads the bias of one head at a block of distances from a query to a key; some number of it for distances beyond
    its reach, which rows past the end have."""
    p_middle = p_bias + i_head * (2 * reach + 1) + reach
    # Without masks, whose predicates would spill.
    return tl.load(p_middle + tl.minimum(tl.maximum(o_distance, -reach), reach))


@triton.jit
def sums_by_distance(b_x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums a block [ROWS, COLUMNS], with ROWS <= COLUMNS, over the elements of each distance column - row. Returns the
    sums of the distances 0 .. COLUMNS - 1 and of those -COLUMNS .. -1."""
    o_x = tl.arange(0, ROWS)[:, None] + tl.arange(0, COLUMNS)[None, :]
    # Each row turned by its number: column d has the elements of the distances d and d - COLUMNS.
    b_turned = tl.gather(b_x, o_x % COLUMNS, 1)
    m_x = o_x < COLUMNS
    return tl.sum(tl.where(m_x, b_turned, 0.0), 0), tl.sum(tl.where(m_x, 0.0, b_turned), 0)


@triton.jit
def store_bias(p_row, b_x, o_distance, reach):
    """Stores sums at their distances in a row of the bias's gradient."""
    tl.store(p_row + reach + o_distance, b_x, mask=tl.abs(o_distance) <= reach)


@triton.jit
def load_vectors(
    p_table,
    i_head,
    i_first,
    SIGN: tl.constexpr,
    reach,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Loads one head's vectors of the distances i_first .. i_first + BLOCK - 1, each times SIGN, from a contiguous
    table [2 reach + 1, H, D] as a block [BLOCK, BLOCK_D]; 0 for distances beyond its reach."""
    o_u = i_first + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    o_x = ((reach + SIGN * o_u) * heads + i_head)[:, None] * D + o_d[None, :]
    return tl.load(p_table + o_x, mask=(tl.abs(o_u) <= reach)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def store_vectors(
    p_table,
    b_x,
    i_head,
    i_first,
    SIGN: tl.constexpr,
    reach,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Stores a block where `load_vectors` loads it."""
    o_u = i_first + tl.arange(0, BLOCK)
    o_d = tl.arange(0, BLOCK_D)
    o_x = ((reach + SIGN * o_u) * heads + i_head)[:, None] * D + o_d[None, :]
    tl.store(p_table + o_x, b_x, mask=(tl.abs(o_u) <= reach)[:, None] & (o_d < D)[None, :])


# Row a of a square tile of scores is multiplied by the vectors of BLOCK consecutive distances b - a, which begin one
# further back in each row. All rows together need those of the first row and the BLOCK - 1 before them. Element (a, c)
# of a turned tile belongs to distance c of the first row, or where a + c >= BLOCK to the distance BLOCK before it.
# Along axis 0, columns take the place of rows.


@triton.jit
def is_upper(BLOCK: tl.constexpr):
    """True where an element of a turned tile belongs to a distance of the first row."""
    return tl.arange(0, BLOCK)[:, None] + tl.arange(0, BLOCK)[None, :] < BLOCK


@triton.jit
def turned(b_s, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Turns a tile of scores."""
    o_x = tl.arange(0, BLOCK)
    return tl.gather(b_s, (o_x[:, None] + o_x[None, :]) % BLOCK, AXIS)


@triton.jit
def turned_back(b_x, AXIS: tl.constexpr, BLOCK: tl.constexpr):
    """Turns a tile back into scores."""
    o_x = tl.arange(0, BLOCK)
    o_back = o_x[None, :] - o_x[:, None] if AXIS == 1 else o_x[:, None] - o_x[None, :]
    return tl.gather(b_x, (o_back + BLOCK) % BLOCK, AXIS)


@triton.jit
def position_scores(
    b_a,
    b_b,
    p_a,
    p_b,
    i_a,
    i_b,
    i_h,
    SIGN: tl.constexpr,
    reach,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The terms <a, table a[b - a]> + <b, table b[b - a]> for rows a from position i_a on and columns b from i_b on,
    both [BLOCK, BLOCK_D]. The tables are ordered by SIGN * (b - a): 1 if rows are queries, -1 if they are keys."""
    m_up = is_upper(BLOCK)
    b_s = tl.zeros([BLOCK, BLOCK], tl.float32)
    if p_a is not None:
        b_up = load_vectors(p_a, i_h, i_b - i_a, SIGN, reach, heads, D, BLOCK_D, BLOCK)
        b_low = load_vectors(p_a, i_h, i_b - i_a - BLOCK, SIGN, reach, heads, D, BLOCK_D, BLOCK)
        b_ups = tl.dot(b_a, tl.trans(b_up), input_precision=PRECISION)
        b_lows = tl.dot(b_a, tl.trans(b_low), input_precision=PRECISION)
        b_s += turned_back(tl.where(m_up, b_ups, b_lows), 1, BLOCK)
    if p_b is not None:
        b_up = load_vectors(p_b, i_h, i_a - i_b, -SIGN, reach, heads, D, BLOCK_D, BLOCK)
        b_low = load_vectors(p_b, i_h, i_a - i_b - BLOCK, -SIGN, reach, heads, D, BLOCK_D, BLOCK)
        b_ups = tl.dot(b_up, tl.trans(b_b), input_precision=PRECISION)
        b_lows = tl.dot(b_low, tl.trans(b_b), input_precision=PRECISION)
        b_s += turned_back(tl.where(m_up, b_ups, b_lows), 0, BLOCK)
    return b_s


@triton.jit
def add_row_gradient(
    b_da,
    b_ds,
    p_a,
    i_a,
    i_b,
    i_h,
    SIGN: tl.constexpr,
    reach,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds to the gradient of rows a what `position_scores` and table a give, from the gradient of its tile."""
    b_t = turned(b_ds, 1, BLOCK)
    m_up = is_upper(BLOCK)
    b_up = load_vectors(p_a, i_h, i_b - i_a, SIGN, reach, heads, D, BLOCK_D, BLOCK)
    b_da = tl.dot(tl.where(m_up, b_t, 0.0).to(b_up.dtype), b_up, b_da, input_precision=PRECISION)
    b_low = load_vectors(p_a, i_h, i_b - i_a - BLOCK, SIGN, reach, heads, D, BLOCK_D, BLOCK)
    return tl.dot(tl.where(m_up, 0.0, b_t).to(b_low.dtype), b_low, b_da, input_precision=PRECISION)


@triton.jit
def without_holes(m_rows, p_real, i_row, o_rows):
    """Returns the mask of rows i_row + o_rows without those that are holes."""
    return m_rows & (tl.load(p_real + i_row + o_rows, mask=m_rows, other=0) != 0)


@triton.jit
def span(i_first, ROWS: tl.constexpr, window, length, BLOCK: tl.constexpr):
    """Returns the first and last (exclusive) position, in steps of BLOCK, of a loop over the tokens within the window
    of rows i_first .. i_first + ROWS - 1."""
    return tl.maximum(i_first - window, 0) // BLOCK * BLOCK, tl.minimum(i_first + ROWS + window, length)


@triton.jit
def store_rows(p_x, b_x, i_row, o_rows, m_rows, i_head, stride_t, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Stores a block [rows, BLOCK_D] in rows i_row + o_rows of one head of a [T, H, D] tensor with contiguous rows."""
    o_d = tl.arange(0, BLOCK_D)
    p_first = p_x + i_row * stride_t + i_head * D
    o_x = o_rows[:, None] * stride_t + o_d[None, :]
    tl.store(p_first + o_x, b_x.to(p_x.dtype.element_ty), mask=m_rows[:, None] & (o_d < D)[None, :])


@triton.jit(
    do_not_specialize=["tokens", "batch", "heads", "blocks", "scale", "threshold", "keep_scale", "window", "reach"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def forward_kernel(
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_starts,
    p_lengths,
    p_real,
    p_mask,
    p_seed,
    p_bias,
    p_pk,
    p_pq,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    tokens,
    batch,
    heads,
    blocks,
    scale,
    threshold,
    keep_scale,
    window,
    reach,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out and log-sum-exp of one block of queries: online softmax over blocks of keys, in base 2. A short sequence
    takes one iteration. Masked loads of which keys are holes would spill with a window, other loads with vectors."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    i_h = tl.program_id(0) % (heads + 1)
    i_m = tl.program_id(0) // (heads + 1) % blocks
    i_b = tl.program_id(0) // (heads + 1) // blocks
    if i_h == heads:
        first, second, third, last = owned_gaps(p_starts, p_lengths, batch, tokens, i_b)
        zero_gaps(p_out, first, second, third, last, heads * D, heads * D, i_m, blocks)
        zero_gaps(p_lse, first, second, third, last, heads, heads, i_m, blocks)
        return
    length = tl.load(p_lengths + i_b)
    if i_m * BLOCK_M >= length:
        return
    start = tl.load(p_starts + i_b).to(tl.int64)
    i_row = start + i_m * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + o_m < length
    head_mask = 1.0
    if p_mask is not None:
        head_mask = tl.load(p_mask + i_h)
        if head_mask == 0.0:
            store_rows(p_out, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), i_row, o_m, m_m, i_h, heads * D, D, BLOCK_D)
            tl.store(p_lse + (i_row * heads + i_h) + o_m * heads, tl.zeros([BLOCK_M], tl.float32), mask=m_m)
            return
    # [BLOCK_M, BLOCK_D]
    b_q = load_rows(p_q, i_row, o_m, m_m, i_h, stride_qt, stride_qh, stride_qd, D, BLOCK_D)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    if p_seed is not None:
        b_word = dropout_rows(p_seed, i_row, o_m, i_h, heads)
    o_n = tl.arange(0, BLOCK_N)
    begin = 0
    end = length
    if window is not None:
        begin, end = span(i_m * BLOCK_M, BLOCK_M, window, length, BLOCK_N)
    for i_n in range(begin, end, BLOCK_N):
        m_n = i_n + o_n < length
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_k, start + i_n, o_n, m_n, i_h, stride_kt, stride_kh, stride_kd, D, BLOCK_D)
        b_v = load_rows(p_v, start + i_n, o_n, m_n, i_h, stride_vt, stride_vh, stride_vd, D, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if p_pk is not None or p_pq is not None:
            i_first = i_m * BLOCK_M
            b_s += position_scores(
                b_q, b_k, p_pk, p_pq, i_first, i_n, i_h, 1, reach, heads, D, BLOCK_D, BLOCK_M, PRECISION
            )
        b_s *= scale * LOG2_E
        if p_bias is not None:
            b_s += LOG2_E * load_bias(p_bias, i_h, (i_n + o_n)[None, :] - (i_m * BLOCK_M + o_m)[:, None], reach)
        if p_real is not None and p_pk is None and p_pq is None:
            m_n = m_n & (tl.load(p_real + start + tl.minimum(i_n + o_n, length - 1)) != 0)
        elif p_real is not None:
            m_n = without_holes(m_n, p_real, start + i_n, o_n)
        if window is None and p_real is None:
            b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        else:
            m_s = m_n[None, :]
            if window is not None:
                m_s = m_s & (tl.abs(i_m * BLOCK_M + o_m[:, None] - (i_n + o_n)[None, :]) <= window)
            # Not -inf, hence NaN: a row's sums of a tile without its keys are multiplied by exp2(-1e30 - maximum) = 0.
            b_s = tl.where(m_s, b_s, -1e30)
        b_new_max = tl.maximum(b_max, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - b_new_max[:, None])
        b_decay = tl.exp2(b_max - b_new_max)
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        b_max = b_new_max
        if p_seed is not None:
            b_p = tl.where(dropout_keeps(b_word[:, None], i_n + o_n[None, :], threshold), b_p, 0.0)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_decay[:, None], input_precision=PRECISION)
    b_factor = head_mask * keep_scale / b_sum
    b_lse = (b_max + tl.log2(b_sum)) / LOG2_E
    if p_real is not None:
        # An infinite log-sum-exp makes all weights of a hole 0 in the backward pass.
        m_real = without_holes(m_m, p_real, i_row, o_m)
        b_factor = tl.where(m_real, b_factor, 0.0)
        b_lse = tl.where(m_real, b_lse, float("inf"))
    store_rows(p_out, b_acc * b_factor[:, None], i_row, o_m, m_m, i_h, heads * D, D, BLOCK_D)
    tl.store(p_lse + (i_row * heads + i_h) + o_m * heads, b_lse, mask=m_m)


# The backward kernels. With m the head's mask, S = scale Q K^T, P = softmax(S), R = keep / (1 - p), W = P * R and
# O = W V before the mask, so that out = m O:
#
#     g = dOut V^T * R,     delta = rowsum(P * g) = rowsum(dOut * O),     h = P * (g - delta),
#     dV = m W^T dOut,      dQ = m scale h K,      dK = m scale h^T Q,    dL/dm = sum(delta).
#
# A bias is added to S; its gradient is m times the sum of h over all pairs of one distance. Each program stores its
# sums in a row of its own, and torch adds up the rows.
#
# m is applied after all products, so delta is the importance of the head before its mask, for any m.


@triton.jit(
    do_not_specialize=["tokens", "batch", "heads", "scale", "threshold", "keep_scale", "window", "reach"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def row_backward_kernel(
    p_dout,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_dq,
    p_dk,
    p_dv,
    p_signed,
    p_absolute,
    p_starts,
    p_lengths,
    p_real,
    p_mask,
    p_seed,
    p_bias,
    p_dbias,
    stride_dt,
    stride_dh,
    stride_dd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_gt,
    tokens,
    batch,
    heads,
    scale,
    threshold,
    keep_scale,
    window,
    reach,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of one head of one sequence of at most BLOCK tokens. delta is computed from P and g, not from the
    stored output.

    All loads precede the first product, so that the program waits for memory once. Scores are laid out as [queries,
    keys], so the row sum delta stays within a warp. The layout [keys, queries] would save W a trip through shared
    memory, but cost some 20 barriers for that sum."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    i_h = tl.program_id(0) % (heads + 1)
    i_b = tl.program_id(0) // (heads + 1)
    if i_h == heads:
        first, second, third, last = owned_gaps(p_starts, p_lengths, batch, tokens, i_b)
        zero_gaps(p_dq, first, second, third, last, heads * D, stride_gt, 0, 1)
        zero_gaps(p_dk, first, second, third, last, heads * D, stride_gt, 0, 1)
        zero_gaps(p_dv, first, second, third, last, heads * D, stride_gt, 0, 1)
        return
    length = tl.load(p_lengths + i_b)
    start = tl.load(p_starts + i_b).to(tl.int64)
    o_n = tl.arange(0, BLOCK)
    m_n = o_n < length
    head_mask = 1.0
    if p_mask is not None:
        head_mask = tl.load(p_mask + i_h)
        if head_mask == 0.0:
            b_zero = tl.zeros([BLOCK, BLOCK_D], tl.float32)
            store_rows(p_dq, b_zero, start, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
            store_rows(p_dk, b_zero, start, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
            store_rows(p_dv, b_zero, start, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
            tl.store(p_signed + i_b * heads + i_h, 0.0)
            tl.store(p_absolute + i_b * heads + i_h, 0.0)
            return

    # [BLOCK, BLOCK_D]
    b_q = load_rows(p_q, start, o_n, m_n, i_h, stride_qt, stride_qh, stride_qd, D, BLOCK_D)
    b_k = load_rows(p_k, start, o_n, m_n, i_h, stride_kt, stride_kh, stride_kd, D, BLOCK_D)
    b_do = load_rows(p_dout, start, o_n, m_n, i_h, stride_dt, stride_dh, stride_dd, D, BLOCK_D)
    b_v = load_rows(p_v, start, o_n, m_n, i_h, stride_vt, stride_vh, stride_vd, D, BLOCK_D)
    b_lse = tl.load(p_lse + (start * heads + i_h) + o_n * heads, mask=m_n, other=float("inf"))
    # [queries, keys]
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2_E)
    if p_bias is not None:
        b_s += LOG2_E * load_bias(p_bias, i_h, o_n[None, :] - o_n[:, None], reach)
    m_p = m_n[None, :]
    if p_real is not None:
        m_p = without_holes(m_n, p_real, start, o_n)[None, :]
    if window is not None:
        m_p = m_p & (tl.abs(o_n[:, None] - o_n[None, :]) <= window)
    b_p = tl.where(m_p, tl.exp2(b_s - (b_lse * LOG2_E)[:, None]), 0.0)
    b_g = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
    b_w = b_p
    if p_seed is not None:
        m_keep = dropout_keeps(dropout_rows(p_seed, start, o_n, i_h, heads)[:, None], o_n[None, :], threshold)
        b_w = tl.where(m_keep, b_p * keep_scale, 0.0)
        b_g = tl.where(m_keep, b_g * keep_scale, 0.0)
    # [queries, 1]: Triton 3.6 fails on sm_100 to find a layout for the second sum if this is a vector.
    b_delta = tl.sum(b_p * b_g, 1)[:, None]
    o_sum = i_b * heads + i_h + tl.arange(0, 1)
    tl.store(p_signed + o_sum, tl.sum(b_delta, 0))
    tl.store(p_absolute + o_sum, tl.sum(tl.abs(b_delta), 0))
    b_dv = tl.dot(tl.trans(b_w.to(b_do.dtype)), b_do, input_precision=PRECISION)
    store_rows(p_dv, b_dv * head_mask, start, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
    b_ds = b_p * (b_g - b_delta)
    if p_bias is not None:
        p_row = p_dbias + (i_b.to(tl.int64) * heads + i_h) * (2 * reach + 1)
        b_behind, b_before = sums_by_distance(b_ds, BLOCK, BLOCK)
        store_bias(p_row, b_behind * head_mask, o_n, reach)
        store_bias(p_row, b_before * head_mask, o_n - BLOCK, reach)
    b_h = b_ds.to(b_q.dtype)
    b_dq = tl.dot(b_h, b_k, input_precision=PRECISION)
    store_rows(p_dq, b_dq * (head_mask * scale), start, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
    b_dk = tl.dot(tl.trans(b_h), b_q, input_precision=PRECISION)
    store_rows(p_dk, b_dk * (head_mask * scale), start, o_n, m_n, i_h, stride_gt, D, BLOCK_D)


@triton.jit(
    do_not_specialize=["tokens", "batch", "heads", "blocks", "scale", "threshold", "keep_scale", "window", "reach"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def dq_kernel(
    p_dout,
    p_q,
    p_k,
    p_v,
    p_out,
    p_lse,
    p_delta,
    p_dq,
    p_starts,
    p_lengths,
    p_real,
    p_mask,
    p_seed,
    p_bias,
    p_pk,
    p_pq,
    p_dbias,
    stride_dt,
    stride_dh,
    stride_dd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_gt,
    tokens,
    batch,
    heads,
    blocks,
    scale,
    threshold,
    keep_scale,
    window,
    reach,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ of one block of queries; also stores delta, which `dkdv_kernel` reads, and with a bias the sums of h by
    distance in a row of the program's own."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    i_h = tl.program_id(0) % (heads + 1)
    i_m = tl.program_id(0) // (heads + 1) % blocks
    i_b = tl.program_id(0) // (heads + 1) // blocks
    if i_h == heads:
        first, second, third, last = owned_gaps(p_starts, p_lengths, batch, tokens, i_b)
        zero_gaps(p_dq, first, second, third, last, heads * D, stride_gt, i_m, blocks)
        return
    length = tl.load(p_lengths + i_b)
    if i_m * BLOCK_M >= length:
        return
    start = tl.load(p_starts + i_b).to(tl.int64)
    i_row = start + i_m * BLOCK_M
    o_m = tl.arange(0, BLOCK_M)
    m_m = i_m * BLOCK_M + o_m < length
    head_mask = 1.0
    if p_mask is not None:
        head_mask = tl.load(p_mask + i_h)
        if head_mask == 0.0:
            store_rows(p_dq, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), i_row, o_m, m_m, i_h, stride_gt, D, BLOCK_D)
            return

    # [BLOCK_M, BLOCK_D]
    b_do = load_rows(p_dout, i_row, o_m, m_m, i_h, stride_dt, stride_dh, stride_dd, D, BLOCK_D)
    b_out = load_rows(p_out, i_row, o_m, m_m, i_h, heads * D, D, 1, D, BLOCK_D)
    b_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1) / head_mask
    tl.store(p_delta + (i_row * heads + i_h) + o_m * heads, b_delta, mask=m_m)
    b_q = load_rows(p_q, i_row, o_m, m_m, i_h, stride_qt, stride_qh, stride_qd, D, BLOCK_D)
    b_lse = tl.load(p_lse + (i_row * heads + i_h) + o_m * heads, mask=m_m, other=float("inf")) * LOG2_E
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if p_seed is not None:
        b_word = dropout_rows(p_seed, i_row, o_m, i_h, heads)
    o_n = tl.arange(0, BLOCK_N)
    begin = 0
    end = length
    if p_bias is not None:
        p_row = p_dbias + ((i_b.to(tl.int64) * blocks + i_m) * heads + i_h) * (2 * reach + 1)
        # Sums of the distances that the next block of keys also has.
        b_dbias = tl.zeros([BLOCK_N], tl.float32)
    if window is not None:
        begin, end = span(i_m * BLOCK_M, BLOCK_M, window, length, BLOCK_N)
    for i_n in range(begin, end, BLOCK_N):
        m_n = i_n + o_n < length
        # [BLOCK_N, BLOCK_D]
        b_k = load_rows(p_k, start + i_n, o_n, m_n, i_h, stride_kt, stride_kh, stride_kd, D, BLOCK_D)
        b_v = load_rows(p_v, start + i_n, o_n, m_n, i_h, stride_vt, stride_vh, stride_vd, D, BLOCK_D)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if p_pk is not None or p_pq is not None:
            i_first = i_m * BLOCK_M
            b_s += position_scores(
                b_q, b_k, p_pk, p_pq, i_first, i_n, i_h, 1, reach, heads, D, BLOCK_D, BLOCK_M, PRECISION
            )
        b_s *= scale * LOG2_E
        if p_bias is not None:
            b_s += LOG2_E * load_bias(p_bias, i_h, (i_n + o_n)[None, :] - (i_m * BLOCK_M + o_m)[:, None], reach)
        b_p = tl.exp2(b_s - b_lse[:, None])
        b_g = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if p_seed is not None:
            b_g = tl.where(dropout_keeps(b_word[:, None], i_n + o_n[None, :], threshold), b_g * keep_scale, 0.0)
        if p_real is not None:
            m_n = without_holes(m_n, p_real, start + i_n, o_n)
        m_p = m_n[None, :]
        if window is not None:
            m_p = m_p & (tl.abs(i_m * BLOCK_M + o_m[:, None] - (i_n + o_n)[None, :]) <= window)
        b_ds = tl.where(m_p, b_p * (b_g - b_delta[:, None]), 0.0)
        if p_bias is not None:
            b_behind, b_before = sums_by_distance(b_ds, BLOCK_M, BLOCK_N)
            store_bias(p_row, (b_dbias + b_before) * head_mask, i_n - BLOCK_N - i_m * BLOCK_M + o_n, reach)
            b_dbias = b_behind
        if p_pk is not None:
            i_first = i_m * BLOCK_M
            b_dq = add_row_gradient(
                b_dq, b_ds, p_pk, i_first, i_n, i_h, 1, reach, heads, D, BLOCK_D, BLOCK_M, PRECISION
            )
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    store_rows(p_dq, b_dq * (head_mask * scale), i_row, o_m, m_m, i_h, stride_gt, D, BLOCK_D)
    if p_bias is not None:
        i_last = begin + tl.cdiv(end - begin, BLOCK_N) * BLOCK_N - BLOCK_N
        store_bias(p_row, b_dbias * head_mask, i_last - i_m * BLOCK_M + o_n, reach)


@triton.jit(
    do_not_specialize=["tokens", "batch", "heads", "blocks", "scale", "threshold", "keep_scale", "window", "reach"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def dkdv_kernel(
    p_dout,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_dk,
    p_dv,
    p_signed,
    p_absolute,
    p_starts,
    p_lengths,
    p_real,
    p_mask,
    p_seed,
    p_bias,
    p_pk,
    p_pq,
    stride_dt,
    stride_dh,
    stride_dd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    stride_gt,
    tokens,
    batch,
    heads,
    blocks,
    scale,
    threshold,
    keep_scale,
    window,
    reach,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dK and dV of one block of keys. Scores are computed transposed, [keys, queries], so that W^T and h^T are left
    operands and stay in registers. The loop reads delta of the whole sequence, so the program of the first block also
    writes the importance sums; with a window it first reads the rest of delta."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    i_h = tl.program_id(0) % (heads + 1)
    i_n = tl.program_id(0) // (heads + 1) % blocks
    i_b = tl.program_id(0) // (heads + 1) // blocks
    if i_h == heads:
        first, second, third, last = owned_gaps(p_starts, p_lengths, batch, tokens, i_b)
        zero_gaps(p_dk, first, second, third, last, heads * D, stride_gt, i_n, blocks)
        zero_gaps(p_dv, first, second, third, last, heads * D, stride_gt, i_n, blocks)
        return
    # The first block also runs for an empty sequence, whose sums are 0.
    length = tl.load(p_lengths + i_b)
    if (i_n > 0) & (i_n * BLOCK_N >= length):
        return
    start = tl.load(p_starts + i_b).to(tl.int64)
    i_key = start + i_n * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    m_n = i_n * BLOCK_N + o_n < length
    head_mask = 1.0
    if p_mask is not None:
        head_mask = tl.load(p_mask + i_h)
        if head_mask == 0.0:
            b_zero = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            store_rows(p_dk, b_zero, i_key, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
            store_rows(p_dv, b_zero, i_key, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
            if i_n == 0:
                tl.store(p_signed + i_b * heads + i_h, 0.0)
                tl.store(p_absolute + i_b * heads + i_h, 0.0)
            return

    if p_real is not None:
        m_real = without_holes(m_n, p_real, i_key, o_n)
    # [BLOCK_N, BLOCK_D]
    b_k = load_rows(p_k, i_key, o_n, m_n, i_h, stride_kt, stride_kh, stride_kd, D, BLOCK_D)
    b_v = load_rows(p_v, i_key, o_n, m_n, i_h, stride_vt, stride_vh, stride_vd, D, BLOCK_D)
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_signed = tl.zeros([BLOCK_M], tl.float32)
    b_absolute = tl.zeros([BLOCK_M], tl.float32)
    o_m = tl.arange(0, BLOCK_M)
    begin = 0
    end = length
    if window is not None:
        begin, end = span(i_n * BLOCK_N, BLOCK_N, window, length, BLOCK_M)
    for i_m in range(begin, end, BLOCK_M):
        i_row = start + i_m
        m_m = i_m + o_m < length
        # [BLOCK_M, BLOCK_D]
        b_q = load_rows(p_q, i_row, o_m, m_m, i_h, stride_qt, stride_qh, stride_qd, D, BLOCK_D)
        b_do = load_rows(p_dout, i_row, o_m, m_m, i_h, stride_dt, stride_dh, stride_dd, D, BLOCK_D)
        b_lse = tl.load(p_lse + (i_row * heads + i_h) + o_m * heads, mask=m_m, other=float("inf")) * LOG2_E
        b_delta = tl.load(p_delta + (i_row * heads + i_h) + o_m * heads, mask=m_m, other=0.0)
        b_signed += b_delta
        b_absolute += tl.abs(b_delta)
        # [BLOCK_N, BLOCK_M]; rows of keys past the end are garbage, which is not stored.
        b_st = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
        if p_pk is not None or p_pq is not None:
            i_first = i_n * BLOCK_N
            b_st += position_scores(
                b_k, b_q, p_pq, p_pk, i_first, i_m, i_h, -1, reach, heads, D, BLOCK_D, BLOCK_N, PRECISION
            )
        b_st *= scale * LOG2_E
        if p_bias is not None:
            b_st += LOG2_E * load_bias(p_bias, i_h, (i_n * BLOCK_N + o_n)[:, None] - (i_m + o_m)[None, :], reach)
        b_pt = tl.exp2(b_st - b_lse[None, :])
        if window is not None:
            m_pt = tl.abs((i_n * BLOCK_N + o_n)[:, None] - (i_m + o_m)[None, :]) <= window
            b_pt = tl.where(m_pt, b_pt, 0.0)
        if p_real is not None:
            b_pt = tl.where(m_real[:, None], b_pt, 0.0)
        b_gt = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
        b_wt = b_pt
        if p_seed is not None:
            b_word = dropout_rows(p_seed, i_row, o_m, i_h, heads)
            m_keep = dropout_keeps(b_word[None, :], i_n * BLOCK_N + o_n[:, None], threshold)
            b_wt = tl.where(m_keep, b_pt * keep_scale, 0.0)
            b_gt = tl.where(m_keep, b_gt * keep_scale, 0.0)
        b_dv = tl.dot(b_wt.to(b_do.dtype), b_do, b_dv, input_precision=PRECISION)
        b_ht = b_pt * (b_gt - b_delta[None, :])
        if p_pq is not None:
            i_first = i_n * BLOCK_N
            b_dk = add_row_gradient(
                b_dk, b_ht, p_pq, i_first, i_m, i_h, -1, reach, heads, D, BLOCK_D, BLOCK_N, PRECISION
            )
        b_dk = tl.dot(b_ht.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    store_rows(p_dk, b_dk * (head_mask * scale), i_key, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
    store_rows(p_dv, b_dv * head_mask, i_key, o_n, m_n, i_h, stride_gt, D, BLOCK_D)
    if i_n == 0:
        if window is not None:
            for i_m in range(tl.cdiv(end, BLOCK_M) * BLOCK_M, length, BLOCK_M):
                p_rest = p_delta + ((start + i_m) * heads + i_h) + o_m * heads
                b_delta = tl.load(p_rest, mask=i_m + o_m < length, other=0.0)
                b_signed += b_delta
                b_absolute += tl.abs(b_delta)
        tl.store(p_signed + i_b * heads + i_h, tl.sum(b_signed, 0))
        tl.store(p_absolute + i_b * heads + i_h, tl.sum(b_absolute, 0))


@triton.jit(
    do_not_specialize=["batch", "size", "heads", "blocks", "scale", "threshold", "keep_scale", "reach"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def positions_kernel(
    p_dout,
    p_q,
    p_k,
    p_v,
    p_lse,
    p_delta,
    p_dpk,
    p_dpq,
    p_starts,
    p_lengths,
    p_real,
    p_mask,
    p_seed,
    p_pk,
    p_pq,
    stride_dt,
    stride_dh,
    stride_dd,
    stride_qt,
    stride_qh,
    stride_qd,
    stride_kt,
    stride_kh,
    stride_kd,
    stride_vt,
    stride_vh,
    stride_vd,
    batch,
    size,
    heads,
    blocks,
    scale,
    threshold,
    keep_scale,
    reach,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of one head's position vectors of BLOCK distances, summed over `size` sequences. Of
    `position_scores`, these are the upper part of the tiles on one diagonal, where the first key is i_t * BLOCK behind
    the first query, and the lower part of those on the next one; for position queries, whose distances are counted from
    the key, it is the reverse."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    i_h = tl.program_id(0) % heads
    i_t = tl.program_id(0) // heads % (2 * blocks) - blocks
    i_c = tl.program_id(0) // heads // (2 * blocks)
    head_mask = 1.0
    if p_mask is not None:
        head_mask = tl.load(p_mask + i_h)
    b_dpk = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    b_dpq = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    o_x = tl.arange(0, BLOCK)
    m_up = is_upper(BLOCK)
    last = tl.minimum((i_c + 1) * size, batch)
    if head_mask == 0.0:
        last = 0
    for i_b in range(i_c * size, last):
        start = tl.load(p_starts + i_b).to(tl.int64)
        length = tl.load(p_lengths + i_b)
        # Each tile of queries that has keys there, twice: once for each diagonal.
        begin = tl.maximum(-(i_t + 1), 0)
        end = tl.cdiv(length - tl.maximum(i_t, 0) * BLOCK, BLOCK)
        for i_tile in range(2 * begin, 2 * end):
            i_m = i_tile // 2 * BLOCK
            is_next = i_tile % 2
            i_n = i_m + (i_t + is_next) * BLOCK
            # The keys in front of the sequence and behind it are masked.
            m_m = i_m + o_x < length
            m_n = (i_n + o_x >= 0) & (i_n + o_x < length)
            b_q = load_rows(p_q, start + i_m, o_x, m_m, i_h, stride_qt, stride_qh, stride_qd, D, BLOCK_D)
            b_do = load_rows(p_dout, start + i_m, o_x, m_m, i_h, stride_dt, stride_dh, stride_dd, D, BLOCK_D)
            b_k = load_rows(p_k, start + i_n, o_x, m_n, i_h, stride_kt, stride_kh, stride_kd, D, BLOCK_D)
            b_v = load_rows(p_v, start + i_n, o_x, m_n, i_h, stride_vt, stride_vh, stride_vd, D, BLOCK_D)
            o_row = ((start + i_m) * heads + i_h) + o_x * heads
            b_lse = tl.load(p_lse + o_row, mask=m_m, other=float("inf")) * LOG2_E
            b_delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)
            # [queries, keys]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_s += position_scores(b_q, b_k, p_pk, p_pq, i_m, i_n, i_h, 1, reach, heads, D, BLOCK_D, BLOCK, PRECISION)
            b_p = tl.exp2(b_s * (scale * LOG2_E) - b_lse[:, None])
            b_g = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
            if p_seed is not None:
                b_word = dropout_rows(p_seed, start + i_m, o_x, i_h, heads)
                b_g = tl.where(dropout_keeps(b_word[:, None], i_n + o_x[None, :], threshold), b_g * keep_scale, 0.0)
            if p_real is not None:
                m_n = without_holes(m_n, p_real, start + i_n, o_x)
            b_ds = tl.where(m_n[None, :], b_p * (b_g - b_delta[:, None]), 0.0)
            if p_pk is not None:
                b_t = tl.where(m_up == (is_next == 0), turned(b_ds, 1, BLOCK), 0.0)
                b_dpk = tl.dot(tl.trans(b_t.to(b_q.dtype)), b_q, b_dpk, input_precision=PRECISION)
            if p_pq is not None:
                b_t = tl.where(m_up == (is_next == 1), turned(b_ds, 0, BLOCK), 0.0)
                b_dpq = tl.dot(b_t.to(b_k.dtype), b_k, b_dpq, input_precision=PRECISION)
    o_part = i_c.to(tl.int64) * (2 * reach + 1) * heads * D
    factor = head_mask * scale
    if p_pk is not None:
        store_vectors(p_dpk + o_part, b_dpk * factor, i_h, i_t * BLOCK, 1, reach, heads, D, BLOCK_D, BLOCK)
    if p_pq is not None:
        store_vectors(p_dpq + o_part, b_dpq * factor, i_h, -(i_t + 1) * BLOCK, -1, reach, heads, D, BLOCK_D, BLOCK)


#: Into how many parts the batch is divided for the gradients of position vectors: the parts' sums are added up.
POSITION_PARTS = 8


def _shared_arguments(
    q: Tensor | Part,
    k: Tensor | Part,
    v: Tensor | Part,
    lse: Tensor | Part,
    starts: Tensor,
    lengths: Tensor,
    real: Tensor | None,
    head_mask: Tensor | None,
    seed: Tensor | Part | None,
    scale: float,
    dropout_p: float,
    window: int | None,
    bias: Tensor | None,
    positions: Positions,
) -> dict[str, Any]:
    """Returns the arguments that the four main kernels have in common."""
    tokens, heads, head_dim = q.shape
    if head_dim > MAX_HEAD_DIM:
        raise UnsupportedError(
            f"the Triton attention kernels serve head dimensions up to {MAX_HEAD_DIM}, got {head_dim}: set "
            "TICKETOPS_BACKEND=reference"
        )
    if positions != (None, None) and head_dim > 64 and q.dtype == torch.float32:
        raise UnsupportedError(
            f"the Triton attention kernels serve position vectors of at most 64 elements in float32, got {head_dim}: "
            "use a half-precision dtype, or set TICKETOPS_BACKEND=reference"
        )
    arguments: dict[str, Any] = {
        "p_lse": lse,
        "p_starts": starts.contiguous(),
        "p_lengths": lengths.contiguous(),
        "p_real": None if real is None else real.contiguous().view(torch.uint8),
        "p_mask": None if head_mask is None else head_mask.contiguous(),
        "p_seed": seed if dropout_p else None,
        "p_bias": None if bias is None else bias.contiguous(),
        **{name: None if x is None else x.contiguous() for name, x in zip(_TABLES, positions, strict=True)},
        "tokens": tokens,
        "batch": lengths.shape[0],
        "heads": heads,
        "scale": float(scale),
        "threshold": keep_threshold(dropout_p),
        "keep_scale": 1.0 / (1.0 - dropout_p),
        "window": window,
        "reach": next((len(x) // 2 for x in positions if x is not None), 0 if bias is None else bias.shape[1] // 2),
        "D": head_dim,
        "BLOCK_D": triton_configs.power_of_two(head_dim),
        "PRECISION": product_precision(q.dtype),
    }
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        arguments |= _operand(name, tensor)
    return arguments


#: Names of the kernels' arguments for position keys and position queries.
_TABLES = ("p_pk", "p_pq")
#: Names of the kernels' arguments for each input: its pointer and three strides.
_OPERANDS = {name: [f"p_{name}", *(f"stride_{name[0]}{axis}" for axis in "thd")] for name in ("q", "k", "v", "dout")}


def _operand(name: str, x: Tensor | Part) -> dict[str, Any]:
    """Returns the arguments for an input: its pointer and strides. The input is copied if offsets within a block of
    rows would exceed 32 bits."""
    by_token, by_head, by_element = x.stride()
    if max(by_token, by_head, by_element) * MAX_BLOCK >= 2**31:
        x = x.contiguous()
        by_token, by_head, by_element = x.stride()
    pointer, of_token, of_head, of_element = _OPERANDS[name]
    return {pointer: x, of_token: by_token, of_head: by_head, of_element: by_element}


def forward(
    q: Tensor | Part,
    k: Tensor | Part,
    v: Tensor | Part,
    starts: Tensor,
    lengths: Tensor,
    head_mask: Tensor | None,
    seed: Tensor | Part | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    bias: Tensor | None = None,
    positions: Positions = (None, None),
    real: Tensor | None = None,
    into: tuple[Part, Part] | None = None,
) -> tuple[Any, Any]:
    """See ticketops.ops.attention and its reference backend; one launch.

    Args:
        into: contiguous out and lse to write to; None allocates them.

    Returns:
        out [T, H, D] in q's dtype; and lse, the log-sum-exp of the scaled scores [T, H] in float32.
    """
    tokens, heads, head_dim = q.shape
    batch = lengths.shape[0]
    out: Any
    lse: Any
    if into is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        lse = torch.empty((tokens, heads), dtype=torch.float32, device=q.device)
    else:
        out, lse = into
    if not tokens * heads * batch:
        clear(out, lse)
        return out, lse
    shared = _shared_arguments(
        q, k, v, lse, starts, lengths, real, head_mask, seed, scale, dropout_p, window, bias, positions
    )
    windowed = window is not None
    tile = triton_configs.attention_forward(
        capability(q.device), q.dtype, head_dim, max_length, windowed, bias is not None, positions != (None, None)
    )
    blocks = max(1, cdiv(max_length, tile.rows))
    launch(
        forward_kernel,
        batch * blocks * (heads + 1),
        tile,
        **shared,
        p_out=out,
        blocks=blocks,
        BLOCK_M=tile.rows,
        BLOCK_N=tile.columns,
    )
    return out, lse


def backward(
    dout: Tensor | Part,
    q: Tensor | Part,
    k: Tensor | Part,
    v: Tensor | Part,
    out: Tensor | Part,
    lse: Tensor | Part,
    starts: Tensor,
    lengths: Tensor,
    head_mask: Tensor | None,
    seed: Tensor | Part | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    into: Tensor | None = None,
    bias: Tensor | None = None,
    positions: Positions = (None, None),
    real: Tensor | None = None,
) -> Gradients:
    """Computes the gradients of `forward` and the importance of each sequence and head. One launch if the sequences fit
    one block, else two; with a bias one more to clear its sums and one to add them up; with position tables three, and
    one for each to add up its sums.

    Args:
        into: contiguous [T, 3 * H * D] to write dq, dk and dv to; None allocates three tensors.

    Returns:
        dq, dk and dv, each [T, H, D], parts of `into` if given; the sums of <dOut, O> and of |<dOut, O>| over each
        sequence, both [B, H]; and the gradients of the bias, the position keys and the position queries in float32,
        None for each that is not there.
    """
    tokens, heads, head_dim = q.shape
    batch = lengths.shape[0]
    empty = not tokens * heads * batch
    dq: Any
    dk: Any
    dv: Any
    if into is None:
        dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    else:
        dq, dk, dv = thirds(into, (tokens, heads, head_dim))
    signed, absolute = (
        (torch.zeros if empty else torch.empty)((batch, heads), dtype=torch.float32, device=q.device) for _ in range(2)
    )
    if empty:
        dbias, dkeys, dqueries = (
            None if x is None else torch.zeros(x.shape, device=x.device) for x in (bias, *positions)
        )
        clear(dq, dk, dv)
        return dq, dk, dv, signed, absolute, dbias, dkeys, dqueries
    shared = _shared_arguments(
        q, k, v, lse, starts, lengths, real, head_mask, seed, scale, dropout_p, window, bias, positions
    )
    shared |= _operand("dout", dout) | {"stride_gt": dq.stride()[0]}
    windowed = window is not None
    tiles = triton_configs.attention_backward(
        capability(q.device),
        q.dtype,
        head_dim,
        max_length,
        windowed,
        tokens / batch,
        bias is not None,
        positions != (None, None),
    )
    blocks = max(1, cdiv(max_length, tiles[0].rows))
    # Not all programs run, and not all that run have all distances.
    sums = None if bias is None else signed.new_zeros((batch * blocks, *bias.shape))
    if len(tiles) == 1:
        # Its whole matrix of scores is in registers, which leaves no room for position vectors.
        del shared["p_pk"], shared["p_pq"]
        launch(
            row_backward_kernel,
            batch * (heads + 1),
            tiles[0],
            **shared,
            p_dq=dq,
            p_dk=dk,
            p_dv=dv,
            p_signed=signed,
            p_absolute=absolute,
            p_dbias=sums,
            BLOCK=tiles[0].rows,
        )
        return dq, dk, dv, signed, absolute, None if sums is None else sums.sum(0), None, None
    delta = torch.empty(lse.shape, dtype=torch.float32, device=q.device)
    dq_tile, dkdv_tile, *position_tile = tiles
    launch(
        dq_kernel,
        batch * blocks * (heads + 1),
        dq_tile,
        **shared,
        p_out=out,
        p_delta=delta,
        p_dq=dq,
        p_dbias=sums,
        blocks=blocks,
        BLOCK_M=dq_tile.rows,
        BLOCK_N=dq_tile.columns,
    )
    blocks = max(1, cdiv(max_length, dkdv_tile.columns))
    launch(
        dkdv_kernel,
        batch * blocks * (heads + 1),
        dkdv_tile,
        **shared,
        p_delta=delta,
        p_dk=dk,
        p_dv=dv,
        p_signed=signed,
        p_absolute=absolute,
        blocks=blocks,
        BLOCK_M=dkdv_tile.rows,
        BLOCK_N=dkdv_tile.columns,
    )
    dkeys, dqueries = _position_gradients(shared, delta, *position_tile) if position_tile else (None, None)
    return dq, dk, dv, signed, absolute, None if sums is None else sums.sum(0), dkeys, dqueries


def _position_gradients(shared: dict[str, Any], delta: Tensor, tile: Tile) -> Positions:
    """Computes the gradients of the position tables from the arguments of the other backward kernels."""
    unread = ("tokens", "window", "p_bias", "stride_gt")
    arguments = {name: value for name, value in shared.items() if name not in unread}
    batch, heads = arguments["batch"], arguments["heads"]
    size = cdiv(batch, POSITION_PARTS)
    parts, blocks = cdiv(batch, size), cdiv(arguments["reach"] + 1, tile.rows)
    tables = (arguments[name] for name in _TABLES)
    dkeys, dqueries = (None if x is None else delta.new_empty((parts, *x.shape)) for x in tables)
    launch(
        positions_kernel,
        parts * 2 * blocks * heads,
        tile,
        **arguments,
        p_delta=delta,
        p_dpk=dkeys,
        p_dpq=dqueries,
        size=size,
        blocks=blocks,
        BLOCK=tile.rows,
    )
    return None if dkeys is None else dkeys.sum(0), None if dqueries is None else dqueries.sum(0)
