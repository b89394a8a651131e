"""Slices of weights on the CPU: the native copies against plain PyTorch's."""

import pytest
import torch

from ticketops.errors import InputError
from ticketops.ops.backends import _module
from ticketops.ops.copies import Saved, Slices, reference

from .cases import need, poisoned, threads
from .test_cuda import many_slices, plain_gather, same


@pytest.fixture
def native():
    need("native", "copies", torch.float32)
    return _module("copies", "native")


@pytest.mark.parametrize("number", [1, 2])
def test_native_copies_are_the_reference(native, number):
    slices = many_slices(torch.device("cpu"))
    expected = plain_gather(slices)
    with threads(number), poisoned():
        out = [torch.full_like(value, 77) for value in expected]
        out[0] = torch.zeros_like(expected[0].t().contiguous()).t()
        version = out[1]._version
        native.gather(slices, out)
        assert all(map(same, out, expected))
        assert out[1]._version > version
        values = [(torch.randn(each.shape) * 50).to(each.tensor.dtype) for each in slices]
        whole = [Slices(each.tensor.clone(), each.dim, each.groups, each.index) for each in slices]
        reference.scatter(whole, values)
        versions = [each.tensor._version for each in slices]
        native.scatter(slices, values)
    assert all(same(one.tensor, other.tensor) for one, other in zip(slices, whole, strict=True))
    assert all(
        each.tensor._version > version
        for each, version, value in zip(slices, versions, values, strict=True)
        if value.numel()
    )


def test_a_slice_that_is_not_there_is_refused_and_nothing_written(native):
    tensor = torch.zeros(6, 4)
    for place in (-1, 3):
        wrong = [Slices(tensor, 0, 3, torch.tensor([0, place]))]
        with pytest.raises(InputError, match=f"slice {place} is not among the 3"):
            native.scatter(wrong, [torch.ones(4, 4)])
        with pytest.raises(InputError, match=f"slice {place} is not among the 3"):
            native.gather(wrong, [torch.empty(4, 4)])
    assert not tensor.any()


#: Shape, dimension, slices along it and those selected; None for a copy of all.
SELECTIONS = (
    ((12, 5), 0, 4, [0, 3]),
    ((5, 12), 1, 4, [2, 0]),
    ((7, 40), 1, 40, [1, 2, 5, 39]),
    ((36,), 0, 3, [1]),
    ((6, 17), 0, 3, [0, 1, 2]),
    ((6, 4), 0, 3, []),
    ((4, 0), 0, 2, [1]),
    ((33, 31), 0, 1, None),
    # More than one task each, cut within a slice and between slices.
    ((4, 9000), 0, 2, [1, 0]),
    ((300, 700), 1, 35, list(range(0, 35, 3))),
)
DTYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
@pytest.mark.parametrize("large", [False, True])
def test_one_table_selects_casts_and_spreads_as_torch_does(native, number, source, target, large):
    torch.manual_seed(0)
    table, selected, spread = native.Table(), [], []
    if large:
        # 4 MB of float32, past the caches then like all that the table spreads.
        whole = torch.randn(1025, 1024).to(source)
        spread.append((table.spread(whole, whole.to(target), 0, 1, None), whole.to(target)))
    for shape, dim, groups, places in SELECTIONS:
        index = None if places is None else torch.tensor(places, dtype=torch.int64)
        whole = (torch.randn(shape) * 100).to(source)
        divided = whole.unflatten(dim, (groups, shape[dim] // groups))
        part = whole if index is None else divided.index_select(dim, index).flatten(dim, dim + 1)
        back = whole
        if index is not None and part.numel():
            back = torch.zeros_like(divided).index_copy_(dim, index, divided.index_select(dim, index)).view(shape)
        elif index is not None:
            back = torch.zeros_like(whole)
        with threads(number), poisoned():
            selected.append((table.select(whole, dim, groups, index, target), part.to(target)))
            like = torch.empty(shape, dtype=target)
            spread.append((table.spread(part, like, dim, groups, index), back.to(target)))
    # Rows of a transposed matrix are no single block.
    whole = torch.randn(9, 8).to(source).t()
    out = torch.empty(4, 9, dtype=target)
    index = torch.tensor([3, 1])
    assert table.select(whole, 0, 4, index, target, out) is out
    selected.append((out, whole[[6, 7, 2, 3]].to(target)))
    with threads(number):
        table.run()
    assert all(same(got, expected) for got, expected in selected + spread)


def test_casts_round_to_nearest_even_and_keep_what_is_no_number(native):
    bits = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 1, -(2**31)], dtype=torch.int32)
    special = torch.tensor([float("inf"), -float("inf"), 0.0])
    x = torch.cat([bits.view(torch.float32), special]).repeat(5)
    numbers = torch.cat([x, torch.tensor([0x7F800001, -1, 0x7FFFFFFF], dtype=torch.int32).view(torch.float32)])
    table = native.Table()
    rounded = table.select(numbers, 0, 1, None, torch.bfloat16)
    table.run()
    assert same(rounded[: len(x)], x.to(torch.bfloat16))
    assert rounded[len(x) :].isnan().all()
    again = table.select(rounded, 0, 1, None, torch.float32)
    table.run()
    assert same(again[: len(x)], x.to(torch.bfloat16).float())
    assert again[len(x) :].isnan().all()


@pytest.mark.parametrize("place", [-1, 3])
def test_no_copy_of_a_table_runs_where_one_is_refused(native, place):
    table, x = native.Table(), torch.ones(6, 4)
    out = table.select(x, 0, 3, torch.tensor([0]), torch.bfloat16, torch.zeros(2, 4, dtype=torch.bfloat16))
    table.spread(x[:4], x, 0, 3, torch.tensor([0, place]))
    with pytest.raises(InputError, match=f"slice {place} is not among the 3"):
        table.run()
    assert not out.any()


def test_what_does_not_fit_is_refused(native):
    table, x, index = native.Table(), torch.ones(6, 4), torch.tensor([0, 2])
    with pytest.raises(InputError, match=r"dimension 0 of a tensor .* does not divide into 4"):
        table.select(x, 0, 4, index, torch.float32)
    with pytest.raises(InputError, match=r"with an index of torch.int32"):
        table.spread(x[:4], x, 0, 3, index.int())
    with pytest.raises(InputError, match=r"needs room as contiguous torch.float32 \[4, 4\], got .* \[5, 4\]"):
        table.select(x, 0, 3, index, torch.float32, torch.empty(5, 4))
    with pytest.raises(InputError, match=r"slices of shape \[4, 4\] of \[6, 4\] do not go with \[5, 4\]"):
        table.spread(x[:5], x, 0, 3, index)
    with pytest.raises(InputError, match=r"does not cast torch.float64 to torch.bfloat16"):
        table.select(x.double(), 0, 3, index, torch.bfloat16)
    table.run()


def test_what_is_saved_is_restored_from_the_same_memory_wherever_a_tensor_moves(native):
    slices = many_slices(torch.device("cpu"))
    expected = plain_gather(slices)
    saved = Saved(slices)
    for change in ("none", "numbers", "memory before", "memory between"):
        if change == "memory before":
            for each in slices[:3]:
                each.tensor.data = each.tensor.data.clone()
        copies = saved._copies
        saved.save()
        assert (saved._copies is copies) == (change != "memory before")
        kept = [each.tensor.clone() for each in slices]
        for each in slices:
            if change == "memory between":
                each.tensor.data = torch.zeros_like(each.tensor)
            elif change != "none":
                each.tensor.zero_()
        saved.restore()
        assert all(map(same, plain_gather(slices), expected))
        if change == "none":
            assert all(same(each.tensor, before) for each, before in zip(slices, kept, strict=True))
    # As other numbers in another shape, too.
    slices[0].tensor.data = torch.randn(24, 3, dtype=torch.float64)
    kept = slices[0].tensor.clone()
    saved.save()
    slices[0].tensor.zero_()
    saved.restore()
    assert torch.equal(slices[0].tensor.view(12, 2, 3)[slices[0].index], kept.view(12, 2, 3)[slices[0].index])


def test_slices_that_last_are_copied_anew_where_something_has_written_to_them(native, monkeypatch):
    slices = many_slices(torch.device("cpu"))
    saved, written = Saved(slices[:2], lasting=slices[2:]), []
    runs = saved._runs

    def spied(count, back):
        if not back:
            written.append(count)
        return runs(count, back)

    monkeypatch.setattr(saved, "_runs", spied)
    for change in (None, None, -1, 0, None):
        if change is not None:
            slices[change].tensor.zero_()
        expected = plain_gather(slices)
        saved.save()
        for each in slices:
            each.tensor.fill_(1)
        saved.restore()
        assert all(map(same, plain_gather(slices), expected))
    assert written == [len(slices), 2, len(slices), 2, 2]
