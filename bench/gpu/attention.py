"""Measures attention, forward and backward with importance, against torch's sdpa and varlen_attn, FlexAttention and
flash-attn."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.gpu.measure import Row, Setting, Work, gate, measured
from bench.gpu.workloads import Workload, workloads
from ticketops import ops

PASSES = ("forward", "forward+backward")
# Number of sequences of a workload that its correctness gate compares.
GATED = 4


def _step(out: Callable[[], Tensor], leaves: tuple[Tensor, ...], kind: str) -> Callable[[], object]:
    """Returns the function to time: the forward pass, or forward and the gradients of all leaves."""
    if kind == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return out()

        return forward
    gradient = torch.randn_like(out())
    return lambda: torch.autograd.grad(out(), leaves, gradient)


def ours(
    work: Workload, setting: Setting, heads: int, head_dim: int, kind: str, importance: bool = True, masked: int = 0
) -> Callable[[], object]:
    q, k, v = (setting.randn(work.tokens, heads, head_dim) for _ in range(3))
    sequences = work.sequences(setting.device)
    head_mask = None
    if masked:
        head_mask = torch.ones(heads, device=setting.device)
        head_mask[:masked] = 0
    sink = torch.zeros((len(sequences), heads), device=setting.device, requires_grad=True) if importance else None
    leaves = (q, k, v) if sink is None else (q, k, v, sink)
    return _step(lambda: ops.attention(q, k, v, sequences, head_mask=head_mask, importance=sink), leaves, kind)


def sdpa(
    work: Workload, setting: Setting, heads: int, head_dim: int, kind: str, backend: SDPBackend
) -> Callable[[], object]:
    q, k, v = (setting.randn(len(work.lengths), heads, work.width, head_dim) for _ in range(3))
    mask = work.real(setting.device)[:, None, None] if work.padded else None

    def out() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _step(out, (q, k, v), kind)


def flex(work: Workload, setting: Setting, heads: int, head_dim: int, kind: str) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = (setting.randn(len(work.lengths), heads, work.width, head_dim) for _ in range(3))
    mask = None
    if work.padded:
        lengths = torch.tensor(work.lengths, device=setting.device)
        mask = create_block_mask(
            lambda b, h, i, j: j < lengths[b], len(work.lengths), None, work.width, work.width, setting.device
        )
    # One function is compiled with and without mask and gradients, and for fixed and dynamic shapes.
    torch._dynamo.config.recompile_limit = 32
    compiled = setting.compile(flex_attention)
    return _step(lambda: compiled(q, k, v, block_mask=mask), (q, k, v), kind)


def flash(work: Workload, setting: Setting, heads: int, head_dim: int, kind: str) -> Callable[[], object]:
    from flash_attn import flash_attn_varlen_func

    q, k, v = (setting.randn(work.tokens, heads, head_dim) for _ in range(3))
    ends = torch.tensor((0, *work.lengths), device=setting.device).cumsum(0, dtype=torch.int32)
    return _step(lambda: flash_attn_varlen_func(q, k, v, ends, ends, work.width, work.width), (q, k, v), kind)


def varlen(work: Workload, setting: Setting, heads: int, head_dim: int, kind: str) -> Callable[[], object]:
    """Builds torch's own attention over packed sequences."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (setting.randn(work.tokens, heads, head_dim) for _ in range(3))
    ends = torch.tensor((0, *work.lengths), device=setting.device).cumsum(0, dtype=torch.int32)
    return _step(lambda: varlen_attn(q, k, v, ends, ends, work.width, work.width), (q, k, v), kind)


def check(work: Workload, setting: Setting, heads: int, head_dim: int) -> str:
    """Returns the correctness gate of a workload, on its first sequences."""
    some = Workload(work.name, work.lengths[:GATED])
    torch.manual_seed(0)
    values = [setting.randn(some.tokens, heads, head_dim) for _ in range(3)]
    gradient = setting.randn(some.tokens, heads, head_dim).detach()

    def plain(dtype: torch.dtype) -> list[Tensor]:
        leaves = [x.detach().to(dtype).requires_grad_() for x in values]
        rows = zip(*(x.split(list(some.lengths)) for x in leaves), strict=True)
        outs = []
        for q, k, v in rows:
            weights = (torch.einsum("qhd,khd->hqk", q, k) * head_dim**-0.5).softmax(-1)
            outs.append(torch.einsum("hqk,khd->qhd", weights, v))
        out = torch.cat(outs)
        return [out, *torch.autograd.grad(out, leaves, gradient.to(dtype))]

    out = ops.attention(*values, some.sequences(setting.device))
    return gate([out, *torch.autograd.grad(out, values, gradient)], plain(setting.dtype), plain(torch.float64))


def rows(setting: Setting) -> list[Row]:
    """Measures every workload with every contender.

    Returns:
        The rows; `gate` is the result of `check` for the row's workload.
    """
    heads, head_dim = (2, 16) if setting.tiny else (12, 64)
    contenders: dict[str, Callable[..., Callable[[], object]]] = {
        "ticketops": ours,
        "ticketops without importance": lambda *a: ours(*a, importance=False),
        "ticketops, half the heads masked": lambda *a: ours(*a, masked=heads // 2),
        "ticketops, half the heads": lambda w, s, h, d, kind: ours(w, s, h // 2, d, kind),
        "sdpa math": lambda *a: sdpa(*a, backend=SDPBackend.MATH),
    }
    if not setting.tiny:
        contenders |= {
            "sdpa flash": lambda *a: sdpa(*a, backend=SDPBackend.FLASH_ATTENTION),
            "sdpa efficient": lambda *a: sdpa(*a, backend=SDPBackend.EFFICIENT_ATTENTION),
            "sdpa cudnn": lambda *a: sdpa(*a, backend=SDPBackend.CUDNN_ATTENTION),
            "flex": flex,
            "torch varlen": varlen,
            "flash-attn": flash,
        }
    table = []
    for work in workloads(setting):
        verdict = check(work, setting, heads, head_dim)
        for kind in PASSES:
            products, tensors = (2, 4) if kind == "forward" else (7, 12)
            need = Work(
                products * 2 * sum(n * n for n in work.lengths) * heads * head_dim,
                tensors * work.tokens * heads * head_dim * setting.dtype.itemsize,
            )
            for name, build in contenders.items():
                row = {
                    "bench": "attention",
                    "workload": work.name,
                    "tokens": work.tokens,
                    "pass": kind,
                    "contender": name,
                    "gate": verdict,
                }
                table.append(
                    measured(row, lambda b=build, w=work, p=kind: b(w, setting, heads, head_dim, p), need, setting)
                )
    return table
