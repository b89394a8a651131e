"""Measures the FFN, forward and backward with importance, against unfused torch (cuBLAS) and torch.compile."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import gelu, linear

from bench.gpu.measure import Row, Setting, Work, both_passes, compare, measured
from bench.gpu.workloads import Workload
from ticketops import ops


def _plain(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    return linear(gelu(linear(x, w1, b1)), w2, b2)


def _leaves(tokens: int, setting: Setting) -> list[Tensor]:
    channels, neurons = (16, 32) if setting.tiny else (768, 3072)
    return [
        setting.randn(tokens, channels),
        setting.randn(neurons, channels, scale=channels**-0.5),
        setting.randn(neurons),
        setting.randn(channels, neurons, scale=neurons**-0.5),
        setting.randn(channels),
    ]


def check(setting: Setting) -> str:
    """Returns the correctness gate, on few tokens."""
    torch.manual_seed(0)
    values = _leaves(8 if setting.tiny else 512, setting)
    sequences = Workload("", (len(values[0]),)).sequences(setting.device)
    return compare(lambda *leaves: ops.ffn(*leaves, sequences), _plain, values, setting)


def rows(setting: Setting) -> list[Row]:
    """Measures 4k to 64k tokens with every contender.

    Returns:
        The rows.
    """
    verdict = check(setting)
    table = []
    for tokens in (8,) if setting.tiny else (4096, 16384, 65536):
        length = 4 if setting.tiny else 128
        sequences = Workload("", (length,) * (tokens // length)).sequences(setting.device)
        sink = torch.zeros(len(sequences), device=setting.device, requires_grad=True)
        leaves = _leaves(tokens, setting)
        gradient = torch.randn_like(leaves[0])
        width = 16 if setting.tiny else 64
        count = leaves[1].shape[0] // width
        half = torch.arange(0, count, 2, device=setting.device)
        contenders: dict[str, tuple[Callable[..., Tensor], list[Tensor]]] = {
            "ticketops": (lambda *x, s=sequences, i=sink: ops.ffn(*x, s, importance=i), [*leaves, sink]),
            "ticketops without importance": (lambda *x, s=sequences: ops.ffn(*x, s), leaves),
            "ticketops, half the neurons": (
                lambda *x, s=sequences, h=half, n=count: ops.ffn(*x, s, blocks=h, count=n),
                leaves,
            ),
            "torch": (_plain, leaves),
            "torch.compile": (setting.compile(_plain), leaves),
        }
        neurons, channels = leaves[1].shape
        need = Work(
            6 * 2 * tokens * neurons * channels,
            setting.dtype.itemsize * (5 * tokens * channels + 7 * tokens * neurons + 5 * neurons * channels),
        )
        for name, (call, inputs) in contenders.items():
            row = {
                "bench": "ffn",
                "workload": f"{tokens} tokens",
                "tokens": tokens,
                "pass": "forward+backward",
                "contender": name,
                "gate": verdict,
            }
            table.append(measured(row, both_passes(call, leaves, gradient, inputs), need, setting))
    return table
