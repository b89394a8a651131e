"""What only a GPU can show of the CUDA kernels; test_cuda.py runs there too."""

import pytest
import torch

from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import Packing, copies, cuda_extension, importance
from ticketops.ops.copies import Slices
from ticketops.ops.rows import move_rows, number_tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.usefixtures("built"),
]


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TICKETOPS_BACKEND", raising=False)
    refusal = cuda_extension.refusal(torch.device("cuda"))
    if refusal is not None:
        pytest.skip(refusal)


class Work:
    """One call of everything, on tensors of fixed addresses."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.mask = (torch.rand(32, 128, device="cuda") < 0.6).long()
        self.x = torch.randn(32 * 128, 768, device="cuda", dtype=torch.bfloat16)
        self.sums = importance.Sums(
            torch.zeros(12, 12, dtype=torch.float64, device="cuda"),
            torch.zeros(12, dtype=torch.float64, device="cuda"),
            [32] * 12,
            [32] * 12,
        )
        self.partials = importance.Partials(
            [torch.randn(32, 12, device="cuda") for _ in range(12)], [torch.randn(32, device="cuda") for _ in range(12)]
        )
        heads = torch.tensor([0, 3, 7], device="cuda")
        self.slices = [
            Slices(torch.randn(shape, device="cuda"), dim, 12, heads)
            for _ in range(12)
            for shape, dim in (((768, 768), 0), ((768, 768), 1), ((768,), 0))
        ]

    def rows(self) -> list[torch.Tensor]:
        starts, lengths, indices, numbers = number_tokens(self.mask)
        packed = move_rows(self.x, indices, numbers)
        return [starts, lengths, packed, move_rows(packed, numbers, indices)]

    def ranking(self) -> list[torch.Tensor]:
        self.sums.heads.zero_()
        self.sums.ffns.zero_()
        return list(vars(importance.rank(self.sums, self.partials)).values())

    def copies(self) -> list[torch.Tensor]:
        values = copies.gather(self.slices)
        copies.scatter(self.slices, values)
        return values

    def all(self) -> list[torch.Tensor]:
        return [*self.rows(), *self.ranking(), *self.copies()]


def test_no_call_waits_for_the_gpu_and_every_call_repeats_bit_for_bit():
    work = Work()
    first = work.all()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = work.all()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(first, again, strict=True):
        assert torch.equal(one, other)


def test_replays_in_a_cuda_graph_follow_the_mask_and_the_partials():
    work = Work()
    work.rows(), work.ranking()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [*work.rows(), *work.ranking()]
    for seed in range(2):
        torch.manual_seed(seed)
        work.mask.copy_(torch.rand(32, 128) < 0.3)
        for partial in work.partials.heads:
            partial.copy_(torch.randn(32, 12))
        graph.replay()
        replayed = [result.clone() for result in captured]
        for one, other in zip(replayed, [*work.rows(), *work.ranking()], strict=True):
            assert torch.equal(one, other)


def test_other_streams_are_respected():
    work = Work()
    expected = work.all()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        work.x.mul_(2)
        found = work.rows()
    stream.synchronize()
    assert torch.equal(found[2], expected[2] * 2)


def test_addresses_beyond_32_bits():
    channels = 4096
    rows = 2**31 // channels + 3
    if torch.cuda.mem_get_info()[0] < 6 * 2 * rows * channels:
        pytest.skip("needs 26 GB of free GPU memory")
    x = torch.zeros((rows, channels), device="cuda", dtype=torch.float16)
    x[-1] = torch.randn(channels, device="cuda", dtype=torch.float16)
    index, inverse = torch.full((rows,), -1, device="cuda"), torch.full((rows,), -1, device="cuda")
    index[-2], inverse[-1] = rows - 1, rows - 2
    moved = move_rows(x, index, inverse)
    assert torch.equal(moved[-2], x[-1])
    assert not moved[:-2].any()
    assert not moved[-1].any()
    last = torch.tensor([rows - 1, rows - 2], device="cuda")
    (copy,) = copies.gather([Slices(x, 0, rows, last)])
    assert torch.equal(copy, x[last])
    copies.scatter([Slices(x, 0, rows, last)], [copy + 1])
    assert torch.equal(x[last], copy + 1)


def test_slices_are_not_copied_into_a_graph():
    x, index = torch.ones(4, 3, device="cuda"), torch.tensor([1, 2], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(UnsupportedError, match="step outside the graph"), torch.cuda.graph(graph):
        copies.gather([Slices(x, 0, 4, index)])


def test_packing_equals_indexing_on_the_gpu():
    mask = torch.rand(7, 50, device="cuda") < 0.5
    packing = Packing.from_mask(mask, 7, 50, mask.device)
    x = torch.randn(7, 50, 33, device="cuda", requires_grad=True)
    assert torch.equal(packing.pack(x), x[mask])
    assert torch.equal(packing.unpack(packing.pack(x)), x * mask[..., None])
    (gradient,) = torch.autograd.grad(packing.pack(x).square().sum(), x)
    assert torch.equal(gradient, 2 * x * mask[..., None])


def test_tensors_of_two_devices_are_refused():
    with pytest.raises(InputError, match="index as int64 on cuda"):
        move_rows(torch.ones(2, 3, device="cuda"), torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64))
