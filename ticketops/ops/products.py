"""Matrix products on the CPU, by the one of torch's libraries that is fast for a dtype on this processor."""

from functools import cache

import torch
from torch import Tensor

from ticketops.ops.extension import native
from ticketops.ops.memory import empty


@cache
def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices at speed; where it emulates them, they take several times as long as
    float32 ones."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def prefers_onednn() -> bool:
    """Whether oneDNN multiplies float32 matrices, since MKL, which torch takes, keeps to AVX2 on this processor.

    It does so on all that are not Intel's: on two cores of an EPYC with full AVX-512 (Zen 5), the products of 2,000
    tokens with 384 x 1,536 weights run at 216 to 241 GFLOP/s in MKL and at 390 to 530 in oneDNN, those of 32 tokens at
    157 to 222 and 343 to 360 (torch 2.13; `a @ b` against `product`, the faster third of 20 calls).
    """
    return (
        native is not None
        and native.isa() not in ("avx2", "generic")
        and not native.is_intel()
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


def explain() -> str:
    """Which library multiplies float32 matrices, and why, for `ticketops doctor`."""
    if prefers_onednn():
        return "oneDNN, since MKL keeps to AVX2 on this processor"
    return "MKL, as in torch" if torch.backends.mkl.is_available() else "torch's"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The matrix product a b + bias in the inputs' dtype."""
    dtype = a.dtype
    if dtype == torch.bfloat16 and not has_bf16_products():
        return product(a.float(), b.float(), None if bias is None else bias.float()).to(dtype)
    # In bfloat16 torch takes oneDNN itself, but fills the result with the bias beforehand: 0.91 ms in place of 0.78 for
    # 420 tokens and 384 x 1,536 weights.
    if prefers_onednn() and (dtype == torch.float32 or bias is not None) and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), bias, "none", [], "")
    out = empty((a.shape[0], b.shape[1]), dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in float32; `total` may be changed."""
    if prefers_onednn() and a.numel() and b.numel():
        return torch.ops.mkldnn._linear_pointwise(a, total, b.t(), None, "add")
    return total.addmm_(a, b)
