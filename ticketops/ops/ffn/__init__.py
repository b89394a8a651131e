"""Masked feed-forward network (FFN), as one autograd op for all backends.

    out[t] = ffn_mask * ((neuron_mask * dropout(act(x[t] W1^T + b1))) W2^T + b2)

In a gated FFN (GLU) the first layer has twice as many rows, [W1; V] with biases [b1; c], and the activations are
act(x[t] W1^T + b1) * (x[t] V^T + c); the rest is the same. Each layer may have no bias.

An FFN or neuron whose mask is 0 is not computed: its output and all its gradients, that of the mask included, are 0.
With Y the output and H the activations before the masks, the gradients of the masks are dL/dffn_mask = sum <dOut, Y>
and dL/dneuron_mask = sum (ffn_mask dOut W2) * H.

Blocks of neurons can also be selected by an index whose length the host knows; then the others cost nothing on any
backend. As with selected heads (see ops.projection), their weights are copied out and multiplied densely.
"""

import torch
from torch import Tensor

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops.backends import implementation
from ticketops.ops.dropout import draw_seed
from ticketops.ops.ffn.reference import first_places
from ticketops.ops.packing import Sequences
from ticketops.ops.registration import autocast, define, same_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")


def ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    sequences: Sequences,
    *,
    activation: str = "gelu",
    gated: bool = False,
    dropout_p: float = 0.0,
    ffn_mask: Tensor | None = None,
    neuron_mask: Tensor | None = None,
    importance: Tensor | None = None,
    neuron_importance: Tensor | None = None,
    per_token: bool = False,
    blocks: Tensor | None = None,
    count: int = 1,
) -> Tensor:
    """Computes two linear layers with an activation between them, with a mask value for the FFN and one per neuron.

    Args:
        x: [T, C] tokens; float64, float32, bfloat16 or float16.
        w1: [N, C] weight of the first linear layer, with N neurons; [2N, C] if `gated`, with the gate's rows last.
        b1: [N] bias of the first layer ([2N] if `gated`), or None.
        w2: [C, N] weight of the second linear layer.
        b2: [C] bias of the second layer, or None.
        sequences: rows of each sequence, for importance and the masks' gradients, to which rows outside all sequences
            do not contribute.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        gated: True multiplies the activations by a gate.
        dropout_p: probability in [0, 1) of dropping a neuron's activation, after the gate.
        ffn_mask: scalar tensor that multiplies the output, bias included; None means 1. Differentiable.
        neuron_mask: [N], multiplies the activations; None means ones. Differentiable.
        importance: [B] float tensor that requires a gradient, as a sink: its values are not read, and its gradient is
            the importance of each sequence, sum_t <dOut, Y>, or sum_t |<dOut, Y>| with `per_token`.
        neuron_importance: [B, N], a sink like `importance`, for each neuron.
        per_token: True sums the absolute values of the tokens' terms.
        blocks: int64 [K] on x's device, indices of the selected blocks of N / count neurons, ascending and unique; None
            selects all. With `blocks`, `neuron_mask` and `neuron_importance` have one value per selected neuron, so
            K * N / count instead of N.
        count: number of blocks in the weights.

    Returns:
        [T, C] in x's dtype (autocast's dtype under autocast).

    Raises:
        InputError: shapes or dtypes that do not fit together.
        UnsupportedError: an activation or dtype that no backend serves.

    Source:
        Liang et al. 2021, section 3; neuron masks go beyond the paper.
    """
    if blocks is not None:
        if blocks.ndim != 1 or blocks.dtype != torch.int64 or w2.shape[1] % count:
            raise InputError(
                f"ffn needs int64 blocks [K] and {w2.shape[1]} neurons in equal blocks, got {blocks.dtype} blocks "
                f"{list(blocks.shape)} and {count} blocks"
            )
        w1, b1, w2 = _compacted(w1, b1, w2, blocks, count, gated)
    tensors = {"x": x, "w1": w1, "b1": b1, "w2": w2, "b2": b2}
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    present = dict(zip(present, autocast(*present.values()), strict=True))
    same_dtype("ffn", DTYPES, **present)
    x, w1, b1, w2, b2 = present["x"], present["w1"], present.get("b1"), present["w2"], present.get("b2")
    if activation not in ACTIVATIONS:
        raise UnsupportedError(
            f"ffn does not support the activation {activation!r}: use one of {', '.join(ACTIVATIONS)}"
        )
    if not 0.0 <= dropout_p < 1.0:
        raise InputError(f"dropout_p must be in [0, 1), got {dropout_p}")
    channels, neurons = w2.shape
    wanted = {"w1": ((1 + gated) * neurons, channels), "b1": ((1 + gated) * neurons,), "b2": (channels,)}
    shapes = {name: tuple(tensor.shape) for name, tensor in present.items()}
    if x.ndim != 2 or x.shape[1] != channels or any(shapes.get(name, shape) != shape for name, shape in wanted.items()):
        first = "2N" if gated else "N"
        raise InputError(f"ffn needs x [T, C], w1 [{first}, C], b1 [{first}], w2 [C, N], b2 [C], got {shapes}")
    for name, tensor, shape in (
        ("ffn_mask", ffn_mask, ()),
        ("neuron_mask", neuron_mask, (neurons,)),
        ("importance", importance, (len(sequences),)),
        ("neuron_importance", neuron_importance, (len(sequences), neurons)),
    ):
        if tensor is not None and tensor.shape != shape:
            raise InputError(f"ffn needs {name} of shape {list(shape)}, got {list(tensor.shape)}")
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    out, _, _ = _ffn_op(
        x,
        w1,
        b1,
        w2,
        b2,
        sequences.starts,
        sequences.lengths,
        None if ffn_mask is None else ffn_mask.to(statistics),
        None if neuron_mask is None else neuron_mask.to(statistics),
        importance,
        neuron_importance,
        draw_seed(x.device) if dropout_p else None,
        activation,
        per_token,
        dropout_p,
    )
    return out


def _compacted(
    w1: Tensor, b1: Tensor | None, w2: Tensor, blocks: Tensor, count: int, gated: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Copies the weights of the selected neurons; autograd scatters the gradients back."""
    rows, groups = first_places(blocks, count, gated), (1 + gated) * count
    w1 = w1.unflatten(0, (groups, -1)).index_select(0, rows).flatten(0, 1)
    if b1 is not None:
        b1 = b1.unflatten(0, (groups, -1)).index_select(0, rows).flatten()
    return w1, b1, w2.unflatten(1, (count, -1)).index_select(1, blocks).flatten(1)


def _forward(
    x,
    w1,
    b1,
    w2,
    b2,
    starts,
    lengths,
    ffn_mask,
    neuron_mask,
    importance,
    neuron_importance,
    seed,
    activation,
    per_token,
    dropout_p,
):
    with torch.autocast(x.device.type, enabled=False):
        return implementation("ffn", x.device, x.dtype).forward(
            *(x, w1, b1, w2, b2, ffn_mask, neuron_mask, activation),
            seed=seed,
            dropout_p=dropout_p,
        )


def _fake_forward(x, w1, b1, w2, *others):
    return x.new_empty(x.shape), x.new_empty((x.shape[0], w1.shape[0])), x.new_empty((x.shape[0], w2.shape[1]))


def _backward(dout, *others):
    *others, seed, dropout_p = others
    with torch.autocast(dout.device.type, enabled=False):
        return implementation("ffn", dout.device, dout.dtype).backward(dout, *others, seed=seed, dropout_p=dropout_p)


def _fake_backward(
    dout,
    out,
    pre,
    hidden,
    x,
    w1,
    w2,
    starts,
    lengths,
    ffn_mask,
    neuron_mask,
    activation,
    wanted,
    token_sums,
    neuron_sums,
    neuron_absolute,
    seed,
    dropout_p,
):
    batch, neurons = lengths.shape[0], w2.shape[1]
    statistics = torch.float64 if dout.dtype == torch.float64 else torch.float32

    def sums(needed, *shape):
        return dout.new_empty(shape if needed else (0,), dtype=statistics)

    shapes = (dout.shape, w1.shape, w1.shape[:1], w2.shape, w2.shape[:1])
    return (
        *(
            (dout if like is dout.shape else w1).new_empty(like if needed else (0,))
            for like, needed in zip(shapes, wanted, strict=True)
        ),
        sums(token_sums, batch),
        sums(token_sums, batch),
        sums(neuron_sums, batch, neurons),
    )


def _setup_context(ctx, inputs, output):
    (
        x,
        w1,
        _,
        w2,
        _,
        starts,
        lengths,
        ffn_mask,
        neuron_mask,
        importance,
        neuron_importance,
        seed,
        ctx.activation,
        ctx.per_token,
        ctx.dropout_p,
    ) = inputs
    out, pre, hidden = output
    ctx.recording = importance is not None
    ctx.neuron_recording = neuron_importance is not None
    needs = ctx.needs_input_grad
    # Save only tensors that the wanted gradients are computed from.
    kept = {
        "out": ctx.recording or needs[7],
        "pre": any(needs[:3]) or ctx.neuron_recording or needs[8],
        "hidden": needs[3] or ctx.neuron_recording or needs[8],
        "x": needs[1],
    }
    out, pre, hidden, x = (
        tensor if needed else None for tensor, needed in zip((out, pre, hidden, x), kept.values(), strict=True)
    )
    ctx.save_for_backward(out, pre, hidden, x, w1, w2, starts, lengths, ffn_mask, neuron_mask, seed)
    ctx.importance_dtypes = [None if sink is None else sink.dtype for sink in (importance, neuron_importance)]


def _gradients(ctx, dout, *_):
    out, pre, hidden, x, w1, w2, starts, lengths, ffn_mask, neuron_mask, seed = ctx.saved_tensors
    needs = ctx.needs_input_grad
    mask_wanted, neuron_mask_wanted = needs[7], needs[8]
    if neuron_mask_wanted and ctx.neuron_recording and ctx.per_token:
        raise UnsupportedError(
            "per-token neuron importance and a trainable neuron_mask need two passes: record without training the mask"
        )
    *gradients, signed, absolute, by_neuron = _ffn_backward_op(
        dout,
        out,
        pre,
        hidden,
        x,
        w1,
        w2,
        starts,
        lengths,
        ffn_mask,
        neuron_mask,
        ctx.activation,
        list(needs[:5]),
        ctx.recording or mask_wanted,
        ctx.neuron_recording or neuron_mask_wanted,
        ctx.per_token and ctx.neuron_recording,
        seed,
        ctx.dropout_p,
    )
    dmask = signed.sum() if mask_wanted else None
    dneuron_mask = by_neuron.sum(0) if neuron_mask_wanted else None
    dtype, neuron_dtype = ctx.importance_dtypes
    partial = (absolute if ctx.per_token else signed).to(dtype) if ctx.recording else None
    neuron_partial = by_neuron.to(neuron_dtype) if ctx.neuron_recording else None
    gradients = [gradient if needed else None for gradient, needed in zip(gradients, needs[:5], strict=True)]
    return *gradients, None, None, dmask, dneuron_mask, partial, neuron_partial, *[None] * 4


_ffn_op = define(
    "ffn(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor starts, Tensor lengths, Tensor? ffn_mask, "
    "Tensor? neuron_mask, Tensor? importance, Tensor? neuron_importance, Tensor? seed, str activation, bool per_token, "
    "float dropout_p) -> (Tensor, Tensor, Tensor)",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
)
_ffn_backward_op = define(
    "ffn_backward(Tensor dout, Tensor? out, Tensor? pre, Tensor? hidden, Tensor? x, Tensor w1, Tensor w2, "
    "Tensor starts, Tensor lengths, Tensor? ffn_mask, Tensor? neuron_mask, str activation, bool[] wanted, "
    "bool token_sums, bool neuron_sums, bool neuron_absolute, Tensor? seed, float dropout_p) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
