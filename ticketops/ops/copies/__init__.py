"""Gathering and scattering of slices of many tensors at once: on a GPU in one launch for all tensors."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.backends import implementation
from ticketops.ops.memory import empty

__all__ = ["Saved", "Slices", "gather", "part_shape", "scatter"]


@dataclass(frozen=True)
class Slices:
    """A selection of equal slices of a tensor along one dimension, e.g. the weight rows of some heads.

    Attributes:
        tensor: the whole tensor, any dtype.
        dim: the dimension that is divided into slices, from 0.
        groups: number of slices in the tensor.
        index: int64 [n] on the tensor's device, indices of the selected slices, unique. Values are not checked.
    """

    tensor: Tensor
    dim: int
    groups: int
    index: Tensor

    @property
    def shape(self) -> list[int]:
        """Shape of the selected slices side by side: the tensor's, with `dim` reduced to n / groups of its size."""
        shape = list(self.tensor.shape)
        shape[self.dim] = shape[self.dim] // self.groups * self.index.shape[0]
        return shape

    def check(self) -> None:
        """Raises InputError if dimension, number of slices and index do not fit the tensor."""
        size = self.tensor.shape[self.dim] if 0 <= self.dim < self.tensor.ndim else -1
        if size < 0 or self.groups < 1 or size % self.groups:
            raise InputError(
                f"dimension {self.dim} of a tensor {list(self.tensor.shape)} does not divide into {self.groups} slices"
            )
        index = self.index
        if index.ndim != 1 or index.dtype != torch.int64 or index.device != self.tensor.device:
            raise InputError(
                f"slices need their index as int64 [n] on {self.tensor.device}, got {index.dtype} {list(index.shape)} "
                f"on {index.device}"
            )


def gather(slices: Sequence[Slices], out: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Copies slices out of tensors.

    Args:
        slices: slices to copy, of tensors of any dtypes and devices.
        out: for each element of `slices` a tensor to write to, with shape `Slices.shape` and the dtype and device of
            the source; None allocates contiguous ones.

    Returns:
        For each element of `slices` its slices side by side.

    Raises:
        InputError: the shapes, dtypes or devices do not fit together.
    """
    if out is None:
        out = _new(slices)
    else:
        for each in slices:
            each.check()
        _check_values(slices, out)
    for places in _by_device(slices):
        part = [slices[place] for place in places]
        _implementation(part).gather(part, [out[place] for place in places])
    return list(out)


def scatter(slices: Sequence[Slices], values: Sequence[Tensor]) -> None:
    """Copies values into slices of tensors, in place.

    Args:
        slices: slices to write to, which must not overlap.
        values: for each element of `slices` the values, as `gather` returns them, on the device of its tensor.

    Raises:
        InputError: the shapes, dtypes or devices do not fit together.
    """
    for each in slices:
        each.check()
    _check_values(slices, values)
    for places in _by_device(slices):
        part = [slices[place] for place in places]
        _implementation(part).scatter(part, [values[place] for place in places])


class Saved:
    """A backup of slices of many tensors, for saving and restoring them repeatedly in the same memory.

    Args:
        slices: slices to save, which must not overlap.
        lasting: further slices, of tensors whose writes are all visible to autograd (their `_version` changes). They
            are saved again only if one of these tensors was written to since `restore`.

    Raises:
        InputError: the shapes, dtypes or devices do not fit together.
    """

    def __init__(self, slices: Sequence[Slices], lasting: Sequence[Slices] = ()) -> None:
        self._slices = [*slices, *lasting]
        self._always_saved = len(slices)
        self._prepare()

    def save(self) -> None:
        """Copies the slices into the backup."""
        if self._layout() != self._prepared_for:
            self._prepare()
        unchanged = self._versions() == self._restored
        for run in self._runs(self._always_saved if unchanged else len(self._slices), back=False):
            run()

    def restore(self) -> None:
        """Copies the backup into the tensors.

        Raises:
            InputError: a tensor has another shape, dtype or device than when it was saved.
        """
        if self._layout() != self._prepared_for:
            # A tensor has new memory, so the prepared copies would write to the old one.
            scatter(self._slices, self._copies)
            return
        for run in self._runs(len(self._slices), back=True):
            run()
        self._restored = self._versions()

    def _versions(self) -> list[int]:
        """Returns autograd's version counters of the tensors in `lasting`."""
        return [each.tensor._version for each in self._slices[self._always_saved :]]

    def _layout(self) -> list[tuple[Any, ...]]:
        """Returns the properties of the tensors that the prepared copies depend on."""
        tensors = (each.tensor for each in self._slices)
        return [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors]

    def _prepare(self) -> None:
        self._prepared_for = self._layout()
        self._copies = _new(self._slices)
        # Equal to no list of version counters, so that the next save copies everything.
        self._restored = [-1]
        self._prepared: dict[tuple[int, bool], list[Callable[[], None]]] = {}

    def _runs(self, count: int, back: bool) -> list[Callable[[], None]]:
        """Returns functions that copy the first `count` slices, one per device; prepared at first use."""
        if (count, back) not in self._prepared:
            runs = self._prepared[count, back] = []
            for places in _by_device(self._slices[:count]):
                slices, copies = [self._slices[place] for place in places], [self._copies[place] for place in places]
                runs.append(_implementation(slices).prepared(slices, copies, back))
        return self._prepared[count, back]


def part_shape(whole: Tensor, dim: int, groups: int, index: Tensor | None) -> list[int]:
    """Returns the shape of the selected slices of a tensor, side by side.

    Args:
        whole: the tensor.
        dim: the dimension that is divided into slices.
        groups: number of slices in the tensor.
        index: int64 [n], indices of the selected slices; None for all.

    Raises:
        InputError: the dimension does not divide into slices, or the index has another dtype.
    """
    shape = list(whole.shape)
    if index is not None:
        if shape[dim] % groups or index.dtype != torch.int64:
            raise InputError(
                f"dimension {dim} of a tensor {shape} does not divide into {groups} slices, or not with an index of "
                f"{index.dtype}"
            )
        shape[dim] = shape[dim] // groups * index.shape[0]
    return shape


def _new(slices: Sequence[Slices]) -> list[Tensor]:
    """Allocates a tensor for each element of `slices`."""
    for each in slices:
        each.check()
    return [empty(each.shape, each.tensor.dtype, each.tensor.device) for each in slices]


def _check_values(slices: Sequence[Slices], values: Sequence[Tensor]) -> None:
    for each, value in zip(slices, values, strict=True):
        tensor = each.tensor
        if (list(value.shape), value.dtype, value.device) != (each.shape, tensor.dtype, tensor.device):
            raise InputError(
                f"slices of shape {each.shape} of {tensor.dtype} on {tensor.device} do not go with "
                f"{list(value.shape)} of {value.dtype} on {value.device}"
            )


def _by_device(slices: Sequence[Slices]) -> Iterable[list[int]]:
    """Groups the indices of the slices by device."""
    places: dict[torch.device, list[int]] = {}
    for place, each in enumerate(slices):
        places.setdefault(each.tensor.device, []).append(place)
    return places.values()


def _implementation(slices: list[Slices]) -> Any:
    return implementation("copies", slices[0].tensor.device, slices[0].tensor.dtype)
