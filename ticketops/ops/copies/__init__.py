"""Slices of many tensors gathered or scattered together: on a GPU in one launch, however many tensors there are."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.backends import implementation
from ticketops.ops.memory import empty

__all__ = ["Saved", "Slices", "gather", "scatter"]


@dataclass(frozen=True)
class Slices:
    """Some of the equal slices into which a dimension of a tensor divides, such as the rows of some heads.

    Attributes:
        tensor: the whole, any dtype.
        dim: the dimension, from 0.
        groups: how many slices it divides into.
        index: int64 [n] on the tensor's device, which of them, none twice; its values are not checked.
    """

    tensor: Tensor
    dim: int
    groups: int
    index: Tensor

    @property
    def shape(self) -> list[int]:
        """Of the slices side by side: the tensor's, with n / groups of the dimension."""
        shape = list(self.tensor.shape)
        shape[self.dim] = shape[self.dim] // self.groups * self.index.shape[0]
        return shape

    def check(self) -> None:
        """Raises InputError where the parts do not fit together."""
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
        slices: what to copy, of any dtypes and devices.
        out: for each where to, of the shape `Slices.shape` and its tensor's dtype and device; None for new tensors.

    Returns:
        For each its slices side by side; new ones are contiguous.

    Raises:
        InputError: parts that do not fit together.
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
        slices: where to, no place twice.
        values: for each what `gather` returns, on its tensor's device.

    Raises:
        InputError: parts that do not fit together.
    """
    for each in slices:
        each.check()
    _check_values(slices, values)
    for places in _by_device(slices):
        part = [slices[place] for place in places]
        _implementation(part).scatter(part, [values[place] for place in places])


class Saved:
    """A copy of slices of many tensors that is taken and put back again and again, in the same memory.

    Args:
        slices: what to copy, no place twice.
        lasting: more of it, of tensors that nobody writes to behind autograd's back: they are copied anew only where
            something has written to them since they were put back.

    Raises:
        InputError: parts that do not fit together.
    """

    def __init__(self, slices: Sequence[Slices], lasting: Sequence[Slices] = ()) -> None:
        self._slices = [*slices, *lasting]
        self._often = len(slices)
        self._prepare()

    def save(self) -> None:
        """Copies the slices."""
        if self._layout() != self._prepared_for:
            self._prepare()
        lasts = self._versions() == self._restored
        for run in self._runs(self._often if lasts else len(self._slices), back=False):
            run()

    def restore(self) -> None:
        """Puts the copies back.

        Raises:
            InputError: a tensor has another shape, dtype or device than when it was saved.
        """
        if self._layout() != self._prepared_for:
            # Something else has given a tensor other memory since.
            scatter(self._slices, self._copies)
            return
        for run in self._runs(len(self._slices), back=True):
            run()
        self._restored = self._versions()

    def _versions(self) -> list[int]:
        """Numbers that change with the tensors of which a copy may last."""
        return [each.tensor._version for each in self._slices[self._often :]]

    def _layout(self) -> list[tuple[Any, ...]]:
        """What the prepared copies rely on."""
        tensors = (each.tensor for each in self._slices)
        return [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors]

    def _prepare(self) -> None:
        self._prepared_for = self._layout()
        self._copies = _new(self._slices)
        # None are equal to these.
        self._restored = [-1]
        self._prepared: dict[tuple[int, bool], list[Callable[[], None]]] = {}

    def _runs(self, count: int, back: bool) -> list[Callable[[], None]]:
        """Prepared copies of the first slices, one for each device; made when they are needed first."""
        if (count, back) not in self._prepared:
            runs = self._prepared[count, back] = []
            for places in _by_device(self._slices[:count]):
                slices, copies = [self._slices[place] for place in places], [self._copies[place] for place in places]
                runs.append(_implementation(slices).prepared(slices, copies, back))
        return self._prepared[count, back]


def _new(slices: Sequence[Slices]) -> list[Tensor]:
    """Memory for slices side by side."""
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
    """Places of the slices of each device."""
    places: dict[torch.device, list[int]] = {}
    for place, each in enumerate(slices):
        places.setdefault(each.tensor.device, []).append(place)
    return places.values()


def _implementation(slices: list[Slices]) -> Any:
    return implementation("copies", slices[0].tensor.device, slices[0].tensor.dtype)
