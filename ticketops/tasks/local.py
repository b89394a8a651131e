"""Tasks from local files: JSON, JSON lines, CSV, TSV or Parquet, one file or a folder of splits."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ticketops.errors import InputError
from ticketops.tasks.glue import GLUE, glue_name
from ticketops.tasks.sampling import hold_out
from ticketops.tasks.task import Kind, Task, features

TEXT_COLUMNS = (
    ("sentence1", "sentence2"),
    ("question", "sentence"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("text_a", "text_b"),
    ("text1", "text2"),
    ("sentence",),
    ("text",),
)
LABEL_COLUMNS = (("label",), ("labels",))
VALIDATION_NAMES = ("validation", "validation_matched", "valid", "val", "dev", "dev_matched", "test")

# The share of a file without a validation split that is held out.
HELD_OUT = 0.1

# Of the float32 that a regression's labels are.
_LARGEST = float(np.finfo(np.float32).max)

# A row and where it stands, in words for an error.
Row = tuple[str, Mapping[str, Any]]
Label = str | int | float


def load_local(
    path: Path,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    kind: Kind | None = None,
    encoding: str | None = None,
    seed: int = 0,
) -> Task:
    """Loads a task from a file or a folder and never writes there.

    A folder holds `train.*` and a validation split (the first of `VALIDATION_NAMES` that is there); shards named as the
    hub names them are joined. A file, or a folder with `train.*` alone, has a stratified tenth held out. A folder named
    after a GLUE task and with its columns gets that task's labels and metrics.

    Args:
        path: the file or folder.
        text_columns: one or two text columns; found by name when left out.
        label_column: the label column; `label` or `labels` when left out.
        kind: overrides what the labels say: numbers that are not all whole mean regression.
        encoding: of text files; UTF-8 when left out.
        seed: chooses the held-out rows.

    Returns:
        The whole task. Binary F1 counts the second label as the positive one.

    Raises:
        InputError: a file is missing, unreadable or malformed, or a row has no usable text or label.
    """
    if kind not in (None, "classification", "regression"):
        raise InputError(f"kind {kind!r} is unknown: choose classification or regression")
    train_files, validation_files, validation_name = _split_files(path) if path.is_dir() else ([path], [], "")
    tables = [
        [row for file in files for row in _read(file, encoding)] for files in (train_files, validation_files) if files
    ]

    texts: tuple[str, ...] = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())
    label = label_column or ""
    # What was found in the training rows must stand in the validation rows.
    for table, (file, *_) in zip(tables, (train_files, validation_files), strict=False):
        found = list(dict.fromkeys(column for _, row in table for column in row))
        texts = _find_columns("text", TEXT_COLUMNS, texts, found, file)
        (label,) = _find_columns("label", LABEL_COLUMNS, (label,) if label else (), found, file)
    if len(texts) > 2 or label in texts or "label" in texts:
        raise InputError(
            f"text columns {', '.join(texts)} with label column {label}: give one or two text columns, none of them "
            f"called label or used as the label"
        )

    values = [[_label(where, row.get(label), label) for where, row in table] for table in tables]
    kind, labels, metrics, ids = _scheme(path, texts, values, kind)
    encode = _number if kind == "regression" else partial(_class, ids=ids)
    splits = [
        datasets.Dataset.from_dict(
            {column: [_text(where, row.get(column), column) for where, row in table] for column in texts}
            | {"label": [encode(where, value) for (where, _), value in zip(table, column, strict=True)]},
            features=features(kind, labels, texts),
        )
        for table, column in zip(tables, values, strict=True)
    ]
    if len(splits) == 1:
        splits = list(hold_out(splits[0], texts, max(1, round(HELD_OUT * len(splits[0]))), seed))
        validation_name = f"held out of {train_files[0].name}"
    name = path.resolve().name if path.is_dir() else path.stem
    return Task(name, kind, labels, texts, metrics, splits[0], splits[1], validation_name)


def _scheme(
    path: Path, texts: tuple[str, ...], values: Sequence[Sequence[Label]], kind: Kind | None
) -> tuple[Kind, tuple[str, ...], tuple[str, ...], Mapping[Label, int]]:
    """The kind, the label names, the metrics, and the id of each label as it is written in the files."""
    glue = GLUE.get(glue_name(path.resolve().name) or "") if path.is_dir() else None
    if glue is not None and glue.columns == texts and kind in (None, glue.kind):
        # The hub writes ids, GLUE's own files write names.
        ids: dict[Label, int] = {value: i for i, name in enumerate(glue.labels) for value in (i, name)}
        return glue.kind, glue.labels, glue.metrics, ids
    numeric = not any(isinstance(label, str) for column in values for label in column)
    fractional = any(isinstance(label, float) for column in values for label in column)
    if kind == "regression" or (kind is None and numeric and fractional):
        return "regression", (), ("pearson", "spearman"), {}
    # The union over the splits is the training labels: a validation label that is not among them is an error.
    known = sorted(set(values[0]), key=lambda value: (isinstance(value, str), value))
    metrics = ("accuracy", "f1") if len(known) == 2 else ("accuracy",)
    return "classification", tuple(map(str, known)), metrics, {value: i for i, value in enumerate(known)}


def _split_files(folder: Path) -> tuple[list[Path], list[Path], str]:
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"folder {folder} cannot be read: {error.strerror or error}") from error
    splits: dict[str, list[Path]] = {}
    for file in files:
        if file.suffix.lower() in _READERS and file.is_file():
            # The hub names the parts of a split train-00000-of-00004.parquet.
            splits.setdefault(re.sub(r"-\d+-of-\d+$", "", file.stem.lower()), []).append(file)
    if "train" not in splits:
        found = ", ".join(file.name for files in splits.values() for file in files) or "no data files"
        raise InputError(
            f"folder {folder} has no training split (found: {found}): call the file train.jsonl (or "
            f".csv, ...), or give the path of a single file"
        )
    validation = next((name for name in VALIDATION_NAMES if name in splits), "")
    for name in filter(None, ("train", validation)):
        if len(splits[name]) > 1 and any(file.stem.lower() == name for file in splits[name]):
            names = ", ".join(file.name for file in splits[name])
            raise InputError(f"folder {folder} has several files for split {name} ({names}): keep one of them")
    return splits["train"], splits.get(validation, []), validation


def _read(file: Path, encoding: str | None) -> list[Row]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise InputError(f"file {file} has an unknown extension: use one of {', '.join(_READERS)}")
    try:
        rows = list(reader(file, encoding or "utf-8-sig"))
    except UnicodeError as error:
        raise InputError(
            f"file {file} is not {encoding or 'UTF-8'} ({error}): say what it is with --encoding"
        ) from error
    except OSError as error:
        raise InputError(f"file {file} cannot be read: {error.strerror or error}") from error
    if not rows:
        raise InputError(f"file {file} is empty: it needs at least one row with text and label")
    return rows


def _read_json(file: Path, encoding: str) -> Iterator[Row]:
    """One array of objects, or one object a line; both go by either extension."""
    content = file.read_text(encoding=encoding)
    if content.lstrip().startswith("["):
        values = [(f"{file}, row {i}", value) for i, value in enumerate(_parse(content, str(file)), start=1)]
    else:
        # Not splitlines(): JSON strings may hold the Unicode line separators bare.
        lines = ((f"{file}, line {i}", line) for i, line in enumerate(content.split("\n"), start=1))
        values = [(where, _parse(line, where)) for where, line in lines if line.strip()]
    for where, value in values:
        if not isinstance(value, dict):
            raise InputError(f"{where}: a {type(value).__name__} where an object of columns belongs: repair the row")
        yield where, value


def _parse(content: str, where: str) -> Any:
    try:
        return json.loads(content)
    # A number of more than 4,300 digits is a ValueError, too.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not valid JSON ({error}): repair or remove it") from error


def _read_delimited(file: Path, encoding: str) -> Iterator[Row]:
    # Tab-separated files have no quoting: GLUE's own are full of unbalanced quotes.
    tabs = file.suffix.lower() == ".tsv"
    with file.open(encoding=encoding, newline="") as stream:
        reader = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(stream, strict=True)
        # The module's limit is of the whole process, and lower than texts are long.
        limit = csv.field_size_limit(2**31 - 1)
        try:
            header = next(reader, [])
            if len(set(header)) != len(header):
                raise InputError(f"file {file} has a column name twice ({', '.join(header)}): rename one")
            for fields in reader:
                where = f"{file}, line {reader.line_num}"
                if fields and len(fields) != len(header):
                    hint = "a tab inside a text needs CSV instead" if tabs else "quote texts that hold commas"
                    raise InputError(f"{where}: {len(fields)} fields where the header has {len(header)}: {hint}")
                if fields:
                    yield where, {name: field or None for name, field in zip(header, fields, strict=True)}
        except csv.Error as error:
            raise InputError(f"{file}, line {reader.line_num}: malformed ({error}): repair the quotes") from error
        finally:
            csv.field_size_limit(limit)


def _read_parquet(file: Path, encoding: str) -> Iterator[Row]:
    try:
        rows = pq.read_table(file).to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"file {file} is not a whole Parquet file ({error}): write it again") from error
    return ((f"{file}, row {i}", row) for i, row in enumerate(rows, start=1))


_READERS: Mapping[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".csv": _read_delimited,
    ".tsv": _read_delimited,
    ".parquet": _read_parquet,
}


def _find_columns(
    role: str,
    candidates: Sequence[tuple[str, ...]],
    given: Sequence[str],
    found: Sequence[str],
    path: Path,
) -> tuple[str, ...]:
    """The given columns, or the one candidate that is there and is not part of a larger one that is there too."""
    listing = f"{path} has the columns {', '.join(found)}"
    option = f"{role}_columns" if role == "text" else f"{role}_column"
    if given:
        missing = [column for column in given if column not in found]
        if missing:
            raise InputError(f"no {role} column {', '.join(missing)}: {listing}; correct the file or {option}")
        return tuple(given)
    there = [columns for columns in candidates if set(columns) <= set(found)]
    there = [columns for columns in there if not any(set(columns) < set(other) for other in there)]
    if len(there) != 1:
        problem = "more than one choice of" if there else "no known"
        raise InputError(f"{problem} {role} column: {listing}; name the right one with {option}")
    return there[0]


def _text(where: str, value: Any, column: str) -> str:
    if value is None:
        raise InputError(f"{where}: no text in column {column}: fill it in or remove the row")
    if not isinstance(value, str):
        raise InputError(f"{where}: column {column} holds {value!r}, not a text: put a string there")
    return _unicode(where, value, column)


def _unicode(where: str, value: str, column: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: column {column} is not valid Unicode ({error.reason}): repair the text") from error
    return value


def _label(where: str, value: Any, column: str) -> Label:
    """A number where the label is one or is spelt like one (CSV has only text), else its text; whole numbers as int."""
    if isinstance(value, str):
        value = value.strip()
    if value is None or value == "":
        raise InputError(f"{where}: no label in column {column}: fill it in or remove the row")
    if isinstance(value, bool):
        return str(value).lower()
    # Python would read 1_0 as 10.
    if isinstance(value, str) and "_" not in value:
        with suppress(ValueError):
            value = int(value) if re.fullmatch(r"[+-]?\d+", value) else float(value)
    if isinstance(value, str):
        return _unicode(where, value, column)
    if not isinstance(value, int | float):
        raise InputError(f"{where}: label {value!r} in column {column}: give one number, string or true/false a row")
    # Python's integers are as large as they like, and may have no float.
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where}: label {value} in column {column} is not a number: fill it in or remove the row")
    return int(value) if value == int(value) else value


def _number(where: str, value: Label) -> float:
    if isinstance(value, str):
        raise InputError(f"{where}: label {value!r} is no number: regression needs one, or use kind=classification")
    if abs(value) > _LARGEST:
        raise InputError(
            f"{where}: label {value!r:.20}... is beyond what float32 holds, {_LARGEST:.1e}: scale the labels"
        )
    return float(value)


def _class(where: str, value: Label, ids: Mapping[Label, int]) -> int:
    if value in ids:
        return ids[value]
    if value == -1:
        raise InputError(f"{where}: label -1 means a hidden label: use a split with labels")
    known = ", ".join(str(label) for label in ids)
    raise InputError(f"{where}: label {value!r} is not one of the training labels ({known}): correct or remove the row")
