"""Reference implementation of the masked FFN in plain PyTorch. All other backends are tested against it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ticketops.ops.dropout import keep_elements


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None: the reference serves every device and dtype."""
    return None


def _activate(pre: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return functional.relu(pre)
    if activation == "silu":
        return functional.silu(pre)
    return functional.gelu(pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def _activate_backward(gradient: Tensor, pre: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return torch.ops.aten.threshold_backward(gradient, pre, 0)
    if activation == "silu":
        return torch.ops.aten.silu_backward(gradient, pre)
    return torch.ops.aten.gelu_backward(gradient, pre, approximate="tanh" if activation == "gelu_tanh" else "none")


def first_places(places: Tensor, structures: int, gated: bool) -> Tensor:
    """Returns the row indices of some neurons, or blocks of neurons, in the first layer's weight.

    Args:
        places: int64 [K], indices of the neurons or blocks.
        structures: number of neurons or blocks in the FFN.
        gated: True if the first layer has a second set of rows, for the gate, after the first.

    Returns:
        int64 [K]; [2K] if `gated`.
    """
    return torch.cat((places, places + structures)) if gated else places


def _select_neurons(neuron_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Returns the indices of neurons whose mask is not 0 (None for all), and their mask values (None for ones)."""
    if neuron_mask is None or bool((neuron_mask != 0).all()):
        return None, neuron_mask
    active = neuron_mask.nonzero().squeeze(1)
    return active, neuron_mask[active]


def _dropout(x: Tensor, seed: Tensor | None, dropout_p: float, active: Tensor | None, neurons: int) -> Tensor:
    """Applies the dropout of [T, neurons] to the columns of the active neurons."""
    if not dropout_p:
        return x
    keep = keep_elements(seed, x.shape[0], neurons, dropout_p, x.device)
    return torch.where(keep if active is None else keep[:, active], x / (1 - dropout_p), 0.0)


def _sequence_sums(terms: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """Sums [T, ...] over the rows of each sequence: [B, ...]."""
    sums = terms.new_zeros((len(lengths), *terms.shape[1:]))
    for b, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        torch.sum(terms[start : start + n], 0, out=sums[b])
    return sums


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
    """See ticketops.ops.ffn. The FFN is gated if w1 has twice as many neurons as w2.

    Returns:
        out [T, C]; the first layer's output [T, N] ([T, 2N] if gated); and the activations after dropout, before the
        mask [T, N]. The last two are 0 for neurons that are not computed.
    """
    first, neurons = w1.shape[0], w2.shape[1]
    if ffn_mask is not None and not ffn_mask:
        return torch.zeros_like(x), x.new_zeros((x.shape[0], first)), x.new_zeros((x.shape[0], neurons))
    active, scale = _select_neurons(neuron_mask)
    rows = None if active is None else first_places(active, neurons, first != neurons)
    if active is not None:
        w1, b1, w2 = w1[rows], None if b1 is None else b1[rows], w2[:, active]
    pre = functional.linear(x, w1, b1)
    if first == neurons:
        hidden = _activate(pre, activation)
    else:
        value, gate = pre.chunk(2, 1)
        hidden = _activate(value, activation) * gate
    hidden = _dropout(hidden, seed, dropout_p, active, neurons)
    out = functional.linear(hidden if scale is None else hidden * scale.to(hidden.dtype), w2, b2)
    if active is not None and rows is not None:
        pre = x.new_zeros((x.shape[0], first)).index_copy_(1, rows, pre)
        hidden = x.new_zeros((x.shape[0], neurons)).index_copy_(1, active, hidden)
    if ffn_mask is not None:
        out.mul_(ffn_mask.to(out.dtype))
    return out, pre, hidden


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
    token_sums: bool,
    neuron_sums: bool,
    neuron_absolute: bool,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of `forward` and the importance of each sequence.

    With n the neuron mask, m the FFN mask, H = act(A), A = x W1^T + b1 and dY = m dOut:
        dW2 = dY^T (H n),   db2 = sum dY,   G = dY W2,   dA = G n act'(A),   dx = dA W1,   dW1 = dA^T x,   db1 = sum dA,
        dL/dm = sum <dOut, Y> = sum <dOut, out> / m,   dL/dn = sum G * H.
    Of a gated FFN, with U = x V^T + c and H = act(A) * U:
        dA = G n U act'(A),   dU = G n act(A),   and [dA, dU] replaces dA in the formulas for dx, dW1 and db1.
    With dropout, H includes R = keep / (1 - p), which multiplies G in dA and dU.

    Args:
        pre: as `forward` returned it; may be None if only dw2, db2 and `token_sums` are wanted.
        hidden: as `forward` returned it; may be None if neither dw2 nor `neuron_sums` is wanted.
        x: may be None if dw1 is not wanted.
        wanted: five flags, for dx, dw1, db1, dw2 and db2.
        token_sums: True computes the importance of the FFN.
        neuron_sums: True computes the importance of neurons.
        neuron_absolute: True sums absolute values in the importance of neurons.

    Returns:
        dx, dw1, db1, dw2, db2 (each empty unless wanted); the sums of <dOut, Y> and of |<dOut, Y>| over each sequence's
        tokens, both [B] (empty unless `token_sums`); and the sums of G * H, or of |G * H|, over each sequence's tokens
        [B, N] (empty unless `neuron_sums`).
    """
    first, channels = w1.shape
    neurons, batch = w2.shape[1], len(lengths)
    statistics = torch.float64 if dout.dtype == torch.float64 else torch.float32

    def sums(there: bool, *shape: int) -> Tensor:
        return dout.new_zeros(shape if there else (0,), dtype=statistics)

    signed, absolute, by_neuron = sums(token_sums, batch), sums(token_sums, batch), sums(neuron_sums, batch, neurons)
    if ffn_mask is not None and not ffn_mask:
        return *zeros(dout, w1, w2, wanted), signed, absolute, by_neuron
    if token_sums:
        assert out is not None
        # [T]
        terms = (dout.to(statistics) * out.to(statistics)).sum(-1)
        if ffn_mask is not None:
            terms.div_(ffn_mask)
        signed = _sequence_sums(terms, starts, lengths)
        absolute = _sequence_sums(terms.abs(), starts, lengths)

    active, scale = _select_neurons(neuron_mask)
    rows = None if active is None else first_places(active, neurons, first != neurons)
    if active is not None:
        w1, w2 = w1[rows], w2[:, active]
        pre = None if pre is None else pre[:, rows]
        hidden = None if hidden is None else hidden[:, active]
    dy = dout if ffn_mask is None else dout * ffn_mask.to(dout.dtype)
    dx = dw1 = db1 = dw2 = db2 = dout.new_empty(0)
    if neuron_sums or any(wanted[:3]):
        # [T, n]
        gradient = dy @ w2
    if neuron_sums:
        assert hidden is not None
        terms = gradient.to(statistics) * hidden.to(statistics)
        some = _sequence_sums(terms.abs() if neuron_absolute else terms, starts, lengths)
        by_neuron = some if active is None else by_neuron.index_copy_(1, active, some)
    if any(wanted[:3]):
        assert pre is not None
        if scale is not None:
            gradient = gradient * scale.to(gradient.dtype)
        gradient = _dropout(gradient, seed, dropout_p, active, neurons)
        if first == neurons:
            dpre = _activate_backward(gradient, pre, activation)
        else:
            value, gate = pre.chunk(2, 1)
            dvalue = _activate_backward(gradient * gate, value, activation)
            dpre = torch.cat((dvalue, gradient * _activate(value, activation)), 1)
        if wanted[0]:
            dx = dpre @ w1
        if wanted[1]:
            assert x is not None
            dw1 = dpre.t() @ x
        if wanted[2]:
            db1 = dpre.sum(0)
    if wanted[3]:
        assert hidden is not None
        dw2 = dy.t() @ (hidden if scale is None else hidden * scale.to(hidden.dtype))
    if wanted[4]:
        db2 = dy.sum(0)
    if active is not None and rows is not None:
        if wanted[1]:
            dw1 = dout.new_zeros((first, channels)).index_copy_(0, rows, dw1)
        if wanted[2]:
            db1 = dout.new_zeros(first).index_copy_(0, rows, db1)
        if wanted[3]:
            dw2 = dout.new_zeros((channels, neurons)).index_copy_(1, active, dw2)
    return dx, dw1, db1, dw2, db2, signed, absolute, by_neuron


def zeros(
    dout: Tensor, w1: Tensor, w2: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of an FFN whose mask is 0: zeros, or an empty tensor for each gradient not wanted."""
    shapes = (dout.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    dx, dw1, db1, dw2, db2 = (
        dout.new_zeros(shape if there else (0,)) for shape, there in zip(shapes, wanted, strict=True)
    )
    return dx, dw1, db1, dw2, db2
