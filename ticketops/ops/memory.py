"""Memory for the results of CPU kernels, which are kept and used again when nobody holds them any more:
csrc/cpu/memory.cpp.

The C library gives large blocks back to the system, which maps and clears them anew at every step, page by page. With
results here, in huge pages, bfloat16 steps of MiniLM on SST-2 and RTE take 0.92 to 0.98 times as long, those of a 50 %
ticket 0.86 to 0.92 times (two cores of an AMD EPYC, Zen 5; the steps of bench.step with it and without, in two
processes that took turns).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ticketops.ops.extension import native
from ticketops.ops.private import from_dlpack

_HOST = torch.device("cpu")


def empty(shape: int | Sequence[int], dtype: torch.dtype = torch.float32, device: torch.device = _HOST) -> Tensor:
    """What torch.empty makes.

    Args:
        shape: of the tensor.
        dtype: float32 and bfloat16 lie in kept memory on a CPU with the native extension, all else in torch's own.
        device: where.
    """
    bf16 = dtype == torch.bfloat16
    if native is None or not (bf16 or dtype == torch.float32) or device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return from_dlpack(native.new_tensor((shape,) if isinstance(shape, int) else shape, bf16))
