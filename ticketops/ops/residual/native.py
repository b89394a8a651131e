"""Dropout, residual and LayerNorm on the CPU in C++: csrc/cpu/residual.cpp."""

from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from ticketops.ops.extension import address, checked, dropout_arguments, native, refusal, run
from ticketops.ops.memory import empty

_OptionalTensor = TypeVar("_OptionalTensor", Tensor, Tensor | None)

__all__ = ["backward", "forward", "refusal"]


def _vector(name: str, x: _OptionalTensor, channels: int) -> _OptionalTensor:
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


class Second(NamedTuple):
    """A LayerNorm of the result, where what lies between the two is pruned away.

    Attributes:
        gamma, beta: [C].
        eps: added to the variance.
    """

    gamma: Tensor
    beta: Tensor
    eps: float


def norm(gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> tuple[int, ...]:
    """A LayerNorm as the kernels take it.

    Args:
        gamma, beta, mean, rstd: checked; None for what the kernel does without.
    """
    return address(gamma), address(beta), address(mean), address(rstd)


_NONE = norm(None, None, None, None)


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
    second: Second | None = None,
) -> tuple[Tensor, ...]:
    """See ticketops.ops.residual.reference.forward.

    Args:
        x: None for zeros: what is left of a sublayer that is pruned away.
        half: contiguous bfloat16 [T, C] to receive a copy of the result, or None.
        second: a LayerNorm of the result, or None.

    Returns:
        out [T, C] in the residual's dtype, and each row's mean [T] and 1 / sqrt(variance + eps) [T]; those of the
        second norm behind them.
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
    statistics = [empty(rows) for _ in range(2 if second is None else 4)]
    norms, eps2 = [norm(gamma, beta, *statistics[:2]), _NONE], 0.0
    if second is not None:
        gamma2, beta2, eps2 = second
        gamma2, beta2 = _vector("gamma", gamma2, channels), _vector("beta", beta2, channels)
        norms[1] = norm(gamma2, beta2, *statistics[2:])
    run(
        native.residual_forward,
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, address(x), address(residual), address(bias)),
        *(norms, address(out), address(half), rows, channels, (eps, eps2), *dropout_arguments(seed, dropout_p)),
    )
    return out, *statistics


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
    second: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    vectors: bool = True,
) -> tuple[Tensor, ...]:
    """See ticketops.ops.residual.reference.backward.

    Args:
        x: what `forward` took.
        vectors: whether any of the sums over rows is wanted.
        second: beta of the first norm, gamma of the second, its mean and its 1 / sqrt(variance + eps); None without it.

    Returns:
        dx [T, C], empty where it equals dresidual or x is None; dresidual [T, C]; dbias, dgamma, dbeta [C] in float32;
        dbias, the sum of dx, also where x has its bias already; dgamma and dbeta of the second norm behind them; all
        of these empty unless `vectors`.
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
    sums = [empty(channels if vectors else 0) for _ in range(3 if second is None else 5)]
    beta = gamma2 = mean2 = rstd2 = None
    if second is not None:
        beta, gamma2, mean2, rstd2 = second
        beta, gamma2 = _vector("beta", beta, channels), _vector("gamma", gamma2, channels)
        mean2, rstd2 = (checked("statistics", vector, torch.float32, rows) for vector in (mean2, rstd2))
    addresses = [*map(address, sums if vectors else ()), *[0] * 5][:5]
    run(
        native.residual_backward,
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, address(dout), address(x), address(residual)),
        *(address(bias), (norm(gamma, beta, mean, rstd), norm(gamma2, None, mean2, rstd2))),
        *(address(dx if own_dx else None), address(dresidual), addresses, rows, channels),
        *dropout_arguments(seed, dropout_p),
    )
    return dx, dresidual, *sums
