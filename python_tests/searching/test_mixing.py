import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ticketops.searching.mixing import make_schedule, share_steps
from ticketops.searching.sharing_plan import MIXINGS

sizes = st.lists(st.integers(1, 700), min_size=2, max_size=6)


@given(sizes, st.integers(1, 64), st.integers(1, 4), st.sampled_from(MIXINGS), st.integers(0, 2**32 - 1))
def test_every_rule_takes_as_many_steps_and_no_row_returns_before_the_others(rows, batch, epochs, mixing, seed):
    schedule = make_schedule(rows, batch, epochs, mixing, seed)
    batches = [math.ceil(count / batch) for count in rows]
    assert len(schedule) == epochs * sum(batches)
    for task, count in enumerate(rows):
        own = [step.rows for step in schedule if step.task == task]
        assert own
        assert all(1 <= len(part) <= batch for part in own)
        for start in range(0, len(own), batches[task]):
            seen = np.concatenate(own[start : start + batches[task]])
            assert len(set(seen.tolist())) == len(seen)
            if len(own) - start >= batches[task]:
                assert sorted(seen.tolist()) == list(range(count))


@given(sizes, st.integers(1, 64), st.integers(1, 3), st.integers(0, 99))
def test_proportional_sees_every_row_once_an_epoch(rows, batch, epochs, seed):
    schedule = make_schedule(rows, batch, epochs, "proportional", seed)
    length = len(schedule) // epochs
    for epoch in range(epochs):
        part = schedule[epoch * length : (epoch + 1) * length]
        for task, count in enumerate(rows):
            seen = sorted(row for step in part if step.task == task for row in step.rows.tolist())
            assert seen == list(range(count))


@given(st.lists(st.integers(1, 3000), min_size=2, max_size=8), st.floats(0, 1))
def test_steps_are_shared_out_exactly_and_nobody_is_left_out(batches, power):
    counts = share_steps(batches, power)
    assert sum(counts) == sum(batches)
    assert min(counts) >= 1
    ideal = np.asarray(batches, dtype=float) ** power
    ideal *= sum(batches) / ideal.sum()
    assert np.abs(np.asarray(counts) - ideal).max() < 1


def test_the_rules_are_what_their_names_say():
    rows = [67_000, 635]
    found = {mixing: Counter(step.task for step in make_schedule(rows, 32, 3, mixing, 0)) for mixing in MIXINGS}
    assert found["proportional"] == {0: 3 * 2094, 1: 3 * 20}
    assert found["uniform"] == {0: 3 * 1057, 1: 3 * 1057}
    assert 3 * 20 < found["annealed"][1] < 3 * 1057
    last = make_schedule(rows, 32, 3, "annealed", 0)[2 * 2114 :]
    assert Counter(step.task for step in last)[1] == pytest.approx(2114 * 20**0.2 / (20**0.2 + 2094**0.2), abs=1)


def test_the_seed_decides_and_tasks_are_mixed():
    one, same, other = (make_schedule([320, 320], 32, 2, "proportional", seed) for seed in (1, 1, 2))
    assert [(s.task, s.rows.tolist()) for s in one] == [(s.task, s.rows.tolist()) for s in same]
    assert [(s.task, s.rows.tolist()) for s in one] != [(s.task, s.rows.tolist()) for s in other]
    tasks = [step.task for step in one[:20]]
    assert tasks != sorted(tasks)
    assert tasks != sorted(tasks, reverse=True)
