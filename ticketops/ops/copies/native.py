"""Gathering and scattering slices on the CPU, on all threads, with one call for all copies: csrc/cpu/copies.cpp."""

import math
from array import array
from collections.abc import Callable

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import extension
from ticketops.ops.copies import Slices, part_shape, reference
from ticketops.ops.extension import address
from ticketops.ops.memory import empty

# csrc/cpu/kernels.h, enum Elements. Other pairs of equal dtypes are copied as bytes.
_ELEMENTS = {
    (torch.float32, torch.float32): 1,
    (torch.bfloat16, torch.bfloat16): 2,
    (torch.float32, torch.bfloat16): 3,
    (torch.bfloat16, torch.float32): 4,
}
# csrc/bindings.cpp, struct CopyRow
_GATHER, _SCATTER, _SPREAD = range(3)
_FIELDS = 9


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why this kernel cannot serve a device, or None. It serves any dtype, as plain bytes."""
    return extension.refusal(device, torch.float32)


def gather(slices: list[Slices], out: list[Tensor]) -> None:
    """See ticketops.ops.copies.gather."""
    prepared(slices, out, back=False)()


def scatter(slices: list[Slices], values: list[Tensor]) -> None:
    """See ticketops.ops.copies.scatter."""
    prepared(slices, values, back=True)()


def prepared(slices: list[Slices], parts: list[Tensor], back: bool) -> Callable[[], None]:
    """See ticketops.ops.copies.reference.prepared."""
    table = Table()
    written: list[Tensor] = []
    others: list[tuple[Slices, Tensor]] = []
    for each, part in zip(slices, parts, strict=True):
        tensor = each.tensor
        if not part.numel():
            continue
        if not (tensor.is_contiguous() and part.is_contiguous() and tensor.layout == torch.strided):
            others.append((each, part))
            continue
        source, target, way = (part, tensor, _SCATTER) if back else (tensor, part, _GATHER)
        table.add(source, target, each.dim, each.groups, each.index, way)
        written.append(target)
    rest = reference.prepared([each for each, _ in others], [part for _, part in others], back)

    def run() -> None:
        table.run()
        # The kernel writes without autograd's knowledge, so report the writes.
        torch.autograd.graph.increment_version(written)
        rest()

    return run


class Table:
    """A list of copies of slices between tensors, all of which one call runs."""

    def __init__(self) -> None:
        self._rows = array("q")
        # Keeps the tensors whose addresses are in the table alive as long as the table.
        self._alive: list[Tensor | None] = []

    def select(
        self, tensor: Tensor, dim: int, groups: int, index: Tensor | None, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        """Adds a copy of selected slices of a tensor, side by side.

        Args:
            tensor: the whole tensor, float32 or bfloat16.
            dim: the dimension that is divided into slices.
            groups: number of slices in the tensor.
            index: int64 [n], indices of the selected slices, unique; None selects all.
            dtype: dtype of the copy, float32 or bfloat16.
            out: contiguous tensor to write to; None allocates one.

        Returns:
            The copy, with `dim` reduced to n / groups of its size. It has no values before `run`.

        Raises:
            InputError: the shapes, dtypes or devices do not fit together.
        """
        shape = part_shape(tensor, dim, groups, index)
        if out is None:
            out = empty(shape, dtype)
        elif list(out.shape) != shape or out.dtype != dtype or not out.is_contiguous():
            raise InputError(
                f"the native kernel needs room as contiguous {dtype} {shape}, got {out.dtype} {list(out.shape)}"
            )
        self.add(tensor.contiguous(), out, dim, groups, index, _GATHER)
        return out

    def spread(self, part: Tensor, like: Tensor, dim: int, groups: int, index: Tensor | None) -> Tensor:
        """Adds the inverse of `select`: slices are copied to their positions in a new tensor, whose other elements are
        0.

        Args:
            part: the slices side by side, float32 or bfloat16.
            like: tensor with the shape and dtype of the result.
            dim, groups, index: as in `select`.

        Returns:
            The new tensor. It has no values before `run`.

        Raises:
            InputError: the shapes, dtypes or devices do not fit together.
        """
        shape = part_shape(like, dim, groups, index)
        if list(part.shape) != shape:
            raise InputError(f"slices of shape {shape} of {list(like.shape)} do not go with {list(part.shape)}")
        out = empty(like.shape, like.dtype)
        self.add(part.contiguous(), out, dim, groups, index, _SPREAD)
        return out

    def add(self, source: Tensor, target: Tensor, dim: int, groups: int, index: Tensor | None, way: int) -> None:
        """Adds a copy between contiguous tensors of fitting shapes. Their dtypes must be equal or in `_ELEMENTS`.

        Args:
            source: tensor to read from.
            target: tensor to write to.
            dim, groups, index: as in `select`.
            way: _GATHER, _SCATTER or _SPREAD.
        """
        elements = _ELEMENTS.get((source.dtype, target.dtype), 0)
        if not elements and source.dtype != target.dtype:
            raise InputError(f"the native kernel does not cast {source.dtype} to {target.dtype}")
        part = target if way == _GATHER else source
        size = part.numel()
        if not size:
            if way == _SPREAD:
                target.zero_()
            return
        if index is None:
            rows, groups, count = 1, 1, 1
        else:
            rows, count = math.prod(part.shape[:dim]), index.shape[0]
            index = index.contiguous()
        slice_size = size // (rows * count) * (1 if elements else part.element_size())
        addresses = (address(source), address(target), address(index))
        self._rows.extend((*addresses, rows, groups, count, slice_size, elements, way))
        self._alive += (source, target, index)

    def run(self) -> None:
        """Runs the copies.

        Raises:
            InputError: an index is out of range; nothing is copied then.
        """
        if self._rows:
            table, numbers = self._rows.buffer_info()
            extension.run(extension.native.copy_slices, table, numbers // _FIELDS)
