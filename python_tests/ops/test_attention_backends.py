import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketops.ops import Sequences
from ticketops.ops.attention import reference
from ticketops.ops.backends import _module

from .cases import (
    RAGGED,
    SHORT,
    assert_as_good,
    need,
    packed_sequences,
    padded_sequences,
    poisoned,
    strided,
    threads,
    with_holes,
)

FAST = ("native",)
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("out", "lse", "dq", "dk", "dv", "signed", "absolute", "dbias", "dkeys", "dqueries")
#: Position keys and position queries that are there.
TABLES = ((True, True), (True, False), (False, True))


def inputs(rows, heads, head_dim, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, head_dim, generator=generator).to(dtype) for _ in range(4)]


def bias_for(sequences, heads, further=0):
    """A bias that reaches as far as the longest sequence, or further."""
    width = 2 * (max(sequences.max_length, 1) + further) - 1
    return torch.randn(heads, width, generator=torch.Generator().manual_seed(width))


def positions_for(sequences, like, tables=(True, True), further=0):
    """Position keys and queries for tensors like [T, H, D], which reach as far as the longest sequence, or further."""
    rows = 2 * (max(sequences.max_length, 1) + further) - 1
    vectors = inputs(rows, *like.shape[1:], like.dtype, rows)[:2]
    return tuple(x if there else None for x, there in zip(vectors, tables, strict=True))


def run(module, tensors, sequences, mask=None, dropout_p=0.0, dtype=None, window=None, bias=None, positions=None):
    q, k, v, dout = tensors if dtype is None else [x.to(dtype) for x in tensors]
    positions = tuple(None if x is None else x.to(q.dtype) for x in positions or (None, None))
    mask, bias = (
        None if x is None else x.to(torch.float64 if q.dtype == torch.float64 else torch.float32) for x in (mask, bias)
    )
    seed = torch.tensor([0x2345_6789_ABCD_EF01 >> 1]) if dropout_p else None
    settings = (mask, seed, sequences.max_length, q.shape[-1] ** -0.5, dropout_p)
    where = (sequences.starts, sequences.lengths)
    terms = {"window": window, "bias": bias, "positions": positions, "real": sequences.real}
    out, lse = module.forward(q, k, v, *where, *settings, **terms)
    return out, lse, *module.backward(dout, q, k, v, out, lse, *where, *settings, **terms)


def check(backend, tensors, sequences, **options):
    got = [*run(_module("attention", backend), tensors, sequences, **options)]
    plain = [*run(reference, tensors, sequences, **options)]
    exact = [*run(reference, tensors, sequences, dtype=torch.float64, **options)]
    for i, name in enumerate(NAMES):
        if name in NAMES[-3:]:
            there = dict(zip(NAMES[-3:], (options.get("bias"), *options.get("positions", (None, None))), strict=True))
            assert (got[i] is None) == (there[name] is None)
            if got[i] is None:
                continue
        assert got[i].dtype == plain[i].dtype
        if name == "lse" and sequences.real is not None:
            # Of holes it is infinite where the head is computed.
            assert torch.equal(got[i].isinf(), exact[i].isinf())
            got[i], plain[i], exact[i] = (x[i].nan_to_num(nan=float("nan"), posinf=0) for x in (got, plain, exact))
        if name not in ("signed", "absolute"):
            # A query that sees itself alone has a weight of 1: the gradient of its score is the difference of equals.
            alone = options.get("window") == 0 or max(sequences.max_length, 1) == 1
            terms = exact[6] if name in NAMES[-3:] and alone else None
            assert_as_good(got[i], plain[i], exact[i], 2 if i < 2 else 3, name, terms)
    check_sums(dict(zip(NAMES, got, strict=True)), tensors[3], sequences, options.get("mask"))


def check_sums(got, dout, sequences, mask):
    """The importance is exactly that of the output that was given, however that is rounded."""
    products = dout.double() * got["out"].double()
    if mask is not None:
        products /= mask.double().where(mask != 0, torch.inf)[:, None]
    for b, (start, end) in enumerate(sequences.spans()):
        terms, roundings = products[start:end].sum(-1), 1e-6 * products[start:end].abs().sum((0, -1))
        for name, want in (("signed", terms.sum(0)), ("absolute", terms.abs().sum(0))):
            error = (got[name][b].double() - want).abs()
            assert (error <= roundings).all(), f"{name} of sequence {b}: errors {error}, allowed {roundings}"


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("window", [None, 0, 20, 64])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("biased", [False, True])
def test_as_good_as_plain_pytorch(backend, dtype, dropout_p, masked, layout, window, biased):
    need(backend, "attention", dtype)
    sequences, rows = layout(RAGGED)
    mask = torch.tensor([1.0, 0.0, -0.5, 2.0]) if masked else None
    options = {"dropout_p": dropout_p, "window": window, "bias": bias_for(sequences, 4) if biased else None}
    with poisoned():
        check(backend, inputs(rows, 4, 32, dtype), sequences, mask=mask, **options)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("tables", TABLES)
def test_position_vectors_as_good_as_plain_pytorch(backend, dtype, dropout_p, masked, layout, tables):
    need(backend, "attention", dtype)
    sequences, rows = layout(RAGGED)
    mask, tensors = torch.tensor([1.0, 0.0, -0.5, 2.0]) if masked else None, inputs(rows, 4, 32, dtype)
    positions = positions_for(sequences, tensors[0], tables)
    with poisoned():
        check(backend, tensors, sequences, mask=mask, dropout_p=dropout_p, positions=positions)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("term", ["window", "bias", "both", "positions", None])
@pytest.mark.parametrize("head_dim", [7, 32])
def test_holes_as_good_as_in_plain_pytorch(backend, dtype, layout, term, head_dim):
    need(backend, "attention", dtype)
    sequences, rows = layout(RAGGED)
    tensors, sequences = inputs(rows, 4, head_dim, dtype), with_holes(sequences, rows)
    options = {"window": 20 if term in ("window", "both") else None}
    options["bias"] = bias_for(sequences, 4) if term in ("bias", "both") else None
    options["positions"] = positions_for(sequences, tensors[0]) if term == "positions" else (None, None)
    for dropout_p in (0.0, 0.1):
        with poisoned():
            mask = torch.tensor([1.0, 0.0, -0.5, 2.0])
            check(backend, tensors, sequences, mask=mask, dropout_p=dropout_p, **options)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 7, 16, 20, 24, 40, 64, 80, 96, 128])
def test_any_head_dim(backend, dtype, head_dim):
    need(backend, "attention", dtype)
    sequences, rows = packed_sequences([31, 9, 64])
    with poisoned():
        tensors = inputs(rows, 3, head_dim, dtype)
        for bias in (None, bias_for(sequences, 3)):
            check(backend, tensors, sequences, dropout_p=0.2, bias=bias)
        check(backend, tensors, sequences, dropout_p=0.2, positions=positions_for(sequences, tensors[0]))


@pytest.mark.parametrize("backend", FAST)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    heads=st.integers(1, 5),
    head_dim=st.integers(1, 40),
    dropout_p=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 9),
    window=st.none() | st.integers(0, 80),
    dtype=st.sampled_from(DTYPES),
    further=st.none() | st.integers(0, 40),
    tables=st.none() | st.sampled_from(TABLES),
    holes=st.none() | st.sampled_from([0.1, 0.9]),
)
@settings(max_examples=160, deadline=None, derandomize=True)
def test_any_shape(backend, lengths, heads, head_dim, dropout_p, seed, window, dtype, further, tables, holes):
    need(backend, "attention", dtype)
    sequences, rows = padded_sequences(lengths)
    sequences = sequences if holes is None else with_holes(sequences, rows, holes)
    mask = torch.randn(heads, generator=torch.Generator().manual_seed(seed)).round(decimals=0)
    tensors = [strided(x) for x in inputs(rows, heads, head_dim, dtype, seed)]
    options = {"window": window, "bias": None if further is None else bias_for(sequences, heads, further)}
    if tables is not None:
        vectors = positions_for(sequences, tensors[0], tables, further or 0)
        options = {"positions": tuple(None if x is None else strided(x) for x in vectors)}
    with poisoned():
        check(backend, tensors, sequences, mask=mask, dropout_p=dropout_p, **options)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_threads_change_nothing(backend, dtype):
    need(backend, "attention", dtype)
    module = _module("attention", backend)
    sequences, rows = packed_sequences(RAGGED)
    tensors, bias = inputs(rows, 4, 32, dtype), bias_for(sequences, 4)
    positions = positions_for(sequences, tensors[0])
    with threads(1):
        first = run(module, tensors, sequences, dropout_p=0.1, bias=bias)
        by_vectors = run(module, tensors, sequences, dropout_p=0.1, positions=positions)
    for number in (1, 2, 3):
        with threads(number):
            again = run(module, tensors, sequences, dropout_p=0.1, positions=[strided(x) for x in positions])
            assert all(a is b is None or torch.equal(a, b) for a, b in zip(by_vectors, again, strict=True))
            for other in (
                tensors,
                [strided(x) for x in tensors],
                [x.transpose(0, 2).contiguous().transpose(0, 2) for x in tensors],
                [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in tensors],
            ):
                again = run(module, other, sequences, dropout_p=0.1, bias=bias.t().contiguous().t())
                assert len(again) == len(NAMES)
                assert all(a is b is None or torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_draws_the_same_weights_as_the_reference(backend, dtype):
    need(backend, "attention", dtype)
    # With v the identity, the output is the dropped attention matrix itself.
    n = 50
    sequences = Sequences.from_lengths([7, n])
    q, k = (torch.randn(7 + n, 2, n) for _ in range(2))
    v = torch.cat([torch.zeros(7, n), torch.eye(n)])[:, None, :].expand(7 + n, 2, n)
    seed = torch.tensor([2**61 + 12345])
    args = (*(x.to(dtype) for x in (q, k, v)), sequences.starts, sequences.lengths, None, seed, n, 0.1, 0.3)
    got, want = (_module("attention", name).forward(*args)[0] for name in (backend, "reference"))
    assert torch.equal(got == 0, want == 0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_scores_do_not_overflow(backend, dtype):
    need(backend, "attention", dtype)
    sequences, rows = packed_sequences(SHORT)
    tensors = inputs(rows, 2, 16, dtype)
    tensors[0] *= 300
    check(backend, tensors, sequences)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("terms", [(), ("window",), ("bias",), ("window", "bias"), ("positions",)])
@pytest.mark.parametrize("head_dim", [7, 32])
def test_first_tokens_alone_are_the_first_of_all(dtype, dropout_p, masked, terms, head_dim):
    need("native", "attention", dtype)
    native = _module("attention", "native")
    sequences, rows = padded_sequences(RAGGED)
    mask = torch.tensor([1.0, 0.0, -0.5, 2.0]) if masked else None
    q, k, v, dout = inputs(rows, 4, head_dim, dtype)
    first = torch.zeros(rows, dtype=torch.bool)
    first[sequences.starts[sequences.lengths > 0].long()] = True
    # Of the others no gradient is read.
    given = dout.masked_fill(~first[:, None, None], float("nan"))
    alone = (q, k, v, dout * first[:, None, None])
    options = {"window": 20 if "window" in terms else None}
    options["bias"] = bias_for(sequences, 4) if "bias" in terms else None
    options["positions"] = positions_for(sequences, q) if "positions" in terms else (None, None)
    want = dict(zip(NAMES, run(native, alone, sequences, mask, dropout_p, **options), strict=True))
    seed = torch.tensor([0x2345_6789_ABCD_EF01 >> 1]) if dropout_p else None
    settings = (sequences.starts, sequences.lengths, mask, seed, sequences.max_length, head_dim**-0.5, dropout_p)
    with poisoned():
        out, lse = native.forward(q, k, v, *settings, first_tokens=True, **options)
        gradients = native.backward(given, q, k, v, out, lse, *settings, first_tokens=True, **options)
    got = dict(zip(NAMES, (out, lse, *gradients), strict=True))
    for name, value in got.items():
        expected = want[name]
        if value is None:
            continue
        if name in ("out", "lse"):
            expected = expected * first.view(-1, *[1] * (expected.ndim - 1))
        tolerance = torch.finfo(dtype).eps * 4
        torch.testing.assert_close(
            value, expected, atol=tolerance, rtol=tolerance, msg=lambda text, name=name: name + text
        )


@pytest.mark.parametrize("backend", FAST)
def test_sequences_outside_the_tensor_are_refused(backend):
    need(backend, "attention", torch.float32)
    module = _module("attention", backend)
    q, k, v, _ = inputs(10, 2, 8, torch.float32)

    def call(starts, lengths, max_length=10):
        where = (torch.tensor(x, dtype=torch.int32) for x in (starts, lengths))
        return module.forward(q, k, v, *where, None, None, max_length, 1.0, 0.0)

    for starts, lengths in (([5], [6]), ([-1], [3]), ([3], [-1]), ([0, 3], [4, 4]), ([2**31 - 1], [2**31 - 1])):
        with pytest.raises(ValueError, match=r"rows|overlap"):
            call(starts, lengths)
    with pytest.raises(ValueError, match="max_length is 3"):
        call([0], [4], 3)
    with pytest.raises(ValueError, match=r"starts as torch\.int32"):
        module.forward(q, k, v, torch.zeros(1), torch.zeros(1), None, None, 10, 1.0, 0.0)
    with pytest.raises(ValueError, match="native kernel needs k"):
        module.forward(q, k[:5], v, *(torch.zeros(1, dtype=torch.int32),) * 2, None, None, 10, 1.0, 0.0)
    one = torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="the position bias reaches 1 tokens, but max_length is 3"):
        module.forward(q, k, v, one, one, None, None, 3, 1.0, 0.0, bias=torch.zeros(2, 3))
    with pytest.raises(ValueError, match="native kernel needs position_bias"):
        module.forward(q, k, v, one, one, None, None, 3, 1.0, 0.0, bias=torch.zeros(1, 5))
    vectors = torch.zeros(3, 2, 8)
    with pytest.raises(ValueError, match="the position tables reach 1 tokens, but max_length is 3"):
        module.forward(q, k, v, one, one, None, None, 3, 1.0, 0.0, positions=(vectors, None))
    with pytest.raises(ValueError, match=r"native kernel needs position_queries as torch\.float32 \[3, 2, 8\]"):
        module.forward(q, k, v, one, one, None, None, 2, 1.0, 0.0, positions=(vectors, vectors[1:]))
