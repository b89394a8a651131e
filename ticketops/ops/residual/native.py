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
    """Checks x and the residual, whose dtype must be x's or float32, and returns both."""
    dtype = residual.dtype if x is None or residual.dtype == x.dtype else torch.float32
    return (
        None if x is None else checked("x", x, x.dtype, *residual.shape),
        checked("residual", residual, dtype, *residual.shape),
    )


def _is_bf16(x: Tensor | None, residual: Tensor) -> bool:
    return (residual if x is None else x).dtype == torch.bfloat16


class Second(NamedTuple):
    """A second LayerNorm of the result, for layers whose FFN between the two LayerNorms is pruned.

    Attributes:
        gamma, beta: [C], weight and bias.
        eps: added to the variance.
    """

    gamma: Tensor
    beta: Tensor | None
    eps: float


def norm(gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, rstd: Tensor | None) -> tuple[int, ...]:
    """Returns a LayerNorm's tensors as addresses, in the form that kernels take.

    Args:
        gamma, beta, mean, rstd: checked tensors; None for those that the kernel does not use.
    """
    return address(gamma), address(beta), address(mean), address(rstd)


_NONE = norm(None, None, None, None)


def forward(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    half: Tensor | None = None,
    second: Second | None = None,
) -> tuple[Tensor, ...]:
    """See ticketops.ops.residual.reference.forward.

    Args:
        x: as in the reference; None for zeros, the output of a sublayer that is pruned.
        beta: as in the reference; None for zeros.
        half: contiguous bfloat16 [T, C] to write a copy of the result to, or None.
        second: a second LayerNorm to apply to the result, or None.

    Returns:
        out [T, C] in the residual's dtype; each row's mean [T] and 1 / sqrt(variance + eps) [T]; and these two of the
        second LayerNorm, if there is one.
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
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, residual.dtype == torch.bfloat16),
        *(
            address(x),
            address(residual),
            address(bias),
            norms,
            0,
            address(out),
            address(half),
            rows,
            channels,
            (eps, eps2),
            *dropout_arguments(seed, dropout_p),
        ),
    )
    return out, *statistics


def forward_before(
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the end of a sublayer where LayerNorm comes first: the sum goes on to the end of the next sublayer, its
    LayerNorm into it.

    Args:
        x, residual, bias, seed, dropout_p, eps: as in `forward`.
        gamma: as in `forward`; None for no LayerNorm.
        beta: as in `forward`; None for zeros.
        dtype: dtype of the LayerNorm's result: x's, or the residual's.

    Returns:
        residual + dropout(x + bias) [T, C] in the residual's dtype, the residual itself if nothing is added; its
        LayerNorm [T, C]; and each row's mean [T] and 1 / sqrt(variance + eps) [T]. The last three are empty without a
        LayerNorm.
    """
    rows, channels = residual.shape
    x, residual = _pair(x, residual)
    bias, gamma, beta = (
        _vector("bias", bias, channels),
        _vector("gamma", gamma, channels),
        _vector("beta", beta, channels),
    )
    adds, norms = x is not None or bias is not None, gamma is not None
    total = empty((rows, channels), residual.dtype) if adds else residual
    normed = empty((rows, channels) if norms else (0,), dtype)
    mean, rstd = (empty(rows if norms else 0) for _ in range(2))
    run(
        native.residual_forward,
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, dtype == torch.bfloat16),
        *(address(x), address(residual), address(bias), (norm(gamma, beta, mean, rstd), _NONE)),
        *(
            address(total) if adds else 0,
            address(normed),
            0,
            rows,
            channels,
            (eps, 0.0),
            *dropout_arguments(seed, dropout_p),
        ),
    )
    return total, normed, mean, rstd


def backward_before(
    dnormed: Tensor | None,
    dtotal: Tensor,
    x: Tensor | None,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    seed: Tensor | None,
    dropout_p: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `forward_before`.

    Args:
        dnormed, dtotal: [T, C], gradients of the LayerNorm, None without one, and of the sum.
        x, residual, bias, gamma, seed, dropout_p: as in `forward_before`.
        mean, rstd: as it returned them.
        dtype: x's.

    Returns:
        dx [T, C], the same tensor as dresidual if they are equal; dresidual [T, C], `dtotal` itself if they are equal;
        and dbias, dgamma and dbeta [C] in float32, the last two empty without a LayerNorm.
    """
    rows, channels = residual.shape
    x, residual = _pair(x, residual)
    dtotal = checked("dtotal", dtotal, residual.dtype, rows, channels)
    bias, gamma = _vector("bias", bias, channels), _vector("gamma", gamma, channels)
    if dnormed is not None:
        dnormed = checked("dnormed", dnormed, dnormed.dtype, rows, channels)
        mean, rstd = (checked("statistics", vector, torch.float32, rows) for vector in (mean, rstd))
    dresidual = dtotal if gamma is None else empty((rows, channels), residual.dtype)
    dx = empty((rows, channels), dtype) if dropout_p or dtype != residual.dtype else dresidual
    if dx is dtotal and bias is None:
        return dx, dtotal, empty(0), empty(0), empty(0)
    dbias = empty(channels)
    dgamma, dbeta = (empty(0 if gamma is None else channels) for _ in range(2))
    out_bf16 = (residual if dnormed is None else dnormed).dtype == torch.bfloat16
    run(
        native.residual_backward,
        *(dtype == torch.bfloat16, residual.dtype == torch.bfloat16, out_bf16, address(dnormed), address(dtotal)),
        *(address(x), address(residual), address(bias), (norm(gamma, None, mean, rstd), _NONE)),
        *(0 if dx is dresidual else address(dx), 0 if dresidual is dtotal else address(dresidual)),
        *([address(dbias), *([0, 0] if gamma is None else [address(dgamma), address(dbeta)]), 0, 0], rows, channels),
        *dropout_arguments(seed, dropout_p),
    )
    return dx, dresidual, dbias, dgamma, dbeta


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
    second: tuple[Tensor | None, Tensor, Tensor, Tensor] | None = None,
    vectors: bool = True,
) -> tuple[Tensor, ...]:
    """See ticketops.ops.residual.reference.backward.

    Args:
        x: as in `forward`.
        second: beta of the first LayerNorm; gamma, mean and 1 / sqrt(variance + eps) of the second. None if there is no
            second one.
        vectors: True if any gradient of a vector (bias, gamma, beta) is wanted.

    Returns:
        dx [T, C], empty if it equals dresidual or x is None; dresidual [T, C]; dbias, dgamma and dbeta [C] in float32;
        and dgamma and dbeta of the second LayerNorm, if there is one. The vectors are empty unless `vectors`. dbias is
        the sum of dx, also if `bias` is None because x includes it.
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
        *(_is_bf16(x, residual), residual.dtype == torch.bfloat16, residual.dtype == torch.bfloat16, address(dout), 0),
        *(
            address(x),
            address(residual),
            address(bias),
            (norm(gamma, beta, mean, rstd), norm(gamma2, None, mean2, rstd2)),
        ),
        *(address(dx if own_dx else None), address(dresidual), addresses, rows, channels),
        *dropout_arguments(seed, dropout_p),
    )
    return dx, dresidual, *sums
