"""A whole layer by its own op and by the ops that it is made of, and what it is held to."""

import contextlib
from typing import NamedTuple

import pytest
import torch
from torch.nn.functional import layer_norm

from ticketops import ops
from ticketops.ops import Layer, Sequences, Weights
from ticketops.ops.dropout import draw_seed, keep_elements
from ticketops.ops.products import compute_dtype

from .cases import SHORT, assert_as_good, packed_sequences

HEADS, DIM, CHANNELS, NEURONS = 4, 12, 40, 56
PARAMETERS = Weights._fields[:19]
#: Computed heads, computed neurons (None: all) and whether there is an FFN.
TICKETS = ((None, None, True), ([0, 2], None, True), ([3], None, False), ([], None, True), (None, [1, 5, 6, 50], True))
#: x's dtype, and autocast's.
DTYPES = ((torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None))


class Kind(NamedTuple):
    """How a layer differs from BERT's.

    Attributes:
        norm_first: LayerNorm before each sublayer.
        gated: a gate in the FFN.
        joined: one weight for q, k and v.
        bare: no biases.
        rotary: rotary positions.
        window: how far attention reaches.
        normed: a LayerNorm before attention, if `norm_first`.
    """

    norm_first: bool = False
    gated: bool = False
    joined: bool = False
    bare: bool = False
    rotary: bool = False
    window: int | None = None
    normed: bool = True


LIKE_BERT = Kind()
#: ModernBERT's, its first layer, ViT's, NomicBert's and GTE's.
KINDS = (
    Kind(norm_first=True, gated=True, joined=True, bare=True, rotary=True, window=3),
    Kind(norm_first=True, gated=True, joined=True, rotary=True, normed=False),
    Kind(norm_first=True),
    Kind(gated=True, joined=True, bare=True, rotary=True),
    Kind(gated=True, rotary=True, window=5),
)


#: A kind and a ticket for each layer.
STACKS = {
    "tickets": [(LIKE_BERT, ticket) for ticket in (*TICKETS, TICKETS[0])],
    "kinds": [(kind, TICKETS[0]) for kind in (LIKE_BERT, *KINDS, LIKE_BERT)],
    "kinds with tickets": [(kind, TICKETS[place % 5]) for place, kind in enumerate((*KINDS, LIKE_BERT))],
}
#: What is trained: the tokens, and of which layers the parameters and the sinks.
TRAINED = {
    "all": (True, lambda place: True, lambda place: True),
    "upper layers": (False, lambda place: place > 1, lambda place: place > 2),
    "a layer": (False, lambda place: place == 2, lambda place: False),
    "sinks": (False, lambda place: False, lambda place: True),
    "tokens": (True, lambda place: False, lambda place: False),
}


def inputs(rows, ticket, seed=0, reach=None, kind=LIKE_BERT, vectors=False):
    """Tokens, the result's gradient and the layer's weights, in float64; with a position bias that reaches so far, or
    with position keys and queries."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64) * (shape[-1] ** -0.5 if shape[1:] else 1)

    heads, neurons, there = ticket
    width, first, count = HEADS * DIM, NEURONS * (1 + kind.gated), HEADS if heads is None else len(heads)
    weights = Weights(
        *(normal(width, CHANNELS) for _ in range(3)),
        *(normal(width) for _ in range(3)),
        *(normal(CHANNELS, width), normal(CHANNELS), normal(CHANNELS), normal(CHANNELS)),
        *(
            (normal(first, CHANNELS), normal(first), normal(CHANNELS, NEURONS), normal(CHANNELS))
            if there
            else [None] * 4
        ),
        *(normal(CHANNELS), normal(CHANNELS)),
        None if reach is None or vectors else normal(count, 2 * reach + 1) * (2 * reach + 1) ** 0.5,
        *(normal(2 * reach + 1, count, DIM) * DIM**0.5 if vectors else None for _ in range(2)),
        None if heads is None else torch.tensor(heads, dtype=torch.int64),
        None if neurons is None else torch.tensor(neurons, dtype=torch.int64),
    )
    tensors = 3 * normal(rows, CHANNELS), 3 * normal(rows, CHANNELS)
    none = dict.fromkeys(("wk", "wv", "bk", "bv"))
    if kind.joined:
        weights = weights._replace(wq=torch.cat(weights[:3]), bq=torch.cat(weights[3:6]), **none)
    if kind.bare:
        weights = weights._replace(**dict.fromkeys(("bq", "bk", "bv", "bo", "beta1", "b1", "b2", "beta2")))
    return *tensors, weights if kind.normed else weights._replace(gamma1=None, beta1=None)


def angles(x, kind):
    """Cosines and sines of positions, other ones for each token and channel; None without positions."""
    if not kind.rotary:
        return None
    turns = torch.arange(len(x) * DIM, dtype=torch.float64, device=x.device).view(-1, DIM) * 0.37
    return tuple(t.to(torch.promote_types(x.dtype, torch.float32)) for t in (turns.cos(), turns.sin()))


def turned(x, kind):
    """Queries or keys [T, H, D], turned by their positions."""
    if not kind.rotary:
        return x
    cosines, sines = (t[:, None] for t in angles(x, kind))
    a, b = x.to(cosines.dtype).chunk(2, -1)
    return (torch.cat((a, b), -1) * cosines + torch.cat((-b, a), -1) * sines).to(x.dtype)


def dropped(x, p):
    """Dropout as the ops draw it."""
    return x * keep_elements(draw_seed(x.device), *x.shape, p, x.device) / (1 - p) if p else x


def unread(x, *vectors):
    """The tokens behind a sublayer that is not computed: the LayerNorm before it has gradients of 0."""
    return x + sum(0 * vector.sum() for vector in vectors if vector is not None)


def composed(
    x,
    w,
    sequences,
    dropouts,
    sinks,
    per_token,
    activation="gelu",
    first_tokens=False,
    kind=LIKE_BERT,
    inner_dropout=0.0,
):
    """The layer by the other ops."""
    stream = x
    if w.heads is None or len(w.heads):
        groups = torch.arange(HEADS, device=x.device) if w.heads is None else w.heads
        if kind.norm_first and w.gamma1 is not None:
            x = layer_norm(x, x.shape[1:], w.gamma1, w.beta1, 1e-12)
        weights, biases = w[:3], w[3:6]
        if kind.joined:
            weights, biases = w.wq.chunk(3), [None] * 3 if w.bq is None else w.bq.chunk(3)
        qkv = ops.project_rows(x, weights, biases, groups, HEADS)
        q, k, v = (y.view(len(x), len(groups), DIM) for y in qkv)
        q, k = turned(q, kind), turned(k, kind)
        context = ops.attention(
            *(q, k, v, sequences),
            dropout_p=dropouts[0],
            scale=DIM**-0.5,
            importance=sinks[0],
            per_token=per_token,
            position_bias=w.position_bias,
            window=kind.window,
            position_keys=w.position_keys,
            position_queries=w.position_queries,
        )
        if first_tokens:
            context = context[sequences.first_rows(len(x))]
        projected = ops.project_columns(context.flatten(1), w.wo, groups, HEADS)
    x = stream
    if first_tokens:
        alone = torch.ones_like(sequences.lengths)
        x, sequences = x[sequences.first_rows(len(x))], Sequences.from_lengths(alone)
    attends = w.heads is None or len(w.heads) > 0
    if not attends:
        projected = torch.zeros_like(x)
    if kind.norm_first:
        projected = projected if w.bo is None else projected + w.bo
        x = x + (dropped(projected, dropouts[1]) if attends or w.bo is not None else 0 * x)
        x = (x if attends else unread(x, w.gamma1, w.beta1)).to(stream.dtype)
        if w.w1 is None:
            return unread(x, w.gamma2, w.beta2)
        normed = layer_norm(x, x.shape[1:], w.gamma2, w.beta2, 1e-12)
        output = _feed(normed, w, sequences, sinks, per_token, activation, kind, inner_dropout)
        return (x + dropped(output, dropouts[2])).to(stream.dtype)
    x = _end(x, projected, w.bo, w.gamma1, w.beta1, dropouts[1])
    if w.w1 is None:
        return layer_norm(x, x.shape[1:], w.gamma2, w.beta2, 1e-12)
    output = _feed(x, w, sequences, sinks, per_token, activation, kind, inner_dropout)
    return _end(x, output, None, w.gamma2, w.beta2, dropouts[2])


def _end(x, output, bias, gamma, beta, dropout_p):
    beta = torch.zeros_like(gamma) if beta is None else beta
    return ops.residual_norm(output, x, gamma, beta, bias=bias, dropout_p=dropout_p, eps=1e-12)


def _feed(x, w, sequences, sinks, per_token, activation, kind, inner_dropout):
    w1, b1, w2 = w.w1, w.b1, w.w2
    if w.neurons is not None:
        rows = torch.cat((w.neurons, w.neurons + NEURONS)) if kind.gated else w.neurons
        w1, b1, w2 = w1[rows], None if b1 is None else b1[rows], w2[:, w.neurons]
    return ops.ffn(
        *(x, w1, b1, w2, w.b2, sequences),
        activation=activation,
        gated=kind.gated,
        dropout_p=inner_dropout,
        importance=sinks[1],
        neuron_importance=sinks[2],
        per_token=per_token,
    )


def whole(
    x,
    w,
    sequences,
    dropouts,
    sinks,
    per_token,
    activation="gelu",
    first_tokens=False,
    kind=LIKE_BERT,
    inner_dropout=0.0,
):
    """The layer by its own op."""
    assert ops.serves_layer(x, w.wq)
    vectors = (None if table is None else table.to(compute_dtype(x)) for table in w.positions())
    w = w._replace(**dict(zip(PARAMETERS[-2:], vectors, strict=True)))
    return ops.encoder_layer(
        *(x, w, sequences),
        head_dim=DIM,
        scale=DIM**-0.5,
        activation=activation,
        norm_first=kind.norm_first,
        gated=kind.gated,
        window=kind.window,
        rotary=angles(x, kind),
        dropouts=dropouts,
        inner_dropout=inner_dropout,
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
            if name in ("bk", "heads", "ffn", "neurons"):
                # Each is a sum over tokens and channels, of about ten times what is left of it.
                scale *= 10
            # Roundings are those of the products' dtype, whatever the result is stored in.
            roundings = torch.finfo(autocast or dtype).eps / torch.finfo(value.dtype).eps
            terms = torch.full((1,), scale * roundings, device=value.device)
            assert_as_good(value, plain[name], exact[name], 2 if name == "out" else 3, name, terms)


def opcheck(tensors, sequences, dtype, first_tokens, kind=LIKE_BERT):
    """What torch checks of an op: of the layer's all, of its gradient's what does not need a formula of its own, with
    weights of another layout and with frozen ones."""
    x, _, weights = tensors
    # Layouts that differ among q, k and v.
    apart = "wq" if kind.joined else "wk"
    weights = weights._replace(**{apart: getattr(weights, apart).t().contiguous().t()})
    settings = (sequences.max_length, DIM, 0.3, "gelu", [0.0, 0.2, 0.0, 0.0], [1e-12] * 2, dtype, first_tokens)
    settings += (kind.norm_first, kind.gated, kind.window)
    positions = angles(x.float(), kind) or (None, None)
    where = (sequences.starts, sequences.lengths, sequences.real, torch.tensor([7], device=x.device), *positions)
    given = [t.float() if t is not None and t.is_floating_point() else t for t in (x, *weights)]
    leaves = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in given]
    layer, backward = torch.ops.ticketops.encoder_layer, torch.ops.ticketops.encoder_layer_backward
    torch.library.opcheck(layer.default, (*leaves, *where, None, None, None, *settings, False))
    given = [t if t is None else t.detach() for t in leaves]
    out, *saved = layer(*given, *where, None, None, None, *settings, False)
    for trained in (False, True):
        # Beside all and nothing, some of each kind.
        some = [trained or name in ("wk", "bo", "b1", "gamma2") for name in PARAMETERS]
        some = [want and getattr(weights, name) is not None for want, name in zip(some, PARAMETERS, strict=True)]
        wanted = (trained, some, trained, trained and weights.w1 is not None, False, False)
        arguments = (torch.randn_like(out), *given, *where, *saved, *settings, *wanted)
        torch.library.opcheck(backward.default, arguments, test_utils=("test_schema", "test_faketensor"))


def stack(name, trained="all", dtype=torch.float32, first_tokens=False, device="cpu"):
    """Tokens, sequences, layers, and the leaves among their tensors."""
    sequences, rows = packed_sequences(SHORT)
    tokens, of_weights, of_sinks = TRAINED[trained]
    x = inputs(rows, TICKETS[0])[0].to(device, dtype).requires_grad_(tokens)
    layers, leaves = [], [x]
    for place, (kind, ticket) in enumerate(STACKS[name]):
        weights = cast(inputs(rows, ticket, seed=place, kind=kind)[2], dtype)
        weights = Weights(*(None if w is None else w.to(device) for w in weights))
        parameters = [w for w in weights if w is not None and w.is_floating_point()]
        heads = HEADS if weights.heads is None else len(weights.heads)
        neurons = NEURONS if weights.neurons is None else len(weights.neurons)
        shapes = ((len(sequences), heads), (len(sequences),), (len(sequences), neurons))
        there = (heads > 0, weights.w1 is not None, weights.w1 is not None)
        sinks = [torch.zeros(shape, device=device) if each else None for shape, each in zip(shapes, there, strict=True)]
        for leaf in parameters:
            leaf.requires_grad_(of_weights(place))
        for leaf in sinks:
            if leaf is not None:
                leaf.requires_grad_(of_sinks(place))
        leaves += parameters + [sink for sink in sinks if sink is not None]
        layers.append(
            Layer(
                weights,
                head_dim=DIM,
                scale=DIM**-0.5,
                activation="gelu",
                norm_first=kind.norm_first,
                gated=kind.gated,
                window=kind.window,
                rotary=angles(x.detach(), kind),
                dropouts=(0.1, 0.2, 0.3),
                head_importance=sinks[0],
                ffn_importance=sinks[1],
                neuron_importance=sinks[2],
                first_tokens=first_tokens and place == len(STACKS[name]) - 1,
            )
        )
    sequences = Sequences(sequences.starts.to(device), sequences.lengths.to(device), sequences.max_length)
    return x, sequences, layers, leaves


def one_by_one(x, layers, sequences):
    for layer in layers:
        x = ops.encoder_layers(x, [layer], sequences)
    return x


def results(compute, x, sequences, layers, leaves, autocast=None):
    """The result of a stack and the gradients of its leaves."""
    torch.manual_seed(3)
    with torch.autocast(x.device.type, autocast) if autocast else contextlib.nullcontext():
        out = compute(x, layers, sequences)
    loss = (out.float() * torch.linspace(-1, 1, out.shape[1], device=out.device)).sum(1)
    loss[: len(sequences)].sum().backward()
    gradients = [leaf.grad for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    return [out.detach(), *gradients]


def assert_equal(got, want):
    """On a CPU equal to the bit."""
    for ours, theirs in zip(got, want, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, **({} if ours.is_cuda else {"rtol": 0, "atol": 0}))
