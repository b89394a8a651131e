import csv
import json

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ticketops.errors import InputError
from ticketops.tasks import GLUE, load_task

ROWS = [{"text": f"text number {i}", "label": i % 2} for i in range(40)]
PAIRS = [{"sentence1": f"left {i}", "sentence2": f"right {i}", "label": i % 2, "idx": i} for i in range(40)]


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return path


def labelled(labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "train", "validation", "majority"),
    [
        ("cola", 8551, 1043, 0.0),
        ("mrpc", 4076, 1725, 0.665),
        ("rte", 2490, 277, 0.527),
        ("sst2", 67349, 872, 0.509),
        ("stsb", 5749, 1500, 0.0),
        ("wnli", 635, 71, 0.563),
    ],
)
def test_glue_folders_load_as_glue_tasks(glue_folder, name, train, validation, majority):
    before = sorted(glue_folder.rglob("*"))
    task = load_task(glue_folder / name)
    assert (len(task.train), len(task.validation), task.validation_name) == (train, validation, "validation")
    assert (task.name, task.kind, task.labels) == (name, GLUE[name].kind, GLUE[name].labels)
    assert (task.columns, task.metrics) == (GLUE[name].columns, GLUE[name].metrics)
    assert task.majority() == pytest.approx(majority, abs=5e-4)
    assert task.report is None
    assert sorted(glue_folder.rglob("*")) == before


@pytest.mark.parametrize("extension", ["jsonl", "json", "csv", "tsv", "parquet"])
def test_every_format_gives_the_same_task(tmp_path, extension):
    reference = load_task(write(tmp_path / "reference" / "data.jsonl", PAIRS))
    task = load_task(str(write(tmp_path / f"data.{extension}", PAIRS)))
    assert task.fingerprint == reference.fingerprint
    assert (task.name, task.columns, task.labels) == ("data", ("sentence1", "sentence2"), ("0", "1"))
    assert task.metrics == ("accuracy", "f1")
    assert not datasets.are_progress_bars_disabled()


def test_a_single_file_has_a_stratified_tenth_held_out(tmp_path):
    path = write(tmp_path / "reviews.csv", ROWS)
    task = load_task(path)
    assert (len(task.train), len(task.validation)) == (36, 4)
    assert sorted(task.validation["label"]) == [0, 0, 1, 1]
    assert task.validation_name == "held out of reviews.csv"
    assert "(held out of reviews.csv)" in task.describe()
    assert not set(task.train["text"]) & set(task.validation["text"])
    assert load_task(path).fingerprint == task.fingerprint
    assert load_task(path, seed=1).fingerprint != task.fingerprint
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["validation", "valid", "val", "dev"])
def test_validation_split_names(tmp_path, name):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / f"{name}.csv", ROWS[:6])
    task = load_task(tmp_path)
    assert (len(task.train), len(task.validation), task.validation_name) == (40, 6, name)


def test_validation_is_preferred_over_test(tmp_path):
    for name, count in (("train", 40), ("test", 4), ("dev", 6), ("validation", 8)):
        write(tmp_path / f"{name}.jsonl", ROWS[:count])
    assert load_task(tmp_path).validation_name == "validation"


def test_shards_are_joined(tmp_path):
    write(tmp_path / "train-00000-of-00002.parquet", ROWS[:10])
    write(tmp_path / "train-00001-of-00002.parquet", ROWS[10:])
    write(tmp_path / "validation-00000-of-00001.parquet", ROWS[:4])
    task = load_task(tmp_path)
    assert task.train["text"][:] == [row["text"] for row in ROWS]
    assert len(task.validation) == 4


def test_folder_with_train_alone(tmp_path):
    write(tmp_path / "train.tsv", ROWS)
    assert load_task(tmp_path).validation_name == "held out of train.tsv"


@pytest.mark.parametrize(
    "columns",
    [
        ("sentence",),
        ("text",),
        ("sentence1", "sentence2"),
        ("question", "sentence"),
        ("question1", "question2"),
        ("premise", "hypothesis"),
        ("text_a", "text_b"),
    ],
)
@pytest.mark.parametrize("label", ["label", "labels"])
def test_columns_are_found_by_name(tmp_path, columns, label):
    rows = [dict.fromkeys(("idx", *columns), f"words {i}") | {label: i % 3} for i in range(30)]
    task = load_task(write(tmp_path / "data.jsonl", rows))
    assert task.columns == columns
    assert set(task.train.column_names) == {*columns, "label"}
    assert task.metrics == ("accuracy",)


def test_columns_can_be_named(tmp_path):
    rows = [{"title": f"t {i}", "body": f"b {i}", "text": "no", "stars": i % 2} for i in range(20)]
    path = write(tmp_path / "data.csv", rows)
    assert load_task(path, text_columns=["title", "body"], label_column="stars").columns == ("title", "body")
    assert load_task(path, text_columns="title", label_column="stars").columns == ("title",)
    with pytest.raises(
        InputError, match=r"no text column boddy: .* has the columns title, body, text, stars; name the"
    ):
        load_task(path, text_columns=["boddy"], label_column="stars")
    for columns in (["title", "stars"], ["title", "title"], ["title", "body", "text"]):
        with pytest.raises(InputError, match="one or two text columns"):
            load_task(path, text_columns=columns, label_column="stars")
    with pytest.raises(InputError, match="one or two text columns"):
        load_task(path, text_columns=["TITLE", "Stars"], label_column="stars")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1], ("0", "1")),
        ([3, 1, 20], ("1", "3", "20")),
        ([1.0, 2.0], ("1", "2")),
        (["b", "a"], ("a", "b")),
        (["1", "10", "9"], ("1", "9", "10")),
        (["1_0", "10"], ("10", "1_0")),
        ([True, False], ("false", "true")),
        ([-1, 1], ("-1", "1")),
    ],
)
def test_label_names_by_id(tmp_path, labels, names):
    task = load_task(write(tmp_path / "data.jsonl", labelled(labels * 12)))
    assert (task.kind, task.labels) == ("classification", names)
    spelled = [str(label).lower() if isinstance(label, bool) else str(label).removesuffix(".0") for label in labels]
    first = task.train.filter(lambda row: row["text"] == task.train["text"][0])["label"][0]
    assert names[first] == spelled[int(task.train["text"][0].split()[1]) % len(labels)]


def test_kind_follows_the_labels_and_can_be_overridden(tmp_path):
    path = write(tmp_path / "data.csv", labelled([0.0, 1.0, 2.5, 4.0] * 10))
    task = load_task(path)
    assert (task.kind, task.labels, task.metrics, task.num_labels) == ("regression", (), ("pearson", "spearman"), 1)
    assert 2.5 in task.train["label"]
    assert load_task(path, kind="classification").labels == ("0", "1", "2.5", "4")
    whole = write(tmp_path / "whole.csv", labelled([1, 2, 3] * 10))
    assert load_task(whole, kind="regression").kind == "regression"
    with pytest.raises(InputError, match="kind 'ranking' is unknown"):
        load_task(path, kind="ranking")


def test_folder_named_after_a_glue_task(tmp_path):
    for name in ("mrpc", "MRPC", "other"):
        write(tmp_path / name / "train.jsonl", PAIRS)
        write(tmp_path / name / "dev.jsonl", PAIRS[:6])
    assert load_task(tmp_path / "mrpc").labels == load_task(tmp_path / "MRPC").labels == GLUE["mrpc"].labels
    assert load_task(tmp_path / "other").labels == ("0", "1")
    # GLUE's own files write names; the ids stay the hub's.
    named = [row | {"label": GLUE["wnli"].labels[row["label"]]} for row in PAIRS]
    write(tmp_path / "wnli" / "train.tsv", named)
    write(tmp_path / "wnli" / "dev.tsv", named[:6])
    assert load_task(tmp_path / "wnli").validation["label"][:] == [0, 1, 0, 1, 0, 1]
    # Other columns than GLUE's: an ordinary folder.
    write(tmp_path / "cola" / "train.jsonl", ROWS)
    assert load_task(tmp_path / "cola").metrics == ("accuracy", "f1")
    write(tmp_path / "rte" / "train.jsonl", PAIRS)
    write(tmp_path / "rte" / "test.jsonl", [row | {"label": -1} for row in PAIRS])
    assert load_task(tmp_path / "rte").test.column_names == ["sentence1", "sentence2"]
    write(tmp_path / "rte" / "test.jsonl", [row | {"label": row["idx"] % 3 - 1} for row in PAIRS])
    with pytest.raises(InputError, match=r"test.jsonl, line 1: label -1 means a hidden label"):
        load_task(tmp_path / "rte")


def test_rows_and_report_split(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "validation.jsonl", [row | {"text": f"other {row['text']}"} for row in ROWS])
    task = load_task(tmp_path, train_rows=10, validation_rows=20, report_fraction=0.25)
    assert (len(task.train), len(task.validation), len(task.report)) == (10, 15, 5)
    assert sum(task.train["label"]) == 5
    assert not set(task.validation["text"]) & set(task.report["text"])
    larger = load_task(tmp_path, train_rows=20)
    assert set(task.train["text"]) < set(larger.train["text"])
    assert load_task(tmp_path, train_rows=10, seed=1).fingerprint != load_task(tmp_path, train_rows=10).fingerprint
    for count in (0, 41):
        with pytest.raises(InputError, match=f"train_rows {count} of 40 training rows: choose from 1 to 40"):
            load_task(tmp_path, train_rows=count)
    with pytest.raises(InputError, match="validation_rows 99 of 40"):
        load_task(tmp_path, validation_rows=99)
    with pytest.raises(InputError, match=r"report_fraction 1.0 is outside \[0, 1\)"):
        load_task(tmp_path, report_fraction=1.0)
    with pytest.raises(InputError, match="has no validation rows left"):
        load_task(tmp_path, validation_rows=1, report_fraction=0.5)
    with pytest.raises(InputError, match=r"every training row of task .* has the label"):
        load_task(tmp_path, train_rows=1)


GOOD = '{"text": "a", "label": 0}\n{"text": "b", "label": 1}\n'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", r"a\.jsonl is empty"),
        ("a.jsonl", "\n \n", r"a\.jsonl is empty"),
        ("a.json", "[]", r"a\.json is empty"),
        ("a.csv", "", r"a\.csv is empty"),
        ("a.csv", "text,label\n", r"a\.csv is empty"),
        ("a.jsonl", GOOD + "{nonsense\n", r"a\.jsonl, line 3: not valid JSON .*: repair or remove it"),
        ("a.jsonl", GOOD + "\n[1]\n", r"line 4: a list where an object"),
        ("a.json", "[1]", r"row 1: a int where an object"),
        ("a.json", '[{"text": "a"', r"a\.json: not valid JSON"),
        ("a.csv", 'text,label\n"a"b,0\n', r"a\.csv, line 2: malformed .*quotes"),
        ("a.csv", 'text,label\n"a,0\nb,1\n', r"a\.csv, line 3: malformed .*quotes"),
        ("a.csv", "text,label\na,0\nb,c,1\n", r"line 3: 3 fields where the header has 2: quote texts"),
        ("a.csv", "text,text\na,0\n", r"a column name twice"),
        ("a.tsv", "text\tlabel\na\tb\t0\n", r"line 2: 3 fields .* a tab inside a text needs quotes"),
        ("a.csv", "a great film,1\na bad film,0\n", r"no known text column: .*the columns a great film, 1; name the"),
        ("a.jsonl", '{"text": "a", "z": 0}\n', r"no known label column: .* has the columns text, z; .* label_column"),
        ("a.jsonl", '{"text": "a", "sentence": "a", "label": 0}\n', r"more than one choice of text column"),
        ("a.jsonl", GOOD + '{"label": 0}\n', r"a\.jsonl, line 3: no text in column text"),
        ("a.jsonl", GOOD + '{"text": null, "label": 0}\n', r"line 3: no text in column text"),
        ("a.jsonl", GOOD + '{"text": 7, "label": 0}\n', r"line 3: column text holds 7, not a text"),
        ("a.jsonl", GOOD + '{"text": "\\ud800", "label": 0}\n', r"line 3: column text is not valid Unicode"),
        ("a.csv", "text,label\na,0\n,1\n", r"line 3: no text in column text"),
        ("a.csv", "text,label\na,0\nb,\n", r"line 3: no label in column label"),
        ("a.jsonl", GOOD + '{"text": "c"}\n', r"line 3: no label in column label"),
        ("a.jsonl", GOOD + '{"text": "c", "label": NaN}\n', r"line 3: label nan in column label is not a number"),
        ("a.csv", "text,label\na,0.5\nb,nan\n", r"line 3: label nan in column label is not a number"),
        ("a.jsonl", GOOD + '{"text": "c", "label": "\\ud800"}\n', r"line 3: column label is not valid Unicode"),
        ("a.jsonl", GOOD + '{"text": "c", "label": ' + "9" * 5000 + "}\n", r"a\.jsonl, line 3: not valid JSON"),
        (
            "a.jsonl",
            GOOD + '{"text": "c", "label": 0.5}\n{"text": "d", "label": 1e300}\n',
            r"line 4: label 1.* float32",
        ),
        (
            "a.csv",
            f"text,label\na,0.5\nb,-{10**400}\n",
            r"line 3: label -10{18}\.\.\. is beyond what float32 holds, 3\.4e\+38",
        ),
        ("a.jsonl", GOOD + '{"text": "c", "label": [0, 1]}\n', r"line 3: label \[0, 1\] .* give one number"),
        ("a.jsonl", '{"text": "c", "label": 1}\n' * 9, r"has no training rows left"),
        ("a.csv", "text,label\n" + "".join(f"t{i},1\n" for i in range(9)), r"every training row .* has the label 1"),
        ("a.xlsx", "x", r"a\.xlsx has an unknown extension: use one of \.jsonl, .*\.csv, \.tsv, .*\.parquet"),
        ("a.parquet", "PAR1 nonsense", r"a\.parquet is damaged, or not what its name says"),
        ("a.csv", b"text,label\ncaf\xe9,0\n", r"a\.csv is not UTF-8 \(byte 0xe9 at offset 14\): .* encoding='latin-1'"),
    ],
)
def test_bad_files_are_one_line_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_task(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("extension", ["csv", "tsv"])
def test_texts_of_any_length_and_labels_of_any_size(tmp_path, extension):
    limit = csv.field_size_limit()
    long = "a" * (limit + 1)
    rows = [{"text": f"{long} {i}", "label": (7, 10**400)[i % 2]} for i in range(20)]
    task = load_task(write(tmp_path / f"data.{extension}", rows))
    assert len(task.train["text"][0]) > limit
    assert task.labels == ("7", str(10**400))
    assert csv.field_size_limit() == limit


def test_labels_that_are_no_numbers_for_regression(tmp_path):
    path = write(tmp_path / "data.jsonl", labelled([1, 2, "high"] * 5))
    with pytest.raises(InputError, match=r"line 3: label 'high' is no number"):
        load_task(path, kind="regression")


def test_validation_label_never_seen_in_training(tmp_path):
    write(tmp_path / "train.jsonl", labelled(["good", "bad"]))
    write(tmp_path / "dev.jsonl", labelled(["good", "goood"]))
    with pytest.raises(InputError, match=r"dev.jsonl, line 2: label 'goood' is not one of .* \(bad, good\)"):
        load_task(tmp_path)


def test_validation_columns_must_be_the_training_columns(tmp_path):
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "dev.jsonl", PAIRS)
    with pytest.raises(
        InputError, match=r"no text column text: .*dev.jsonl has the columns sentence1, sentence2, label"
    ):
        load_task(tmp_path)


def test_folders_without_a_clear_training_split(tmp_path):
    with pytest.raises(InputError, match="no training split \\(found: no data files\\)"):
        load_task(tmp_path)
    write(tmp_path / "data.csv", ROWS)
    with pytest.raises(InputError, match=r"no training split \(found: data.csv\): call the file train.jsonl"):
        load_task(tmp_path)
    write(tmp_path / "train.csv", ROWS)
    write(tmp_path / "train.json", ROWS)
    with pytest.raises(InputError, match=r"several files for split train \(train.csv, train.json\): keep one"):
        load_task(tmp_path)


def test_glue_style_tsv_with_unbalanced_quotes(tmp_path):
    path = tmp_path / "data.tsv"
    path.write_text("sentence\tlabel\n" + "".join(f'"odd {i}\t{i % 2}\n' for i in range(20)), encoding="utf-8-sig")
    task = load_task(path)
    assert len(task.train) + len(task.validation) == 20
    assert task.train["sentence"][0].startswith('"odd')
