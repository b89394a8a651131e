import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.tickets import PAPER_LEVELS, PAPER_WEIGHTS, Importance, Ticket, level_counts, prune

from .strategies import importances, of_scores

KINDS = st.sampled_from(["winning", "losing", "random"])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def cuts(draw: Any) -> tuple[Importance, int, int]:
    """An importance, min_heads and the most heads that can then be pruned."""
    importance = draw(importances())
    min_heads = draw(st.integers(0, importance.num_heads))
    return importance, min_heads, importance.num_layers * (importance.num_heads - min_heads)


def bert_base(seed: int = 0) -> Importance:
    generator = torch.Generator().manual_seed(seed)
    return of_scores(torch.rand(12, 12, generator=generator), torch.rand(12, generator=generator))


@given(cuts(), KINDS, SEEDS, st.data())
def test_counts_are_exact_and_every_layer_keeps_its_heads(cut: Any, kind: Any, seed: int, data: st.DataObject) -> None:
    importance, min_heads, most = cut
    counts = data.draw(st.integers(0, most)), data.draw(st.integers(0, importance.num_layers))
    ticket = prune(importance, counts=counts, kind=kind, min_heads=min_heads, seed=seed)
    assert (ticket.heads_pruned, ticket.ffns_pruned) == counts
    assert ticket.head_mask.sum(dim=1).min() >= min_heads
    with pytest.raises(InputError, match=f"the maximum is {most}$"):
        prune(importance, counts=(most + 1, 0), kind=kind, min_heads=min_heads)
    with pytest.raises(InputError, match=f"FFNs; the maximum is {importance.num_layers}$"):
        prune(importance, counts=(0, importance.num_layers + 1), kind=kind, min_heads=min_heads)


@given(cuts(), KINDS, SEEDS)
def test_levels_are_nested(cut: Any, kind: Any, seed: int) -> None:
    importance, min_heads, most = cut
    denser = Ticket.full(importance.num_layers, importance.num_heads)
    for heads in range(most + 1):
        ffns = min(heads, importance.num_layers)
        sparser = prune(importance, counts=(heads, ffns), kind=kind, min_heads=min_heads, seed=seed)
        assert sparser & denser == sparser
        denser = sparser


@given(cuts(), st.sampled_from(["winning", "losing"]))
def test_what_is_pruned_ranks_below_what_is_kept(cut: Any, kind: Any) -> None:
    importance, min_heads, most = cut
    sign = 1 if kind == "winning" else -1
    ticket = prune(importance, counts=(most // 2, importance.num_layers // 2), kind=kind, min_heads=min_heads)
    head = importance.normalized_head()
    free = ticket.head_mask.sum(dim=1, keepdim=True) > min_heads
    pruned, kept = head[~ticket.head_mask], head[ticket.head_mask & free]
    if pruned.numel() and kept.numel():
        assert (sign * pruned).max() <= (sign * kept).min()
    pruned, kept = importance.ffn[~ticket.ffn_mask], importance.ffn[ticket.ffn_mask]
    if pruned.numel() and kept.numel():
        assert (sign * pruned).max() <= (sign * kept).min()


@given(cuts(), st.data())
def test_winning_and_losing_are_disjoint_up_to_the_stated_number(cut: Any, data: st.DataObject) -> None:
    importance, min_heads, most = cut
    heads = importance.num_heads
    count, ffns = data.draw(st.integers(0, most)), data.draw(st.integers(0, importance.num_layers // 2))
    winning, losing = (
        prune(importance, counts=(count, ffns), kind=kind, min_heads=min_heads) for kind in ("winning", "losing")
    )
    passed_over = min_heads * (count // (heads - min_heads)) if count else 0
    excess = 2 * (count + passed_over) - importance.num_layers * heads
    assert int((~winning.head_mask & ~losing.head_mask).sum()) <= max(0, excess)
    assert not (~winning.ffn_mask & ~losing.ffn_mask).any()


@pytest.mark.parametrize("counts", [(3,), (3, 1, 1), (3.0, 1), ("3", 1), 3])
def test_counts_are_two_whole_numbers(counts: Any) -> None:
    with pytest.raises(InputError, match="are not two whole numbers"):
        prune(of_scores(torch.rand(3, 4), torch.rand(3)), counts=counts)


def test_the_guard_can_make_winning_and_losing_meet() -> None:
    # Layer 0 has the lowest four scores of all. The winning order passes its last head over and so reaches the seventh
    # of twelve ranks with six heads, and the losing order reaches the same one from above.
    ranks = torch.tensor([[1, 2, 3, 4], [5, 7, 9, 11], [6, 8, 10, 12]], dtype=torch.float64)
    scores = of_scores(ranks, torch.ones(3))
    order = ranks.flatten().argsort()
    scores.rank = lambda neurons: ((ranks.flatten(), order), (torch.ones(3), torch.arange(3)))  # type: ignore[method-assign]
    winning, losing = (prune(scores, counts=(6, 0), kind=kind) for kind in ("winning", "losing"))
    assert (~winning.head_mask & ~losing.head_mask).nonzero().tolist() == [[1, 1]]
    winning, losing = (prune(scores, counts=(6, 0), kind=kind, min_heads=0) for kind in ("winning", "losing"))
    assert (~winning.head_mask & ~losing.head_mask).sum() == 0


@pytest.mark.parametrize("count", [1, 57, 66])
def test_bert_base_tickets_are_disjoint_up_to_66_heads(count: int) -> None:
    for seed in range(20):
        importance = bert_base(seed)
        winning, losing = (prune(importance, counts=(count, 6), kind=kind) for kind in ("winning", "losing"))
        assert (winning | losing).is_full


def test_ties_rank_by_layer_then_head() -> None:
    importance = of_scores(torch.ones(2, 3), torch.ones(2))
    winning = prune(importance, counts=(3, 1))
    assert winning.head_mask.tolist() == [[False, False, True], [False, True, True]]
    assert winning.ffn_mask.tolist() == [False, True]
    losing = prune(importance, counts=(3, 1), kind="losing")
    assert losing.head_mask.tolist() == [[True, True, False], [True, False, False]]
    assert losing.ffn_mask.tolist() == [True, False]


def test_heads_are_compared_after_normalisation_and_ffns_before() -> None:
    # Layer 1 is a hundred times as important as layer 0, but within it head 0 matters least of all.
    importance = of_scores(torch.tensor([[0.4, 0.6], [10.0, 99.0]]), torch.tensor([2.0, 1.0]))
    ticket = prune(importance, counts=(1, 1))
    assert ticket.head_mask.tolist() == [[True, True], [False, True]]
    assert ticket.ffn_mask.tolist() == [True, False]


@given(cuts(), SEEDS, st.data())
def test_random_is_a_function_of_the_seed_and_not_of_the_scores(cut: Any, seed: int, data: st.DataObject) -> None:
    importance, min_heads, most = cut
    counts = data.draw(st.integers(0, most)), data.draw(st.integers(0, importance.num_layers))
    ticket = prune(importance, counts=counts, kind="random", min_heads=min_heads, seed=seed)
    unrecorded = Importance(importance.num_layers, importance.num_heads)
    state = torch.get_rng_state()
    assert prune(unrecorded, counts=counts, kind="random", min_heads=min_heads, seed=seed) == ticket
    assert torch.equal(torch.get_rng_state(), state)


def test_random_is_uniform_over_structures() -> None:
    importance = Importance(3, 4)
    tickets = [prune(importance, counts=(6, 1), kind="random", seed=seed) for seed in range(2000)]
    assert len(set(tickets)) > 500
    heads = torch.stack([~t.head_mask for t in tickets]).double().mean(0)
    ffns = torch.stack([~t.ffn_mask for t in tickets]).double().mean(0)
    # Five standard errors of a share of 2000.
    assert (heads - 1 / 2).abs().max() < 5 * math.sqrt(0.25 / 2000)
    assert (ffns - 1 / 3).abs().max() < 5 * math.sqrt(0.25 / 2000)


def test_a_seed_names_the_same_ticket_for_good() -> None:
    ticket = prune(Importance(2, 4), counts=(4, 1), kind="random", seed=1)
    assert ticket.head_mask.tolist() == [[True, False, False, True], [True, True, False, False]]
    assert ticket.ffn_mask.tolist() == [False, True]


@given(st.integers(0, 99), st.integers(1, 24), st.integers(1, 24))
def test_level_counts_are_exact_floors_of_the_decimal(percent: int, layers: int, heads: int) -> None:
    exact = Fraction(percent, 100)
    expected = math.floor(exact * layers * heads), math.floor(exact * layers)
    assert level_counts(percent / 100, layers, heads) == expected
    assert level_counts(1 - (100 - percent) / 100, layers, heads) == expected


def test_a_sparsity_is_its_counts() -> None:
    importance = bert_base()
    assert level_counts(0.29, 10, 10) == (29, 2)
    ticket = prune(importance, 0.3)
    assert ticket == prune(importance, counts=(43, 3))
    assert prune(importance, 0.0).is_full
    assert dict(ticket.metadata) == {
        "kind": "winning",
        "sparsity": 0.3,
        "counts": [43, 3],
        "min_heads": 1,
        "granularity": "example",
    }
    by_counts = prune(importance, counts=(43, 3), kind="random", seed=7).metadata
    assert (by_counts["kind"], by_counts["sparsity"], by_counts["seed"]) == ("random", None, 7)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, 30, float("nan"), float("inf")])
def test_a_sparsity_outside_the_range_is_refused(sparsity: float) -> None:
    with pytest.raises(InputError, match=rf"sparsity {sparsity} is outside \[0, 1\)"):
        prune(bert_base(), sparsity)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one"),
        ({"sparsity": 0.1, "counts": (1, 1)}, "exactly one"),
        ({"sparsity": 0.95}, "cannot prune 136 heads while each of 12 layers keeps 1; the maximum is 132"),
        ({"counts": (-1, 0)}, "cannot prune -1 heads"),
        ({"counts": (1.5, 0)}, "are not two whole numbers"),
        ({"counts": (0, 13)}, "cannot prune 13 FFNs; the maximum is 12"),
        ({"sparsity": 0.1, "kind": "lucky"}, "kind 'lucky' is unknown; use one of winning, losing, random"),
        ({"sparsity": 0.1, "min_heads": 13}, "min_heads 13 is impossible with 12 heads a layer; use 0 to 12"),
        ({"sparsity": 0.1, "min_heads": -1}, "min_heads -1"),
        ({"sparsity": 0.1, "kind": "random", "seed": -1}, "seed -1 is outside"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        prune(bert_base(), **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["winning", "losing"])
def test_scores_that_are_not_finite_are_refused(value: float, kind: Any) -> None:
    head, ffn = torch.ones(2, 2), torch.ones(2)
    with pytest.raises(InputError, match="1 of 2 FFN scores are NaN or infinite"):
        prune(of_scores(head, torch.tensor([1.0, value])), 0.5, kind=kind)
    head[0, 0] = value
    with pytest.raises(InputError, match="head scores are NaN or infinite"):
        prune(of_scores(head, ffn), 0.5, kind=kind)


def test_scores_that_were_not_recorded_are_refused() -> None:
    with pytest.raises(InputError, match="no head importance was recorded"):
        prune(Importance(2, 2), 0.5)


def test_the_papers_levels_and_weights() -> None:
    remaining = {}
    for sparsity, counts in PAPER_LEVELS.items():
        ticket = prune(bert_base(), counts=counts)
        assert (ticket.heads_pruned, ticket.ffns_pruned) == counts
        assert ticket.heads_pruned == level_counts(sparsity, 12, 12)[0]
        remaining[sparsity] = round(100 * ticket.weights_remaining(PAPER_WEIGHTS), 1)
    assert remaining == {0.1: 93.2, 0.2: 86.4, 0.3: 79.4, 0.4: 72.5, 0.5: 65.5, 0.6: 58.7, 0.7: 51.9, 0.8: 44.9}


@given(importances(), KINDS, SEEDS, st.data())
def test_neurons_are_pruned_in_place_of_ffns(importance: Importance, kind: Any, seed: int, data: st.DataObject) -> None:
    if importance.num_neurons is None:
        with pytest.raises(InputError, match="has no neurons"):
            prune(importance, 0.5, neurons=True)
        return
    most = importance.num_layers * importance.num_neurons
    count = data.draw(st.integers(0, most))
    ticket, denser = (
        prune(importance, counts=(0, n), kind=kind, seed=seed, neurons=True) for n in (count, max(count - 1, 0))
    )
    assert ticket.neurons_pruned + ticket.ffns_pruned * importance.num_neurons == count
    assert ticket & denser == ticket
    if count and kind != "random":
        kept = torch.zeros(importance.num_layers, importance.num_neurons, dtype=torch.bool)
        kept |= ticket.ffn_mask[:, None] if ticket.neuron_mask is None else ticket.neuron_mask
        scores = importance.normalized_neuron() * (1 if kind == "winning" else -1)
        assert not kept.any() or scores[~kept].max() <= scores[kept].min()
    with pytest.raises(InputError, match=f"neurons; the maximum is {most}$"):
        prune(importance, counts=(0, most + 1), neurons=True)


def test_neuron_counts_are_shares_of_all_neurons() -> None:
    assert level_counts(0.29, 10, 10, 100) == (29, 290)
    assert level_counts(0.3, 12, 12, 3072) == (43, 11059)
    random = prune(Importance(2, 2, neurons=100), 0.5, kind="random", neurons=True)
    assert random.neurons_pruned + 100 * random.ffns_pruned == 100
    assert random.metadata["neurons"] is True
