"""Measures bias, dropout, residual and LayerNorm, forward and backward: the kernel against unfused torch and Inductor,
to decide whether the op needs a kernel."""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import dropout, layer_norm

from bench.gpu.measure import Row, Setting, Work, both_passes, compare, measured
from ticketops import ops


def _plain(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor, dropout_p: float = 0.1) -> Tensor:
    return layer_norm(residual + dropout(x + bias, dropout_p), gamma.shape, gamma, beta)


def _ours(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor, bias: Tensor, dropout_p: float = 0.1) -> Tensor:
    return ops.residual_norm(x, residual, gamma, beta, bias=bias, dropout_p=dropout_p, eps=1e-5)


def _leaves(tokens: int, setting: Setting) -> list[Tensor]:
    channels = 16 if setting.tiny else 768
    return [setting.randn(*shape) for shape in ((tokens, channels), (tokens, channels), *[(channels,)] * 3)]


def check(setting: Setting) -> str:
    """Returns the correctness gate, on few tokens and without dropout, whose masks differ from torch's."""
    torch.manual_seed(0)
    values = _leaves(8 if setting.tiny else 512, setting)
    return compare(partial(_ours, dropout_p=0.0), partial(_plain, dropout_p=0.0), values, setting)


def rows(setting: Setting) -> list[Row]:
    """Measures 4k to 64k tokens with every contender.

    Returns:
        The rows.
    """
    verdict = check(setting)
    contenders = {"ticketops": _ours, "torch": _plain, "torch.compile": setting.compile(_plain)}
    table = []
    for tokens in (8,) if setting.tiny else (4096, 16384, 65536):
        leaves = _leaves(tokens, setting)
        gradient = torch.randn_like(leaves[0])
        # Forward reads two and writes one tensor of the tokens' size, backward reads three and writes two.
        need = Work(0, 8 * leaves[0].numel() * setting.dtype.itemsize)
        for name, call in contenders.items():
            row = {
                "bench": "residual",
                "workload": f"{tokens} tokens",
                "tokens": tokens,
                "pass": "forward+backward",
                "contender": name,
                "gate": verdict,
            }
            table.append(measured(row, both_passes(call, leaves, gradient), need, setting))
    return table
