"""Statistics of scores over seeds: spreads, and paired comparisons corrected for multiple testing.

Sources: Student's t interval of paired differences (scipy.stats.t); Holm's step-down correction, S. Holm, "A simple
sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979); the variance of a
proportion, and that of a correlation of independent numbers, 1 / (n - 1).
"""

import math
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from scipy import stats

from ticketops.text import count

#: Maximum probability that any comparison of a run is called better or worse although there is no difference.
ERROR_RATE = 0.05
#: Number of seeds that most fine-tuning papers use; fewer rarely detect an effect as large as the spread over seeds.
ADVISED_SEEDS = 5

Outcome = Literal["better", "worse", "no difference shown", "no verdict"]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds.

    Attributes:
        mean: mean of the values; NaN if there are none.
        std: sample standard deviation (n - 1 in the denominator); None for fewer than two values.
        count: number of values.
    """

    mean: float
    std: float | None
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """The spread of these values."""
        values = list(values)
        mean = statistics.fmean(values) if values else math.nan
        return cls(mean, statistics.stdev(values) if len(values) > 1 else None, len(values))

    def in_points(self, sign: bool = False) -> str:
        """Formats mean and, with several values, standard deviation in points, i.e. times 100: "83.8 ± 0.4".

        Args:
            sign: True to write a plus before positive means.
        """
        if not self.count:
            return "–"
        mean = f"{100 * self.mean:{'+' if sign else ''}.1f}"
        return mean if self.std is None else f"{mean} ± {100 * self.std:.1f}"

    def __repr__(self) -> str:
        return f"<Spread: {self.in_points()} points (x 100) over {count(self.count, 'seed')}>"


@dataclass(frozen=True)
class Comparison:
    """A comparison of two sets of scores, paired by seed.

    Attributes:
        difference: spread of the differences over seeds.
        low, high: bounds of the confidence interval of the mean difference, corrected for multiple testing; None for
            fewer than two seeds.
        outcome: "better" or "worse" if the interval excludes 0, else "no difference shown"; "no verdict" for fewer than
            two seeds.
        tried: number of comparisons that the interval is corrected for.
    """

    difference: Spread
    low: float | None
    high: float | None
    outcome: Outcome
    tried: int

    def __repr__(self) -> str:
        text = f"{self.difference.in_points(sign=True)} points (x 100) over {count(self.difference.count, 'seed')}"
        if self.low is not None and self.high is not None:
            text += f", 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f}"
        return f"<Comparison: {self.outcome}, {text}, corrected for {count(self.tried, 'comparison')}>"


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Differences of two sets of scores, paired by seed.

    Args:
        ours, theirs: seed -> score.

    Returns:
        `ours` minus `theirs` for each seed that both have.
    """
    return [score - theirs[seed] for seed, score in ours.items() if seed in theirs]


def compare(pairs: Mapping[Name, Collection[float]], resolution: float = 0.0, tried: int = 0) -> dict[Name, Comparison]:
    """Tests which of several paired comparisons show a difference.

    Each comparison is a two-sided t test of the mean difference against 0. Holm's procedure keeps the probability of
    any false "better" or "worse" among all of them at `ERROR_RATE`. With few rows all seeds may have exactly the same
    difference; so that this is not taken for certainty, the standard deviation is at least one row's share of a score.

    Args:
        pairs: name of each comparison -> its differences, one per seed.
        resolution: change of a score by one row of the split; if it is 0 (unknown), differences without a spread show
            nothing.
        tried: number of comparisons made, if it exceeds the number of `pairs`.

    Returns:
        The comparisons by name.
    """
    tried = max(tried, len(pairs))
    spreads = {name: Spread.of(values) for name, values in pairs.items()}
    errors, p_values = {}, {}
    for name, spread in spreads.items():
        deviation = max(spread.std or 0.0, resolution)
        # A smaller deviation is rounding error of equal differences.
        if spread.std is None or deviation < 1e-12:
            continue
        errors[name] = deviation / math.sqrt(spread.count)
        p_values[name] = 2 * float(stats.t.sf(abs(spread.mean) / errors[name], spread.count - 1))
    found: dict[Name, Comparison] = {}
    level, going = ERROR_RATE / max(tried, 1), True
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        # After the first comparison that is not significant, Holm's procedure stops: the level stays.
        if going:
            level = ERROR_RATE / (tried - rank)
            going = p_values[name] < level
        spread = spreads[name]
        reach = errors[name] * float(stats.t.ppf(1 - level / 2, spread.count - 1))
        outcome: Outcome = "no difference shown" if not going else "better" if spread.mean > 0 else "worse"
        found[name] = Comparison(spread, spread.mean - reach, spread.mean + reach, outcome, tried)
    for name, spread in spreads.items():
        if name not in found:
            ends = None if spread.std is None else spread.mean
            outcome = "no verdict" if spread.std is None else "no difference shown"
            found[name] = Comparison(spread, ends, ends, outcome, tried)
    return {name: found[name] for name in pairs}


def is_like_a_constant(scores: Iterable[float], constant: float, rows: int) -> bool:
    """True if a model's mean score is at most two standard errors above the score of one constant answer.

    Args:
        scores: the model's scores, one per seed.
        constant: score of one constant answer, in [0, 1]; 0 for correlations.
        rows: number of rows scored; 0 if unknown, and the standard error is then taken as 0.
    """
    variance = constant * (1 - constant) or 1.0
    error = math.sqrt(variance / max(rows - 1, 1)) if rows else 0.0
    return Spread.of(scores).mean <= constant + 2 * error
