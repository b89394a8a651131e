"""Which files of a folder are which split, and what of a folder is refused before it is read."""

import json
import os
import socket
from pathlib import Path

import datasets
import pytest

from ticketops.errors import InputError
from ticketops.tasks import load_task
from ticketops.tasks.local import load_local
from ticketops.tasks.splits import find_splits
from ticketops.tasks.task import Task


def rows(count: int, prefix: str = "t") -> str:
    return "".join(json.dumps({"text": f"{prefix} {i}", "label": i % 2}) + "\n" for i in range(count))


def put(folder: Path, *names: str) -> Path:
    """Writes files of rows, each with texts of its own: the name and a number."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(rows(6, name))
    return folder


def found(folder: Path) -> dict[str, list[str]]:
    layout = find_splits(folder)
    files = {"train": layout.train, "validation": layout.validation, "test": layout.test}
    return {split: [str(file.relative_to(folder)) for file in there] for split, there in files.items() if there}


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        # Clones of the hub's data sets.
        (
            ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl", "data/test-00000-of-00001.jsonl"],
            {
                "train": ["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"],
                "test": ["data/test-00000-of-00001.jsonl"],
            },
        ),
        (
            [
                "data/train-00000-of-00001-0a1b2c3d4e5f6071.jsonl",
                "data/validation-00000-of-00001-ffb2c3d4e5f60718.jsonl",
            ],
            {
                "train": ["data/train-00000-of-00001-0a1b2c3d4e5f6071.jsonl"],
                "validation": ["data/validation-00000-of-00001-ffb2c3d4e5f60718.jsonl"],
            },
        ),
        (
            ["plain_text/train-00000-of-00001.jsonl", "plain_text/unsupervised-00000-of-00001.jsonl"],
            {"train": ["plain_text/train-00000-of-00001.jsonl"]},
        ),
        (
            ["data/en/train.jsonl", "data/en/dev.jsonl"],
            {"train": ["data/en/train.jsonl"], "validation": ["data/en/dev.jsonl"]},
        ),
        # Folders of splits.
        (
            ["train/0.jsonl", "train/1.jsonl", "validation/0.jsonl", "test/a.jsonl"],
            {
                "train": ["train/0.jsonl", "train/1.jsonl"],
                "validation": ["validation/0.jsonl"],
                "test": ["test/a.jsonl"],
            },
        ),
        (
            ["data/Train/x.jsonl", "data/Dev/x.jsonl"],
            {"train": ["data/Train/x.jsonl"], "validation": ["data/Dev/x.jsonl"]},
        ),
        (["train.jsonl/part-0.jsonl", "train.jsonl/_SUCCESS"], {"train": ["train.jsonl/part-0.jsonl"]}),
        # Numbered parts, in the order of their numbers.
        (
            ["train_10.jsonl", "train_9.jsonl", "train_11.jsonl", "val.jsonl"],
            {"train": ["train_9.jsonl", "train_10.jsonl", "train_11.jsonl"], "validation": ["val.jsonl"]},
        ),
        # Names with other words, Kaggle's and the hub's.
        (
            ["imdb_train.jsonl", "imdb_valid.jsonl", "imdb_test.jsonl"],
            {"train": ["imdb_train.jsonl"], "validation": ["imdb_valid.jsonl"], "test": ["imdb_test.jsonl"]},
        ),
        (["train.jsonl", "train_extra.jsonl", "sample_submission.jsonl"], {"train": ["train.jsonl"]}),
        (["train.jsonl", ".train.jsonl", "._dev.jsonl"], {"train": ["train.jsonl"]}),
        (["Train.JSONL", "DEV.jsonl"], {"train": ["Train.JSONL"], "validation": ["DEV.jsonl"]}),
        (["train.jsonl", "eval.jsonl"], {"train": ["train.jsonl"], "test": ["eval.jsonl"]}),
        (
            ["train.jsonl", "dev_matched.jsonl", "dev_mismatched.jsonl", "test_matched.jsonl", "test_mismatched.jsonl"],
            {"train": ["train.jsonl"], "validation": ["dev_matched.jsonl"]},
        ),
        (
            ["train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"],
            {"train": ["train-00001-of-00002.jsonl", "train-00002-of-00002.jsonl"]},
        ),
    ],
)
def test_splits_are_found(tmp_path, names, expected):
    put(tmp_path, *names)
    assert found(tmp_path) == expected
    task = load_task(tmp_path)
    total = 6 * len(expected["train"])
    assert len(task.train) + ("validation" not in expected) * len(task.validation) == total
    # A labelled test split reports.
    assert (task.report is None) == ("test" not in expected)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00000-of-00002.jsonl"], r"has 1 of the 2 shards of split train, without number 1: fetch all"),
        (["data/train-00001-of-00003.jsonl", "data/train-00002-of-00003.jsonl"], r"2 of the 3 shards .* number 0"),
        (["train-00000-of-00001.jsonl", "train-00000-of-00002.jsonl"], r"2 of the 1 shards|without number"),
        (["train-0.jsonl", "train-1.jsonl", "train-3.jsonl"], r"has no part 2 of split train: fetch all"),
        (["train.jsonl", "dev_part1.jsonl", "dev_part3.jsonl"], r"has no part 2 of split dev_part: fetch all"),
        (["train/x-00000-of-00002.jsonl"], r"has 1 of the 2 shards of split x"),
        (["train.jsonl", "dev-00000-of-00002.jsonl"], r"has 1 of the 2 shards of split dev"),
        (["train-00000-of-00001.jsonl", "train.jsonl"], r"several files for split train"),
        (["train.jsonl", "train.csv"], r"several files for split train \(train.csv, train.jsonl\): keep one"),
        (["train/a.jsonl", "train/b.csv"], r"holds files of several kinds \(.csv, .jsonl\): keep one kind"),
        (["a_train.jsonl", "b_train.jsonl"], r"several files that could be the train split \(a_train, b_train\)"),
        (["train.jsonl", "in_dev.jsonl", "out_dev.jsonl"], r"several files that could be the validation split"),
        (["a/train.jsonl", "b/train.jsonl"], r"holds several data sets \(a, b\): give the folder of one"),
        (["test.jsonl", "dev.jsonl"], r"no training split \(found: dev.jsonl, test.jsonl\)"),
        (["x/y/z/w/train.jsonl"], r"no training split"),
    ],
)
def test_folders_that_can_be_read_in_two_ways_are_refused(tmp_path, names, message):
    with pytest.raises(InputError, match=message):
        load_task(put(tmp_path, *names))


def test_parts_numbered_by_years_are_all_of_them(tmp_path):
    assert found(put(tmp_path, "train-2018.jsonl", "train-2021.jsonl"))["train"] == [
        "train-2018.jsonl",
        "train-2021.jsonl",
    ]


def test_a_split_that_a_saved_data_set_lists_is_there(tmp_path):
    splits = {name: datasets.Dataset.from_list([{"text": name, "label": 0}]) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(tmp_path)
    (tmp_path / "test" / "state.json").unlink()
    with pytest.raises(InputError, match=r"lacks the split 'test' that its dataset_dict.json lists"):
        find_splits(tmp_path)


def test_folders_that_may_not_be_entered_are_no_splits(tmp_path, monkeypatch):
    put(tmp_path, "train.jsonl", "closed/x.jsonl")
    plain = Path.is_dir

    def is_dir(path):
        if path.name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    monkeypatch.setattr(Path, "is_dir", is_dir)
    assert found(tmp_path) == {"train": ["train.jsonl"]}
    (tmp_path / "train.jsonl").unlink()
    with pytest.raises(InputError, match="has no training split"):
        find_splits(tmp_path)


def test_a_shard_alone_is_refused(tmp_path):
    put(tmp_path, "train-00000-of-00002.jsonl", "only-00000-of-00001.jsonl")
    with pytest.raises(InputError, match="is one of 2 shards: give their folder, or rename it"):
        load_task(tmp_path / "train-00000-of-00002.jsonl")
    assert load_task(tmp_path / "only-00000-of-00001.jsonl").validation_name == "held out of only-00000-of-00001.jsonl"


def test_a_saved_dictionary_of_splits_is_a_folder_of_splits(tmp_path):
    put(tmp_path / "plain", "train.jsonl", "validation.jsonl", "test.jsonl")
    datasets.disable_progress_bars()
    splits = {
        split: datasets.Dataset.from_json(str(tmp_path / "plain" / f"{split}.jsonl"), cache_dir=str(tmp_path))
        for split in ("train", "validation", "test")
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved", num_shards=dict.fromkeys(splits, 2))
    datasets.enable_progress_bars()
    task, reference = load_task(tmp_path / "saved"), load_task(tmp_path / "plain")
    assert task.fingerprint == reference.fingerprint
    assert (task.validation_name, len(task.report)) == ("validation", 6)


def test_a_test_split_is_returned_apart_and_never_selects(tmp_path):
    put(tmp_path, "train.jsonl", "test.jsonl")
    task = load_local(tmp_path)
    assert task.validation_name == "held out of train.jsonl"
    assert [text.split()[0] for text in task.test["text"]] == ["test.jsonl"] * 6
    assert task.test.features == task.train.features
    assert "6 test rows" in task.describe()


@pytest.mark.parametrize(
    "test",
    ['{"text": "a"}\n{"text": "b"}\n', '{"text": "a", "label": -1}\n' * 2, '{"text": "a", "label": null}\n' * 2],
)
def test_a_test_split_without_labels(tmp_path, test):
    """As Kaggle and the hub have them."""
    put(tmp_path, "train.jsonl", "sample_submission.jsonl")
    (tmp_path / "test.jsonl").write_text(test)
    task: Task = load_task(tmp_path)
    assert (task.test.column_names, len(task.test)) == (["text"], 2)
    assert "2 test rows without labels" in task.describe()
    assert task.remarks[0] == "not read: sample_submission.jsonl"
    assert task.fingerprint


def test_the_selecting_split_needs_labels(tmp_path):
    put(tmp_path, "train.jsonl")
    (tmp_path / "dev.jsonl").write_text('{"text": "a", "label": -1}\n' * 2)
    with pytest.raises(InputError, match=r"split dev of .* has hidden labels \(none, or -1, in column label\)"):
        load_task(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"text": "a", "label": -1}\n' * 2)
    with pytest.raises(InputError, match=r"split train of .* has hidden labels"):
        load_task(tmp_path)
    (tmp_path / "train.jsonl").write_text(rows(6))
    (tmp_path / "dev.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(InputError, match=r"no label column label: .*dev.jsonl has the columns text"):
        load_task(tmp_path)


@pytest.mark.parametrize("place", ["data.jsonl", "folder/train.jsonl", "folder/train/0.jsonl", "folder/test.jsonl"])
@pytest.mark.parametrize("kind", ["a pipe", "a socket", "a device", "symbolic links", "No such file"])
def test_what_is_no_file_is_refused_at_once(tmp_path, place, kind, request, monkeypatch):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    if place.endswith("test.jsonl"):
        put(tmp_path, "folder/train.jsonl")
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        # The path of a socket has 108 bytes at most.
        monkeypatch.chdir(path.parent)
        server = socket.socket(socket.AF_UNIX)
        request.addfinalizer(server.close)
        server.bind(path.name)
    else:
        path.symlink_to({"a device": "/dev/zero", "symbolic links": path.name}.get(kind, "missing"))
    with pytest.raises(InputError, match=kind):
        load_task(path if place == "data.jsonl" else tmp_path / "folder")


def test_links_in_a_ring_are_walked_once(tmp_path):
    folder = put(tmp_path / "a", "data/train.jsonl")
    (folder / "self").symlink_to(".")
    (folder / "data" / "up").symlink_to("..")
    (folder / "again").symlink_to("data")
    assert found(folder) in ({"train": ["data/train.jsonl"]}, {"train": ["again/train.jsonl"]})
    ring = tmp_path / "ring" / "train"
    ring.mkdir(parents=True)
    for name in ("train", "test", "dev"):
        (ring / name).symlink_to(".")
    with pytest.raises(InputError, match="no training split"):
        load_task(tmp_path / "ring")


@pytest.mark.parametrize("spec", ["~nobody-of-this-name/data", "x" * 5_000, "a\0b"])
def test_paths_that_cannot_be_are_one_line_errors(spec):
    with pytest.raises(InputError, match="task '") as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_looked_into(tmp_path, monkeypatch):
    folder = put(tmp_path, "data/train.jsonl") / "data"

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        load_task(folder)
