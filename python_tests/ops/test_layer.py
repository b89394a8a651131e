"""A whole layer as one op, against the ops it is made of."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch
from bounds import roundings
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketops import ops
from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import Sequences, Weights
from ticketops.ops.ffn import ACTIVATIONS
from ticketops.ops.layer import native as layer
from ticketops.ops.layer.arguments import Inputs, Saved, Settings
from ticketops.ops.layer.native import FEW_TOKENS, FEW_TOKENS_AMX, FEW_TOKENS_BF16
from ticketops.ops.rotary import native as turn
from ticketops.ops.rotary import reference

from .cases import SHORT, assert_as_good, need, packed_sequences, padded_sequences, poisoned, threads, with_holes
from .layers import (
    CHANNELS,
    DIM,
    DTYPES,
    HEADS,
    KINDS,
    NEURONS,
    PARAMETERS,
    TICKETS,
    Kind,
    cast,
    check,
    composed,
    inputs,
    opcheck,
    run,
    whole,
)


@pytest.fixture(autouse=True)
def served():
    for op in ("attention", "ffn", "residual"):
        need("native", op, torch.float32)


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("reach", [None, 14])
def test_as_good_as_its_parts_in_plain_pytorch(ticket, dtype, autocast, per_token, layout, reach):
    sequences, rows = layout(SHORT)
    with poisoned():
        check(
            inputs(rows, ticket, reach=reach), sequences, dtype, autocast, dropouts=(0.1, 0.2, 0.3), per_token=per_token
        )


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("reach", [None, 12])
def test_first_tokens_alone_are_as_good_as_their_parts(ticket, dtype, autocast, per_token, layout, reach):
    sequences, rows = layout(SHORT)
    options = {"dropouts": (0.1, 0.2, 0.3), "per_token": per_token, "first_tokens": True}
    for number in (1, 2):
        with threads(number), poisoned():
            check(inputs(rows, ticket, reach=reach), sequences, dtype, autocast, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("first_tokens", [False, True])
def test_layers_of_other_kinds(kind, ticket, dtype, autocast, first_tokens):
    sequences, rows = padded_sequences(SHORT)
    options = {"dropouts": (0.1, 0.2, 0.3), "inner_dropout": 0.4, "first_tokens": first_tokens, "kind": kind}
    for per_token in (False, True):
        with poisoned():
            check(inputs(rows, ticket, kind=kind), sequences, dtype, autocast, per_token=per_token, **options)
    check_inference(inputs(rows, ticket, kind=kind), sequences, dtype, autocast, first_tokens=first_tokens, kind=kind)


@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("terms", [{"kind": KINDS[0]}, {"reach": 14}, {"reach": 14, "vectors": True}])
def test_layers_around_holes(dtype, autocast, terms):
    sequences, rows = padded_sequences(SHORT)
    sequences, kind = with_holes(sequences, rows), terms.get("kind", Kind())
    for first_tokens in (False, True):
        options = {"first_tokens": first_tokens, "kind": kind}
        with poisoned():
            check(inputs(rows, TICKETS[1], **terms), sequences, dtype, autocast, dropouts=(0.1, 0.2, 0.3), **options)
        check_inference(inputs(rows, TICKETS[1], **terms), sequences, dtype, autocast, **options)


@given(tokens=st.integers(0, 40), heads=st.integers(1, 3), half=st.integers(1, 40), dtype=st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_rotary_positions(tokens, heads, half, dtype):
    generator = torch.Generator().manual_seed(half)
    qkv, dqkv = torch.randn((2, tokens, 3, heads, 2 * half), generator=generator, dtype=torch.float64).to(dtype[0])
    angles = torch.randn((2, tokens, 2 * half), generator=generator, dtype=torch.float64)
    for x, back in ((qkv, False), (dqkv, True)):
        got, exact = turn.turn_(x.clone(), *angles.float(), back), reference.turn_(x.double(), *angles, back)
        assert torch.equal(got[:, 2], x[:, 2])
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=20 * torch.finfo(dtype[0]).eps)
    # The turn of gradients is the transpose of that of what they belong to.
    turned = reference.turn_(qkv.double(), *angles), reference.turn_(dqkv.double(), *angles, back=True)
    torch.testing.assert_close((turned[0] * dqkv).sum(), (turned[1] * qkv).sum())


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.none() | st.sets(st.integers(0, HEADS - 1)),
    neurons=st.none() | st.sets(st.integers(0, NEURONS - 1), min_size=1),
    ffn=st.booleans(),
    dropouts=st.tuples(*[st.sampled_from([0.0, 0.5])] * 4),
    kind=st.builds(
        Kind,
        **{name: st.booleans() for name in ("norm_first", "gated", "joined", "bare", "rotary")},
        window=st.none() | st.integers(0, 40),
    ),
    normed=st.booleans(),
    autocast=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_kind_of_layer(lengths, heads, neurons, ffn, dropouts, kind, normed, autocast, seed):
    sequences, rows = padded_sequences(lengths)
    kind = kind._replace(normed=normed or not kind.norm_first)
    ticket = (None if heads is None else sorted(heads), sorted(neurons) if neurons and ffn else None, ffn)
    options = {"dropouts": dropouts[:3], "inner_dropout": dropouts[3], "kind": kind}
    with poisoned():
        check(inputs(rows, ticket, seed, kind=kind), sequences, torch.float32, autocast, **options)


@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("first_tokens", [False, True])
def test_an_ffn_without_neurons_has_its_last_bias(dtype, autocast, first_tokens):
    sequences, rows = packed_sequences([3, 0, 17])
    x, dout, weights = inputs(rows, TICKETS[0])
    weights = weights._replace(w1=weights.w1[:0], b1=weights.b1[:0], w2=weights.w2[:, :0])
    check_inference((x, dout, weights), sequences, dtype, autocast, first_tokens=first_tokens)


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.1, 0.2, 0.3)])
def test_a_batch_of_padding_alone(ticket, dtype, autocast, dropouts):
    sequences, _ = packed_sequences([0, 0])
    check(inputs(0, ticket), sequences, dtype, autocast, dropouts=dropouts)


@pytest.mark.parametrize("ticket", TICKETS)
def test_first_tokens_are_those_of_the_whole_layer(ticket):
    sequences, rows = packed_sequences([3, 0, 61, 17, 0])
    x, dout, weights = inputs(rows, ticket)
    first = sequences.first_rows(rows)[sequences.lengths > 0]
    some = torch.zeros_like(dout)
    some[first] = dout[[0, 2, 3]]
    got = run(whole, (x, dout, weights), sequences, torch.float32, first_tokens=True)
    want = run(whole, (x, some, weights), sequences, torch.float32)
    got["out"], want["out"] = got["out"][sequences.lengths > 0], want["out"][first]
    for name, value in got.items():
        torch.testing.assert_close(value, want[name], **roundings(1000))


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
# Few tokens, many, and fewer than sequences.
@pytest.mark.parametrize("lengths", [[1], [32], [3, 0, 5], [0] * 20 + [2, 0, 1], [100, 0, 90]])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
def test_first_tokens_without_gradients(ticket, dtype, autocast, lengths, layout):
    sequences, rows = layout(lengths)
    tensors = inputs(rows, ticket)
    check_inference(tensors, sequences, dtype, autocast, first_tokens=True)
    # One of another vector of tokens may be rounded otherwise.
    got = infer(whole, tensors, sequences, dtype, autocast, first_tokens=True)
    want = infer(whole, tensors, sequences, dtype, autocast)[sequences.first_rows(rows)]
    assert got.shape == want.shape
    bound = 4 * torch.finfo(autocast or dtype).eps
    torch.testing.assert_close(got, want, rtol=bound, atol=4 * bound)


@pytest.mark.parametrize("ticket", TICKETS)
def test_dropout_is_that_of_its_parts(ticket):
    sequences, rows = packed_sequences(SHORT)
    got, parts = (
        run(layer, inputs(rows, ticket), sequences, torch.float32, dropouts=(0.3, 0.4, 0.5))
        for layer in (whole, composed)
    )
    for name, value in got.items():
        torch.testing.assert_close(value, parts[name], **roundings(1000, 100))


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.none() | st.sets(st.integers(0, HEADS - 1)),
    neurons=st.none() | st.sets(st.integers(0, NEURONS - 1), min_size=1),
    ffn=st.booleans(),
    dropouts=st.tuples(*[st.sampled_from([0.0, 0.5])] * 3),
    activation=st.sampled_from(ACTIVATIONS),
    autocast=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_layer(lengths, heads, neurons, ffn, dropouts, activation, autocast, seed):
    sequences, rows = padded_sequences(lengths)
    ticket = (None if heads is None else sorted(heads), sorted(neurons) if neurons and ffn else None, ffn)
    with poisoned():
        check(
            *(inputs(rows, ticket, seed), sequences, torch.float32, autocast), dropouts=dropouts, activation=activation
        )


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.none() | st.sets(st.integers(0, HEADS - 1), min_size=1),
    further=st.integers(0, 9),
    dropout_p=st.sampled_from([0.0, 0.5]),
    autocast=st.sampled_from([None, torch.bfloat16]),
    seed=st.integers(0, 9),
    vectors=st.booleans(),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_layer_with_terms_by_distance(lengths, heads, further, dropout_p, autocast, seed, vectors):
    sequences, rows = padded_sequences(lengths)
    kept = None if heads is None else sorted(heads)
    tensors = inputs(rows, (kept, None, True), seed, max(lengths) + further, vectors=vectors)
    with poisoned():
        check(tensors, sequences, torch.float32, autocast, dropouts=(dropout_p, 0.0, 0.0))


@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_runs_repeat_themselves(dtype, autocast):
    sequences, rows = packed_sequences([3, 61, 0, 17])
    for number in (1, 2):
        with threads(number):
            first, again = (
                run(whole, inputs(rows, TICKETS[1], reach=60), sequences, dtype, autocast, dropouts=(0.1, 0.1, 0.1))
                for _ in "ab"
            )
        assert all(torch.equal(value, again[name]) for name, value in first.items())


def infer(layer, tensors, sequences, dtype=torch.float32, autocast=None, dropouts=(0.0, 0.0, 0.0), **options):
    """The result alone, without gradients."""
    x, _, weights = tensors
    torch.manual_seed(5)
    with torch.inference_mode(), torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
        return layer(x.to(dtype), cast(weights, dtype), sequences, dropouts, [None] * 3, False, **options)


def check_inference(tensors, sequences, dtype, autocast=None, **options):
    """As near to float64 as the composition by the reference ops in the same dtype."""
    with poisoned():
        got = infer(whole, tensors, sequences, dtype, autocast, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TICKETOPS_BACKEND", "reference")
        plain = infer(composed, tensors, sequences, dtype, autocast, **options)
        exact = infer(composed, tensors, sequences, torch.float64, **options)
    assert got.dtype == dtype
    # Roundings are those of the products' dtype, whatever the result is stored in.
    roundings = torch.finfo(autocast or dtype).eps / torch.finfo(dtype).eps
    largest = exact.abs().max().item() if exact.numel() else 0.0
    assert_as_good(got, plain, exact, 2, "out", torch.full((1,), max(largest, 1.0) * roundings))


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [7],
        [32],
        [100],
        [],
        [0],
        SHORT,
        [16, 17, 33],
        *([n + more] for n in (FEW_TOKENS, FEW_TOKENS_AMX, FEW_TOKENS_BF16) for more in (0, 1)),
    ],
)
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("term", [None, "bias", "vectors"])
def test_without_gradients_as_good_as_its_parts(ticket, dtype, autocast, lengths, layout, term):
    sequences, rows = layout(lengths)
    reach = None if term is None else max(sequences.max_length, 1) - 1
    check_inference(inputs(rows, ticket, reach=reach, vectors=term == "vectors"), sequences, dtype, autocast)


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    heads=st.none() | st.sets(st.integers(0, HEADS - 1)),
    neurons=st.none() | st.sets(st.integers(0, NEURONS - 1), min_size=1),
    ffn=st.booleans(),
    activation=st.sampled_from(ACTIVATIONS),
    dtypes=st.sampled_from(DTYPES),
    seed=st.integers(0, 9),
)
@settings(max_examples=100)
def test_any_layer_without_gradients(lengths, heads, neurons, ffn, activation, dtypes, seed):
    sequences, rows = padded_sequences(lengths)
    ticket = (None if heads is None else sorted(heads), sorted(neurons) if neurons and ffn else None, ffn)
    check_inference(inputs(rows, ticket, seed), sequences, *dtypes, activation=activation)


@pytest.mark.parametrize(
    ("isa", "intel", "in_hardware"), itertools.product(("amx", "avx512bf16", "avx512"), (0, 1), (0, 1))
)
def test_how_many_tokens_are_few(monkeypatch, isa, intel, in_hardware):
    monkeypatch.setattr(layer, "native", SimpleNamespace(isa=lambda: isa, is_intel=lambda: bool(intel)))
    monkeypatch.setattr(layer, "has_bf16_products", lambda: bool(in_hardware))
    most = FEW_TOKENS_BF16 if in_hardware and (intel or isa == "avx512") else FEW_TOKENS
    most = FEW_TOKENS_AMX if isa == "amx" else most
    assert [layer.is_few(tokens, True) for tokens in (most, most + 1)] == [True, False]
    assert [layer.is_few(tokens, False) for tokens in (FEW_TOKENS, FEW_TOKENS + 1)] == [True, False]


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_inference_does_not_depend_on_threads_or_strides(ticket, dtype, autocast):
    sequences, rows = padded_sequences([3, 61, 0, 17])
    tensors = inputs(rows, ticket)

    def spaced(t):
        if t is None or not t.is_floating_point():
            return t
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
        wide[..., 1] = t
        return wide[..., 1]

    apart = (spaced(tensors[0]), None, Weights(*map(spaced, tensors[2])))
    results = []
    for number in (1, 2):
        with threads(number):
            results += [infer(whole, given, sequences, dtype, autocast) for given in (tensors, tensors, apart)]
    assert all(torch.equal(results[0], other) for other in results)


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize("rows", [1, 40, FEW_TOKENS + 1])
def test_dropout_without_gradients_is_that_of_training(ticket, rows):
    sequences, rows = packed_sequences([rows])
    tensors, dropouts = inputs(rows, ticket), (0.3, 0.4, 0.5)
    got = infer(whole, tensors, sequences, dropouts=dropouts)
    assert torch.equal(got, run(whole, tensors, sequences, torch.float32, dropouts=dropouts)["out"])


@pytest.mark.parametrize(("heads", "neurons"), [([HEADS], None), ([-1], None), (None, [NEURONS]), (None, [-1])])
def test_structures_that_are_not_there_are_refused(heads, neurons):
    sequences, rows = packed_sequences([5])
    with pytest.raises(InputError, match="is not among the"):
        infer(whole, inputs(rows, (heads, neurons, True)), sequences)


def test_parameters_of_other_shapes_are_refused():
    sequences, rows = packed_sequences([5])
    x, dout, weights = inputs(rows, TICKETS[0])
    for name in PARAMETERS[:-3]:
        wrong = weights._replace(**{name: getattr(weights, name)[:-1]})
        with pytest.raises(InputError, match="the native kernel needs"):
            infer(whole, (x, dout, wrong), sequences)


@pytest.mark.parametrize(
    ("bias", "problem"),
    [
        (torch.zeros(HEADS, 9).double(), "needs position_bias in torch.float32, got torch.float64"),
        (torch.zeros(HEADS - 1, 9), "the native kernel needs position_bias"),
        (torch.zeros(HEADS, 7), "the position bias reaches 3 tokens, but max_length is 5"),
    ],
)
def test_a_bias_that_does_not_fit_is_refused(bias, problem):
    sequences, rows = packed_sequences([5])
    x, _, weights = inputs(rows, TICKETS[0])
    weights = cast(weights, torch.float32)._replace(position_bias=bias)
    for no_gradients in (False, True):
        with torch.inference_mode(no_gradients), pytest.raises(InputError, match=problem):
            whole(x.float(), weights, sequences, (0.0, 0.0, 0.0), [None] * 3, False)


def test_no_layer_norm_after_attention_is_refused():
    sequences, rows = packed_sequences([5])
    x, _, weights = inputs(rows, TICKETS[0], kind=KINDS[1])
    with pytest.raises(InputError, match="needs gamma1 for a LayerNorm after attention"):
        infer(whole, (x, None, weights), sequences, kind=KINDS[1]._replace(norm_first=False))


def test_positions_of_other_shapes_are_refused():
    sequences, rows = packed_sequences([5])
    x, _, weights = inputs(rows, TICKETS[0], kind=KINDS[0])
    angles = torch.zeros(rows, DIM + 2)
    for no_gradients in (False, True):
        with torch.inference_mode(no_gradients), pytest.raises(InputError, match="needs angles as"):
            ops.encoder_layer(
                *(x.float(), cast(weights, torch.float32), sequences),
                head_dim=DIM,
                scale=1.0,
                activation="gelu",
                norm_first=True,
                gated=True,
                rotary=(angles, angles),
            )


def test_position_vectors_of_another_dtype_or_shape_are_refused():
    sequences, rows = packed_sequences([5])
    x, _, weights = inputs(rows, TICKETS[0], reach=4, vectors=True)
    weights, halved = cast(weights, torch.float32), weights.position_keys.bfloat16()
    for keys, problem in (
        (halved, "needs position_keys in torch.float32, got torch.bfloat16"),
        (weights.position_keys[:, 1:], "the native kernel needs position_keys"),
        (None, None),
    ):
        changed = weights._replace(position_keys=keys)
        refused = pytest.raises(InputError, match=problem) if problem else contextlib.nullcontext()
        with refused:
            # The kernel is called past `whole`, which casts.
            ops.encoder_layer(x.float(), changed, sequences, head_dim=DIM, scale=1.0, activation="gelu")


def test_norms_of_another_dtype_are_served():
    sequences, rows = packed_sequences([5])
    x, _, weights = inputs(rows, TICKETS[0])
    half = Weights(*(t if t is None else t.bfloat16() for t in weights))
    mixed = half._replace(gamma1=half.gamma1.float(), beta1=half.beta1.float())
    results = []
    for some in (half, mixed):
        with torch.inference_mode():
            results.append(whole(x.bfloat16(), some, sequences, (0.0, 0.0, 0.0), [None] * 3, False))
    torch.testing.assert_close(*results, rtol=0.1, atol=0.1)


def test_only_what_a_ticket_keeps_is_computed():
    sequences, rows = packed_sequences(SHORT)
    x, _, w = inputs(rows, ([1], [3, 4], True))
    w = [t.float() if t is not None and t.is_floating_point() else t for t in w]
    settings = Settings(13, DIM, 0.3, "gelu", [0.0] * 4, [1e-12] * 2, torch.float32, False, False, False, None)
    where = (sequences.starts, sequences.lengths, *[None] * 4)
    _, *saved = layer.forward(Inputs(x.float(), Weights(*w), *where), settings)
    saved = Saved(*saved)
    assert saved.qkv.shape == (rows, 3 * DIM)
    assert saved.w_qkv.shape == (3 * DIM, CHANNELS)
    assert saved.pre.shape == saved.hidden.shape == (rows, 2)


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first_tokens", [False, True])
@pytest.mark.parametrize("reach", [None, 12])
def test_opcheck(ticket, dtype, first_tokens, reach):
    sequences, rows = packed_sequences(SHORT)
    opcheck(inputs(rows, ticket, reach=reach), sequences, dtype, first_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "first_tokens"), [(torch.float32, True), (torch.bfloat16, False)])
def test_opcheck_of_other_kinds(kind, ticket, dtype, first_tokens):
    sequences, rows = packed_sequences(SHORT)
    opcheck(inputs(rows, ticket, kind=kind), sequences, dtype, first_tokens, kind)


def test_frozen_weights_and_second_derivatives():
    sequences, rows = packed_sequences(SHORT)
    x, _, weights = inputs(rows, TICKETS[0])
    weights = Weights(*(t.float() if t is not None else t for t in weights))
    x = x.float().requires_grad_()
    out = whole(x, weights, sequences, (0.0, 0.0, 0.0), [None] * 3, False)
    (dx,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    assert dx.isfinite().all()
    with pytest.raises(UnsupportedError, match="second derivative"):
        dx.sum().backward()


def test_not_served_where_a_part_is_not(monkeypatch):
    x = torch.zeros(2, 3)
    assert ops.serves_layer(x, x)
    assert not ops.serves_layer(x, x.double())
    assert not ops.serves_layer(x.double(), x.double())
    with torch.autocast("cpu", torch.float16):
        assert not ops.serves_layer(x, x)
    monkeypatch.setenv("TICKETOPS_BACKEND", "reference")
    assert not ops.serves_layer(x, x)


def test_sequences_outside_the_tensor_are_refused():
    x, _, weights = inputs(6, TICKETS[0])
    weights = Weights(*(t.float() if t is not None else t for t in weights))
    sequences = Sequences(torch.tensor([3], dtype=torch.int32), torch.tensor([4], dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="rows"):
        whole(x.float(), weights, sequences, (0.0, 0.0, 0.0), [None] * 3, False)


@pytest.mark.parametrize("ticket", TICKETS)
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_gradients_are_in_memory_of_their_own(ticket, dtype, autocast):
    sequences, rows = packed_sequences(SHORT)
    results = run(whole, inputs(rows, ticket), sequences, dtype, autocast)
    kept = [results[name] for name in PARAMETERS if results.get(name) is not None]
    assert len({value.untyped_storage().data_ptr() for value in kept}) == len(kept)
    assert all(value.untyped_storage().nbytes() == value.nbytes for value in kept)


class PlainTable:
    """ticketops.ops.copies.native.Table by torch's own copies, each at once."""

    def select(self, tensor, dim, groups, index, dtype, out=None):
        if index is not None:
            tensor = tensor.unflatten(dim, (groups, -1)).index_select(dim, index).flatten(dim, dim + 1)
        return tensor.to(dtype, copy=True) if out is None else out.copy_(tensor)

    def spread(self, part, like, dim, groups, index):
        out = torch.zeros_like(like)
        if index is None:
            return out.copy_(part)
        part = part.unflatten(dim, (len(index), -1)).to(like.dtype)
        return out.unflatten(dim, (groups, -1)).index_copy_(dim, index, part).flatten(dim, dim + 1)

    def run(self):
        pass


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("ticket", [*TICKETS, ([1, 2], [0, 5, 55], True)])
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
def test_copies_of_weights_and_gradients_are_torchs_to_the_bit(monkeypatch, number, ticket, dtype, autocast):
    sequences, rows = packed_sequences([3, 61, 0, 17])
    with threads(number):
        got = run(whole, inputs(rows, ticket), sequences, dtype, autocast, dropouts=(0.1, 0.1, 0.1))
        monkeypatch.setattr("ticketops.ops.layer.native.Table", PlainTable)
        plain = run(whole, inputs(rows, ticket), sequences, dtype, autocast, dropouts=(0.1, 0.1, 0.1))
    for name, value in got.items():
        assert value is None if plain[name] is None else torch.equal(value, plain[name]), name
