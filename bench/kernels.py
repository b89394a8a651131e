"""Compares the native CPU kernels with the torch operations of stock transformers, on sequence lengths as in RTE.

    python -m bench.kernels --threads 2

All contenders take turns in one process. Ratios are those of the fastest rounds. For comparison the machine's own rates
are printed: a copy in memory (data in caches is faster) and a torch matrix product of the same dtype.
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from bench.step import circumstances
from ticketops import ops
from ticketops.ops import Sequences
from ticketops.ops.products import product

BATCH, HEADS, DROPOUT = 32, 12, 0.1


def fastest(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Runs the contenders in turns. Returns the seconds of each one's fastest round."""
    seconds = dict.fromkeys(contenders, float("inf"))
    for _ in range(rounds):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    return seconds


def step(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[[], object]:
    """Returns a function that runs the forward and backward pass of `function` on the inputs."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    gradient = torch.ones_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, gradient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, default=10, help="rounds of each contender (default: 10)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(BATCH, generator=generator) * 25 + 65).clamp(20, 128).int()
    sequences = Sequences.from_lengths(lengths)
    tokens, width = int(lengths.sum()), int(lengths.max())
    real = torch.arange(width) < lengths[:, None]
    mask = real[:, None, None, :]

    memory, target, square = torch.randn(1 << 24), torch.zeros(1 << 24), torch.randn(1024, 1024)
    squares = {dtype: square.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    machine = fastest({"copy": lambda: target.copy_(memory)}, options.rounds)
    bandwidth = 2 * 4 * 2**24 / machine["copy"] / 1e9
    around = circumstances(memory.device)
    print(", ".join(f"{name} {around[name]}" for name in ("device", "cpu_capability", "torch", "python")))
    print(f"{tokens} tokens in {BATCH} x {width}, {options.threads} threads, dropout {DROPOUT}, forward + backward")
    print(f"copy {bandwidth:.1f} GB/s")
    for dtype, factor in squares.items():
        seconds = fastest({"product": lambda factor=factor: product(factor, factor)}, options.rounds)
        rates = {"GB/s": bandwidth, "GFLOP/s": 2 * 1024**3 / seconds["product"] / 1e9}
        print(f"{str(dtype).removeprefix('torch.')} product {rates['GFLOP/s']:.0f} GFLOP/s")
        for head_dim in (32, 64):
            channels = HEADS * head_dim
            neurons = 4 * channels
            packed = [torch.randn(tokens, HEADS, head_dim).to(dtype) for _ in range(3)]
            padded = [torch.randn(BATCH, HEADS, width, head_dim).to(dtype) for _ in range(3)]
            rows, padded_rows = (
                [torch.randn(n, channels).to(dtype) for _ in range(2)] for n in (tokens, BATCH * width)
            )
            gamma, beta = torch.ones(channels).to(dtype), torch.zeros(channels).to(dtype)
            w1, w2 = torch.randn(neurons, channels).to(dtype), torch.randn(channels, neurons).to(dtype)
            b1, b2 = torch.zeros(neurons).to(dtype), torch.zeros(channels).to(dtype)

            def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return ops.attention(q, k, v, sequences, dropout_p=DROPOUT)

            def stock_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
                return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=DROPOUT)

            def norm(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
                return ops.residual_norm(x, residual, gamma, beta, dropout_p=DROPOUT)

            def stock_norm(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
                return functional.layer_norm(functional.dropout(x, DROPOUT) + residual, gamma.shape, gamma, beta)

            def ffn(x: Tensor, *weights: Tensor) -> Tensor:
                return ops.ffn(x, *weights, sequences)

            def stock_ffn(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
                return functional.linear(functional.gelu(functional.linear(x, w1, b1)), w2, b2)

            weights = [w1, b1, w2, b2]
            flops = 14 * int((lengths.long() ** 2).sum()) * channels
            for name, ours, stock, work, unit in (
                ("attention", step(attention, packed), step(stock_attention, padded), flops, "GFLOP/s"),
                (
                    "residual_norm",
                    step(norm, [*rows, gamma, beta]),
                    step(stock_norm, [*padded_rows, gamma, beta]),
                    8 * tokens * channels * dtype.itemsize,
                    "GB/s",
                ),
                (
                    "ffn",
                    step(ffn, [rows[0], *weights]),
                    step(stock_ffn, [padded_rows[0], *weights]),
                    12 * tokens * channels * neurons,
                    "GFLOP/s",
                ),
            ):
                seconds = fastest({"ours": ours, "stock": stock}, options.rounds)
                rate = work / seconds["ours"] / 1e9
                print(
                    f"{str(dtype).removeprefix('torch.'):8} {HEADS} x {head_dim} {name:13} "
                    f"{seconds['ours'] * 1e3:8.2f} ms {rate:6.1f} {unit:7} {rate / rates[unit]:6.1%} of the machine's "
                    f"{seconds['stock'] / seconds['ours']:5.1f}x stock"
                )


if __name__ == "__main__":
    main()
