import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError

from ticketops.errors import InputError, StoreError
from ticketops.files import new_folder
from ticketops.searching import SearchConfig, Store
from ticketops.searching.recipes import training
from ticketops.searching.store import extended
from ticketops.tickets import Importance, prune

CONFIG = SearchConfig(sparsities="0.5", kinds="winning")


def identity(config: SearchConfig = CONFIG, **fields: object) -> dict:
    values = {name: value for name, value in config.to_dict().items() if name not in ("output", "save_models")}
    return {"config": values, "task_fingerprint": "t", "model_fingerprint": "m", "layers": 2, "heads": 4, **fields}


NOTES = {"versions": {"python": "3"}, "machine": {"device": "cpu"}}


@pytest.fixture
def store(tmp_path: Path):
    return Store.create(tmp_path / "run", identity(), NOTES)


def record(trial: Any, **fields: object) -> dict[str, Any]:
    return {
        "id": trial.id, "kind": trial.kind, "seed": trial.seed, "sparsity": trial.sparsity, "task": "t", "model": "m",
        "metric": "accuracy", "score": 0.1 + 0.2, "report_score": None, "scores": {"validation": {"accuracy": 0.3}},
        "majority": 0.5, "predictions_sha256": "f00d", "heads_pruned": 0, "ffns_pruned": 0, "weights_remaining": 1.0,
        "weights_remaining_encoder": 1.0, "train_loss": 0.5, "steps": 3, "timing": {"train_seconds": 0.1}, **fields,
    }  # fmt: skip


def importance(seed: int) -> Importance:
    scores = Importance(2, 4)
    generator = torch.Generator().manual_seed(seed)
    for layer in range(2):
        scores.add_head(layer, torch.randn(3, 4, generator=generator), None)
        scores.add_ffn(layer, torch.randn(3, generator=generator), None)
    return scores


def test_what_is_written_is_read_back(store: Store):
    full, winning = store.plan
    assert store.record(full) is None
    assert store.importance(0, "pass") is None
    store.write_importance(0, "pass", importance(0))
    store.write_record(full, record(full))
    ticket = prune(importance(0), counts=(4, 1))
    store.keep_ticket(winning, ticket)
    again = Store.read(store.folder)
    assert again.config == SearchConfig.from_dict({**CONFIG.to_dict(), "output": str(store.folder)})
    assert again.records() == [record(full, run=again.records()[0]["run"], files={})]
    assert again.importance(0, "pass") == importance(0)
    assert again.ticket(winning) == ticket


def test_another_search_is_refused_with_flag_and_both_values(store: Store):
    other = SearchConfig(sparsities="0.5", kinds="winning", epochs=7, seeds=3)
    with pytest.raises(StoreError, match=r"another search \(epochs is 1 there and 7 here\)"):
        Store.create(store.folder, identity(other), NOTES)
    with pytest.raises(StoreError, match="task fingerprint is 't' there and 'u' here"):
        Store.create(store.folder, identity(task_fingerprint="u"), NOTES)
    with pytest.raises(StoreError, match="training optimizer is 'adamw' there and 'adamax' here"):
        Store.create(store.folder, identity(training={**training("demo"), "optimizer": "adamax"}), NOTES)
    Store.create(store.folder, identity(), NOTES)


def test_seeds_levels_and_kinds_are_added_and_none_is_lost(store: Store):
    store.write_record(store.plan[0], record(store.plan[0]))
    more = SearchConfig(sparsities="0.25", kinds="random@0.25", seeds="1,", output=str(store.folder))
    both = extended(more)
    assert (both.seeds, both.sparsities, both.kinds) == ((0, 1), (0.25, 0.5), ("winning", "random@0.25"))
    again = Store.create(store.folder, identity(both), {**NOTES, "versions": {}})
    assert len(again.plan) == 2 * 4
    assert [found["id"] for found in again.records()] == ["full-seed-0"]
    assert again.description["notes"] == NOTES
    assert Store.read(store.folder).config.seeds == (0, 1)
    # What the folder has beside the command's stays, so fewer are no less.
    assert extended(SearchConfig(**{**CONFIG.to_dict(), "output": str(store.folder)})) == both
    with pytest.raises(StoreError, match=r"seeds is \[0, 1\] there and \[0\] here"):
        Store.create(store.folder, identity(), NOTES)


def test_a_moved_model_or_task_is_the_same_where_its_content_is(store: Store):
    moved = SearchConfig(**{**CONFIG.to_dict(), "model": "/elsewhere/model", "task": "demo"})
    Store.create(store.folder, identity(moved), NOTES)
    assert Store.read(store.folder).config.model == "/elsewhere/model"


def test_a_trial_is_run_by_one_process_and_a_killed_one_does_not_block(store: Store):
    code = (
        "import os, signal, sys\n"
        "from ticketops.searching import Store\n"
        "store = Store.read(sys.argv[1])\n"
        "claim = store.claim(store.plan[0])\n"
        "print('claimed', flush=True)\n"
        "os.kill(os.getpid(), signal.SIGSTOP)\n"
    )
    trial, another = store.plan[:2]
    with subprocess.Popen([sys.executable, "-c", code, str(store.folder)], stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"claimed\n"
        assert store.claim(trial) is None
        # Others may run the rest, also as another command on the same folder.
        with Store.create(store.folder, identity(), NOTES).claim(another):
            running = {trial.id: other.pid, another.id: os.getpid()}
            assert store.running() == {
                name: f"process {process} on {socket.gethostname()}" for name, process in running.items()
            }
            assert store.claim(another) is None
        assert list(store.running()) == [trial.id]
        other.kill()
    assert store.running() == {}
    with store.claim(trial):
        pass
    assert list((store.folder / "claims").iterdir()) == []


def test_a_folder_that_somebody_keeps_locked_is_named(store: Store, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ticketops.searching.store._PATIENCE", 0.1)
    with FileLock(store.folder / ".lock"), pytest.raises(StoreError, match=f"has held {store.folder}/.lock"):
        Store.create(store.folder, identity(), NOTES)


def test_a_folder_of_other_files_is_refused_and_left_alone(tmp_path: Path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match=r"'thesis.tex' and is no ticketops folder"):
        Store.create(tmp_path, identity(), NOTES)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_leftovers_of_a_killed_write_do_not_block(tmp_path: Path):
    (tmp_path / ".config.json.abc.part").write_text("{")
    Store.create(tmp_path, identity(), NOTES)
    store = Store.create(tmp_path, identity(), NOTES)
    assert not list(tmp_path.rglob(".*.part"))
    trial = store.plan[0]
    leftovers = [
        store.record_path(trial).with_name(f".{trial.id}.json.abc.part"),
        store.ticket_path(trial).with_name(f".{trial.id}.safetensors.abc.part"),
        tmp_path / "predictions" / trial.id / ".validation.npy.abc.part",
        tmp_path / "importance" / ".seed-0-pass.safetensors.abc.part",
    ]
    for path in leftovers:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{")
    # Perhaps another process is writing them.
    Store.create(tmp_path, identity(), NOTES)
    assert all(path.exists() for path in leftovers)
    with store.claim(trial):
        assert not any(path.exists() for path in leftovers)


def test_an_export_into_a_runs_folder_is_neither_disturbed_nor_in_the_way(store: Store):
    with new_folder(store.folder / "small") as temporary:
        (temporary / ".model.part").write_text("weights")
        Store.create(store.folder, identity(), NOTES)
        assert (temporary / ".model.part").exists()


def test_a_leftover_that_cannot_be_removed_is_refused(store: Store, monkeypatch: pytest.MonkeyPatch):
    (store.folder / ".report.md.abc.part").write_text("")

    def refuse(_: Path, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "unlink", refuse)
    with pytest.raises(StoreError, match="permission denied"):
        Store.create(store.folder, identity(), NOTES)


@pytest.mark.parametrize(
    "damage", [lambda text: text[: len(text) // 2], lambda text: text.replace("0.8", "0.9"), lambda _: ""]
)
def test_a_damaged_record_names_the_file_and_the_remedy(store: Store, damage: Callable[[str], str]):
    full = store.plan[0]
    store.write_record(full, record(full, score=0.8))
    path = store.record_path(full)
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError, match=f"{path}.*delete it and run the same command again"):
        store.records()
    path.unlink()
    assert store.records() == []


def test_a_record_under_another_trials_name_is_refused(store: Store):
    full, winning = store.plan
    store.write_record(full, record(full))
    store.record_path(full).rename(store.record_path(winning))
    with pytest.raises(StoreError, match="full-seed-0"):
        store.record(winning)


def test_a_record_of_another_run_is_refused(store: Store, tmp_path: Path):
    full = store.plan[0]
    other = Store.create(tmp_path / "other", identity(task_fingerprint="u"), NOTES)
    other.write_record(full, record(full))
    path = store.record_path(full)
    path.parent.mkdir()
    path.write_bytes(other.record_path(full).read_bytes())
    with pytest.raises(StoreError, match=f"{path} is of another run's model or data: delete it"):
        store.records()


def test_damaged_tickets_and_importance_name_the_file_and_the_remedy(store: Store):
    winning = store.plan[1]
    store.write_importance(0, "pass", importance(0))
    store.keep_ticket(winning, prune(importance(0), counts=(4, 1)))
    for path in (store.ticket_path(winning), store.importance_path(0, "pass")):
        path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match=r"winning-0.5-seed-0.safetensors.*delete it"):
        store.ticket(winning)
    with pytest.raises(StoreError, match=r"seed-0-pass.safetensors.*delete it"):
        store.importance(0, "pass")


def test_a_finished_trial_keeps_its_ticket_and_another_one_is_noticed(store: Store):
    winning, path = store.plan[1], store.ticket_path(store.plan[1])
    ticket, other = prune(importance(0), counts=(4, 1)), prune(importance(0), counts=(4, 1), kind="losing")
    assert store.keep_ticket(winning, other)
    assert store.keep_ticket(winning, ticket)
    store.write_record(winning, record(winning))
    assert store.keep_ticket(winning, other, finished=True)
    assert store.ticket(winning) == ticket
    path.unlink()
    # Lost, and drawn alike or not.
    assert store.keep_ticket(winning, ticket, finished=True)
    path.unlink()
    assert not store.keep_ticket(winning, other, finished=True)
    with pytest.raises(StoreError, match=r"winning-0.5-seed-0.safetensors was changed .*: delete it and run"):
        store.ticket(winning)


def test_a_failed_trial_is_told_until_it_is_finished(store: Store):
    full = store.plan[0]
    store.write_failure(full, "training diverged")
    assert [(found["id"], found["error"]) for found in store.failures()] == [(full.id, "training diverged")]
    assert store.records() == []
    failure = store.failure_path(full).read_text()
    store.write_record(full, record(full))
    assert store.failures() == []
    # As after a power cut that lost the removal.
    store.failure_path(full).write_text(failure)
    assert store.failures() == []


@pytest.mark.parametrize(("code", "word"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only")])
def test_a_full_or_read_only_disk_loses_nothing(store: Store, monkeypatch: pytest.MonkeyPatch, code: int, word: str):
    full, winning = store.plan
    store.write_record(full, record(full))

    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match=word):
        store.write_record(winning, record(winning))
    with pytest.raises(StoreError, match=word):
        store.write_importance(0, "pass", importance(0))
    monkeypatch.undo()
    assert [record["id"] for record in store.records()] == [full.id]
    assert not list(store.folder.rglob("*.part"))


@pytest.mark.parametrize(
    ("reason", "words"),
    [("No space left on device (os error 28)", "the disk is full"), ("too long", ".*too long: choose")],
)
def test_a_model_that_cannot_be_written_is_told_as_any_other_file(tmp_path: Path, reason: str, words: str):
    with pytest.raises(StoreError, match=f"cannot write .*model: {words}"), new_folder(tmp_path / "model"):
        raise SafetensorError(f"Error while serializing: I/O error: {reason}")
    assert not list(tmp_path.iterdir())


def test_room_is_made_for_a_trials_model_and_for_no_other(store: Store):
    full, winning = store.plan
    models = store.model_path(full).parent
    for name in (full.id, f".{full.id}.abc.part", winning.id):
        (models / name / "inner").mkdir(parents=True)
    assert store.clear_model(full) == models / full.id
    assert [path.name for path in models.iterdir()] == [winning.id]


def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is in the way: choose another output"):
        Store.create(tmp_path / "file", identity(), NOTES)
    with pytest.raises(StoreError, match=r"not a folder|is a file"):
        Store.create(tmp_path / "file" / "run", identity(), NOTES)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="permission denied: choose another output"):
        Store.create(tmp_path / "run", identity(), NOTES)


def test_reading_what_is_no_store(tmp_path: Path):
    with pytest.raises(InputError, match="no ticketops folder"):
        Store.read(tmp_path)
    (tmp_path / "config.json").write_text('{"format": 1')
    with pytest.raises(StoreError, match="truncated or damaged: restore it, or choose another output"):
        Store.read(tmp_path)
    whole = {"format": 1, "identity": identity(), "notes": NOTES}
    lacking = {name: {key: value for key, value in identity().items() if key != name} for name in identity()}
    for damaged in (
        {"format": 99},
        {"format": 1, "identity": identity()},
        {**whole, "identity": identity() | {"config": []}},
        *({**whole, "identity": fields} for fields in lacking.values()),
    ):
        (tmp_path / "config.json").write_text(json.dumps(damaged))
        with pytest.raises(StoreError, match="is damaged"):
            Store.read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(whole))
    assert Store.read(tmp_path).kind == "search"


def test_predictions_are_named_by_the_record_and_checked_against_it(store: Store):
    trial = store.plan[0]
    logits = {"validation": np.float32([[0.5, -1.0], [2.0, 3.0]]), "report": np.float32([[1.0, 0.0]])}
    kept = store.write_predictions(trial, logits)
    assert store.predictions(trial) is None, "a trial without a record is not finished"
    # As versions of ticketops wrote it that kept no predictions.
    store.write_record(trial, record(trial))
    assert store.predictions(trial) == {}
    store.write_record(trial, record(trial, predictions=kept))
    found = store.predictions(trial)
    assert found is not None
    assert found.keys() == logits.keys()
    for name, expected in logits.items():
        np.testing.assert_array_equal(found[name], expected)
        np.testing.assert_array_equal(np.load(store.folder / kept[name]["file"]), expected)
    path = store.folder / kept["report"]["file"]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"{path} is truncated or damaged: delete it"):
        store.predictions(trial)
    path.unlink()
    assert store.predictions(trial) is None


@pytest.mark.parametrize("name", ["failures", "trials", "tickets", "importance", "predictions"])
def test_a_file_in_the_way_of_a_folder_is_said(store: Store, name: str):
    (store.folder / name).write_text("")

    def finish(trial: Any) -> None:
        store.write_importance(0, "pass", importance(0))
        store.keep_ticket(trial, prune(importance(0), 0.5))
        store.write_predictions(trial, {"validation": np.zeros((2, 2))})
        store.write_record(trial, record(trial))

    with pytest.raises(StoreError, match=rf"cannot write {store.folder / name}.*: choose another output folder"):
        finish(store.plan[1])


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir])
def test_what_never_ends_is_not_read_for_its_checksum(store: Store, make: Callable[[Path], Any]):
    trial = store.plan[0]
    kept = store.write_predictions(trial, {"validation": np.zeros((2, 2))})
    store.write_record(trial, record(trial, predictions=kept))
    path = store.folder / kept["validation"]["file"]
    path.unlink()
    make(path)
    with pytest.raises(StoreError, match=rf"cannot read {path} \(it is no regular file\): delete it"):
        store.predictions(trial)
