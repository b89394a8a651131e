"""Numbers of structures as indices on a device, copied there once."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class Indices:
    """Ascending numbers that never change, and their tensor on every device that asked for it.

    Copies, deep or pickled, have the numbers and make tensors of their own.

    Args:
        values: the numbers.
    """

    def __init__(self, values: Iterable[int]) -> None:
        self.values = tuple(values)
        self._tensors: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.values)

    def __reduce__(self) -> tuple[Any, ...]:
        return Indices, (self.values,)

    def on(self, device: torch.device) -> Tensor:
        """The numbers as int64 on a device; only the first call for a device makes a tensor.

        Args:
            device: where the indexed tensor lies.
        """
        if device not in self._tensors:
            # Made under inference_mode it could not be saved for a backward pass later on.
            with torch.inference_mode(False):
                self._tensors[device] = torch.tensor(self.values, dtype=torch.int64, device=device)
        return self._tensors[device]
