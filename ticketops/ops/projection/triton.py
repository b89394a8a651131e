"""Indexed projections: kernels that read the selected rows of the weights in place, through an index.

Both projections use V, the weight as [rows, channels] whose rows are selected: V = W for q, k and v, and V = W^T (by
strides) for the output projection. With S the selected rows of V there are three products:

    `into`   y = x S^T + b,        `out_of`   x = sum y S,        `gradients`   dS = y^T x.

The backward pass of each projection is the forward pass of the other, plus `gradients`. Products neither read nor write
rows of V that are not selected; the kernel that sums the parts of the gradient writes zeros there.

Weights may be float32 with 16-bit tokens, as under autocast: blocks are cast as they enter a product, and gradients are
in the weights' dtype, so that no weight is ever copied.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ticketops.ops import triton_configs
from ticketops.ops.triton_common import capability, cdiv, launch, product_precision, refusal

__all__ = ["gradients", "into", "out_of", "refusal"]

#: Largest number of parts that the tokens are divided into for the gradient; a second kernel adds the parts in order.
#: With 1024 tokens in one sum, float32's error is six times that of cuBLAS.
MAX_PARTS = 16
TOKENS_PER_PART = 512


@triton.jit
def pick(i, p_0, p_1, p_2):
    """Returns pointer number i; the later ones may be None."""
    p = p_0
    if p_1 is not None:
        if i == 1:
            p = p_1
        if i == 2:
            p = p_2
    return p


@triton.jit
def load_selected(p_v, p_groups, o_n, m_n, o_c, m_c, stride_vr, stride_vc, WIDTH: tl.constexpr):
    """Loads a block [rows, channels] of the selected rows of V."""
    o_row = tl.load(p_groups + o_n // WIDTH, mask=m_n, other=0) * WIDTH + o_n % WIDTH
    p_block = p_v + o_row[:, None] * stride_vr + o_c[None, :] * stride_vc
    return tl.load(p_block, mask=m_n[:, None] & m_c[None, :], other=0.0)


@triton.jit(do_not_specialize=["tokens"])
def into_kernel(
    p_x,
    p_v0,
    p_v1,
    p_v2,
    p_b0,
    p_b1,
    p_b2,
    p_y0,
    p_y1,
    p_y2,
    p_groups,
    stride_xt,
    stride_yt,
    stride_vr,
    stride_vc,
    tokens,
    selected,
    channels,
    WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """y = x S^T + b of one weight, on a block of tokens and selected rows. Programs with the same tokens have
    neighbouring numbers."""
    blocks = tl.cdiv(selected, COLUMNS)
    i_row = (tl.program_id(0) // (blocks * WEIGHTS)).to(tl.int64) * ROWS
    i_w = tl.program_id(0) // blocks % WEIGHTS
    o_r = tl.arange(0, ROWS)
    m_r = i_row + o_r < tokens
    o_n = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_n = o_n < selected
    p_v = pick(i_w, p_v0, p_v1, p_v2)
    # [ROWS, COLUMNS]
    b_y = tl.zeros([ROWS, COLUMNS], tl.float32)
    for i_c in range(0, channels, DEPTH):
        o_c = i_c + tl.arange(0, DEPTH)
        m_c = o_c < channels
        p_block = p_x + i_row * stride_xt + o_r[:, None] * stride_xt + o_c[None, :]
        b_x = tl.load(p_block, mask=m_r[:, None] & m_c[None, :], other=0.0)
        b_s = load_selected(p_v, p_groups, o_n, m_n, o_c, m_c, stride_vr, stride_vc, WIDTH).to(b_x.dtype)
        b_y = tl.dot(b_x, tl.trans(b_s), b_y, input_precision=PRECISION)
    if p_b0 is not None:
        p_b = pick(i_w, p_b0, p_b1, p_b2)
        o_row = tl.load(p_groups + o_n // WIDTH, mask=m_n, other=0) * WIDTH + o_n % WIDTH
        b_y += tl.load(p_b + o_row, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_y = pick(i_w, p_y0, p_y1, p_y2)
    p_block = p_y + i_row * stride_yt + o_r[:, None] * stride_yt + o_n[None, :]
    tl.store(p_block, b_y.to(p_y.dtype.element_ty), mask=m_r[:, None] & m_n[None, :])


@triton.jit
def add_products(
    b_x,
    p_y,
    p_v,
    p_groups,
    i_row,
    o_r,
    m_r,
    o_c,
    m_c,
    stride_yt,
    stride_vr,
    stride_vc,
    selected,
    WIDTH: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Adds y S to b_x, on a block of tokens and channels."""
    for i_n in range(0, selected, DEPTH):
        o_n = i_n + tl.arange(0, DEPTH)
        m_n = o_n < selected
        p_block = p_y + i_row * stride_yt + o_r[:, None] * stride_yt + o_n[None, :]
        b_y = tl.load(p_block, mask=m_r[:, None] & m_n[None, :], other=0.0)
        b_s = load_selected(p_v, p_groups, o_n, m_n, o_c, m_c, stride_vr, stride_vc, WIDTH).to(b_y.dtype)
        b_x = tl.dot(b_y, b_s, b_x, input_precision=PRECISION)
    return b_x


@triton.jit(do_not_specialize=["tokens"])
def out_of_kernel(
    p_y0,
    p_y1,
    p_y2,
    p_v0,
    p_v1,
    p_v2,
    p_b,
    p_x,
    p_groups,
    stride_yt,
    stride_vr,
    stride_vc,
    tokens,
    selected,
    channels,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x = b + the sum of y S over the weights, on a block of tokens and channels."""
    blocks = tl.cdiv(channels, COLUMNS)
    i_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS
    o_r = tl.arange(0, ROWS)
    m_r = i_row + o_r < tokens
    o_c = tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < channels
    # [ROWS, COLUMNS]
    b_x = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_x = add_products(
        b_x, p_y0, p_v0, p_groups, i_row, o_r, m_r, o_c, m_c, stride_yt, stride_vr, stride_vc, selected, WIDTH, DEPTH,
        PRECISION,
    )  # fmt: skip
    if p_y1 is not None:
        b_x = add_products(
            b_x, p_y1, p_v1, p_groups, i_row, o_r, m_r, o_c, m_c, stride_yt, stride_vr, stride_vc, selected, WIDTH,
            DEPTH, PRECISION,
        )  # fmt: skip
        b_x = add_products(
            b_x, p_y2, p_v2, p_groups, i_row, o_r, m_r, o_c, m_c, stride_yt, stride_vr, stride_vc, selected, WIDTH,
            DEPTH, PRECISION,
        )  # fmt: skip
    if p_b is not None:
        b_x += tl.load(p_b + o_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
    p_block = p_x + i_row * channels + o_r[:, None] * channels + o_c[None, :]
    tl.store(p_block, b_x.to(p_x.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["tokens", "tokens_per_part"])
def gradient_kernel(
    p_y0,
    p_y1,
    p_y2,
    p_x,
    p_parts,
    p_bias_parts,
    stride_xt,
    stride_yt,
    tokens,
    tokens_per_part,
    selected,
    channels,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dS = y^T x of one weight over one part of the tokens, on a block of selected rows and channels. The programs of
    the first block of channels also sum y, for the gradient of the bias."""
    row_blocks = tl.cdiv(selected, ROWS)
    column_blocks = tl.cdiv(channels, COLUMNS)
    pid = tl.program_id(0)
    i_c = pid % column_blocks
    i_n = pid // column_blocks % row_blocks
    # One plane of partial sums per part and weight.
    i_plane = pid // (column_blocks * row_blocks)
    first = (i_plane // WEIGHTS).to(tl.int64) * tokens_per_part
    last = tl.minimum(first + tokens_per_part, tokens)
    p_y = pick(i_plane % WEIGHTS, p_y0, p_y1, p_y2)
    o_n = i_n * ROWS + tl.arange(0, ROWS)
    m_n = o_n < selected
    o_c = i_c * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < channels
    o_t = tl.arange(0, DEPTH)
    # [ROWS, COLUMNS]
    b_ds = tl.zeros([ROWS, COLUMNS], tl.float32)
    b_db = tl.zeros([ROWS], tl.float32)
    for i_t in range(first, last, DEPTH):
        m_t = i_t + o_t < last
        p_block = p_y + i_t * stride_yt + o_t[:, None] * stride_yt + o_n[None, :]
        # [DEPTH, ROWS]
        b_y = tl.load(p_block, mask=m_t[:, None] & m_n[None, :], other=0.0)
        p_block = p_x + i_t * stride_xt + o_t[:, None] * stride_xt + o_c[None, :]
        b_x = tl.load(p_block, mask=m_t[:, None] & m_c[None, :], other=0.0)
        b_ds = tl.dot(tl.trans(b_y), b_x, b_ds, input_precision=PRECISION)
        if p_bias_parts is not None:
            b_db += tl.sum(b_y.to(tl.float32), 0)
    i_row = i_plane.to(tl.int64) * selected
    p_block = p_parts + (i_row + o_n[:, None]) * channels + o_c[None, :]
    tl.store(p_block, b_ds, mask=m_n[:, None] & m_c[None, :])
    if p_bias_parts is not None:
        # The mask is all False except for the first block of channels.
        tl.store(p_bias_parts + i_row + o_n, b_db, mask=o_n + i_c * selected < selected)


@triton.jit(do_not_specialize=["parts", "kept"])
def finish_kernel(
    p_parts,
    p_bias_parts,
    p_dv0,
    p_dv1,
    p_dv2,
    p_db0,
    p_db1,
    p_db2,
    p_groups,
    stride_vr,
    stride_vc,
    parts,
    kept,
    groups,
    selected,
    channels,
    WIDTH: tl.constexpr,
    WEIGHTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Gradient of one group of V's rows on a block of channels: the sum of the parts in order, or zeros if the group is
    not selected."""
    SCAN: tl.constexpr = 64
    column_blocks = tl.cdiv(channels, COLUMNS)
    i_c = tl.program_id(0) % column_blocks
    i_group = tl.program_id(0) // column_blocks % groups
    i_w = tl.program_id(0) // (column_blocks * groups)
    # The group's position in the selection, -1 if it is not selected.
    place = -1
    for i in range(0, kept, SCAN):
        o_i = i + tl.arange(0, SCAN)
        m_found = tl.load(p_groups + o_i, mask=o_i < kept, other=-1) == i_group
        place = tl.maximum(place, tl.max(tl.where(m_found, o_i, -1), 0))
    p_dv = pick(i_w, p_dv0, p_dv1, p_dv2)
    o_c = i_c * COLUMNS + tl.arange(0, COLUMNS)
    m_c = o_c < channels
    for i_r in range(0, WIDTH, ROWS):
        o_r = i_r + tl.arange(0, ROWS)
        m_x = (o_r < WIDTH)[:, None] & m_c[None, :]
        # [ROWS, COLUMNS]
        b_dv = tl.zeros([ROWS, COLUMNS], tl.float32)
        b_db = tl.zeros([ROWS], tl.float32)
        if place >= 0:
            for i_part in range(parts):
                i_row = (i_part * WEIGHTS + i_w).to(tl.int64) * selected + place * WIDTH
                p_block = p_parts + (i_row + o_r[:, None]) * channels + o_c[None, :]
                b_dv += tl.load(p_block, mask=m_x, other=0.0)
                if p_bias_parts is not None:
                    b_db += tl.load(p_bias_parts + i_row + o_r, mask=o_r < WIDTH, other=0.0)
        i_row = i_group.to(tl.int64) * WIDTH
        p_block = p_dv + (i_row + o_r[:, None]) * stride_vr + o_c[None, :] * stride_vc
        tl.store(p_block, b_dv.to(p_dv.dtype.element_ty), mask=m_x)
        if p_bias_parts is not None:
            p_db = pick(i_w, p_db0, p_db1, p_db2)
            tl.store(p_db + i_row + o_r, b_db.to(p_db.dtype.element_ty), mask=o_r + i_c * WIDTH < WIDTH)


def _named(name: str, tensors: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
    """Returns up to three tensors as the kernel arguments p_<name>0 to p_<name>2, None for missing ones."""
    return {f"p_{name}{i}": tensors[i] if i < len(tensors) else None for i in range(3)}


def _rows(x: Tensor) -> Tensor:
    """Returns x with contiguous rows, which the kernels require; a copy if needed."""
    return x if x.stride(1) == 1 else x.contiguous()


def _alike(ys: Sequence[Tensor]) -> list[Tensor]:
    """Returns the matrices with contiguous rows and one common row stride; copies if needed."""
    fine = all(y.stride() == (ys[0].stride(0), 1) for y in ys)
    return list(ys) if fine else [y.contiguous() for y in ys]


def _shared(x: Tensor, v: Tensor, groups: Tensor, kept: int, count: int) -> dict[str, Any]:
    width = v.shape[0] // count
    return {
        "tokens": x.shape[0],
        "selected": kept * width,
        "channels": v.shape[1],
        "p_groups": groups.contiguous(),
        "stride_vr": v.stride(0),
        "stride_vc": v.stride(1),
        "WIDTH": width,
        "PRECISION": product_precision(x.dtype),
    }


def into(
    x: Tensor,
    vs: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    groups: Tensor,
    count: int,
    ys: Sequence[Tensor] | None = None,
) -> list[Tensor]:
    """Computes y = x S^T + b, for one weight or for three of one shape and layout; one launch.

    Args:
        x: [T, C].
        vs: one or three V, each [count * width, C].
        biases: a bias for each V, [count * width]; None for no biases.
        groups: int64 [K], indices of the selected groups of `width` rows, ascending.
        count: number of groups in each V.
        ys: results to write to, each [T, K * width] in x's dtype, with contiguous rows and one common row stride; None
            allocates them.

    Returns:
        y of each V, [T, K * width] in x's dtype.
    """
    x = _rows(x)
    shared = _shared(x, vs[0], groups, len(groups), count)
    tokens, selected = shared["tokens"], shared["selected"]
    if ys is None:
        ys = [torch.empty((tokens, selected), dtype=x.dtype, device=x.device) for _ in vs]
    tile = triton_configs.projection(capability(x.device), x.dtype)
    launch(
        into_kernel,
        cdiv(tokens, tile.rows) * cdiv(selected, tile.columns) * len(vs),
        tile,
        **shared,
        **_named("v", vs),
        **_named("b", biases or ()),
        **_named("y", ys),
        p_x=x,
        stride_xt=x.stride(0),
        stride_yt=ys[0].stride(0),
        WEIGHTS=len(vs),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )
    return list(ys)


def out_of(
    ys: Sequence[Tensor], vs: Sequence[Tensor], groups: Tensor, count: int, bias: Tensor | None = None
) -> Tensor:
    """Computes x = b + the sum of y S over one weight or three; one launch.

    Args:
        ys: one or three y, each [T, K * width].
        vs: one or three V, each [count * width, C].
        groups: int64 [K], indices of the selected groups, ascending.
        count: number of groups in each V.
        bias: [C], or None.

    Returns:
        [T, C] in y's dtype.
    """
    ys = _alike(ys)
    shared = _shared(ys[0], vs[0], groups, len(groups), count)
    tokens, channels = shared["tokens"], shared["channels"]
    x = torch.empty((tokens, channels), dtype=ys[0].dtype, device=ys[0].device)
    tile = triton_configs.projection(capability(x.device), x.dtype)
    launch(
        out_of_kernel,
        cdiv(tokens, tile.rows) * cdiv(channels, tile.columns),
        tile,
        **shared,
        **_named("y", ys),
        **_named("v", vs),
        p_b=bias,
        p_x=x,
        stride_yt=ys[0].stride(0),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
    )
    return x


def gradients(
    ys: Sequence[Tensor], x: Tensor, dvs: Sequence[Tensor], dbs: Sequence[Tensor] | None, groups: Tensor, count: int
) -> None:
    """Writes dS = y^T x of one weight or three to the selected rows of dV, and zeros to the others; two launches.

    Args:
        ys: one or three y, each [T, K * width].
        x: [T, C].
        dvs: gradient of each V to write to, [count * width, C].
        dbs: gradient of each bias to write to, [count * width], which is the sum of y over tokens; None for no biases.
        groups: int64 [K], indices of the selected groups, ascending.
        count: number of groups in each V.
    """
    x, ys = _rows(x), _alike(ys)
    shared = _shared(x, dvs[0], groups, len(groups), count)
    strides = {name: shared.pop(name) for name in ("stride_vr", "stride_vc", "p_groups", "WIDTH")}
    precision = shared.pop("PRECISION")
    tokens, selected, channels = (shared[name] for name in ("tokens", "selected", "channels"))
    tile = triton_configs.projection(capability(x.device), x.dtype)
    parts = max(1, min(MAX_PARTS, cdiv(tokens, TOKENS_PER_PART)))
    sums = torch.empty((parts, len(ys), selected, channels), dtype=torch.float32, device=x.device)
    bias_sums = None if dbs is None else torch.empty((parts, len(ys), selected), dtype=torch.float32, device=x.device)
    launch(
        gradient_kernel,
        parts * len(ys) * cdiv(selected, tile.rows) * cdiv(channels, tile.columns),
        tile,
        **shared,
        **_named("y", ys),
        p_x=x,
        p_parts=sums,
        p_bias_parts=bias_sums,
        stride_xt=x.stride(0),
        stride_yt=ys[0].stride(0),
        tokens_per_part=cdiv(cdiv(tokens, parts), tile.depth) * tile.depth,
        WEIGHTS=len(ys),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        DEPTH=tile.depth,
        PRECISION=precision,
    )
    tile = triton_configs.PROJECTION_FINISH
    launch(
        finish_kernel,
        len(ys) * count * cdiv(channels, tile.columns),
        tile,
        **strides,
        **_named("dv", dvs),
        **_named("db", dbs or ()),
        p_parts=sums,
        p_bias_parts=bias_sums,
        parts=parts,
        kept=len(groups),
        groups=count,
        selected=selected,
        channels=channels,
        WEIGHTS=len(ys),
        ROWS=tile.rows,
        COLUMNS=tile.columns,
    )
