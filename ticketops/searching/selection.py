"""Selects the super ticket's sparsity from the records of a search, and says what that choice gains."""

import dataclasses
import functools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ticketops.searching.resampling import HALVINGS, can_resample, halves_of, resampled
from ticketops.searching.statistics import (
    Comparison,
    Spread,
    choice_inflation,
    compare,
    cross_fit,
    differences,
    is_like_a_constant,
    row_error_of,
    row_weights,
)
from ticketops.searching.store import Record, Store
from ticketops.text import count, structures

#: Scores of the halves of rows, and of a bootstrap's choices of rows.
Resampled = tuple[np.ndarray, np.ndarray]


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
        halves: seed -> scores of both halves of the rows that select, for each random split into halves, [splits, 2].
        resampled: seed -> scores of the bootstrap's choices of the rows that report.
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
    halves: dict[int, np.ndarray] = field(default_factory=dict, compare=False)
    resampled: dict[int, np.ndarray] = field(default_factory=dict, compare=False)

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
        """Seed -> what the choice of a level gains over the full model, on the split that reports.

        Where there are scores of halves, or a split of its own that reports, each seed's gain is of the level that the
        other seeds chose, on rows that did not choose. Otherwise it is that of the super ticket's level.
        """
        return self._choice.gains

    @property
    def naive_gains(self) -> dict[int, float]:
        """Seed -> super ticket's score minus the full model's, by the rows and seeds that chose its level."""
        if self.super_level is None or self.full is None:
            return {}
        ours, theirs = self.scores(self.super_level), self.scores(self.full)
        return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}

    @property
    def is_cross_fitted(self) -> bool:
        """True if `gains` carry no selection: rows that did not choose, and with several seeds other seeds, too."""
        return self._choice.shares is not None

    @property
    def choice_shares(self) -> np.ndarray | None:
        """How often the cross-fitted choice took each complete winning level for each seed, [seeds, levels]."""
        return self._choice.shares

    @property
    def comparison(self) -> Comparison | None:
        """The choice of a level against the full model; None without a seed that both have.

        A gain that is not cross-fitted is that of the best of several levels, and is corrected for all of them.
        """
        choice = self._choice
        if not choice.gains or self.super_level is None:
            return None
        if choice.shares is None:
            return self.comparisons[self.super_level.sparsity]
        errors = {} if choice.row_error is None else {"choice": choice.row_error}
        gains = list(choice.gains.values())
        return compare({"choice": gains}, self._resolution, row_errors=errors, inflation=choice.inflation)["choice"]

    @functools.cached_property
    def comparisons(self) -> dict[float, Comparison]:
        """Sparsity -> winning tickets against the full model, on the split that reports, corrected for all levels."""
        return self._against({level.sparsity: self.full for level in self._winning})

    @functools.cached_property
    def controlled(self) -> dict[float, Comparison]:
        """Sparsity -> winning tickets against random ones of the same counts, corrected for all of these levels."""
        random = {level.sparsity: level for level in self.levels if level.kind == "random"}
        return self._against({level.sparsity: random.get(level.sparsity) for level in self._winning})

    @functools.cached_property
    def phases(self) -> dict[float, str]:
        """Sparsity of winning tickets -> "I", "II" or "III", for levels whose intervals allow to call one.

        I: better than the full model. II: worse than the full model, better than random tickets of the same counts.
        III: worse than the full model, and worse than random tickets or not shown to beat one constant answer.

        Source: arXiv 2105.12002, section 4.
        """
        found = {}
        constant, rows = self.constants.get(self.split, 0.0), self.rows.get(self.split, 0)
        controlled = self.controlled
        for level in self._winning:
            against_full = self.comparisons[level.sparsity].outcome
            against_random = controlled[level.sparsity].outcome if level.sparsity in controlled else None
            if against_full == "better":
                found[level.sparsity] = "I"
            elif against_full == "worse" and against_random == "better":
                found[level.sparsity] = "II"
            elif against_full == "worse" and (
                against_random == "worse" or is_like_a_constant(self.scores(level).values(), constant, rows)
            ):
                found[level.sparsity] = "III"
        return found

    @property
    def _winning(self) -> list[Level]:
        return [level for level in self.levels if level.kind == "winning"]

    @property
    def _resolution(self) -> float:
        """Change of a score by one row of the split that reports."""
        rows = self.rows.get(self.split, 0)
        return 1 / rows if rows else 0.0

    def _against(self, others: Mapping[float, Level | None]) -> dict[float, Comparison]:
        """Compares winning levels, each with another level."""
        pairs, errors = {}, {}
        for level in self._winning:
            other = others[level.sparsity]
            if other is None:
                continue
            pairs[level.sparsity] = differences(self.scores(level), self.scores(other))
            error = self.row_error(level, other)
            if error is not None:
                errors[level.sparsity] = error
        return compare(pairs, self._resolution, row_errors=errors)

    @functools.cached_property
    def _choice(self) -> "_Choice":
        complete = [level for level in self._winning if self.full and set(self.full.scores) <= set(level.scores)]
        if self.full is None or not any(level is self.super_level for level in complete):
            return _Choice(self.naive_gains)
        seeds, levels = list(self.full.scores), [self.full, *complete]
        held_out = self.split == "report"
        if any(seed not in (level.report_scores if held_out else level.halves) for level in levels for seed in seeds):
            return _Choice(self.naive_gains)
        if held_out:
            choosing, reporting = (
                np.asarray([[[scores[seed]] for scores in of_levels] for seed in seeds])
                for of_levels in zip(*((level.scores, level.report_scores) for level in levels), strict=True)
            )
        else:
            halves = np.asarray([[level.halves[seed] for level in levels] for seed in seeds])
            # Each half chooses once, for the other one.
            choosing = np.concatenate([halves[..., 0], halves[..., 1]], axis=2)
            reporting = np.concatenate([halves[..., 1], halves[..., 0]], axis=2)
        choice = cross_fit(choosing[:, 1:], reporting[:, 1:], reporting[:, 0])
        scores = np.asarray([[self.scores(level)[seed] for level in levels] for seed in seeds])
        gains, row_error, over_rows = dict(zip(seeds, choice.gains.tolist(), strict=True)), None, None
        if all(seed in level.resampled for level in levels for seed in seeds):
            samples = np.asarray([[level.resampled[seed] for level in levels] for seed in seeds])
            over_rows = samples[:, 1:] - samples[:, :1]
            row_error = row_error_of((choice.shares[..., None] * over_rows).sum(axis=1))
        inflation = choice_inflation(scores[:, 1:] - scores[:, :1], over_rows)
        return _Choice(gains, choice.shares, row_error, inflation)

    def row_error(self, ours: Level, theirs: Level) -> float | None:
        """Standard error over the choice of rows of the mean difference of two levels; None where it is not known.

        Args:
            ours, theirs: of `levels`.
        """
        seeds = [seed for seed in self.scores(ours) if seed in self.scores(theirs)]
        return _row_error([ours.resampled.get(seed) for seed in seeds], [theirs.resampled.get(seed) for seed in seeds])

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


@dataclass(frozen=True, eq=False)
class _Choice:
    """What the choice of a level gains.

    Attributes:
        gains: seed -> gain over the full model.
        shares: how often which level was chosen, as `statistics.cross_fit` returns it; None if not cross-fitted.
        row_error: standard error of the mean gain over the choice of rows; None if not known.
        inflation: factor of the gain's standard errors, see `statistics.choice_inflation`.
    """

    gains: dict[int, float]
    shares: np.ndarray | None = None
    row_error: float | None = None
    inflation: float = 1.0


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


def select(
    records: Iterable[Record], seeds: Iterable[int], resampled: Mapping[str, Resampled] | None = None
) -> Selection:
    """Groups records into levels and picks the super ticket's level.

    Args:
        records: finished trials of one search.
        seeds: the seeds that a complete level has.
        resampled: id of a trial -> its scores on parts of the rows that report, as `resampled_scores` returns them.

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
        level, seed = levels.setdefault(key, Level(**found)), record["seed"]
        level.scores[seed] = record["score"]
        if record["report_score"] is not None:
            level.report_scores[seed] = record["report_score"]
        if resampled and record.get("id") in resampled:
            level.halves[seed], level.resampled[seed] = resampled[record["id"]]
        elif "halves" in record:
            level.halves[seed] = np.asarray(record["halves"])
    order = ("full", "winning", "random", "losing")
    ordered = sorted(levels.values(), key=lambda level: (order.index(level.kind), level.sparsity))
    winning = [level for level in ordered if level.kind == "winning"]
    complete = [level for level in winning if set(seeds) <= set(level.scores)]
    best = max(complete or winning, key=lambda level: (level.spread.mean, level.sparsity), default=None)
    return Selection(ordered, levels.get(("full", 0.0)), best, bool(complete), rows, constants)


def read_selection(store: Store, records: Sequence[Record] | None = None) -> Selection:
    """Reads the levels of a search, with what intervals over rows are computed from.

    Args:
        store: of the search.
        records: its records, if they have been read already.

    Raises:
        StoreError: a file is damaged.
    """
    records = store.records() if records is None else records
    # Losing tickets have no intervals.
    compared = [record for record in records if record["kind"] != "losing"]
    return select(records, store.config.seeds, resampled_scores(store, compared))


def resampled_scores(store: Store, records: Sequence[Record], task: str = "") -> dict[str, Resampled]:
    """Scores the models of trials on parts of the rows that report.

    Args:
        store: of the trials.
        records: of the trials.
        task: name of one task of a share.

    Returns:
        Id of a trial -> scores of both halves of each random split into halves, [HALVINGS, 2], and of the rows that
        each replicate of the bootstrap draws, [REPLICATES]. Trials that lack what each row contributes are left out.
    """
    own = {record["id"]: record["tasks"][task] if task else record for record in records}
    split = "validation" if any(each["report_score"] is None for each in own.values()) else "report"
    by_metric: dict[str, dict[str, np.ndarray]] = {}
    for record in records:
        results = store.row_results(record, f"{task}.{split}" if task else split)
        metric = own[record["id"]]["metric"]
        if results is not None and can_resample(metric, results):
            by_metric.setdefault(metric, {})[record["id"]] = results
    found: dict[str, Resampled] = {}
    for metric, models in by_metric.items():
        rows = len(next(iter(models.values())))
        scores = resampled(metric, list(models.values()), np.concatenate([halves_of(rows), row_weights(rows)]))
        for name, own_scores in zip(models, scores, strict=True):
            found[name] = own_scores[: 2 * HALVINGS].reshape(-1, 2), own_scores[2 * HALVINGS :]
    return found


def _row_error(ours: Sequence[np.ndarray | None], theirs: Sequence[np.ndarray | None]) -> float | None:
    """Standard error over rows of a mean difference over seeds; None where a seed has no resampled scores."""
    pairs = [(one, other) for one, other in zip(ours, theirs, strict=True) if one is not None and other is not None]
    if not pairs or len(pairs) < len(ours):
        return None
    return row_error_of(np.asarray([one - other for one, other in pairs]))


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


def compare_arms(store: Store, records: Sequence[Record]) -> dict[str, Comparison]:
    """Compares sharing with tickets with the other arms of a share: task averages, on the split that reports.

    Args:
        store: of the share.
        records: finished trials of it.

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
    errors = _arm_errors(store, records, averages)
    pairs = {arm: differences(ours, theirs) for arm, theirs in averages.items()}
    return compare(pairs, max(steps), row_errors=errors)


def _arm_errors(store: Store, records: Sequence[Record], arms: Iterable[str]) -> dict[str, float]:
    """Standard errors over the rows of all tasks, which are drawn independently, of the difference to each arm."""
    ids = {(record["kind"], record["seed"]): record["id"] for record in records}
    tasks = [*records[0]["tasks"]] if records else []
    drawn = {task: {name: own[1] for name, own in resampled_scores(store, records, task).items()} for task in tasks}
    errors = {}
    for arm in arms:
        seeds = [seed for kind, seed in ids if kind == arm and ("tickets", seed) in ids]
        found = [
            _row_error(*([scores.get(ids[kind, seed]) for seed in seeds] for kind in ("tickets", arm)))
            for scores in drawn.values()
        ]
        if None not in found:
            errors[arm] = math.hypot(*found) / len(found)  # type: ignore[arg-type]
    return errors
