"""The report of a search."""

from functools import partial
from typing import TYPE_CHECKING

from ticketops.files import write_atomically
from ticketops.reporting import page_figures, plots, tables
from ticketops.reporting.page import Figures
from ticketops.reporting.parts import (
    figure,
    listed,
    missing,
    quoted,
    reproduction,
    scored_rows,
    shown,
    warning_of_a_constant,
)
from ticketops.reporting.tables import points
from ticketops.searching.plan import SearchConfig
from ticketops.searching.resampling import HALVINGS
from ticketops.searching.selection import Level, Selection
from ticketops.searching.statistics import ADVISED_SEEDS, Spread
from ticketops.searching.store import Record, Store
from ticketops.text import code, count, fenced, markdown, structures

if TYPE_CHECKING:
    from ticketops.tickets import Importance, Ticket


def heading(config: SearchConfig) -> str:
    """The title of a search's report."""
    return f"Super tickets of {config.model} on {config.task}"


def lines(
    store: Store, records: list[Record], selection: Selection, tickets: "dict[int, Ticket]", figures: Figures
) -> list[str]:
    """Writes a search's CSV file and figures, and the text of its report.

    Args:
        store: of the search.
        records: of its finished trials.
        selection: of these records.
        tickets: seed -> the super ticket.
        figures: file name of a figure -> what draws it for report.html; filled here.

    Returns:
        The report's lines of Markdown.
    """
    write_atomically(store.folder / "results.csv", tables.csv_text(tables.trial_rows(records)))
    title = heading(store.config)
    text = [f"# {markdown(title)}", ""]
    text += missing(store, records)
    if records:
        split = selection.split
        metric = records[0]["metric"]
        text += [*_summary(selection, metric), "", *_splits(store, selection), *_halved(store, selection), ""]
        figure(store.folder / "phase_transition.png", plots.phase_transition, selection, metric, title)
        figures["phase_transition.png"] = partial(page_figures.phase, selection, metric)
        text += [f"![{markdown(metric)} against weights remaining](phase_transition.png)", ""]
        text += [tables.markdown_table(tables.level_rows(selection)), ""]
        constant = f"{100 * selection.constants.get(split, 0.0):.1f}"
        text += [
            f"Scores are {markdown(metric)} x 100, mean ± standard deviation over seeds; ★ marks the super ticket."
        ]
        text += [f"Without learning anything, one constant answer scores {constant} on `{split}`.", ""]
        text += _importance(store, records, selection, tickets, title, figures)
        text += _ticket(store, selection, tickets)
        text += _costs(store, records, selection)
    return [*text, *reproduction(store, records)]


_VERDICTS = {
    "better": "The super ticket beats the full model",
    "worse": "The super ticket is worse than the full model",
    "no difference shown": "No difference shown between the super ticket and the full model",
    "no verdict": f"No verdict from one seed (--seeds {ADVISED_SEEDS} allows one)",
}


def headline(selection: Selection, metric: str) -> str:
    """The finding of a search: the super ticket against the full model, and beside the controls of its level.

    Args:
        selection: of the search's records.
        metric: its name.
    """
    best, full, comparison = selection.super_level, selection.full, selection.comparison
    if best is None or full is None or comparison is None:
        return "No super ticket yet: that takes the full model and a winning ticket of the same seed."

    def reached(level: Level) -> str:
        return points(Spread.of(selection.scores(level).values()))

    pruned = structures(best.heads_pruned, best.ffns_pruned, best.neurons_pruned or None)
    controls = [
        f"{level.kind} ones {reached(level)}"
        for level in selection.levels
        if level.kind in ("random", "losing") and level.sparsity == best.sparsity
    ]
    found = (
        f"{_VERDICTS[comparison.outcome]}: sparsity {best.sparsity:g} ({pruned} pruned, "
        f"{100 * best.weights_remaining:.1f} % of the weights left) reaches {metric} {reached(best)} against "
        f"{reached(full)}"
    )
    difference = shown(comparison, "levels")
    text = [f"{found}; its choice gains {difference}." if selection.is_cross_fitted else f"{found}, {difference}."]
    text.append(
        f"Of the same size, {' and '.join(controls)}."
        if controls
        else "No random or losing tickets of that level were tried."
    )
    split = f"the split {selection.split}"
    if selection.split == "validation":
        split += ", of which one half chose for the other" if selection.is_cross_fitted else ", which selected too"
    return " ".join([*text, scored_rows({split: selection.rows.get(selection.split, 0)})])


def optimism(selection: Selection) -> str:
    """How far the gain would be overstated by the rows and seeds that chose the super ticket; empty if not known.

    Args:
        selection: of the search's records.
    """
    if not selection.is_cross_fitted:
        return ""
    naive, fitted = (Spread.of(gains.values()).mean for gains in (selection.naive_gains, selection.gains))
    # Rounded, and no negative zero.
    optimism = round(100 * (naive - fitted), 1) + 0.0
    others = "the other seeds chose, " if len(selection.gains) > 1 else "was chosen "
    return (
        f"The gain is that of the level that {others}on rows that did not choose. By the rows and seeds that chose it, "
        f"the super ticket would seem to gain {100 * naive:+.1f} points; {optimism:+.1f} of these are "
        "what choosing the best makes of noise."
    )


def warnings(selection: Selection, metric: str) -> list[str]:
    """Warnings about the finding of a search: models no better than a constant answer, missing seeds.

    Args:
        selection: of the search's records.
        metric: its name.
    """
    text = []
    for what, level in (("The full model", selection.full), ("The super ticket", selection.super_level)):
        if level is not None:
            constant, rows = selection.constants.get(selection.split, 0.0), selection.rows.get(selection.split, 0)
            text += warning_of_a_constant(what, metric, selection.scores(level).values(), constant, rows)
    if selection.super_level is not None and not selection.complete:
        text.append("No winning level has all its seeds yet, so this choice is provisional.")
    return text


def _summary(selection: Selection, metric: str) -> list[str]:
    text = [markdown(headline(selection, metric)), "", *quoted(warnings(selection, metric))]
    gains, explained = selection.gains, optimism(selection)
    text += [explained, ""] if explained else []
    if len(gains) > 1:
        text.append("Gain by seed: " + ", ".join(f"{seed}: {100 * gain:+.1f}" for seed, gain in gains.items()) + ".")
    return text


def _splits(store: Store, selection: Selection) -> list[str]:
    name = markdown(store.description["notes"].get("validation", "validation"))
    if selection.split == "report":
        # Earlier versions knew of report rows held out of the validation rows alone.
        held_out = f"{100 * store.config.report_fraction:g} % of the validation rows, held out"
        source = markdown(store.description["notes"].get("report") or held_out)
        return [f"The split `validation` ({name}) selects; the split `report`, {source}, reports."]
    if selection.is_cross_fitted:
        return [
            f"The scores are of all rows of `validation` ({name}), and select the super ticket; its gain is taken from "
            f"{HALVINGS} random splits of them into halves, each of which chooses for the other one."
        ]
    return [
        f"The same split, `validation` ({name}), both selects the super ticket and reports, which flatters the best of "
        "several levels; `--report-fraction 0.5` holds a report split out."
    ]


def _halved(store: Store, selection: Selection) -> list[str]:
    """What successive halving has left out."""
    if not store.config.halving:
        return []
    seeds = len(store.config.seeds)
    trained = {level.sparsity: len(level.scores) for level in selection.levels if level.kind == "winning"}
    out = [f"{sparsity:g} after {count(own, 'seed')}" for sparsity, own in trained.items() if own < seeds]
    dropped = f"these sparsities dropped out: {', '.join(out)}" if out else "no sparsity has dropped out"
    return ["", f"Successive halving was on, by the scores on `validation`: {dropped}. Means are of these seeds alone."]


def _importance(
    store: Store,
    records: list[Record],
    selection: Selection,
    tickets: "dict[int, Ticket]",
    title: str,
    figures: Figures,
) -> list[str]:
    way = "on_the_fly" if store.config.importance == "on_the_fly" else "pass"
    done = [record["seed"] for record in records if record["kind"] == "full"]
    scored: list[Importance] = [found for seed in done if (found := store.importance(seed, way)) is not None]
    if not scored:
        return []
    level = selection.super_level
    name = f"the super ticket (sparsity {level.sparsity:g})" if level else ""
    figure(store.folder / "importance.png", plots.importance_map, scored, list(tickets.values()), name, title)
    figures["importance.png"] = partial(page_figures.importance, scored, tickets, name)
    how = {"pass": "in a clean pass after training", "on_the_fly": "during the last epoch of training"}[way]
    text = [
        "## Importance",
        "",
        "![importance of each head and FFN, and what the super ticket keeps](importance.png)",
        "",
        f"Scored {how}, absolute value per {store.config.granularity}, mean over {count(len(scored), 'seed')}; a "
        "layer's head scores are divided by their l2 norm, FFN scores by that of all FFNs.",
    ]
    both = [record["rank_correlation"] for record in records if "rank_correlation" in record]
    for name, label in (("head", "heads"), ("ffn", "FFNs")):
        values = [one[name] for one in both if one[name] is not None]
        if values:
            spread = Spread.of(values)
            deviation = "" if spread.std is None else f" ± {spread.std:.3f}"
            text.append(
                f"Rank correlation of the clean pass with on-the-fly scores, {label}: {spread.mean:.3f}{deviation}."
            )
    return [*text, ""]


def _ticket(store: Store, selection: Selection, tickets: "dict[int, Ticket]") -> list[str]:
    level = selection.super_level
    if level is None or not tickets:
        return []
    seed = max(tickets, key=lambda seed: level.scores[seed])
    path = store.ticket_path(
        next(t for t in store.plan if (t.kind, t.sparsity, t.seed) == ("winning", level.sparsity, seed))
    )
    text = ["## The super ticket", "", f"Of the best seed, {seed}: {code(path.relative_to(store.folder))}", ""]
    text += [fenced(str(tickets[seed]), "text"), ""]
    if len(tickets) > 1:
        from ticketops.tickets import mean_jaccard

        overlap, chance = mean_jaccard(list(tickets.values()))
        text += [
            f"The tickets of two seeds share {100 * overlap:.0f} % of what either keeps (mean); random ones of their "
            f"size would share {100 * chance:.0f} %.",
            "",
        ]
    return text


def _costs(store: Store, records: list[Record], selection: Selection) -> list[str]:
    level = selection.super_level
    record = next((r for r in records if level and (r["kind"], r["sparsity"]) == (level.kind, level.sparsity)), {})
    if "costs" not in record:
        return []
    found = store.latencies() or {"rows": []}
    text = ["## What the super ticket costs", ""]
    text += [tables.markdown_table(tables.cost_rows(record["costs"], found["rows"])), ""]
    if found["rows"]:
        text += [
            "Times are medians (and quartiles) of turns that both models take in one process, patched, float32, in "
            "evaluation mode; a ratio is given where its 95 % interval over the turns, corrected for the number of "
            "rows, excludes 1. On "
            f"{markdown(listed(found['machine']))}.",
            "",
        ]
    return text
