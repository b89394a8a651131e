"""The report of a search: read from its folder, written beside its records."""

import itertools
from pathlib import Path
from typing import Literal

from ticketops.files import write_atomically
from ticketops.reporting import plots, sharing, tables, transfer
from ticketops.reporting.parts import figure, listed, missing, reproduction
from ticketops.searching.selection import Selection, Spread, select
from ticketops.searching.store import Record, Store
from ticketops.tickets import Importance, Ticket, chance_jaccard


def report(folder: str | Path) -> Path:
    """Writes `report.md`, `results.csv` and the figures of a search, a share or a transfer, finished or not.

    Args:
        folder: its output folder.

    Returns:
        The path of `report.md`.

    Raises:
        InputError: there is no such run in the folder.
        StoreError: one of its files is damaged, or the folder cannot be written.
    """
    store = Store.read(folder)
    text = {"search": _search, "share": sharing.lines, "transfer": transfer.lines}[store.kind](store)
    path = store.folder / "report.md"
    write_atomically(path, "\n".join(text) + "\n")
    return path


def overview(folder: str | Path) -> list[list[str]]:
    """The table of a run's report, for a terminal.

    Args:
        folder: its output folder.

    Returns:
        Rows of cells, header first.
    """
    store = Store.read(folder)
    if store.kind == "search":
        return tables.level_rows(select(store.records(), store.config.seeds))
    return {"share": sharing.overview, "transfer": transfer.overview}[store.kind](store)


def _search(store: Store) -> list[str]:
    records = store.records()
    config = store.config
    selection = select(records, config.seeds)
    level = selection.super_level
    tickets = {} if level is None else store.tickets(level.kind, level.sparsity)
    write_atomically(store.folder / "results.csv", tables.results_csv(records))
    text = [f"# Super tickets of {config.model} on {config.task}", ""]
    text += missing(store, records)
    if records:
        split = "report" if config.report_fraction else "validation"
        metric = records[0]["metric"]
        text += [*_summary(selection, metric, split), "", *_splits(store, split), ""]
        figure(store.folder / "phase_transition.png", plots.phase_transition, selection, metric, split)
        text += [f"![{metric} against weights remaining](phase_transition.png)", ""]
        text += [tables.markdown(tables.level_rows(selection)), ""]
        majority = f"{100 * records[0]['majority']:.1f}"
        text += [f"Scores are {metric} x 100, mean ± standard deviation over seeds; ★ marks the super ticket."]
        text += [f"Without learning anything, one constant answer scores {majority} on `validation`.", ""]
        text += _importance(store, records, selection, tickets)
        text += _ticket(store, selection, tickets)
        text += _costs(store, records, selection)
    return [*text, *reproduction(store, records)]


def headline(selection: Selection, metric: str, split: str) -> str:
    """The finding of a search in one sentence, with the gain over the full model and its spread over seeds.

    Args:
        selection: of the search's records.
        metric: its name.
        split: the split that reports, "report" or "validation".
    """
    best, full = selection.super_level, selection.full
    gains = selection.report_gains if split == "report" else selection.gains
    if best is None or full is None or not gains:
        return "No super ticket yet: that takes the full model and a winning ticket of the same seed."
    gain = Spread.of(gains.values())
    theirs, ours = (full.report_spread, best.report_spread) if split == "report" else (full.spread, best.spread)
    scores: Literal["scores", "report_scores"] = "report_scores" if split == "report" else "scores"
    others = (selection.gains_of(level, scores).values() for level in selection.levels if level.kind == "winning")
    verdict = (
        "The super ticket beats the full model"
        if gain.mean > 0
        else "The super ticket equals the full model"
        if gain.mean == 0
        # What is best on the split that selects need not be best on the other.
        else f"The super ticket does not beat the full model on `{split}`"
        if any(Spread.of(other).mean > 0 for other in others)
        else "No winning ticket beats the full model here; the best one, taken as the super ticket, is"
    )
    ffns = f"{best.ffns_pruned} FFNs"
    if best.neurons_pruned:
        ffns += f" and {best.neurons_pruned:,} neurons"
    seeds = f"over {gain.count} seeds" if gain.count > 1 else "with one seed, so without a spread"
    return (
        f"{verdict}: sparsity {best.sparsity:g} ({best.heads_pruned} heads and {ffns} pruned, "
        f"{100 * best.weights_remaining:.1f} % of the weights left) reaches {metric} {tables.points(ours)} against "
        f"{tables.points(theirs)}, a gain of {tables.points(gain, sign=True)} points {seeds}."
    )


def _summary(selection: Selection, metric: str, split: str) -> list[str]:
    text = [headline(selection, metric, split)]
    gains = selection.report_gains if split == "report" else selection.gains
    if len(gains) > 1:
        text.append("Gain by seed: " + ", ".join(f"{seed}: {100 * gain:+.1f}" for seed, gain in gains.items()) + ".")
    if selection.super_level is not None and not selection.complete:
        text.append("No winning level has all its seeds yet, so this choice is provisional.")
    return text


def _splits(store: Store, split: str) -> list[str]:
    name = store.description["notes"].get("validation", "validation")
    if split == "report":
        share = f"{100 * store.config.report_fraction:g} % of the validation rows"
        return [f"The split `validation` ({name}) selects; the split `report`, {share} held out of it, reports."]
    return [
        f"The same split, `validation` ({name}), both selects the super ticket and reports, which flatters the best of "
        "several levels; `--report-fraction 0.5` holds a report split out."
    ]


def _importance(store: Store, records: list[Record], selection: Selection, tickets: dict[int, Ticket]) -> list[str]:
    way = "on_the_fly" if store.config.importance == "on_the_fly" else "pass"
    done = [record["seed"] for record in records if record["kind"] == "full"]
    scored: list[Importance] = [found for seed in done if (found := store.importance(seed, way)) is not None]
    if not scored:
        return []
    level = selection.super_level
    title = f"the super ticket (sparsity {level.sparsity:g})" if level else ""
    figure(store.folder / "importance.png", plots.importance_map, scored, list(tickets.values()), title)
    how = {"pass": "in a clean pass after training", "on_the_fly": "during the last epoch of training"}[way]
    text = [
        "## Importance",
        "",
        "![importance of each head and FFN, and what the super ticket keeps](importance.png)",
        "",
        f"Scored {how}, absolute value per {store.config.granularity}, mean over {len(scored)} seed(s); a layer's "
        "head scores are divided by their l2 norm, FFN scores by that of all FFNs.",
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


def _ticket(store: Store, selection: Selection, tickets: dict[int, Ticket]) -> list[str]:
    level = selection.super_level
    if level is None or not tickets:
        return []
    seed = max(tickets, key=lambda seed: level.scores[seed])
    path = store.ticket_path(
        next(t for t in store.plan if (t.kind, t.sparsity, t.seed) == ("winning", level.sparsity, seed))
    )
    text = ["## The super ticket", "", f"Of the best seed, {seed}: `{path.relative_to(store.folder)}`", ""]
    text += ["```text", str(tickets[seed]), "```", ""]
    if len(tickets) > 1:
        pairs = list(itertools.combinations(tickets.values(), 2))
        overlap = Spread.of(one.jaccard(other) for one, other in pairs).mean
        chance = Spread.of(chance_jaccard(one, other)[0] for one, other in pairs).mean
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
    text += [tables.markdown(tables.cost_rows(record["costs"], found["rows"])), ""]
    if found["rows"]:
        text += [
            "Medians of a few turns of both models in one process, patched, float32, in evaluation mode, on "
            f"{listed(found['machine'])}.",
            "",
        ]
    return text
