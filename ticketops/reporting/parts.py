"""What the reports of all runs have in common: what is missing, how to reproduce, figures."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ticketops.files import write_atomically
from ticketops.searching.store import Record, Store


def missing(store: Store, records: Sequence[Record]) -> list[str]:
    """Says which trials are not finished.

    Args:
        store: of the run.
        records: of the finished ones.

    Returns:
        Lines of Markdown; none where all are.
    """
    done = {record["id"] for record in records}
    absent = [trial.id for trial in store.plan if trial.id not in done]
    if not absent:
        return []
    names = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    return [
        f"> **Unfinished:** {len(absent)} of {len(store.plan)} trials are missing ({names}). Resume: see below.",
        "",
    ]


def reproduction(store: Store, records: Sequence[Record]) -> list[str]:
    """Says how to make the run again, and what it stood on.

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
        "```sh",
        store.config.command(),
        "```",
        "",
        "```yaml",
        yaml.safe_dump(settings, sort_keys=False, default_flow_style=None, width=100).rstrip(),
        "```",
        "",
        f"- versions: {listed(notes['versions'])}",
        f"- machine: {listed(notes['machine'])}",
        f"- time: {seconds:,.0f} s in {len(records)} trials",
        f"- data, sha256: {data}",
        f"- pre-trained weights: sha256 {identity['model_fingerprint']}",
    ]


def listed(values: dict[str, Any]) -> str:
    """Names and values in one line.

    Args:
        values: by name; None is left out.
    """
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)


def figure(path: Path, draw: Any, *arguments: Any) -> None:
    """Writes a figure.

    Args:
        path: of the PNG.
        draw: writes it into the file that is its last argument.
        arguments: its others.
    """
    image = io.BytesIO()
    draw(*arguments, image)
    write_atomically(path, image.getvalue())
