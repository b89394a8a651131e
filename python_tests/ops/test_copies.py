"""Slices of weights on the CPU: the native copies against plain PyTorch's."""

import pytest
import torch

from ticketops.errors import InputError
from ticketops.ops.backends import _module
from ticketops.ops.copies import Slices, reference

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
