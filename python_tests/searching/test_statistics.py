import math

import numpy as np
import pytest
from scipy import stats

from ticketops.searching.statistics import (
    ERROR_RATE,
    Spread,
    choice_inflation,
    compare,
    cross_fit,
    differences,
    is_like_a_constant,
    row_error_of,
)

STUDIES = 300


def rate_of(outcome: str, studies: list[dict]) -> float:
    return np.mean([any(one.outcome == outcome for one in study.values()) for study in studies])


def study(generator, seeds: int, levels: int, rows: int, effect: float = 0.0, spread: float = 0.0) -> dict:
    """A search of `levels` tickets against one full model, scored by counting right answers among `rows`."""

    def scores(accuracy: float) -> np.ndarray:
        return generator.binomial(rows, np.clip(accuracy + spread * generator.standard_normal(seeds), 0, 1)) / rows

    full = scores(0.8)
    return compare({level: (scores(0.8 + effect) - full).tolist() for level in range(levels)}, 1 / rows)


@pytest.mark.parametrize("rows", [20, 1000])
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_with_nothing_to_find_a_run_rarely_shows_anything(seeds: int, rows: int):
    generator = np.random.default_rng([seeds, rows])
    studies = [study(generator, seeds, levels, rows, spread=0.01) for levels in (1, 3, 8) for _ in range(STUDIES // 3)]
    assert rate_of("better", studies) <= ERROR_RATE
    assert rate_of("better", studies) + rate_of("worse", studies) <= ERROR_RATE + 2 * math.sqrt(0.05 * 0.95 / STUDIES)
    # What was said before: a mean above 0.
    assert np.mean([any(one.difference.mean > 0 for one in found.values()) for found in studies]) > 0.5


@pytest.mark.parametrize(("effect", "outcome"), [(0.1, "better"), (-0.1, "worse")])
def test_a_large_effect_is_found(effect: float, outcome: str):
    generator = np.random.default_rng(7)
    studies = [study(generator, 5, 3, 1000, effect, 0.005) for _ in range(200)]
    assert rate_of(outcome, studies) > 0.95
    assert rate_of({"better": "worse", "worse": "better"}[outcome], studies) == 0


def test_one_comparison_is_scipys_paired_interval():
    ours, theirs = {0: 0.83, 1: 0.80, 2: 0.85, 3: 0.5}, {0: 0.81, 1: 0.79, 2: 0.80, 9: 0.1}
    gains = differences(ours, theirs)
    assert gains == pytest.approx([0.02, 0.01, 0.05])
    (found,) = compare({"level": gains}).values()
    want = stats.ttest_1samp(gains, 0.0).confidence_interval(1 - ERROR_RATE)
    assert (found.low, found.high) == pytest.approx((want.low, want.high))
    assert (found.outcome, found.tried) == ("no difference shown", 1)


def test_holms_steps_and_intervals_that_agree_with_them():
    def values(p: float, seeds: int = 6) -> list[float]:
        """Differences whose t test gives this p."""
        base = np.arange(seeds) - (seeds - 1) / 2
        mean = stats.t.ppf(1 - p / 2, seeds - 1) * base.std(ddof=1) / math.sqrt(seeds)
        return (base + mean).tolist()

    found = compare({p: values(p) for p in (0.03, 0.001, 0.04, 0.02)})
    # 0.001 < 0.05 / 4, but 0.02 > 0.05 / 3, and there Holm's procedure stops.
    assert [one.outcome for one in found.values()] == ["no difference shown", "better", *["no difference shown"] * 2]
    assert all((one.low > 0) == (one.outcome == "better") for one in found.values())
    # Alone each would be one.
    assert compare({0: values(0.03)})[0].outcome == "better"
    # Comparisons that were made and are not given count, too.
    assert compare({0: values(0.03)}, tried=2)[0].outcome == "no difference shown"
    assert compare({0: values(0.02)}, tried=2)[0].outcome == "better"


def test_one_seed_and_seeds_that_agree_to_the_row_give_no_verdict():
    found = compare({"one": [0.3], "none": [], "alike": [0.8 - 0.7, 0.1, 0.3 - 0.2], "equal": [0.0, 0.0]})
    assert {name: one.outcome for name, one in found.items()} == {
        "one": "no verdict",
        "none": "no verdict",
        "alike": "no difference shown",
        "equal": "no difference shown",
    }
    assert found["one"].low is None
    # One row of 250 in each of five seeds is nothing, ten rows are something.
    assert compare({0: [1 / 250] * 5}, 1 / 250)[0].outcome == "no difference shown"
    assert compare({0: [10 / 250] * 5}, 1 / 250)[0].outcome == "better"
    assert compare({}) == {}


def test_the_error_of_rows_is_what_they_move_in_all_seeds_alike():
    generator = np.random.default_rng(3)
    alike, own = generator.standard_normal(200_000), generator.standard_normal((4, 200_000))
    assert row_error_of(0.3 * alike + 0.5 * own) == pytest.approx(0.3, rel=0.02)
    # That of each seed by itself is in their spread; of one seed there is no spread.
    assert row_error_of(own) == pytest.approx(0, abs=0.1)
    assert row_error_of(own[:1]) == pytest.approx(1, rel=0.02)
    assert row_error_of(np.tile([[1.0, -1.0], [-1.0, 1.0]], 3)) == 0


@pytest.mark.parametrize("seeds", [2, 5, 20])
def test_the_inflation_is_that_of_choices_among_equal_levels(seeds: int):
    generator = np.random.default_rng(seeds)
    # All studies of these seeds and five levels, each level's noise its own beside that of the full model.
    scores = generator.standard_normal((2_000, seeds, 6, 1))
    gains = np.asarray([cross_fit(each[:, 1:], each[:, 1:], each[:, 0]).gains for each in scores])
    want = gains.mean(axis=1).std() / math.sqrt(gains.var(axis=1, ddof=1).mean() / seeds)
    found = [choice_inflation(each[:, 1:, 0] - each[:, :1, 0]) for each in scores[:200]]
    # With two seeds, the covariance of five levels is known too badly to come close.
    assert 0.95 * want < np.mean(found) < (1.4 if seeds == 2 else 1.1) * want
    assert want > 1.15


def test_a_choice_without_rivals_needs_no_inflation():
    differences = np.random.default_rng(0).standard_normal((5, 3))
    assert choice_inflation(differences + np.array([0, 20, 0])) == 1.0
    assert choice_inflation(differences[:1]) == 1.0
    # Seeds and levels that agree in everything.
    assert choice_inflation(np.zeros((5, 3)), np.zeros((5, 3, 10))) == 1.0


def test_halves_of_rows_that_choose_for_each_other_depend_on_each_other():
    generator = np.random.default_rng(0)
    # Levels with independent noise of rows, twice as large on a half, and the full model with none.
    halves = math.sqrt(2) * generator.standard_normal((4_000, 1, 4, 2))
    choices = [cross_fit(each, each[..., ::-1], np.zeros((1, 2))) for each in halves]
    gains = np.asarray([choice.gains[0] for choice in choices])
    shares = np.asarray([choice.shares for choice in choices])
    want = gains.std() / math.sqrt((shares**2).sum(axis=2).mean())
    rows = np.repeat(generator.standard_normal((1, 4, 20_000)), 3, axis=0)
    assert choice_inflation(1e-3 * generator.standard_normal((3, 4)), rows) == pytest.approx(want, rel=0.05)
    assert want > 1.2


def test_what_is_like_one_constant_answer():
    assert is_like_a_constant([0.66, 0.68], 0.664, 408)
    assert is_like_a_constant([0.5], 0.664, 408)
    assert not is_like_a_constant([0.80, 0.79], 0.664, 408)
    # Correlations: a constant answer scores 0.
    assert is_like_a_constant([0.05], 0.0, 100)
    assert not is_like_a_constant([0.5], 0.0, 100)
    assert is_like_a_constant([0.5], 0.5, 0)
    assert is_like_a_constant([5.1], 5.0, 100)
    assert not is_like_a_constant([5.3], 5.0, 100)
    assert not is_like_a_constant([0.51], 0.5, 0)


def test_spreads():
    assert Spread.of([0.5]) == Spread(0.5, None, 1)
    assert math.isnan(Spread.of([]).mean)
