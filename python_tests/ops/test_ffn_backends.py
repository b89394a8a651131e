import pytest
import torch
from bounds import roundings
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.ops.backends import _module
from ticketops.ops.ffn import ACTIVATIONS, reference

from .cases import RAGGED, SHORT, assert_as_good, need, packed_sequences, padded_sequences, poisoned, threads

FAST = ("native",)
DTYPES = (torch.float32, torch.bfloat16)
NAMES = ("out", "pre", "hidden", "dx", "dw1", "db1", "dw2", "db2", "signed", "absolute", "by_neuron")


def inputs(rows, channels, neurons, dtype, seed=0, gated=False, biased=True):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    first = (1 + gated) * neurons
    w1, w2 = normal(first, channels, scale=channels**-0.5), normal(channels, neurons, scale=neurons**-0.5)
    b1, b2 = (normal(first), normal(channels)) if biased else (None, None)
    # The activation's input reaches from deep in one tail to deep in the other.
    return normal(rows, channels, scale=3.0), w1, b1, w2, b2, normal(rows, channels)


def run(
    module,
    tensors,
    sequences,
    activation,
    ffn_mask=None,
    neuron_mask=None,
    absolute=False,
    dtype=None,
    weights=True,
    dropout_p=0.0,
):
    x, w1, b1, w2, b2, dout = (tensor if tensor is None or dtype is None else tensor.to(dtype) for tensor in tensors)
    statistics = torch.float64 if x.dtype == torch.float64 else torch.float32
    masks = [None if mask is None else mask.to(statistics) for mask in (ffn_mask, neuron_mask)]
    dropout = {"seed": torch.tensor([12345678901234567]), "dropout_p": dropout_p}
    out, pre, hidden = module.forward(x, w1, b1, w2, b2, *masks, activation, **dropout)
    where = (sequences.starts, sequences.lengths)
    gradients = module.backward(
        *(dout, out, pre, hidden, x, w1, w2, *where, *masks, activation, [True] + [weights] * 4, True, True, absolute),
        **dropout,
    )
    return out, pre, hidden, *gradients


def check(backend, tensors, sequences, *args, **options):
    got = run(_module("ffn", backend), tensors, sequences, *args, **options)
    plain = run(reference, tensors, sequences, *args, **options)
    exact = run(reference, tensors, sequences, *args, dtype=torch.float64, **options)
    # A sum of terms of both signs rounds as its terms do, however small it is.
    by_terms = run(reference, tensors, sequences, *args, dtype=torch.float64, **{**options, "absolute": True})
    sums = {"signed": exact[NAMES.index("absolute")], "by_neuron": by_terms[NAMES.index("by_neuron")]}
    for i, name in enumerate(NAMES):
        assert got[i].dtype == plain[i].dtype
        assert got[i].shape == plain[i].shape
        assert_as_good(got[i], plain[i], exact[i], 2 if i < 3 else 3, name, sums.get(name))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize("gated", [False, True])
def test_as_good_as_plain_pytorch(backend, dtype, activation, absolute, layout, gated):
    need(backend, "ffn", dtype)
    sequences, rows = layout(RAGGED)
    with poisoned():
        tensors = inputs(rows, 24, 37, dtype, gated=gated, biased=not absolute)
        check(backend, tensors, sequences, activation, absolute=absolute, dropout_p=0.3 if absolute else 0.0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ffn_mask", [None, 0.0, 1.0, -0.7])
@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("gated", [False, True])
def test_masks(backend, dtype, ffn_mask, kept, gated):
    need(backend, "ffn", dtype)
    sequences, rows = padded_sequences(SHORT)
    generator = torch.Generator().manual_seed(1)
    neurons = torch.randn(600, generator=generator) * (torch.rand(600, generator=generator) < kept)
    mask = None if ffn_mask is None else torch.tensor(ffn_mask)
    with poisoned():
        tensors = inputs(rows, 16, 600, dtype, gated=gated)
        check(backend, tensors, sequences, "gelu", ffn_mask=mask, neuron_mask=neurons)


@pytest.mark.parametrize("backend", FAST)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=5),
    channels=st.integers(1, 40),
    neurons=st.integers(1, 70),
    activation=st.sampled_from(ACTIVATIONS),
    masked=st.booleans(),
    weights=st.booleans(),
    seed=st.integers(0, 9),
    gated=st.booleans(),
    biased=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_shape(backend, lengths, channels, neurons, activation, masked, weights, seed, gated, biased, dropout_p):
    need(backend, "ffn", torch.float32)
    sequences, rows = padded_sequences(lengths)
    mask = torch.randn(neurons, generator=torch.Generator().manual_seed(seed)).round() if masked else None
    with poisoned():
        check(
            backend,
            inputs(rows, channels, neurons, torch.float32, seed, gated, biased),
            sequences,
            activation,
            neuron_mask=mask,
            weights=weights,
            dropout_p=dropout_p,
        )


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_exact_to_rounding(backend, activation):
    need(backend, "ffn", torch.float32)
    module = _module("ffn", backend)
    far = torch.tensor([20.0, 88.0, 1e4, 1e12, 1e15, 1e18])
    points = torch.cat([torch.linspace(-14, 14, 200_001), far, -far])[:, None]
    one, zero = torch.ones(1, 1), torch.zeros(1)
    starts, lengths = torch.zeros(1, dtype=torch.int32), torch.tensor([len(points)], dtype=torch.int32)
    out, pre, hidden = module.forward(points, one, zero, one, zero, None, None, activation)
    gradient = module.backward(
        torch.ones_like(points), out, pre, hidden, points, one, one, starts, lengths, None, None, activation,
        [True] + [False] * 4, False, False, False,
    )[0]  # fmt: skip
    exact = points.double().requires_grad_()
    want = reference._activate(exact, activation)
    (slope,) = torch.autograd.grad(want.sum(), exact)
    if activation == "gelu":
        # x cdf(x) without the cancellation of 1 + erf; the tail's relative error comes from rounding x^2.
        want = exact.detach() * torch.special.erfc(-exact.detach() / 2**0.5) / 2
        near = (points > -5).squeeze()
        assert ((hidden.double() - want)[near] / want[near].abs().clamp_min(1e-300)).abs().max() < 2e-6
    assert (hidden.double() - want).abs().div(want.abs().clamp_min(1)).max() < 1.5 * torch.finfo(torch.float32).eps
    if activation == "relu":
        assert torch.equal(gradient, (points > 0).float())
    else:
        assert (gradient.double() - slope).abs().max() < 4e-7


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_do_not_depend_on_threads(backend, dtype):
    need(backend, "ffn", dtype)
    module = _module("ffn", backend)
    sequences, rows = packed_sequences(RAGGED)
    tensors = inputs(rows, 8, 700, dtype)
    for number in (1, 2):
        with threads(number):
            first, again = (run(module, tensors, sequences, "gelu") for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (130, 37), (64, 1152), (0, 4)])
def test_sums_of_columns_and_of_two_dtypes(shape):
    need("native", "ffn", torch.float32)
    native = _module("ffn", "native")
    torch.manual_seed(0)
    x, bias = torch.randn(shape), torch.randn(shape[1])
    for dtype in (torch.float32, torch.bfloat16):
        with poisoned():
            sums = native.column_sums(x.to(dtype))
        assert sums.dtype == torch.float32
        torch.testing.assert_close(sums, x.to(dtype).double().sum(0).float(), **roundings(10))
    total = torch.randn(shape)
    expected = total + x.bfloat16()
    assert native.add_(total, x.bfloat16()) is total
    assert torch.equal(total, expected)
    total = torch.randn(shape).bfloat16()
    expected = (total.float() + bias).bfloat16()
    assert torch.equal(native.add_(total, bias), expected)
    with pytest.raises(InputError, match="contiguous"):
        native.add_(torch.zeros(4, 6)[:, ::2], torch.zeros(4, 3).bfloat16())
    with pytest.raises(InputError, match="needs x as"):
        native.add_(torch.zeros(4, 3), torch.zeros(4, 3))
