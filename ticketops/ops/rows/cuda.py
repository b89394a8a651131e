"""Moving and numbering rows on the GPU: csrc/cuda/rows.cu."""

import torch
from torch import Tensor

from ticketops.ops import cuda_extension as cuda

_INTEGERS = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns the reason why these kernels cannot serve a device, or None. They serve any dtype, as plain bytes."""
    return cuda.refusal(device)


def move_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """See ticketops.ops.rows.move_rows."""
    x = cuda.checked("x", x, x.device, x.dtype, *x.shape)
    index = cuda.checked("index", index, x.device, torch.int64, len(index)).contiguous()
    out = torch.empty((len(index), x.shape[1]), dtype=x.dtype, device=x.device)
    if out.numel():
        size = x.element_size()
        # The row stride of a tensor with fewer than two rows is arbitrary.
        stride = x.stride(0) if len(x) > 1 else 0
        arguments = (x.data_ptr(), stride * size, index.data_ptr(), out.data_ptr(), len(index), x.shape[1] * size)
        cuda.run(cuda.kernels.move_rows, x.device, *arguments)
    return out


def number_tokens(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ticketops.ops.rows.number_tokens."""
    batch, width = mask.shape
    # The kernel tests integers for nonzero bits. Floats are compared here, since -0.0 has a nonzero bit.
    mask = cuda.checked("mask", mask if mask.dtype in _INTEGERS else mask != 0, mask.device, _INTEGERS, batch, width)
    starts, lengths = (torch.empty(batch, dtype=torch.int32, device=mask.device) for _ in range(2))
    indices, numbers = (torch.empty(batch * width, dtype=torch.int64, device=mask.device) for _ in range(2))
    if batch:
        places = (starts.data_ptr(), lengths.data_ptr(), indices.data_ptr(), numbers.data_ptr())
        arguments = (mask.data_ptr(), mask.element_size(), mask.stride(0), batch, width, *places)
        cuda.run(cuda.kernels.number_tokens, mask.device, *arguments)
    return starts, lengths, indices, numbers
