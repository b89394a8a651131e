"""Projections of selected heads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from ticketops.errors import InputError
from ticketops.ops import project_columns, project_rows

doubles = {"dtype": torch.float64, "requires_grad": True}


@given(
    kept=st.lists(st.booleans(), min_size=1, max_size=5).filter(any),
    width=st.integers(1, 9),
    tokens=st.integers(0, 4),
)
def test_selection_is_masking(kept, width, tokens):
    """Values and gradients are those of whole products of which the other heads' part is masked out."""
    torch.manual_seed(width)
    mask, count = torch.tensor(kept), len(kept)
    groups, rows = mask.nonzero().flatten(), mask.repeat_interleave(width)
    x = torch.randn(2, tokens, 6, **doubles)
    weights = [torch.randn(count * width, 6, **doubles) for _ in range(3)]
    biases = [torch.randn(count * width, **doubles) for _ in range(3)]
    output = torch.randn(6, count * width, **doubles)
    leaves = [x, *weights, *biases, output]

    q, k, v = project_rows(x, weights, biases, groups, count)
    got = project_columns(q * k + v, output, groups, count)
    q, k, v = (functional.linear(x, w, b) * rows for w, b in zip(weights, biases, strict=True))
    want = functional.linear(q * k + v, output)
    torch.testing.assert_close(got, want)
    for ours, theirs in zip(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(want.square().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_bad_arguments_are_refused():
    x, w, b, groups = torch.zeros(4, 6), torch.zeros(8, 6), torch.zeros(8), torch.tensor([1])
    with pytest.raises(InputError, match=r"project_rows needs x \[\.\., 6\]"):
        project_rows(x[:, 1:], [w] * 3, [b] * 3, groups, 2)
    with pytest.raises(InputError, match=r"int64 groups \[K\].* got .* torch.int32 groups"):
        project_rows(x, [w] * 3, [b] * 3, groups.int(), 2)
    with pytest.raises(InputError, match=r"8 structures in equal groups.* 3 groups"):
        project_rows(x, [w] * 3, [b] * 3, groups, 3)
    with pytest.raises(InputError, match=r"project_columns needs x \[\.\., 4\]"):
        project_columns(x, w.t(), groups, 2)
