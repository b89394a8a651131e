import shutil
from pathlib import Path
from typing import Any

import pytest

from ticketops.errors import StoreError
from ticketops.models import load
from ticketops.reporting import report
from ticketops.searching import Listener, SearchConfig, SearchResult, Setting, Store, run_search
from ticketops.searching.release import release

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
    return run_search(config)


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
        assert predictions.keys() == record["predictions"].keys() == {"validation"}
        assert record["rows"] == {"validation": len(labels)} == {"validation": len(predictions["validation"])}
        assert setting.task.compute(predictions["validation"], labels) == record["scores"]["validation"]
        assert (found.folder / record["predictions"]["validation"]["file"]).is_file()


def test_a_finished_search_runs_nothing_again(found: SearchResult):
    heard = Heard()
    assert run_search(found.config, heard).records == found.records
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
    again = run_search(found.config, heard)
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
    found = run_search(SearchConfig(**fields, prune_neurons=True, save_models=True))
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
