"""The ladders of a transfer, computed from its records: super ticket against full model on growing shares of rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ticketops.searching.plan import SearchConfig, search_plan
from ticketops.searching.selection import resampled_scores, select
from ticketops.searching.statistics import Comparison, Spread, compare, differences
from ticketops.searching.store import Record, Store
from ticketops.searching.transfer_plan import SCORES


@dataclass
class Rung:
    """Scores of the full model and the super ticket for one share of the training rows.

    Attributes:
        ladder: "target" or "source".
        fraction: share of the training rows.
        rows: number of these rows.
        sparsity: sparsity of the super ticket; None if there is none yet.
        metric: name of the metric.
        split: split of the scores: "report" if one was held out, else "validation".
        scored: number of rows of that split; 0 for records of earlier versions, which do not count them.
        constant: score of one constant answer on that split.
        full: seed -> score of the full model.
        super: seed -> score of the super ticket.
        row_error: standard error of the mean gain over the choice of rows; None where it is not known.
    """

    ladder: str
    fraction: float
    rows: int
    sparsity: float | None
    metric: str
    split: str
    scored: int
    constant: float
    full: dict[int, float] = field(default_factory=dict)
    super: dict[int, float] = field(default_factory=dict)
    row_error: float | None = None

    @property
    def gain(self) -> Spread:
        """Spread over seeds of the super ticket's score minus the full model's."""
        return Spread.of(differences(self.super, self.full))


def read_ladders(store: Store) -> list[Rung]:
    """Reads the rungs of both ladders, with scores on the split that reports.

    Args:
        store: store of the transfer.

    Returns:
        The target's rungs, then the source's, each in the order of growing shares.
    """
    config = store.config
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in store.records():
        groups.setdefault((record["ladder"], record["fraction"]), []).append(record)
    rungs = []
    for (role, fraction), group in groups.items():
        selection = select(group, config.seeds, resampled_scores(store, group))
        split, best = selection.split, selection.super_level
        rung = Rung(
            role,
            fraction,
            rows=max(record["train_rows"] for record in group),
            sparsity=None if best is None else best.sparsity,
            metric=group[0]["metric"],
            split=split,
            scored=selection.rows.get(split, 0),
            constant=selection.constants.get(split, 0.0),
        )
        for scores, level in ((rung.full, selection.full), (rung.super, best)):
            scores.update({} if level is None else selection.scores(level))
        if best is not None and selection.full is not None:
            rung.row_error = selection.row_error(best, selection.full)
        rungs.append(rung)
    whole = store.facts(SCORES)
    if config.source_ladder and 1.0 in config.fractions and whole is not None:
        pairs = {kind: whole["scores"].get(kind, {}) for kind in ("full", "winning")}
        held_out = all(pair[1] is not None for by_seed in pairs.values() for pair in by_seed.values())
        split = "report" if held_out else "validation"
        rung = Rung(
            "source",
            1.0,
            rows=whole["train_rows"],
            sparsity=whole["sparsity"],
            metric=whole["metric"],
            split=split,
            scored=whole.get("rows", {}).get(split, 0),
            constant=whole.get("constant_scores", {}).get(split, whole["majority"]),
        )
        for scores, kind in ((rung.full, "full"), (rung.super, "winning")):
            scores.update({int(seed): pair[held_out] for seed, pair in pairs[kind].items()})
        rungs.append(rung)
    return sorted(rungs, key=lambda rung: (rung.ladder != "target", rung.fraction))


def compare_rungs(store: Store, rungs: Sequence[Rung], ladder: str) -> dict[float, Comparison]:
    """Compares the super ticket with the full model on each rung of a ladder.

    Args:
        store: store of the transfer.
        rungs: rungs as `read_ladders` returns them.
        ladder: "target" or "source".

    Returns:
        Fraction -> comparison, corrected for the number of rungs and, on the source's ladder, for the number of
        sparsities among which each rung's ticket is the best.
    """
    own = [rung for rung in rungs if rung.ladder == ladder]
    levels = 1
    if ladder == "source":
        identity = store.description["identity"]
        plan = search_plan(SearchConfig.from_dict(identity["source"]), identity)
        levels = len({trial.sparsity for trial in plan if trial.kind == "winning"})
    steps = [1 / rung.scored for rung in own if rung.scored]
    pairs = {rung.fraction: differences(rung.super, rung.full) for rung in own}
    errors = {rung.fraction: rung.row_error for rung in own if rung.row_error is not None}
    return compare(pairs, max(steps, default=0.0), tried=len(own) * levels, row_errors=errors)
