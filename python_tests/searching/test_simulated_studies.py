"""Searches with a known truth: how often do intervals hold it, and how often is something found that is not there?"""

from dataclasses import dataclass

import numpy as np
import pytest
from scipy.special import ndtr

from ticketops.searching.resampling import halves_of, resampled
from ticketops.searching.selection import Selection, select
from ticketops.searching.statistics import ERROR_RATE, row_weights

STUDIES, ROWS, LEVELS = 150, 200, 5
WEIGHTS = row_weights(ROWS)


@dataclass(frozen=True)
class World:
    """What the scores of a study are drawn from.

    Attributes:
        effect: what the winning tickets of one level add to the probit of a right answer.
        over_seeds: standard deviation of a training's own quality.
        shared: share of an answer's noise that belongs to the row, so that models agree on it.
        by_level: share of an answer's noise that belongs to the row and to the level, whatever the seed.
        exact: True if scores are those of infinitely many rows.
    """

    effect: float = 0.0
    over_seeds: float = 0.05
    shared: float = 0.8
    by_level: float = 0.0
    exact: bool = False

    def quality(self, generator: np.random.Generator, seeds: int) -> np.ndarray:
        """Probits of a right answer, [seeds, 1 + LEVELS, 1]."""
        quality = 0.8 + self.over_seeds * generator.standard_normal((seeds, 1 + LEVELS, 1))
        quality[:, 2] += self.effect
        return quality

    def answers(self, generator: np.random.Generator, seeds: int, rows: int) -> np.ndarray:
        """Right answers of the full model and of each level, [seeds, 1 + LEVELS, rows]."""
        difficulty = np.sqrt(self.shared) * generator.standard_normal(rows)
        of_level = np.sqrt(self.by_level) * generator.standard_normal((1 + LEVELS, rows))
        own = np.sqrt(1 - self.shared - self.by_level) * generator.standard_normal((seeds, 1 + LEVELS, rows))
        return self.quality(generator, seeds) + difficulty + of_level + own > 0

    def truth(self) -> np.ndarray:
        """What each level gains over the full model, in expectation over seeds and rows."""
        accuracy = self.answers(np.random.default_rng(1), 2_000, 2_000).mean(axis=(0, 2))
        return accuracy[1:] - accuracy[0] if self.effect else np.zeros(LEVELS)


def study(world: World, generator: np.random.Generator, seeds: int) -> Selection:
    if world.exact:
        results = [*ndtr(world.quality(generator, seeds)).reshape(-1, 1)]
    else:
        answers = world.answers(generator, seeds, ROWS)
        results = [answers[place][:, None].astype(np.float32) for place in np.ndindex(seeds, 1 + LEVELS)]
    records = []
    for place, (seed, level) in enumerate(np.ndindex(seeds, 1 + LEVELS)):
        records.append({
            "id": f"{seed}-{level}", "kind": "winning" if level else "full", "sparsity": 0.1 * level, "seed": seed,
            "heads_pruned": 0, "ffns_pruned": 0, "weights_remaining": 1.0, "weights_remaining_encoder": 1.0,
            "score": float(results[place].mean()), "report_score": None, "rows": {"validation": ROWS},
        })  # fmt: skip
        if world.exact:
            records[-1]["halves"] = [[records[-1]["score"]] * 2]
    if world.exact:
        return select(records, range(seeds))
    halves = resampled("accuracy", results, halves_of(ROWS)).reshape(len(results), -1, 2)
    scores = resampled("accuracy", results, WEIGHTS)
    return select(
        records, range(seeds), {record["id"]: own for record, *own in zip(records, halves, scores, strict=True)}
    )


def studies(world: World, seeds: int) -> list[Selection]:
    generator = np.random.default_rng(seeds)
    return [study(world, generator, seeds) for _ in range(STUDIES)]


#: A rate of 5 % is exceeded by this much once in a thousand times.
SLACK = 3.1 * (ERROR_RATE * (1 - ERROR_RATE) / STUDIES) ** 0.5


@pytest.mark.parametrize(
    ("world", "seeds"),
    [
        (World(over_seeds=0.2), 3),
        # The most that seeds which choose for each other depend on each other: many seeds, and no noise of rows.
        (World(over_seeds=0.2, exact=True), 10),
        pytest.param(World(over_seeds=0.1, shared=0.6, by_level=0.2), 5, marks=pytest.mark.long),
        pytest.param(World(over_seeds=0.0), 5, marks=pytest.mark.long),
        pytest.param(World(over_seeds=0.2), 2, marks=pytest.mark.long),
    ],
)
def test_without_an_effect_little_is_found_and_the_naive_gain_is_optimistic(world: World, seeds: int):
    found = studies(world, seeds)
    assert all(selection.is_cross_fitted for selection in found)
    outcomes = [selection.comparison.outcome for selection in found]
    assert np.mean([outcome == "better" for outcome in outcomes]) <= ERROR_RATE + SLACK
    missed = [not selection.comparison.low <= 0 <= selection.comparison.high for selection in found]
    assert np.mean(missed) <= ERROR_RATE + SLACK
    # Of all levels together, which is what Holm's procedure promises.
    wrong = [any(one.outcome != "no difference shown" for one in selection.comparisons.values()) for selection in found]
    assert np.mean(wrong) <= ERROR_RATE + SLACK
    assert np.mean(["I" in selection.phases.values() for selection in found]) <= np.mean(wrong)
    fitted, naive = (
        np.asarray([np.mean([*gains.values()]) for gains in (getattr(each, name) for each in found)])
        for name in ("gains", "naive_gains")
    )
    # The best of five levels seems to gain; on rows and seeds that did not choose it gains nothing.
    error = fitted.std() / np.sqrt(STUDIES)
    assert abs(fitted.mean()) < 3.3 * error
    assert naive.mean() > 5 * error


@pytest.mark.parametrize("seeds", [3, 5])
def test_an_effect_at_one_level_is_covered_and_found(seeds: int):
    world = World(effect=0.4)
    truth, found = world.truth(), studies(world, seeds)
    covered, wide = [], []
    for selection in found:
        comparison = selection.comparison
        # What the choice gains in truth: how often it took which level.
        expected = float(np.mean(selection.choice_shares @ truth))
        covered.append(comparison.low <= expected <= comparison.high)
        wide.append(comparison.high - comparison.low)
    assert np.mean(covered) >= 1 - ERROR_RATE - SLACK
    assert np.mean([selection.super_level.sparsity == pytest.approx(0.2) for selection in found]) > 0.9
    if seeds == 5:
        assert np.mean([selection.comparison.outcome == "better" for selection in found]) > 0.5
        assert np.mean([selection.phases.get(0.2) == "I" for selection in found]) > 0.3


def test_a_split_of_its_own_that_reports_chooses_nothing():
    generator = np.random.default_rng(5)
    gains, naive = [], []
    for _ in range(STUDIES):
        chooses, reports = (World().answers(generator, 3, ROWS).mean(axis=2) for _ in range(2))
        records = [
            {
                "kind": "winning" if level else "full", "sparsity": 0.1 * level, "seed": seed, "heads_pruned": 0,
                "ffns_pruned": 0, "weights_remaining": 1.0, "weights_remaining_encoder": 1.0,
                "score": float(chooses[seed, level]), "report_score": float(reports[seed, level]),
            }
            for seed, level in np.ndindex(3, 1 + LEVELS)
        ]  # fmt: skip
        selection = select(records, range(3))
        assert selection.is_cross_fitted
        gains.append(np.mean([*selection.gains.values()]))
        naive.append(np.mean([level.spread.mean for level in selection.levels if level is selection.super_level]))
    assert abs(np.mean(gains)) < 3.3 * np.std(gains) / np.sqrt(STUDIES)


def rates(world: World, seeds: int, number: int) -> dict[str, float]:
    """Percentages and points of many studies, for bench/results/README.md: run this file as a module."""
    generator, truth = np.random.default_rng(seeds), world.truth()
    found = [study(world, generator, seeds) for _ in range(number)]
    judged = [(selection.comparison, float(np.mean(selection.choice_shares @ truth))) for selection in found]
    shown = [[one.outcome != "no difference shown" for one in each.comparisons.values()] for each in found]
    return {
        "covered": 100 * float(np.mean([one.low <= true <= one.high for one, true in judged])),
        "better": 100 * float(np.mean([one.outcome == "better" for one, _ in judged])),
        "holm": 100 * float(np.mean([any(each) for each in shown])),
        "naive": 100 * float(np.mean([np.mean([*each.naive_gains.values()]) for each in found])),
        "fitted": 100 * float(np.mean([np.mean([*each.gains.values()]) for each in found])),
        "true": 100 * float(np.mean([true for _, true in judged])),
    }


if __name__ == "__main__":
    for world, seeds in (
        *((World(over_seeds=spread), seeds) for spread, seeds in ((0.05, 3), (0.2, 3), (0.2, 2), (0.0, 5), (0.2, 10))),
        *((World(over_seeds=0.2, exact=True), seeds) for seeds in (3, 10, 20)),
        *((World(over_seeds=0.1, shared=0.6, by_level=0.2), seeds) for seeds in (3, 10)),
        *((World(effect=0.4), seeds) for seeds in (3, 5)),
        *((World(effect=0.1, over_seeds=0.1), seeds) for seeds in (5, 10)),
    ):
        print(world, seeds, {name: round(value, 2) for name, value in rates(world, seeds, 1_000).items()})
