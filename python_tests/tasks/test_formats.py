"""The same table gives the same task in every container that people keep tables in."""

import bz2
import contextlib
import csv
import gzip
import json
import lzma
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.tasks import Task
from ticketops.tasks.local import load_local

Row = dict[str, Any]


def delimited(
    path: Path, rows: list[Row], *, open: Callable[..., Any] = open, encoding="utf-8", **options: Any
) -> Path:
    with open(path, "wt", newline="", encoding=encoding) as file:
        table = csv.DictWriter(file, list(rows[0]), **options)
        table.writeheader()
        table.writerows(rows)
    return path


def lines(path: Path, rows: list[Row], *, open: Callable[..., Any] = open, encoding="utf-8") -> Path:
    with open(path, "wt", encoding=encoding, newline="") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def of_pandas(orient: str, **options: Any) -> Callable[[Path, list[Row]], Path]:
    def write(folder: Path, rows: list[Row]) -> Path:
        pd.DataFrame(rows).to_json(folder / "data.json", orient=orient, **options)
        return folder / "data.json"

    return write


def parquet(path: Path, rows: list[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)
    return path


def arrow(path: Path, rows: list[Row], new: Callable[..., Any]) -> Path:
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return path


@pytest.fixture(autouse=True)
def _no_bars():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def saved(folder: Path, rows: list[Row], **options: Any) -> Path:
    datasets.Dataset.from_list(rows).save_to_disk(folder / "data", **options)
    return folder / "data"


def polluted(path: Path, rows: list[Row]) -> Path:
    """The columns among others of kinds that no task can use."""
    others = {"id": 1, "bytes": b"\xff", "nested": {"text": ["a"]}, "a.b": None}
    return parquet(path, [{**others, **row, "list": [1.5]} for row in rows])


#: Writes the rows into a folder, and says what of it is the task.
CONTAINERS: dict[str, Callable[[Path, list[Row]], Path]] = {
    "csv": lambda folder, rows: delimited(folder / "data.csv", rows),
    "csv with a mark": lambda folder, rows: delimited(folder / "data.csv", rows, encoding="utf-8-sig"),
    "csv of bare line feeds": lambda folder, rows: delimited(folder / "data.csv", rows, lineterminator="\n"),
    "csv all quoted": lambda folder, rows: delimited(folder / "data.csv", rows, quoting=csv.QUOTE_ALL),
    "csv by pandas": lambda folder, rows: (pd.DataFrame(rows).to_csv(folder / "data.csv"), folder / "data.csv")[1],
    "csv with semicolons": lambda folder, rows: delimited(folder / "data.csv", rows, delimiter=";"),
    "csv with bars": lambda folder, rows: delimited(folder / "data.csv", rows, delimiter="|"),
    "csv.gz": lambda folder, rows: delimited(folder / "data.csv.gz", rows, open=gzip.open),
    "csv.xz": lambda folder, rows: delimited(folder / "data.csv.xz", rows, open=lzma.open),
    "quoted tsv": lambda folder, rows: delimited(folder / "data.tsv", rows, delimiter="\t", quoting=csv.QUOTE_ALL),
    "quoted tsv.gz": lambda folder, rows: delimited(
        folder / "data.tsv.gz", rows, delimiter="\t", quoting=csv.QUOTE_NONNUMERIC, open=gzip.open
    ),
    "jsonl": lambda folder, rows: lines(folder / "data.jsonl", rows),
    "ndjson": lambda folder, rows: lines(folder / "data.ndjson", rows),
    "jsonl.gz": lambda folder, rows: lines(folder / "data.jsonl.gz", rows, open=gzip.open),
    "jsonl.bz2": lambda folder, rows: lines(folder / "data.jsonl.bz2", rows, open=bz2.open),
    "json": lambda folder, rows: ((folder / "data.json").write_text(json.dumps(rows)), folder / "data.json")[1],
    "json of columns": lambda folder, rows: (
        (folder / "data.json").write_text(
            json.dumps({name: [row[name] for row in rows] for name in rows[0]}, indent=1)
        ),
        folder / "data.json",
    )[1],
    **{f"pandas {orient}": of_pandas(orient) for orient in ("columns", "records", "index", "split", "table")},
    "pandas lines": of_pandas("records", lines=True),
    "parquet": lambda folder, rows: parquet(folder / "data.parquet", rows),
    "parquet among other columns": lambda folder, rows: polluted(folder / "data.parquet", rows),
    "parquet by pandas": lambda folder, rows: (
        pd.DataFrame(rows).astype({list(rows[0])[-1]: "category"}).to_parquet(folder / "data.parquet"),
        folder / "data.parquet",
    )[1],
    "arrow stream": lambda folder, rows: arrow(folder / "data.arrow", rows, pa.ipc.new_stream),
    "arrow file": lambda folder, rows: arrow(folder / "data.arrow", rows, pa.ipc.new_file),
    "save_to_disk": saved,
    "save_to_disk in shards": lambda folder, rows: saved(folder, rows, num_shards=2),
}


def same(task: Task, other: Task) -> bool:
    return task.fingerprint == other.fingerprint and task.validation_name.startswith("held out of data")


@st.composite
def tables(draw: st.DrawFn, texts: st.SearchStrategy[str], least: int = 10) -> list[Row]:
    names = draw(st.sampled_from([("text",), ("Sentence",), ("sentence1", "sentence2"), ("review",)]))
    label = draw(st.sampled_from(["label", "Label", "sentiment"]))
    labels: Any = draw(
        st.sampled_from(
            [[0, 1], [3, 1, 20], [2.0, 1.0], [0.5, 1.25, 3.0], [True, False], ["good", "bad"], ["01", "1"], [-1, 1]]
        )
    )
    count = draw(st.integers(least, 14))
    return [
        {name: f"{draw(texts)}{row}" for name in names} | {label: labels[row % len(labels)]} for row in range(count)
    ]


# Lone surrogates are no text; pandas leaves a bare carriage return unquoted, which ends a row.
ANY_TEXT = st.text(
    st.one_of(st.sampled_from("ab \t\n\"',;|\\\u2028\ufeff\0é"), st.characters(codec="utf-8")), max_size=9
).map(lambda text: text.replace("\r", "\r\n"))


@settings(max_examples=5)
@given(rows=tables(ANY_TEXT))
def test_a_table_is_the_same_task_in_every_container(tmp_path_factory, rows):
    reference = load_local(lines(tmp_path_factory.mktemp("table") / "data.jsonl", rows))
    for name, write in CONTAINERS.items():
        folder = tmp_path_factory.mktemp("table")
        assert same(load_local(write(folder, rows)), reference), name


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16", "utf-16-le", "utf-32", "utf-8-sig"])
@pytest.mark.parametrize("write", [delimited, lines])
def test_files_of_another_encoding_are_the_same_task_where_it_is_named(tmp_path, encoding, write):
    rows = [{"text": f"café {i}", "label": i % 2} for i in range(12)]
    name = "data.csv" if write is delimited else "data.jsonl"
    (tmp_path / "plain").mkdir()
    reference = load_local(write(tmp_path / "plain" / name, rows))
    path = write(tmp_path / name, rows, encoding=encoding)
    assert same(load_local(path, encoding=encoding), reference)
    if encoding != "utf-8-sig":
        with pytest.raises(InputError, match=r"UTF-8|encoding='utf-16") as caught:
            load_local(path)
        assert "encoding=" in str(caught.value)
        with pytest.raises(InputError, match="which has no text files"):
            load_local(parquet(tmp_path / "data.parquet", rows), encoding=encoding)


def test_a_mark_that_contradicts_the_named_encoding_is_refused(tmp_path):
    rows = [{"text": f"café {i}", "label": i % 2} for i in range(12)]
    path = delimited(tmp_path / "data.csv", rows, encoding="utf-8-sig")
    with pytest.raises(
        InputError, match=r"is not ISO8859-1 \(it starts with the mark of utf-8\): say encoding='utf-8'"
    ):
        load_local(path, encoding="latin-1")
    path.write_bytes(b"text,label\n" + b"a,0\n" * 50_000 + b"\xe9,1\n")
    with pytest.raises(
        InputError, match=r"byte 0xe9 at offset 200011\): name its encoding, such as encoding='latin-1'"
    ):
        load_local(path)
    with pytest.raises(InputError, match="encoding 'utf-9' is unknown"):
        load_local(path, encoding="utf-9")


# What GLUE's own files hold: quotes are text, however they stand.
@pytest.mark.parametrize(
    "texts",
    [
        ['he said "so" {}', '"so" he said {}', "plain {}"],
        ['"begins', 'ends"', "{}"],
        ['"a wholly quoted sentence {}"', "another {}"],
        ['say ""what"" {}', '"" {}', '{} "'],
        ['"a {}', 'b {}"', '"c {}'],
        ['"', '""', '"""', "{}"],
        ["it 's {}", "`` {} ''"],
    ],
)
def test_quotes_of_a_bare_tsv_are_text(tmp_path, texts):
    rows = [{"sentence": texts[i % len(texts)].format(i), "label": i % 2} for i in range(14)]
    (tmp_path / "data.tsv").write_text(
        "sentence\tlabel\n" + "".join(f"{row['sentence']}\t{row['label']}\n" for row in rows), encoding="utf-8"
    )
    assert same(load_local(tmp_path / "data.tsv"), load_local(lines(tmp_path / "data.jsonl", rows)))


@pytest.mark.parametrize(
    "texts",
    [
        ['he said "so" {}', "plain {}"],
        ["two\nlines {}", "plain {}"],
        ["a\ttab {}", "plain {}"],
        ['"{}"', "plain {}"],
        ['an "odd one {}', "plain {}"],
        ['"', '""', "{}"],
    ],
)
def test_quotes_of_a_quoted_tsv_are_not(tmp_path, texts):
    rows = [{"sentence": texts[i % len(texts)].format(i), "label": i % 2} for i in range(14)]
    path = delimited(tmp_path / "data.tsv", rows, delimiter="\t")
    task = load_local(path)
    assert same(task, load_local(lines(tmp_path / "data.jsonl", rows)))
    assert task.remarks == ("data.tsv: quotes read as those of CSV",)


def test_a_quoted_tsv_with_one_malformed_row_is_refused(tmp_path):
    rows = [f'"he said ""{i}"""\t{i % 2}' for i in range(20)]
    rows[7] = '"he said "7" there"\t1'
    (tmp_path / "data.tsv").write_text("\n".join(["text\tlabel", *rows]))
    with pytest.raises(InputError, match=r"data.tsv, line 9: malformed quotes, in a file that quotes: repair them"):
        load_local(tmp_path / "data.tsv")


@pytest.mark.data
@pytest.mark.parametrize("name", ["cola", "mrpc", "rte", "sst2", "wnli"])
@pytest.mark.parametrize("rows", [20, 500, None])
def test_glue_reads_the_same_from_bare_and_from_quoted_tsv(glue_folder, tmp_path, name, rows):
    table = [json.loads(line) for line in (glue_folder / name / "validation.jsonl").open(encoding="utf-8")][:rows]
    columns = list(table[0])
    bare = "".join("\t".join(str(row[column]) for column in columns) + "\n" for row in table)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "data.tsv").write_text("\t".join(columns) + "\n" + bare, encoding="utf-8")
    reference = load_local(lines(tmp_path / "data.jsonl", table))
    assert same(load_local(tmp_path / "bare" / "data.tsv"), reference)
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL):
        assert same(load_local(delimited(tmp_path / "data.tsv", table, delimiter="\t", quoting=quoting)), reference)


def test_the_delimiter_is_the_one_that_divides_every_row(tmp_path):
    (tmp_path / "a.csv").write_text('"text, as sent";label\n' + "".join(f"a, b {i};{i % 2}\n" for i in range(12)))
    task = load_local(tmp_path / "a.csv", text_columns="text, as sent")
    assert task.train["text, as sent"][0].startswith("a, b")
    assert task.remarks[0] == "a.csv: fields separated by semicolons"
    (tmp_path / "b.csv").write_text("text (raw; long),label\n" + "".join(f"a; {i},{i % 2}\n" for i in range(12)))
    assert load_local(tmp_path / "b.csv", text_columns="text (raw; long)").remarks == (
        "texts in text (raw; long), labels in label",
    )
    (tmp_path / "c.tsv").write_text("text,label\n" + "".join(f"a {i},{i % 2}\n" for i in range(12)))
    assert load_local(tmp_path / "c.tsv").remarks == ("c.tsv: fields separated by commas",)


def test_colas_files_have_no_header(tmp_path):
    rows = [f'gj04\t{i % 2}\t{"*" * (i % 2)}\tthe "odd one {i}\n' for i in range(12)]
    (tmp_path / "CoLA").mkdir()
    for name in ("train", "dev"):
        (tmp_path / "CoLA" / f"{name}.tsv").write_text("".join(rows))
    (tmp_path / "CoLA" / "test.tsv").write_text("index\tsentence\n" + "".join(f"{i}\tx {i}\n" for i in range(5)))
    task = load_local(tmp_path / "CoLA")
    assert (task.metrics, task.columns, len(task.train)) == (("matthews_correlation",), ("sentence",), 12)
    assert task.train["sentence"][0] == 'the "odd one 0'
    assert task.train["label"][:] == [0, 1] * 6
    assert task.test.column_names == ["sentence"]


def test_only_the_wanted_columns_are_read_and_a_batch_at_a_time(tmp_path):
    blob = "x" * 1_000_000
    rows = 600
    table = pa.table(
        {
            "blob": pa.array([blob], pa.string())
            .dictionary_encode()
            .take(pa.array([0] * rows))
            .cast(pa.large_string()),
            "text": [f"text {i}" for i in range(rows)],
            "label": [i % 2 for i in range(rows)],
        }
    )
    pq.write_table(table, tmp_path / "data.parquet")
    del table
    before = pa.default_memory_pool().max_memory()
    load_local(tmp_path / "data.parquet")
    assert (tmp_path / "data.parquet").stat().st_size < 2_000_000
    assert pa.default_memory_pool().max_memory() - before < 10_000_000


GOOD = [{"text": f"t {i}", "label": i % 2} for i in range(12)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "a", "label": 0, "label": 1}\n{}\n',
            r"line 1: not valid JSON \(the key 'label' is there twi",
        ),
        (
            "a.json",
            '[{"text": "a", "label": 0, "label": 1}]',
            r"a.json: not valid JSON \(the key 'label' is there twice",
        ),
        ("a.jsonl", '{"text": "a", "n": {"x": 0, "x": 1}}\n{}\n', r"the key 'x' is there twice"),
        ("a.json", '{"a": {"x": 1}, "b": {"y": 1}}', r"one object of objects with different keys"),
        ("a.json", '{"a": {"x": 1}, "b": {"x": 1}}', r"rows and columns look alike: write an array of rows"),
        ("a.json", '{"text": ["a", "b"], "label": [1]}', r"a.json is damaged, or not what its name says"),
        ("a.jsonl", "[" * 100_000, r"a.jsonl: not valid JSON"),
        ("a.csv", "text,label\n\n\n", r"a.csv is empty"),
        ("a.csv", "\n\n", r"a.csv is empty"),
        ("a.csv", "t\0e\0x\0t\0,\0l\0\n\0", r"zero bytes\): say encoding='utf-16-le'"),
        ("a.jsonl", '{"text": "a"}'.encode("utf-16-be"), r"zero bytes\): say encoding='utf-16-be'"),
        ("a.csv", "text,label\n".encode("utf-32"), r"the mark of utf-32\): say encoding='utf-32'"),
        ("a.csv", b"\0" * 99, r"zero bytes in its header: write it again"),
        ("a.csv", "text,label\na,0\n\0\0,1\n", r"line 3: a zero byte"),
        ("a.jsonl", '{"text": "a", "label": "1\\u0000"}\n', r"row 1: label '1.x00' in column label has a zero byte"),
        ("a.csv", gzip.compress(b"text,label\n"), r"a.csv is compressed by gzip: call it a.csv.gz"),
        ("a.csv", b"PK\x03\x04" + b"x" * 99, r"a.csv is a zip archive or a spreadsheet: unpack it"),
        ("a.json", b"PAR1" + b"x" * 99, r"a.json is a Parquet file: call it .parquet"),
        ("a.json", '{"columns": ["text", "text", "label"], "data": [["a", "b", 1]]}', r"a column name twice \(text\)"),
        ("a.csv", ",".join(f"c{i}" for i in range(100_000)), r"has the columns c0, .*, c19 and 99,980 more; name"),
        ("a.csv", ",".join(f"c{min(i, 99_998)}" for i in range(100_000)), r"a column name twice \(c99998\)"),
        (
            "a.jsonl",
            "{" + ",".join(f'"{min(i, 99_998)}":0' for i in range(100_000)) + "}\n{}",
            r"'99998' is there twice",
        ),
        ("a.csv", "text,label\na,0\nb\n", r"line 3: 1 fields where the header has 2"),
        ("a.csv", "text\na\n", r"no known label column: .* has the columns text"),
        ("a.csv.gz", b"text,label\na,0\n", r"a.csv.gz is damaged, or not all of it is there"),
        ("a.csv.gz", gzip.compress(b"text,label\n" + b"a,0\n" * 999, mtime=0)[:-20], r"a.csv.gz is damaged"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 999)[:-30], r"a.jsonl.xz is damaged, or not all of it"),
        ("a.parquet.gz", b"", r"unknown extension"),
        ("a.parquet", b"", r"a.parquet is damaged"),
        ("a.arrow", b"", r"a.arrow is damaged|a.arrow cannot be read"),
        ("a.arrow", b"ARROW1\0\0nonsense", r"a.arrow is damaged"),
        (
            "a.parquet",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            r"pointer of Git LFS.* git lfs pull",
        ),
        ("a.csv.gz", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", r"pointer of Git LFS"),
    ],
)
def test_damaged_files_are_one_line_errors(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as caught:
        load_local(path)
    assert "\n" not in str(caught.value)


@settings(max_examples=150)
@given(
    data=st.data(),
    name=st.sampled_from(["csv", "csv.gz", "quoted tsv", "jsonl", "json", "parquet", "arrow stream", "arrow file"]),
)
def test_a_changed_byte_gives_one_line_or_a_task(tmp_path_factory, data, name):
    path = CONTAINERS[name](tmp_path_factory.mktemp("damaged"), GOOD)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    with contextlib.suppress(InputError):
        load_local(path)


def test_a_saved_data_set_without_a_file_or_with_a_broken_description_is_refused(tmp_path):
    path = saved(tmp_path, GOOD, num_shards=2)
    first, *_ = sorted(path.glob("*.arrow"))
    content = first.read_bytes()
    first.unlink()
    with pytest.raises(InputError, match="data"):
        load_local(path)
    first.write_bytes(content)
    assert len(load_local(path).train) == 11
    for name in ("state.json", "dataset_info.json"):
        kept = (path / name).read_text()
        for broken in ("[]", "{", "null"):
            (path / name).write_text(broken)
            with pytest.raises(InputError):
                load_local(path)
        (path / name).write_text(kept)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder, file: file.unlink(), r"state.json lists the file .*, which is not in its folder"),
        (lambda folder, file: (file.rename(folder.parent / file.name), _relist(folder, f"../{file.name}")), r"\.\./"),
        (lambda folder, file: (file.unlink(), os.mkfifo(file)), r"is a pipe, not a file"),
        (lambda folder, file: _relist(folder, "/dev/zero"), r"lists the file /dev/zero"),
        (lambda folder, file: (folder / "state.json").write_text("[" * 100_000), r"state.json is nested too deeply"),
    ],
)
def test_a_saved_data_set_has_its_files_in_its_folder(tmp_path, damage, message):
    folder = tmp_path / "saved"
    datasets.Dataset.from_list(GOOD).save_to_disk(folder)
    damage(folder, next(folder.glob("*.arrow")))
    with pytest.raises(InputError, match=message):
        load_local(folder)


def _relist(folder, name):
    state = json.loads((folder / "state.json").read_text())
    (folder / "state.json").write_text(json.dumps({**state, "_data_files": [{"filename": name}]}))


def test_a_stream_that_lacks_its_end_is_not_all_there(tmp_path):
    table = pa.Table.from_pylist(GOOD)
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)
        # What a writer that is killed now leaves behind: whole batches.
        file.flush()
        (tmp_path / "b.arrow").write_bytes((tmp_path / "a.arrow").read_bytes())
    assert len(load_local(tmp_path / "a.arrow").train) > 0
    with pytest.raises(InputError, match=r"b.arrow is damaged, or not all of it is there"):
        load_local(tmp_path / "b.arrow")


def test_names_of_classes_come_from_the_file_where_it_has_them(tmp_path):
    types = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "new"])}
    )
    rows = datasets.Dataset.from_list(GOOD, features=types)
    rows.to_parquet(tmp_path / "data.parquet")
    rows.save_to_disk(tmp_path / "data")
    for path in (tmp_path / "data.parquet", tmp_path / "data"):
        task = load_local(path)
        assert task.labels == ("neg", "pos", "new")
        assert set(task.train["label"]) == {0, 1}
    hidden = rows.map(lambda row: {"label": row["label"] - 1})
    hidden.to_parquet(tmp_path / "data.parquet")
    with pytest.raises(InputError, match=r"row 1: label -1 means a hidden label"):
        load_local(tmp_path / "data.parquet", kind="classification")
