import itertools

import numpy as np
import pytest
import torch
from hypothesis import given

from ticketops.errors import InputError
from ticketops.tickets import Importance, Ticket, chance_jaccard, jaccards, mean_jaccard, prune

from .strategies import same_shape_tickets


@pytest.mark.parametrize("counts", [((14, 1), (28, 2)), ((43, 3), (43, 3)), ((60, 6), (0, 0))])
def test_chance_is_what_random_tickets_average_to(counts):
    shape, seeds = Importance(12, 12), range(300)
    ones, others = (
        [prune(shape, counts=count, kind="random", min_heads=0, seed=shift + seed) for seed in seeds]
        for count, shift in zip(counts, (0, 10_000), strict=True)
    )
    found = [one.jaccard(other) for one, other in zip(ones, others, strict=True)]
    mean, deviation = chance_jaccard(ones[0], others[0])
    assert np.mean(found) == pytest.approx(mean, abs=4 * max(deviation, 1e-9) / len(found) ** 0.5)
    assert np.std(found) == pytest.approx(deviation, rel=0.2, abs=1e-9)


def test_the_smallest_case_by_hand():
    # One layer of two heads, one kept by each, its FFN by neither: the same head half of the time.
    one, other = (Ticket(torch.tensor([mask]), torch.tensor([False])) for mask in ([True, False], [False, True]))
    assert chance_jaccard(one, other) == pytest.approx((0.5, 0.5))
    full = Ticket.full(3, 4)
    assert chance_jaccard(full, full) == pytest.approx((1.0, 0.0))
    empty = Ticket(torch.zeros(3, 4, dtype=torch.bool), torch.zeros(3, dtype=torch.bool))
    assert chance_jaccard(empty, empty) == pytest.approx((1.0, 0.0))
    assert chance_jaccard(empty, full) == pytest.approx((0.0, 0.0))


@given(same_shape_tickets(4))
def test_many_tickets_overlap_as_each_pair_of_them(tickets):
    by_pair = [[one.jaccard(other) for other in tickets] for one in tickets]
    np.testing.assert_allclose(jaccards(tickets), by_pair, atol=1e-12)
    pairs = list(itertools.combinations(tickets, 2))
    mean, chance = mean_jaccard(tickets)
    assert mean == pytest.approx(np.mean([one.jaccard(other) for one, other in pairs]))
    assert chance == pytest.approx(np.mean([chance_jaccard(one, other)[0] for one, other in pairs]))


def test_shapes_must_agree():
    full, small = Ticket.full(12, 12), Ticket.full(3, 4)
    for compute in (lambda: chance_jaccard(full, small), lambda: jaccards([full, full, small])):
        with pytest.raises(InputError, match="3 layers x 4 heads does not fit 12"):
            compute()
