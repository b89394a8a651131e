"""What scores over seeds show: spreads, and paired comparisons corrected for how many were made.

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

#: How often at most a comparison may be called better or worse with nothing to find, over all comparisons of a run.
ERROR_RATE = 0.05
#: What most fine-tuning papers have, and the least that tells effects of about the spread's size.
ADVISED_SEEDS = 5

Outcome = Literal["better", "worse", "no difference shown", "no verdict"]
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation over seeds.

    Attributes:
        mean: of the values; NaN where there is none.
        std: of the values, with n - 1 in the denominator; None for fewer than two of them.
        count: how many values there are.
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


@dataclass(frozen=True)
class Comparison:
    """One of the comparisons that a run makes, seed by seed.

    Attributes:
        difference: of the scores, over seeds.
        low, high: ends of the interval of the mean difference at the level that the correction leaves; None for fewer
            than two seeds.
        outcome: "better" or "worse" where the interval excludes 0, else "no difference shown"; "no verdict" for fewer
            than two seeds.
        tried: number of comparisons that the interval is corrected for.
    """

    difference: Spread
    low: float | None
    high: float | None
    outcome: Outcome
    tried: int


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Differences of two sets of scores, seed by seed.

    Args:
        ours, theirs: seed -> score.

    Returns:
        One difference for each seed that both have.
    """
    return [score - theirs[seed] for seed, score in ours.items() if seed in theirs]


def compare(pairs: Mapping[Name, Collection[float]], resolution: float = 0.0, tried: int = 0) -> dict[Name, Comparison]:
    """Tells which of several paired comparisons show a difference.

    Each is a two-sided t test of the mean difference against 0, and Holm's procedure keeps the chance of any false
    "better" or "worse" among all of them at `ERROR_RATE`. Seeds that agree to the last row would make a spread of 0 of
    any difference, so the standard deviation counts as one row's worth at least.

    Args:
        pairs: name of each comparison -> its differences, one a seed.
        resolution: by how much one row of the scored split changes a score; 0 where that is not known, and then
            differences without a spread show nothing.
        tried: number of comparisons that were made, where that is more than `pairs` has.

    Returns:
        The comparisons by name.
    """
    tried = max(tried, len(pairs))
    spreads = {name: Spread.of(values) for name, values in pairs.items()}
    errors, p_values = {}, {}
    for name, spread in spreads.items():
        deviation = max(spread.std or 0.0, resolution)
        # Differences of equal numbers differ by rounding.
        if spread.std is None or deviation < 1e-12:
            continue
        errors[name] = deviation / math.sqrt(spread.count)
        p_values[name] = 2 * float(stats.t.sf(abs(spread.mean) / errors[name], spread.count - 1))
    found: dict[Name, Comparison] = {}
    level, going = ERROR_RATE / max(tried, 1), True
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        # Where a step fails, all further ones are held to its level.
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
    """Tells whether a model's scores may be those of one constant answer, within two standard errors of its score.

    Args:
        scores: of the model, one a seed.
        constant: what one constant answer scores, a fraction; 0 for correlations.
        rows: that were scored; 0 where that is not known, and then only the mean itself is compared.
    """
    variance = constant * (1 - constant) or 1.0
    error = math.sqrt(variance / max(rows - 1, 1)) if rows else 0.0
    return Spread.of(scores).mean <= constant + 2 * error
