"""The CUDA kernels against plain PyTorch, bit for bit: on a GPU, and everywhere on their emulation."""

import random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from ticketops.errors import InputError, TicketopsError
from ticketops.ops import Packing, backends, copies, cuda_extension, importance
from ticketops.ops.copies import Slices
from ticketops.ops.copies import reference as copies_reference
from ticketops.ops.importance import reference as importance_reference
from ticketops.ops.rows import move_rows, number_tokens
from ticketops.ops.rows import reference as rows_reference

from .cases import launches

# The fixture only chooses the device, and may serve all examples of a test.
several = settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool]


@pytest.fixture(autouse=True)
def filled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills new tensors of any dtype with a pattern, so that an element nobody wrote shows."""
    for name in ("empty", "empty_like"):
        create = getattr(torch, name)

        def created(*args, create=create, **kwargs):
            x = create(*args, **kwargs)
            if not x.is_meta:
                x.untyped_storage().fill_(0x7F)
            return x

        monkeypatch.setattr(torch, name, created)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether all bits are equal."""
    return one.shape == other.shape and one.dtype == other.dtype and bool((bits(one) == bits(other)).all())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().cpu().reshape(-1).view(torch.uint8)


def test_the_ops_run_on_the_kernels(cuda_device):
    for op in ("rows", "importance", "copies"):
        assert backends.choose(op, cuda_device, torch.float32)[0] == "native"


# Rows


def masks(draw_width: int = 300) -> st.SearchStrategy[tuple[int, int, float, int]]:
    return st.tuples(
        st.integers(0, 9), st.integers(0, draw_width), st.sampled_from([0.0, 0.3, 0.9, 1.0]), st.integers(0, 99)
    )


@several
@given(masks(), st.sampled_from([torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64, torch.float32]))
def test_numbering_is_the_reference(cuda_device, mask, dtype):
    batch, width, share, seed = mask
    generator = torch.Generator().manual_seed(seed)
    values = (torch.rand(batch, width, generator=generator) < share).to(dtype) * 3
    # -0.0 is zero, whatever its bits.
    values = -values if dtype == torch.float32 else values
    for expected, found in zip(
        rows_reference.number_tokens(values), number_tokens(values.to(cuda_device)), strict=True
    ):
        assert same(found, expected)


def test_numbering_a_view(cuda_device):
    wide = torch.randint(0, 2, (6, 40), device=cuda_device)
    for mask in (wide[:, 3:20], wide[::2, ::2], wide.t()):
        for expected, found in zip(rows_reference.number_tokens(mask.cpu()), number_tokens(mask), strict=True):
            assert same(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 100, 768])
@pytest.mark.parametrize(("rows", "results"), [(40, 13), (13, 40), (1, 1)])
def test_moving_is_the_reference(cuda_device, dtype, channels, rows, results):
    random.seed(rows * channels)
    moved = min(rows, results) * 2 // 3
    index, inverse = torch.full((results,), -1), torch.full((rows,), -1)
    targets = torch.tensor(random.sample(range(results), moved), dtype=torch.int64)
    index[targets] = torch.tensor(random.sample(range(rows), moved), dtype=torch.int64)
    inverse[index[targets]] = targets
    wide = (torch.randn(rows, channels + 5) * 9).to(dtype)
    # Aligned and contiguous, strided, and at an odd address.
    for x in (wide[:, :channels].contiguous(), wide[:, 4:-1], wide[:, 1:-4]):
        expected = rows_reference.move_rows(x, index, inverse)
        # As a view of the moved wide tensor, so that strides and alignment stay.
        offset = x.storage_offset() if x.data_ptr() != x.contiguous().data_ptr() else None
        there = x.to(cuda_device) if offset is None else wide.to(cuda_device)[:, offset : offset + channels]
        assert same(move_rows(there, index.to(cuda_device), inverse.to(cuda_device)), expected)


def test_moving_nothing(cuda_device):
    none = torch.empty(0, dtype=torch.int64, device=cuda_device)
    some = torch.full((3,), -1, device=cuda_device)
    assert move_rows(torch.ones(3, 4, device=cuda_device), none, some).shape == (0, 4)
    assert not move_rows(torch.ones(0, 4, device=cuda_device), some, none).any()
    assert move_rows(torch.ones(3, 0, device=cuda_device), some, some).shape == (3, 0)


def test_the_reference_moves_without_reading_what_goes_nowhere():
    x = torch.full((2, 3), float("nan"))
    x[1] = 1
    for extra in (0, 4):
        index, inverse = torch.tensor([-1, 1] + [-1] * extra), torch.tensor([-1, 1])
        moved = rows_reference.move_rows(x, index, inverse)
        assert moved.tolist() == [[0, 0, 0], [1, 1, 1]] + [[0, 0, 0]] * extra


def test_gradients_of_packing_are_those_of_indexing(cuda_device):
    mask = torch.tensor([[0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]], device=cuda_device)
    packing = Packing.from_mask(mask, 3, 4, cuda_device)
    x = torch.randn(3, 4, 5, dtype=torch.float64, device=cuda_device, requires_grad=True)

    def there_and_back(x):
        return packing.unpack(packing.pack(x) ** 2)

    assert torch.equal(packing.pack(x), x[mask.bool()])
    assert torch.equal(there_and_back(x), (x * mask[..., None]) ** 2)
    assert torch.autograd.gradcheck(there_and_back, x)
    assert torch.autograd.gradgradcheck(there_and_back, x)


def test_rows_past_the_last_token_are_zeros_and_take_no_gradient(cuda_device):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]], device=cuda_device)
    _, _, indices, numbers = number_tokens(mask)
    x = torch.randn(6, 4, device=cuda_device, requires_grad=True)
    packed = move_rows(x, indices[:5], numbers)
    assert torch.equal(packed[:3], x[mask.flatten().bool()])
    assert not packed[3:].any()
    (gradient,) = torch.autograd.grad(packed, x, torch.full_like(packed, 2.0))
    assert torch.equal(gradient, 2.0 * mask.flatten()[:, None].expand(6, 4))


def test_what_does_not_fit_is_refused_before_the_kernels_see_it(cuda_device):
    x, index = torch.ones(3, 4, device=cuda_device), torch.zeros(2, dtype=torch.int64, device=cuda_device)
    inverse = torch.full((3,), -1, device=cuda_device)
    with launches() as names:
        for arguments, message in (
            ((x, index.int(), inverse), "index as int64"),
            ((x, index.to("meta"), inverse), "index as int64 on"),
            ((x, index, inverse[:2]), "inverse"),
            ((x[0], index, inverse), "x \\[N, C\\]"),
        ):
            with pytest.raises(InputError, match=message):
                move_rows(*arguments)
        with pytest.raises(InputError, match="mask \\[B, S\\]"):
            number_tokens(x[0])
        for wrong in (
            Slices(x, 2, 1, index),
            Slices(x, 0, 2, index),
            Slices(x, 0, 3, index.int()),
            Slices(x, 0, 3, index[:, None]),
            Slices(x, 0, 3, index.to("meta")),
        ):
            with pytest.raises(InputError):
                copies.gather([wrong])
        fits = Slices(x, 0, 3, index[:1])
        for value in (torch.ones(2, 4), torch.ones(1, 4).double(), torch.ones(1, 4, device="meta")):
            with pytest.raises(InputError, match="do not go with"):
                copies.scatter([fits], [value if value.is_meta else value.to(cuda_device)])
        for tensor, dtype, shape in (
            (x.to("meta"), torch.float32, (3, 4)),
            (x, torch.float64, (3, 4)),
            (x, torch.float32, (4, 3)),
            (x.to_sparse(), torch.float32, (3, 4)),
        ):
            with pytest.raises(InputError, match="the CUDA kernel needs it"):
                cuda_extension.checked("it", tensor, cuda_device, dtype, *shape)
    assert names == []
    assert cuda_extension.checked("it", x.t(), cuda_device, torch.float32, 4, 3).is_contiguous()


def test_a_failed_launch_is_one_line(cuda_device):
    def failing(*arguments):
        raise RuntimeError("out of registers")

    with pytest.raises(TicketopsError, match=r"failing failed on .*: out of registers"):
        cuda_extension.run(failing, cuda_device)


# Importance


def some_sums(layers: int, heads: int, device: torch.device) -> importance.Sums:
    return importance.Sums(
        torch.rand(layers, heads, dtype=torch.float64).to(device),
        torch.rand(layers, dtype=torch.float64).to(device),
        torch.randint(1, 9, (layers,)).tolist(),
        torch.randint(1, 9, (layers,)).tolist(),
    )


def copied(sums: importance.Sums) -> importance.Sums:
    return importance.Sums(sums.heads.clone().cpu(), sums.ffns.clone().cpu(), sums.head_counts, sums.ffn_counts)


def cpu(partials: importance.Partials) -> importance.Partials:
    heads, ffns = ([None if x is None else x.cpu() for x in each] for each in (partials.heads, partials.ffns))
    return importance.Partials(heads, ffns, partials.group, partials.whole)


def assert_same_ranking(found: importance.Ranking, expected: importance.Ranking) -> None:
    for name in ("head_scores", "ffn_scores", "head_order", "ffn_order"):
        assert same(getattr(found, name), getattr(expected, name)), name


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize(("layers", "heads"), [(12, 12), (24, 16), (1, 1), (64, 3)])
def test_one_launch_adds_and_ranks_as_the_reference_does(cuda_device, layers, heads, group, whole):
    torch.manual_seed(layers + group)
    dtypes = [torch.float32, torch.bfloat16, torch.float16]
    partials = importance.Partials(
        [
            None if layer % 5 == 3 else torch.randn(8, heads).to(cuda_device, dtypes[layer % 3])
            for layer in range(layers)
        ],
        [None if layer % 7 == 2 else torch.randn(32).to(cuda_device)[::4] for layer in range(layers)],
        group,
        whole,
    )
    sums = some_sums(layers, heads, cuda_device)
    expected_sums = copied(sums)
    with launches() as names:
        ranking = importance.rank(sums, partials)
    assert names == ["importance"]
    importance_reference.score(expected_sums, cpu(partials), False)
    # How a library adds up a float32 column is its own affair, up to rounding in float64.
    torch.testing.assert_close(sums.heads.cpu(), expected_sums.heads, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(sums.ffns.cpu(), expected_sums.ffns, rtol=1e-14, atol=1e-14)
    # From the same sums the same bits follow.
    nothing = importance.Partials([None] * layers, [None] * layers)
    expected = importance_reference.score(copied(sums), nothing, True)
    assert expected is not None
    assert_same_ranking(ranking, expected)


@several
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, 1e-200, float("inf"), float("nan")]), min_size=3, max_size=3),
        min_size=1,
        max_size=6,
    )
)
def test_ties_zeros_and_what_is_not_finite_rank_as_in_the_reference(cuda_device, rows):
    totals = torch.tensor(rows, dtype=torch.float64)
    sums = importance.Sums(
        totals.to(cuda_device), totals[:, 0].contiguous().to(cuda_device), [2] * len(rows), [2] * len(rows)
    )
    expected = importance_reference.score(
        copied(sums), importance.Partials([None] * len(rows), [None] * len(rows)), True
    )
    assert expected is not None
    found = importance.rank(sums)
    for name in ("head_order", "ffn_order"):
        assert same(getattr(found, name), getattr(expected, name)), name
    for name in ("head_scores", "ffn_scores"):
        # NaN has many bit patterns.
        torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), rtol=0, atol=0, equal_nan=True)


def test_more_layers_than_the_kernel_holds_run_on_the_reference(cuda_device):
    for layers, heads in ((65, 2), (2, 3000)):
        sums = some_sums(layers, heads, cuda_device)
        partials = importance.Partials([torch.randn(4, heads, device=cuda_device)] * layers, [None] * layers)
        with launches() as names:
            importance.accumulate(sums, partials)
            ranking = importance.rank(sums)
        assert names == []
        assert ranking.head_order.sort().values.tolist() == list(range(layers * heads))


def test_float64_partials_keep_their_digits(cuda_device):
    sums = importance.Sums(
        torch.zeros(1, 1, dtype=torch.float64, device=cuda_device),
        torch.zeros(0, dtype=torch.float64, device=cuda_device),
        [1],
        [],
    )
    value = 1 + 2.0**-40
    importance.accumulate(
        sums, importance.Partials([torch.tensor([[value]], dtype=torch.float64, device=cuda_device)], [])
    )
    assert sums.heads.item() == value


# Copies


def many_slices(device: torch.device) -> list[Slices]:
    """Weights, biases and odd tensors of several dtypes; the last ones are no single block of memory, or empty."""
    torch.manual_seed(0)

    def slices(shape, dim, groups, kept, dtype=torch.float32):
        tensor = (torch.randn(shape) * 100).to(dtype).to(device)
        return Slices(tensor, dim, groups, torch.tensor(kept, dtype=torch.int64, device=device))

    return [
        slices((96, 40), 0, 12, [0, 3, 4, 11]),
        slices((40, 96), 1, 12, [11, 0, 5]),
        slices((96,), 0, 12, [2], torch.bfloat16),
        slices((7, 6, 5), 1, 3, [2, 0], torch.float16),
        slices((9, 15), 1, 15, list(range(0, 15, 2)), torch.int8),
        slices((128, 768), 0, 128, list(range(100))),
        slices((300, 300), 1, 300, list(range(1, 300))),
        slices((4, 4), 0, 4, [1, 2], torch.float64),
        slices((8, 6), 0, 4, []),
        slices((8, 0), 0, 4, [1]),
        Slices(torch.randn(6, 8, device=device).t(), 0, 4, torch.tensor([1, 3], device=device)),
    ]


def plain_gather(slices: list[Slices]) -> list[Tensor]:
    out = [torch.zeros(each.shape, dtype=each.tensor.dtype, device=each.tensor.device) for each in slices]
    copies_reference.gather(slices, out)
    return out


def test_gathering_and_scattering_are_the_reference(cuda_device):
    slices = many_slices(cuda_device)
    expected = plain_gather(slices)
    with launches() as names:
        gathered = copies.gather(slices)
    assert names == ["copy_table"]
    assert all(map(same, gathered, expected))
    # Into tensors that are there, one of them no single block of memory.
    out = [torch.zeros_like(value) for value in expected]
    out[0] = torch.zeros_like(expected[0].t().contiguous()).t()
    version = out[1]._version
    assert all(found is given for found, given in zip(copies.gather(slices, out), out, strict=True))
    assert all(map(same, out, expected))
    assert out[1]._version > version

    values = [(torch.randn(each.shape) * 50).to(each.tensor.dtype).to(cuda_device) for each in slices]
    whole = [Slices(each.tensor.clone(), each.dim, each.groups, each.index) for each in slices]
    copies_reference.scatter(whole, values)
    versions = [each.tensor._version for each in slices]
    with launches() as names:
        copies.scatter(slices, values)
    assert names == ["copy_table"]
    assert all(same(one.tensor, other.tensor) for one, other in zip(slices, whole, strict=True))
    assert all(each.tensor._version > version for each, version in zip(slices, versions, strict=True))


def test_addresses_that_are_not_multiples_of_16_bytes(cuda_device):
    wide = torch.randn(65, device=cuda_device)
    for start in range(4):
        slices = Slices(wide[start : start + 60], 0, 15, torch.tensor([0, 7, 14], device=cuda_device))
        assert torch.equal(copies.gather([slices])[0], plain_gather([slices])[0])


def test_no_copies_no_launch(cuda_device):
    with launches() as names:
        assert copies.gather([]) == []
        copies.scatter([], [])
        copies.gather(
            [Slices(torch.ones(4, device=cuda_device), 0, 4, torch.ones(0, dtype=torch.int64, device=cuda_device))]
        )
    assert names == []
