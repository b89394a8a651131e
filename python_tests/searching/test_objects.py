"""Runs over objects in Python: data sets, classes of one's own, functions as metrics; and weighted classes."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import ticketops
from ticketops.errors import InputError, StoreError, TrialError
from ticketops.models import patch
from ticketops.reporting import report
from ticketops.searching import SearchConfig, Setting, ShareConfig, Store
from ticketops.searching.objects import Objects, named_metric, named_task, named_tasks
from ticketops.searching.plan import Trial
from ticketops.searching.scoring import score_pass
from ticketops.searching.sharing import load_settings, run_share_trial
from ticketops.searching.sharing_plan import ShareTrial
from ticketops.searching.trial import make_trainer, run_trial, scored, trainer_options
from ticketops.tasks.metrics import own_metric

from .test_run import Heard
from .tiny import FIELDS

FULL = Trial("full", 0.0, 0, 0, 0)
SHORT = {**FIELDS, "sparsities": "0.5", "kinds": "winning", "epochs": 1}


def share_of_good(labels, predictions):
    return float(np.mean(predictions == labels)) / 2


@pytest.fixture(scope="module")
def rows(inputs: dict[str, str]) -> datasets.DatasetDict:
    splits = {}
    for split in ("train", "validation"):
        lines = [json.loads(line) for line in Path(inputs["task"], f"{split}.jsonl").read_text().splitlines()]
        splits[split] = datasets.Dataset.from_list(lines)
    return datasets.DatasetDict(splits)


@pytest.fixture(scope="module")
def searched(inputs: dict[str, str], rows: datasets.DatasetDict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("objects") / "run"
    found = ticketops.search(
        model=inputs["model"], task=rows, metric=share_of_good, output=str(folder), **SHORT, report_fraction=0.25
    )
    assert [record["task"] for record in found.records] == ["data", "data"]
    assert found.records[0]["metric"] == "share_of_good"
    scores = found.records[0]["scores"]["validation"]
    assert scores["share_of_good"] == pytest.approx(scores["accuracy"] / 2)
    return folder


def test_a_data_set_in_memory_gives_the_results_of_its_file(
    inputs: dict[str, str], rows: datasets.DatasetDict, setting: Setting
):
    spec, objects = named_task(rows, "task")
    found = Setting.load(SearchConfig(model=inputs["model"], task=spec, **FIELDS), objects=Objects(objects))
    assert found.task.fingerprint == setting.task.fingerprint
    one, other = (run_trial(dataclasses.replace(each), FULL).record for each in (found, setting))
    assert one["predictions_sha256"] == other["predictions_sha256"]


def test_the_same_object_resumes_and_another_one_is_refused(
    inputs: dict[str, str], rows: datasets.DatasetDict, searched: Path
):
    fields = {**SHORT, "model": inputs["model"], "output": str(searched), "report_fraction": 0.25}
    heard = Heard()
    ticketops.search(task=dict(rows), metric=share_of_good, listener=heard, **fields)
    assert heard.ran == []
    other = rows["train"].map(lambda row: {"label": 1 - row["label"]})
    with pytest.raises(StoreError, match=r"holds another search .*task fingerprint is"):
        ticketops.search(task={**rows, "train": other}, metric=share_of_good, **fields)
    with pytest.raises(StoreError, match="metric is 'python:share_of_good' there and 'python:another' here"):
        ticketops.search(task=rows, metric={"another": share_of_good}, **fields)
    with pytest.raises(StoreError, match="metric is 'python:share_of_good' there and None here"):
        ticketops.search(task=rows, **fields)


def test_the_report_says_that_the_task_was_an_object(searched: Path):
    text = report(searched).read_text()
    assert "were objects in Python, which no folder keeps: give the same ones again." in text
    assert "ticketops.search(model=" in text
    assert "task=data" in text
    assert "metric=share_of_good" in text
    assert "ticketops search" not in text
    with pytest.raises(InputError, match="task data is an object in Python, which no folder keeps: give the same one"):
        Setting.load(Store.read(searched).config)


def test_the_class_in_the_guide_is_searched_from_end_to_end(inputs: dict[str, str], tmp_path: Path):
    def split(count: int) -> datasets.Dataset:
        found = [["bad", "bad film", "film", "good film", "good"][row % 5] for row in range(count)]
        return datasets.Dataset.from_dict(
            {"title": found, "body": ["the plot"] * count, "stars": [row % 5 + 1 for row in range(count)]}
        )

    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    (code,) = re.findall(r"```python\n([^`]*class Stars\(Task\)[^`]*)```", guide)
    fields = {**SHORT, "model": inputs["model"], "output": str(tmp_path / "run"), "train_rows": None}
    call = 'ticketops.search(model="bert-base-uncased", task=task, output="runs/stars")'
    assert call in code
    names: dict[str, Any] = {"train": split(60), "validation": split(20), "fields": fields}
    exec(code.replace(call, "found = ticketops.search(task=task, **fields)"), names)
    found = names["found"]
    record = found.records[0]
    assert (record["task"], record["metric"]) == ("stars", "within_one")
    assert set(record["scores"]["validation"]) == {"within_one", "exact"}
    assert found.super_ticket is not None
    assert "stars was an object in Python" in found.report_path.read_text()
    with pytest.raises(InputError, match="class_weights is given for task stars, and ordinal has no classes to weigh"):
        ticketops.search(task=names["task"], class_weights="balanced", **fields)


def test_objects_are_named_by_themselves_by_the_user_or_by_their_part(rows: datasets.DatasetDict):
    assert named_task("rte", "task") == ("rte", {})
    named = rows["train"].select(range(2))
    named.info.dataset_name = "imdb"
    assert named_task({"train": named}, "task")[0] == "python:imdb"
    assert named_task(rows, "source", "source")[0] == "python:source"
    names, objects = named_tasks({"one": rows, "two": rows})
    assert (names, [*objects]) == (["python:one", "python:two"], ["python:one", "python:two"])
    assert named_tasks(["rte", rows])[0] == ["rte", "python:data"]
    config = ShareConfig(tasks=names, metric={"one": "macro_f1", "two": named_metric(share_of_good)[0]})
    assert config.search("python:one").metric == "macro_f1"
    assert config.search("python:two").metric == "python:share_of_good"
    assert "ticketops.share(tasks={'one': one, 'two': two}, " in config.call()
    assert "metric={'one': 'macro_f1', 'two': share_of_good}" in config.call()
    given = named_metric({"one": "macro_f1", "two": share_of_good}, several=True)
    assert given[0] == {"one": "macro_f1", "two": "python:share_of_good"}
    assert [*given[1]] == ["python:share_of_good"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"train": 1}, {"train": 2}], "two objects of tasks are called data: give {name: object, ...}"),
        ({"a/b": {}}, "tasks is called 'a/b': use letters"),
        ({"a": "rte", "b": "sst2"}, "tasks calls 'rte' a, and only objects get names: use a list"),
    ],
)
def test_names_that_cannot_be_are_refused(given, message: str):
    with pytest.raises(InputError, match=message):
        named_tasks(given)


def test_a_data_set_in_a_configuration_is_sent_to_the_function(rows: datasets.DatasetDict):
    with pytest.raises(InputError, match=r"task DatasetDict\(.* is not a name or a path: give it to ticketops\.sea"):
        SearchConfig(task=rows)


def test_importance_is_of_the_weighted_loss(setting: Setting):
    weighted = dataclasses.replace(setting, config=dataclasses.replace(setting.config, class_weights=(0.5, 3.0)))
    with patch(setting.fresh_model(0)) as handle:

        def scores(own: Setting, chosen) -> torch.Tensor:
            trainer = make_trainer(own, model=handle.model, callbacks=[], **trainer_options(own, 0))
            part = setting.splits["train"].select(chosen)
            batches = DataLoader(part, 16, collate_fn=setting.task.collator(setting.tokenizer))
            importance = score_pass(handle, batches, False, trainer.compute_loss, granularity="example")
            return importance.head.float() * len(part)

        labels = np.asarray(setting.splits["train"]["labels"][:])
        everything, each = range(len(labels)), [np.flatnonzero(labels == label) for label in (0, 1)]
        plain = [scores(setting, chosen) for chosen in each]
        found = scores(weighted, everything)
        # Per example, so that a row's weight is a factor of its score.
        torch.testing.assert_close(found, 0.5 * plain[0] + 3.0 * plain[1], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(found, scores(setting, everything))


def test_a_metric_that_fails_in_a_trial_fails_that_trial(setting: Setting):
    metric = own_metric({"fickle": lambda labels, predictions: float("nan")})
    fickle = dataclasses.replace(setting, task=setting.task.with_metric(*metric))
    with pytest.raises(TrialError, match="metric fickle returned nan"):
        scored(fickle, {"validation": np.zeros((len(setting.task.validation), 2))})


def test_training_follows_the_weights_in_a_search_and_in_a_share(setting: Setting, pairs: str, inputs: dict[str, str]):
    first = dataclasses.replace(setting, config=dataclasses.replace(setting.config, class_weights=(1e-3, 1.0)))
    assert run_trial(first, FULL).predictions["validation"].argmax(axis=1).mean() == 1
    config = ShareConfig(
        model=inputs["model"],
        tasks=(inputs["task"], pairs),
        class_weights="task=0.001,1",
        max_length="16,pairs=12",
        epochs=2,
        batch_size=16,
        learning_rate=1e-2,
    )
    settings = load_settings(config)
    assert [own.config.max_length for own in settings.values()] == [16, 12]
    assert [own.loss_function is None for own in settings.values()] == [False, True]
    _, _, predictions = run_share_trial(config, settings, ShareTrial("plain", 0), dict.fromkeys(settings))
    assert predictions["task.validation"].argmax(axis=1).mean() == 1
    assert np.ptp(predictions["pairs.validation"]) > 0


def test_options_of_single_tasks_keep_their_plain_form():
    config = ShareConfig(tasks="a,b", max_length=64, threshold=0.3, metric="b=macro_f1", class_weights="a=balanced")
    one, other = config.search("a"), config.search("b")
    assert (one.max_length, one.threshold, one.metric, one.class_weights) == (64, 0.3, None, "balanced")
    assert (other.max_length, other.threshold, other.metric, other.class_weights) == (64, 0.3, "macro_f1", None)
    assert (config.max_length, config.threshold, config.class_weights) == (64, 0.3, ("a=balanced",))
    assert ShareConfig.from_dict(config.to_dict()) == config
    assert "--max-length 64" in config.command()
    assert "--max-length" not in ShareConfig(tasks="a,b").command()
    longer = ShareConfig(tasks="a,b", max_length="b=384")
    assert (longer.search("a").max_length, longer.search("b").max_length) == (128, 384)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"class_weights": "balance"},
            "class_weights 'balance' is not a number: give 'balanced', or a number for each",
        ),
        ({"class_weights": "1,0"}, "class_weights '1,0' has a weight that is not above 0"),
        ({"threshold": 1}, r"threshold 1 is outside \(0, 1\)"),
        ({"metric": ""}, "metric '' is not a name"),
    ],
)
def test_values_that_say_nothing_are_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        SearchConfig(**fields)
