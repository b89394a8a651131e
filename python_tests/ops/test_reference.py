"""The reference against definitions written independently of it: dense masks, autograd through every multiplication."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers.models.mpnet.modeling_mpnet import MPNetEncoder
from transformers.models.t5.modeling_t5 import T5Attention

from ticketops import ops
from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import Sequences
from ticketops.ops.dropout import draw_seed, keep_elements, keep_mask
from ticketops.ops.ffn import ACTIVATIONS

from .cases import with_holes

LENGTHS = [5, 1, 0, 7, 3]


@pytest.fixture(autouse=True)
def _reference(monkeypatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", "reference")


def inputs(lengths, heads=3, size=4, channels=6, neurons=10, dtype=torch.float64, gap=0):
    torch.manual_seed(sum(lengths) + heads)
    sequences = Sequences.from_lengths(lengths, width=max(lengths) + gap if gap else None)
    tokens = len(lengths) * (max(lengths) + gap) if gap else sum(lengths)

    def leaf(*shape):
        return torch.randn(*shape, dtype=dtype, requires_grad=True)

    qkv = [leaf(tokens, heads, size) for _ in range(3)]
    weights = [leaf(neurons, channels), leaf(neurons), leaf(channels, neurons), leaf(channels)]
    return sequences, qkv, [leaf(tokens, channels), *weights]


def dense_attention(
    q, k, v, sequences, masks, scale=None, keep=None, p=0.0, window=None, bias=None, vectors=(None, None)
):
    """One softmax over all tokens, with all outside of the query's sequence masked; `masks` is [B, H] or [T, H]."""
    tokens = q.shape[0]
    owner = torch.full((tokens,), -1)
    for b, (start, end) in enumerate(sequences.spans()):
        owner[start:end] = b
    scores = torch.einsum("qhd,khd->hqk", q, k)
    # Rows of a sequence lie one behind the other, so their distance is that of their numbers.
    distance = torch.arange(tokens) - torch.arange(tokens)[:, None]
    for table, x, product in zip(vectors, (q, k), ("qhd,qkhd->hqk", "khd,qkhd->hqk"), strict=True):
        if table is not None:
            reach = len(table) // 2
            scores = scores + torch.einsum(product, x, table[reach + distance.clamp(-reach, reach)])
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        reach = bias.shape[1] // 2
        scores = scores + bias[:, reach + distance.clamp(-reach, reach)]
    allowed = (owner[:, None] == owner[None, :]) & (owner >= 0)[:, None]
    if window is not None:
        allowed = allowed & ((torch.arange(tokens)[:, None] - torch.arange(tokens)).abs() <= window)
    if sequences.real is not None:
        allowed = allowed & sequences.real & sequences.real[:, None]
    weights = torch.softmax(scores.masked_fill(~allowed, float("-inf")), -1).nan_to_num()
    if keep is not None:
        weights = weights * keep / (1 - p)
    context = torch.einsum("hqk,khd->qhd", weights, v)
    per_token = masks if masks.shape[0] == tokens and masks.ndim == 2 else None
    if per_token is None:
        per_token = torch.cat([masks, masks.new_zeros(1, masks.shape[1])])[owner]
    return context * per_token[:, :, None]


def same_results(out, expected, leaves):
    """Asserts that two results and their gradients are equal."""
    torch.testing.assert_close(out, expected)
    gradients = (torch.autograd.grad(x.cos().sum(), leaves) for x in (out, expected))
    for got, want in zip(*gradients, strict=True):
        torch.testing.assert_close(got, want)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.integers(1, 4),
    st.sampled_from([0, 2]),
    st.none() | st.integers(0, 3),
)
def test_attention_equals_the_dense_definition(lengths, heads, gap, further):
    sequences, leaves, _ = inputs(lengths, heads, gap=gap)
    mask, bias = torch.linspace(-0.5, 1.5, heads, dtype=torch.float64), None
    if further is not None:
        bias = torch.randn(heads, 2 * (max(lengths) + further) - 1, dtype=torch.float64, requires_grad=True)
    out = ops.attention(*leaves, sequences, head_mask=mask, scale=0.3, position_bias=bias)
    expected = dense_attention(*leaves, sequences, mask.expand(len(lengths), -1), 0.3, bias=bias)
    same_results(out, expected, leaves if bias is None else (*leaves, bias))


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any),
    st.integers(1, 4),
    st.sampled_from([0, 2]),
    st.integers(0, 3),
    st.sampled_from([(True, True), (True, False), (False, True)]),
)
def test_attention_with_position_vectors_equals_the_dense_definition(lengths, heads, gap, further, tables):
    sequences, leaves, _ = inputs(lengths, heads, gap=gap)
    mask = torch.linspace(-0.5, 1.5, heads, dtype=torch.float64)
    shape = (2 * (max(lengths) + further) - 1, heads, 4)
    vectors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) if there else None for there in tables]
    named = dict(zip(("position_keys", "position_queries"), vectors, strict=True))
    out = ops.attention(*leaves, sequences, head_mask=mask, scale=0.3, **named)
    expected = dense_attention(*leaves, sequences, mask.expand(len(lengths), -1), 0.3, vectors=vectors)
    same_results(out, expected, (*leaves, *(x for x in vectors if x is not None)))


@pytest.mark.parametrize("window", [0, 3, 70, 149])
@pytest.mark.parametrize("biased", [False, True])
def test_attention_within_a_window_equals_the_dense_definition(window, biased):
    sequences, leaves, _ = inputs([150, 0, 9, 66], heads=2)
    mask = torch.tensor([[0.5, -1.5]], dtype=torch.float64)
    bias = torch.randn(2, 299, dtype=torch.float64, requires_grad=True) if biased else None
    out = ops.attention(*leaves, sequences, head_mask=mask[0], window=window, position_bias=bias)
    expected = dense_attention(*leaves, sequences, mask.expand(4, -1), window=window, bias=bias)
    same_results(out, expected, (*leaves, bias) if biased else leaves)


@pytest.mark.parametrize("window", [None, 3, 70])
@pytest.mark.parametrize("term", [None, "position_bias", "position_keys"])
def test_attention_around_holes_equals_the_dense_definition(window, term):
    if window is not None and term == "position_keys":
        return
    sequences, leaves, _ = inputs([150, 0, 9, 66], heads=2)
    sequences, mask = with_holes(sequences, 225), torch.tensor([[0.5, -1.5]], dtype=torch.float64)
    shapes = {"position_bias": (2, 299), "position_keys": (299, 2, 4)}
    table = None if term is None else torch.randn(shapes[term], dtype=torch.float64, requires_grad=True)
    options = {} if term is None else {term: table}
    out = ops.attention(*leaves, sequences, head_mask=mask[0], window=window, **options)
    named = {"bias": table} if term == "position_bias" else {"vectors": (table, None)}
    expected = dense_attention(*leaves, sequences, mask.expand(4, -1), window=window, **named)
    same_results(out, expected, leaves if term is None else (*leaves, table))


def test_holes_may_be_left_out_where_no_term_depends_on_distance():
    sequences, leaves, _ = inputs([50, 3, 9], heads=2)
    real = with_holes(sequences, 62).real
    counts = [int(real[start:end].sum()) for start, end in sequences.spans()]
    assert sum(counts) < 62
    out = ops.attention(*leaves, dataclasses.replace(sequences, real=real))[real]
    same_results(out, ops.attention(*(x[real] for x in leaves), Sequences.from_lengths(counts)), leaves)


@pytest.mark.parametrize(("buckets", "max_distance"), [(32, 128), (32, 20), (8, 5), (4, 128)])
def test_buckets_are_those_of_transformers(buckets, max_distance):
    table = torch.randn(3, buckets, requires_grad=True)
    for length in (0, 1, 2, 9, 600):
        got = ops.bucketed_bias(table, length, max_distance=max_distance)
        distances = torch.arange(1 - max(length, 1), max(length, 1))
        for bucket in (
            MPNetEncoder.relative_position_bucket(distances, buckets, max_distance),
            T5Attention._relative_position_bucket(distances, True, buckets, max_distance),
        ):
            assert torch.equal(got, table[:, bucket])
    (gradient,) = torch.autograd.grad(got.sum(), table)
    assert torch.equal(gradient, torch.bincount(bucket, minlength=buckets).float().expand(3, -1))


@pytest.mark.parametrize(
    ("shape", "max_distance", "problem"),
    [
        ((3,), 128, r"got \[3\]"),
        ((3, 31), 128, "an even number of at least 4 buckets"),
        ((3, 2), 128, "an even number of at least 4 buckets"),
        ((3, 32), 8, "more than a quarter of the 32 buckets"),
    ],
)
def test_tables_without_t5s_buckets_are_refused(shape, max_distance, problem):
    with pytest.raises(InputError, match=problem):
        ops.bucketed_bias(torch.zeros(shape), 9, max_distance=max_distance)


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        ((2, 13), r"must have shape \[3, 2 R \+ 1\]"),
        ((3, 14), r"must have shape \[3, 2 R \+ 1\]"),
        ((3, 11), "at least 13 columns for sequences of 7 tokens, got 11"),
    ],
)
def test_biases_that_do_not_reach_are_refused(shape, problem):
    sequences, qkv, _ = inputs(LENGTHS)
    with pytest.raises(InputError, match=problem):
        ops.attention(*qkv, sequences, position_bias=torch.zeros(shape))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"position_keys": torch.zeros(14, 3, 4)}, r"position_keys must have shape \[2 R \+ 1, 3, 4\]"),
        ({"position_queries": torch.zeros(13, 2, 4)}, r"position_queries must have shape \[2 R \+ 1, 3, 4\]"),
        (
            {"position_keys": torch.zeros(11, 3, 4)},
            "position_keys must have at least 13 rows for sequences of 7 tokens",
        ),
        (
            {"position_keys": torch.zeros(13, 3, 4), "position_queries": torch.zeros(15, 3, 4)},
            "position_queries must have shape",
        ),
    ],
)
def test_position_vectors_that_do_not_fit_are_refused(options, problem):
    sequences, qkv, _ = inputs(LENGTHS)
    with pytest.raises(InputError, match=problem):
        ops.attention(*qkv, sequences, **{name: x.double() for name, x in options.items()})
    with pytest.raises(InputError, match="one dtype and device for all inputs"):
        ops.attention(*qkv, sequences, position_keys=torch.zeros(13, 3, 4))


@pytest.mark.parametrize("other", [{"window": 2}, {"position_bias": torch.zeros(3, 13)}])
def test_position_vectors_beside_a_window_or_a_bias_are_refused(other):
    sequences, qkv, _ = inputs(LENGTHS)
    with pytest.raises(UnsupportedError, match="does not serve position_queries together with a"):
        ops.attention(*qkv, sequences, position_queries=torch.zeros(13, 3, 4).double(), **other)


def test_a_window_changes_what_is_computed_not_what_is_masked():
    # Keys outside the window are never read: not a number there harms nobody.
    sequences, (q, k, v), _ = inputs([300], heads=2)
    k, v = k.detach(), v.detach()
    k[200:], v[200:] = float("nan"), float("nan")
    assert ops.attention(q, k, v, sequences, window=5)[:128].isfinite().all()
    with pytest.raises(InputError, match="window must be at least 0"):
        ops.attention(q, k, v, sequences, window=-1)


def test_attention_gradients_against_finite_differences():
    sequences, qkv, _ = inputs(LENGTHS)
    mask = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64, requires_grad=True)
    table = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, m, table):
        bias = ops.bucketed_bias(table, sequences.max_length, max_distance=4)
        return ops.attention(q, k, v, sequences, head_mask=m, position_bias=bias)

    assert torch.autograd.gradcheck(run, (*qkv, mask, table))
    vectors = [torch.randn(15, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def with_vectors(q, k, v, m, keys, queries):
        return ops.attention(q, k, v, sequences, head_mask=m, position_keys=keys, position_queries=queries)

    assert torch.autograd.gradcheck(with_vectors, (*qkv, mask, *vectors))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_ffn_gradients_against_finite_differences(activation, gated, dropout_p):
    sequences, _, tensors = inputs(LENGTHS)
    if gated:
        for place, shape in ((1, (20, 6)), (2, (20,))):
            tensors[place] = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    masks = [
        torch.tensor(0.7, dtype=torch.float64, requires_grad=True),
        torch.linspace(0.1, 2, 10, dtype=torch.float64).requires_grad_(),
    ]

    def run(x, w1, b1, w2, b2, mask, neuron_mask):
        masks = {"ffn_mask": mask, "neuron_mask": neuron_mask}
        torch.manual_seed(3)
        return ops.ffn(x, w1, b1, w2, b2, sequences, activation=activation, gated=gated, dropout_p=dropout_p, **masks)

    assert torch.autograd.gradcheck(run, (*tensors, *masks))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("positioned", [False, True])
def test_head_importance_is_the_gradient_of_masks_multiplied_in_by_hand(per_token, masked, positioned):
    sequences, (q, k, v), _ = inputs(LENGTHS)
    vectors = list(torch.randn(2, 13, 3, 4, dtype=torch.float64)) if positioned else (None, None)
    mask = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64) if masked else torch.ones(3, dtype=torch.float64)
    importance = torch.full((5, 3), 7.0, dtype=torch.float64, requires_grad=True)
    options = dict(zip(("position_keys", "position_queries"), vectors, strict=True))
    out = ops.attention(
        *(q, k, v, sequences), head_mask=mask if masked else None, importance=importance, per_token=per_token, **options
    )
    out.cos().sum().backward()

    shape = (q.shape[0], 3) if per_token else (5, 3)
    by_hand = mask.expand(*shape).clone().requires_grad_()
    dense_attention(q.detach(), k.detach(), v.detach(), sequences, by_hand, vectors=vectors).cos().sum().backward()
    expected = by_hand.grad
    if per_token:
        expected = torch.stack([expected[start:end].abs().sum(0) for start, end in sequences.spans()])
    torch.testing.assert_close(importance.grad, expected)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gated_ffn_without_biases_equals_what_one_would_write(per_token, dropout_p):
    sequences, _, tensors = inputs(LENGTHS)
    x, w2 = (tensors[place].detach().requires_grad_() for place in (0, 3))
    w1, blocks = torch.randn(20, 6, dtype=torch.float64, requires_grad=True), torch.tensor([0, 3, 4])
    kept = torch.zeros(5, 2, dtype=torch.float64).index_fill_(0, blocks, 1).flatten()
    neurons = torch.zeros(5, 6, dtype=torch.float64, requires_grad=True)
    options = {"neuron_importance": neurons, "per_token": per_token, "blocks": blocks, "count": 5, "gated": True}
    torch.manual_seed(3)
    dropped = torch.ones(len(x), 10, dtype=torch.float64)
    if dropout_p:
        # Numbered among the selected neurons.
        drawn = keep_elements(draw_seed(x.device), len(x), 6, dropout_p, x.device)
        dropped[:, kept.bool()] = drawn.double() / (1 - dropout_p)
    torch.manual_seed(3)
    options["dropout_p"] = dropout_p
    out = ops.ffn(x, w1, None, w2, None, sequences, **options)
    got = torch.autograd.grad(out.cos().sum(), (x, w1, w2, neurons))
    neuron_mask = kept.expand(len(x), -1).clone().requires_grad_()
    by_hand = (neuron_mask * dropped * functional.gelu(x @ w1[:10].t()) * (x @ w1[10:].t())) @ w2.t()
    torch.testing.assert_close(out, by_hand)
    *want, terms = torch.autograd.grad(by_hand.cos().sum(), (x, w1, w2, neuron_mask))
    terms = (terms.abs() if per_token else terms)[:, kept.bool()]
    want.append(torch.stack([terms[start:end].sum(0) for start, end in sequences.spans()]))
    for each, wanted in zip(got, want, strict=True):
        torch.testing.assert_close(each, wanted)
    with pytest.raises(InputError, match=r"w1 \[N, C\]"):
        ops.ffn(x, w1, None, w2, None, sequences)


@pytest.mark.parametrize("per_token", [False, True])
def test_ffn_importance_is_the_gradient_of_masks_multiplied_in_by_hand(per_token):
    sequences, _, tensors = inputs(LENGTHS)
    x, w1, b1, w2, b2 = (tensor.detach() for tensor in tensors)
    importance = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    neurons = torch.zeros(5, 10, dtype=torch.float64, requires_grad=True)
    out = ops.ffn(x, w1, b1, w2, b2, sequences, importance=importance, neuron_importance=neurons, per_token=per_token)
    out.cos().sum().backward()

    mask = torch.ones(len(x), 1, dtype=torch.float64, requires_grad=True)
    neuron_mask = torch.ones(len(x), 10, dtype=torch.float64, requires_grad=True)
    by_hand = mask * functional.linear(neuron_mask * functional.gelu(functional.linear(x, w1, b1)), w2, b2)
    by_hand.cos().sum().backward()

    def sums(gradient):
        gradient = gradient.abs() if per_token else gradient
        return torch.stack([gradient[start:end].sum(0) for start, end in sequences.spans()])

    torch.testing.assert_close(importance.grad, sums(mask.grad).squeeze(1))
    torch.testing.assert_close(neurons.grad, sums(neuron_mask.grad))


def test_a_pruned_head_is_zero_and_gets_no_gradient():
    sequences, (q, k, v), _ = inputs(LENGTHS)
    mask = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        for x in (q, k, v):
            # Not computed means that not even a NaN is read.
            x[:, 1] = torch.nan
    out = ops.attention(q, k, v, sequences, head_mask=mask)
    out.cos().sum().backward()
    assert out[:, 1].eq(0).all()
    assert mask.grad[1] == 0
    assert mask.grad[[0, 2]].isfinite().all()
    for x in (q, k, v):
        assert x.grad[:, 1].eq(0).all()
        assert x.grad[:, [0, 2]].isfinite().all()


def test_pruned_neurons_and_a_pruned_ffn_are_not_read():
    sequences, _, tensors = inputs(LENGTHS)
    keep = torch.ones(10, dtype=torch.float64)
    keep[[2, 5]] = 0
    with torch.no_grad():
        tensors[1][[2, 5]] = torch.nan
        tensors[3][:, [2, 5]] = torch.nan
    out = ops.ffn(*tensors, sequences, neuron_mask=keep)
    out.cos().sum().backward()
    x, w1, b1, w2, b2 = (tensor.detach() for tensor in tensors)
    kept = keep.nonzero().squeeze(1)
    hidden = functional.gelu(functional.linear(x, w1[kept], b1[kept]))
    torch.testing.assert_close(out.detach(), functional.linear(hidden, w2[:, kept], b2))
    assert all(tensor.grad.isfinite().all() for tensor in tensors)
    assert tensors[1].grad[[2, 5]].eq(0).all()

    none = torch.zeros((), dtype=torch.float64, requires_grad=True)
    out = ops.ffn(*tensors, sequences, ffn_mask=none)
    out.sum().backward()
    assert out.eq(0).all()
    assert none.grad == 0


def test_dropout_is_replayed_in_the_backward_pass():
    sequences, (q, k, v), _ = inputs([6, 4])
    torch.manual_seed(11)
    out = ops.attention(q, k, v, sequences, dropout_p=0.4)
    torch.manual_seed(11)
    seed = torch.randint(2**62, (1,), dtype=torch.int64)
    keep = torch.zeros(3, 10, 10, dtype=torch.float64)
    for start, end in sequences.spans():
        n = end - start
        keep[:, start:end, start:end] = keep_mask(seed, start, n, torch.arange(3), 3, n, 0.4).double()
    expected = dense_attention(q, k, v, sequences, torch.ones(2, 3, dtype=torch.float64), keep=keep, p=0.4)
    torch.testing.assert_close(out, expected)
    for got, want in zip(
        torch.autograd.grad(out.cos().sum(), (q, k, v)),
        torch.autograd.grad(expected.cos().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_pytorch_in_the_same_dtype(dtype):
    sequences, qkv, _ = inputs([33, 20], heads=2, size=32)
    exact = [x.detach().requires_grad_() for x in qkv]
    low = [x.detach().to(dtype).requires_grad_() for x in qkv]
    stock = [x.detach().to(dtype).requires_grad_() for x in qkv]

    def sdpa(tensors):
        return torch.cat(
            [
                functional.scaled_dot_product_attention(*(x[a:b].transpose(0, 1)[None] for x in tensors))[0].transpose(
                    0, 1
                )
                for a, b in sequences.spans()
            ]
        )

    outs = [ops.attention(*exact, sequences), ops.attention(*low, sequences), sdpa(stock)]
    for out in outs:
        out.double().square().sum().backward()
    wanted, ours, theirs = ([out, *(x.grad for x in xs)] for out, xs in zip(outs, (exact, low, stock), strict=True))
    for index, (want, got, other) in enumerate(zip(wanted, ours, theirs, strict=True)):
        bound = (2 if index == 0 else 3) * (other.double() - want).abs().max()
        assert (got.double() - want).abs().max() <= bound + 1e-6
        assert got.dtype == dtype


def test_opcheck_and_one_graph():
    sequences, qkv, tensors = inputs(LENGTHS)
    mask = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64, requires_grad=True)
    importance = torch.zeros(5, 3, dtype=torch.float64, requires_grad=True)
    where = (sequences.starts, sequences.lengths)
    seed = torch.tensor([5])
    bias = torch.randn(3, 15, dtype=torch.float64, requires_grad=True)
    settings = (seed, 7, 0.3, 0.1, False)
    real = with_holes(sequences, 16).real
    torch.library.opcheck(
        torch.ops.ticketops.attention, (*qkv, *where, real, mask, bias, None, None, importance, *settings, 2)
    )
    vectors = [torch.randn(15, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    arguments = (*qkv, *where, None, mask, None, *vectors, importance, *settings, None)
    torch.library.opcheck(torch.ops.ticketops.attention, arguments)
    sink = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    ffn_mask = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        torch.ops.ticketops.ffn, (*tensors, *where, ffn_mask, None, sink, None, seed, "gelu", True, 0.1)
    )

    def step(q, k, v, importance, *tensors):
        attended = ops.attention(q, k, v, sequences, importance=importance)
        return ops.ffn(*tensors, sequences, activation="relu").sum() + attended.cos().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for run in (step, compiled):
        importance.grad = None
        run(*qkv, importance, *tensors).backward()
        if run is step:
            eager = importance.grad
    torch.testing.assert_close(importance.grad, eager)


def test_autocast_and_strides_and_no_tokens():
    sequences, qkv, tensors = inputs([4, 3], dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(*qkv, sequences).dtype == torch.bfloat16
        assert ops.ffn(*tensors, sequences).dtype == torch.bfloat16
    fused = torch.randn(7, 2, 3, 3, 4).transpose(1, 2)
    q, k, v = (fused[:, :, 0, i] for i in range(3))
    torch.testing.assert_close(
        ops.attention(q, k, v, sequences), ops.attention(*(x.contiguous() for x in (q, k, v)), sequences)
    )
    nothing = Sequences.from_lengths([0, 0])
    assert ops.attention(*(torch.zeros(0, 2, 4, requires_grad=True) for _ in range(3)), nothing).shape == (0, 2, 4)


def test_bad_arguments_are_named():
    sequences, (q, k, v), tensors = inputs([4, 3])
    with pytest.raises(InputError, match="one shape"):
        ops.attention(q, k[:, :2], v, sequences)
    with pytest.raises(InputError, match=r"dropout_p must be in \[0, 1\), got 1.5"):
        ops.attention(q, k, v, sequences, dropout_p=1.5)
    with pytest.raises(InputError, match=r"head_mask must have shape \[3\]"):
        ops.attention(q, k, v, sequences, head_mask=torch.ones(4))
    with pytest.raises(InputError, match="one dtype and device"):
        ops.attention(q, k.float(), v, sequences)
    with pytest.raises(UnsupportedError, match="int64"):
        ops.attention(q.long(), k.long(), v.long(), sequences)
    with pytest.raises(UnsupportedError, match="'swish'"):
        ops.ffn(*tensors, sequences, activation="swish")
    with pytest.raises(InputError, match="neuron_mask"):
        ops.ffn(*tensors, sequences, neuron_mask=torch.ones(3))
    (gradient,) = torch.autograd.grad(ops.attention(q, k, v, sequences).sum(), q, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        gradient.sum().backward()


def test_an_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", "cuda11")
    sequences, (q, k, v), _ = inputs([4, 3])
    with pytest.raises(UnsupportedError, match="TICKETOPS_BACKEND=cuda11"):
        ops.attention(q, k, v, sequences)


def test_selected_blocks_of_neurons_are_those_whose_masks_are_not_0():
    sequences, _, parameters = inputs([4, 3], neurons=12)
    blocks, mask = torch.tensor([0, 2]), torch.tensor([1.0, 0.0, 1.0]).double().repeat_interleave(4)
    got = ops.ffn(*parameters, sequences, blocks=blocks, count=3)
    want = ops.ffn(*parameters, sequences, neuron_mask=mask)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), parameters),
        torch.autograd.grad(want.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    for bad, count in ((blocks.int(), 3), (blocks[None], 3), (blocks, 5)):
        with pytest.raises(InputError, match=r"ffn needs int64 blocks \[K\] and 12 neurons in equal blocks"):
            ops.ffn(*parameters, sequences, blocks=bad, count=count)
