"""Which sparsity makes the super ticket: arithmetic over records, nothing else."""

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


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
class Level:
    """All trials of one kind at one sparsity.

    Attributes:
        kind: "full", "winning", "random" or "losing".
        sparsity: the level's name, in [0, 1).
        heads_pruned: heads removed.
        ffns_pruned: FFN sublayers removed.
        weights_remaining: fraction of all weights that are left.
        weights_remaining_encoder: fraction of the encoder layers' weights that are left.
        neurons_pruned: neurons removed from the FFNs that are left.
        scores: seed -> metric on the split that selects.
        report_scores: seed -> metric on the split that reports; empty where none was held out.
    """

    kind: str
    sparsity: float
    heads_pruned: int
    ffns_pruned: int
    weights_remaining: float
    weights_remaining_encoder: float
    neurons_pruned: int = 0
    scores: dict[int, float] = field(default_factory=dict)
    report_scores: dict[int, float] = field(default_factory=dict)

    @property
    def spread(self) -> Spread:
        """Over seeds, on the split that selects."""
        return Spread.of(self.scores.values())

    @property
    def report_spread(self) -> Spread:
        """Over seeds, on the split that reports."""
        return Spread.of(self.report_scores.values())


@dataclass(frozen=True)
class Selection:
    """What the finished trials say.

    Attributes:
        levels: full first, then by kind and sparsity.
        full: the level of the whole model; None while no full trial is finished.
        super_level: the winning level with the best mean (the sparser one of equals); None while there is none.
        complete: whether `super_level` was chosen among levels with all their seeds.
    """

    levels: list[Level]
    full: Level | None
    super_level: Level | None
    complete: bool

    @property
    def gains(self) -> dict[int, float]:
        """Seed -> super ticket's score minus the full model's, on the split that selects."""
        return {} if self.super_level is None else self.gains_of(self.super_level)

    @property
    def report_gains(self) -> dict[int, float]:
        """Seed -> super ticket's score minus the full model's, on the split that reports."""
        return {} if self.super_level is None else self.gains_of(self.super_level, "report_scores")

    def gains_of(self, level: Level, scores: Literal["scores", "report_scores"] = "scores") -> dict[int, float]:
        """Seed -> a level's score minus the full model's.

        Args:
            level: one of `levels`.
            scores: of which split, as `Level` names them.
        """
        reference: dict[int, float] = {} if self.full is None else getattr(self.full, scores)
        ours: dict[int, float] = getattr(level, scores)
        return {seed: ours[seed] - reference[seed] for seed in ours if seed in reference}


def select(records: Iterable[Mapping[str, Any]], seeds: Iterable[int]) -> Selection:
    """Groups records into levels and picks the super ticket's level.

    Args:
        records: finished trials of one search.
        seeds: the seeds that a complete level has.

    Returns:
        The levels and the winner. Levels that lack seeds compete only where no level is complete.
    """
    levels: dict[tuple[str, float], Level] = {}
    for record in records:
        key = (record["kind"], record["sparsity"])
        names = ("kind", "sparsity", "heads_pruned", "ffns_pruned", "weights_remaining", "weights_remaining_encoder")
        found = {name: record[name] for name in names} | {"neurons_pruned": record.get("neurons_pruned", 0)}
        level = levels.setdefault(key, Level(**found))
        level.scores[record["seed"]] = record["score"]
        if record["report_score"] is not None:
            level.report_scores[record["seed"]] = record["report_score"]
    order = ("full", "winning", "random", "losing")
    ordered = sorted(levels.values(), key=lambda level: (order.index(level.kind), level.sparsity))
    winning = [level for level in ordered if level.kind == "winning"]
    complete = [level for level in winning if set(seeds) <= set(level.scores)]
    best = max(complete or winning, key=lambda level: (level.spread.mean, level.sparsity), default=None)
    return Selection(ordered, levels.get(("full", 0.0)), best, bool(complete))
