"""The Triton backends against plain PyTorch in float64: on a GPU where there is one, else in Triton's interpreter,
which needs TRITON_INTERPRET=1 before Python starts (`make test` runs this file once more with it)."""

import importlib.util
import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertForTokenClassification

import ticketops.ops as ops
from ticketops import Ticket, patch
from ticketops.errors import UnsupportedError
from ticketops.ops import Sequences, Weights
from ticketops.ops.backends import BACKENDS, choose
from ticketops.ops.dropout import draw_seed, keep_elements, keep_mask
from ticketops.ops.ffn import ACTIVATIONS

from .cases import SHORT, packed_sequences, padded_sequences, with_holes
from .layers import KINDS, LIKE_BERT, TICKETS, assert_equal, inputs, one_by_one, results, stack
from .layers import check as check_layer
from .layers import opcheck as opcheck_layer

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
import triton.language as tl
from bounds import roundings

from ticketops.ops import triton_common as common
from ticketops.ops.layer.copies import Table

DEVICE = torch.device("cpu" if common.INTERPRETED else "cuda")
DTYPES = [torch.float32, torch.float16] + ([] if common.INTERPRETED else [torch.bfloat16])
# On a GPU nearly every example has kernels of its own to compile, for seconds each.
EXAMPLES = 6 if common.INTERPRETED else 20
pytestmark = [
    pytest.mark.skipif(
        not (common.INTERPRETED or torch.cuda.is_available()), reason="needs a GPU or TRITON_INTERPRET=1"
    ),
    *([] if common.INTERPRETED else [pytest.mark.gpu]),
]
drawn = settings(
    max_examples=EXAMPLES,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    # The interpreter takes seconds for an example, and so minutes to make a failing one smaller.
    phases=[Phase.explicit, Phase.reuse, Phase.generate] + ([] if common.INTERPRETED else [Phase.shrink]),
)

# One token, primes, both sides of every block edge up to 64; 0 is an empty sequence.
LENGTHS = [0, 1, 2, 7, 15, 16, 17, 31, 32, 33, 37] + ([] if common.INTERPRETED else [63, 64, 65, 127, 128, 129, 257])
MASK_VALUES = [0.0, 0.0, 1.0, 1.0, 0.5, -0.75, 1.5]


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks for Triton, and fills every fresh tensor with NaN, so that a place nobody wrote to shows."""
    monkeypatch.setenv("TICKETOPS_BACKEND", "triton")
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, _poisoned(getattr(torch, name)))


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def poisoned(*args: object, **options: object) -> Tensor:
        x = allocate(*args, **options)
        return x.fill_(float("nan")) if x.is_floating_point() else x

    return poisoned


#: What a sum of signed terms is measured against: rounding knows the terms, not how they cancel.
TERMS = {
    "signed": "absolute",
    "dmask": "absolute",
    "dffn_mask": "absolute",
    "neuron_signed": "neuron_absolute",
    "dneuron_mask": "neuron_absolute",
}


def check(
    actual: dict[str, Tensor], same: dict[str, Tensor], exact: dict[str, Tensor], names: dict[str, str] = TERMS
) -> None:
    """Holds every error to twice (gradients: three times) that of plain PyTorch in the same dtype, plus a few roundings
    of the largest term, below which that error is luck."""
    for name, value in actual.items():
        assert value.shape == exact[name].shape, name
        assert value.isfinite().all(), f"{name} is not finite"
        if not value.numel():
            continue
        plain = (same[name].double() - exact[name]).abs().max().item()
        error = (value.double() - exact[name]).abs().max().item()
        floor = 4 * torch.finfo(same[name].dtype).eps * exact[names.get(name, name)].abs().max().item() + 1e-6
        allowed = (2 if name == "out" else 3) * plain + floor
        assert error <= allowed, f"{name}: error {error:.2e}, plain PyTorch {plain:.2e}, allowed {allowed:.2e}"


def leaf(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.detach().to(dtype).requires_grad_()


def spans(sequences: Sequences) -> list[tuple[int, int, int]]:
    return [(b, start, end) for b, (start, end) in enumerate(sequences.spans()) if end > start]


def draw_sequences(lengths: list[int], layout: str) -> tuple[Sequences, int]:
    """Sequences and the number of rows they lie in: packed, padded, or in reverse order with gaps all over."""
    if layout == "padded":
        width = max(lengths) + 1
        return _to_device(Sequences.from_lengths(lengths, width)), width * len(lengths)
    if layout == "packed":
        return _to_device(Sequences.from_lengths(lengths)), sum(lengths)
    ends = list(itertools.accumulate(length + 2 for length in reversed(lengths)))
    starts = [end - length for end, length in zip(ends, reversed(lengths), strict=True)][::-1]
    both = torch.tensor([starts, lengths], dtype=torch.int32, device=DEVICE)
    return Sequences(both[0], both[1], max(lengths) + 3), ends[-1] + 3


def _to_device(sequences: Sequences) -> Sequences:
    return Sequences(sequences.starts.to(DEVICE), sequences.lengths.to(DEVICE), sequences.max_length)


layouts = st.sampled_from(["packed", "padded", "scattered"])
lengths = st.lists(st.sampled_from(LENGTHS), min_size=1, max_size=3)


# Attention


def plain_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sequences: Sequences,
    head_mask: Tensor | None,
    gradient: Tensor,
    seed: Tensor | None,
    dropout_p: float,
    window: int | None,
    bias: Tensor | None,
    tables: list[Tensor | None],
) -> dict[str, Tensor]:
    """Attention as one would write it with torch's autograd, in the dtype of its inputs."""
    heads = q.shape[1]
    mask = torch.ones(heads, dtype=q.dtype, device=q.device) if head_mask is None else head_mask
    unmasked = 0 * (q + k + v)
    for _, start, end in spans(sequences):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end])
        place = torch.arange(end - start, device=q.device)
        for table, product, x in zip(tables, ("qhd,qkhd->hqk", "khd,qkhd->hqk"), (q, k), strict=True):
            if table is not None:
                vectors = table[len(table) // 2 + place - place[:, None]]
                scores = scores + torch.einsum(product, x[start:end], vectors)
        scores = scores * q.shape[2] ** -0.5
        if bias is not None:
            scores = scores + bias[:, bias.shape[1] // 2 + place - place[:, None]]
        if window is not None:
            scores = scores.masked_fill((place[:, None] - place).abs() > window, float("-inf"))
        if sequences.real is not None:
            real = sequences.real[start:end]
            scores = scores.masked_fill(~real & (place[:, None] != place), float("-inf"))
        weights = scores.softmax(-1)
        if sequences.real is not None:
            weights = weights * real[:, None]
        if dropout_p:
            kept = keep_mask(
                seed, start, end - start, torch.arange(heads, device=q.device), heads, end - start, dropout_p
            )
            weights = weights * kept / (1 - dropout_p)
        unmasked = unmasked.index_copy(
            0, torch.arange(start, end, device=q.device), torch.einsum("hqk,khd->qhd", weights, v[start:end])
        )
    out = unmasked * mask[:, None]
    named = {"dq": q, "dk": k, "dv": v, "dbias": bias, "dkeys": tables[0], "dqueries": tables[1]}
    named = {name: x for name, x in named.items() if x is not None}
    found = torch.autograd.grad(out, list(named.values()), gradient, retain_graph=True, materialize_grads=True)
    terms = (unmasked * gradient).sum(-1) * (mask != 0)
    zero = torch.zeros((len(sequences), heads), dtype=q.dtype, device=q.device)
    signed, absolute = zero, zero.clone()
    for b, start, end in spans(sequences):
        signed[b], absolute[b] = terms[start:end].sum(0), terms[start:end].abs().sum(0)
    return {"out": out, **dict(zip(named, found, strict=True)), "signed": signed, "absolute": absolute}


def check_attention(
    lengths: list[int],
    layout: str,
    mask: list[float] | None,
    head_dim: int,
    dropout_p: float,
    dtype: torch.dtype,
    strided: bool,
    window: int | None,
    further: int | None = None,
    tables: tuple[bool, bool] = (False, False),
    holes: bool = False,
) -> None:
    sequences, tokens = draw_sequences(lengths, layout)
    sequences = with_holes(sequences, tokens) if holes else sequences
    heads = 2 if mask is None else len(mask)
    torch.manual_seed(len(lengths) + head_dim)
    # Strided: a slice of one [D, H, 3, T] tensor, whose last dimension is not the contiguous one.
    values = torch.randn((head_dim, heads, 3, tokens) if strided else (3, tokens, heads, head_dim), device=DEVICE)
    q, k, v = (values.permute(2, 3, 1, 0) if strided else values).to(dtype).unbind()
    gradient = torch.randn((tokens, heads, head_dim), device=DEVICE).to(dtype)
    head_mask = None if mask is None else torch.tensor(mask, device=DEVICE)
    # It may reach further than the longest sequence.
    distances = 2 * (max(sequences.max_length, 1) + (further or 0)) - 1
    vectors = [torch.randn((distances, heads, head_dim)).to(DEVICE, dtype) if there else None for there in tables]
    bias = None
    if any(tables):
        window = None
    elif further is not None:
        bias = torch.randn((heads, distances)).to(DEVICE)

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(7)
        seed = draw_seed(DEVICE) if dropout_p else None
        mask = None if head_mask is None else head_mask.to(dtype)
        return plain_attention(
            *(leaf(x, dtype) for x in (q, k, v)),
            *(sequences, mask, gradient.to(dtype), seed, dropout_p, window, leaf(bias, dtype)),
            [leaf(x, dtype) for x in vectors],
        )

    exact, same = plain(torch.float64), plain(dtype)
    actual: dict[str, Tensor] = {}
    for per_token in (False, True):
        torch.manual_seed(7)
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        mask_leaf, bias_leaf = leaf(head_mask, torch.float32), leaf(bias, torch.float32)
        table_leaves = [leaf(x, dtype) for x in vectors]
        importance = torch.zeros((len(sequences), heads), device=DEVICE, requires_grad=True)
        out = ops.attention(
            *inputs,
            sequences,
            head_mask=mask_leaf,
            dropout_p=dropout_p,
            importance=importance,
            per_token=per_token,
            window=window,
            position_bias=bias_leaf,
            position_keys=table_leaves[0],
            position_queries=table_leaves[1],
        )
        out.backward(gradient)
        actual |= {"out": out, **{f"d{name}": x.grad for name, x in zip("qkv", inputs, strict=True)}}
        actual["absolute" if per_token else "signed"] = importance.grad
        if mask_leaf is not None:
            actual["dmask"] = mask_leaf.grad
        for name, x in zip(("dbias", "dkeys", "dqueries"), (bias_leaf, *table_leaves), strict=True):
            if x is not None:
                assert actual.setdefault(name, x.grad).equal(x.grad)
    for result in (exact, same):
        result["dmask"] = result["signed"].sum(0)
    if not any(tables) or not tokens:
        check(actual, same, exact)
        return
    # A score's gradient is a difference, of one token exactly 0, from which the kernels take the product of the rounded
    # output, half an eps off, with its gradient.
    largest = max(x.abs().max().item() for x in (q, k, *vectors) if x is not None)
    products = (exact["out"].abs() * gradient.double().abs()).sum(-1).max() * largest * head_dim**-0.5
    names = {f"d{name}": f"terms of d{name}" for name in ("q", "k", "keys", "queries") if f"d{name}" in exact}
    exact |= {term: torch.maximum(exact[name].abs().max(), products / 8) for name, term in names.items()}
    check(actual, same, exact, TERMS | names)


@pytest.mark.parametrize("dtype", DTYPES)
@drawn
@given(
    lengths=lengths,
    layout=layouts,
    mask=st.none() | st.lists(st.sampled_from(MASK_VALUES), min_size=1, max_size=2),
    head_dim=st.sampled_from([16, 24, 32, 40, 64, 72, 128]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    strided=st.booleans(),
    window=st.sampled_from([None, 0, 1, 5, 16, 33, 100]),
    further=st.none() | st.integers(0, 20),
)
@example(lengths=[1], layout="packed", mask=None, head_dim=16, dropout_p=0.0, strided=False, window=None, further=None)
@example(
    lengths=[33, 0, 17],
    layout="scattered",
    mask=[0.0, 0.5],
    head_dim=32,
    dropout_p=0.3,
    strided=True,
    window=7,
    further=2,
)
@example(
    lengths=[67], layout="padded", mask=[0.0, -1.5], head_dim=24, dropout_p=0.1, strided=False, window=None, further=0
)
@example(lengths=[0, 0], layout="scattered", mask=None, head_dim=16, dropout_p=0.1, strided=False, window=0, further=3)
@example(
    lengths=[63, 64], layout="packed", mask=[0.5], head_dim=16, dropout_p=0.1, strided=False, window=None, further=None
)
@example(lengths=[65], layout="packed", mask=[1.0], head_dim=16, dropout_p=0.1, strided=False, window=None, further=1)
@example(lengths=[0, 131], layout="padded", mask=[0.5], head_dim=16, dropout_p=0.3, strided=False, window=3, further=0)
def test_attention(lengths, layout, mask, head_dim, dropout_p, dtype, strided, window, further):
    check_attention(lengths, layout, mask, head_dim, dropout_p, dtype, strided, window, further)


@pytest.mark.parametrize("dtype", DTYPES)
@drawn
@given(
    lengths=lengths,
    layout=layouts,
    mask=st.none() | st.lists(st.sampled_from(MASK_VALUES), min_size=1, max_size=2),
    head_dim=st.sampled_from([16, 24, 40, 64]),
    dropout_p=st.sampled_from([0.0, 0.3]),
    strided=st.booleans(),
    further=st.integers(0, 20),
    tables=st.sampled_from([(True, True), (True, False), (False, True)]),
)
@example(
    lengths=[33, 0, 17, 1, 2, 3, 4, 5, 6, 7],
    layout="scattered",
    mask=[0.0, 0.5],
    head_dim=32,
    dropout_p=0.3,
    strided=True,
    further=2,
    tables=(True, True),
)
@example(
    lengths=[0, 0],
    layout="packed",
    mask=None,
    head_dim=16,
    dropout_p=0.0,
    strided=False,
    further=0,
    tables=(True, True),
)
@example(
    lengths=[49],
    layout="padded",
    mask=[-1.5],
    head_dim=16,
    dropout_p=0.1,
    strided=False,
    further=20,
    tables=(False, True),
)
def test_attention_with_position_vectors(lengths, layout, mask, head_dim, dropout_p, dtype, strided, further, tables):
    check_attention(lengths, layout, mask, head_dim, dropout_p, dtype, strided, None, further, tables)


@pytest.mark.parametrize("layout", ["packed", "scattered"])
@pytest.mark.parametrize(
    ("window", "further", "tables"),
    [
        (None, None, (False, False)),
        (7, None, (False, False)),
        (None, 2, (False, False)),
        (7, 2, (False, False)),
        (None, 2, (True, True)),
    ],
)
def test_attention_around_holes(layout, window, further, tables):
    for lengths in ([33, 0, 17, 1, 2], [49] if any(tables) else [131]):
        check_attention(
            *(lengths, layout, [0.0, 0.5], 32, 0.3, torch.float32, False, window, further, tables), holes=True
        )


@pytest.mark.skipif(not common.INTERPRETED, reason="a GPU has its own tiles")
def test_position_vectors_with_the_tiles_of_newer_gpus(monkeypatch):
    monkeypatch.setattr(common, "_device_capability", lambda device: (9, 0))
    check_attention([130, 33], "packed", [0.5], 40, 0.1, torch.float16, False, None, 0, (True, True))


@pytest.mark.skipif(not common.INTERPRETED, reason="a GPU has its own tiles")
@pytest.mark.parametrize("target", [(9, 0), (10, 0)])
@pytest.mark.parametrize("further", [None, 0])
@pytest.mark.parametrize(
    ("lengths", "head_dim", "window"),
    [([64, 33], 64, None), ([127, 128], 40, 20), ([129], 64, None), ([130], 72, None), ([200], 16, 30)],
)
def test_attention_with_the_tiles_of_newer_gpus(monkeypatch, target, lengths, head_dim, window, further):
    """A whole row of 128, and blocks of queries and keys that differ; the interpreter has an older GPU's tiles."""
    monkeypatch.setattr(common, "_device_capability", lambda device: target)
    check_attention(lengths, "packed", [0.5], head_dim, 0.1, torch.float16, False, window, further)


@pytest.mark.parametrize(("tokens", "heads", "batch"), [(0, 2, 1), (0, 2, 0), (3, 2, 0), (3, 0, 1)])
def test_attention_of_nothing(tokens, heads, batch):
    q = torch.ones((tokens, heads, 16), device=DEVICE, requires_grad=True)
    sequences = _to_device(Sequences.from_lengths([tokens] * batch))
    out = ops.attention(q, q, q, sequences, dropout_p=0.1)
    out.sum().backward()
    assert out.shape == q.grad.shape == q.shape
    assert not out.any()
    assert not q.grad.any()


def test_attention_dropout_is_the_reference_mask():
    # With v the identity, the output is the dropped weights themselves.
    n, p = 37, 0.4
    sequences = _to_device(Sequences.from_lengths([n]))
    v = torch.eye(n, device=DEVICE)[:, None].expand(n, 3, n)
    torch.manual_seed(3)
    out = ops.attention(torch.zeros_like(v), torch.zeros_like(v), v, sequences, dropout_p=p)
    torch.manual_seed(3)
    kept = keep_mask(draw_seed(DEVICE), 0, n, torch.arange(3, device=DEVICE), 3, n, p)
    assert torch.equal(out.transpose(0, 1) != 0, kept)


def test_attention_refuses_wide_heads():
    q = torch.zeros((4, 1, 160), device=DEVICE)
    with pytest.raises(UnsupportedError, match="up to 128, got 160"):
        ops.attention(q, q, q, _to_device(Sequences.from_lengths([4])))
    q, vectors = torch.zeros((4, 1, 72), device=DEVICE), torch.zeros((7, 1, 72), device=DEVICE)
    with pytest.raises(UnsupportedError, match="at most 64 elements in float32, got 72"):
        ops.attention(q, q, q, _to_device(Sequences.from_lengths([4])), position_keys=vectors)


# FFN


def plain_ffn(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    sequences: Sequences,
    activation: str,
    ffn_mask: Tensor | None,
    neuron_mask: Tensor | None,
    gradient: Tensor,
    dropped: Tensor | float = 1.0,
) -> dict[str, Tensor]:
    one = torch.ones((), dtype=x.dtype, device=x.device)
    m = one if ffn_mask is None else ffn_mask
    n = one.expand(w2.shape[1]) if neuron_mask is None else neuron_mask
    pre, gate = functional.linear(x, w1, b1), 1
    if len(w1) != w2.shape[1]:
        pre, gate = pre.chunk(2, -1)
    activate = {
        "gelu": functional.gelu,
        "gelu_tanh": partial(functional.gelu, approximate="tanh"),
        "relu": functional.relu,
        "silu": functional.silu,
    }
    hidden = activate[activation](pre) * gate * dropped
    unmasked = functional.linear(hidden * n, w2, b2)
    out = unmasked * m
    leaves = {"dx": x, "dw1": w1, "db1": b1, "dw2": w2, "db2": b2}
    leaves = {name: x for name, x in leaves.items() if x is not None}
    gradients = torch.autograd.grad(out, tuple(leaves.values()), gradient, retain_graph=True)
    terms = (unmasked * gradient).sum(-1) * (m != 0)
    neuron_terms = (gradient * m) @ w2 * hidden * (n != 0)
    result = {"out": out, **dict(zip(leaves, gradients, strict=True))}
    for name, values in (("signed", terms), ("absolute", terms.abs())):
        result[name] = torch.stack([values[start:end].sum(0) for start, end in sequences.spans()])
    for name, values in (("neuron_signed", neuron_terms), ("neuron_absolute", neuron_terms.abs())):
        result[name] = torch.stack([values[start:end].sum(0) for start, end in sequences.spans()])
    result["dffn_mask"] = result["signed"].sum(0)
    result["dneuron_mask"] = result["neuron_signed"].sum(0)
    return result


def draw_ffn(
    tokens: int, channels: int, neurons: int, gated: bool, biased: bool, dtype: torch.dtype
) -> list[Tensor | None]:
    """x, w1, b1, w2 and b2."""
    first = (1 + gated) * neurons
    shapes = ((tokens, channels), (first, channels), (first,), (channels, neurons), (channels,))
    scales = (1.0, channels**-0.5, 0.5, neurons**-0.5, 0.5)
    drawn = [(torch.randn(shape, device=DEVICE) * scale).to(dtype) for shape, scale in zip(shapes, scales, strict=True)]
    return [x if biased or x.ndim == 2 else None for x in drawn]


@pytest.mark.parametrize("dtype", DTYPES)
@drawn
@given(
    lengths=lengths,
    layout=layouts,
    activation=st.sampled_from(ACTIVATIONS),
    ffn_mask=st.none() | st.sampled_from(MASK_VALUES),
    neuron_mask=st.booleans(),
    recording=st.sampled_from(["nothing", "ffn", "neurons", "both"]),
    per_token=st.booleans(),
    sizes=st.sampled_from([(16, 40), (24, 65), (65, 96)]),
    strided=st.booleans(),
    gated=st.booleans(),
    biased=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.4]),
)
@example(
    lengths=[33, 0, 17],
    layout="scattered",
    activation="gelu",
    ffn_mask=0.5,
    neuron_mask=True,
    recording="both",
    per_token=False,
    sizes=(24, 65),
    strided=True,
    gated=True,
    biased=True,
    dropout_p=0.4,
)
@example(
    lengths=[70],
    layout="packed",
    activation="gelu",
    ffn_mask=None,
    neuron_mask=False,
    recording="ffn",
    per_token=True,
    sizes=(16, 40),
    strided=False,
    gated=False,
    biased=True,
    dropout_p=0.4,
)
@example(
    lengths=[3, 2],
    layout="padded",
    activation="gelu_tanh",
    ffn_mask=0.0,
    neuron_mask=True,
    recording="neurons",
    per_token=True,
    sizes=(16, 40),
    strided=False,
    gated=False,
    biased=True,
    dropout_p=0.0,
)
def test_ffn(
    lengths,
    layout,
    activation,
    ffn_mask,
    neuron_mask,
    recording,
    per_token,
    sizes,
    strided,
    gated,
    biased,
    dropout_p,
    dtype,
):
    sequences, tokens = draw_sequences(lengths, layout)
    channels, neurons = sizes
    torch.manual_seed(neurons)
    inputs = draw_ffn(tokens, channels, neurons, gated, biased, dtype)
    if strided:
        inputs = [x.t().contiguous().t() if x is not None and x.ndim == 2 else x for x in inputs]
    gradient = torch.randn((channels, tokens), device=DEVICE).to(dtype).t()
    m = None if ffn_mask is None else torch.tensor(ffn_mask, device=DEVICE)
    values = torch.tensor(MASK_VALUES, device=DEVICE)
    n = values[torch.arange(neurons, device=DEVICE) % len(values)] if neuron_mask else None
    masks = [None if mask is None else mask.double() for mask in (m, n)]

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        cast = [None if mask is None else mask.to(dtype) for mask in masks]
        given = (*(leaf(x, dtype) for x in inputs), sequences, activation, *cast, gradient.to(dtype))
        return plain_ffn(*given, dropped.to(dtype))

    torch.manual_seed(neurons)
    dropped = torch.ones((tokens, neurons), device=DEVICE)
    if dropout_p:
        dropped = keep_elements(draw_seed(DEVICE), tokens, neurons, dropout_p, DEVICE) / (1 - dropout_p)
    exact, same = plain(torch.float64), plain(dtype)
    leaves = [leaf(x, dtype) for x in inputs]
    train_neurons = neuron_mask and not (per_token and recording in ("neurons", "both"))
    mask_leaf, neuron_leaf = leaf(m, torch.float32), leaf(n, torch.float32)
    if neuron_leaf is not None and not train_neurons:
        neuron_leaf.requires_grad_(False)
    sinks = {
        "importance": (recording in ("ffn", "both"), (len(sequences),)),
        "neuron_importance": (recording in ("neurons", "both"), (len(sequences), neurons)),
    }
    sinks = {name: torch.zeros(shape, device=DEVICE, requires_grad=True) for name, (on, shape) in sinks.items() if on}
    torch.manual_seed(neurons)
    out = ops.ffn(
        *leaves,
        sequences,
        activation=activation,
        gated=gated,
        dropout_p=dropout_p,
        ffn_mask=mask_leaf,
        neuron_mask=neuron_leaf,
        per_token=per_token,
        **sinks,
    )
    out.backward(gradient)
    kind = "absolute" if per_token else "signed"
    named = zip(("x", "w1", "b1", "w2", "b2"), leaves, strict=True)
    actual = {"out": out, **{f"d{name}": x.grad for name, x in named if x is not None}}
    if "importance" in sinks:
        actual[kind] = sinks["importance"].grad
    if "neuron_importance" in sinks:
        actual[f"neuron_{kind}"] = sinks["neuron_importance"].grad
    if m is not None:
        actual["dffn_mask"] = mask_leaf.grad
    if train_neurons:
        actual["dneuron_mask"] = neuron_leaf.grad
    check(actual, same, exact)


def test_ffn_without_weight_gradients():
    torch.manual_seed(0)
    x = torch.randn((5, 16), device=DEVICE, requires_grad=True)
    w1, w2 = torch.randn((24, 16), device=DEVICE), torch.randn((16, 24), device=DEVICE)
    b1, b2 = torch.randn(24, device=DEVICE), torch.randn(16, device=DEVICE)
    sequences = _to_device(Sequences.from_lengths([3, 2]))
    ops.ffn(x, w1, b1, w2, b2, sequences).square().sum().backward()
    expected = leaf(x, torch.float64)
    weights = (w1.double(), b1.double(), w2.double(), b2.double())
    hidden = functional.gelu(functional.linear(expected, *weights[:2]))
    functional.linear(hidden, *weights[2:]).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), expected.grad, **roundings(1000))


def test_ffn_of_no_tokens():
    x = torch.zeros((0, 16), device=DEVICE, requires_grad=True)
    w1 = torch.ones((24, 16), device=DEVICE, requires_grad=True)
    w2 = torch.ones((16, 24), device=DEVICE, requires_grad=True)
    out = ops.ffn(x, w1, w1[:, 0], w2, w2[:, 0], _to_device(Sequences.from_lengths([0])))
    out.sum().backward()
    assert out.shape == (0, 16)
    assert not w1.grad.any()
    assert not w2.grad.any()


# Residual norm


def plain_residual(x, residual, gamma, beta, bias, gradient, kept, dropout_p):
    z = x if bias is None else x + bias
    if kept is not None:
        z = z * kept / (1 - dropout_p)
    out = functional.layer_norm(residual + z, x.shape[1:], gamma, beta, 1e-5)
    names = ["x", "residual", "gamma", "beta"] + ([] if bias is None else ["bias"])
    leaves = [x, residual, gamma, beta] + ([] if bias is None else [bias])
    gradients = torch.autograd.grad(out, leaves, gradient)
    return {"out": out, **{f"d{name}": value for name, value in zip(names, gradients, strict=True)}}


@pytest.mark.parametrize("dtype", DTYPES)
@drawn
@given(
    tokens=st.sampled_from([1, 2, 5, 37]),
    channels=st.sampled_from([16, 65, 130, 384]),
    with_bias=st.booleans(),
    dropout_p=st.sampled_from([0.0, 0.3]),
    wide_residual=st.booleans(),
    strided=st.booleans(),
)
@example(tokens=37, channels=65, with_bias=True, dropout_p=0.3, wide_residual=True, strided=True)
def test_residual_norm(tokens, channels, with_bias, dropout_p, wide_residual, strided, dtype):
    torch.manual_seed(channels)
    residual_dtype = torch.float32 if wide_residual else dtype

    def matrix() -> Tensor:
        return (
            torch.randn((channels, tokens), device=DEVICE).t()
            if strided
            else torch.randn((tokens, channels), device=DEVICE)
        )

    x, residual, gradient = matrix().to(dtype), matrix().to(residual_dtype), matrix().to(residual_dtype)
    gamma, beta, bias = torch.randn((3, channels), device=DEVICE).unbind()
    inputs = [x, residual, gamma, beta, bias if with_bias else None]

    def plain(dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(5)
        kept = keep_elements(draw_seed(DEVICE), tokens, channels, dropout_p, DEVICE) if dropout_p else None
        return plain_residual(*(leaf(value, dtype) for value in inputs), gradient.to(dtype), kept, dropout_p)

    exact, same = plain(torch.float64), plain(dtype)
    torch.manual_seed(5)
    leaves = [None if value is None else value.detach().requires_grad_() for value in inputs]
    out = ops.residual_norm(*leaves[:4], bias=leaves[4], dropout_p=dropout_p, eps=1e-5)
    out.backward(gradient)
    actual = {"out": out}
    for name, value in zip(("x", "residual", "gamma", "beta", "bias"), leaves, strict=True):
        if value is not None:
            actual[f"d{name}"] = value.grad
    check(actual, same, exact)


def test_residual_norm_of_no_tokens():
    x = torch.zeros((0, 16), device=DEVICE, requires_grad=True)
    gamma = torch.ones(16, device=DEVICE, requires_grad=True)
    out = ops.residual_norm(x, x, gamma, gamma, bias=gamma, dropout_p=0.1)
    out.sum().backward()
    assert out.shape == x.grad.shape == (0, 16)
    assert not gamma.grad.any()


# Whole layers


@drawn
@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=5),
    width=st.sampled_from([1, 3, 16]),
    channels=st.sampled_from([1, 7, 129]),
    dtypes=st.permutations(DTYPES).map(lambda dtypes: dtypes[:2]) | st.sampled_from([[dtype] * 2 for dtype in DTYPES]),
)
@example(kept=[True, False, True, True], width=16, channels=129, dtypes=DTYPES[:2])
def test_copies_of_slices(kept, width, channels, dtypes):
    mask, (dtype, other) = torch.tensor(kept, device=DEVICE), dtypes
    index, rows, size = mask.nonzero().flatten(), mask.repeat_interleave(width), len(kept) * width
    tensors = [torch.randn(shape, device=DEVICE).to(dtype) for shape in ((size, channels), (size,), (channels, size))]
    # The slices of a transposed matrix do not lie one behind the other.
    tensors.append(tensors[2].t())
    selected = [*(x[rows] for x in tensors[:2]), tensors[2][:, rows], tensors[3][rows]]
    copies, spread = Table(), Table()
    places = [(dim, len(kept), index) for dim in (0, 0, 1, 0)]
    parts = [copies.select(x, *place, other) for x, place in zip(tensors, places, strict=True)]
    whole = copies.select(tensors[0], 0, 1, None, other)
    copies.run()
    assert torch.equal(whole, tensors[0].to(other))
    for part, want in zip(parts, selected, strict=True):
        assert torch.equal(part, want.to(other))
    wholes = [spread.spread(part, x, *place) for part, x, place in zip(parts, tensors, places, strict=True)]
    spread.run()
    for got, x, (dim, _, _) in zip(wholes, tensors, places, strict=True):
        shape = [1] * x.ndim
        shape[dim] = -1
        assert got.dtype == dtype
        assert torch.equal(got, torch.where(rows.view(shape), x.to(other).to(dtype), 0.0))


@pytest.fixture
def seeds_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a layer draw its seeds as its parts do; on a GPU one draw for several gives others."""
    monkeypatch.setattr(
        ops.layer, "draw_seed", lambda device, calls: torch.cat([draw_seed(device) for _ in range(calls)])
    )


@pytest.mark.parametrize("ticket", TICKETS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast"),
    [(torch.float32, None), (torch.float16, None), (torch.float32, torch.float16)]
    + ([] if common.INTERPRETED else [(torch.float32, torch.bfloat16), (torch.bfloat16, None)]),
)
@pytest.mark.parametrize(("per_token", "dropouts"), [(False, (0.1, 0.2, 0.3)), (True, (0.0, 0.0, 0.0))])
@pytest.mark.parametrize("layout", [packed_sequences, padded_sequences])
@pytest.mark.parametrize(("first_tokens", "reach"), [(False, None), (True, None), (False, 13)])
@pytest.mark.usefixtures("seeds_one_by_one")
def test_layers(ticket, dtype, autocast, per_token, dropouts, layout, first_tokens, reach):
    sequences, rows = layout(SHORT)
    x, dout, weights = inputs(rows, ticket, reach=reach)
    # Weights of layouts that differ among q, k and v.
    weights = weights._replace(wk=weights.wk.t().contiguous().t())
    tensors = (x.to(DEVICE), dout.to(DEVICE), Weights(*(None if w is None else w.to(DEVICE) for w in weights)))
    options = {"dropouts": dropouts, "per_token": per_token, "first_tokens": first_tokens}
    check_layer(tensors, _to_device(sequences), dtype, autocast, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ticket", TICKETS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "autocast", "first_tokens"),
    [(torch.float32, None, True), (torch.float16, None, False), (torch.float32, torch.float16, False)],
)
@pytest.mark.usefixtures("seeds_one_by_one")
def test_layers_of_other_kinds(kind, ticket, dtype, autocast, first_tokens):
    sequences, rows = padded_sequences(SHORT)
    x, dout, weights = inputs(rows, ticket, kind=kind)
    tensors = (x.to(DEVICE), dout.to(DEVICE), Weights(*(None if w is None else w.to(DEVICE) for w in weights)))
    dropouts = {"dropouts": (0.1, 0.2, 0.3), "inner_dropout": 0.4} if first_tokens or autocast else {}
    options = {"per_token": first_tokens, "first_tokens": first_tokens, "kind": kind}
    check_layer(tensors, _to_device(sequences), dtype, autocast, **options, **dropouts)


@pytest.mark.parametrize("terms", [{"kind": KINDS[0]}, {"reach": 14}, {"reach": 14, "vectors": True}])
@pytest.mark.usefixtures("seeds_one_by_one")
def test_layers_around_holes(terms):
    sequences, rows = padded_sequences(SHORT)
    x, dout, weights = inputs(rows, TICKETS[0], **terms)
    tensors = (x.to(DEVICE), dout.to(DEVICE), Weights(*(None if w is None else w.to(DEVICE) for w in weights)))
    options = {"dropouts": (0.0, 0.0, 0.0), "kind": terms.get("kind", LIKE_BERT)}
    check_layer(tensors, with_holes(_to_device(sequences), rows), torch.float32, None, **options)


@pytest.mark.parametrize("name", ["tickets", "kinds with tickets"])
@pytest.mark.parametrize(("trained", "autocast"), [("all", torch.float16), ("upper layers", None)])
@pytest.mark.usefixtures("seeds_one_by_one")
def test_layers_at_once_are_layers_one_by_one(name, trained, autocast):
    given = stack(name, trained, device=DEVICE)
    want = results(one_by_one, *given, autocast)
    assert_equal(results(ops.encoder_layers, *given, autocast), want)


@pytest.mark.parametrize("ticket", TICKETS, ids=str)
@pytest.mark.parametrize("autocast", [None, torch.float16] + ([] if common.INTERPRETED else [torch.bfloat16]))
@pytest.mark.parametrize("dropouts", [(0.0, 0.0, 0.0), (0.1, 0.2, 0.3)])
@pytest.mark.usefixtures("seeds_one_by_one")
def test_layers_of_padding_alone(ticket, autocast, dropouts):
    sequences, _ = packed_sequences([0, 0])
    x, dout, weights = inputs(0, ticket)
    tensors = (x.to(DEVICE), dout.to(DEVICE), Weights(*(None if w is None else w.to(DEVICE) for w in weights)))
    check_layer(tensors, _to_device(sequences), torch.float32, autocast, dropouts=dropouts)


# Rows of no sequence


def owners(starts: list[int], lengths: list[int], tokens: int) -> list[tuple[int, int]]:
    """What owned_rows should say, from its definition."""
    real = sorted(start for start, length in zip(starts, lengths, strict=True) if length)
    spans = []
    for b, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        if length:
            following = next((other for other in real if other > start), tokens)
            spans.append((0 if start == real[0] else start, following))
        else:
            spans.append((0, tokens if not real and b == 0 else 0))
    return spans


@triton.jit
def owned_rows_kernel(p_starts, p_lengths, p_first, p_last, batch, tokens):
    i_b = tl.program_id(0)
    first, last = common.owned_rows(p_starts, p_lengths, batch, tokens, i_b)
    tl.store(p_first + i_b, first)
    tl.store(p_last + i_b, last)


@pytest.mark.parametrize(
    ("starts", "lengths", "tokens"),
    [
        ([0, 4], [4, 4], 8),
        ([6, 1], [2, 3], 11),
        ([5, 5, 2], [0, 4, 1], 9),
        ([0, 0], [0, 0], 5),
        ([3 * b for b in reversed(range(300))], [1 + b % 3 for b in range(300)], 905),
    ],
)
def test_every_row_has_one_owner(starts, lengths, tokens):
    both = torch.tensor([starts, lengths], dtype=torch.int32, device=DEVICE)
    spans = torch.zeros_like(both)
    owned_rows_kernel[(len(starts),)](*both, *spans, len(starts), tokens)
    spans = [tuple(span) for span in spans.t().tolist()]
    assert spans == owners(starts, lengths, tokens)
    assert sorted(row for span in spans for row in range(*span)) == list(range(tokens))


# What torch asks of an op


def calls() -> dict[str, Callable[[], Tensor]]:
    """Every op with all its options on, as functions of fresh leaves."""
    sequences = _to_device(Sequences.from_lengths([5, 12]))
    torch.manual_seed(1)
    q = torch.randn((17, 2, 16), device=DEVICE, requires_grad=True)
    x = torch.randn((17, 16), device=DEVICE, requires_grad=True)
    w1 = torch.randn((24, 16), device=DEVICE, requires_grad=True)
    b1 = torch.randn(24, device=DEVICE, requires_grad=True)
    head_mask = torch.tensor([1.0, 0.5], device=DEVICE)
    importance = torch.zeros((2, 2), device=DEVICE, requires_grad=True)

    def attention() -> Tensor:
        return ops.attention(q, q, q, sequences, head_mask=head_mask, dropout_p=0.1, importance=importance)

    def ffn() -> Tensor:
        return ops.ffn(x, w1, b1, w1.t(), b1[:16], sequences, importance=importance[0])

    def residual_norm() -> Tensor:
        return ops.residual_norm(x, x, b1[:16], b1[:16], bias=b1[:16], dropout_p=0.1)

    return {
        "attention": attention,
        "ffn": ffn,
        "residual_norm": residual_norm,
    }


@pytest.mark.parametrize("op", ["attention", "ffn", "residual_norm"])
def test_compiles_as_one_graph(op):
    call = calls()[op]
    torch.manual_seed(2)
    expected = call()
    torch.manual_seed(2)
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(), expected)


@pytest.mark.parametrize("op", ["attention", "ffn"])
def test_autocast(op):
    call = calls()[op]
    torch.manual_seed(2)
    expected = call()
    torch.manual_seed(2)
    with torch.autocast(DEVICE.type, torch.float16):
        out = call()
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    out.sum().backward()


@pytest.mark.parametrize("op", ["attention", "ffn", "residual_norm"])
def test_repeats_bit_for_bit(op):
    results = []
    for _ in range(2):
        call = calls()[op]
        torch.manual_seed(2)
        out = call()
        leaves = [cell.cell_contents for cell in call.__closure__ if isinstance(cell.cell_contents, Tensor)]
        leaves = [tensor for tensor in leaves if tensor.requires_grad]
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves, allow_unused=True)])
    for first, second in zip(*results, strict=True):
        assert (first is second is None) or torch.equal(first, second)


def test_opcheck():
    sequences = _to_device(Sequences.from_lengths([3, 4]))
    spans = (sequences.starts, sequences.lengths)
    q = torch.randn((7, 2, 16), device=DEVICE, requires_grad=True)
    mask = torch.tensor([1.0, 0.0], device=DEVICE)
    seed = torch.tensor([5], device=DEVICE)
    for bias in (None, torch.randn((2, 9), device=DEVICE, requires_grad=True)):
        settings = (None, mask, bias, None, None, None, seed, 4, 0.25, 0.1, False, 1)
        torch.library.opcheck(torch.ops.ticketops.attention, (q, q, q, *spans, *settings))
    x = torch.randn((7, 16), device=DEVICE, requires_grad=True)
    w1, b1 = torch.randn((24, 16), device=DEVICE), torch.randn(24, device=DEVICE)
    torch.library.opcheck(
        torch.ops.ticketops.ffn,
        (x, w1, b1, w1.t().contiguous(), b1[:16], *spans, *[None] * 4, seed, "gelu", False, 0.1),
    )
    torch.library.opcheck(torch.ops.ticketops.residual_norm, (x, x, None, b1[:16], b1[:16], seed, 0.1, 1e-5))


@pytest.mark.parametrize("ticket", TICKETS, ids=str)
@pytest.mark.parametrize(
    ("first_tokens", "dtype", "reach"),
    [(False, torch.float32, None), (True, torch.float16, None), (False, torch.float16, 12)],
)
def test_opcheck_of_layers(ticket, first_tokens, dtype, reach):
    sequences, rows = packed_sequences(SHORT)
    x, dout, weights = inputs(rows, ticket, reach=reach)
    tensors = (x.to(DEVICE), dout, Weights(*(None if w is None else w.to(DEVICE) for w in weights)))
    opcheck_layer(tensors, _to_device(sequences), dtype, first_tokens)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ticket", TICKETS, ids=str)
def test_opcheck_of_layers_of_other_kinds(kind, ticket):
    sequences, rows = packed_sequences(SHORT)
    x, dout, weights = inputs(rows, ticket, kind=kind)
    tensors = (x.to(DEVICE), dout, Weights(*(None if w is None else w.to(DEVICE) for w in weights)))
    opcheck_layer(tensors, _to_device(sequences), torch.float16, False, kind)


@pytest.mark.parametrize("dtype", [torch.float64] + ([torch.bfloat16] if common.INTERPRETED else []))
def test_refuses_by_name(dtype):
    with pytest.raises(UnsupportedError, match="TICKETOPS_BACKEND=triton cannot run attention"):
        choose("attention", DEVICE, dtype)


def test_is_the_last_choice_on_the_cpu_and_the_first_on_cuda():
    assert BACKENDS["cpu"][-1] == "triton"
    assert BACKENDS["cuda"][0] == "triton"


@pytest.mark.usefixtures("seeds_one_by_one")
@pytest.mark.parametrize(("heads", "neurons"), [([True, True], 48), ([False, True], 48), ([False, True], 11)])
def test_a_whole_model_agrees_with_the_reference(monkeypatch, heads, neurons):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    # A head that reads every token, since where only first ones are read the last layer's dropout has fewer rows.
    model = BertForTokenClassification(BertConfig(**sizes, vocab_size=99)).to(DEVICE).train()
    handle = patch(model).apply(
        Ticket(torch.tensor([heads]), torch.tensor([True]), neuron_mask=torch.arange(48)[None] < neurons)
    )
    batch = {
        "input_ids": torch.randint(1, 99, (2, 6), device=DEVICE),
        "attention_mask": torch.tensor([[1] * 6, [1] * 3 + [0] * 3], device=DEVICE),
        "labels": torch.tensor([[0, 1] * 3, [1, 0, 1] + [-100] * 3], device=DEVICE),
    }
    results = []
    for name in ("triton", "reference"):
        monkeypatch.setenv("TICKETOPS_BACKEND", name)
        model.zero_grad()
        # Dropout is on: the backends draw the same masks from the same seed.
        torch.manual_seed(4)
        with handle.record_importance("token") as importance:
            model(**batch).loss.backward()
        gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
        results.append([importance.head, importance.ffn, *gradients])
    for ours, reference in zip(*results, strict=True):
        torch.testing.assert_close(ours, reference, **roundings(1000, 10))
