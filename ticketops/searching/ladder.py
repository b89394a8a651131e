"""The ladders of a transfer: super ticket against full model on growing shares of the rows; arithmetic over records."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ticketops.searching.plan import SearchConfig, search_plan
from ticketops.searching.selection import select
from ticketops.searching.statistics import Comparison, Spread, compare, differences
from ticketops.searching.store import Record, Store
from ticketops.searching.transfer_plan import SCORES


@dataclass
class Rung:
    """One share of a ladder's rows.

    Attributes:
        ladder: "target" or "source".
        fraction: of the training rows.
        rows: how many these are.
        sparsity: of the super ticket here; None where there is none yet.
        metric: name of the scores' metric.
        split: that the scores are of: "report" where one was held out, else "validation".
        scored: rows of it; 0 where the records are of a version that did not count them.
        constant: what one constant answer scores on it.
        full: seed -> the full model's score.
        super: seed -> the super ticket's.
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

    @property
    def gain(self) -> Spread:
        """The super ticket's score minus the full model's, seed by seed."""
        return Spread.of(differences(self.super, self.full))


def read_ladders(store: Store) -> list[Rung]:
    """The rungs of both ladders, on the split that reports.

    Args:
        store: of the transfer.

    Returns:
        The target's rungs, then the source's, by growing share.
    """
    config = store.config
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in store.records():
        groups.setdefault((record["ladder"], record["fraction"]), []).append(record)
    rungs = []
    for (role, fraction), group in groups.items():
        selection = select(group, config.seeds)
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
        store: of the transfer.
        rungs: as `read_ladders` gives them.
        ladder: "target" or "source".

    Returns:
        Fraction -> comparison, corrected for the number of rungs and, where each rung's ticket is the best of several
        levels, for these.
    """
    own = [rung for rung in rungs if rung.ladder == ladder]
    levels = 1
    if ladder == "source":
        identity = store.description["identity"]
        plan = search_plan(SearchConfig.from_dict(identity["source"]), identity)
        levels = len({trial.sparsity for trial in plan if trial.kind == "winning"})
    steps = [1 / rung.scored for rung in own if rung.scored]
    pairs = {rung.fraction: differences(rung.super, rung.full) for rung in own}
    return compare(pairs, max(steps, default=0.0), tried=len(own) * levels)
