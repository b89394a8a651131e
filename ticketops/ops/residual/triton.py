"""Dropout, residual and LayerNorm as Triton kernels: whole rows in registers, one launch forward, two backward.

Inductor fuses the same operations under torch.compile. These kernels also serve eager mode, draw the same dropout as
all other backends, and store no mask. On an H200, with 16,384 tokens of 768 channels, bfloat16 x and a float32
residual, they reach 3.2 TB/s forward and 2.8 backward, of 4.8 in the data sheet (tiles-nvidia-h200.json). `make gpu`
compares them with Inductor's; there are no results of that yet.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ticketops.ops import triton_configs
from ticketops.ops.dropout import keep_threshold
from ticketops.ops.triton_common import UNALIGNED, Part, cdiv, dropout_keeps, dropout_rows, launch, refusal

__all__ = ["backward", "forward", "refusal"]

#: Largest number of partial sums over tokens in the backward pass: a few per multiprocessor of today's largest GPUs.
MAX_PARTS = 512


@triton.jit
def load_block(p_x, i_row, o_r, o_c, m_x, stride_t, stride_c):
    """Loads a block [rows, columns] of a matrix, in float32."""
    o_x = o_r[:, None].to(tl.int64) * stride_t + o_c[None, :] * stride_c
    return tl.load(p_x + i_row * stride_t + o_x, mask=m_x, other=0.0).to(tl.float32)


@triton.jit
def load_sum(
    p_x,
    p_residual,
    p_bias,
    i_row,
    o_r,
    o_c,
    m_x,
    m_keep,
    keep_scale,
    stride_xt,
    stride_xc,
    stride_rt,
    stride_rc,
    channels,
    DROPOUT: tl.constexpr,
):
    """z = residual + dropout(x + bias) on a block [rows, columns], 0 where masked. Without x, it counts as 0."""
    b_x = tl.zeros(m_x.shape, tl.float32)
    if p_x is not None:
        b_x = load_block(p_x, i_row, o_r, o_c, m_x, stride_xt, stride_xc)
    if p_bias is not None:
        b_x += tl.load(p_bias + o_c, mask=o_c < channels, other=0.0).to(tl.float32)[None, :]
    if DROPOUT:
        b_x = tl.where(m_keep, b_x * keep_scale, 0.0)
    return load_block(p_residual, i_row, o_r, o_c, m_x, stride_rt, stride_rc) + b_x


@triton.jit(
    do_not_specialize=["tokens", "threshold", "keep_scale", "eps"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def forward_kernel(
    p_x,
    p_residual,
    p_bias,
    p_gamma,
    p_beta,
    p_seed,
    p_total,
    p_out,
    p_half,
    p_mean,
    p_rstd,
    stride_xt,
    stride_xc,
    stride_rt,
    stride_rc,
    tokens,
    channels,
    threshold,
    keep_scale,
    eps,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Output, mean and 1 / sqrt(variance + eps) of a block of rows; the mean first, then the variance around it. If
    asked for, also z, the sum before the norm; without gamma, z alone."""
    i_row = tl.program_id(0).to(tl.int64) * ROWS
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, COLUMNS)
    m_r = i_row + o_r < tokens
    m_c = o_c < channels
    m_x = m_r[:, None] & m_c[None, :]
    m_keep = m_x
    if p_seed is not None:
        m_keep = dropout_keeps(dropout_rows(p_seed, i_row, o_r, 0, 1)[:, None], o_c[None, :], threshold)
    # [ROWS, COLUMNS]
    b_z = load_sum(
        p_x,
        p_residual,
        p_bias,
        i_row,
        o_r,
        o_c,
        m_x,
        m_keep,
        keep_scale,
        stride_xt,
        stride_xc,
        stride_rt,
        stride_rc,
        channels,
        p_seed is not None,
    )
    if p_total is not None:
        p_block = p_total + i_row * channels + o_r[:, None] * channels + o_c[None, :]
        tl.store(p_block, b_z.to(p_total.dtype.element_ty), mask=m_x)
    if p_gamma is not None:
        b_mean = tl.sum(tl.where(m_x, b_z, 0.0), 1) / channels
        b_centred = tl.where(m_x, b_z - b_mean[:, None], 0.0)
        b_rstd = 1.0 / tl.sqrt_rn(tl.sum(b_centred * b_centred, 1) / channels + eps)
        b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float32)
        b_out = b_centred * b_rstd[:, None] * b_gamma[None, :]
        if p_beta is not None:
            b_out += tl.load(p_beta + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        p_block = p_out + i_row * channels + o_r[:, None] * channels + o_c[None, :]
        tl.store(p_block, b_out.to(p_out.dtype.element_ty), mask=m_x)
        if p_half is not None:
            p_block = p_half + i_row * channels + o_r[:, None] * channels + o_c[None, :]
            tl.store(p_block, b_out.to(p_half.dtype.element_ty), mask=m_x)
        tl.store(p_mean + i_row + o_r, b_mean, mask=m_r)
        tl.store(p_rstd + i_row + o_r, b_rstd, mask=m_r)


# The backward pass. With N = (z - mean) rstd, G = gamma dOut and R = keep / (1 - p):
#
#     dz = rstd (G - mean(G) - N mean(G N)) + dTotal,   dresidual = dz,   dx = R dz,
#     dbias = sum dx,   dgamma = sum dOut N,   dbeta = sum dOut,
#
# where dTotal is what reaches z past the norm, if LayerNorm comes first in a layer.


@triton.jit(
    do_not_specialize=["tokens", "rows_per_part", "threshold", "keep_scale"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def backward_kernel(
    p_dout,
    p_dtotal,
    p_x,
    p_residual,
    p_bias,
    p_gamma,
    p_mean,
    p_rstd,
    p_seed,
    p_dx,
    p_dresidual,
    p_parts,
    stride_dt,
    stride_dc,
    stride_tt,
    stride_tc,
    stride_xt,
    stride_xc,
    stride_rt,
    stride_rc,
    tokens,
    channels,
    rows_per_part,
    threshold,
    keep_scale,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dx and dresidual of a run of rows, and their part of dbias, dgamma and dbeta in p_parts [parts, 3, channels].
    Without gamma, there is no norm."""
    i_part = tl.program_id(0).to(tl.int64)
    first = i_part * rows_per_part
    last = tl.minimum(first + rows_per_part, tokens)
    o_r = tl.arange(0, ROWS)
    o_c = tl.arange(0, COLUMNS)
    m_c = o_c < channels
    if p_gamma is not None:
        b_gamma = tl.load(p_gamma + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_dbias = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_dgamma = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_dbeta = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_row in range(first, last, ROWS):
        m_r = i_row + o_r < last
        m_x = m_r[:, None] & m_c[None, :]
        m_keep = m_x
        if p_seed is not None:
            m_keep = dropout_keeps(dropout_rows(p_seed, i_row, o_r, 0, 1)[:, None], o_c[None, :], threshold)
        b_dz = tl.zeros([ROWS, COLUMNS], tl.float32)
        if p_gamma is not None:
            # [ROWS, COLUMNS]
            b_z = load_sum(
                p_x,
                p_residual,
                p_bias,
                i_row,
                o_r,
                o_c,
                m_x,
                m_keep,
                keep_scale,
                stride_xt,
                stride_xc,
                stride_rt,
                stride_rc,
                channels,
                p_seed is not None,
            )
            b_mean = tl.load(p_mean + i_row + o_r, mask=m_r, other=0.0)
            b_rstd = tl.load(p_rstd + i_row + o_r, mask=m_r, other=0.0)
            b_normal = tl.where(m_x, (b_z - b_mean[:, None]) * b_rstd[:, None], 0.0)
            b_do = load_block(p_dout, i_row, o_r, o_c, m_x, stride_dt, stride_dc)
            b_g = b_do * b_gamma[None, :]
            b_g_mean = tl.sum(b_g, 1) / channels
            b_gn_mean = tl.sum(b_g * b_normal, 1) / channels
            b_dz = tl.where(m_x, (b_g - b_g_mean[:, None] - b_normal * b_gn_mean[:, None]) * b_rstd[:, None], 0.0)
            b_dgamma += b_do * b_normal
            b_dbeta += b_do
        if p_dtotal is not None:
            b_dz += load_block(p_dtotal, i_row, o_r, o_c, m_x, stride_tt, stride_tc)
        o_x = o_r[:, None] * channels + o_c[None, :]
        if p_dresidual is not None:
            tl.store(p_dresidual + i_row * channels + o_x, b_dz.to(p_dresidual.dtype.element_ty), mask=m_x)
        b_dx = b_dz
        if p_seed is not None:
            b_dx = tl.where(m_keep, b_dz * keep_scale, 0.0)
        if p_dx is not None:
            tl.store(p_dx + i_row * channels + o_x, b_dx.to(p_dx.dtype.element_ty), mask=m_x)
        b_dbias += b_dx
    p_part = p_parts + i_part * 3 * channels + o_c
    tl.store(p_part, tl.sum(b_dbias, 0), mask=m_c)
    tl.store(p_part + channels, tl.sum(b_dgamma, 0), mask=m_c)
    tl.store(p_part + 2 * channels, tl.sum(b_dbeta, 0), mask=m_c)


@triton.jit(do_not_specialize=["parts"])
def finish_kernel(p_parts, p_dbias, p_dgamma, p_dbeta, parts, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Sums the parts in a fixed order, so that results are deterministic."""
    o_r = tl.arange(0, ROWS)
    o_c = tl.program_id(0) // 3 * COLUMNS + tl.arange(0, COLUMNS)
    i_vector = tl.program_id(0) % 3
    m_c = o_c < channels
    b_sum = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_part in range(0, parts, ROWS):
        p_block = p_parts + ((i_part + o_r)[:, None] * 3 + i_vector) * channels + o_c[None, :]
        b_sum += tl.load(p_block, mask=(i_part + o_r < parts)[:, None] & m_c[None, :], other=0.0)
    b_total = tl.sum(b_sum, 0)
    if i_vector == 0:
        tl.store(p_dbias + o_c, b_total, mask=m_c)
    elif i_vector == 1:
        tl.store(p_dgamma + o_c, b_total, mask=m_c)
    else:
        tl.store(p_dbeta + o_c, b_total, mask=m_c)


def forward(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    seed: Tensor | Part | None,
    dropout_p: float,
    eps: float,
    half: Tensor | None = None,
    statistics: Sequence[Part] | None = None,
) -> tuple[Tensor, Any, Any]:
    """See ticketops.ops.residual; one launch.

    Args:
        half: contiguous [T, C] of a 16-bit dtype to write a copy of the result to, or None.
        statistics: float32 [T] and [T] to write each row's mean and 1 / sqrt(variance + eps) to; None allocates them.

    Returns:
        out [T, C] in the residual's dtype; and each row's mean [T] and 1 / sqrt(variance + eps) [T] in float32.
    """
    out = torch.empty(residual.shape, dtype=residual.dtype, device=x.device)
    mean, rstd = _statistics(residual) if statistics is None else statistics
    _launch_forward(x, residual, bias, gamma, beta, seed, dropout_p, eps, None, out, half, mean, rstd)
    return out, mean, rstd


def _statistics(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Allocates the mean and 1 / sqrt(variance + eps) of each row."""
    mean, rstd = (torch.empty(rows.shape[:1], dtype=torch.float32, device=rows.device) for _ in range(2))
    return mean, rstd


def forward_before(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    seed: Tensor | Part | None,
    dropout_p: float,
    eps: float,
    dtype: torch.dtype,
    statistics: Sequence[Part] | None = None,
) -> tuple[Tensor, Tensor]:
    """See the native backend; one launch, or none if nothing is computed. Writes to `statistics` what `forward` does,
    and does not return it."""
    adds = x is not None or bias is not None
    total = torch.empty(residual.shape, dtype=residual.dtype, device=residual.device) if adds else residual
    normed = torch.empty((0,) if gamma is None else residual.shape, dtype=dtype, device=residual.device)
    if not adds and gamma is None:
        return total, normed
    some = (total if adds else None, None if gamma is None else normed)
    of_norm = (None, None) if gamma is None else statistics or _statistics(residual)
    _launch_forward(x, residual, bias, gamma, beta, seed, dropout_p, eps, *some, None, *of_norm)
    return total, normed


def _launch_forward(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    seed: Tensor | Part | None,
    dropout_p: float,
    eps: float,
    total: Tensor | None,
    out: Tensor | None,
    half: Tensor | None,
    mean: Tensor | Part | None,
    rstd: Tensor | Part | None,
) -> None:
    """Writes z to `total` and its LayerNorm to `out` and `half`, as far as they are there."""
    tokens, channels = residual.shape
    tile = triton_configs.norm_forward(channels)
    stride_xt, stride_xc = (0, 0) if x is None else x.stride()
    launch(
        forward_kernel,
        cdiv(tokens, tile.rows),
        tile,
        p_x=x,
        p_residual=residual,
        p_bias=None if bias is None else bias.contiguous(),
        p_gamma=None if gamma is None else gamma.contiguous(),
        p_beta=None if beta is None else beta.contiguous(),
        p_seed=seed if dropout_p else None,
        p_total=total,
        p_out=out,
        p_half=half,
        p_mean=mean,
        p_rstd=rstd,
        stride_xt=stride_xt,
        stride_xc=stride_xc,
        stride_rt=residual.stride(0),
        stride_rc=residual.stride(1),
        tokens=tokens,
        channels=channels,
        threshold=keep_threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p),
        eps=float(eps),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )


def backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | Part | None,
    dropout_p: float,
    vectors: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `forward`; two launches, or one without `vectors`.

    Args:
        vectors: True if any of dbias, dgamma and dbeta is wanted.

    Returns:
        dx [T, C], empty if it equals dresidual (no dropout, one dtype); dresidual [T, C]; dbias, dgamma and dbeta [C]
        in float32, empty unless `vectors`.
    """
    channels = x.shape[1]
    dx, dresidual, sums = first_stage(dout, x, residual, bias, gamma, mean, rstd, seed, dropout_p)
    shape = (channels if vectors else 0,)
    dbias, dgamma, dbeta = (torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(3))
    if not vectors:
        return dx, dresidual, dbias, dgamma, dbeta
    tile = triton_configs.NORM_FINISH
    launch(
        finish_kernel,
        3 * cdiv(channels, tile.columns),
        tile,
        p_parts=sums,
        p_dbias=dbias,
        p_dgamma=dgamma,
        p_dbeta=dbeta,
        parts=len(sums),
        channels=channels,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return dx, dresidual, dbias, dgamma, dbeta


def first_stage(
    dout: Tensor | None,
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor | Part | None,
    rstd: Tensor | Part | None,
    seed: Tensor | Part | None,
    dropout_p: float,
    dtotal: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes `backward` without the final sums over parts; one launch. Also the gradients of `forward_before`.

    Args:
        dout: [T, C], gradient of the LayerNorm's result; None without a LayerNorm, as gamma, mean and rstd.
        dtotal: [T, C], gradient of the sum before the LayerNorm; None for 0.
        dtype: x's, for an x that is None.

    Returns:
        dx and dresidual, as in `backward`, but dresidual is `dtotal` itself without a LayerNorm; and float32
        [parts, 3 C], whose sums over parts are dbias, dgamma and dbeta.
    """
    tokens, channels = residual.shape
    device, dtype = residual.device, x.dtype if x is not None else dtype or residual.dtype
    own_dx = bool(dropout_p) or dtype != residual.dtype
    dx = torch.empty(residual.shape if own_dx else (0,), dtype=dtype, device=device)
    same = gamma is None and dtotal is not None
    dresidual = (
        dtotal if same and dtotal is not None else torch.empty(residual.shape, dtype=residual.dtype, device=device)
    )
    tile = triton_configs.norm_backward(channels)
    blocks = cdiv(tokens, tile.rows)
    rows_per_part = tile.rows * max(1, cdiv(blocks, MAX_PARTS))
    parts = cdiv(tokens, rows_per_part)
    sums = torch.empty((parts, 3 * channels), dtype=torch.float32, device=device)
    strides = [(0, 0) if each is None else each.stride() for each in (dout, dtotal, x)]
    launch(
        backward_kernel,
        parts,
        tile,
        p_dout=dout,
        p_dtotal=dtotal,
        p_x=x,
        p_residual=residual,
        p_bias=None if bias is None else bias.contiguous(),
        p_gamma=None if gamma is None else gamma.contiguous(),
        p_mean=mean,
        p_rstd=rstd,
        p_seed=seed if dropout_p else None,
        p_dx=dx if own_dx else None,
        p_dresidual=None if same else dresidual,
        p_parts=sums,
        stride_dt=strides[0][0],
        stride_dc=strides[0][1],
        stride_tt=strides[1][0],
        stride_tc=strides[1][1],
        stride_xt=strides[2][0],
        stride_xc=strides[2][1],
        stride_rt=residual.stride(0),
        stride_rc=residual.stride(1),
        tokens=tokens,
        channels=channels,
        rows_per_part=rows_per_part,
        threshold=keep_threshold(dropout_p),
        keep_scale=1.0 / (1.0 - dropout_p),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
    return dx, dresidual, sums
