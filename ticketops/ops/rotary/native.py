"""Rotary positions on the CPU in C++: csrc/cpu/elementwise.cpp."""

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.extension import address, checked, native, run


def turn_(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """See ticketops.ops.rotary.reference.turn_.

    Args:
        qkv: contiguous.
    """
    tokens, _, heads, head_dim = qkv.shape
    if not qkv.is_contiguous() or head_dim % 2:
        raise InputError(f"rotary positions need contiguous qkv and an even head size, got {list(qkv.shape)}")
    qkv = checked("qkv", qkv, qkv.dtype, tokens, 3, heads, head_dim)
    cosines, sines = (checked("angles", x.float(), torch.float32, tokens, head_dim) for x in (cosines, sines))
    run(
        native.rotary,
        *(qkv.dtype == torch.bfloat16, address(qkv), qkv.stride(0), address(cosines), address(sines), back),
        *(tokens, 2 * heads, head_dim),
    )
    return qkv
