"""Tasks from data sets in memory and of one's own classes: the rules are those of files."""

import dataclasses
import json

import datasets
import numpy as np
import pytest

from ticketops.errors import InputError
from ticketops.tasks import EntityTask, SequenceTask, Task, load_task

ROWS = {"text": [f"text number {row}" for row in range(40)], "label": [row % 2 for row in range(40)]}


def rows(count: int = 40, names: list[str] | None = None, **columns: list) -> datasets.Dataset:
    found = datasets.Dataset.from_dict({**{name: values[:count] for name, values in ROWS.items()}, **columns})
    return found.cast_column("label", datasets.ClassLabel(names=names)) if names else found


def test_splits_of_a_dictionary_have_the_names_of_files():
    data = datasets.DatasetDict({"Train": rows(), "dev": rows(8), "test": rows(4), "extra": rows(2)})
    for given in (data, dict(data)):
        task = load_task(given, name="reviews")
        assert (task.name, len(task.train), len(task.validation), len(task.report)) == ("reviews", 40, 8, 4)
        assert (task.validation_name, task.report_name) == ("dev", "the data's own test split")
        assert "not read: extra" in task.remarks


def test_rows_without_a_validation_split_are_divided_as_those_of_a_file_are(tmp_path):
    path = tmp_path / "reviews.jsonl"
    path.write_text(
        "".join(json.dumps(dict(zip(ROWS, row, strict=True))) + "\n" for row in zip(*ROWS.values(), strict=True))
    )
    one, other = load_task(rows(), name="reviews", seed=3), load_task(path, seed=3)
    assert one.fingerprint == other.fingerprint
    assert (len(one.train), len(one.validation)) == (36, 4)
    assert one.validation_name == "held out of reviews"
    assert load_task(rows(), name="reviews", seed=4).validation["text"][:] != one.validation["text"][:]


def test_class_labels_strings_and_numbers_are_read_as_in_files():
    assert load_task(rows(names=["no", "yes"])).labels == ("no", "yes")
    strings = rows(label=["good" if row % 3 else "bad" for row in range(40)])
    assert load_task(strings).labels == ("bad", "good")
    assert load_task(rows(label=[row / 7 for row in range(40)])).kind == "regression"
    tags = datasets.Dataset.from_dict({"tokens": [["Ann", "slept"]] * 20, "ner_tags": [["B-PER", "O"]] * 20})
    assert isinstance(load_task({"train": tags, "valid": tags}), EntityTask)
    several = load_task({"train": rows(label=[["a"], ["b", "a"]] * 20), "validation": rows(label=[["a"], ["b"]] * 20)})
    assert (several.kind, several.labels) == ("multi-label", ("a", "b"))


def test_options_name_columns_and_a_selection_or_a_format_is_followed():
    chosen = rows(comment=[f"note {row}" for row in range(40)]).shuffle(seed=0).select(range(20)).with_format("numpy")
    task = load_task({"train": chosen, "validation": chosen}, text_columns=["comment"], label_column="label")
    assert task.train["comment"][:] == [str(text) for text in chosen["comment"]]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"training_a": rows(), "training_b": rows()}, "task data has several files that could be the train split"),
        ({"all": rows()}, r"task data has no training split \(found: all\): call it train"),
        ({}, r"no training split \(found: nothing\)"),
        ({"train": [{"text": "a"}]}, r"task data: \[.* is not a path or a data set: .*Dataset.from_list"),
        (rows().to_iterable_dataset(), "task data is streamed, .*: load it without streaming"),
        (rows(text=["a", None] * 20), r"data, row 2: no text in column text"),
        ({"train": rows(), "dev": rows(label=[-1] * 40)}, r"split dev of data has hidden labels"),
    ],
)
def test_what_cannot_be_read_is_one_line(data, message: str):
    with pytest.raises(InputError, match=message):
        load_task(data)


def test_an_encoding_is_for_files():
    with pytest.raises(InputError, match="encoding latin-1 given for data, which has no text files"):
        load_task(rows(), encoding="latin-1")


@dataclasses.dataclass(frozen=True, eq=False)
class Stars(Task):
    """Reviews with one to five stars, scored by how many answers are at most one star off."""

    head = "AutoModelForSequenceClassification"

    @property
    def num_labels(self):
        return 5

    def encode(self, batch, indices, tokenizer, max_length, scored):
        texts = [f"{title}: {body}" for title, body in zip(batch["title"], batch["body"], strict=True)]
        tokens = tokenizer(texts, truncation=True, max_length=max_length)
        return {**tokens, "labels": [stars - 1 for stars in batch["stars"]]}

    def score(self, logits, inputs, rows):
        off = np.abs(logits.argmax(axis=1) + 1 - np.asarray(rows["stars"][:]))
        return {"within_one": float(np.mean(off <= 1)), "exact": float(np.mean(off == 0))}

    def majority(self, split=None):
        stars = np.asarray((self.validation if split is None else split)["stars"][:])
        return max(float(np.mean(np.abs(stars - guess) <= 1)) for guess in range(1, 6))


def stars(count: int = 40, **fields) -> Stars:
    data = datasets.Dataset.from_dict(
        {
            "title": [f"film {row}" for row in range(count)],
            "body": ["good"] * count,
            "stars": [row % 5 + 1 for row in range(count)],
        }
    )
    values = {"name": "stars", "kind": "ordinal", "labels": (), "columns": ("title", "body"), "train": data}
    return Stars(
        **{**values, "metrics": ("within_one", "exact"), "validation": data, "validation_name": "all rows", **fields}
    )


def test_a_class_of_ones_own_is_taken_as_it_is():
    task = load_task(stars(), name="stars", train_rows=10, report_fraction=0.25)
    assert isinstance(task, Stars)
    assert (len(task.train), len(task.validation), len(task.report)) == (10, 30, 10)
    assert "stars: 10 training" in task.describe()
    assert load_task(stars(), metric="exact", name="stars").metrics == ("exact", "within_one")


def test_columns_of_ones_own_are_part_of_the_identity():
    task = stars()
    other = task.train.map(lambda row: {"stars": 6 - row["stars"]})
    assert dataclasses.replace(task, train=other).fingerprint != task.fingerprint


class Silent(Stars):
    def majority(self, split=None):
        return self.nothing


class Headless(Stars):
    head = "AutoModelForStars"


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        (
            stars(),
            {"label_column": "stars"},
            "label_column given for task data, whose class says how its rows are read",
        ),
        (stars(), {"metric": "f1"}, r"metric 'f1' does not suit task data \(ordinal\): choose from within_one, exact$"),
        (stars(), {"threshold": 0.4}, "threshold 0.4 is for labels of a multi-label task, and data is ordinal"),
        (stars(metrics=()), {}, "Stars has no metrics"),
        (stars(columns=("tilte",)), {}, "Stars names the column 'tilte', which its training rows lack"),
        (stars(validation=[1]), {}, r"validation of Stars is \[1\]: give a datasets.Dataset"),
        (Headless(**vars(stars())), {}, "Headless has the head 'AutoModelForStars': name an auto class"),
        (Silent(**vars(stars())), {}, r"Silent.majority\(\) of task data failed \(AttributeError: .*'nothing'"),
    ],
)
def test_what_a_class_says_wrongly_is_one_line(task: Task, options: dict, message: str):
    with pytest.raises(InputError, match=message):
        load_task(task, **options)


def test_a_class_may_derive_from_that_of_a_kind():
    class Shouted(SequenceTask):
        def encode(self, batch, *arguments):
            return super().encode({**batch, "text": [text.upper() for text in batch["text"]]}, *arguments)

    plain = load_task({"train": rows(names=["no", "yes"]), "validation": rows(names=["no", "yes"])})
    task = load_task(Shouted(**{field.name: getattr(plain, field.name) for field in dataclasses.fields(plain)}))
    assert isinstance(task, Shouted)
    assert task.metric_choices == plain.metric_choices
