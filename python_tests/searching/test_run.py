import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ticketops
from ticketops.cli import app
from ticketops.errors import StoreError, TrialError
from ticketops.models import load
from ticketops.reporting import SearchResult, read, report
from ticketops.searching import Listener, SearchConfig, Setting, Store, environment, run_search
from ticketops.searching import run as running
from ticketops.searching.release import release
from ticketops.searching.trial import run_trial

from .test_trial import reproducible
from .tiny import FIELDS


class Heard(Listener):
    """Writes down which trials ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def finished(self, trial: Any, record: Any) -> None:
        self.ran.append(trial.id)


@pytest.fixture(scope="module")
def found(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> SearchResult:
    folder = tmp_path_factory.mktemp("search") / "run"
    config = SearchConfig(**inputs, **FIELDS, seeds=2, importance="both", save_models=True, output=str(folder))
    return read(run_search(config))


def test_a_search_finds_a_super_ticket_and_its_gain(found: SearchResult):
    assert len(found.records) == 2 * 4
    assert found.super_level is not None
    assert set(found.tickets) == {0, 1}
    assert found.super_ticket in found.tickets.values()
    full = {r["seed"]: r["score"] for r in found.records if r["kind"] == "full"}
    gains = [found.super_level.scores[seed] - full[seed] for seed in (0, 1)]
    assert found.gain.mean == pytest.approx(sum(gains) / 2)
    # Exports are read by what the task calls its labels.
    model = load(Store.read(found.folder).model_path(Store.read(found.folder).plan[0]))
    assert model.config.id2label == {0: "0", 1: "1"}
    assert model.config.label2id == {"0": 0, "1": 1}
    # Each seed has its own importance, and so its own tickets.
    store = Store.read(found.folder)
    assert store.importance(0, "pass") != store.importance(1, "pass")
    assert store.importance(0, "on_the_fly") is not None


def test_levels_are_nested_and_tickets_carry_where_they_come_from(found: SearchResult):
    store = Store.read(found.folder)
    sparse, dense = (store.tickets("winning", level)[1] for level in (0.5, 0.25))
    assert sparse & dense == sparse
    assert sparse.metadata["sparsity"] == 0.5
    assert sparse.metadata["trial_seed"] == 1


def test_models_are_kept_with_their_ticket(found: SearchResult):
    folders = sorted(path.name for path in (found.folder / "models").iterdir())
    assert folders == sorted(record["id"] for record in found.records)
    assert (found.folder / "models" / "winning-0.5-seed-0" / "ticket.safetensors").is_file()
    assert (found.folder / "models" / "winning-0.5-seed-0" / "model.safetensors").is_file()


def test_each_trials_predictions_are_kept_and_give_its_scores(found: SearchResult, setting: Setting):
    store = Store.read(found.folder)
    labels = setting.splits["validation"]["labels"]
    for trial, record in zip(store.plan, found.records, strict=True):
        predictions = store.predictions(trial)
        assert predictions is not None
        assert predictions.keys() == record["predictions"].keys() == {"validation", "validation-rows"}
        assert record["rows"] == {"validation": len(labels)} == {"validation": len(predictions["validation"])}
        assert setting.task.compute(predictions["validation"], labels) == record["scores"]["validation"]
        assert (found.folder / record["predictions"]["validation"]["file"]).is_file()
        right = predictions["validation-rows"]
        assert (right == np.stack([labels, predictions["validation"].argmax(axis=1)], axis=1)).all()
        assert (right == store.row_results(record, "validation")).all()
        assert "halves" not in record


def test_a_finished_search_runs_nothing_again(found: SearchResult):
    heard = Heard()
    assert read(run_search(found.config, heard)).records == found.records
    assert heard.ran == []


def test_what_is_deleted_is_made_again_alike(found: SearchResult):
    store = Store.read(found.folder)
    full, winning = store.plan[:2]
    store.importance_path(0, "pass").unlink()
    store.record_path(winning).unlink()
    store.ticket_path(winning).unlink()
    other = store.plan[-1]
    shutil.rmtree(store.model_path(other))
    heard = Heard()
    again = read(run_search(found.config, heard))
    assert heard.ran == [full.id, winning.id, other.id]
    assert (store.model_path(other) / "model.safetensors").is_file()
    assert list(map(reproducible, again.records)) == list(map(reproducible, found.records))


def test_a_damaged_record_is_reported_before_anything_runs(found: SearchResult):
    store = Store.read(found.folder)
    path = store.record_path(store.plan[-1])
    whole = path.read_text()
    path.write_text(whole[:50])
    heard = Heard()
    with pytest.raises(StoreError, match=str(path)):
        run_search(found.config, heard)
    path.write_text(whole)
    assert heard.ran == []


def test_a_search_for_neurons(inputs: dict[str, str], tmp_path: Path):
    fields = {**inputs, **FIELDS, "kinds": "winning", "output": str(tmp_path / "run"), "importance": "both"}
    found = read(run_search(SearchConfig(**fields, prune_neurons=True, save_models=True)))
    ticket, level = found.super_ticket, found.super_level
    assert ticket is not None
    assert level is not None
    assert ticket.neurons_pruned + 64 * ticket.ffns_pruned == int(128 * level.sparsity)
    assert level.neurons_pruned == ticket.neurons_pruned
    assert found.records[-1]["weights_remaining"] < 1
    text = report(found.folder).read_text()
    assert f"and {level.neurons_pruned:,} neurons pruned" in text
    assert "| ms for a batch of 32 x 32 tokens |" in text
    folder = release(found.folder, tmp_path / "small")
    left = load(folder)
    record = next(r for r in found.records if r["kind"] == "winning" and r["sparsity"] == level.sparsity)
    assert sum(parameter.numel() for parameter in left.parameters()) == record["costs"]["left"]["parameters"]


def test_a_diverging_trial_is_told_and_tried_again_and_the_others_go_on(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fields = {**inputs, **FIELDS, "epochs": 1, "seeds": 2, "kinds": "winning", "sparsities": "0.5"}
    config = SearchConfig(**fields, output=str(tmp_path / "run"))

    def diverging(setting: Any, trial: Any, *arguments: Any) -> Any:
        if trial.id == "full-seed-1":
            raise TrialError("training diverged in trial full-seed-1 (loss nan): lower --learning-rate, now 0.01")
        return run_trial(setting, trial, *arguments)

    monkeypatch.setattr(running, "run_trial", diverging)
    words = [f"--{name.replace('_', '-')}={value}" for name, value in fields.items()]
    done = CliRunner().invoke(app, ["search", *words, "--output", config.output], env={"COLUMNS": "500"})
    assert done.exit_code == 1
    assert "2 trials failed, the first full-seed-1: training diverged" in done.output
    assert "the same command tries again" in done.output
    store = Store.read(config.output)
    assert [record["id"] for record in store.records()] == ["full-seed-0", "winning-0.5-seed-0"]
    reasons = {failure["id"]: failure["error"] for failure in store.failures()}
    assert "which failed" in reasons["winning-0.5-seed-1"]
    assert "**Failed:** 2 trials (full-seed-1, winning-0.5-seed-1)" in report(config.output).read_text()
    monkeypatch.undo()
    # By now with another number of threads.
    machine = environment.machine()
    monkeypatch.setattr(environment, "machine", lambda: {**machine, "threads": 77})
    heard = Heard()
    again = read(run_search(config, heard))
    assert heard.ran == ["full-seed-1", "winning-0.5-seed-1"]
    assert again.failures == []
    text = report(config.output).read_text()
    assert "**Failed:**" not in text
    assert "**Mixed:** the trials ran with different threads (" in text
    assert "77: 2 trials)" in text


def test_a_run_of_which_every_trial_fails_says_why(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(running, "run_trial", full)
    with pytest.raises(TrialError, match=r"all 4 trials failed; full-seed-0: CUDA out of memory. Tried"):
        run_search(SearchConfig(**inputs, **FIELDS, output=str(tmp_path / "run")))


def test_a_lost_model_is_trained_again_elsewhere_and_nothing_is_wedged(
    found: SearchResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = tmp_path / "run"
    shutil.copytree(found.folder, folder)
    config = dataclasses.replace(found.config, output=str(folder))
    store = Store.read(folder)
    full = store.plan[0]
    before = store.importance(0, "pass")
    (store.model_path(full) / "model.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"model.safetensors was changed .*run the same again with save_models"):
        release(folder, tmp_path / "small", trial=full.id)

    def elsewhere(*arguments: Any) -> Any:
        outcome = run_trial(*arguments)
        # As another backend would score it.
        other = {way: store.importance(1, way) for way in outcome.importance}
        return dataclasses.replace(outcome, importance=other)

    monkeypatch.setattr(running, "run_trial", elsewhere)
    heard = Heard()
    again = read(run_search(config, heard))
    assert heard.ran == [full.id]
    assert store.importance(0, "pass", full) == before
    assert [record["id"] for record in again.records] == [record["id"] for record in found.records]
    assert store.has_model(full)


def test_what_a_run_keeps_follows_the_umask(found: SearchResult):
    umask = os.umask(0)
    os.umask(umask)
    for path in found.folder.rglob("*"):
        if path.name != ".lock":
            assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


def test_a_search_returns_what_is_read_from_its_folder(found: SearchResult, tmp_path: Path):
    folder = shutil.copytree(found.folder, tmp_path / "run")
    searched = ticketops.search(dataclasses.replace(found.config, output=str(folder)))
    assert searched == ticketops.read(folder)
    assert searched.report_path == folder / "report.md"
    assert list(map(reproducible, searched.records)) == list(map(reproducible, found.records))
