"""The report of domain transfer and of low data: super ticket against full model on growing shares of the rows."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib.figure import Figure

from ticketops.files import write_atomically
from ticketops.reporting import page_figures, task_plots
from ticketops.reporting.page import Figures
from ticketops.reporting.parts import figure, missing, reproduction, scored_rows, shown, warning_of_a_constant
from ticketops.reporting.tables import csv_text, markdown_table, points
from ticketops.searching.ladder import Rung, compare_rungs, read_ladders
from ticketops.searching.statistics import ADVISED_SEEDS, Spread
from ticketops.searching.store import Record, Store
from ticketops.searching.transfer_plan import SOURCE
from ticketops.text import count, markdown

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


def lines(store: Store, records: list[Record], figures: Figures) -> list[str]:
    """Writes a transfer's CSV file and figure, and the text of its report.

    Args:
        store: of the run, finished or not.
        records: of its finished trials.
        figures: file name of a figure -> what draws it for report.html; filled here.

    Returns:
        The report's lines of Markdown.

    Raises:
        StoreError: one of its files is damaged, or the folder cannot be written.
    """
    config, notes = store.config, store.description["notes"]
    searches = [Store.read(store.folder / SOURCE)] if (store.folder / SOURCE / "config.json").exists() else []
    inner = [record for search in searches for record in search.records()]
    title = heading(store)
    text = [f"# {markdown(title)}", "", *missing(store, records, searches)]
    write_atomically(store.folder / "results.csv", csv_text(trial_rows(records)))
    rungs = read_ladders(store)
    if rungs:
        for line in headlines(store):
            text += [markdown(line), ""]
        figure(store.folder / "ladder.png", plot, rungs, names(store), title)
        figures["ladder.png"] = partial(page_figures.ladder, panels(rungs, names(store)))
        text += ["![score against training rows](ladder.png)", "", markdown_table(overview(store)), ""]
        text += [
            "Scores are x 100, mean ± standard deviation over seeds, which draw the rows too; a larger share contains "
            "a smaller one's rows. Target: both start from their own fine-tuned source model, and the super ticket "
            "is the source's. Source: from the pre-trained weights, with tickets found in the share itself; the best "
            "level on `validation` is taken, which flatters the super ticket where several compete.",
            "",
        ]
        head = {"keep": "keeps the source's task head", "fresh": "starts with a fresh task head"}[config.head]
        text += [f"The target {head}. Each trial takes {count(config.min_steps, 'optimizer step')} at least.", ""]
    text += ["## Tasks", "", *(f"- {role}: {markdown(described)}" for role, described in notes["tasks"].items()), ""]
    return [*text, *reproduction(store, [*inner, *records])]


def heading(store: Store) -> str:
    """The title of a transfer's report."""
    # The model may be named by the source's search alone.
    model = store.config.model or store.description["identity"]["source"]["model"]
    return "Transfer of {model} from {source} to {target}".format(model=model, **names(store))


def plot(rungs: Sequence[Rung], names: Mapping[str, str], title: str) -> Figure:
    """Plots the scores of full model and super ticket over the number of training rows, a panel per ladder.

    Args:
        rungs: rungs of both ladders.
        names: role, "target" or "source" -> name of its task.
        title: title of the transfer.
    """
    return task_plots.ladders(panels(rungs, names), title)


def panels(rungs: Sequence[Rung], names: Mapping[str, str]) -> dict[str, task_plots.Panel]:
    """Returns what is drawn of the ladders, by title.

    Args:
        rungs, names: see `plot`.
    """
    found = {}
    for role, name in names.items():
        own = [rung for rung in rungs if rung.ladder == role]
        if own:
            panel = f"Target {name}, from {names['source']}" if role == "target" else f"Source {name} alone"
            found[panel] = task_plots.Panel(
                f"{own[0].metric} on {own[0].split}",
                {rung.rows: list(rung.full.values()) for rung in own},
                {rung.rows: list(rung.super.values()) for rung in own},
                own[0].constant,
                own[0].scored,
            )
    return found


def overview(store: Store) -> list[list[str]]:
    """One row a rung of each ladder.

    Args:
        store: of the run.

    Returns:
        Rows of cells, header first.
    """
    rows = [["ladder", "rows (%)", "rows", "seeds", "full model", "super ticket", "gain", "its sparsity"]]
    for rung in read_ladders(store):
        spreads = [points(Spread.of(rung.full.values())), points(Spread.of(rung.super.values()))]
        level = "–" if rung.sparsity is None else f"{rung.sparsity:g}"
        share = f"{100 * rung.fraction:g}"
        rows.append(
            [rung.ladder, share, str(rung.rows), str(len(rung.full)), *spreads, points(rung.gain, sign=True), level]
        )
    return rows


_VERDICTS = {
    "better": "it beats the full model",
    "worse": "it is worse than the full model",
    "no difference shown": "no difference shown",
    "no verdict": f"no verdict from one seed (--seeds {ADVISED_SEEDS} allows one)",
}


def headlines(store: Store) -> list[str]:
    """The findings of both ladders, one sentence per rung, with warnings about models no better than a constant answer.

    Args:
        store: of the run.

    Returns:
        Lines of text; none where nothing can be compared yet.
    """
    rungs, text = read_ladders(store), []
    for role, name in names(store).items():
        found = {fraction: one for fraction, one in compare_rungs(store, rungs, role).items() if one.difference.count}
        own = [rung for rung in rungs if rung.ladder == role and rung.fraction in found]
        if not own:
            continue
        gains = "; ".join(
            f"with {100 * rung.fraction:g} % ({count(rung.rows, 'row')}) {_VERDICTS[found[rung.fraction].outcome]}, "
            f"{shown(found[rung.fraction], 'comparisons')}"
            for rung in own
        )
        text.append(
            f"The super ticket against the full model on the {role} {name}: {gains}. "
            + scored_rows({f"the split {own[0].split}": own[0].scored})
        )
        for rung in own:
            what = f"On the {role} {name} with {count(rung.rows, 'row')}, the full model"
            text += warning_of_a_constant(what, rung.metric, rung.full.values(), rung.constant, rung.scored)
    return text


def names(store: Store) -> dict[str, str]:
    """Role, "target" or "source" -> name of its task, the target first."""
    tasks = store.description["notes"]["tasks"]
    return {role: tasks[role].partition(":")[0] for role in ("target", "source")}


def trial_rows(records: Sequence[Record]) -> list[list[Any]]:
    """Returns one row per trial of a transfer, header first, for `results.csv` and `to_pandas()`.

    Args:
        records: of its finished trials.
    """
    rows = [[*(record[column] for column in COLUMNS), record["timing"]["train_seconds"]] for record in records]
    return [[*COLUMNS, "train_seconds"], *rows]
