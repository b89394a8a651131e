"""Reference implementation of dropout, residual and LayerNorm in plain PyTorch. All other backends are tested against
it."""

import torch
from torch import Tensor

from ticketops.ops.dropout import keep_elements


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None: the reference serves every device and dtype."""
    return None


def _drop(x: Tensor, seed: Tensor | None, dropout_p: float) -> Tensor:
    if not dropout_p:
        return x
    return torch.where(keep_elements(seed, x.shape[0], x.shape[1], dropout_p, x.device), x / (1 - dropout_p), 0.0)


def _sum(x: Tensor, residual: Tensor, bias: Tensor | None, seed: Tensor | None, dropout_p: float) -> Tensor:
    """Computes z, the input of the LayerNorm, in the dtype of the computation."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.to(dtype) if bias is None else x.to(dtype) + bias.to(dtype)
    return residual.to(dtype) + _drop(x, seed, dropout_p)


def forward(
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ticketops.ops.residual.

    Returns:
        out [T, C] in the residual's dtype; and each row's mean [T] and 1 / sqrt(variance + eps) [T].
    """
    z = _sum(x, residual, bias, seed, dropout_p)
    mean = z.mean(1)
    centred = z - mean[:, None]
    rstd = (centred.square().mean(1) + eps).rsqrt()
    out = centred * rstd[:, None] * gamma.to(z.dtype) + beta.to(z.dtype)
    return out.to(residual.dtype), mean, rstd


def backward(
    dout: Tensor,
    x: Tensor,
    residual: Tensor,
    bias: Tensor | None,
    gamma: Tensor,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    vectors: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `forward`. z and the dropout mask, which `forward` does not store, are computed again.

    With N = (z - mean) rstd, G = gamma dOut and R = keep / (1 - p):
        dz = rstd (G - mean(G) - N mean(G N)),   dresidual = dz,   dx = R dz,
        dbias = sum dx,   dgamma = sum dOut N,   dbeta = sum dOut.

    Args:
        vectors: True if any of dbias, dgamma and dbeta is wanted.

    Returns:
        dx [T, C], empty if it equals dresidual (no dropout, one dtype); dresidual [T, C]; dbias, dgamma and dbeta [C]
        in the dtype of the statistics, empty unless `vectors` (ignore dbias if there is no bias).
    """
    normal = (_sum(x, residual, bias, seed, dropout_p) - mean[:, None]) * rstd[:, None]
    dout = dout.to(normal.dtype)
    scaled = dout * gamma.to(normal.dtype)
    dz = scaled - scaled.mean(1, keepdim=True) - normal * (scaled * normal).mean(1, keepdim=True)
    dz.mul_(rstd[:, None])
    dx = _drop(dz, seed, dropout_p)
    dbias = dgamma = dbeta = dout.new_empty(0)
    if vectors:
        dbias, dgamma, dbeta = dx.sum(0), (dout * normal).sum(0), dout.sum(0)
    own_dx = bool(dropout_p) or x.dtype != residual.dtype
    return dx.to(x.dtype) if own_dx else x.new_empty(0), dz.to(residual.dtype), dbias, dgamma, dbeta
