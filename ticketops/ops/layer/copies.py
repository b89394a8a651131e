"""Copies of a layer's weights on a GPU: slices of the computed heads or neurons side by side, in another dtype if need
be, and their gradients spread over zeros. `ticketops.ops.copies.native.Table` is the same on a CPU.

Every layer copies its weights under autocast, so that picking slices costs no further pass over them, and the products
of what is left are dense ones. All tensors that one index selects from are copied in one launch.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ticketops.ops import private, triton_configs
from ticketops.ops.copies import part_shape
from ticketops.ops.triton_common import cdiv, launch

#: Most tensors that one launch copies: weights and biases of q, k and v, and the output projection's weight.
MOST = 7


@triton.jit
def copy_slices(p_whole, p_part, p_index, i_first, size, width, kept, groups, BACK: tl.constexpr, BLOCK: tl.constexpr):
    """Copies elements from number i_first on between a tensor [.., groups, width] and its slices [.., kept, width]."""
    o_part = i_first + tl.arange(0, BLOCK)
    m_part = o_part < size
    o_slice = o_part // width
    i_group = tl.load(p_index + o_slice % kept, mask=m_part, other=0)
    o_whole = (o_slice // kept * groups + i_group) * width + o_part % width
    if BACK:
        b_x = tl.load(p_part + o_part, mask=m_part, other=0.0)
        tl.store(p_whole + o_whole, b_x.to(p_whole.dtype.element_ty), mask=m_part)
    else:
        b_x = tl.load(p_whole + o_whole, mask=m_part, other=0.0)
        tl.store(p_part + o_part, b_x.to(p_part.dtype.element_ty), mask=m_part)


@triton.jit(do_not_specialize=["kept", "groups", *(f"size{i}" for i in range(MOST))])
def slices_kernel(
    p_index,
    p_whole0,
    p_whole1,
    p_whole2,
    p_whole3,
    p_whole4,
    p_whole5,
    p_whole6,
    p_part0,
    p_part1,
    p_part2,
    p_part3,
    p_part4,
    p_part5,
    p_part6,
    size0,
    size1,
    size2,
    size3,
    size4,
    size5,
    size6,
    width0,
    width1,
    width2,
    width3,
    width4,
    width5,
    width6,
    kept,
    groups,
    BACK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Copies a block of one of several tensors; those that are not there are None."""
    p_wholes = (p_whole0, p_whole1, p_whole2, p_whole3, p_whole4, p_whole5, p_whole6)
    p_parts = (p_part0, p_part1, p_part2, p_part3, p_part4, p_part5, p_part6)
    sizes = (size0, size1, size2, size3, size4, size5, size6)
    widths = (width0, width1, width2, width3, width4, width5, width6)
    i_block = tl.program_id(0)
    for i in tl.static_range(7):
        if p_wholes[i] is not None:
            blocks = tl.cdiv(sizes[i], BLOCK)
            if (i_block >= 0) & (i_block < blocks):
                copy_slices(
                    p_wholes[i], p_parts[i], p_index, i_block * BLOCK, sizes[i], widths[i], kept, groups, BACK, BLOCK
                )
            i_block -= blocks


class _Copy(NamedTuple):
    """A copy between a contiguous tensor [.., groups, width] and its slices [.., kept, width]."""

    whole: Tensor
    part: Tensor
    width: int


class Table:
    """A list of copies, which run together: in one launch for each index, and one for all tensors without one."""

    def __init__(self) -> None:
        self._targets: list[Tensor] = []
        self._sources: list[Tensor] = []
        self._zeros: list[Tensor] = []
        self._slices: dict[tuple[int, bool], tuple[Tensor, int, list[_Copy]]] = {}

    def select(
        self, tensor: Tensor, dim: int, groups: int, index: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Adds a copy of selected slices of a tensor, see `ticketops.ops.copies.native.Table.select`."""
        if out is None:
            out = torch.empty(part_shape(tensor, dim, groups, index), dtype=dtype, device=tensor.device)
        if index is None:
            self._targets.append(out)
            self._sources.append(tensor)
        else:
            self._add(tensor.contiguous(), out, dim, groups, index, back=False)
        return out

    def spread(self, part: Tensor, like: Tensor, dim: int, groups: int, index: Tensor) -> Tensor:
        """Adds the inverse of `select`, see `ticketops.ops.copies.native.Table.spread`."""
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        self._zeros.append(out)
        self._add(out, part.contiguous(), dim, groups, index, back=True)
        return out

    def _add(self, whole: Tensor, part: Tensor, dim: int, groups: int, index: Tensor, back: bool) -> None:
        _, _, copies = self._slices.setdefault((id(index), back), (index, groups, []))
        copies.append(_Copy(whole, part, math.prod(whole.shape[dim:]) // max(groups, 1)))

    def run(self) -> None:
        """Runs the copies."""
        if self._sources:
            private.copy_all(self._targets, self._sources)
        if self._zeros:
            private.zero_all(self._zeros)
        for (_, back), (index, groups, copies) in self._slices.items():
            for first in range(0, len(copies), MOST):
                copy(copies[first : first + MOST], index, groups, back)


def copy(copies: list[_Copy], index: Tensor, groups: int, back: bool) -> None:
    """Copies the slices that an index selects; one launch.

    Args:
        copies: at most `MOST`, of parts with less than 2**31 elements.
        index: int64 [kept].
        groups: number of slices in each whole tensor.
        back: True copies the parts into the whole tensors, False out of them.
    """
    tile = triton_configs.SLICES
    arguments = {
        name: value
        for i, one in enumerate((*copies, *(None,) * (MOST - len(copies))))
        for name, value in (
            (f"p_whole{i}", None if one is None else one.whole),
            (f"p_part{i}", None if one is None else one.part),
            (f"size{i}", 0 if one is None else one.part.numel()),
            (f"width{i}", 1 if one is None else one.width),
        )
    }
    launch(
        slices_kernel,
        sum(cdiv(one.part.numel(), tile.columns) for one in copies),
        tile,
        **arguments,
        p_index=index.contiguous(),
        kept=index.shape[0],
        groups=groups,
        BACK=back,
        BLOCK=tile.columns,
    )
