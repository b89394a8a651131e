"""Matrix products on the CPU, by the one of torch's libraries that is fast for a dtype on this processor."""

from functools import cache

import torch
from torch import Tensor

from ticketops.ops import private
from ticketops.ops.extension import address, checked, native, run
from ticketops.ops.memory import empty


def has_bf16_products() -> bool:
    """Whether oneDNN multiplies bfloat16 matrices at speed; where it emulates them, they take several times as long as
    float32 ones."""
    return private.has_onednn_bf16()


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
        and private.has_onednn_linear()
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that products of x and weights of its dtype run in: autocast's, where that is on.

    Args:
        x: any of the two.
    """
    device = x.device.type
    if not x.is_meta and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def granule(rows: int, dtype: torch.dtype, device: torch.device) -> int:
    """What a number of rows had better be a multiple of, before it meets weights of all layers.

    oneDNN compiles its kernels for every new shape, in 1.5 to 6 ms for one in bfloat16 on an Intel Xeon with AMX.
    Packed batches have nearly all another number of tokens, and so nearly every step compiled a dozen products: steps
    of MiniLM on 38 batches of RTE took 312 ms, on 60 of SST-2 153, where those of rounded numbers took 268 and 117
    (medians, every batch seen once, two cores). Above 512 rows there are 32 sizes to each power of two, 1.2 % more
    rows on average; below, multiples of 16 fill the tiles that AMX multiplies anyway.

    Args:
        rows: how many there are.
        dtype: of the products.
        device: where they run.

    Returns:
        A power of two; 1 where the library compiles nothing.
    """
    compiles = has_bf16_products() if dtype == torch.bfloat16 else dtype == torch.float32 and prefers_onednn()
    if device.type != "cpu" or not compiles:
        return 1
    return max(16, 1 << max(0, rows.bit_length() - 6))


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
        return private.onednn_linear(a, b.t(), bias)
    out = empty((a.shape[0], b.shape[1]), dtype)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def gradient_product(dout: Tensor, x: Tensor) -> Tensor:
    """dout^T x, the gradient of a linear layer's weight, in the inputs' dtype.

    Args:
        dout: [T, N].
        x: [T, C].

    Returns:
        [N, C].
    """
    # oneDNN's bfloat16 products are slow on a transposed left operand, and all the slower the wider the other is: of
    # 2,560 tokens, 384 and 1,536 channels 2.46 ms, where a transpose and the product take 0.23 and 1.44; but of 1,152
    # and 384 channels 1.76, and 0.61 and 0.99 (two cores of an Intel Xeon with AMX).
    if dout.dtype == torch.bfloat16 and has_bf16_products() and native is not None and x.shape[1] > dout.shape[1]:
        (rows, columns), transposed = dout.shape, empty(dout.shape[::-1], dout.dtype)
        dout = checked("dout", dout, torch.bfloat16, rows, columns)
        run(native.transpose, address(dout), address(transposed), rows, columns)
        return product(transposed, x)
    return product(dout.t(), x)


def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in float32; `total` may be changed."""
    if prefers_onednn() and a.numel() and b.numel():
        return private.onednn_linear_add(a, total, b.t())
    return total.addmm_(a, b)
