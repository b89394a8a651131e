"""`ticketops export` on a search's folder and on a model's."""

import json

import pytest
import torch
from bounds import roundings
from transformers import AutoModel, AutoModelForSequenceClassification
from typer.testing import CliRunner

import ticketops
from searching.tiny import FIELDS, make_model, make_task
from ticketops.cli import app
from ticketops.files import write_json
from ticketops.models import weight_counts
from ticketops.searching import SearchConfig, Store, run_search


@pytest.fixture(scope="module")
def search(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    fields = FIELDS | {
        "sparsities": "0.5",
        "kinds": "winning",
        "save_models": True,
        "epochs": 1,
        "report_fraction": 0.4,
    }
    model, task = make_model(folder / "model"), make_task(folder / "task")
    config = SearchConfig.from_dict(fields | {"model": str(model), "task": str(task), "output": str(folder / "run")})
    run_search(config)
    return folder / "run"


def invoke(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)], env={"COLUMNS": "120", "TERM": "dumb"})


@pytest.mark.parametrize("format", ["compact", "dense"])
def test_a_searchs_super_ticket_leaves(format, search, tmp_path):
    result = invoke(search, "--format", format, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "verified" in result.stdout
    note = json.loads((tmp_path / "out" / "ticketops.json").read_text())
    assert note["run"]["kind"] == "winning"
    assert note["run"]["config"]["sparsities"] == [0.5]
    record = json.loads((search / "trials" / "winning-0.5-seed-0.json").read_text())
    assert record["score"] != record["report_score"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| score | {record['report_score']} |\n| split | report |" in card
    assert f"| score that selected | {record['score']} |" in card
    assert f"| rows scored | {record['rows']['report']} |" in card
    assert (tmp_path / "out" / "tokenizer_config.json").exists()
    # An export is a model's folder itself; its ticket is found in it.
    again = invoke(tmp_path / "out", "--output", tmp_path / "again")
    assert again.exit_code == 0, again.output
    ids = {"input_ids": torch.tensor([[2, 5, 7, 3]])}
    models = [ticketops.load(tmp_path / name) for name in ("out", "again")]
    torch.testing.assert_close(models[0](**ids).logits, models[1](**ids).logits, **roundings(100))


def test_a_kept_model_loads_whole_and_patch_applies_its_ticket(search):
    folder = search / "models" / "winning-0.5-seed-0"
    for load in (ticketops.load, AutoModelForSequenceClassification.from_pretrained):
        with pytest.warns(UserWarning, match="saved with a ticket applied"):
            model = load(folder)
        counts = weight_counts(model)
        assert counts.encoder == weight_counts(AutoModel.from_pretrained(search.parent / "model")).encoder
        assert ticketops.patch(model).ticket == ticketops.Ticket.load(folder / "ticket.safetensors")


def test_a_run_is_exported_without_the_model_it_started_from(search, tmp_path):
    model = search.parent / "model"
    model.rename(tmp_path / "away")
    result = invoke(search, "--output", tmp_path / "out")
    (tmp_path / "away").rename(model)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    kept = search / "models" / "winning-0.5-seed-0"
    # The search's truncation is not the tokenizer's.
    assert (kept / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    # Models kept by earlier versions have no tokenizer of their own.
    (kept / "tokenizer_config.json").unlink()
    (kept / "ticketops.json").unlink()
    store = Store.read(search)
    trial = next(trial for trial in store.plan if trial.id == kept.name)
    record = store.record(trial)
    del record["files"]
    write_json(store.record_path(trial), record)
    assert invoke(search, "--output", tmp_path / "old").exit_code == 0
    assert (tmp_path / "old" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--trial", "seven"], 2, "no finished trial 'seven'"),
        (["--trial", "0"], 2, "use one of the ids in its results.csv (full-seed-0, winning-0.5-seed-0, ...)"),
        (["--ticket", "x.safetensors"], 2, "--ticket goes with a model's folder"),
    ],
)
def test_bad_requests_are_one_line(words, code, message, search, tmp_path):
    result = invoke(search, "--output", tmp_path / "out", *words)
    assert result.exit_code == code
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
