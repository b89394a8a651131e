"""Statistics of scores over seeds and rows: spreads, paired comparisons, and the gain of a choice.

A score varies with the seed of the training and with the rows that it is scored on. An interval must hold both, or it
speaks of these rows alone. The margin over seeds is Student's t of the differences paired by seed. The margin over rows
is of what a bootstrap of the rows moves in all seeds alike; what it moves in each seed by itself is part of the seeds'
spread already. Both are added in quadrature. python_tests/searching/test_simulated_studies.py shows how often
intervals cover.

Sources: Student's t interval of paired differences; B. Efron, "Bootstrap methods: another look at the jackknife",
Annals of Statistics 7 (1979); rows and seeds as crossed random effects, A. B. Owen, "The pigeonhole bootstrap", Annals
of Applied Statistics 1 (2007); the sum of two intervals, G. Y. Zou and A. Donner, "Construction of confidence limits
about effect measures: a general approach", Statistics in Medicine 27 (2008); Holm's step-down correction, S. Holm, "A
simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6 (1979); cross-fitting, V.
Chernozhukov et al., "Double/debiased machine learning", Econometrics Journal 21 (2018); the selection of levels that
may be equal, D. W. K. Andrews and G. Soares, "Inference for parameters defined by moment inequalities using generalized
moment selection", Econometrica 78 (2010); the variance of a proportion, and that of a correlation of independent
numbers, 1 / (n - 1).
"""

import math
import statistics
from collections.abc import Collection, Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
from scipy import special

from ticketops.text import count

#: Maximum probability that any comparison of a run is called better or worse although there is no difference.
ERROR_RATE = 0.05
#: Number of times that a bootstrap draws the rows again; its standard error is then known to about 2 %.
REPLICATES = 1_000
#: Number of simulated choices; the ratio of standard errors is then known to about 2 %.
_CHOICES = 2_000
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
        over_rows: True if the interval is of other rows of the same kind, too; False if it is of these rows alone.
    """

    difference: Spread
    low: float | None
    high: float | None
    outcome: Outcome
    tried: int
    over_rows: bool = False

    def __repr__(self) -> str:
        text = f"{self.difference.in_points(sign=True)} points (x 100) over {count(self.difference.count, 'seed')}"
        if self.low is not None and self.high is not None:
            scope = "over seeds and rows" if self.over_rows else "on these rows"
            text += f", 95 % interval {100 * self.low:+.1f} to {100 * self.high:+.1f} {scope}"
        return f"<Comparison: {self.outcome}, {text}, corrected for {count(self.tried, 'comparison')}>"


def differences(ours: Mapping[int, float], theirs: Mapping[int, float]) -> list[float]:
    """Differences of two sets of scores, paired by seed.

    Args:
        ours, theirs: seed -> score.

    Returns:
        `ours` minus `theirs` for each seed that both have.
    """
    return [score - theirs[seed] for seed, score in ours.items() if seed in theirs]


def compare(
    pairs: Mapping[Name, Collection[float]],
    resolution: float = 0.0,
    tried: int = 0,
    row_errors: Mapping[Name, float] | None = None,
    inflation: float = 1.0,
) -> dict[Name, Comparison]:
    """Tests which of several paired comparisons show a difference.

    Each comparison is a two-sided test of the mean difference against 0. Holm's procedure keeps the probability of any
    false "better" or "worse" among all of them at `ERROR_RATE`. With few rows all seeds may have exactly the same
    difference; so that this is not taken for certainty, the standard deviation is at least one row's share of a score.

    Args:
        pairs: name of each comparison -> its differences, one per seed.
        resolution: change of a score by one row of the split; if it is 0 (unknown), differences without a spread show
            nothing.
        tried: number of comparisons made, if it exceeds the number of `pairs`.
        row_errors: name -> standard error of the mean difference over the choice of rows; where there is none, the
            interval is of these rows alone.
        inflation: factor of all standard errors, for differences that depend on each other.

    Returns:
        The comparisons by name.
    """
    tried = max(tried, len(pairs))
    row_errors = row_errors or {}
    spreads = {name: Spread.of(values) for name, values in pairs.items()}
    margins = {}
    for name, spread in spreads.items():
        deviation = max(spread.std or 0.0, resolution)
        # A smaller deviation is rounding error of equal differences.
        if spread.std is not None and deviation >= 1e-12:
            error = inflation * deviation / math.sqrt(spread.count)
            margins[name] = _Margin(error, spread.count - 1, inflation * row_errors.get(name, 0.0))
    p_values = {name: margin.p_value(spreads[name].mean) for name, margin in margins.items()}
    found: dict[Name, Comparison] = {}
    level, going = ERROR_RATE / max(tried, 1), True
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        # After the first comparison that is not significant, Holm's procedure stops: the level stays.
        if going:
            level = ERROR_RATE / (tried - rank)
            going = p_values[name] < level
        spread, reach = spreads[name], margins[name].at(level)
        outcome: Outcome = "no difference shown" if not going else "better" if spread.mean > 0 else "worse"
        over_rows = name in row_errors
        found[name] = Comparison(spread, spread.mean - reach, spread.mean + reach, outcome, tried, over_rows)
    for name, spread in spreads.items():
        if name not in found:
            ends = None if spread.std is None else spread.mean
            outcome = "no verdict" if spread.std is None else "no difference shown"
            found[name] = Comparison(spread, ends, ends, outcome, tried)
    return {name: found[name] for name in pairs}


@dataclass(frozen=True)
class _Margin:
    """How far an interval reaches.

    Attributes:
        seeds: standard error of the mean over seeds.
        freedom: its degrees of freedom.
        rows: standard error over rows.
    """

    seeds: float
    freedom: int
    rows: float

    def at(self, level: float) -> float:
        """The margin of a two-sided interval that misses at this rate."""
        of_seeds = self.seeds * float(special.stdtrit(self.freedom, 1 - level / 2))
        return math.hypot(of_seeds, self.rows * float(special.ndtri(1 - level / 2)))

    def p_value(self, mean: float) -> float:
        """The rate at which the interval around a mean ends at 0."""
        if not self.rows:
            return 2 * float(special.stdtr(self.freedom, -abs(mean) / self.seeds))
        # Bisection of the level's logarithm. Half a second of a report would go into the import of scipy.optimize.
        low, high = math.log(1e-15), 0.0
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if self.at(math.exp(middle)) > abs(mean) else (low, middle)
        return math.exp(high)


def row_weights(rows: int) -> np.ndarray:
    """Draws the rows again, with replacement, as a bootstrap does; the same for all models.

    Args:
        rows: number of rows.

    Returns:
        How often each replicate has each row, [REPLICATES, rows].
    """
    generator = np.random.default_rng(rows)
    return generator.multinomial(rows, np.full(rows, 1 / rows), REPLICATES).astype(np.float32)


def row_error_of(differences: np.ndarray) -> float:
    """The standard error of a mean difference over seeds that the choice of rows adds to that over seeds.

    Args:
        differences: difference of each seed on the rows of each replicate, [seeds, replicates].

    Returns:
        Root of the mean covariance of two seeds, 0 where it is negative; with one seed, its standard deviation.
    """
    seeds = len(differences)
    own = differences.var(axis=1).sum()
    covariance = (differences.sum(axis=0).var() - own) / (seeds * (seeds - 1)) if seeds > 1 else own
    return math.sqrt(max(float(covariance), 0.0))


@dataclass(frozen=True)
class Choice:
    """What choosing the best of several levels gains, on rows and seeds that did not choose.

    Attributes:
        gains: gain of each seed.
        shares: how often each level was chosen for each seed, [seeds, levels]; rows sum to 1.
    """

    gains: np.ndarray
    shares: np.ndarray


def cross_fit(choosing: np.ndarray, reporting: np.ndarray, baseline: np.ndarray) -> Choice:
    """Chooses a level again and again, each time by other rows and other seeds than the gain is taken from.

    For each seed and each choice of rows the level is chosen that is best on average over the other seeds (with one
    seed: by its own score), the sparser one of equals; its gain over the full model is that of this seed on the rows
    that did not choose. A choice by the same rows and seeds would be rewarded for their noise.

    Args:
        choosing: scores on the rows that choose, [seeds, levels, choices], levels by growing sparsity.
        reporting: scores on the rows that report, of the same shape.
        baseline: scores of the full model on the rows that report, [seeds, choices].

    Returns:
        The mean over all choices of rows, seed by seed.
    """
    seeds, levels, _ = choosing.shape
    scores = choosing.astype(np.float64)
    # Rounded, so that levels with equal scores stay equal.
    others = (scores.sum(axis=0) - scores).round(9) if seeds > 1 else scores
    # The last of equal ones.
    chosen = levels - 1 - others[:, ::-1].argmax(axis=1)
    picked = np.take_along_axis(reporting, chosen[:, None], axis=1)[:, 0]
    shares = (chosen[:, None] == np.arange(levels)[:, None]).mean(axis=2)
    return Choice((picked - baseline).mean(axis=1), shares)


def choice_inflation(differences: np.ndarray, over_rows: np.ndarray | None = None) -> float:
    """How many times larger the standard error of a choice's gain is than that of as many independent gains.

    Each seed chooses for the others, and each half of the rows for the other half, so their gains depend on each other;
    most of all where several levels are equally good. Levels at most two standard errors behind the best one are
    taken to be equal, and the choice among them is simulated with the spread that they have.

    Args:
        differences: each level's difference from the full model, [seeds, levels].
        over_rows: the same on the rows of each replicate, [seeds, levels, replicates]; None if not known.

    Returns:
        The factor, at least 1.
    """
    seeds, levels = differences.shape
    if seeds < 2:
        return 1.0
    # Rows of noise with the covariance of levels, as many as levels: over seeds, and over rows.
    of_seeds = np.asarray(np.linalg.qr((differences - differences.mean(axis=0)) / math.sqrt(seeds - 1), mode="r"))
    of_rows = np.zeros((1, levels))
    if over_rows is not None:
        means = over_rows.mean(axis=0).T
        of_rows = np.asarray(np.linalg.qr((means - means.mean(axis=0)) / math.sqrt(len(means)), mode="r"))
    best = differences.mean(axis=0).argmax()
    behind = (differences[:, [best]] - differences).mean(axis=0)
    errors = [((noise - noise[:, [best]]) ** 2).sum(axis=0) for noise in (of_seeds / math.sqrt(seeds), of_rows)]
    equal = behind <= 2 * np.sqrt(sum(errors))
    if equal.sum() == 1:
        return 1.0
    of_seeds, of_rows = of_seeds[:, equal], of_rows[:, equal]
    generator = np.random.default_rng(seeds)
    # With very many seeds fewer choices do, since each holds more.
    choices = min(_CHOICES, max(_CHOICES // 5, 100 * _CHOICES // seeds))
    drawn = generator.standard_normal((choices, seeds, len(of_seeds))) @ of_seeds
    # A half of the rows has twice the variance of all of them.
    first, second = math.sqrt(2) * generator.standard_normal((2, choices, 1, len(of_rows))) @ of_rows
    gains, shares = np.zeros((choices, seeds)), np.zeros((choices, equal.sum()))
    for choosing, reporting in ((drawn + first, drawn + second), (drawn + second, drawn + first)):
        chosen = (choosing.sum(axis=1, keepdims=True) - choosing).argmax(axis=2)[..., None]
        gains += np.take_along_axis(reporting, chosen, axis=2)[..., 0] / 2
        shares += (chosen == np.arange(equal.sum())).mean(axis=1) / 2
    independent = gains.var(axis=1, ddof=1) / seeds + ((shares @ of_rows.T) ** 2).sum(axis=1)
    variance = (gains.mean(axis=1) ** 2).mean()
    return math.sqrt(max(1.0, variance / independent.mean())) if variance else 1.0


def is_like_a_constant(scores: Iterable[float], constant: float, rows: int) -> bool:
    """True if a model's mean score is at most two standard errors above the score of one constant answer.

    Args:
        scores: the model's scores, one per seed.
        constant: score of one constant answer, in [0, 1]; 0 for correlations.
        rows: number of rows scored; 0 if unknown, and the standard error is then taken as 0.
    """
    # A metric of the user's own may be any number.
    variance = max(constant * (1 - constant), 0.0) or 1.0
    error = math.sqrt(variance / max(rows - 1, 1)) if rows else 0.0
    return Spread.of(scores).mean <= constant + 2 * error
