"""The output folder of a run. Every finished part is one atomically written file, so that a killed run can resume."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from ticketops.errors import InputError, StoreError, TicketopsError, shown, spelled
from ticketops.files import (
    make_folder,
    read_bytes,
    read_json,
    sha256,
    store_error,
    user_path,
    write_atomically,
    write_json,
)
from ticketops.searching.config import Config, json_identity
from ticketops.searching.halving import dropped
from ticketops.searching.plan import SearchConfig, search_plan
from ticketops.searching.recipes import FORMAT_1_TRAINING, without_options
from ticketops.searching.sharing_plan import SINGLE, ShareConfig, share_plan
from ticketops.searching.task_options import DATA_OPTIONS
from ticketops.searching.transfer_plan import SCORES, TransferConfig, transfer_plan

if TYPE_CHECKING:
    from ticketops.tickets import Importance, Ticket

#: Format of a run's `config.json`. Format 1 had no checksum, and fewer fields of the configuration.
FORMAT = 2
Record = dict[str, Any]
AnyConfig = TypeVar("AnyConfig", bound=Config)
#: File of the latencies, which are measured at the end of a search.
LATENCIES = "latency.json"
#: Ends the names of the files beside a split's logits that have what each row contributes to the metric.
ROWS = "-rows"
#: Seconds that a process waits for another one that begins or extends the same run.
_PATIENCE = 60
REMEDY = "delete it and run the same command again"

#: Kind of run, `identity["kind"]` -> its configuration class, and a function (config, identity) that lists its trials.
KINDS: Mapping[str, tuple[type[Config], Callable[[Any, Mapping[str, Any]], Sequence[Any]]]] = {
    "search": (SearchConfig, search_plan),
    "share": (ShareConfig, lambda config, identity: share_plan(config, identity.get("first_tasks"))),
    "transfer": (TransferConfig, transfer_plan),
}
#: Fields that may differ from an earlier command's, because fingerprints identify what they refer to.
_FINGERPRINTED = ("model", "task", "tickets", *DATA_OPTIONS)


class Named(Protocol):
    """A trial of any kind."""

    @property
    def id(self) -> str:
        """Name that is unique in its run and valid as a file name."""

    @property
    def seed(self) -> int:
        """Seed of all random numbers of the trial."""


class Store:
    """The output folder of a search, share or transfer.

    `config.json` identifies the run. `trials/` has a record of each finished trial, `failures/` of each failed one;
    `predictions/` has logits, `importance/`, `tickets/` and `models/` the files of these names, and `latency.json` the
    latencies. A record has the checksums of all files that its trial wrote. Use `Store.create` to run trials and
    `Store.read` to read results. Several processes may run trials of one folder, also on several machines that share
    it: each trial is claimed by one of them, in `claims/`, as long as that process lives.
    """

    def __init__(self, folder: Path, description: Record):
        self.folder = folder
        self.description = description

    @classmethod
    def create(cls, folder: str | Path, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> "Store":
        """Opens a folder to start, resume or extend a run.

        Args:
            folder: output folder; created if missing.
            identity: everything that the results depend on. It may have more seeds, levels and the like than the
                folder's identity, but must otherwise be equal.
            notes: information that results do not depend on, such as versions. An existing run keeps its notes.

        Raises:
            StoreError: the folder contains another run or other files, is corrupt, or cannot be written.
        """
        folder = user_path(folder, spelled("output"))
        wanted = json_identity(identity)
        try:
            make_folder(folder)
            _refuse_files_of_others(folder)
            with FileLock(folder / ".lock", mode=0o666, timeout=_PATIENCE):
                return cls._opened(folder, wanted, notes)
        except Timeout as error:
            raise StoreError(
                f"another process has held {folder}/.lock for {_PATIENCE} seconds: stop it, or choose another "
                f"{spelled('output')} folder"
            ) from error
        except OSError as error:
            raise store_error(folder, error) from error

    @classmethod
    def _opened(cls, folder: Path, wanted: Record, notes: Mapping[str, Any]) -> "Store":
        """Opens a folder that this process has locked."""
        # Of a process that was killed while it wrote them.
        _remove(folder.glob(".*.part"))
        description: Record = {"format": FORMAT, "identity": wanted, "notes": dict(notes)}
        changed = True
        if (folder / "config.json").exists():
            found = _read_description(folder)
            _refuse_another_search(folder, found["identity"], wanted)
            # The tasks of a share may be extended, so these notes are replaced.
            tasks = {"tasks": notes["tasks"]} if "tasks" in notes else {}
            description = {**found, "format": FORMAT, "identity": wanted, "notes": {**found["notes"], **tasks}}
            changed = description["identity"] != found["identity"]
        if changed:
            write_json(folder / "config.json", description)
        store = cls(folder, description)
        store.running()
        return store

    @classmethod
    def check(cls, folder: str | Path, identity: Mapping[str, Any]) -> None:
        """Checks that `create` would accept a folder, without locking or writing it.

        Args:
            folder, identity: see `create`.

        Raises:
            StoreError: the folder contains another run or other files, is corrupt, or is not a folder.
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
        """Opens a run's folder for reading, without locking it.

        Args:
            folder: output folder of a run.
            kind: required kind of run, a key of `KINDS`; None for any.

        Raises:
            InputError: the folder has no run of this kind.
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

    def claim(self, trial: Named) -> "Claim | None":
        """Claims a trial for this process, so that no other one runs it; a claim ends with its process.

        Args:
            trial: the trial.

        Returns:
            The claim, to be released when the trial has ended; None if another process has the trial.

        Raises:
            StoreError: the folder cannot be written.
        """
        path = self.claim_path(trial)
        try:
            make_folder(path.parent)
            lock = FileLock(path, mode=0o666)
            lock.acquire(timeout=0)
        except Timeout:
            return None
        except OSError as error:
            raise store_error(path, error) from error
        claim = Claim(lock)
        try:
            claim.note.write_text(json.dumps({"id": trial.id, "host": socket.gethostname(), "process": os.getpid()}))
            self.remove_leftovers(trial)
        except OSError as error:
            claim.release()
            raise store_error(path, error) from error
        return claim

    def claim_path(self, trial: Named) -> Path:
        """Returns the path of the lock that the process which runs a trial holds."""
        return self.folder / "claims" / f"{trial.id}.lock"

    def running(self) -> dict[str, str]:
        """Finds the trials that processes are running now, and removes what dead processes have left of their claims.

        Returns:
            Name of a trial -> where it runs: "process 123 on host".
        """
        found = {}
        for note in sorted((self.folder / "claims").glob("*.json")):
            lock = FileLock(note.with_suffix(".lock"), mode=0o666)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                content = _owner(note)
                found[content.get("id", note.stem)] = (
                    f"process {content.get('process', '?')} on {content.get('host', 'another machine')}"
                )
            # A folder that this user may only read.
            except OSError:
                continue
            else:
                with contextlib.suppress(OSError):
                    Claim(lock).release()
        return found

    def remove_leftovers(self, trial: Named) -> None:
        """Removes temporary files of a process that was killed while it wrote a trial, which this process has claimed.

        Folders stay: a folder of such a name may be an export in progress, and `clear_model` removes those of models.

        Args:
            trial: the trial.
        """
        for place in ("trials", "failures", "tickets"):
            _remove((self.folder / place).glob(f".{trial.id}.*.part"))
        _remove((self.folder / "predictions" / trial.id).glob(".*.part"))
        if getattr(trial, "kind", None) == "full":
            _remove((self.folder / "importance").glob(f".seed-{trial.seed}-*.part"))

    @property
    def kind(self) -> str:
        """Kind of the run, a key of `KINDS`."""
        return _kind(self.description["identity"])

    @property
    def config(self) -> Any:
        """Configuration of the run. `output` is the folder; `save_models` is True if it has models."""
        # What changes no result is no part of the identity: a later command may have asked for models.
        not_in_identity = {"output": str(self.folder), "save_models": (self.folder / "models").is_dir()}
        values = {**self.description["identity"]["config"], **not_in_identity}
        return KINDS[self.kind][0].from_dict(values)

    @functools.cached_property
    def _mark(self) -> str:
        """Digest that all records of the run share, even if seeds, levels or tasks are added later."""
        identity = self.description["identity"]
        parts = [_kind(identity), identity["model_fingerprint"]]
        if _kind(identity) != "share":
            parts.append(identity["task_fingerprint"])
        return hashlib.sha256(" ".join(map(str, parts)).encode()).hexdigest()

    @property
    def plan(self) -> list[Any]:
        """All trials of the run, finished and unfinished; without those that successive halving has made needless."""
        identity = self.description["identity"]
        trials = list(KINDS[self.kind][1](self.config, identity))
        if identity["config"].get("halving"):
            gone = dropped(trials, self.ended(trial for trial in trials if trial.kind == "winning"))
            trials = [trial for trial in trials if trial not in gone or self.record(trial) is not None]
        return trials

    def ended(self, trials: Iterable[Named]) -> dict[str, float | None]:
        """Reads how trials of a search have ended.

        Args:
            trials: of the search.

        Returns:
            Name -> score on the validation rows; None if the trial failed. Others are left out.
        """
        found: dict[str, float | None] = {}
        for trial in trials:
            if (record := self.record(trial)) is not None:
                found[trial.id] = record["score"]
            elif self.failure(trial) is not None:
                found[trial.id] = None
        return found

    def record_path(self, trial: Named) -> Path:
        """Returns the path of a trial's record."""
        return self.folder / f"trials/{trial.id}.json"

    def failure_path(self, trial: Named) -> Path:
        """Returns the path of a failed trial's error."""
        return self.folder / f"failures/{trial.id}.json"

    def ticket_path(self, trial: Named) -> Path:
        """Returns the path of a trial's ticket."""
        return self.folder / "tickets" / f"{trial.id}.safetensors"

    def importance_path(self, seed: int, way: str) -> Path:
        """Returns the path of the importance of a seed's full model. `way` is "pass" or "on_the_fly"."""
        return self.folder / "importance" / f"seed-{seed}-{way}.safetensors"

    def model_path(self, trial: Named) -> Path:
        """Returns the path of the folder of a trial's trained model."""
        return self.folder / "models" / trial.id

    def model(self, trial: Named) -> Path | None:
        """Finds a trial's trained model and verifies the checksum of every file.

        Args:
            trial: a trial of the run.

        Returns:
            The model's folder; None if the trial's model was not saved.

        Raises:
            StoreError: a file of the model is missing or was changed.
        """
        path = self.model_path(trial)
        if not path.is_dir():
            return None
        # Models take transformers, which reading a run without models need not load.
        from ticketops.models.checkpoint import NOTE, check_files
        from ticketops.models.shared import SharedModel

        notes = [note for note in (path / NOTE, path / SharedModel.NOTE) if self._sum(note, trial) is not None]
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
        """Returns True if a trial's trained model exists and is complete."""
        try:
            return self.model(trial) is not None
        except StoreError:
            return False

    def clear_model(self, trial: Named) -> Path:
        """Removes a trial's trained model, including temporary folders of a killed run.

        Args:
            trial: a trial of the run.

        Returns:
            Path of the model's folder, which does not exist now.
        """
        path = self.model_path(trial)
        for old in (path, *path.parent.glob(f".{path.name}.*.part")):
            shutil.rmtree(old, ignore_errors=True)
        return path

    def record(self, trial: Named) -> Record | None:
        """Reads a trial's record; None if the trial is unfinished.

        Raises:
            StoreError: the file is truncated, damaged, or of another trial.
        """
        from ticketops.searching import schema

        path = self.record_path(trial)
        record = _read(path, schema.RECORDS[self.kind], unsealed=False)
        if record is None:
            return None
        wanted = {"id": trial.id, "seed": trial.seed, "kind": getattr(trial, "kind", None)}
        if wrong := [name for name, value in wanted.items() if record[name] != value]:
            raise StoreError(f"the record {path} is of {wrong[0]} {record[wrong[0]]!r:.100}: {REMEDY}")
        if record.get("run", self._mark) != self._mark:
            raise StoreError(f"the record {path} is of another run's model or data: {REMEDY}")
        return record

    def records(self) -> list[Record]:
        """Reads the records of all finished trials, in the order of the plan."""
        return [record for trial in self.plan if (record := self.record(trial)) is not None]

    def write_record(self, trial: Named, record: Record, files: Iterable[Path] = ()) -> None:
        """Writes a trial's record, which marks the trial as finished.

        Args:
            trial: the trial.
            record: fields of the record, as JSON values.
            files: files in the run's folder that the trial wrote, other than its ticket and model. Their checksums are
                added to the record.
        """
        from ticketops.models.checkpoint import NOTE
        from ticketops.models.shared import SharedModel

        model = self.model_path(trial)
        # The record's "predictions" have their checksums already.
        paths = {*files, self.ticket_path(trial), model / NOTE, model / SharedModel.NOTE}
        sums = {str(path.relative_to(self.folder)): sha256(path) for path in sorted(paths) if path.is_file()}
        write_json(self.record_path(trial), {**record, "run": self._mark, "files": sums})
        try:
            self.failure_path(trial).unlink(missing_ok=True)
        except OSError as error:
            raise store_error(self.failure_path(trial), error) from error

    def discard_record(self, trial: Named) -> None:
        """Removes the record of a trial that has to train again, if it has one."""
        try:
            self.record_path(trial).unlink(missing_ok=True)
        except OSError as error:
            raise store_error(self.record_path(trial), error) from error

    def write_predictions(self, trial: Named, predictions: Mapping[str, np.ndarray]) -> Record:
        """Writes the predictions of a trial's model, one .npy file per split.

        Args:
            trial: the trial.
            predictions: split, in a share "TASK.split", e.g. "sst2.validation" -> logits [rows, labels]; and with
                `ROWS` behind it what each row contributes to the metric.

        Returns:
            The same keys -> path in the run's folder and SHA-256, for the trial's record.
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
        """Reads the predictions of a finished trial's model.

        Returns:
            Arrays by the keys of `write_predictions`; empty if an earlier version of ticketops wrote the record without
            predictions. None if the trial is unfinished or a file is missing.

        Raises:
            StoreError: a file does not have the checksum in the record.
        """
        record = self.record(trial)
        if record is None:
            return None
        found = {name: self._array(trial.id, name, kept) for name, kept in record.get("predictions", {}).items()}
        known = {name: array for name, array in found.items() if array is not None}
        return known if len(known) == len(found) else None

    def row_results(self, record: Record, split: str) -> np.ndarray | None:
        """Reads what each row contributes to the metric of a trial: one of the forms in `resampling`.

        Args:
            record: record of the trial.
            split: "validation" or "report"; in a share "TASK.validation".

        Returns:
            Array [rows, ...]; None if the record has none or the file is missing.

        Raises:
            StoreError: the file does not have the checksum in the record.
        """
        kept = record.get("predictions", {}).get(split + ROWS)
        return None if kept is None else self._array(record["id"], split + ROWS, kept)

    def _array(self, trial: str, name: str, kept: Record) -> np.ndarray | None:
        """Reads an array of a trial; None if its file is missing."""
        path = self.folder / f"predictions/{trial}/{name}.npy"
        try:
            content = read_bytes(path)
            if hashlib.sha256(content).hexdigest() != kept["sha256"]:
                raise StoreError(f"{path} is truncated or damaged: {REMEDY}")
            # Behind the magic string, the version of the format and the header's length comes the header.
            start = 10 + int.from_bytes(content[8:10], "little")
            shape, fortran, dtype = _array_header(content[:start])
            numbers = np.frombuffer(content, dtype, offset=start)
            array = numbers.reshape(shape, order="F" if fortran else "C").copy(order="K")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(f"cannot read {path} ({error.strerror}): {REMEDY}") from error
        # Its checksum is the record's, and whoever forged that may have forged this.
        except (ValueError, EOFError, MemoryError) as error:
            raise StoreError(f"{path} holds no numbers: {REMEDY}") from error
        return array

    def failure(self, trial: Named) -> Record | None:
        """Reads why a trial failed when it last ran; None if it did not fail.

        Returns:
            Its "id", "seed", "error" and "environment".

        Raises:
            StoreError: the file is truncated or damaged.
        """
        from ticketops.searching import schema

        return None if self.record_path(trial).exists() else _read(self.failure_path(trial), schema.Failure)

    def failures(self) -> list[Record]:
        """Reads the failures of all failed trials, in the order of the plan."""
        return [failure for trial in self.plan if (failure := self.failure(trial)) is not None]

    def write_failure(self, trial: Named, reason: str, trace: str = "") -> None:
        """Writes why a trial failed. The next command runs the trial again.

        Args:
            trial: the trial.
            reason: one line.
            trace: where the error happened; empty where the reason says all.
        """
        from ticketops.searching import environment

        content = {"id": trial.id, "seed": trial.seed, "error": reason, "environment": environment.circumstances()}
        content |= {"trace": trace} if trace else {}
        write_json(self.failure_path(trial), content)

    def importance(self, seed: int, way: str, trial: Named | None = None) -> "Importance | None":
        """Reads the importance of a seed's full model; None if it was not scored yet.

        Args:
            seed: seed of the full model.
            way: "pass" or "on_the_fly".
            trial: trial that scored it; the file is then compared with the checksum in its record.

        Raises:
            StoreError: the file is damaged, or has another checksum.
        """
        path = self.importance_path(seed, way)
        if not path.exists():
            return None
        importance: Importance = _load("Importance", path)
        if trial is not None:
            self._compare(path, trial)
        return importance

    def write_importance(self, seed: int, way: str, importance: "Importance") -> None:
        """Writes the importance of a seed's full model."""
        _save(importance, self.importance_path(seed, way))

    def facts(self, name: str) -> Record | None:
        """Reads a JSON file of the run that belongs to no trial; None if it does not exist yet.

        Args:
            name: name of the file.

        Raises:
            StoreError: the file is truncated or damaged.
        """
        from ticketops.searching import schema

        kinds = {LATENCIES: schema.Latencies, SCORES: schema.Single, SINGLE: dict[str, schema.Single]}
        return _read(self.folder / name, kinds[name])

    def write_facts(self, name: str, facts: Mapping[str, Any]) -> None:
        """Writes a JSON file of the run that belongs to no trial.

        Args:
            name: name of the file.
            facts: content of the file.
        """
        write_json(self.folder / name, facts)

    def latencies(self) -> Record | None:
        """Reads the latencies of full model and super ticket; None if the search is unfinished.

        Raises:
            StoreError: the file is truncated or damaged.
        """
        return self.facts(LATENCIES)

    def write_latencies(self, latencies: Mapping[str, Any]) -> None:
        """Writes the latencies of full model and super ticket."""
        self.write_facts(LATENCIES, latencies)

    def ticket(self, trial: Named) -> "Ticket | None":
        """Reads a trial's ticket; None if it was not drawn yet.

        Raises:
            StoreError: the file is damaged, or does not have the checksum in the trial's record.
        """
        path = self.ticket_path(trial)
        if not path.exists():
            return None
        ticket: Ticket = _load("Ticket", path)
        self._compare(path, trial)
        return ticket

    def tickets(self, kind: str, sparsity: float) -> "dict[int, Ticket]":
        """Reads the tickets of one level's finished trials, by seed."""
        trials = [trial for trial in self.plan if (trial.kind, trial.sparsity) == (kind, sparsity)]
        found = {trial.seed: self.ticket(trial) for trial in trials if self.record_path(trial).exists()}
        return {seed: ticket for seed, ticket in found.items() if ticket is not None}

    def keep_ticket(self, trial: Named, ticket: "Ticket", finished: bool = False) -> bool:
        """Writes a trial's ticket, unless the trial is finished and has one.

        Args:
            trial: the trial.
            ticket: ticket drawn from the current importance.
            finished: True if the trial is finished. It then keeps the ticket that it was trained with. (`ticket` can
                differ from it if the importance was scored again on another machine.)

        Returns:
            True if the trial can stay finished; False if its ticket was lost and `ticket` is a different one.
        """
        found, path = self.ticket(trial), self.ticket_path(trial)
        if finished and found is not None:
            return True
        if found != ticket:
            _save(ticket, path)
        expected = self._sum(path, trial) if finished else None
        return expected is None or sha256(path) == expected

    def _sum(self, path: Path, trial: Named) -> str | None:
        """Returns the checksum of a file in a trial's record; None if there is none."""
        name = str(path.relative_to(self.folder))
        # A task's ticket is not a trial; the records of the trials that use it have its checksum.
        records = [self.record(trial)] if hasattr(trial, "kind") else self.records()
        found = (record["files"][name] for record in records if record and name in record.get("files", {}))
        return next(found, None)

    def _compare(self, path: Path, trial: Named, remedy: str = REMEDY) -> None:
        """Compares a file of a finished trial with the checksum in its record."""
        expected = self._sum(path, trial)
        try:
            if expected is not None and sha256(path) != expected:
                raise StoreError(f"{path} was changed or damaged after it was written: {remedy}")
        except OSError as error:
            raise StoreError(f"{path} cannot be read ({error.strerror}): {remedy}") from error


def extended(config: AnyConfig) -> AnyConfig:
    """Adds the seeds, levels and the like of an existing output folder to a run's configuration.

    Args:
        config: configuration of a new or existing run.

    Returns:
        The extended configuration; for a new run `config` itself. Other fields are not compared: `Store.create` does.

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
    # Unlike other files it must not be deleted: the records are useless without it.
    return f"restore it, or choose another {spelled('output')} folder"


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        if path.is_file():
            path.unlink(missing_ok=True)


def _owner(note: Path) -> Record:
    """What a process has written of itself beside its claim; empty where it has not yet, or no longer."""
    try:
        content = json.loads(note.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Claim:
    """A trial that this process runs and no other may.

    Args:
        lock: lock of the trial's file, held. The operating system releases it when the process ends.
    """

    def __init__(self, lock: FileLock):
        self._lock = lock
        #: File that says who holds the lock.
        self.note = Path(lock.lock_file).with_suffix(".json")

    def release(self) -> None:
        """Ends the claim, and removes its files."""
        try:
            # While the lock is held: another process that opens the file afterwards makes a new one, and finds the
            # trial's record before it trains.
            self.note.unlink(missing_ok=True)
            Path(self._lock.lock_file).unlink(missing_ok=True)
        finally:
            self._lock.release()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@functools.lru_cache(maxsize=64)
def _array_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Parses the start of a .npy file. Most files of a run start with the same, and parsing takes longer than reading.

    Raises:
        ValueError: it is no .npy file of the format that `np.save` writes.
    """
    file = io.BytesIO(header)
    if np.lib.format.read_magic(file) != (1, 0):
        raise ValueError("the version of the format is another one")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject:
        raise ValueError("it holds objects")
    return shape, fortran, dtype


def _save(thing: "Importance | Ticket", path: Path) -> None:
    try:
        thing.save(path)
    except OSError as error:
        raise store_error(path, error) from error


def _load(kind: Literal["Importance", "Ticket"], path: Path) -> Any:
    # These take torch, which runs without such files are read without.
    from ticketops import tickets

    try:
        return getattr(tickets, kind).load(path)
    except InputError as error:
        raise StoreError(f"{path} is truncated or damaged: {REMEDY}") from error


def _read(path: Path, kind: Any, remedy: str = REMEDY, unsealed: bool = True) -> Record | None:
    """Reads a JSON file of a run and validates its type; None if it does not exist."""
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
    # Required fields of other kinds of runs, which the type `Identity` cannot express.
    needed = {"share": ("tickets",), "transfer": ("source", "source_fingerprint")}.get(_kind(identity), ())
    try:
        if lacking := [name for name in needed if name not in identity]:
            raise InputError(f"the identity has no {lacking[0]}")
        tasks = description["notes"].get("tasks", {})
        known = {
            "share": len(tasks) == len(identity["config"].get("tasks", ())),
            "transfer": {"source", "target"} <= {*tasks},
        }
        if not known.get(_kind(identity), True):
            raise InputError("the notes are of other tasks")
        # Fields that were added after the folder was written get their defaults.
        training = identity.get("training", FORMAT_1_TRAINING.get(identity["config"].get("recipe", ""), {}))
        identity["training"], moved = without_options(training)
        identity["config"] = _filled(kind, {**moved, **identity["config"]})
        if "source" in identity:
            identity["source"] = _filled(SearchConfig, {**moved, **identity["source"]})
        # Earlier versions stored one digest of all records of the source, whatever seeds the run has; drop it.
        if isinstance(identity.get("source_results"), str):
            del identity["source_results"]
        plan(kind.from_dict(identity["config"]), identity)
    except TicketopsError as error:
        raise StoreError(
            f"{path} is damaged or of a later version of ticketops ({error}): {_config_remedy()}"
        ) from error
    return description


def _filled(kind: type[Config], values: Mapping[str, Any]) -> Record:
    return json_identity(kind.from_dict(values).decided())


def _kind(identity: Mapping[str, Any]) -> str:
    return str(identity.get("kind", "search"))


def _refuse_files_of_others(folder: Path) -> None:
    others = [name for name in sorted(os.listdir(folder)) if name != ".lock"]
    # A run that is killed in its first write leaves a temporary file; ignore it.
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
        fields = "; ".join(
            f"{name} is {shown(old)} there and {shown(new)} here" for name, (old, new) in differing.items()
        )
        raise StoreError(
            f"{folder} holds another {_kind(stored)} ({fields}): choose another {spelled('output')} folder, or the "
            "same values"
        )


def _differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], additive: Iterable[str]) -> dict[str, Any]:
    """Returns name -> (old, new) value of the fields that differ and affect finished results."""
    return {
        name: (old, wanted[name])
        for name, old in stored.items()
        if name not in _FINGERPRINTED
        and old != wanted[name]
        and not (name in additive and (isinstance(old, bool) or (isinstance(old, list) and _holds(old, wanted[name]))))
    }


def _holds(old: Any, new: Any) -> bool:
    """True if a value contains all of an older one, so that it only adds to it."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        return all(name in new and _holds(value, new[name]) for name, value in old.items())
    if isinstance(old, list) and isinstance(new, list):
        return all(value in new for value in old)
    return bool(old == new)
