"""Matrix products on the CPU, with whichever of torch's libraries (MKL or oneDNN) is faster for a dtype on this
processor."""

from functools import cache

import torch
from torch import Tensor

from ticketops.ops import private
from ticketops.ops.extension import address, checked, native, run
from ticketops.ops.memory import empty


def has_bf16_products() -> bool:
    """True if oneDNN has fast bfloat16 products on this processor. Where it emulates them, they take several times as
    long as float32 ones."""
    return private.has_onednn_bf16()


@cache
def prefers_onednn() -> bool:
    """True if float32 matrices are better multiplied by oneDNN than by MKL, torch's choice, because MKL uses no more
    than AVX2 on this processor although it has AVX-512.

    MKL limits itself so on all processors but Intel's. On two cores of an EPYC with full AVX-512 (Zen 5), products of
    2,000 tokens with 384 x 1,536 weights run at 216 to 241 GFLOP/s in MKL and at 390 to 530 in oneDNN; those of 32
    tokens at 157 to 222 and 343 to 360 (torch 2.13; `a @ b` against `product`, the faster third of 20 calls).
    """
    return (
        native is not None
        and native.isa() not in ("avx2", "generic")
        and not native.is_intel()
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and private.has_onednn_linear()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype in which a tensor's matrix products run: autocast's dtype if autocast is on, else its own.

    Args:
        x: tokens or weights.
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def granule(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """Returns the multiple to which a number of rows should be rounded up, so that matrix products have few distinct
    shapes.

    oneDNN compiles a kernel for every new shape, which takes 1.5 to 6 ms in bfloat16 on an Intel Xeon with AMX. Packed
    batches nearly all have different numbers of tokens, so without rounding nearly every step compiled a dozen
    products: steps of MiniLM on 38 batches of RTE took 312 ms (268 with rounding), on 60 of SST-2 153 ms (117 with
    rounding; medians, every batch seen once, two cores). Above 512 rows there are 32 sizes to each power of two, 1.2 %
    more rows on average. Below, multiples of 16 fill the tiles that AMX multiplies anyway.

    Args:
        rows: number of rows.
        dtype: dtype of the products.
        device: device that they run on.

    Returns:
        A power of two; 1 if the library does not compile per shape.
    """
    compiles = has_bf16_products() if dtype == torch.bfloat16 else dtype == torch.float32 and prefers_onednn()
    if device.type != "cpu" or not compiles:
        return 1
    return max(16, 1 << max(0, rows.bit_length() - 6))


def explain() -> str:
    """Names the library that multiplies float32 matrices and the reason, for `ticketops doctor`."""
    if prefers_onednn():
        return "oneDNN, since MKL keeps to AVX2 on this processor"
    return "MKL, as in torch" if torch.backends.mkl.is_available() else "torch's"


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes a b + bias.

    Args:
        a: [T, C].
        b: [C, N].
        bias: [N], or None.

    Returns:
        [T, N] in a's dtype.
    """
    dtype = a.dtype
    if dtype == torch.bfloat16 and not has_bf16_products():
        return product(a.float(), b.float(), None if bias is None else bias.float()).to(dtype)
    # torch itself uses oneDNN in bfloat16, but first fills the result with the bias: 0.91 ms instead of 0.78 for 420
    # tokens and 384 x 1,536 weights.
    if prefers_onednn() and (dtype == torch.float32 or bias is not None) and a.numel() and b.numel():
        return private.onednn_linear(a, b.t(), bias)
    out = empty((a.shape[0], b.shape[1]), dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def gradient_product(dout: Tensor, x: Tensor) -> Tensor:
    """Computes dout^T x, the gradient of a linear layer's weight.

    Args:
        dout: [T, N], gradient of the layer's output.
        x: [T, C], the layer's input.

    Returns:
        [N, C] in dout's dtype.
    """
    # oneDNN's bfloat16 products are slow with a transposed left operand, the more so the wider the right one is. For
    # 2,560 tokens, N = 384 and C = 1,536 the product takes 2.46 ms, but a transpose and a plain product 0.23 + 1.44.
    # For N = 1,152 and C = 384 it is 1.76 against 0.61 + 0.99 (two cores of an Intel Xeon with AMX).
    if dout.dtype == torch.bfloat16 and has_bf16_products() and native is not None and x.shape[1] > dout.shape[1]:
        (rows, columns), transposed = dout.shape, empty(dout.shape[::-1], dout.dtype)
        dout = checked("dout", dout, torch.bfloat16, rows, columns)
        run(native.transpose, address(dout), address(transposed), rows, columns)
        return product(transposed, x)
    return product(dout.t(), x)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes total + a b in float32, possibly in place of `total`.

    Args:
        total: [T, N].
        a: [T, C].
        b: [C, N].

    Returns:
        [T, N]; may be `total` itself.
    """
    if prefers_onednn() and a.numel() and b.numel():
        return private.onednn_linear_add(a, total, b.t())
    return total.addmm_(a, b)
