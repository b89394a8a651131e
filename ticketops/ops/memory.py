"""Memory for the results of CPU kernels, which are kept and used again when nobody holds them any more:
csrc/cpu/memory.cpp.

The C library gives large blocks back to the system, which maps and clears them anew at every step, page by page.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from ticketops.ops.extension import native


def empty(shape: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """What torch.empty makes for the CPU.

    Args:
        shape: of the tensor.
        dtype: float32 and bfloat16 lie in kept memory where the native extension is there, all else in torch's own.
    """
    if native is None or dtype not in (torch.float32, torch.bfloat16):
        return torch.empty(shape, dtype=dtype)
    shape = (shape,) if isinstance(shape, int) else shape
    return from_dlpack(native.new_tensor(shape, dtype == torch.bfloat16))
