"""What labels are taken for: numbers, classes, or none; and what makes a task doubtful."""

import json
import logging
import re

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ticketops.errors import InputError
from ticketops.tasks import load_task


def write(path, labels, texts=None, column="label"):
    texts = texts or [f"{path.stem} {i}" for i in range(len(labels))]
    rows = [{"text": text, column: label} for text, label in zip(texts, labels, strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text(f"text,{column}\n" + "".join(f"{row['text']},{row[column]}\n" for row in rows))
    return path


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_strings_are_classes_whatever_they_spell(tmp_path, kind):
    task = load_task(write(tmp_path / f"data.{kind}", ["1.1", "2.5"] * 8))
    assert (task.kind, task.labels) == ("classification", ("1.1", "2.5"))
    task = load_task(write(tmp_path / f"more.{kind}", ["1", "01", "1.0"] * 8))
    assert task.labels == ("1", "1.0", "01")
    assert load_task(write(tmp_path / f"scores.{kind}", ["1.5", "2"] * 8), kind="regression").kind == "regression"


def test_a_column_of_text_is_numbers_only_if_all_of_it_is(tmp_path):
    assert load_task(write(tmp_path / "a.csv", ["01", "1"] * 8)).labels == ("1", "01")
    assert load_task(write(tmp_path / "b.csv", ["1.0", "0.0"] * 8)).labels == ("0", "1")
    assert load_task(write(tmp_path / "c.csv", ["1.1", "2.5"] * 8)).kind == "regression"
    assert load_task(write(tmp_path / "d.csv", ["1.1", "2.5"] * 8), kind="classification").labels == ("1.1", "2.5")
    assert load_task(write(tmp_path / "e.csv", ["True", "False"] * 8)).labels == ("false", "true")
    assert load_task(write(tmp_path / "f.csv", ["True", "Maybe"] * 8)).labels == ("Maybe", "True")
    assert load_task(write(tmp_path / "g.csv", ["+1", "-1"] * 8)).labels == ("-1", "+1")


@pytest.mark.parametrize("name", ["data.csv", "data.jsonl", "data.parquet"])
def test_a_stray_fraction_is_refused_with_its_row(tmp_path, name):
    labels: list[float] = [float(i % 2) for i in range(20)]
    labels[12] = 0.5
    row = {"data.csv": "line 14", "data.jsonl": "line 13", "data.parquet": "row 13"}[name]
    path = write(tmp_path / name, labels)
    with pytest.raises(InputError, match=rf"{name}, {row}: label 0.5 .* like 1 of 20 labels: .*task_kind='regression'"):
        load_task(path)
    assert load_task(path, kind="regression").kind == "regression"
    assert load_task(path, kind="classification").labels == ("0", "0.5", "1")


def test_a_fraction_in_the_validation_rows_alone_is_refused(tmp_path):
    write(tmp_path / "train.jsonl", [0, 1] * 8)
    write(tmp_path / "dev.jsonl", [0.5, 1.5] * 8)
    with pytest.raises(InputError, match=r"dev.jsonl, line 1: label 0.5 in column label is a fraction"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (["0,5", "1,5", "2"], r"label '[01],5': write numbers with a point"),
        ([0, 1, -1], r"line 4: label -1, like 5 of 15, may mean that there is none: .*task_kind='classification'"),
        ([0, 1, None], r"line 4: no label in column label"),
        (list(range(10, 310, 10)), r"column label holds 30 different numbers in 30 training rows: say task_kind="),
    ],
)
def test_labels_that_can_be_read_in_two_ways_are_refused(tmp_path, labels, message):
    path = tmp_path / "data.csv"
    labels = labels if len(labels) > 3 else labels * 5
    rows = [f'x {i},"{"" if label is None else label}"\n' for i, label in enumerate(labels)]
    path.write_text("text,label\n" + "".join(rows))
    with pytest.raises(InputError, match=message):
        load_task(path)
    if len(labels) > 15 or -1 in labels:
        assert load_task(path, kind="classification").kind == "classification"


@pytest.mark.parametrize("mark", ["-", "?", "N/A", "null", "-1"])
@pytest.mark.parametrize("name", ["data.csv", "data.jsonl"])
def test_marks_of_no_label_are_no_class(tmp_path, name, mark):
    path = write(tmp_path / name, ["good", "bad", mark, "bad"] * 8)
    with pytest.raises(InputError, match=rf"label {re.escape(mark)}, like 8 of 32, may mean that there is none"):
        load_task(path)
    assert load_task(path, kind="classification").num_labels == 3


@pytest.mark.parametrize("labels", [["+", "-"], ["+1", "-1"], [-1, 1], ["none", "one"]])
def test_opposites_and_words_are_classes(tmp_path, labels):
    assert load_task(write(tmp_path / "data.csv", labels * 8)).num_labels == 2


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("a.csv", [i / 10 for i in range(31)] + ["3.2."]),
        ("a.jsonl", [1.5, 2.5, "x"] * 5),
        ("a.csv", ["0", "1"] * 9 + ["NA"]),
        ("a.jsonl", [1, 0, 1, 0, True]),
    ],
)
def test_a_stray_word_does_not_make_classes_of_numbers(tmp_path, name, labels):
    path = write(tmp_path / name, labels)
    with pytest.raises(InputError, match=r"in column label is no number, like \d of \d+ labels: correct it, or say"):
        load_task(path)
    assert load_task(path, kind="classification").kind == "classification"


def test_classes_that_look_alike_are_said(tmp_path):
    task = load_task(write(tmp_path / "a.csv", ["Good", "bad", "good", "bad"] * 8))
    assert task.remarks == ("the labels Good, good are different classes",)


def test_minus_one_beside_one_is_a_class_and_said(tmp_path):
    task = load_task(write(tmp_path / "data.jsonl", [-1, 1] * 8))
    assert task.labels == ("-1", "1")
    assert task.remarks == ("8 labels of -1 are a class",)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Text", "Label"),
        ("review", "sentiment"),
        ("TWEET", "Target"),
        ("comment_text", "class"),
        ("content", "Category"),
    ],
)
def test_common_columns_are_found_in_any_case_and_said(tmp_path, text, label):
    path = tmp_path / "data.csv"
    path.write_text(f"id,{text},{label}\n" + "".join(f"{i},x {i},{i % 2}\n" for i in range(12)))
    task = load_task(path)
    assert task.columns == (text,)
    assert task.remarks[0] == f"texts in {text}, labels in {label}"
    assert task.remarks[0] in task.describe()


def test_usual_columns_come_before_common_ones(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("title,text,score,label\n" + "".join(f"a,x {i},7,{i % 2}\n" for i in range(12)))
    assert load_task(path).columns == ("text",)
    path.write_text("title,content,label\n" + "".join(f"a,x {i},{i % 2}\n" for i in range(12)))
    with pytest.raises(InputError, match=r"more than one choice of text column: .* with text_columns"):
        load_task(path)


def test_splits_may_spell_their_columns_in_another_case(tmp_path):
    write(tmp_path / "train.jsonl", [0, 1] * 8)
    (tmp_path / "dev.csv").write_text("TEXT,Label\na,0\nb,1\n")
    assert load_task(tmp_path).validation["text"][:] == ["a", "b"]


def test_glues_own_column_names(tmp_path):
    header = "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    for split in ("train", "dev"):
        (tmp_path / "MRPC").mkdir(exist_ok=True)
        rows = "".join(f'{i % 2}\t1\t2\t{split} "a {i}\tb {i}\n' for i in range(12))
        (tmp_path / "MRPC" / f"{split}.tsv").write_text(header + rows, encoding="utf-8-sig")
    task = load_task(tmp_path / "MRPC")
    assert (task.columns, task.labels) == (("sentence1", "sentence2"), ("not_equivalent", "equivalent"))
    (tmp_path / "MNLI").mkdir()
    for split in ("train", "dev_matched"):
        rows = "".join(f"{split} {i}\tb\tneutral\t{('entailment', 'neutral')[i % 2]}\n" for i in range(12))
        (tmp_path / "MNLI" / f"{split}.tsv").write_text("sentence1\tsentence2\tlabel1\tgold_label\n" + rows)
    task = load_task(tmp_path / "MNLI")
    assert (task.columns, task.num_labels, task.train["label"][:]) == (("premise", "hypothesis"), 3, [0, 1] * 6)


@pytest.mark.parametrize(("shared", "said"), [(40, True), (3, True), (1, False), (0, False)])
def test_rows_that_train_and_validate_are_counted(tmp_path, caplog, shared, said):
    write(tmp_path / "train.jsonl", [0, 1] * 20)
    texts = [f"train {i}" if i < shared else f"other {i}" for i in range(40)]
    write(tmp_path / "dev.jsonl", [0, 1] * 20, texts)
    with caplog.at_level(logging.WARNING, logger="ticketops"):
        task = load_task(tmp_path)
    doubt = f"{shared} of 40 validation rows have a text of the training rows"
    assert (doubt in caplog.text) == (doubt in task.remarks) == said


def test_rows_that_differ_in_case_and_rows_that_validate_and_report_are_counted(tmp_path):
    write(tmp_path / "train.jsonl", [0, 1] * 20)
    write(tmp_path / "dev.jsonl", [0, 1] * 5, [f"TRAIN  {i}" if i < 5 else f"dev {i}" for i in range(10)])
    write(tmp_path / "test.jsonl", [0, 1] * 5, [f"dev {i}" for i in range(10)])
    assert load_task(tmp_path).remarks == (
        "5 of 10 validation rows have a text of the training rows",
        "5 of 10 report rows have a text of the validation rows",
    )


def test_one_class_of_validation_or_test_rows_is_said(tmp_path, caplog):
    write(tmp_path / "train.jsonl", ["good", "bad"] * 8)
    write(tmp_path / "dev.jsonl", ["good"] * 8)
    write(tmp_path / "test.jsonl", ["bad"] * 8)
    task = load_task(tmp_path)
    assert [remark.split(",")[0] for remark in task.remarks] == [
        "every validation row has the label good",
        # A labelled test split reports.
        "every report row has the label bad",
    ]
    assert all(remark in caplog.text for remark in task.remarks)
    (tmp_path / "test.jsonl").unlink()
    write(tmp_path / "train.jsonl", ["good"] * 8)
    with pytest.raises(InputError, match=r"every training row of task .* has the label good"):
        load_task(tmp_path)
