"""What only a GPU can show of the Triton backends; test_triton.py runs there too, in bfloat16 as well."""

import pytest
import torch

import ticketops.ops as ops
from ticketops.ops import Sequences

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


@pytest.fixture(autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TICKETOPS_BACKEND", "triton")


@pytest.mark.parametrize("autocast", [True, False])
def test_layers_of_some_heads_and_neurons_repeat_bit_for_bit_and_never_wait(autocast):
    torch.manual_seed(0)
    some, x = sequences([128, 300, 1]), torch.randn((429, 768), device="cuda", requires_grad=True)

    def parameter(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda", requires_grad=True)

    square, vector = [parameter(768, 768) for _ in range(4)], [parameter(768) for _ in range(9)]
    feeds = (parameter(3072, 768), parameter(3072), parameter(768, 3072))
    kept = [torch.tensor(places, device="cuda") for places in ([0, 3, 4, 11], [5, 6, 1000, 3071])]
    weights = ops.Weights(*square[:3], *vector[:3], square[3], *vector[3:6], *feeds, *vector[6:9], *[None] * 3, *kept)

    def step() -> list[torch.Tensor]:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out = ops.encoder_layer(x, weights, some, head_dim=64, scale=0.125, activation="gelu")
        return [out, *torch.autograd.grad(out.sum(), (x, *weights[:16]))]

    first = step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def sequences(lengths: list[int], width: int | None = None) -> Sequences:
    some = Sequences.from_lengths(lengths, width)
    return Sequences(some.starts.cuda(), some.lengths.cuda(), some.max_length)


def attention_step(some: Sequences, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn((tokens, 12, 64), device="cuda", dtype=dtype, requires_grad=True) for _ in range(3))
    importance = torch.zeros((len(some), 12), device="cuda", requires_grad=True)
    out = ops.attention(q, k, v, some, dropout_p=0.1, importance=importance)
    return [out, *torch.autograd.grad(out.float().square().sum(), (q, k, v, importance))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    "lengths", [[128] * 32, [1, 77, 128, 13], [512, 300, 1], [8192]], ids=["even", "short", "long", "8k"]
)
def test_repeats_bit_for_bit(lengths, dtype):
    some = sequences(lengths)
    first, second = (attention_step(some, sum(lengths), dtype) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_long_sequences_against_sdpa():
    length, heads = 8192, 4
    q, k, v = (
        torch.randn((length, heads, 64), device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
    )
    out = ops.attention(q, k, v, sequences([length]))
    expected = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in (q, k, v)))
    expected = expected[0].transpose(0, 1)
    gradient = torch.randn_like(out)
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=2e-3)
    for ours, theirs in zip(
        torch.autograd.grad(out, (q, k, v), gradient), torch.autograd.grad(expected, (q, k, v), gradient), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-2)


def test_addresses_beyond_32_bits():
    # The last sequence lies past element 2^31 of each tensor.
    heads, head_dim, length = 16, 128, 64
    tokens = 2**31 // (heads * head_dim) + 2 * length
    need = 9 * 2 * tokens * heads * head_dim
    if torch.cuda.mem_get_info()[0] < need:
        pytest.skip(f"needs {need >> 30} GiB of free GPU memory")
    both = torch.tensor([[0, tokens - length], [length, length]], dtype=torch.int32, device="cuda")
    q = torch.zeros((tokens, heads, head_dim), device="cuda", dtype=torch.float16)
    for rows in (slice(0, length), slice(tokens - length, tokens)):
        torch.manual_seed(1)
        q[rows] = torch.randn((length, heads, head_dim), device="cuda", dtype=torch.float16)
    q.requires_grad_()
    out = ops.attention(q, q, q, Sequences(both[0], both[1], length))
    assert torch.equal(out[:length], out[-length:])
    assert not out[length:-length].any()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert torch.equal(gradient[:length], gradient[-length:])


def test_no_call_waits_for_the_gpu():
    some = sequences([100, 28])
    attention_step(some, 128, torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        attention_step(some, 128, torch.bfloat16)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_in_a_cuda_graph_with_fresh_dropout():
    some = sequences([100, 28])
    q = torch.randn((128, 12, 64), device="cuda", dtype=torch.bfloat16)
    ops.attention(q, q, q, some, dropout_p=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.attention(q, q, q, some, dropout_p=0.1)
    results = []
    for _ in range(2):
        graph.replay()
        results.append(out.clone())
    assert not torch.equal(*results)
    assert all(result.isfinite().all() for result in results)
