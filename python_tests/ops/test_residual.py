"""residual_norm: the reference against torch's own layers, the other backends against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import residual_norm
from ticketops.ops.backends import _module
from ticketops.ops.dropout import keep_elements
from ticketops.ops.residual import reference

from .cases import assert_as_good, need, poisoned, threads

FAST = ("native",)
#: x's dtype and the residual's.
DTYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16))
NAMES = ("out", "mean", "rstd", "dx", "dresidual", "dbias", "dgamma", "dbeta")
SUMS = ("dbias", "dgamma", "dbeta")
SEED = torch.tensor([0x0123_4567_89AB_CDEF])
op = torch.ops.ticketops.residual_norm


def inputs(rows, channels, dtypes, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    x, residual, dout = normal(rows, channels), normal(rows, channels) + 1, normal(rows, channels)
    return x.to(dtypes[0]), residual.to(dtypes[1]), dout.to(dtypes[1]), *(normal(channels) for _ in range(3))


def run(module, tensors, bias=True, dropout_p=0.0, dtype=None):
    x, residual, dout, b, gamma, beta = tensors if dtype is None else [tensor.to(dtype) for tensor in tensors]
    b, seed = b if bias else None, SEED if dropout_p else None
    out, mean, rstd = module.forward(x, residual, b, gamma, beta, seed, dropout_p, 1e-12)
    return out, mean, rstd, *module.backward(dout, x, residual, b, gamma, mean, rstd, seed, dropout_p)


def check(backend, tensors, **options):
    got = run(_module("residual", backend), tensors, **options)
    plain = run(reference, tensors, **options)
    exact = run(reference, tensors, dtype=torch.float64, **options)
    for i, name in enumerate(NAMES):
        if name == "dbias" and not options.get("bias", True):
            continue
        assert got[i].dtype == plain[i].dtype
        # Where x is stored in fewer bits, dx is a tensor of its own; in float64 it is dresidual.
        want = exact[4] if name == "dx" and got[i].shape != exact[i].shape else exact[i]
        terms = None
        if name in ("dx", "dresidual", "dbias") and len(tensors[0]):
            # What LayerNorm's backward pass takes the mean and the projection out of, which may leave little.
            _, _, dout, _, gamma, _ = tensors
            terms = (dout * gamma).double() * exact[NAMES.index("rstd")][:, None] / (1 - options.get("dropout_p", 0.0))
        assert_as_good(got[i], plain[i], want, 2 if i < 3 else 3, name, terms)


@pytest.fixture(params=[0.0, 0.25])
def dropout_p(request):
    return request.param


def doubles(rows=5, channels=7):
    tensors = inputs(rows, channels, (torch.float64, torch.float64))
    return [tensors[i].double().requires_grad_() for i in (0, 1, 3, 4, 5)]


def test_reference_is_layer_norm(dropout_p):
    x, residual, bias, gamma, beta = doubles()
    seed = SEED if dropout_p else None
    out, _, _ = op(x, residual, bias, gamma, beta, seed, dropout_p, 1e-5)
    dropped = x + bias
    if dropout_p:
        keep = keep_elements(SEED, *x.shape, dropout_p, x.device)
        assert 0 < keep.sum() < keep.numel()
        dropped = dropped * keep / (1 - dropout_p)
    want = functional.layer_norm(residual + dropped, (7,), gamma, beta, 1e-5)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)


def test_gradients(dropout_p):
    seed = SEED if dropout_p else None
    tensors = doubles()
    assert torch.autograd.gradcheck(lambda *t: op(*t, seed, dropout_p, 1e-5)[0], tensors)
    x, residual, _, gamma, beta = tensors
    assert torch.autograd.gradcheck(
        lambda *t: op(*t[:2], None, *t[2:], seed, dropout_p, 1e-5)[0], (x, residual, gamma, beta)
    )


@pytest.mark.parametrize("dtypes", DTYPES)
def test_opcheck(dtypes, dropout_p):
    x, residual, _, *vectors = (tensor.requires_grad_() for tensor in inputs(5, 8, dtypes))
    torch.library.opcheck(op.default, (x, residual, *vectors, SEED if dropout_p else None, dropout_p, 1e-12))


@pytest.mark.parametrize("dtypes", DTYPES)
def test_compiles_without_a_graph_break(dtypes, dropout_p):
    x, residual, _, _, gamma, beta = (tensor.requires_grad_() for tensor in inputs(6, 16, dtypes))
    compiled = torch.compile(residual_norm, fullgraph=True, backend="aot_eager")
    results = []
    for function in (residual_norm, compiled):
        torch.manual_seed(3)
        out = function(x, residual, gamma, beta, dropout_p=dropout_p)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, residual, gamma, beta))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_second_derivative_is_refused():
    x, residual, bias, gamma, beta = doubles()
    out = residual_norm(x, residual, gamma, beta, bias=bias)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(UnsupportedError, match="second derivative"):
        gradient.sum().backward()


def test_bad_arguments_are_refused():
    x = torch.zeros(4, 6)
    gamma = torch.ones(6)
    with pytest.raises(InputError, match="one shape"):
        residual_norm(x, x[:3], gamma, gamma)
    with pytest.raises(InputError, match="residual of x's dtype"):
        residual_norm(x, x.bfloat16(), gamma, gamma)
    with pytest.raises(InputError, match=r"beta of shape \[6\]"):
        residual_norm(x, x, gamma, gamma[:5])
    with pytest.raises(InputError, match=r"dropout_p must be in"):
        residual_norm(x, x, gamma, gamma, dropout_p=1.0)
    with pytest.raises(UnsupportedError, match="int32"):
        residual_norm(x.int(), x, gamma, gamma)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (2, 384), (67, 130), (200, 768), (65, 17)])
@pytest.mark.parametrize("bias", [False, True])
def test_as_good_as_plain_pytorch(backend, dtypes, shape, bias, dropout_p):
    need(backend, "residual", dtypes[0])
    with poisoned():
        check(backend, inputs(*shape, dtypes), bias=bias, dropout_p=dropout_p)


def twice(forward, backward, tensors, x_there, dropout_p, dtype=None):
    """Two norms in a row, by functions that compute them one by one or together."""
    x, residual, dout, b, gamma, beta = tensors if dtype is None else [tensor.to(dtype) for tensor in tensors]
    gamma2, beta2, seed = 1.5 - gamma, 0.5 * beta - 1, SEED if dropout_p else None
    x = x if x_there else 0 * x
    out, *statistics = forward(x, residual, b, gamma, beta, seed, dropout_p, 1e-12, gamma2, beta2, 1e-5)
    return out, *statistics, *backward(dout, x, residual, b, gamma, beta, gamma2, *statistics, seed, dropout_p)


def one_by_one():
    def forward(x, residual, b, gamma, beta, seed, dropout_p, eps, gamma2, beta2, eps2):
        middle, mean, rstd = reference.forward(x, residual, b, gamma, beta, seed, dropout_p, eps)
        out, mean2, rstd2 = reference.forward(0 * middle, middle, None, gamma2, beta2, None, 0.0, eps2)
        kept.append(middle)
        return out, mean, rstd, mean2, rstd2

    def backward(dout, x, residual, b, gamma, beta, gamma2, mean, rstd, mean2, rstd2, seed, dropout_p):
        middle = kept.pop()
        _, dmiddle, _, *second = reference.backward(dout, 0 * middle, middle, None, gamma2, mean2, rstd2, None, 0.0)
        return *reference.backward(dmiddle, x, residual, b, gamma, mean, rstd, seed, dropout_p), *second

    kept = []
    return forward, backward


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (2, 384), (67, 130), (200, 768), (65, 17)])
@pytest.mark.parametrize("x_there", [False, True])
def test_a_second_norm_is_as_good_as_two_in_a_row(dtypes, shape, x_there, dropout_p):
    need("native", "residual", dtypes[0])
    native = _module("residual", "native")

    def forward(x, residual, b, gamma, beta, seed, dropout_p, eps, *second):
        return native.forward(
            x if x_there else None, residual, b, gamma, beta, seed, dropout_p, eps, second=native.Second(*second)
        )

    def backward(dout, x, residual, b, gamma, beta, gamma2, mean, rstd, mean2, rstd2, seed, dropout_p):
        second = (beta, gamma2, mean2, rstd2)
        x = x if x_there else None
        return native.backward(dout, x, residual, b, gamma, mean, rstd, seed, dropout_p, second)

    tensors = inputs(*shape, dtypes)
    results = []
    for number in (1, 2):
        with poisoned(), threads(number):
            results.append(twice(forward, backward, tensors, x_there, dropout_p))
    got, again = results
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    plain = twice(*one_by_one(), tensors, x_there, dropout_p)
    exact = twice(*one_by_one(), tensors, x_there, dropout_p, torch.float64)
    _, _, dout, _, gamma, _ = tensors
    rstd, rstd2 = exact[2], exact[4]
    by_token = ((dout * (1.5 - gamma) * gamma).double() * (rstd * rstd2)[:, None] / (1 - dropout_p)).abs()
    names = (
        "out",
        "mean",
        "rstd",
        "mean2",
        "rstd2",
        "dx",
        "dresidual",
        "dbias",
        "dgamma",
        "dbeta",
        "dgamma2",
        "dbeta2",
    )
    for i, name in enumerate(names):
        if name == "dx" and not got[i].numel():
            continue
        want = exact[6] if name == "dx" and got[i].shape != exact[i].shape else exact[i]
        terms = by_token if name in ("dx", "dresidual") else by_token.sum(0) if name in SUMS else None
        assert_as_good(got[i], plain[i], want, 2 if i < 5 else 3, name, terms if shape[0] else None)


@pytest.mark.parametrize("backend", FAST)
@given(rows=st.integers(1, 150), channels=st.integers(4, 100), drop=st.booleans(), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_shape(backend, rows, channels, drop, seed):
    need(backend, "residual", torch.float32)
    with poisoned():
        check(backend, inputs(rows, channels, DTYPES[0], seed), dropout_p=0.5 if drop else 0.0)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("dtypes", DTYPES)
def test_strides_and_threads_change_nothing(backend, dtypes):
    need(backend, "residual", dtypes[0])
    module = _module("residual", backend)
    tensors = inputs(150, 40, dtypes)
    views = [tensor.t().contiguous().t() if tensor.ndim == 2 else tensor for tensor in tensors]
    with threads(1):
        first = run(module, tensors, dropout_p=0.1)
    for number in (1, 2, 3):
        with threads(number):
            for other in (tensors, views):
                again = run(module, other, dropout_p=0.1)
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_dropout_draws_the_same_elements_as_the_reference(backend):
    need(backend, "residual", torch.float32)
    x, zeros, gamma = torch.ones(90, 50), torch.zeros(90, 50), torch.ones(50)
    args = (x, zeros, None, gamma, 0 * gamma, SEED, 0.3, 1e-5)
    got, want = (_module("residual", name).forward(*args)[0] for name in (backend, "reference"))
    assert torch.equal(got > 0, want > 0)
    assert 0.6 < (got > 0).float().mean() < 0.8


@pytest.mark.parametrize("backend", FAST)
def test_kernels_refuse_tensors_of_another_kind(backend):
    need(backend, "residual", torch.float32)
    module = _module("residual", backend)
    x, gamma = torch.zeros(4, 6), torch.ones(6)
    with pytest.raises(InputError, match="native kernel needs residual"):
        module.forward(x, x.bfloat16(), None, gamma, gamma, None, 0.0, 1e-12)
    with pytest.raises(InputError, match="native kernel needs mean"):
        module.backward(x, x, x, None, gamma, gamma[:3], gamma[:4], None, 0.0)
