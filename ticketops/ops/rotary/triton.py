"""Rotary positions as a Triton kernel, one launch in place."""

import triton
import triton.language as tl
from torch import Tensor

from ticketops.ops import triton_configs
from ticketops.ops.triton_common import cdiv, launch


@triton.jit
def turn_kernel(
    p_x,
    p_cosines,
    p_sines,
    stride_t,
    tokens,
    columns,
    BACK: tl.constexpr,
    HALF: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Turns a block of tokens and pairs of channels. `columns` counts the pairs of all queries and keys of a token."""
    column_blocks = tl.cdiv(columns, COLUMNS)
    i_row = (tl.program_id(0) // column_blocks).to(tl.int64) * ROWS
    o_r = tl.arange(0, ROWS)
    o_c = tl.program_id(0) % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_x = (i_row + o_r < tokens)[:, None] & (o_c < columns)[None, :]
    o_pair = o_c % HALF
    # [ROWS, COLUMNS]
    p_a = p_x + i_row * stride_t + o_r[:, None] * stride_t + (o_c // HALF * (2 * HALF) + o_pair)[None, :]
    o_angle = i_row * (2 * HALF) + o_r[:, None] * (2 * HALF) + o_pair[None, :]
    b_a = tl.load(p_a, mask=m_x, other=0.0).to(tl.float32)
    b_b = tl.load(p_a + HALF, mask=m_x, other=0.0).to(tl.float32)
    b_cos_a = tl.load(p_cosines + o_angle, mask=m_x, other=0.0).to(tl.float32)
    b_cos_b = tl.load(p_cosines + o_angle + HALF, mask=m_x, other=0.0).to(tl.float32)
    b_sin_a = tl.load(p_sines + o_angle, mask=m_x, other=0.0).to(tl.float32)
    b_sin_b = tl.load(p_sines + o_angle + HALF, mask=m_x, other=0.0).to(tl.float32)
    if BACK:
        b_new_a = b_a * b_cos_a + b_b * b_sin_b
        b_new_b = b_b * b_cos_b - b_a * b_sin_a
    else:
        b_new_a = b_a * b_cos_a - b_b * b_sin_a
        b_new_b = b_b * b_cos_b + b_a * b_sin_b
    tl.store(p_a, b_new_a.to(p_x.dtype.element_ty), mask=m_x)
    tl.store(p_a + HALF, b_new_b.to(p_x.dtype.element_ty), mask=m_x)


def turn_(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """See ticketops.ops.rotary.reference.turn_; one launch.

    Args:
        qkv: contiguous.
    """
    tokens, _, heads, head_dim = qkv.shape
    tile, half = triton_configs.GATED_FFN, head_dim // 2
    launch(
        turn_kernel,
        cdiv(tokens, tile.rows) * cdiv(2 * heads * half, tile.columns),
        tile,
        p_x=qkv,
        p_cosines=cosines.contiguous(),
        p_sines=sines.contiguous(),
        stride_t=qkv.stride(0),
        tokens=tokens,
        columns=2 * heads * half,
        BACK=back,
        HALF=half,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return qkv
