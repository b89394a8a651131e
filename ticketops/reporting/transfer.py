"""The report of domain transfer and of low data: super ticket against full model on growing shares of the rows."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ticketops.files import write_atomically
from ticketops.reporting import task_plots
from ticketops.reporting.parts import figure, missing, reproduction
from ticketops.reporting.tables import csv_text, markdown, points
from ticketops.searching.selection import Spread, select
from ticketops.searching.store import Record, Store
from ticketops.searching.transfer_plan import SCORES, SOURCE

COLUMNS = (
    "id",
    "ladder",
    "task",
    "fraction",
    "train_rows",
    "kind",
    "sparsity",
    "seed",
    "heads_pruned",
    "ffns_pruned",
    "weights_remaining",
    "epochs",
    "steps",
    "metric",
    "score",
    "report_score",
    "train_loss",
)


@dataclass
class Rung:
    """One share of a ladder's rows.

    Attributes:
        ladder: "target" or "source".
        fraction: of the training rows.
        rows: how many these are.
        sparsity: of the super ticket here; None where there is none yet.
        full: seed -> the full model's score.
        super: seed -> the super ticket's.
    """

    ladder: str
    fraction: float
    rows: int
    sparsity: float | None = None
    full: dict[int, float] = field(default_factory=dict)
    super: dict[int, float] = field(default_factory=dict)

    @property
    def gain(self) -> Spread:
        """The super ticket's score minus the full model's, seed by seed."""
        return Spread.of(score - self.full[seed] for seed, score in self.super.items() if seed in self.full)


def lines(store: Store) -> list[str]:
    """Writes a transfer's CSV file and figure, and the text of its report.

    Args:
        store: of the run, finished or not.

    Returns:
        The report's lines of Markdown.

    Raises:
        StoreError: one of its files is damaged, or the folder cannot be written.
    """
    config, records, notes = store.config, store.records(), store.description["notes"]
    names = {role: described.partition(":")[0] for role, described in notes["tasks"].items()}
    inner = Store.read(store.folder / SOURCE).records() if (store.folder / SOURCE / "config.json").is_file() else []
    text = [f"# Transfer of {config.model} from {names['source']} to {names['target']}", ""]
    text += missing(store, records)
    write_atomically(store.folder / "results.csv", _results(records))
    rungs = ladder(store)
    if rungs:
        for role in ("target", "source"):
            text += headline(role, names[role], rungs)
        split = "report" if config.report_fraction else "validation"
        panels = {}
        for role in ("target", "source"):
            own = [rung for rung in rungs if rung.ladder == role]
            if own:
                metric, majority = _measure(store, records, role)
                title = (
                    f"Target {names[role]}, from {names['source']}"
                    if role == "target"
                    else f"Source {names[role]} alone"
                )
                found = {rung.rows: (Spread.of(rung.full.values()), Spread.of(rung.super.values())) for rung in own}
                panels[title] = (metric, found, majority)
        figure(store.folder / "ladder.png", task_plots.ladders, panels, split)
        text += ["![score against training rows](ladder.png)", "", markdown(overview(store)), ""]
        text += [
            "Scores are x 100, mean ± standard deviation over seeds, which draw the rows too; a larger share contains "
            "a smaller one's rows. Target: both start from their own fine-tuned source model, and the super ticket "
            "is the source's. Source: from the pre-trained weights, with tickets found in the share itself; the best "
            "level on `validation` is taken, which flatters the super ticket where several compete.",
            "",
        ]
        head = {"keep": "keeps the source's task head", "fresh": "starts with a fresh task head"}[config.head]
        text += [f"The target {head}. Each trial takes {config.min_steps} optimizer steps at least.", ""]
    text += ["## Tasks", "", *(f"- {role}: {described}" for role, described in notes["tasks"].items()), ""]
    return [*text, *reproduction(store, [*inner, *records])]


def overview(store: Store) -> list[list[str]]:
    """One row a rung of each ladder.

    Args:
        store: of the run.

    Returns:
        Rows of cells, header first.
    """
    rows = [["ladder", "rows (%)", "rows", "seeds", "full model", "super ticket", "gain", "its sparsity"]]
    for rung in ladder(store):
        spreads = [points(Spread.of(rung.full.values())), points(Spread.of(rung.super.values()))]
        level = "–" if rung.sparsity is None else f"{rung.sparsity:g}"
        share = f"{100 * rung.fraction:g}"
        rows.append(
            [rung.ladder, share, str(rung.rows), str(len(rung.full)), *spreads, points(rung.gain, sign=True), level]
        )
    return rows


def ladder(store: Store) -> list[Rung]:
    """The rungs of both ladders, on the split that reports.

    Args:
        store: of the run.

    Returns:
        The target's rungs, then the source's, by growing share.
    """
    config, held_out = store.config, bool(store.config.report_fraction)
    groups: dict[tuple[str, float], list[Record]] = {}
    for record in store.records():
        groups.setdefault((record["ladder"], record["fraction"]), []).append(record)
    rungs = []
    for (role, fraction), group in groups.items():
        selection = select(group, config.seeds)
        rung = Rung(role, fraction, max(record["train_rows"] for record in group))
        for name, level in (("full", selection.full), ("super", selection.super_level)):
            if level is not None:
                getattr(rung, name).update(level.report_scores if held_out else level.scores)
        rung.sparsity = None if selection.super_level is None else selection.super_level.sparsity
        rungs.append(rung)
    whole = store.facts(SCORES)
    if config.source_ladder and 1.0 in config.fractions and whole is not None:
        rung = Rung("source", 1.0, whole["train_rows"], whole["sparsity"])
        for name, kind in (("full", "full"), ("super", "winning")):
            pairs = {int(seed): pair[held_out] for seed, pair in whole["scores"].get(kind, {}).items()}
            getattr(rung, name).update({seed: score for seed, score in pairs.items() if score is not None})
        rungs.append(rung)
    return sorted(rungs, key=lambda rung: (rung.ladder != "target", rung.fraction))


def headline(role: str, name: str, rungs: Sequence[Rung]) -> list[str]:
    """A ladder's finding in one sentence, where there is one yet.

    Args:
        role: "target" or "source".
        name: of the task.
        rungs: of all ladders.
    """
    found = [rung for rung in rungs if rung.ladder == role and rung.gain.count]
    if not found:
        return []
    gains = ", ".join(
        f"{points(rung.gain, sign=True)} with {100 * rung.fraction:g} % ({rung.rows:,} rows)" for rung in found
    )
    return [f"Gain of the super ticket over the full model on the {role} {name}, in points: {gains}.", ""]


def _measure(store: Store, records: Sequence[Record], role: str) -> tuple[str, float]:
    """The metric of a ladder's task, and what one constant answer scores."""
    for record in records:
        if record["ladder"] == role:
            return record["metric"], record["majority"]
    whole = store.facts(SCORES)
    assert whole is not None, "a rung without records is of these scores"
    return whole["metric"], whole["majority"]


def _results(records: Sequence[Record]) -> str:
    """One row a trial."""
    rows = [[*(record[column] for column in COLUMNS), record["timing"]["train_seconds"]] for record in records]
    return csv_text([[*COLUMNS, "train_seconds"], *rows])
