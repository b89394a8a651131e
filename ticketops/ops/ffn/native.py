"""The masked FFN on the CPU: csrc/cpu/ffn.cpp between torch's matrix products."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.extension import address, checked, dropout_arguments, native, refusal, run
from ticketops.ops.ffn.reference import first_places, zeros
from ticketops.ops.memory import empty
from ticketops.ops.products import gradient_product, product

__all__ = ["backward", "forward", "refusal"]

#: csrc/cpu/kernels.h, enum Activation.
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "relu": 2, "silu": 3}


def _active(neuron_mask: Tensor | None, dropout_p: float) -> Tensor | None:
    """Returns the indices of the neurons to compute, None for all: those whose mask is not 0. With dropout, whose draws
    count all neurons, it is all."""
    if neuron_mask is None or dropout_p or bool(neuron_mask.all()):
        return None
    return neuron_mask.nonzero().squeeze(1)


def _spread(x: Tensor, active: Tensor | None, dim: int, size: int) -> Tensor:
    """Expands a tensor of the active neurons to all neurons along `dim`, with zeros for the others."""
    if active is None:
        return x
    shape = list(x.shape)
    shape[dim] = size
    return x.new_zeros(shape).index_copy_(dim, active, x)


def activate(
    pre: Tensor,
    activation: str,
    neuron_mask: Tensor | None = None,
    gated: bool = False,
    in_place: bool = False,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Applies the activation and the dropout and, if gated, multiplies by the gate.

    Args:
        pre: [T, N], or [T, 2N] if `gated`.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        neuron_mask: float32 [N], or None for ones.
        gated: True if the second half of `pre` is the gate of the first.
        in_place: True overwrites `pre`; not supported with a gate.
        bias: float32 [N] to add to `pre` first ([2N] if `gated`), or None.
        seed: int64 [1], seed of the dropout; None without.
        dropout_p: probability of dropping an activation.

    Returns:
        hidden = dropout(act(pre + bias) * gate), and hidden * neuron_mask; the same tensor twice without a mask.
    """
    pre = checked("pre", pre, pre.dtype, *pre.shape)
    tokens, neurons = pre.shape[0], pre.shape[1] // (1 + gated)
    hidden = pre if in_place else empty((tokens, neurons), pre.dtype)
    masked = hidden if neuron_mask is None else torch.empty_like(hidden)
    neuron_mask = checked("neuron_mask", neuron_mask, torch.float32, neurons)
    bias = checked("bias", bias, torch.float32, pre.shape[1])
    run(
        native.ffn_forward,
        *(pre.dtype == torch.bfloat16, ACTIVATIONS[activation], address(pre), address(bias), address(hidden)),
        *(address(masked) if neuron_mask is not None else 0, address(neuron_mask), gated, tokens, neurons),
        *dropout_arguments(seed, dropout_p),
    )
    return hidden, masked


def activate_backward(
    gradient: Tensor,
    pre: Tensor,
    hidden: Tensor | None,
    masked: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    bias_sums: bool,
    neuron_sums: bool,
    neuron_absolute: bool,
    starts: Tensor,
    lengths: Tensor,
    target: Tensor | None = None,
    bias: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Computes the gradient of the activation's input from that of the masked activations, in place unless gated.

    Args:
        gradient: contiguous [T, N], gradient of the masked activations; overwritten with the result unless gated.
        pre: [T, N], the activation's input; [T, 2N] with a gate.
        hidden: [T, N], the activations before the mask; may be None if neither `masked` nor `neuron_sums` is wanted.
        masked: [T, N] to write hidden * neuron_mask to, or None.
        neuron_mask: float32 [N], or None for ones.
        activation: "gelu", "gelu_tanh", "relu" or "silu".
        bias_sums: True computes the column sums of the result, the gradient of the bias.
        neuron_sums: True computes the sums of gradient * hidden over each sequence's tokens.
        neuron_absolute: True sums absolute values in `neuron_sums`.
        starts, lengths: int32 [B], first row and number of rows of each sequence.
        target: contiguous [T, 2N] to write the gradient of a gated `pre` to; None without a gate.
        bias, seed, dropout_p: as in `activate`.

    Returns:
        Column sums [N] or [2N], and sums by sequence [B, N], in float32; empty if not wanted.
    """
    (tokens, neurons), batch = gradient.shape, lengths.shape[0]
    gated = target is not None
    first = 2 * neurons if gated else neurons
    if not gradient.is_contiguous():
        raise InputError("the native kernel needs gradient contiguous, since it is changed in place")
    gradient = checked("gradient", gradient, pre.dtype, tokens, neurons)
    pre = checked("pre", pre, pre.dtype, tokens, first)
    target = gradient if target is None else checked("target", target, pre.dtype, tokens, first)
    hidden = checked("hidden", hidden, pre.dtype, tokens, neurons)
    masked = checked("masked", masked, pre.dtype, tokens, neurons)
    starts = checked("starts", starts, torch.int32, batch)
    lengths = checked("lengths", lengths, torch.int32, batch)
    neuron_mask = checked("neuron_mask", neuron_mask, torch.float32, neurons)
    bias = checked("bias", bias, torch.float32, first)
    by_bias = empty(first if bias_sums else 0)
    by_neuron = empty((batch, neurons) if neuron_sums else 0)
    run(
        native.ffn_backward,
        *(pre.dtype == torch.bfloat16, ACTIVATIONS[activation], address(gradient), address(target), address(pre)),
        *(
            address(bias),
            address(hidden),
            address(masked),
            address(neuron_mask),
            address(by_bias if bias_sums else None),
        ),
        *(address(by_neuron if neuron_sums else None), neuron_absolute, address(starts), address(lengths)),
        *(gated, batch, tokens, neurons, *dropout_arguments(seed, dropout_p)),
    )
    return by_bias, by_neuron


def add_(total: Tensor, x: Tensor) -> Tensor:
    """Adds x to total in place, where one is float32 and the other bfloat16. torch would cast x in a separate pass.

    Args:
        total: contiguous [T, C].
        x: [T, C], or [C] to add to every row.

    Returns:
        `total`.
    """
    if not total.is_contiguous():
        raise InputError("the native kernel needs total contiguous, since it is changed in place")
    total = checked("total", total, total.dtype, *total.shape)
    other = torch.float32 if total.dtype == torch.bfloat16 else torch.bfloat16
    x = checked("x", x, other, *total.shape[-x.ndim :])
    run(
        native.add,
        *(total.dtype == torch.bfloat16, address(total), address(x), x.stride(0) if x.ndim > 1 else 0, *total.shape),
    )
    return total


def column_sums(x: Tensor) -> Tensor:
    """Sums a matrix over its rows, for the gradient of a bias.

    Args:
        x: [T, C], float32 or bfloat16.

    Returns:
        [C] in float32.
    """
    x = checked("x", x, x.dtype, *x.shape)
    sums = empty(x.shape[1])
    run(native.column_sums, *(x.dtype == torch.bfloat16, address(x), address(sums), *x.shape))
    return sums


def token_sums(
    dout: Tensor, out: Tensor, starts: Tensor, lengths: Tensor, mask: float, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes the importance of the FFN for each sequence.

    Args:
        dout, out: [T, C], gradient of the output and the output.
        starts, lengths: int32 [B], first row and number of rows of each sequence.
        mask: mask value of the FFN, not 0.
        bias: float32 [C] to add to `out` first, or None.

    Returns:
        The sums over each sequence's tokens of <dout, out + bias> / mask, and of its absolute value, both [B].
    """
    (tokens, channels), batch = out.shape, lengths.shape[0]
    dout = checked("dout", dout, out.dtype, tokens, channels)
    out = checked("out", out, out.dtype, tokens, channels)
    starts = checked("starts", starts, torch.int32, batch)
    lengths = checked("lengths", lengths, torch.int32, batch)
    bias = checked("bias", bias, torch.float32, channels)
    signed, absolute = (empty(batch) for _ in range(2))
    run(
        native.token_sums,
        *(out.dtype == torch.bfloat16, address(dout), address(out), address(bias), address(starts), address(lengths)),
        mask,
        *(address(signed), address(absolute), batch, tokens, channels),
    )
    return signed, absolute


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ticketops.ops.ffn.reference.forward.

    Returns:
        out [T, C]; the activation's input [T, N]; and its output, after dropout and before the mask [T, N].
    """
    tokens, first, neurons = x.shape[0], w1.shape[0], w2.shape[1]
    scale = 1.0 if ffn_mask is None else float(ffn_mask)
    if not scale:
        return torch.zeros_like(x), x.new_zeros((tokens, first)), x.new_zeros((tokens, neurons))
    active = _active(neuron_mask, dropout_p)
    rows = None if active is None else first_places(active, neurons, first != neurons)
    if neuron_mask is not None and active is not None:
        w1, b1, w2, neuron_mask = w1[rows], None if b1 is None else b1[rows], w2[:, active], neuron_mask[active]
    pre = product(x, w1.t(), b1)
    if neuron_mask is not None and dropout_p:
        # All are computed, see `_active`. Of 0, all activations are 0.
        pre.masked_fill_((neuron_mask == 0).repeat(first // neurons), 0)
    hidden, masked = activate(pre, activation, neuron_mask, first != neurons, seed=seed, dropout_p=dropout_p)
    out = product(masked, w2.t(), b2)
    if scale != 1:
        out.mul_(scale)
    return out, _spread(pre, rows, 1, first), _spread(hidden, active, 1, neurons)


def backward(
    dout: Tensor,
    out: Tensor | None,
    pre: Tensor | None,
    hidden: Tensor | None,
    x: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    starts: Tensor,
    lengths: Tensor,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    activation: str,
    wanted: Sequence[bool],
    token_wanted: bool,
    neuron_sums: bool,
    neuron_absolute: bool,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ticketops.ops.ffn.reference.backward."""
    (tokens, channels), first, neurons, batch = dout.shape, w1.shape[0], w2.shape[1], lengths.shape[0]
    dout = checked("dout", dout, dout.dtype, tokens, channels)
    scale = 1.0 if ffn_mask is None else float(ffn_mask)
    signed, absolute, by_neuron = (torch.empty(0, dtype=torch.float32, device=dout.device) for _ in range(3))
    if not scale:
        by_neuron = dout.new_zeros((batch, neurons) if neuron_sums else (0,), dtype=torch.float32)
        signed, absolute = (dout.new_zeros(batch if token_wanted else 0, dtype=torch.float32) for _ in range(2))
        return *zeros(dout, w1, w2, wanted), signed, absolute, by_neuron
    if token_wanted:
        out = checked("out", out, dout.dtype, tokens, channels)
        assert out is not None
        signed, absolute = token_sums(dout, out, starts, lengths, scale)

    active = _active(neuron_mask, dropout_p)
    rows = None if active is None else first_places(active, neurons, first != neurons)
    if neuron_mask is not None and active is not None:
        w1, w2, neuron_mask = w1[rows], w2[:, active], neuron_mask[active]
        pre = None if pre is None else pre[:, rows]
        hidden = None if hidden is None else hidden[:, active]
    dy = dout if scale == 1 else dout * scale
    dx, dw1, db1, dw2, db2 = (dout.new_empty(0) for _ in range(5))
    through = neuron_sums or any(wanted[:3])
    masked = None
    if wanted[3] and neuron_mask is not None and hidden is not None:
        masked = empty(hidden.shape, hidden.dtype)
        if not through:
            masked.copy_(hidden.float() * neuron_mask)
    if through:
        assert pre is not None
        # [T, n]: dY W2, which activate_backward overwrites with the gradient of `pre` unless the FFN is gated.
        gradient = product(dy, w2)
        dpre = gradient if first == neurons else torch.empty_like(pre, memory_format=torch.contiguous_format)
        sums, by_neuron = activate_backward(
            *(gradient, pre, hidden, masked, neuron_mask, activation, wanted[2], neuron_sums, neuron_absolute),
            *(starts, lengths, None if first == neurons else dpre, None, seed, dropout_p),
        )
        if neuron_sums:
            by_neuron = _spread(by_neuron, active, 1, neurons)
        if wanted[0]:
            dx = product(dpre, w1)
        if wanted[1]:
            assert x is not None
            dw1 = _spread(gradient_product(dpre, x), rows, 0, first)
        if wanted[2]:
            db1 = _spread(sums.to(dout.dtype), rows, 0, first)
    if wanted[3]:
        hidden = hidden if masked is None else masked
        assert hidden is not None
        dw2 = _spread(gradient_product(dy, hidden), active, 1, neurons)
    if wanted[4]:
        db2 = column_sums(dy).to(dout.dtype)
    return dx, dw1, db1, dw2, db2, signed, absolute, by_neuron
