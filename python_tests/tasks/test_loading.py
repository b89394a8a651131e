import json
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ticketops.errors import InputError
from ticketops.tasks import GLUE, SequenceTask, load_task, tokenize
from ticketops.tasks.sequences import features


def hub_rows(name, labels):
    """What the hub's data set looks like: its columns, an idx, class labels."""
    glue = GLUE[name]
    types = features(glue.kind, glue.labels, glue.columns) | {"idx": datasets.Value("int32")}
    texts = {column: [f"{column} {i}" for i in range(len(labels))] for column in glue.columns}
    return datasets.Dataset.from_dict(
        texts | {"label": labels, "idx": list(range(len(labels)))}, features=datasets.Features(types)
    )


@pytest.fixture
def hub(monkeypatch):
    """A hub without an answer, and a cache that holds what the test puts there."""
    splits = {}

    def load_dataset(path, name):
        assert path == "nyu-mll/glue"
        # Nobody answered, so the client must be told not to try.
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        if name not in splits:
            raise ConnectionError("no\nroute")
        return splits[name]

    def unreachable(*_, **__):
        raise TimeoutError

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    yield splits
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


METRICS = {
    "cola": ("matthews_correlation",),
    "sst2": ("accuracy",),
    "mrpc": ("accuracy", "f1"),
    "stsb": ("pearson", "spearman"),
    "qqp": ("accuracy", "f1"),
    "mnli": ("accuracy",),
    "qnli": ("accuracy",),
    "rte": ("accuracy",),
    "wnli": ("accuracy",),
}


@pytest.mark.parametrize("name", METRICS)
def test_glue_tasks_by_name(hub, name):
    labels = [1.5, 0.0, 5.0, 3.8] if name == "stsb" else [1, 0, 0, 1]
    validation = "validation_matched" if name == "mnli" else "validation"
    hub[name] = {"train": hub_rows(name, labels), validation: hub_rows(name, labels[:3])}
    task = load_task(name)
    assert (task.name, task.metrics, task.validation_name) == (name, METRICS[name], validation)
    assert task.metric == METRICS[name][0]
    assert task.num_labels == {"stsb": 1, "mnli": 3}.get(name, 2)
    assert (len(task.train), len(task.validation)) == (4, 3)
    assert set(task.train.column_names) == {*task.columns, "label"}


def test_the_hub_and_a_folder_give_the_same_task(hub, tmp_path):
    hub["stsb"] = {split: hub_rows("stsb", [1.5, 0.0, 3.8]) for split in ("train", "validation")}
    for split, rows in hub["stsb"].items():
        lines = (json.dumps(row | {"label": round(row["label"], 1)}) for row in rows)
        (tmp_path / "stsb").mkdir(exist_ok=True)
        (tmp_path / "stsb" / f"{split}.jsonl").write_text("\n".join(lines))
    assert load_task("STS-B").fingerprint == load_task(tmp_path / "stsb").fingerprint


def test_hidden_labels_of_the_hub_are_refused(hub):
    hub["rte"] = {"train": hub_rows("rte", [0, 1]), "validation": hub_rows("rte", [-1, -1])}
    with pytest.raises(InputError, match=r"split validation of GLUE task rte has hidden labels \(-1\)"):
        load_task("rte")


def test_unreachable_hub_names_the_folder_way(hub):
    with pytest.raises(InputError, match=r"GLUE task rte cannot be loaded .*task='path/to/rte'") as caught:
        load_task("rte")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["imdb", "data/missing.csv", "", "demo2"])
def test_unknown_tasks_list_the_names(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    message = "no training split" if spec == "" else f"unknown task '{spec}': name one of demo, cola, .* folder with"
    with pytest.raises(InputError, match=message):
        load_task(spec)


def test_a_path_is_never_taken_for_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rte").mkdir()
    with pytest.raises(InputError, match="folder rte has no training split"):
        load_task("./rte")


def test_column_options_are_for_local_data():
    with pytest.raises(InputError, match="label_column given for task rte: only local files"):
        load_task("rte", label_column="y")


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    bare = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    bare.pre_tokenizer = pre_tokenizers.Whitespace()
    bare.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=bare,
        pad_token="[PAD]",
        model_max_length=32,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def toy_task(kind, columns, labels):
    texts = dict(zip(columns, (["a b c d e f", "g"], ["h", "h h"]), strict=False))
    names = ("no", "yes") if kind == "classification" else ()
    rows = datasets.Dataset.from_dict(texts | {"label": labels}, features=features(kind, names, columns))
    return SequenceTask("toy", kind, names, columns, ("accuracy",), rows, rows, "validation")


def test_tokenize_truncates_and_does_not_pad(tokenizer):
    task = toy_task("classification", ("text",), [1, 0])
    tokens = tokenize(task.train, task, tokenizer, max_length=5)
    assert tokens["input_ids"][:] == [[2, 4, 5, 6, 3], [2, 10, 3]]
    assert tokens["attention_mask"][:] == [[1] * 5, [1] * 3]
    assert tokens["labels"][:] == [1, 0]
    assert tokens.features["labels"] == datasets.Value("int64")
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert not tokens.cache_files


def test_tokenize_pairs_and_numbers(tokenizer):
    task = toy_task("regression", ("text_a", "text_b"), [1.5, 2.25])
    tokens = tokenize(task.train, task, tokenizer, max_length=16)
    assert tokens["input_ids"][1] == [2, 10, 3, 11, 11, 3]
    assert tokens["token_type_ids"][1] == [0, 0, 0, 1, 1, 1]
    assert tokens.features["labels"] == datasets.Value("float32")
    assert tokens["labels"][:] == [1.5, 2.25]


@pytest.mark.parametrize("max_length", [2, 33])
def test_tokenize_refuses_lengths_that_do_not_suit(tokenizer, max_length):
    task = toy_task("classification", ("text",), [1, 0])
    with pytest.raises(InputError, match=rf"max_length {max_length} does not suit .* from 3 to 32"):
        tokenize(task.train, task, tokenizer, max_length)


def test_a_tokenizer_without_a_limit_names_none(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "model_max_length", int(1e30))
    task = toy_task("classification", ("text",), [1, 0])
    with pytest.raises(InputError, match=r"choose at least 3$"):
        tokenize(task.train, task, tokenizer, 2)


@pytest.mark.data
def test_a_large_folder_loads_quickly(glue_folder):
    start = time.monotonic()
    load_task(glue_folder / "sst2", train_rows=2_000)
    assert time.monotonic() - start < 20


@pytest.mark.parametrize("validation", [True, False])
def test_a_labelled_test_split_reports_and_never_selects(validation: bool, tmp_path: Path):
    def write(split: str, rows: int, labels: bool = True) -> None:
        found = [{"text": f"{split} {n}"} | ({"label": n % 2} if labels else {}) for n in range(rows)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))

    write("train", 40)
    write("test", 12)
    if validation:
        write("validation", 10)
    task = load_task(tmp_path)
    assert not any(text.startswith("test") for text in task.validation["text"])
    assert task.report is not None
    assert (task.report["text"][:2], len(task.report), task.test) == (["test 0", "test 1"], 12, None)
    assert "12 report rows (the data's own test split)" in task.describe()
    assert len(load_task(tmp_path, validation_rows=4).report) == 4
    # Somebody who holds rows out gets these; hidden labels cannot report.
    held_out = load_task(tmp_path, report_fraction=0.5)
    assert held_out.report is not None
    assert not any(text.startswith("test") for text in held_out.report["text"])
    assert "12 test rows, which are not used" in held_out.describe()
    write("test", 12, labels=False)
    hidden = load_task(tmp_path)
    assert hidden.report is None
    assert "12 test rows without labels, which are not used" in hidden.describe()
