"""Tasks from local files: one file, a folder of splits, a clone of a data set of the hub, or a saved data set."""

import bisect
import itertools
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ticketops.errors import OWN_LOOP, InputError, spelled
from ticketops.tasks.formats import Source, bare_name, open_source
from ticketops.tasks.glue import GLUE, glue_name
from ticketops.tasks.labels import Labels, Untyped, encode, find_scheme, read_label
from ticketops.tasks.sampling import hold_out
from ticketops.tasks.splits import find_splits
from ticketops.tasks.task import Kind, Task, features
from ticketops.text import some

# Accepted column names, in any case. The second group is searched only if no name of the first is there.
TEXT_COLUMNS = (
    (
        ("sentence1", "sentence2"),
        ("question", "sentence"),
        ("question1", "question2"),
        ("premise", "hypothesis"),
        ("text_a", "text_b"),
        ("text1", "text2"),
        ("sentence",),
        ("text",),
    ),
    (
        ("#1 string", "#2 string"),
        ("sentence_a", "sentence_b"),
        ("sentence_1", "sentence_2"),
        *(
            (name,)
            for name in (
                *("review", "content", "comment", "comment_text", "tweet", "message", "body", "document", "utterance"),
                *("review_text", "reviewtext", "query", "question", "headline", "title", "description", "article"),
                *("sms", "post", "abstract", "input", "prompt", "phrase"),
            )
        ),
    ),
)
LABEL_COLUMNS = (
    (("label",), ("labels",)),
    tuple(
        (name,)
        for name in (
            *(
                "sentiment",
                "class",
                "category",
                "target",
                "gold_label",
                "is_duplicate",
                "quality",
                "score",
                "similarity",
            ),
            *("rating", "stars", "intent", "topic", "emotion", "polarity", "y"),
        )
    ),
)

# Share of the training rows that is held out for validation if there is no validation split.
HELD_OUT = 0.1


def load_local(
    path: Path,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    kind: Kind | None = None,
    encoding: str | None = None,
    seed: int = 0,
) -> Task:
    """Loads a task from a file or a folder, and writes nothing there.

    A folder has files of a training split and, optionally, of a validation and a test split: see `find_splits`. Without
    a validation split, a stratified tenth of the training rows is held out. A folder that has the name and the columns
    of a GLUE task gets that task's labels and metrics. Only the text and label columns are read.

    Args:
        path: the file or folder.
        text_columns: names of the one or two text columns; found by name by default.
        label_column: name of the label column; found by name by default.
        kind: "classification" or "regression"; by default regression if many labels are fractions.
        encoding: encoding of text files; UTF-8 by default.
        seed: seed of the choice of held-out rows.

    Returns:
        The task with all its rows. Binary F1 takes the second label as the positive one.

    Raises:
        InputError: a file is missing, unreadable or malformed, or a row has no usable text or label.
    """
    if kind not in (None, "classification", "regression"):
        raise InputError(f"{spelled('task_kind')} {kind!r} is unknown: choose classification or regression")
    layout = find_splits(path)
    files = {"train": layout.train, "validation": layout.validation, "test": layout.test}
    sources = {split: [open_source(path, encoding) for path in paths] for split, paths in files.items() if paths}
    everything = list(itertools.chain(*sources.values()))
    if encoding is not None and not any(source.encoded for source in everything):
        raise InputError(f"{spelled('encoding')} {encoding} given for {path}, which has no text files: leave it out")
    glue = GLUE.get(glue_name(path.resolve().name) or "") if path.is_dir() else None

    first = sources["train"][0]
    chosen = (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())
    texts = _find_columns("text", TEXT_COLUMNS, chosen, first)
    (label,) = _find_columns("label", LABEL_COLUMNS, (label_column,) if label_column else (), first)
    # Some columns have other names in GLUE's own files than on the hub.
    columns = glue.columns if glue is not None and texts == glue.original_columns else texts
    if len(texts) > 2 or label in texts or "label" in columns or len(set(texts)) < len(texts):
        raise InputError(
            f"text columns {', '.join(texts)} with label column {label}: give one or two text columns, none of them "
            f"called label or used as the label"
        )
    if glue is not None and (glue.columns != columns or kind not in (None, glue.kind)):
        glue = None

    rows = {split: _read(split, source, texts, label) for split, source in sources.items()}
    labels = {split: table.labels for split, table in rows.items() if not table.labels.hidden}
    for split in ("train", "validation"):
        if split in rows and split not in labels:
            name = layout.validation_name if split == "validation" else split
            raise InputError(
                f"split {name} of {path} has hidden labels (none, or -1, in column {label}): use a split with labels"
            )
    names = (glue.labels or None) if glue is not None else _class_names(everything, label)
    scheme = find_scheme(list(labels.values()), glue.kind if glue is not None else kind, names)
    ids = dict(zip(labels, encode(list(labels.values()), scheme, by_id=names is not None), strict=True))
    splits = {
        split: _dataset(table.texts, ids.get(split), features(scheme.kind, scheme.names, columns))
        for split, table in rows.items()
    }
    if "validation" not in splits:
        count = max(1, round(HELD_OUT * len(splits["train"])))
        splits["train"], splits["validation"] = hold_out(splits["train"], columns, count, seed)

    if glue is not None:
        metrics = glue.metrics
    elif scheme.kind == "regression":
        metrics = ("pearson", "spearman")
    else:
        metrics = ("accuracy", "f1") if len(scheme.names) == 2 else ("accuracy",)
    remarks = [f"{source.path.name}: {source.remark}" for source in everything if source.remark]
    if not (chosen and label_column) and (texts not in TEXT_COLUMNS[0] or (label,) not in LABEL_COLUMNS[0]):
        remarks.append(f"texts in {' and '.join(texts)}, labels in {label}")
    remarks += [scheme.remark] if scheme.remark else []
    remarks += [f"not read: {some(layout.unread)}"] if layout.unread else []
    return Task(
        name=path.resolve().name if path.is_dir() else bare_name(path),
        kind=scheme.kind,
        labels=scheme.names,
        columns=columns,
        metrics=metrics,
        train=splits["train"],
        validation=splits["validation"],
        validation_name=layout.validation_name or f"held out of {layout.train[0].name}",
        test=splits.get("test"),
        remarks=tuple(dict.fromkeys(remarks)),
    )


@dataclass(frozen=True)
class _Rows:
    """The rows of a split: column name -> texts as Arrow strings, and the labels."""

    texts: Mapping[str, pa.ChunkedArray]
    labels: Labels


def _read(split: str, sources: Sequence[Source], texts: Sequence[str], label: str) -> _Rows:
    """Reads the named columns of a split's files, one after the other.

    Args:
        split: name of the split; a test split may have no label column.
        sources: its files.
        texts: names of the text columns in the training split.
        label: name of the label column in the training split.
    """
    chunks: dict[str, list[pa.Array]] = {column: [] for column in texts}
    values: list[Any] = []
    # For each batch: the number of its first row in the split, its file, and the numbers of its rows in the file.
    places: list[tuple[int, Source, Sequence[int]]] = []

    def where(row: int) -> str:
        start, source, numbers = places[bisect.bisect_right(places, row, key=lambda place: place[0]) - 1]
        return f"{source.path}, {source.unit} {numbers[row - start]}"

    for source in sources:
        if not source.columns:
            raise _empty(source)
        found = {column: _find_column("text", column, source) for column in texts}
        # Kaggle's test files have no label column.
        hidden = split == "test" and not _spellings(label, source)
        answers = [] if hidden else [_find_column("label", label, source)]
        for batch in source.read(list(dict.fromkeys([*found.values(), *answers]))):
            start = len(values)
            places.append((start, source, batch.numbers))
            for column, name in found.items():
                chunks[column].append(_strings(batch.columns[name], name, start, where))
            raw = batch.columns[answers[0]] if answers else [None] * len(batch.numbers)
            if not source.typed:
                raw = [value if value is None else Untyped(value) for value in raw]
            values += (read_label(value, label, partial(where, row)) for row, value in enumerate(raw, start=start))
    if not values:
        raise _empty(sources[0])
    columns = {column: pa.chunked_array(parts, type=pa.string()) for column, parts in chunks.items()}
    return _Rows(columns, Labels(split, label, values, where))


def _strings(values: Sequence[Any], column: str, first: int, where: Callable[[int], str]) -> pa.Array:
    for row, value in enumerate(values, start=first):
        if value is None:
            raise InputError(f"{where(row)}: no text in column {column}: fill it in or remove the row")
        if not isinstance(value, str):
            shown = reprlib.repr(value)
            raise InputError(f"{where(row)}: column {column} holds {shown}, not a text: put a string there")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"{where(row)}: column {column} is not valid Unicode ({error.reason}): repair the text"
            ) from error
    return pa.array(values, type=pa.string())


def _dataset(
    texts: Mapping[str, pa.ChunkedArray], labels: np.ndarray | None, types: datasets.Features
) -> datasets.Dataset:
    """Makes the data set of a split; without a label column if the labels are hidden."""
    columns = [column for column in types if column != "label"]
    arrays = dict(zip(columns, texts.values(), strict=True))
    if labels is None:
        types = datasets.Features({column: types[column] for column in columns})
    else:
        arrays["label"] = pa.array(labels)
    return datasets.Dataset(pa.table(arrays), info=datasets.DatasetInfo(features=types))


def _class_names(sources: Sequence[Source], label: str) -> tuple[str, ...] | None:
    """The class names that the files themselves have; None if they have none."""
    found = {source.classes[name] for source in sources for name in _spellings(label, source) if name in source.classes}
    if len(found) > 1:
        listing = " and ".join(", ".join(names) for names in sorted(found))
        raise InputError(f"the files name the classes of column {label} differently ({listing}): write them alike")
    return found.pop() if found else None


def _find_columns(
    role: str, candidates: Sequence[Sequence[tuple[str, ...]]], chosen: Sequence[str], source: Source
) -> tuple[str, ...]:
    """Finds the columns named by the user, or else the candidate whose columns are there: the pair before one of it."""
    if not source.columns:
        raise _empty(source)
    if chosen:
        return tuple(_find_column(role, column, source) for column in chosen)
    for tier in candidates:
        found = [names for names in tier if all(_spellings(name, source) for name in names)]
        found = [names for names in found if not any(set(names) < set(other) for other in found)]
        if len(found) == 1:
            return tuple(_find_column(role, name, source) for name in found[0])
        if found:
            raise _no_column(f"more than one choice of {role} column", role, source)
    raise _no_column(f"no known {role} column", role, source)


def _find_column(role: str, name: str, source: Source) -> str:
    """The file's own spelling of a column name: the same, or else one that differs in case alone."""
    spellings = _spellings(name, source)
    if len(spellings) != 1:
        problem = "more than one choice of" if spellings else "no"
        raise _no_column(f"{problem} {role} column {name}", role, source)
    return spellings[0]


def _spellings(name: str, source: Source) -> list[str]:
    if name in source.columns:
        return [name]
    return [column for column in source.columns if column.casefold() == name.casefold()]


def _no_column(problem: str, role: str, source: Source) -> InputError:
    flag = spelled("text_columns" if role == "text" else "label_column")
    return InputError(
        f"{problem}: {source.path} has the columns {some(source.columns)}; name the right one with {flag}; {OWN_LOOP}"
    )


def _empty(source: Source) -> InputError:
    return InputError(f"file {source.path} is empty: it needs at least one row with text and label")
