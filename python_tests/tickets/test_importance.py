import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from ticketops.errors import InputError
from ticketops.tickets import Granularity, Importance

from .strategies import SHAPES, importances, of_scores

GRANULARITIES: list[Granularity] = ["example", "token", "batch"]
Batches = list[tuple[torch.Tensor, torch.Tensor]]


def batches(sizes: list[int], width: int, seed: int = 0) -> Batches:
    """Per batch: signed and absolute partials [B, width] of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randn(size, 7, width, generator=generator, dtype=torch.float64) for size in sizes]
    return [(each.sum(1), each.abs().sum(1)) for each in tokens]


def brute_force(parts: Batches, granularity: str, group: int) -> list[float]:
    """The definition, one number at a time."""
    width = parts[0][0].shape[1]
    sums, count = [0.0] * width, 0
    for signed, absolute in parts:
        examples = len(signed) // group
        for column in range(width):
            by_example = [sum(signed[e * group + i, column].item() for i in range(group)) for e in range(examples)]
            tokens = sum(absolute[row, column].item() for row in range(len(absolute)))
            if granularity == "example":
                sums[column] += sum(abs(examples * share) for share in by_example)
            elif granularity == "token":
                sums[column] += examples * tokens
            else:
                sums[column] += abs(sum(by_example))
        count += 1 if granularity == "batch" else examples
    return [total / count for total in sums]


def record(importance: Importance, parts: Batches) -> Importance:
    """Layer 0 gets the first columns as heads and the last as FFN, layer 1 the same twice as large."""
    for signed, absolute in parts:
        for layer in range(importance.num_layers):
            scale = 1 + layer
            importance.add_head(layer, scale * signed[:, :-1], scale * absolute[:, :-1])
            importance.add_ffn(layer, scale * signed[:, -1], scale * absolute[:, -1])
    return importance


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4), group=st.integers(1, 3), seed=st.integers(0, 99))
def test_averages_are_the_definition(granularity: Granularity, sizes: list[int], group: int, seed: int) -> None:
    parts = batches([size * group for size in sizes], width=4, seed=seed)
    importance = record(Importance(2, 3, granularity, sequences_per_example=group), parts)
    expected = torch.tensor(brute_force(parts, granularity, group), dtype=torch.float64)
    assert importance.head.dtype == importance.ffn.dtype == torch.float64
    torch.testing.assert_close(importance.head, torch.stack([expected[:-1], 2 * expected[:-1]]), rtol=1e-12, atol=0)
    torch.testing.assert_close(importance.ffn, torch.stack([expected[-1], 2 * expected[-1]]), rtol=1e-12, atol=0)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_only_the_needed_partial_is_read(granularity: Granularity) -> None:
    parts = batches([4], width=3)
    given_both = record(Importance(1, 2, granularity), parts)
    importance = Importance(1, 2, granularity)
    signed, absolute = (None, parts[0][1]) if granularity == "token" else (parts[0][0], None)
    importance.add_head(0, *(x if x is None else x[:, :-1] for x in (signed, absolute)))
    importance.add_ffn(0, *(x if x is None else x[:, -1] for x in (signed, absolute)))
    assert importance == given_both
    with pytest.raises(InputError, match=f"granularity '{granularity}'"):
        importance.add_head(0, absolute, signed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_any_floating_dtype_is_summed_in_float64(dtype: torch.dtype, granularity: Granularity) -> None:
    # In float16 the first sum is 65504 + 65504 = inf, in bfloat16 256 + 1 = 256.
    partial = torch.tensor([[65504.0, 256.0], [65504.0, 1.0]]).to(dtype)
    importance = Importance(1, 2, granularity, sequences_per_example=2)
    importance.add_head(0, partial, partial)
    assert importance.head.tolist() == [partial.double().sum(0).tolist()]


def test_partials_with_a_graph_are_detached() -> None:
    importance = Importance(1, 2)
    importance.add_head(0, torch.ones(3, 2, requires_grad=True) * 2, None)
    assert not importance.head.requires_grad


def test_partials_given_are_left_alone() -> None:
    partial = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    importance = Importance(1, 2, "batch")
    importance.add_head(0, partial, None)
    importance.add_head(0, partial, None)
    assert partial.tolist() == [[1.0, -2.0]]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_adding_never_reads_values(granularity: Granularity) -> None:
    # Meta tensors have no values: whatever would wait for a GPU raises here.
    importance = Importance(2, 3, granularity, sequences_per_example=2)
    for layer in range(2):
        head, ffn = torch.empty(4, 3, device="meta"), torch.empty(4, device="meta")
        for _ in range(2):
            importance.add_head(layer, head, head)
            importance.add_ffn(layer, ffn, ffn)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_adding_on_a_gpu_does_not_wait(granularity: Granularity) -> None:
    parts = batches([4, 8], width=4)
    importance = Importance(2, 3, granularity)
    on_gpu = [(signed.cuda(), absolute.cuda()) for signed, absolute in parts]
    torch.cuda.set_sync_debug_mode("error")
    try:
        record(importance, on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(importance.head, record(Importance(2, 3, granularity), parts).head)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@given(split=st.integers(0, 4))
def test_merging_is_recording_everything(granularity: Granularity, split: int) -> None:
    parts = batches([3, 1, 4, 2], width=4)
    whole, first, second = (Importance(2, 3, granularity) for _ in range(3))
    record(whole, parts)
    record(first, parts[:split])
    record(second, parts[split:])
    second_before = second.merge(Importance(2, 3, granularity))
    assert first.merge(second) is first
    torch.testing.assert_close(first.head, whole.head, rtol=1e-14, atol=0)
    torch.testing.assert_close(first.ffn, whole.ffn, rtol=1e-14, atol=0)
    assert second_before is second
    record(first, parts)
    assert first != second


def test_merging_different_things_is_refused() -> None:
    for other in (Importance(2, 4), Importance(3, 3), Importance(2, 3, "token"), Importance(2, 3, "example", 2)):
        with pytest.raises(InputError, match="cannot merge importance of"):
            Importance(2, 3).merge(other)


def test_nothing_recorded_is_an_error() -> None:
    importance = Importance(3, 2)
    with pytest.raises(InputError, match="no head importance was recorded for any layer"):
        _ = importance.head
    with pytest.raises(InputError, match="no FFN importance was recorded for any layer"):
        _ = importance.ffn
    importance.add_ffn(1, torch.ones(2), None)
    with pytest.raises(InputError, match=r"no FFN importance was recorded for layers \[0, 2\]"):
        _ = importance.ffn


@pytest.mark.parametrize(
    ("layer", "partial", "message"),
    [
        (2, torch.ones(4, 3), "layer 2 is not one of 2"),
        (-1, torch.ones(4, 3), "layer -1"),
        (0, torch.ones(4, 2), r"signed is torch.float32 \[4, 2\]; pass a floating tensor \[B, 3\]"),
        (0, torch.ones(3), r"\[3\]"),
        (0, torch.tensor(1.0), r"\[\]"),
        (0, torch.ones(4, 3, dtype=torch.int64), "torch.int64"),
        (0, torch.ones(3, 3), "3 sequences is not whole examples of 2"),
        (0, torch.ones(0, 3), "0 sequences"),
    ],
)
def test_partials_that_do_not_fit_are_refused(layer: int, partial: torch.Tensor, message: str) -> None:
    importance = Importance(2, 3, sequences_per_example=2)
    with pytest.raises(InputError, match=message):
        importance.add_head(layer, partial, None)
    assert importance == Importance(2, 3, sequences_per_example=2)


def test_an_ffn_partial_has_one_dimension() -> None:
    for partial in (torch.tensor(1.0), torch.ones(2, 1)):
        with pytest.raises(InputError, match=r"pass a floating tensor \[B\]"):
            Importance(1, 1).add_ffn(0, partial, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((2, 3, "word"), "granularity 'word' is unknown; use one of example, token, batch"),
        ((0, 3), "layers is 0"),
        ((2, 2.0), "heads is 2.0"),
        ((2, 3, "example", 0), "sequences_per_example is 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Importance(*arguments)


@given(importances())
def test_normalized_layers_have_norm_one_or_zero(importance: Importance) -> None:
    head, normalized = importance.head, importance.normalized_head()
    norms = normalized.norm(dim=1)
    expected = (head.sum(dim=1) > 0).double()
    torch.testing.assert_close(norms, expected)
    torch.testing.assert_close(normalized * head.norm(dim=1, keepdim=True), head)


def test_equality_is_of_what_was_measured() -> None:
    parts = batches([2], width=3)
    one, two = record(Importance(1, 2), parts), record(Importance(1, 2, metadata={"x": 1}), parts)
    assert one == two
    assert one != "importance"
    assert record(Importance(1, 2, "batch"), parts) != one
    two.add_ffn(0, torch.ones(1), None)
    assert one != two
    assert repr(one) == "<Importance: 1 layer x 2 heads per example, 2 recorded>"
    with pytest.raises(TypeError):
        hash(one)


@given(st.data())
def test_rank_correlation_is_spearmans(data: st.DataObject) -> None:
    shapes = st.just(data.draw(SHAPES))
    a, b = data.draw(importances(shapes)), data.draw(importances(shapes))
    result = a.rank_correlation(b)
    for name, x, y in (("head", a.normalized_head(), b.normalized_head()), ("ffn", a.ffn, b.ffn)):
        if x.unique().numel() < 2 or y.unique().numel() < 2:
            assert math.isnan(result[name])
        else:
            assert result[name] == pytest.approx(spearmanr(np.ravel(x), np.ravel(y)).statistic)
            assert -1 - 1e-9 <= result[name] <= 1 + 1e-9
    assert set(result) == {"head", "ffn"}


def test_rank_correlation_of_opposites() -> None:
    head, ffn = torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([1.0])
    up, down = of_scores(head, ffn), of_scores(head.flip(1), ffn, "batch")
    assert up.rank_correlation(up)["head"] == pytest.approx(1)
    assert up.rank_correlation(down)["head"] == pytest.approx(-1)
    with pytest.raises(InputError, match="cannot compare"):
        up.rank_correlation(Importance(2, 3))
