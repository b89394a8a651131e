import itertools

import pytest
import torch

from ticketops.ops import products

from .cases import poisoned, threads


@pytest.fixture(params=[False, True], ids=["torch's library", "oneDNN"])
def _library(request, monkeypatch):
    if request.param and not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "prefers_onednn", lambda: request.param)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("tokens", [0, 1, 7, 65])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_of_every_stride_match_float64(tokens, dtype):
    torch.manual_seed(0)
    x = torch.randn(tokens, 3 * 48, dtype=dtype)[:, 48:96]
    weight, bias, gradient = torch.randn(40, 48, dtype=dtype), torch.randn(40, dtype=dtype), torch.randn(tokens, 40)
    gradient = gradient.to(dtype)
    tolerance = {"atol": 1e-4, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.1, "rtol": 2e-2}
    for a, b, added in (
        (x, weight.t(), bias),
        (x, weight.t(), None),
        (gradient, weight, None),
        (gradient.t(), x, None),
    ):
        expected = a.double() @ b.double() + (0 if added is None else added.double())
        result = products.product(a, b, added)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, **tolerance)


@pytest.mark.usefixtures("_library")
@pytest.mark.parametrize("tokens", [0, 1, 65])
def test_products_are_added_to_a_total(tokens):
    torch.manual_seed(0)
    a, b, total = torch.randn(tokens, 40), torch.randn(40, 48), torch.randn(tokens, 48)
    expected = total.double() + a.double() @ b.double()
    torch.testing.assert_close(products.add_product(total, a, b).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 31, 33, 100])
@pytest.mark.parametrize(("outputs", "channels"), [(1, 2), (3, 70), (31, 64), (40, 41), (64, 65), (70, 33)])
def test_a_weights_gradient_is_the_product_of_a_transpose(dtype, tokens, outputs, channels):
    torch.manual_seed(0)
    wide, x = torch.randn(tokens, 3 * outputs).to(dtype), torch.randn(tokens, channels).to(dtype)
    for number, dout in itertools.product((1, 2), (wide[:, :outputs].contiguous(), wide[:, outputs : 2 * outputs])):
        with threads(number), poisoned():
            got = products.gradient_product(dout, x)
        assert got.dtype == dtype
        want = dout.double().t() @ x.double()
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.double(), want, atol=64 * eps, rtol=4 * eps)


@pytest.mark.parametrize(
    ("isa", "intel", "capability"), itertools.product(("amx", "avx512bf16", "avx512", "avx2"), (True, False), (0, 1))
)
def test_onednn_serves_where_mkl_leaves_avx512_out(monkeypatch, isa, intel, capability):
    class Native:
        pass

    native = Native()
    native.isa, native.is_intel = (lambda: isa), (lambda: intel)
    monkeypatch.setattr(products, "native", native)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512" if capability else "AVX2")
    assert products.prefers_onednn.__wrapped__() == (isa != "avx2" and not intel and bool(capability))
