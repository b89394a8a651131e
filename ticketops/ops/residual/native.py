"""Dropout, residual and LayerNorm on the CPU in C++: csrc/cpu/residual.cpp."""

from typing import TypeVar

import torch
from torch import Tensor

from ticketops.ops.extension import address, checked, dropout_arguments, native, refusal, run
from ticketops.ops.memory import empty

_Given = TypeVar("_Given", Tensor, Tensor | None)

__all__ = ["backward", "forward", "refusal"]


def _vector(name: str, x: _Given, channels: int) -> _Given:
    return x if x is None else checked(name, x.float(), torch.float32, channels)


def _pair(x: Tensor | None, residual: Tensor) -> tuple[Tensor | None, Tensor]:
    """Both inputs, checked: the residual has x's dtype or float32."""
    dtype = residual.dtype if x is None or residual.dtype == x.dtype else torch.float32
    return (
        None if x is None else checked("x", x, x.dtype, *residual.shape),
        checked("residual", residual, dtype, *residual.shape),
    )


def _is_bf16(x: Tensor | None, residual: Tensor) -> bool:
    return (residual if x is None else x).dtype == torch.bfloat16


def forward(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    half: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ticketops.ops.residual.reference.forward.

    Args:
        x: None for zeros: what is left of a sublayer that is pruned away.
        half: contiguous bfloat16 [T, C] to receive a copy of the result, or None.

    Returns:
        out [T, C] in the residual's dtype, and each row's mean [T] and 1 / sqrt(variance + eps) [T].
    """
    rows, channels = residual.shape
    x, residual = _pair(x, residual)
    bias, gamma, beta = (
        _vector("bias", bias, channels),
        _vector("gamma", gamma, channels),
        _vector("beta", beta, channels),
    )
    half = checked("half", half, torch.bfloat16, rows, channels)
    out = empty((rows, channels), residual.dtype)
    mean, rstd = (empty(rows) for _ in range(2))
    run(
        native.residual_forward,
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, address(x), address(residual), address(bias)),
        *(address(gamma), address(beta), address(out), address(half), address(mean), address(rstd), rows, channels),
        eps,
        *dropout_arguments(seed, dropout_p),
    )
    return out, mean, rstd


def backward(
    dout: Tensor,
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ticketops.ops.residual.reference.backward.

    Args:
        x: what `forward` took.

    Returns:
        dx [T, C], empty where it equals dresidual or x is None; dresidual [T, C]; dbias, dgamma, dbeta [C] in float32;
        dbias, the sum of dx, also where x has its bias already.
    """
    rows, channels = residual.shape
    x, residual = _pair(x, residual)
    dout = checked("dout", dout, residual.dtype, rows, channels)
    bias, gamma = _vector("bias", bias, channels), _vector("gamma", gamma, channels)
    mean = checked("mean", mean, torch.float32, rows)
    rstd = checked("rstd", rstd, torch.float32, rows)
    own_dx = x is not None and (bool(dropout_p) or x.dtype != residual.dtype)
    dx = empty((rows, channels) if own_dx else (0,), residual.dtype if x is None else x.dtype)
    dresidual = empty((rows, channels), residual.dtype)
    dbias, dgamma, dbeta = (empty(channels) for _ in range(3))
    run(
        native.residual_backward,
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, address(dout), address(x), address(residual)),
        *(address(bias), address(gamma), address(mean), address(rstd), address(dx if own_dx else None)),
        *(address(dresidual), address(dbias), address(dgamma), address(dbeta), rows, channels),
        *dropout_arguments(seed, dropout_p),
    )
    return dx, dresidual, dbias, dgamma, dbeta
