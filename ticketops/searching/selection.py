"""Selects the super ticket's sparsity from the records of a search."""

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ticketops.searching.statistics import Comparison, Spread, compare, differences
from ticketops.text import count, structures


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
    def best_seed(self) -> int:
        """The seed with the best score on the split that selects."""
        return max(self.scores, key=lambda seed: self.scores[seed])

    @property
    def report_spread(self) -> Spread:
        """Over seeds, on the split that reports."""
        return Spread.of(self.report_scores.values())

    def __repr__(self) -> str:
        pruned = structures(self.heads_pruned, self.ffns_pruned, self.neurons_pruned or None)
        left = f"{pruned} pruned, {100 * self.weights_remaining:.1f} % of the weights left"
        scores = f"{self.spread.in_points()} points (x 100) over {count(len(self.scores), 'seed')}"
        return f"<Level: {self.kind} at sparsity {self.sparsity:g}, {left}, {scores}>"


@dataclass(frozen=True)
class Selection:
    """The levels of a search and the super ticket chosen among them.

    Attributes:
        levels: full first, then by kind and sparsity.
        full: the level of the whole model; None while no full trial is finished.
        super_level: the winning level with the best mean (the sparser one of equals); None while there is none.
        complete: True if `super_level` was chosen among levels with all their seeds.
        rows: split -> rows that its scores are of; empty where the records are of a version that did not count them.
        constants: split -> what one constant answer scores.
    """

    levels: list[Level]
    full: Level | None
    super_level: Level | None
    complete: bool
    rows: Mapping[str, int] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)

    @property
    def split(self) -> str:
        """The split that reports: "report" where one was held out, else "validation"."""
        return "report" if any(level.report_scores for level in self.levels) else "validation"

    @property
    def gains(self) -> dict[int, float]:
        """Seed -> super ticket's score minus the full model's, on the split that reports."""
        if self.super_level is None or self.full is None:
            return {}
        ours, theirs = self.scores(self.super_level), self.scores(self.full)
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    @property
    def comparisons(self) -> dict[float, Comparison]:
        """Sparsity -> winning tickets against the full model, on the split that reports, corrected for all levels."""
        theirs = {} if self.full is None else self.scores(self.full)
        winning = [level for level in self.levels if level.kind == "winning"]
        rows = self.rows.get(self.split, 0)
        pairs = {level.sparsity: differences(self.scores(level), theirs) for level in winning}
        return compare(pairs, 1 / rows if rows else 0.0)

    @property
    def comparison(self) -> Comparison | None:
        """The super ticket against the full model; None without a seed that both have.

        It stands among all winning levels, since the best of them was taken: that is corrected for.
        """
        return self.comparisons[self.super_level.sparsity] if self.super_level is not None and self.gains else None

    def scores(self, level: Level) -> dict[int, float]:
        """Seed -> score on the split that reports.

        Args:
            level: one of `levels`.
        """
        return level.report_scores if self.split == "report" else level.scores

    def __repr__(self) -> str:
        best = "no super ticket yet" if self.super_level is None else f"super ticket at {self.super_level.sparsity:g}"
        lines = [f"<Selection: {count(len(self.levels), 'level')}, {best}, scores x 100 on {self.split}"]
        for level in self.levels:
            star = " ★" if level is self.super_level else ""
            scores = Spread.of(self.scores(level).values()).in_points()
            lines.append(f"  {level.kind:<8}{level.sparsity:<8g}{scores}{star}")
        return "\n".join(lines) + ">"


def at_sparsity(selection: Selection, sparsity: float | None) -> Selection:
    """A selection whose super level is another one, which an earlier choice has named.

    Args:
        selection: as `select` makes it.
        sparsity: of the winning level that was chosen; None leaves the choice as it is.

    Returns:
        The selection, as it is where it has no such level.
    """
    found = [level for level in selection.levels if (level.kind, level.sparsity) == ("winning", sparsity)]
    return dataclasses.replace(selection, super_level=found[0]) if found else selection


def select(records: Iterable[Mapping[str, Any]], seeds: Iterable[int]) -> Selection:
    """Groups records into levels and picks the super ticket's level.

    Args:
        records: finished trials of one search.
        seeds: the seeds that a complete level has.

    Returns:
        The levels and the winner. Levels that lack seeds compete only where no level is complete.
    """
    levels: dict[tuple[str, float], Level] = {}
    rows: dict[str, int] = {}
    constants: dict[str, float] = {}
    for record in records:
        rows.update(record.get("rows", {}))
        constants.update(constant_scores(record))
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
    return Selection(ordered, levels.get(("full", 0.0)), best, bool(complete), rows, constants)


def constant_scores(record: Mapping[str, Any]) -> dict[str, float]:
    """What one constant answer scores on each split that a record has scores of.

    Args:
        record: of a search's trial, or of one task of a share's.
    """
    # Versions that did not count them knew it of the validation rows alone.
    found: dict[str, float] = record.get("constant_scores") or dict.fromkeys(
        record.get("scores", ()), record.get("majority", 0.0)
    )
    return found


def compare_arms(records: Iterable[Mapping[str, Any]]) -> dict[str, Comparison]:
    """Compares sharing with tickets with the other arms of a share: task averages, on the split that reports.

    Args:
        records: finished trials of one share.

    Returns:
        Arm -> tickets minus that arm, corrected for the number of arms.
    """
    averages: dict[str, dict[int, float]] = {}
    steps = [0.0]
    for record in records:
        tasks: Sequence[Mapping[str, Any]] = list(record["tasks"].values())
        split = "validation" if any(task["report_score"] is None for task in tasks) else "report"
        score = "score" if split == "validation" else "report_score"
        averages.setdefault(record["kind"], {})[record["seed"]] = statistics.fmean(task[score] for task in tasks)
        if all("rows" in task for task in tasks):
            # One row of one task, whichever moves the average most.
            steps.append(max(1 / task["rows"][split] for task in tasks) / len(tasks))
    ours = averages.pop("tickets", {})
    return compare({arm: differences(ours, theirs) for arm, theirs in averages.items()}, max(steps))
