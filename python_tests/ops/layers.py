"""A whole layer by its own op and by the ops that it is made of, and what it is held to."""

import contextlib

import pytest
import torch

from ticketops import ops
from ticketops.ops import Sequences, Weights

from .cases import assert_as_good

HEADS, DIM, CHANNELS, NEURONS = 4, 12, 40, 56
PARAMETERS = Weights._fields[:17]
#: Computed heads, computed neurons (None: all) and whether there is an FFN.
TICKETS = ((None, None, True), ([0, 2], None, True), ([3], None, False), ([], None, True), (None, [1, 5, 6, 50], True))
#: x's dtype, and autocast's.
DTYPES = ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None))


def inputs(rows, ticket, seed=0, reach=None):
    """Tokens, the result's gradient and the layer's weights, in float64; with a position bias that reaches so far."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * (shape[-1] ** -0.5 if shape[1:] else 1)

    heads, neurons, there = ticket
    width = HEADS * DIM
    weights = Weights(
        *(normal(width, CHANNELS) for _ in range(3)),
        *(normal(width) for _ in range(3)),
        *(normal(CHANNELS, width), normal(CHANNELS), normal(CHANNELS), normal(CHANNELS)),
        *(
            (normal(NEURONS, CHANNELS), normal(NEURONS), normal(CHANNELS, NEURONS), normal(CHANNELS))
            if there
            else [None] * 4
        ),
        *(normal(CHANNELS), normal(CHANNELS)),
        None
        if reach is None
        else normal(HEADS if heads is None else len(heads), 2 * reach + 1) * (2 * reach + 1) ** 0.5,
        None if heads is None else torch.tensor(heads, dtype=torch.int64),
        None if neurons is None else torch.tensor(neurons, dtype=torch.int64),
    )
    return 3 * normal(rows, CHANNELS), 3 * normal(rows, CHANNELS), weights


def composed(x, w, sequences, dropouts, sinks, per_token, activation="gelu", first_tokens=False):
    """The layer by the other ops."""
    if w.heads is None or len(w.heads):
        groups = torch.arange(HEADS, device=x.device) if w.heads is None else w.heads
        qkv = ops.project_rows(x, w[:3], w[3:6], groups, HEADS)
        q, k, v = (y.view(len(x), len(groups), DIM) for y in qkv)
        context = ops.attention(
            *(q, k, v, sequences),
            dropout_p=dropouts[0],
            scale=DIM**-0.5,
            importance=sinks[0],
            per_token=per_token,
            position_bias=w.position_bias,
        )
        if first_tokens:
            context = context[sequences.first_rows(len(x))]
        projected = ops.project_columns(context.flatten(1), w.wo, groups, HEADS)
    if first_tokens:
        alone = torch.ones_like(sequences.lengths)
        x, sequences = x[sequences.first_rows(len(x))], Sequences.from_lengths(alone)
    if w.heads is not None and not len(w.heads):
        projected = torch.zeros_like(x)
    x = ops.residual_norm(projected, x, w.gamma1, w.beta1, bias=w.bo, dropout_p=dropouts[1], eps=1e-12)
    if w.w1 is None:
        return torch.nn.functional.layer_norm(x, x.shape[1:], w.gamma2, w.beta2, 1e-12)
    w1, b1, w2 = w.w1, w.b1, w.w2
    if w.neurons is not None:
        w1, b1, w2 = w1[w.neurons], b1[w.neurons], w2[:, w.neurons]
    output = ops.ffn(
        *(x, w1, b1, w2, w.b2, sequences),
        activation=activation,
        importance=sinks[1],
        neuron_importance=sinks[2],
        per_token=per_token,
    )
    return ops.residual_norm(output, x, w.gamma2, w.beta2, dropout_p=dropouts[2], eps=1e-12)


def whole(x, w, sequences, dropouts, sinks, per_token, activation="gelu", first_tokens=False):
    """The layer by its own op."""
    assert ops.serves_layer(x, w.wq)
    return ops.encoder_layer(
        *(x, w, sequences),
        head_dim=DIM,
        scale=DIM**-0.5,
        activation=activation,
        dropouts=dropouts,
        head_importance=sinks[0],
        ffn_importance=sinks[1],
        neuron_importance=sinks[2],
        per_token=per_token,
        first_tokens=first_tokens,
    )


def cast(weights, dtype):
    """The weights in another dtype; a position bias stays in float32."""
    to = lambda t: t.to(dtype) if t is not None and t.is_floating_point() else t  # noqa: E731
    bias = weights.position_bias
    return Weights(*map(to, weights))._replace(
        position_bias=bias if bias is None or dtype == torch.float64 else bias.float()
    )


def run(layer, tensors, sequences, dtype, autocast=None, dropouts=(0.0, 0.0, 0.0), per_token=False, **options):
    """The result, its gradients and the importance partials by name."""
    x, dout, weights = tensors
    leaf = lambda t: t.clone().requires_grad_() if t is not None and t.is_floating_point() else t  # noqa: E731
    x, weights = leaf(x.to(dtype)), Weights(*map(leaf, cast(weights, dtype)))
    count = HEADS if weights.heads is None else len(weights.heads)
    neurons = NEURONS if weights.neurons is None else len(weights.neurons)
    shapes = ((len(sequences), count), (len(sequences),), (len(sequences), neurons))
    computed = (count > 0, weights.w1 is not None, weights.w1 is not None)
    sinks = [
        torch.zeros(shape, device=x.device, requires_grad=True) if there else None
        for shape, there in zip(shapes, computed, strict=True)
    ]
    torch.manual_seed(5)
    with torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext():
        out = layer(x, weights, sequences, dropouts, sinks, per_token, **options)
    if options.get("first_tokens"):
        dout = dout[: len(out)] * (sequences.lengths > 0)[:, None]
    out.backward(dout.to(out.dtype))
    results = {"out": out.detach(), "dx": x.grad}
    results |= {name: getattr(weights, name).grad for name in PARAMETERS if getattr(weights, name) is not None}
    names = ("heads", "ffn", "neurons")
    return results | {n: s.grad for n, s in zip(names, sinks, strict=True) if s is not None}


def check(tensors, sequences, dtype, autocast=None, **options):
    """As near to float64 as the composition by the reference ops in the same dtype."""
    got = run(whole, tensors, sequences, dtype, autocast, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TICKETOPS_BACKEND", "reference")
        plain = run(composed, tensors, sequences, dtype, autocast, **options)
        exact = run(composed, tensors, sequences, torch.float64, **options)
    for name, value in got.items():
        assert (value is None) == (plain[name] is None) == (exact[name] is None), name
        if value is not None:
            assert value.dtype == plain[name].dtype, name
            # Sums of signed terms err by their terms; those of the key biases cancel to 0 in the softmax.
            like = exact["wk" if name == "bk" else name]
            scale = max(like.abs().max().item(), 1.0) if like.numel() else 1.0
            if name in ("heads", "ffn", "neurons"):
                # Each is a sum over tokens and channels, of about ten times what is left of it.
                scale *= 10
            # Roundings are those of the products' dtype, whatever the result is stored in.
            roundings = torch.finfo(autocast or dtype).eps / torch.finfo(value.dtype).eps
            terms = torch.full((1,), scale * roundings, device=value.device)
            assert_as_good(value, plain[name], exact[name], 2 if name == "out" else 3, name, terms)


def opcheck(tensors, sequences, dtype, first_tokens):
    """What torch checks of an op: of the layer's all, of its gradient's what does not need a formula of its own, with
    weights of another layout and with frozen ones."""
    x, _, weights = tensors
    # Layouts that differ among q, k and v.
    weights = weights._replace(wk=weights.wk.t().contiguous().t())
    settings = (sequences.max_length, DIM, 0.3, "gelu", 0.0, 0.2, 0.0, 1e-12, 1e-12, dtype, first_tokens)
    where = (sequences.starts, sequences.lengths, torch.tensor([7], device=x.device))
    given = [t.float() if t is not None and t.is_floating_point() else t for t in (x, *weights)]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in given]
    layer, backward = torch.ops.ticketops.encoder_layer, torch.ops.ticketops.encoder_layer_backward
    torch.library.opcheck(layer.default, (*leaves, *where, None, None, None, *settings, False))
    given = [t if t is None else t.detach() for t in leaves]
    out, *saved = layer(*given, *where, None, None, None, *settings, False)
    for trained in (False, True):
        # Beside all and nothing, some of each kind.
        some = [trained or name in ("wk", "bo", "b1", "gamma2") for name in PARAMETERS]
        wanted = (trained, some, trained, trained and weights.w1 is not None, False, False)
        arguments = (torch.randn_like(out), *given, *where, *saved, *settings, *wanted)
        torch.library.opcheck(backward.default, arguments, test_utils=("test_schema", "test_faketensor"))
