"""The masked FFN on the CPU: csrc/cpu/ffn.cpp between torch's matrix products."""

from functools import cache

import torch
from torch import Tensor

from ticketops.ops.extension import address, checked, native, refusal, run

__all__ = ["backward", "forward", "refusal"]

# csrc/cpu/kernels.h, enum Activation
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2}


@cache
def _has_bf16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices at speed; where it emulates them, they take several times as long as
    float32 ones."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = a.dtype
    if dtype == torch.bfloat16 and not _has_bf16_products():
        a, b, bias = a.float(), b.float(), None if bias is None else bias.float()
    return (a @ b if bias is None else torch.addmm(bias, a, b)).to(dtype)


def _active(neuron_mask: Tensor | None) -> Tensor | None:
    """Indices of the neurons to compute, None for all."""
    if neuron_mask is None or bool(neuron_mask.all()):
        return None
    return neuron_mask.nonzero().squeeze(1)


def _spread(x: Tensor, active: Tensor | None, dim: int, size: int) -> Tensor:
    """Puts what was computed for the active neurons among zeros for the others."""
    if active is None:
        return x
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy_(dim, active, x)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ticketops.ops.ffn.reference.forward.

    Returns:
        out [T, C], the input of the activation [T, N] and its output before the mask [T, N].
    """
    tokens, neurons = x.shape[0], w1.shape[0]
    scale = 1.0 if ffn_mask is None else float(ffn_mask)
    if not scale:
        return torch.zeros_like(x), x.new_zeros((tokens, neurons)), x.new_zeros((tokens, neurons))
    active = _active(neuron_mask)
    if neuron_mask is not None and active is not None:
        w1, b1, w2, neuron_mask = w1[active], b1[active], w2[:, active], neuron_mask[active]
    pre = _product(x, w1.t(), b1)
    hidden = torch.empty_like(pre)
    masked = hidden if neuron_mask is None else torch.empty_like(pre)
    neuron_mask = checked("neuron_mask", neuron_mask, torch.float32, pre.shape[1])
    run(
        native.ffn_forward,
        *(x.dtype == torch.bfloat16, _ACTIVATIONS[activation], address(pre), address(hidden)),
        *(address(masked) if neuron_mask is not None else 0, address(neuron_mask), *pre.shape),
    )
    out = _product(masked, w2.t(), b2)
    if scale != 1:
        out.mul_(scale)
    return out, _spread(pre, active, 1, neurons), _spread(hidden, active, 1, neurons)


def backward(
    dout: Tensor,
    out: Tensor | None,
    pre: Tensor,
    hidden: Tensor,
    x: Tensor,
    w1: Tensor,
    w2: Tensor,
    starts: Tensor,
    lengths: Tensor,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    weight_gradients: bool,
    token_sums: bool,
    neuron_sums: bool,
    neuron_absolute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ticketops.ops.ffn.reference.backward.

    Returns:
        dx; dw1, db1, dw2, db2; the signed and absolute sums of <dOut, Y> over each sequence's tokens; the sums of G * H
        over each sequence's tokens.
    """
    (tokens, channels), (neurons, batch) = x.shape, (w1.shape[0], len(lengths))
    bf16 = x.dtype == torch.bfloat16
    starts = checked("starts", starts, torch.int32, batch)
    lengths = checked("lengths", lengths, torch.int32, batch)
    dout = checked("dout", dout, x.dtype, tokens, channels)
    scale = 1.0 if ffn_mask is None else float(ffn_mask)
    # Zeros are the answer only where the FFN is masked out; everywhere else a kernel writes every element.
    create = torch.empty if scale else torch.zeros
    signed, absolute = (create(batch if token_sums else 0, dtype=torch.float32) for _ in range(2))
    if not scale:
        dw1, db1, dw2, db2 = (
            x.new_zeros(shape if weight_gradients else (0,))
            for shape in ((neurons, channels), (neurons,), (channels, neurons), (channels,))
        )
        by_neuron = torch.zeros((batch, neurons) if neuron_sums else (0,), dtype=torch.float32)
        return torch.zeros_like(x), dw1, db1, dw2, db2, signed, absolute, by_neuron
    if token_sums:
        out = checked("out", out, x.dtype, tokens, channels)
        run(
            native.token_sums,
            *(bf16, address(dout), address(out), address(starts), address(lengths), scale),
            *(address(signed), address(absolute), batch, tokens, channels),
        )

    active = _active(neuron_mask)
    if neuron_mask is not None and active is not None:
        pre, hidden, w1, w2, neuron_mask = (
            pre[:, active],
            hidden[:, active],
            w1[active],
            w2[:, active],
            neuron_mask[active],
        )
    computed = w1.shape[0]
    pre = checked("pre", pre, x.dtype, tokens, computed)
    hidden = checked("hidden", hidden, x.dtype, tokens, computed)
    neuron_mask = checked("neuron_mask", neuron_mask, torch.float32, computed)
    dy = dout if scale == 1 else dout * scale
    # [T, n], turned from dY W2 into the gradient of `pre` in place.
    dpre = _product(dy, w2)
    masked = torch.empty_like(hidden) if weight_gradients and neuron_mask is not None else None
    db1 = torch.empty(computed if weight_gradients else 0, dtype=torch.float32)
    by_neuron = torch.empty((batch, computed) if neuron_sums else 0, dtype=torch.float32)
    run(
        native.ffn_backward,
        *(bf16, _ACTIVATIONS[activation], address(dpre), address(pre), address(hidden), address(masked)),
        *(
            address(neuron_mask),
            address(db1 if weight_gradients else None),
            address(by_neuron if neuron_sums else None),
        ),
        *(neuron_absolute, address(starts), address(lengths), batch, tokens, computed),
    )
    if neuron_sums:
        by_neuron = _spread(by_neuron, active, 1, neurons)
    dx = _product(dpre, w1)
    dw1 = dw2 = db2 = x.new_empty(0)
    db1 = db1.to(x.dtype)
    if weight_gradients:
        dw1 = _spread(_product(dpre.t(), x), active, 0, neurons)
        db1 = _spread(db1, active, 0, neurons)
        dw2 = _spread(_product(dy.t(), hidden if masked is None else masked), active, 1, neurons)
        db2 = dy.sum(0)
    return dx, dw1, db1, dw2, db2, signed, absolute, by_neuron
