"""Rotary positions in plain PyTorch. The other backends are tested against it."""

import torch
from torch import Tensor


def turn_(qkv: Tensor, cosines: Tensor, sines: Tensor, back: bool = False) -> Tensor:
    """Turns queries and keys by the angles of their tokens, in place. Computes in float32 (float64 for float64 inputs).

    Args:
        qkv: [T, 3, H, D] queries, keys and values, which stay; D is even.
        cosines, sines: [T, D], of the angle of each token and channel.
        back: True turns gradients of the turned tensors into those of the tensors before.

    Returns:
        `qkv`.
    """
    dtype = torch.float64 if qkv.dtype == torch.float64 else torch.float32
    a, b = qkv[:, :2].to(dtype).chunk(2, -1)
    (cos_a, cos_b), (sin_a, sin_b) = (x.to(dtype)[:, None, None].chunk(2, -1) for x in (cosines, sines))
    turned = (a * cos_a + b * sin_b, b * cos_b - a * sin_a) if back else (a * cos_a - b * sin_a, b * cos_b + a * sin_b)
    qkv[:, :2] = torch.cat(turned, -1)
    return qkv
