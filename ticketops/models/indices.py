"""Indices of structures, as tensors that are copied to each device once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Indices:
    """Immutable ascending indices, with a cached tensor per device.

    Deep copies and pickles contain the indices only, not the tensors.

    Args:
        values: the indices.
    """

    def __init__(self, values: Iterable[int]) -> None:
        self.values = tuple(values)
        self._tensors: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        return Indices, (self.values,)

    def on(self, device: torch.device) -> Tensor:
        """Returns the indices as an int64 tensor; only the first call for a device makes one.

        Args:
            device: device of the indexed tensor.
        """
        if device not in self._tensors:
            # A tensor made in inference mode could not be saved for a later backward pass.
            with torch.inference_mode(False):
                self._tensors[device] = torch.tensor(self.values, dtype=torch.int64, device=device)
        return self._tensors[device]
