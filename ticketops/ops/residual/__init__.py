"""Dropout, residual and LayerNorm, the end of every BERT sublayer, as one autograd op for all backends.

    z[t] = residual[t] + dropout(x[t] + bias),   out[t] = gamma * (z[t] - mean z[t]) / sqrt(var z[t] + eps) + beta

Neither z nor the dropout mask is stored: the backward pass computes them again from x, the residual and the seed.
"""

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.backends import implementation
from ticketops.ops.dropout import draw_seed
from ticketops.ops.registration import define, same_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def residual_norm(
    x: Tensor,
    residual: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    eps: float = 1e-12,
) -> Tensor:
    """Applies dropout to a sublayer's output, adds the residual, and normalises. Sums and statistics are in float32
    (float64 for float64 inputs).

    Autocast has no effect: the residual keeps its dtype, and a bfloat16 `x` may be added to a float32 residual.

    Args:
        x: [T, C], output of the sublayer's last matrix product; float64, float32, bfloat16 or float16.
        residual: [T, C], input of the sublayer; x's dtype, or float32.
        gamma: [C], weight of the LayerNorm; any floating-point dtype.
        beta: [C], bias of the LayerNorm.
        bias: [C], added to x before the dropout; None adds nothing.
        dropout_p: probability in [0, 1) of dropping an element of x + bias.
        eps: added to the variance.

    Returns:
        [T, C], contiguous, in the residual's dtype.

    Raises:
        InputError: shapes, dtypes or values that do not fit together.
        UnsupportedError: a dtype that no backend serves.
    """
    same_dtype("residual_norm", DTYPES, x=x)
    if x.ndim != 2 or x.shape != residual.shape or not x.shape[1]:
        raise InputError(
            f"residual_norm needs x and residual of one shape [T, C], got {tuple(x.shape)} and {tuple(residual.shape)}"
        )
    if residual.device != x.device or residual.dtype not in (x.dtype, _statistics_dtype(x.dtype)):
        raise InputError(
            f"residual_norm needs a residual of x's dtype or float32 on x's device, got {residual.dtype} on "
            f"{residual.device} for x: {x.dtype} on {x.device}"
        )
    channels = x.shape[1]
    for name, vector in (("gamma", gamma), ("beta", beta), ("bias", bias)):
        if vector is not None and (vector.shape != (channels,) or vector.device != x.device):
            raise InputError(
                f"residual_norm needs {name} of shape [{channels}] on {x.device}, got {list(vector.shape)} on "
                f"{vector.device}"
            )
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p must be in [0, 1), got {dropout_p}")
    seed = draw_seed(x.device) if dropout_p else None
    out, _, _ = _residual_norm_op(x, residual, bias, gamma, beta, seed, dropout_p, eps)
    return out


def _statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _forward(x, residual, bias, gamma, beta, seed, dropout_p, eps):
    return implementation("residual", x.device, x.dtype).forward(x, residual, bias, gamma, beta, seed, dropout_p, eps)


def _fake_forward(x, residual, bias, gamma, beta, seed, dropout_p, eps):
    mean = x.new_empty(x.shape[:1], dtype=_statistics_dtype(x.dtype))
    return residual.new_empty(residual.shape), mean, torch.empty_like(mean)


def _backward(dout, x, residual, bias, gamma, mean, rstd, seed, dropout_p, vectors):
    return implementation("residual", x.device, x.dtype).backward(
        dout, x, residual, bias, gamma, mean, rstd, seed, dropout_p, vectors=vectors
    )


def _own_dx(x: Tensor, residual: Tensor, dropout_p: float) -> bool:
    """True if dx is a tensor of its own. Without dropout and with one dtype it equals dresidual."""
    return bool(dropout_p) or x.dtype != residual.dtype


def _fake_backward(dout, x, residual, bias, gamma, mean, rstd, seed, dropout_p, vectors):
    vector = mean.new_empty(x.shape[1:] if vectors else (0,))
    dx = x.new_empty(x.shape if _own_dx(x, residual, dropout_p) else (0,))
    return dx, residual.new_empty(residual.shape), vector, torch.empty_like(vector), torch.empty_like(vector)


def _setup_context(ctx, inputs, output):
    x, residual, bias, gamma, beta, seed, ctx.dropout_p, _ = inputs
    _, mean, rstd = output
    ctx.save_for_backward(x, residual, bias, gamma, mean, rstd, seed)
    ctx.vector_dtypes = [vector.dtype for vector in (gamma if bias is None else bias, gamma, beta)]


def _gradients(ctx, dout, *_):
    # Read once: under gradient checkpointing a second access to ctx.saved_tensors is an error.
    saved = ctx.saved_tensors
    x, residual = saved[:2]
    wanted = ctx.needs_input_grad[:5]
    dx, dresidual, *vectors = _residual_norm_backward_op(dout, *saved, ctx.dropout_p, any(wanted[2:]))
    if not _own_dx(x, residual, ctx.dropout_p):
        dx = dresidual
    vectors = (vector.to(dtype) for vector, dtype in zip(vectors, ctx.vector_dtypes, strict=True))
    gradients = zip((dx, dresidual, *vectors), wanted, strict=True)
    return *(gradient if there else None for gradient, there in gradients), None, None, None


_residual_norm_op = define(
    "residual_norm(Tensor x, Tensor residual, Tensor? bias, Tensor gamma, Tensor beta, Tensor? seed, float dropout_p, "
    "float eps) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
)
_residual_norm_backward_op = define(
    "residual_norm_backward(Tensor dout, Tensor x, Tensor residual, Tensor? bias, Tensor gamma, Tensor mean, "
    "Tensor rstd, Tensor? seed, float dropout_p, bool vectors) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
