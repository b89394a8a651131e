"""Tables of records: CSV with one row per trial, Markdown with one row per level."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ticketops.searching.selection import Selection
from ticketops.searching.statistics import Comparison, Spread, compare
from ticketops.text import cell, markdown

COLUMNS = (
    "id",
    "task",
    "model",
    "kind",
    "sparsity",
    "seed",
    "heads_pruned",
    "ffns_pruned",
    "neurons_pruned",
    "weights_remaining",
    "weights_remaining_encoder",
    "split",
    "metric",
    "score",
    "report_score",
    "train_loss",
    "steps",
)


def trial_rows(records: Iterable[Mapping[str, Any]]) -> list[list[Any]]:
    """Returns one row per trial of a search, header first, for `results.csv` and `to_pandas()`.

    Args:
        records: of one search.

    Returns:
        Values as the records have them. `score` is `metric` on `split` (which selects), `report_score` on the report
        split, None where there is none; then every metric of every split, and the seconds of training.
    """
    records = list(records)
    details = sorted(
        {(split, name) for record in records for split, found in record["scores"].items() for name in found}
    )
    rows: list[list[Any]] = [[*COLUMNS, *(f"{split}_{name}" for split, name in details), "train_seconds"]]
    for record in records:
        scores = [record["scores"].get(split, {}).get(name) for split, name in details]
        rows.append([*(record.get(column) for column in COLUMNS), *scores, record["timing"]["train_seconds"]])
    return rows


def csv_text(rows: Iterable[Iterable[Any]]) -> str:
    """Formats rows of cells as CSV, header first."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([cell(value) for value in row] for row in rows)
    return text.getvalue()


def points(spread: Spread, sign: bool = False) -> str:
    """Formats a mean and, with several seeds, its standard deviation, times 100: `83.8 ± 0.4`."""
    return spread.in_points(sign)


def interval(comparison: Comparison) -> str:
    """Formats the interval of a difference, times 100: `-0.6 to +1.4`; a dash where there is none."""
    if comparison.low is None or comparison.high is None:
        return "–"
    return f"{100 * comparison.low:+.1f} to {100 * comparison.high:+.1f}"


def level_rows(selection: Selection) -> list[list[str]]:
    """Returns one row per level, header first: structures pruned, weights remaining, scores over seeds.

    Args:
        selection: the levels of a search.

    Returns:
        Cells as text; the super ticket's row is marked with a star. With several seeds, winning tickets have the
        interval of their difference to the full model, corrected for all levels, and the phase where that shows one.
    """
    compared = {sparsity: one for sparsity, one in selection.comparisons.items() if one.low is not None}
    phases = selection.phases if compared else {}
    held_out = any(level.report_scores for level in selection.levels)
    neurons = any(level.neurons_pruned for level in selection.levels)
    pruned = ["heads pruned", "FFNs pruned", *(["neurons pruned"] if neurons else [])]
    header = ["ticket", "sparsity", *pruned, "weights left (%)", "encoder's left (%)", "seeds"]
    scored = ["selects", "reports"] if held_out else ["score"]
    rows = [[*header, *scored, *(["to full, 95 %", "phase"] if compared else [])]]
    for level in selection.levels:
        star = " ★" if level is selection.super_level else ""
        scores = [points(level.spread), *([points(level.report_spread)] if held_out else [])]
        weights = [f"{100 * share:.1f}" for share in (level.weights_remaining, level.weights_remaining_encoder)]
        counts = [str(level.heads_pruned), str(level.ffns_pruned), *([str(level.neurons_pruned)] if neurons else [])]
        row = [level.kind + star, f"{level.sparsity:g}", *counts, *weights, str(len(level.scores)), *scores]
        if compared:
            one = compared.get(level.sparsity) if level.kind == "winning" else None
            row += ["", ""] if one is None else [interval(one), phases.get(level.sparsity, "–")]
        rows.append(row)
    return rows


def markdown_table(rows: list[list[str]]) -> str:
    """Formats rows of cells as a Markdown table, header first, numbers aligned right."""
    head, *body = ([markdown(text) for text in row] for row in rows)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cost_rows(costs: Mapping[str, Mapping[str, int]], latencies: Iterable[Mapping[str, Any]]) -> list[list[str]]:
    """Returns a table of a model's cost before and after pruning, header first.

    Args:
        costs: "whole" and "left": the fields of `ticketops.models.Cost`, of the whole model and of what is left.
        latencies: as `ticketops.models.latencies` gives them; may be empty.

    Returns:
        Cells as text, with the share that is left; for latencies the quartiles over the turns and, where the turns show
        a difference, how many times as fast: the interval of the geometric mean of the turns' ratios, corrected for
        the number of batches that were timed.
    """
    whole, left = costs["whole"], costs["left"]
    macs = f"MACs a token of {whole.get('length', 128)}"
    titles = {"parameters": "parameters", "macs_per_token": macs, "bytes": "bytes"}
    rows = [["cost", "whole", "left", ""]]
    rows += [
        [title, f"{whole[key]:,}", f"{left[key]:,}", f"{100 * left[key] / whole[key]:.1f} %"]
        for key, title in titles.items()
    ]
    timed = list(latencies)
    pairs = [[math.log(before / after) for before, after in row.get("turns", ())] for row in timed]
    found = compare(dict(enumerate(pairs)))
    for place, row in enumerate(timed):
        title = f"ms for a batch of {row['batch']} x {row['length']} tokens"
        times = [_time(row[f"{name}_ms"], row.get(f"{name}_quartiles_ms")) for name in ("whole", "left")]
        rows.append([title, *times, _speed(found[place]) if pairs[place] else "not judged: the turns were not kept"])
    return rows


def _time(median: float, quartiles: Sequence[float] | None) -> str:
    """Formats a median and, if known, its quartiles, in milliseconds: `20.1 (19.8 to 20.6)`."""
    digits = 1 if median >= 10 else 2
    spread = f" ({quartiles[0]:.{digits}f} to {quartiles[1]:.{digits}f})" if quartiles else ""
    return f"{median:.{digits}f}{spread}"


def _speed(comparison: Comparison) -> str:
    """Returns the speed-up of the smaller model, if it is significant over the turns."""
    if comparison.low is None or comparison.high is None:
        return "not judged: one turn"
    low, mean, high = (math.exp(value) for value in (comparison.low, comparison.difference.mean, comparison.high))
    if comparison.outcome == "no difference shown":
        return f"no difference shown ({low:.2f}x to {high:.2f}x)"
    return f"{mean:.2f}x as fast ({low:.2f}x to {high:.2f}x)"
