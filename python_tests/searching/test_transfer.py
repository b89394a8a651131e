import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.reporting import TransferResult, read
from ticketops.searching import Setting, Store, TransferConfig, run_transfer
from ticketops.searching.transfer import subset

from .test_run import Heard
from .test_trial import reproducible
from .tiny import make_task

#: A search of 2 trials, then 2 ladders: 4 trials on the target, 2 on the source.
FIELDS: dict[str, Any] = {
    "fractions": "0.25,1",
    "sparsities": "0.5",
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "max_length": 16,
    "train_rows": 32,
    "validation_rows": 20,
}


@pytest.fixture(scope="module")
def moved(inputs: dict[str, str], pairs: str, tmp_path_factory: pytest.TempPathFactory) -> TransferResult:
    folder = tmp_path_factory.mktemp("transfer") / "run"
    config = TransferConfig(
        model=inputs["model"],
        source=inputs["task"],
        target=pairs,
        head="fresh",
        min_steps=2,
        output=str(folder),
        **FIELDS,
    )
    return read(run_transfer(config))


def test_both_ladders_are_climbed(moved: TransferResult):
    assert [record["id"] for record in moved.records] == [
        "target-0.25-full-seed-0",
        "target-0.25-winning-seed-0",
        "source-0.25-full-seed-0",
        "source-0.25-winning-0.5-seed-0",
        "target-1-full-seed-0",
        "target-1-winning-seed-0",
    ]
    assert [record["train_rows"] for record in moved.records] == [8, 8, 8, 8, 32, 32]
    assert [record["steps"] for record in moved.records] == [2] * 6
    assert [record["metric"] for record in moved.records] == [
        *["pearson"] * 2, *["accuracy"] * 2, *["pearson"] * 2
    ]  # fmt: skip
    assert [record["heads_pruned"] for record in moved.records] == [0, 4, 0, 4, 0, 4]
    # The source's last rung is its search, whose models the target starts from.
    source = json.loads((moved.folder / "source.json").read_text())
    assert (source["train_rows"], source["scores"].keys()) == (32, {"full", "winning"})
    assert len(Store.read(moved.folder / "source", "search").records()) == 2


def test_a_finished_transfer_runs_nothing_again_and_what_is_deleted_is_made_alike(moved: TransferResult):
    heard = Heard()
    assert read(run_transfer(moved.config, heard)).records == moved.records
    assert heard.ran == []
    store = Store.read(moved.folder, "transfer")
    for trial in (store.plan[1], store.plan[3]):
        store.record_path(trial).unlink()
    store.importance_path(0, "pass-of-0.25").unlink()
    again = read(run_transfer(moved.config, heard))
    assert heard.ran == [
        "target-0.25-winning-seed-0", "source-0.25-full-seed-0", "source-0.25-winning-0.5-seed-0"
    ]  # fmt: skip
    assert list(map(reproducible, again.records)) == list(map(reproducible, moved.records))


def test_models_that_are_asked_for_later_are_made(moved: TransferResult):
    heard = Heard()
    source = Store.read(moved.folder / "source")
    shutil.rmtree(source.model_path(source.plan[1]))
    config = dataclasses.replace(moved.config, save_models=True)
    again = read(run_transfer(config, heard))
    targets = [trial for trial in again.records if trial["ladder"] == "target"]
    assert heard.ran == [f"source {source.plan[1].id}", *(record["id"] for record in targets)]
    assert all((moved.folder / "models" / record["id"]).is_dir() for record in targets)
    assert list(map(reproducible, again.records)) == list(map(reproducible, moved.records))


def test_a_kept_head_starts_where_the_source_ended(moved: TransferResult, inputs: dict[str, str], tmp_path: Path):
    source = moved.folder / "source"
    fields = {**FIELDS, "fractions": "1", "learning_rate": 1e-12, "source_ladder": False}
    # Steps too small to move a float32 weight: full model and ticket answer as they did at the source.
    found = read(
        run_transfer(TransferConfig(source=str(source), target=inputs["task"], output=str(tmp_path / "t"), **fields))
    )
    predictions = {record["kind"]: record["predictions_sha256"] for record in Store.read(source).records()}
    assert {record["kind"]: record["predictions_sha256"] for record in found.records} == predictions
    assert found.config.model == inputs["model"]
    assert found.sparsity == 0.5


@given(st.integers(0, 99), st.sampled_from([(0.05, 0.3), (0.1, 1.0), (0.5, 0.75)]))
def test_shares_are_nested_and_stratified(setting: Setting, seed: int, fractions: tuple[float, float]):
    small, large = (subset(setting, fraction, seed) for fraction in fractions)
    texts = [set(map(tuple, part.splits["train"]["input_ids"])) for part in (small, large)]
    assert texts[0] <= texts[1]
    whole = np.asarray(setting.splits["train"]["labels"][:])
    for part, fraction in zip((small, large), fractions, strict=True):
        labels = np.asarray(part.splits["train"]["labels"][:])
        assert len(labels) == int(round(fraction * len(whole), 6))
        assert abs(labels.sum() - whole.mean() * len(labels)) <= 1


def test_another_seed_draws_other_rows_and_few_rows_take_more_epochs(setting: Setting):
    rows = [tuple(map(tuple, subset(setting, 0.25, seed).splits["train"]["input_ids"])) for seed in range(3)]
    assert len(set(rows)) == 3
    assert subset(setting, 0.25, 0).config.epochs == setting.config.epochs == 2
    assert subset(setting, 0.25, 0, min_steps=7).config.epochs == 7
    assert subset(setting, 1.0, 0, min_steps=7).config.epochs == 3
    # The tokens go with the labels.
    part = subset(setting, 0.5, 1).splits["train"]
    words = setting.tokenizer.convert_tokens_to_ids(["bad", "good"])
    assert all(words[label] in ids for ids, label in zip(part["input_ids"], part["labels"], strict=True))


def test_bad_values_are_refused_by_name():
    for words, fields in (
        ("source None is not a name", {"source": None}),
        (r"fractions 1.5 is outside \(0, 1\]", {"fractions": "0.1,1.5"}),
        (r"fractions 0 is outside \(0, 1\]", {"fractions": "0"}),
        ("fractions 'all' is not a number", {"fractions": "all"}),
        ("head 'old' is unknown: choose from keep, fresh", {"head": "old"}),
        ("min_steps -1 is out of range", {"min_steps": -1}),
        ("source_ladder 'no' is neither true nor false", {"source_ladder": "no"}),
    ):
        with pytest.raises(InputError, match=words):
            TransferConfig(**{"source": "rte", "target": "mrpc", **fields})


def test_a_configuration_survives_yaml_and_names_its_command():
    config = TransferConfig(source="rte", target="wnli", fractions="0.5,1", source_ladder=False, seeds="4,")
    assert TransferConfig.from_dict(config.to_dict()) == config
    assert config.command() == (
        "ticketops transfer --source rte --target wnli --seeds 4, --no-source-ladder --fractions 0.5,1.0"
    )


def test_what_cannot_be_done_is_refused_before_any_training(
    moved: TransferResult, inputs: dict[str, str], pairs: str, tmp_path: Path
):
    def refused(words: str, **fields: Any) -> None:
        heard = Heard()
        config = {"model": inputs["model"], "source": inputs["task"], "target": inputs["task"], **FIELDS, **fields}
        with pytest.raises(InputError, match=words):
            run_transfer(TransferConfig(**config, output=str(tmp_path / "out")), heard)
        assert heard.ran == []
        assert not (tmp_path / "out").exists()

    refused(
        "0.1 % of the 32 training rows of task task leave no row: give fractions from 0.0625 on",
        fractions="0.001,1",
    )
    refused("fractions 0.51 and 0.52 are both 16 of the 32 training rows of task task: leave", fractions="0.51,0.52,1")
    refused("leave 1 of one label: give larger fractions", fractions="0.04")
    refused(r"labels of source task \(0, 1\) are not those of target pairs \(a number\).*head='fresh'", target=pairs)
    make_task(tmp_path / "reviews")
    for name in ("train", "validation"):
        file = tmp_path / "reviews" / f"{name}.jsonl"
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        file.write_text("".join(json.dumps({**row, "label": ["no", "yes"][row["label"]]}) + "\n" for row in rows))
    refused(r"\(0, 1\) are not those of target reviews \(no, yes\)", target=str(tmp_path / "reviews"))
    source = moved.folder / "source"
    refused("searched .*, not demo: leave model out", source=str(source), model="demo")
    refused("has no finished trials of seed 1: give seeds that it has", source=str(source), seeds=2)
    model = source / "models" / "full-seed-0"
    model.rename(tmp_path / "away")
    refused("has no model of full-seed-0: repeat that search with save_models=True", source=str(source))
    (tmp_path / "away").rename(model)


def test_the_source_models_weights_are_what_the_target_starts_from(moved: TransferResult, pairs: str):
    """A pruned structure of the super ticket stays as the source's search has left it: pre-trained."""
    store = Store.read(moved.folder / "source")
    ticket = store.tickets("winning", 0.5)[0]
    assert not torch.equal(ticket.head_mask, torch.ones_like(ticket.head_mask))
    sparse = [record for record in moved.records if record["ladder"] == "target" and record["kind"] == "winning"]
    assert {(r["heads_pruned"], r["ffns_pruned"]) for r in sparse} == {(ticket.heads_pruned, ticket.ffns_pruned)}
