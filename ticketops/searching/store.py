"""The output folder of a search: one atomically written file per finished thing, so that a killed search resumes."""

import dataclasses
import hashlib
import io
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from ticketops.errors import InputError, StoreError, TicketopsError, spelled
from ticketops.files import make_folder, read_json, sha256, store_error, user_path, write_atomically, write_json
from ticketops.models.checkpoint import NOTE, check_files
from ticketops.models.shared import SharedModel
from ticketops.searching import environment
from ticketops.searching.config import Config
from ticketops.searching.plan import FORMAT_1_TRAINING, SearchConfig, json_identity, search_plan
from ticketops.searching.sharing_plan import SINGLE, ShareConfig, share_plan
from ticketops.searching.task_options import DATA_OPTIONS
from ticketops.searching.transfer_plan import SCORES, TransferConfig, transfer_plan
from ticketops.tickets import Importance, Ticket

#: Of a run's `config.json`. Format 1 had no checksum, and lacks fields of the configuration that came later.
FORMAT = 2
Record = dict[str, Any]
AnyConfig = TypeVar("AnyConfig", bound=Config)
#: The file of what was timed in the end.
_LATENCIES = "latency.json"
_REMEDY = "delete it and run the same command again"

#: Kind of run, as `identity["kind"]` names it -> its configuration, and what lists its trials from both.
KINDS: Mapping[str, tuple[type[Config], Callable[[Any, Mapping[str, Any]], Sequence[Any]]]] = {
    "search": (SearchConfig, search_plan),
    "share": (ShareConfig, lambda config, identity: share_plan(config, identity.get("first_tasks"))),
    "transfer": (TransferConfig, transfer_plan),
}
#: Fields that may differ from an earlier command's: what they read is known by its fingerprint.
_FINGERPRINTED = ("model", "task", "tickets", *DATA_OPTIONS)


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

    `config.json` says which search it is, `trials/` has one record a trial, `failures/` one a trial that failed,
    `predictions/` each trial's logits, `importance/`, `tickets/` and `models/` what was scored, drawn and trained,
    `latency.json` what was timed in the end. A record has the checksums of what its trial has left. Use `Store.create`
    to search (it holds the folder's lock until closed) and `Store.read` to report.
    """

    def __init__(self, folder: Path, description: Record, lock: FileLock | None = None):
        self.folder = folder
        self.description = description
        self._lock = lock

    @classmethod
    def create(cls, folder: str | Path, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> "Store":
        """Opens a folder for a search, new, to be resumed or to be extended, and locks it against a second process.

        Args:
            folder: the output folder; made where it is missing.
            identity: what the search's results depend on. It may have more seeds, levels and the like than the
                folder's; a folder with another identity is refused.
            notes: what is only noted, such as versions; the first search's notes stay.

        Raises:
            StoreError: the folder is in use, holds another search or other files, is corrupt, or cannot be written.
        """
        folder = user_path(folder, spelled("output"))
        wanted = json_identity(identity)
        try:
            make_folder(folder)
            _refuse_files_of_others(folder)
            lock = FileLock(folder / ".lock", mode=0o666)
            lock.acquire(timeout=0)
        except Timeout as error:
            raise StoreError(
                f"another process is working in {folder}: wait for it, or choose another {spelled('output')} folder"
            ) from error
        except OSError as error:
            raise store_error(folder, error) from error
        try:
            _remove_leftovers(folder)
            description: Record = {"format": FORMAT, "identity": wanted, "notes": dict(notes)}
            if (folder / "config.json").exists():
                found = _read_description(folder)
                _refuse_another_search(folder, found["identity"], wanted)
                # The tasks of a share grow with it.
                tasks = {"tasks": notes["tasks"]} if "tasks" in notes else {}
                description = {**found, "format": FORMAT, "identity": wanted, "notes": {**found["notes"], **tasks}}
                changed = description["identity"] != found["identity"]
            else:
                changed = True
            if changed:
                write_json(folder / "config.json", description)
            return cls(folder, description, lock)
        except BaseException:
            lock.release()
            raise

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
        """Releases the folder's lock."""
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
    def _mark(self) -> str:
        """What a run's records have in common, however many seeds, levels or tasks are added."""
        identity = self.description["identity"]
        parts = [_kind(identity), identity["model_fingerprint"]]
        if _kind(identity) != "share":
            parts.append(identity["task_fingerprint"])
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

    @property
    def plan(self) -> list[Any]:
        """All trials of the run, finished or not."""
        identity = self.description["identity"]
        return list(KINDS[self.kind][1](self.config, identity))

    def record_path(self, trial: Named) -> Path:
        """The file of a trial's record."""
        return self.folder / "trials" / f"{trial.id}.json"

    def failure_path(self, trial: Named) -> Path:
        """The file that says why a trial failed."""
        return self.folder / "failures" / f"{trial.id}.json"

    def ticket_path(self, trial: Named) -> Path:
        """The file of a trial's ticket."""
        return self.folder / "tickets" / f"{trial.id}.safetensors"

    def importance_path(self, seed: int, way: str) -> Path:
        """The file of the importance of a seed's full model, scored in this way ("pass" or "on_the_fly")."""
        return self.folder / "importance" / f"seed-{seed}-{way}.safetensors"

    def model_path(self, trial: Named) -> Path:
        """The folder of a trial's trained model."""
        return self.folder / "models" / trial.id

    def model(self, trial: Named) -> Path | None:
        """The folder of a trial's trained model, every file of it compared with its checksum.

        Args:
            trial: of the run.

        Returns:
            The folder; None where no model of the trial was kept.

        Raises:
            StoreError: a file of it is missing or was changed.
        """
        path = self.model_path(trial)
        notes = [note for note in (path / NOTE, path / SharedModel.NOTE) if self._sum(note, trial) is not None]
        if not path.is_dir():
            return None
        for note in notes:
            self._compare(note, trial, _model_remedy())
        try:
            check_files(path)
            SharedModel.check(path)
        except InputError as error:
            raise StoreError(f"{error}; or {_model_remedy()}") from error
        if empty := [file for file in path.rglob("*.safetensors") if not file.stat().st_size]:
            raise StoreError(f"{empty[0]} is empty: {_model_remedy()}")
        return path

    def has_model(self, trial: Named) -> bool:
        """Whether a trial's trained model is there, and whole."""
        try:
            return self.model(trial) is not None
        except StoreError:
            return False

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
        from ticketops.searching import schema

        path = self.record_path(trial)
        kinds = {"search": schema.SearchRecord, "share": schema.ShareRecord, "transfer": schema.TransferRecord}
        record = _read(path, kinds[self.kind], unsealed=False)
        if record is None:
            return None
        wanted = {"id": trial.id, "seed": trial.seed, "kind": getattr(trial, "kind", None)}
        if wrong := [name for name, value in wanted.items() if record[name] != value]:
            raise StoreError(f"the record {path} is of {wrong[0]} {record[wrong[0]]!r:.100}: {_REMEDY}")
        if record.get("run", self._mark) != self._mark:
            raise StoreError(f"the record {path} is of another run's model or data: {_REMEDY}")
        return record

    def records(self) -> list[Record]:
        """The records of all finished trials, in the plan's order."""
        return [record for trial in self.plan if (record := self.record(trial)) is not None]

    def write_record(self, trial: Named, record: Record, files: Iterable[Path] = ()) -> None:
        """Writes a trial's record, which marks the trial as finished.

        Args:
            trial: names the file.
            record: JSON values.
            files: in the run's folder, that the trial has left beside its ticket and its model; the record has the
                checksums of all of them.
        """
        model = self.model_path(trial)
        # What the trial's model answers is in the record's "predictions" already.
        paths = {*files, self.ticket_path(trial), model / NOTE, model / SharedModel.NOTE}
        sums = {str(path.relative_to(self.folder)): sha256(path) for path in sorted(paths) if path.is_file()}
        write_json(self.record_path(trial), {**record, "run": self._mark, "files": sums})
        self.failure_path(trial).unlink(missing_ok=True)

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
                raise StoreError(f"cannot read {path} ({error.strerror}): {_REMEDY}") from error
            if hashlib.sha256(content).hexdigest() != kept["sha256"]:
                raise StoreError(f"{path} is truncated or damaged: {_REMEDY}")
            found[name] = np.load(io.BytesIO(content), allow_pickle=False)
        return found

    def failure(self, trial: Named) -> Record | None:
        """Why a trial failed when it was last tried, or None where it has not.

        Returns:
            Its "id", "seed", "error" and "environment".

        Raises:
            StoreError: the file is truncated or damaged.
        """
        from ticketops.searching import schema

        return None if self.record_path(trial).exists() else _read(self.failure_path(trial), schema.Failure)

    def failures(self) -> list[Record]:
        """Why the trials failed that did, in the plan's order."""
        return [failure for trial in self.plan if (failure := self.failure(trial)) is not None]

    def write_failure(self, trial: Named, reason: str) -> None:
        """Writes why a trial failed; a later run tries it again."""
        content = {"id": trial.id, "seed": trial.seed, "error": reason, "environment": environment.circumstances()}
        write_json(self.failure_path(trial), content)

    def importance(self, seed: int, way: str, trial: Named | None = None) -> Importance | None:
        """The importance of a seed's full model, or None where it was not scored yet.

        Args:
            seed: of the full model.
            way: in which it was scored.
            trial: that has scored it; the file must then be the one that its record was made with.

        Raises:
            StoreError: the file is damaged, or another one.
        """
        path = self.importance_path(seed, way)
        if not path.exists():
            return None
        importance: Importance = _load(Importance, path)
        if trial is not None:
            self._compare(path, trial)
        return importance

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
        from ticketops.searching import schema

        kinds = {_LATENCIES: schema.Latencies, SCORES: schema.Single, SINGLE: dict[str, schema.Single]}
        return _read(self.folder / name, kinds[name])

    def write_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Writes one of the run's own files.

        Args:
            name: of the JSON file.
            facts: what it says.
        """
        write_json(self.folder / name, facts)

    def latencies(self) -> Record | None:
        """What the full model and the super ticket took on the machine of the search, or None before its end.

        Raises:
            StoreError: the file is truncated or damaged.
        """
        return self.facts(_LATENCIES)

    def write_latencies(self, latencies: Mapping[str, Any]) -> None:
        """Writes what the full model and the super ticket took."""
        self.write_facts(_LATENCIES, latencies)

    def ticket(self, trial: Named) -> Ticket | None:
        """A trial's ticket, or None where it was not drawn yet.

        Raises:
            StoreError: the file is damaged, or not the one that the trial's record was made with.
        """
        path = self.ticket_path(trial)
        if not path.exists():
            return None
        ticket: Ticket = _load(Ticket, path)
        self._compare(path, trial)
        return ticket

    def tickets(self, kind: str, sparsity: float) -> dict[int, Ticket]:
        """Seed -> ticket of one level, for the seeds whose trial is finished."""
        trials = [trial for trial in self.plan if (trial.kind, trial.sparsity) == (kind, sparsity)]
        found = {trial.seed: self.ticket(trial) for trial in trials if self.record_path(trial).exists()}
        return {seed: ticket for seed, ticket in found.items() if ticket is not None}

    def keep_ticket(self, trial: Named, ticket: Ticket, finished: bool = False) -> bool:
        """Writes a trial's ticket, unless the trial is finished and has one.

        Args:
            trial: names the file.
            ticket: as it is drawn now.
            finished: whether the trial is. It then keeps the ticket that it was trained with, which is another one
                where the importance was scored anew on another machine.

        Returns:
            Whether the trial can stay finished: it cannot where its ticket was lost and another one is drawn now.
        """
        found, path = self.ticket(trial), self.ticket_path(trial)
        if finished and found is not None:
            return True
        if found != ticket:
            _save(ticket, path)
        expected = self._sum(path, trial) if finished else None
        return expected is None or sha256(path) == expected

    def _sum(self, path: Path, trial: Named) -> str | None:
        """The checksum that a trial's record has of a file; None where there is none."""
        name = str(path.relative_to(self.folder))
        # A task's ticket is no trial of its own: those that stand on it have its checksum.
        records = [self.record(trial)] if hasattr(trial, "kind") else self.records()
        found = (record["files"][name] for record in records if record and name in record.get("files", {}))
        return next(found, None)

    def _compare(self, path: Path, trial: Named, remedy: str = _REMEDY) -> None:
        """Compares a file of a finished trial with the checksum that its record has."""
        expected = self._sum(path, trial)
        try:
            if expected is not None and sha256(path) != expected:
                raise StoreError(f"{path} was changed or damaged after it was written: {remedy}")
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def extended(config: AnyConfig) -> AnyConfig:
    """A run's configuration with the seeds, levels and the like that its output folder has beside its own.

    Args:
        config: of a run that may have begun.

    Returns:
        The configuration; of a new run the same one. Whether the rest of it is the folder's, `Store.create` asks.

    Raises:
        StoreError: the folder's `config.json` is corrupt.
    """
    output: str = config.output  # type: ignore[attr-defined]
    folder = Path(output)
    if not (folder / "config.json").is_file():
        return config
    identity = _read_description(folder)["identity"]
    if _kind(identity) != config.verb:
        return config
    stored, asked = identity["config"], config.to_dict()
    found = {}
    for name in config.additive():
        if isinstance(stored[name], list) and isinstance(asked[name], list):
            found[name] = [*stored[name], *(value for value in asked[name] if value not in stored[name])]
    return dataclasses.replace(config, **found)  # type: ignore[type-var]


def _model_remedy() -> str:
    return f"run the same again with {spelled('save_models', True)}, which trains that trial again"


def _config_remedy() -> str:
    # Not to be deleted, as other files are: without it the folder's records are nobody's.
    return f"restore it, or choose another {spelled('output')} folder"


def _remove_leftovers(folder: Path) -> None:
    """Removes half-written files of a killed run; nobody else writes these while the lock is held.

    Folders stay: one of that name is an export that somebody writes beside the run's own files.
    """
    try:
        parts = (folder / name for name in ("trials", "failures", "importance", "tickets"))
        for place in (folder, *parts, *(folder / "predictions").glob("*")):
            for leftover in place.glob(".*.part"):
                if leftover.is_file():
                    leftover.unlink()
    except OSError as error:
        raise store_error(folder, error) from error


def _save(thing: Importance | Ticket, path: Path) -> None:
    try:
        thing.save(path)
    except OSError as error:
        raise store_error(path, error) from error


def _load(kind: type[Any], path: Path) -> Any:
    try:
        return kind.load(path)
    except InputError as error:
        raise StoreError(f"{path} is truncated or damaged: {_REMEDY}") from error


def _read(path: Path, kind: Any, remedy: str = _REMEDY, unsealed: bool = True) -> Record | None:
    """A JSON file of a run, checked against its type; None where there is none."""
    from ticketops.searching import schema

    if not path.exists():
        return None
    try:
        content = read_json(path, remedy, unsealed=unsealed)
    except InputError as error:
        raise StoreError(str(error)) from error
    if (problem := schema.problem(kind, content)) is not None:
        raise StoreError(f"{path} is damaged ({problem}): {remedy}")
    return content


def _read_description(folder: Path) -> Record:
    from ticketops.searching import schema

    path = folder / "config.json"
    description = _read(path, schema.Description, _config_remedy())
    if description is None:
        raise StoreError(f"{path} is not there: {_config_remedy()}")
    identity = description["identity"]
    kind, plan = KINDS[_kind(identity)]
    # What other kinds of runs have, as their types cannot say.
    needed = {"share": ("tickets",), "transfer": ("source", "source_fingerprint")}.get(_kind(identity), ())
    try:
        if lacking := [name for name in needed if name not in identity]:
            raise InputError(f"the identity has no {lacking[0]}")
        if _kind(identity) != "search" and "tasks" not in description["notes"]:
            raise InputError("the notes have no tasks")
        # Fields that came after the folder take their defaults.
        identity["config"] = _filled(kind, identity["config"])
        if "source" in identity:
            identity["source"] = _filled(SearchConfig, identity["source"])
        identity.setdefault("training", FORMAT_1_TRAINING[identity["config"]["recipe"]])
        # Of all records of the source's search, whichever seeds the run has.
        if isinstance(identity.get("source_results"), str):
            del identity["source_results"]
        plan(kind.from_dict(identity["config"]), identity)
    except TicketopsError as error:
        raise StoreError(
            f"{path} is damaged or of a later version of ticketops ({error}): {_config_remedy()}"
        ) from error
    return description


def _filled(kind: type[Config], values: Mapping[str, Any]) -> Record:
    config = kind.from_dict(values).to_dict()
    return json_identity({name: value for name, value in config.items() if name not in ("output", "save_models")})


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
    kind = KINDS[_kind(stored)][0]
    flags = _differences(stored["config"], wanted["config"], kind.additive())
    differing = {spelled(name): values for name, values in flags.items()}
    if "source" in wanted:
        differing |= {
            f"the source's {name}": values
            for name, values in _differences(stored["source"], wanted["source"], SearchConfig.additive()).items()
        }
    apart = ("config", "source", "kind")
    old, new = ({name: value for name, value in each.items() if name not in apart} for each in (stored, wanted))
    for name in [name for name in old if name in new and not _holds(old[name], new[name])]:
        one, other = ({**value} if isinstance(value, Mapping) else {"": value} for value in (old[name], new[name]))
        differing |= {
            f"{name.replace('_', ' ')} {key}".strip(): (value, other.get(key))
            for key, value in one.items()
            if not _holds(value, other.get(key))
        }
    if differing:
        fields = "; ".join(f"{name} is {old!r} there and {new!r} here" for name, (old, new) in differing.items())
        raise StoreError(
            f"{folder} holds another {_kind(stored)} ({fields}): choose another {spelled('output')} folder, or the "
            "same values"
        )


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], additive: Iterable[str]) -> dict[str, Any]:
    """Name -> old and new value of the fields by which finished results would differ."""
    return {
        name: (old, wanted[name])
        for name, old in stored.items()
        if name not in _FINGERPRINTED
        and old != wanted[name]
        and not (name in additive and isinstance(old, list) and _holds(old, wanted[name]))
    }


def _holds(old: Any, new: Any) -> bool:
    """True if a value contains all of an older one, so that it only adds to it."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return all(name in new and _holds(value, new[name]) for name, value in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return all(value in new for value in old)
    return bool(old == new)
