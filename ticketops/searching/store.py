"""The output folder of a search: one atomically written file per finished thing, so that a killed search resumes."""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from filelock import FileLock, Timeout

from ticketops.errors import InputError, StoreError, spelled
from ticketops.files import store_error, user_path, write_atomically
from ticketops.searching.config import Config
from ticketops.searching.plan import SearchConfig, json_identity, search_plan
from ticketops.searching.sharing_plan import ShareConfig, share_plan
from ticketops.searching.transfer_plan import TransferConfig, transfer_plan
from ticketops.tickets import Importance, Ticket

FORMAT = 1
Record = dict[str, Any]
#: The file of what was timed in the end.
_LATENCIES = "latency.json"
#: What every run's identity has.
_IDENTITY = {"task_fingerprint", "model_fingerprint", "layers", "heads"}
_REMEDY = "delete it and run the same command again"

#: Kind of run, as `identity["kind"]` names it -> its configuration, and what lists its trials from both.
KINDS: Mapping[str, tuple[type[Config], Callable[[Any, Mapping[str, Any]], Sequence[Any]]]] = {
    "search": (SearchConfig, search_plan),
    "share": (ShareConfig, lambda config, identity: share_plan(config)),
    "transfer": (TransferConfig, transfer_plan),
}


class Named(Protocol):
    """A trial of any kind: what its files are called, and its seed."""

    @property
    def id(self) -> str:
        """A name that is unique in its run and can be a file's name."""

    @property
    def seed(self) -> int:
        """Of its randomness."""


class Store:
    """The folder in which a search, or another run of trials, keeps what it has finished.

    `config.json` says which search it is, `trials/` has one record a trial, `predictions/` each trial's logits,
    `importance/` and `tickets/` what was scored and drawn, `latency.json` what was timed in the end. Use `Store.create`
    to search (it holds the folder's lock until closed) and `Store.read` to report.
    """

    def __init__(self, folder: Path, description: Record, lock: FileLock | None = None):
        self.folder = folder
        self.description = description
        self._lock = lock

    @classmethod
    def create(cls, folder: str | Path, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> "Store":
        """Opens a folder for a search, new or to be resumed, and locks it against a second process.

        Args:
            folder: the output folder; made where it is missing.
            identity: what the search's results depend on; a folder with another identity is refused.
            notes: what is only noted, such as versions; the first search's notes stay.

        Raises:
            StoreError: the folder is in use, holds another search or other files, is corrupt, or cannot be written.
        """
        folder = user_path(folder, spelled("output"))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _refuse_files_of_others(folder)
            lock = FileLock(folder / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"another process is working in {folder}: wait for it, or choose another {spelled('output')} folder"
            ) from error
        except OSError as error:
            raise store_error(folder, error) from error
        try:
            _remove_leftovers(folder)
            if (folder / "config.json").exists():
                store = cls(folder, _read_description(folder), lock)
                _refuse_another_search(folder, store.description["identity"], json_identity(identity))
            else:
                store = cls(folder, {"format": FORMAT, "identity": json_identity(identity), "notes": dict(notes)}, lock)
                write_atomically(folder / "config.json", json.dumps(store.description, indent=2) + "\n")
        except BaseException:
            lock.release()
            raise
        return store

    @classmethod
    def check(cls, folder: str | Path, identity: Mapping[str, Any]) -> None:
        """Makes sure that what a folder holds would let `create` open it; nothing is locked or written.

        Args:
            folder, identity: as `create` takes them.

        Raises:
            StoreError: the folder holds another search or other files, is corrupt, or is none.
        """
        folder = user_path(folder, spelled("output"))
        try:
            if not folder.exists():
                return
            _refuse_files_of_others(folder)
        except OSError as error:
            raise store_error(folder, error) from error
        if (folder / "config.json").exists():
            _refuse_another_search(folder, _read_description(folder)["identity"], json_identity(identity))

    @classmethod
    def read(cls, folder: str | Path, kind: str | None = None) -> "Store":
        """Opens a run's folder to look at it; nothing is locked or written.

        Args:
            folder: its output folder.
            kind: what the run must be, a key of `KINDS`; None for any.

        Raises:
            InputError: there is no such run in the folder.
            StoreError: its `config.json` is corrupt.
        """
        folder = user_path(folder, spelled("output"))
        if not (folder / "config.json").is_file():
            raise InputError(
                f"{folder} is no ticketops folder (no config.json): give the {spelled('output')} folder of a search"
            )
        store = cls(folder, _read_description(folder))
        if kind is not None and store.kind != kind:
            raise InputError(f"{folder} holds the results of ticketops {store.kind}, and a {kind} is needed here")
        return store

    def close(self) -> None:
        """Gives the folder free for another process."""
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def kind(self) -> str:
        """What the run is: a key of `KINDS`."""
        return _kind(self.description["identity"])

    @property
    def config(self) -> Any:
        """The configuration of the run, of its kind's class, with `output` and `save_models` as they are."""
        # Neither is part of a run's identity; models may have been asked for later.
        apart = {"output": str(self.folder), "save_models": (self.folder / "models").is_dir()}
        values = {**self.description["identity"]["config"], **apart}
        return KINDS[self.kind][0].from_dict(values)

    @property
    def plan(self) -> list[Any]:
        """All trials of the run, finished or not."""
        identity = self.description["identity"]
        return list(KINDS[self.kind][1](self.config, identity))

    def record_path(self, trial: Named) -> Path:
        """The file of a trial's record."""
        return self.folder / "trials" / f"{trial.id}.json"

    def ticket_path(self, trial: Named) -> Path:
        """The file of a trial's ticket."""
        return self.folder / "tickets" / f"{trial.id}.safetensors"

    def importance_path(self, seed: int, way: str) -> Path:
        """The file of the importance of a seed's full model, scored in this way ("pass" or "on_the_fly")."""
        return self.folder / "importance" / f"seed-{seed}-{way}.safetensors"

    def model_path(self, trial: Named) -> Path:
        """The folder of a trial's trained model."""
        return self.folder / "models" / trial.id

    def clear_model(self, trial: Named) -> Path:
        """Makes room for a trial's trained model: removes an earlier one, and what a killed run has left of one.

        Args:
            trial: names the folder.

        Returns:
            The folder, which is not there.
        """
        path = self.model_path(trial)
        for old in (path, *path.parent.glob(f".{path.name}.*.part")):
            shutil.rmtree(old, ignore_errors=True)
        return path

    def record(self, trial: Named) -> Record | None:
        """A trial's record, or None while it is unfinished.

        Raises:
            StoreError: the file is truncated, damaged, or another trial's.
        """
        path = self.record_path(trial)
        if not path.exists():
            return None
        record = _read_json(path)
        if record.pop("checksum", None) != _checksum(record):
            raise StoreError(f"the record {path} is damaged: {_REMEDY}")
        if record.get("id") != trial.id:
            raise StoreError(f"the record {path} is of {record.get('id')!r}: {_REMEDY}")
        return record

    def records(self) -> list[Record]:
        """The records of all finished trials, in the plan's order."""
        return [record for trial in self.plan if (record := self.record(trial)) is not None]

    def write_record(self, trial: Named, record: Record) -> None:
        """Writes a trial's record, which marks the trial as finished."""
        record = {**record, "checksum": _checksum(record)}
        write_atomically(self.record_path(trial), json.dumps(record, indent=2) + "\n")

    def write_predictions(self, trial: Named, predictions: Mapping[str, np.ndarray]) -> Record:
        """Writes what a trial's model answers, one .npy file a split, before the record that names them.

        Args:
            trial: names the folder.
            predictions: "validation" and the like, of a share "TASK.validation" -> logits [rows, labels].

        Returns:
            The same names -> path in the run's folder and sha256, for the trial's record.
        """
        kept = {}
        for name, logits in predictions.items():
            content = io.BytesIO()
            np.save(content, logits, allow_pickle=False)
            file = f"predictions/{trial.id}/{name}.npy"
            write_atomically(self.folder / file, content.getvalue())
            kept[name] = {"file": file, "sha256": hashlib.sha256(content.getvalue()).hexdigest()}
        return kept

    def predictions(self, trial: Named) -> dict[str, np.ndarray] | None:
        """What a finished trial's model answers, as `write_predictions` takes it.

        Returns:
            Logits by name; empty where the record is of a version of ticketops that kept none. None where the trial is
            not finished, or a file is missing.

        Raises:
            StoreError: a file is damaged, or not the one that the record names.
        """
        record, found = self.record(trial), {}
        if record is None:
            return None
        for name, kept in record.get("predictions", {}).items():
            path = self.folder / "predictions" / trial.id / f"{name}.npy"
            if not path.exists():
                return None
            try:
                content = path.read_bytes()
            except OSError as error:
                raise StoreError(f"cannot read {path}: {error.strerror}") from error
            if hashlib.sha256(content).hexdigest() != kept["sha256"]:
                raise StoreError(f"{path} is truncated or damaged: {_REMEDY}")
            found[name] = np.load(io.BytesIO(content), allow_pickle=False)
        return found

    def importance(self, seed: int, way: str) -> Importance | None:
        """The importance of a seed's full model, or None where it was not scored yet."""
        path = self.importance_path(seed, way)
        return _load(Importance, path) if path.exists() else None

    def write_importance(self, seed: int, way: str, importance: Importance) -> None:
        """Writes the importance of a seed's full model."""
        _save(importance, self.importance_path(seed, way))

    def facts(self, name: str) -> Record | None:
        """What one of the run's own files says, or None where it is not written yet.

        Args:
            name: of the JSON file.

        Raises:
            StoreError: the file is truncated or damaged.
        """
        path = self.folder / name
        return _read_json(path) if path.exists() else None

    def latencies(self) -> Record | None:
        """What the full model and the super ticket took on the machine of the search, or None before its end.

        Raises:
            StoreError: the file is truncated or damaged.
        """
        found = self.facts(_LATENCIES)
        rows = None if found is None else found.get("rows")
        if found is not None and not (
            isinstance(found.get("machine"), dict) and isinstance(rows, list) and all(map(_is_latency, rows))
        ):
            raise StoreError(f"{self.folder / _LATENCIES} is damaged: {_REMEDY}")
        return found

    def write_latencies(self, latencies: Mapping[str, Any]) -> None:
        """Writes what the full model and the super ticket took."""
        write_atomically(self.folder / _LATENCIES, json.dumps(latencies, indent=2) + "\n")

    def ticket(self, trial: Named) -> Ticket | None:
        """A trial's ticket, or None where it was not drawn yet."""
        path = self.ticket_path(trial)
        return _load(Ticket, path) if path.exists() else None

    def tickets(self, kind: str, sparsity: float) -> dict[int, Ticket]:
        """Seed -> ticket of one level, for the seeds whose trial is finished."""
        trials = [trial for trial in self.plan if (trial.kind, trial.sparsity) == (kind, sparsity)]
        found = {trial.seed: self.ticket(trial) for trial in trials if self.record_path(trial).exists()}
        return {seed: ticket for seed, ticket in found.items() if ticket is not None}

    def keep_ticket(self, trial: Named, ticket: Ticket) -> None:
        """Writes a trial's ticket, or checks it against the one that is there.

        Raises:
            StoreError: another ticket is there, which means that its trial was made from other importance scores.
        """
        found = self.ticket(trial)
        if found is None:
            _save(ticket, self.ticket_path(trial))
        elif found != ticket:
            raise StoreError(
                f"the ticket {self.ticket_path(trial)} was drawn from other importance scores than "
                f"{self.folder / 'importance'} holds: delete it and {self.record_path(trial)}, and run the same "
                "command again"
            )


def _remove_leftovers(folder: Path) -> None:
    """Removes half-written files of a killed run; nobody else writes these while the lock is held.

    Folders stay: one of that name is an export that somebody writes beside the run's own files.
    """
    try:
        parts = (folder / name for name in ("trials", "importance", "tickets"))
        for place in (folder, *parts, *(folder / "predictions").glob("*")):
            for leftover in place.glob(".*.part"):
                if leftover.is_file():
                    leftover.unlink()
    except OSError as error:
        raise store_error(folder, error) from error


def _save(thing: Importance | Ticket, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        thing.save(path)
    except OSError as error:
        raise store_error(path, error) from error


def _load(kind: type[Any], path: Path) -> Any:
    try:
        return kind.load(path)
    except InputError as error:
        raise StoreError(f"{path} is truncated or damaged: {_REMEDY}") from error


def _checksum(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _is_latency(row: Any) -> bool:
    names = ("batch", "length", "whole_ms", "left_ms")
    return isinstance(row, dict) and all(isinstance(row.get(name), int | float) for name in names)


def _read_json(path: Path, remedy: str = _REMEDY) -> Record:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no JSON object")
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise StoreError(f"{path} is truncated or damaged: {remedy}") from error
    return content


def _read_description(folder: Path) -> Record:
    path = folder / "config.json"
    # Not to be deleted, as other files are: without it the folder's records are nobody's.
    description = _read_json(path, f"restore it, or choose another {spelled('output')} folder")
    identity = description.get("identity")
    known = (
        isinstance(identity, dict)
        and isinstance(identity.get("config"), dict)
        and identity.keys() >= _IDENTITY
        and _kind(identity) in KINDS
        and isinstance(description.get("notes"), dict)
    )
    if description.get("format") != FORMAT or not known:
        raise StoreError(
            f"{path} is damaged or of another version of ticketops: choose another {spelled('output')} folder"
        )
    return description


def _kind(identity: Mapping[str, Any]) -> str:
    return str(identity.get("kind", "search"))


def _refuse_files_of_others(folder: Path) -> None:
    others = [name for name in sorted(os.listdir(folder)) if name != ".lock"]
    # What a search killed in its very first write leaves behind is not somebody's file.
    foreign = [name for name in others if not name.startswith(".config.json.")]
    if foreign and not (folder / "config.json").exists():
        raise StoreError(
            f"{folder} holds {foreign[0]!r} and is no ticketops folder: choose another {spelled('output')} folder"
        )


def _refuse_another_search(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if _kind(stored) != _kind(wanted):
        raise StoreError(
            f"{folder} holds the results of ticketops {_kind(stored)}: choose another {spelled('output')} folder for "
            "those of "
            f"ticketops {_kind(wanted)}"
        )

    def flatten(identity: Mapping[str, Any]) -> dict[str, Any]:
        return {**identity["config"], **{name: value for name, value in identity.items() if name != "config"}}

    old, new = flatten(stored), flatten(wanted)
    differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    if differing:
        fields = "; ".join(f"{name} is {old.get(name)!r} there and {new.get(name)!r} here" for name in differing)
        raise StoreError(
            f"{folder} holds another {_kind(stored)} ({fields}): choose another {spelled('output')} folder, or the "
            "same values"
        )
