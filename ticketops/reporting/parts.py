"""Parts of all reports: unfinished trials, how to reproduce the run, warnings, figures."""

import io
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from ticketops.files import write_atomically
from ticketops.reporting.tables import points
from ticketops.searching.objects import bare, is_object
from ticketops.searching.statistics import Comparison, Spread, is_like_a_constant
from ticketops.searching.store import Record, Store
from ticketops.text import count, fenced, markdown


def missing(store: Store, records: Sequence[Record], searches: Sequence[Store] = ()) -> list[str]:
    """Lists unfinished and failed trials, and differences between the environments of finished ones.

    Args:
        store: store of the run.
        records: records of its finished trials.
        searches: stores of the searches inside the run.

    Returns:
        Lines of Markdown; empty if all trials are finished, in one environment.
    """
    failures = {failure["id"]: failure["error"] for failure in store.failures()}
    done = {record["id"] for record in records}
    known = {*done, *failures}
    absent = [trial.id for trial in store.plan if trial.id not in known]
    for search in searches:
        failures |= {f"{search.folder.name} {failure['id']}": failure["error"] for failure in search.failures()}
    text = []
    if absent:
        text += [f"> **Unfinished:** {len(absent)} of {count(len(store.plan), 'trial')} are missing ({_some(absent)})."]
    if failures:
        reasons = "; ".join(markdown(f"{name}: {error}") for name, error in [*failures.items()][:8])
        text += [f"> **Failed:** {count(len(failures), 'trial')} ({_some([*failures])}). {reasons}."]
    if text:
        text[-1] += " To go on, run the command below again: it tries them again."
    inner = [record for search in searches for record in search.records()]
    text += [f"> **Mixed:** {line}" for line in mixed([*inner, *records])]
    return ["\n>\n".join(text), ""] if text else []


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(markdown, names[:8])) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def mixed(records: Sequence[Record]) -> list[str]:
    """Lists differences between the trials' environments (machines, versions) that can change results.

    Args:
        records: records of the run.

    Returns:
        A sentence for each difference.
    """
    found: dict[str, Counter[str]] = {}
    for environment in (record["environment"] for record in records if "environment" in record):
        names = ("device", "processor", "cpu_capability", "threads")
        machine = {name: environment["machine"].get(name) for name in names}
        # Records of earlier versions are of one process each.
        machine["number of processes"] = environment["machine"].get("processes", 1)
        backends = {f"backend of {op}": name for op, name in environment.get("backends", {}).items()}
        for name, value in {**environment["versions"], **machine, **backends}.items():
            found.setdefault(name, Counter())[str(value)] += 1
    return [
        f"the trials ran with different {name} ("
        + ", ".join(markdown(f"{value}: {count(number, 'trial')}") for value, number in counts.items())
        + "), so a difference between two of them may come from that."
        for name, counts in found.items()
        if len(counts) > 1
    ]


def reproduction(store: Store, records: Sequence[Record]) -> list[str]:
    """Returns the section on reproduction: command, configuration, versions, machine and hashes of the inputs.

    Args:
        store: of the run.
        records: of all trials, those of searches inside the run included.

    Returns:
        Lines of Markdown.
    """
    notes, identity = store.description["notes"], store.description["identity"]
    seconds = sum(sum(record["timing"].values()) for record in records)
    settings = {**store.config.to_dict(), "output": str(store.folder)}
    prints = identity["task_fingerprint"]
    if "source_fingerprint" in identity:
        prints = {"source": identity["source_fingerprint"], "target": prints}
    data = listed(prints) if isinstance(prints, dict) else prints
    return [
        "## How to reproduce",
        "",
        *_command(store),
        "",
        fenced(yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100).rstrip(), "yaml"),
        "",
        f"- versions: {markdown(listed(notes['versions']))}",
        f"- machine: {markdown(listed(notes['machine']))}",
        f"- time: {seconds:,.0f} s in {count(len(records), 'trial')}",
        f"- data, sha256: {markdown(data)}",
        f"- pre-trained weights: sha256 {markdown(identity['model_fingerprint'])}",
    ]


def _command(store: Store) -> list[str]:
    """The command of a run, or its call in Python where objects were given."""
    config = store.config
    values = [each for value in config.to_dict().values() for each in (value if isinstance(value, list) else [value])]
    # An object, or one of a single task, as TASK=NAME.
    parts = [part for value in values for part in (value, str(value).partition("=")[2])]
    objects = [*dict.fromkeys(bare(part) for part in parts if is_object(part))]
    if not objects:
        return [fenced(config.command(), "sh")]
    one = len(objects) == 1
    return [
        f"{', '.join(map(markdown, objects))} {'was an object' if one else 'were objects'} in Python, which no "
        f"folder keeps: give the same {'one' if one else 'ones'} again.",
        "",
        fenced(config.call(), "python"),
    ]


def shown(comparison: Comparison, family: str) -> str:
    """Formats a difference with its interval: "+1.2 ± 0.4 points over 5 seeds (95 % interval over seeds and
    rows +0.3 to +2.1, ...)".

    Args:
        comparison: of scores.
        family: noun in the plural for what it was corrected for, such as "levels".
    """
    difference, low, high = comparison.difference, comparison.low, comparison.high
    text = f"{points(difference, sign=True)} points"
    if low is None or high is None:
        return f"{text} with one seed"
    number = f"over {count(difference.count, 'seed')}"
    if low == high:
        return f"{text} {number}, without a spread to judge it by"
    tried = f", corrected for {comparison.tried} {family}" if comparison.tried > 1 else ""
    interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
    scope = f"over seeds and rows {interval}" if comparison.over_rows else f"{interval} on these rows"
    return f"{text} {number} (95 % interval {scope}{tried})"


def scored_rows(rows: Mapping[str, int]) -> str:
    """Returns a sentence with the number of scored rows.

    Args:
        rows: name of a task or split -> number of scored rows; 0 if the records do not contain it.
    """
    known = [f"{count(number, 'row')} of {name}" for name, number in rows.items() if number]
    return f"Scored on {', '.join(known)}." if known else "How many rows were scored is not in the records."


def warning_of_a_constant(what: str, metric: str, scores: Collection[float], constant: float, rows: int) -> list[str]:
    """Returns a warning if a model is not shown to be better than a constant answer.

    Args:
        what: name of the model, the subject of the sentence.
        metric: name of the metric.
        scores: score of each seed.
        constant: score of a constant answer.
        rows: number of scored rows; 0 if unknown.

    Returns:
        One sentence, or an empty list.
    """
    if not scores or not is_like_a_constant(scores, constant, rows):
        return []
    return [
        f"{what} has not been shown to learn more than a constant answer: its {metric} of "
        f"{points(Spread.of(scores))} is within the noise of the {100 * constant:.1f} of such an answer, so "
        "differences say little here; train longer, or on more rows."
    ]


def quoted(warnings: Iterable[str]) -> list[str]:
    """Formats warnings as lines of Markdown.

    Args:
        warnings: text.
    """
    return [line for warning in warnings for line in (f"> **Warning:** {markdown(warning)}", "")]


def listed(values: dict[str, Any]) -> str:
    """Joins names and values to one line.

    Args:
        values: by name; None is left out.
    """
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def figure(path: Path, draw: Callable[..., Figure], *arguments: Any) -> None:
    """Writes a figure as a PNG file.

    Args:
        path: of the PNG.
        draw: makes the figure.
        arguments: its arguments.
    """
    with plain_names():
        content = png(draw(*arguments))
    write_atomically(path, content)


def plain_names() -> AbstractContextManager[None]:
    """Draws names as they are: matplotlib would parse dollar signs in them as mathematics."""
    return matplotlib.rc_context({"text.parse_math": False})


def drawn(draw: Callable[..., Figure], *arguments: Any) -> Figure:
    """Makes a figure whose texts are shown as they are.

    Args:
        draw: makes the figure.
        arguments: its arguments.
    """
    with plain_names():
        figure = draw(*arguments)
        # Makes the ticks' labels, too.
        figure.draw_without_rendering()
    return figure


def png(figure: Figure, dpi: int = 150) -> bytes:
    """Returns a figure as the content of a PNG file.

    Args:
        figure: as `drawn` makes it.
        dpi: pixels per inch.
    """
    image = io.BytesIO()
    # The layout alone cuts off titles above square axes with slanted labels; a tight box does not.
    figure.savefig(image, format="png", dpi=dpi, bbox_inches="tight")
    return image.getvalue()
