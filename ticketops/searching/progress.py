"""How far a run is, and whether its files are whole."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketops.errors import StoreError
from ticketops.files import sha256
from ticketops.searching.plan import SearchConfig, search_plan
from ticketops.searching.sharing_plan import SEARCHES, SINGLE
from ticketops.searching.store import LATENCIES, REMEDY, Named, Record, Store
from ticketops.searching.transfer_plan import SCORES, SOURCE


@dataclass(frozen=True)
class Status:
    """How far a run is. A trial of a search inside a share or transfer is named "SEARCH TRIAL": "sst2 full-seed-0".

    Attributes:
        kind: "search", "share" or "transfer".
        running: name of each trial that a process is running -> which process, on which machine.
        finished: names of the finished trials.
        failed: name of each failed trial -> its error.
        left: names of the trials that have not run.
        seconds: time that the finished trials took.
        seconds_left: estimate for the others, from finished trials of the same kind where there are some; None if no
            trial is finished.
    """

    kind: str
    running: dict[str, str]
    finished: list[str]
    failed: dict[str, str]
    left: list[str]
    seconds: float
    seconds_left: float | None


def status(folder: str | Path) -> Status:
    """Reads how far a run is, while it runs or afterwards.

    Args:
        folder: output folder of a search, share or transfer.

    Raises:
        InputError: the folder has no run.
        StoreError: a file is damaged.
    """
    store = Store.read(folder)
    finished: list[str] = []
    failed: dict[str, str] = {}
    left: list[str] = []
    # By kind of trial: seconds of the finished ones; and the kinds of the others.
    seconds: dict[str, list[float]] = {}
    waiting: list[str] = []
    for name, trial, record, error in trials(store):
        kind = getattr(trial, "kind", "")
        if record is not None:
            finished.append(name)
            seconds.setdefault(kind, []).append(sum(record["timing"].values()))
            continue
        waiting.append(kind)
        if error is None:
            left.append(name)
        else:
            failed[name] = error
    every = [each for several in seconds.values() for each in several]
    estimate = sum(statistics.fmean(seconds.get(kind, every)) for kind in waiting) if every else None
    return Status(store.kind, running(store), finished, failed, left, sum(every), estimate)


def running(store: Store) -> dict[str, str]:
    """Finds the trials that processes are running now, those of searches inside the run included.

    Args:
        store: store of the run.

    Returns:
        The trial's name in the run -> "process 123 on host".
    """
    return {
        prefix + name: where
        for prefix, part, _ in _parts(store)
        if part is not None
        for name, where in part.running().items()
    }


def trials(store: Store) -> Iterator[tuple[str, Named, Record | None, str | None]]:
    """Yields all trials of a run, those of the searches inside it first.

    Args:
        store: store of the run.

    Yields:
        The trial's name in the run, e.g. "sst2 full-seed-0"; the trial; its record, None if it is unfinished; its
        error, None if it has not failed.

    Raises:
        StoreError: a file is damaged.
    """
    for prefix, part, plan in _parts(store):
        for trial in plan:
            record = None if part is None else part.record(trial)
            failure = None if part is None or record is not None else part.failure(trial)
            yield prefix + trial.id, trial, record, None if failure is None else failure["error"]


def verify(folder: str | Path) -> list[str]:
    """Reads every file that the finished trials of a run left, and compares it with its checksum.

    Args:
        folder: output folder of a search, share or transfer.

    Returns:
        One line for each file that is damaged or missing, with the remedy.

    Raises:
        InputError: the folder has no run.
        StoreError: its `config.json` is damaged.
    """
    store = Store.read(folder)
    found: list[str] = []

    def check(read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except StoreError as error:
            found.append(str(error))
            return None

    for _, part, plan in _parts(store):
        if part is None:
            continue
        for trial in plan:
            record = check(part.record, trial)
            check(part.failure, trial)
            if record is None:
                continue
            for read in (part.ticket, part.predictions, part.model):
                check(read, trial)
            kept = {each["file"]: each["sha256"] for each in record.get("predictions", {}).values()}
            for name, expected in {**kept, **record.get("files", {})}.items():
                path = part.folder / name
                if not path.is_file():
                    found.append(f"{path} is missing: run the same command again")
                elif sha256(path) != expected:
                    found.append(f"{path} was changed or damaged after it was written: {REMEDY}")
        check(part.facts, {"search": LATENCIES, "share": SINGLE, "transfer": SCORES}[part.kind])
    # Several trials may stand on one file.
    return list(dict.fromkeys(found))


def _parts(store: Store) -> Iterator[tuple[str, Store | None, list[Named]]]:
    """Yields the searches inside a run and the run itself: prefix of trials' names, store if there is one, and plan."""
    identity, config = store.description["identity"], store.config
    inner: dict[str, SearchConfig] = {}
    if store.kind == "share" and identity["tickets"] is None:
        names = store.description["notes"]["tasks"]
        inner = {f"{SEARCHES}/{name}": config.search(task) for name, task in zip(names, config.tasks, strict=True)}
    if store.kind == "transfer" and identity.get("source_results") is None:
        inner = {SOURCE: SearchConfig.from_dict(identity["source"])}
    for place, search in inner.items():
        folder, prefix = store.folder / place, f"{Path(place).name} "
        if (folder / "config.json").is_file():
            part = Store.read(folder, "search")
            yield prefix, part, part.plan
        else:
            yield prefix, None, list(search_plan(search, identity))
    yield "", store, store.plan
