"""Measures projections of some of BERT-base's heads, forward and backward: the indexed kernels against compaction (to
choose triton_configs.MOST_INDEXED_TOKENS) and against all heads."""

from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from bench.gpu.measure import Row, Setting, Work, both_passes, compare, measured
from ticketops import ops
from ticketops.ops import projection


def _leaves(tokens: int, setting: Setting) -> list[Tensor]:
    """Returns x, the weights of q, k, v and the output, and the biases of q, k and v."""
    channels = 32 if setting.tiny else 768
    weights = [setting.randn(channels, channels, scale=channels**-0.5) for _ in range(4)]
    return [setting.randn(tokens, channels), *weights, *(setting.randn(channels) for _ in range(3))]


def _kept(heads: int, share: float, setting: Setting) -> Tensor:
    """Returns the indices of a share of the heads, evenly spaced."""
    kept = round(heads * share)
    return torch.arange(kept, device=setting.device) * heads // kept


def _projections(groups: Tensor, heads: int, most_indexed_tokens: int) -> Callable[..., Tensor]:
    """Returns a function of all four projections, which uses the kernels up to a number of tokens, compaction above
    it."""

    def call(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, *biases: Tensor) -> Tensor:
        with mock.patch.object(projection, "_most_indexed_tokens", return_value=most_indexed_tokens):
            q, k, v = ops.project_rows(x, (wq, wk, wv), biases, groups, heads)
            return ops.project_columns(q + k + v, wo, groups, heads)

    return call


def _whole(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, wo: Tensor, *biases: Tensor) -> Tensor:
    q, k, v = (functional.linear(x, w, b) for w, b in zip((wq, wk, wv), biases, strict=True))
    return functional.linear(q + k + v, wo)


def check(setting: Setting, groups: Tensor, heads: int) -> str:
    """Returns the correctness gate, on few tokens."""
    torch.manual_seed(0)
    values = _leaves(8 if setting.tiny else 512, setting)
    ours, plain = (_projections(groups, heads, most) for most in (len(values[0]), 0))
    return compare(ours, plain, values, setting)


def rows(setting: Setting) -> list[Row]:
    """Measures 4k to 64k tokens and 25, 50 and 75 % of the heads.

    Returns:
        The rows.
    """
    heads = 2 if setting.tiny else 12
    table = []
    for share in (0.5,) if setting.tiny else (0.25, 0.5, 0.75):
        groups = _kept(heads, share, setting)
        verdict = check(setting, groups, heads)
        for tokens in (8,) if setting.tiny else (4096, 8192, 16384, 32768, 65536):
            leaves = _leaves(tokens, setting)
            gradient = torch.randn_like(leaves[0])
            channels, selected = leaves[0].shape[1], len(groups) * leaves[1].shape[0] // heads
            need = Work(
                3 * 4 * 2 * tokens * channels * selected,
                setting.dtype.itemsize * (4 * tokens * channels + 11 * tokens * selected + 12 * channels * selected),
            )
            contenders = {
                "ticketops": _projections(groups, heads, tokens),
                "compaction": _projections(groups, heads, 0),
                "all heads": _whole,
            }
            for name, call in contenders.items():
                row = {
                    "bench": "projection",
                    "workload": f"{share:.0%} of heads, {tokens} tokens",
                    "tokens": tokens,
                    "pass": "forward+backward",
                    "contender": name,
                    "gate": verdict,
                }
                timed = both_passes(call, leaves, gradient)
                table.append(measured(row, timed, need if name != "all heads" else None, setting))
    return table
