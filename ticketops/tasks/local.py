"""Tasks from local files: one file, a folder of splits, a clone of a data set of the hub, or a saved data set."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from ticketops.errors import InputError, spelled
from ticketops.kinds import KINDS, Kind
from ticketops.optional import sentence_transformers
from ticketops.tasks.choices import has_choices, load_choices
from ticketops.tasks.columns import Files, Places, batches, check_text, spellings
from ticketops.tasks.embedders import UNSCORED_COLUMNS, EmbedderTask, check_texts, choose_loss, scored_pairs
from ticketops.tasks.entities import has_tags, load_entities
from ticketops.tasks.formats import Source, open_source
from ticketops.tasks.glue import GLUE, glue_name
from ticketops.tasks.labels import Labels, Untyped, encode, find_label_sets, find_scheme, read_label
from ticketops.tasks.questions import has_questions, load_questions
from ticketops.tasks.sequences import SequenceTask, features
from ticketops.tasks.splits import find_splits
from ticketops.tasks.task import Task

# Accepted column names of texts and their labels, in any case. The second group is searched only if no name of the
# first is there.
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

# Kind -> recognizes it by a file's columns, and loads it.
_LOADERS: Mapping[str, tuple[Callable[[Files], bool], Callable[[Files], Task]]] = {
    "token-classification": (has_tags, load_entities),
    "question-answering": (has_questions, load_questions),
    "multiple-choice": (has_choices, load_choices),
}


def load_local(
    path: Path,
    *,
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    kind: Kind | None = None,
    encoding: str | None = None,
    loss: str | None = None,
    seed: int = 0,
) -> Task:
    """Loads a task from a file or a folder, and writes nothing there.

    A folder has files of a training split and, optionally, of a validation and a test split: see `find_splits`. Without
    a validation split, a stratified tenth of the training rows is held out. A folder that has the name and the columns
    of a GLUE task gets that task's labels and metrics. Only the text and label columns are read.

    Args:
        path: the file or folder.
        text_columns: names of the text columns; found by name by default.
        label_column: name of the label column; found by name by default. Several names, separated by commas, are the
            columns of 0 and 1 of a multi-label task, one for each label.
        kind: kind of the task; by default recognized by the columns, and by the labels: regression if many of them are
            fractions, multi-label if they are lists.
        encoding: encoding of text files; UTF-8 by default.
        loss: loss of a sentence-similarity task, by its name in sentence-transformers.
        seed: seed of the choice of held-out rows.

    Returns:
        The task with all its rows. Binary F1 takes the second label as the positive one.

    Raises:
        InputError: a file is missing, unreadable or malformed, or a row has no usable text or label.
    """
    layout = find_splits(path)
    paths = {"train": layout.train, "validation": layout.validation, "test": layout.test}
    sources = {split: [open_source(file, encoding) for file in own] for split, own in paths.items() if own}
    return load_files(Files(path, layout, sources, as_columns(text_columns), label_column, seed), kind, encoding, loss)


def as_columns(text_columns: Sequence[str] | None) -> tuple[str, ...]:
    """The text columns that the user has named, of which one may be given alone.

    Args:
        text_columns: as the user gives them.
    """
    return (text_columns,) if isinstance(text_columns, str) else tuple(text_columns or ())


def load_files(files: Files, kind: Kind | None = None, encoding: str | None = None, loss: str | None = None) -> Task:
    """Loads a task whose files are open.

    Args:
        files: the files, or parts of a data set in memory.
        kind: kind of the task; by default recognized by columns and labels.
        encoding: encoding that the user has given for text files.
        loss: loss of a sentence-similarity task.

    Raises:
        InputError: a row has no usable text or label, or there are no text files for the encoding.
    """
    if kind not in (None, *KINDS):
        raise InputError(f"{spelled('task_kind')} {kind!r} is unknown: choose from {', '.join(KINDS)}")
    path = files.path
    if encoding is not None and not any(source.encoded for source in files.everything):
        raise InputError(f"{spelled('encoding')} {encoding} given for {path}, which has no text files: leave it out")
    if kind == "sentence-similarity":
        return _load_similarity(files, loss)
    for name, (recognizes, load) in _LOADERS.items():
        if kind == name or (kind is None and not files.text_columns and recognizes(files)):
            return load(files)
    return _load_sequences(files, kind)


def _load_sequences(files: Files, kind: Kind | None) -> SequenceTask:
    """Loads a task on whole texts; None decides its kind by the labels."""
    glue = GLUE.get(glue_name(files.path.resolve().name) or "") if files.path.is_dir() else None
    texts, answers = files.find("text", TEXT_COLUMNS), _label_columns(files)
    # Some columns have other names in GLUE's own files than on the hub.
    columns = glue.columns if glue is not None and texts == glue.original_columns else texts
    if len(texts) > 2 or {*answers} & {*texts} or "label" in columns or len(set(texts)) < len(texts):
        raise InputError(
            f"text columns {', '.join(texts)} with label column {', '.join(answers)}: give one or two text columns, "
            f"none of them called label or used as the label"
        )
    if glue is not None and (glue.columns != columns or kind not in (None, glue.kind)):
        glue = None

    rows = {split: _read(split, sources, texts, answers) for split, sources in files.sources.items()}
    sets = [isinstance(value, list | tuple) for value in rows["train"].labels]
    ids: Mapping[str, Any]
    metrics: tuple[str, ...]
    if kind == "multi-label" or (kind is None and all(sets)):
        written = [Labels(split, ", ".join(answers), table.labels, table.where) for split, table in rows.items()]
        names, ids = find_label_sets(written, answers, files.class_names(answers[0]))
        kind, remark, metrics = "multi-label", "", ("micro_f1", "macro_f1")
    else:
        (label,) = answers
        labels = {split: table.scalars(split, label) for split, table in rows.items()}
        labels = {split: found for split, found in labels.items() if not found.hidden}
        for split in ("train", "validation"):
            if split in rows and split not in labels:
                raise files.no_labels(split, label)
        known = (glue.labels or None) if glue is not None else files.class_names(label)
        scheme = find_scheme(list(labels.values()), glue.kind if glue is not None else kind, known)
        ids = dict(zip(labels, encode(list(labels.values()), scheme, by_id=known is not None), strict=True))
        kind, names, remark = scheme.kind, scheme.names, scheme.remark
        if glue is not None:
            metrics = glue.metrics
        elif kind == "regression":
            metrics = ("pearson", "spearman")
        else:
            metrics = ("accuracy", "f1") if len(names) == 2 else ("accuracy",)
    types = features(kind, names, columns)
    splits = {split: _dataset(table.texts, ids.get(split), types) for split, table in rows.items()}
    remarks = []
    named = files.text_columns and files.label_column
    if not named and (texts not in TEXT_COLUMNS[0] or answers not in LABEL_COLUMNS[0]):
        remarks.append(f"texts in {' and '.join(texts)}, labels in {', '.join(answers)}")
    remarks += [remark] if remark else []
    return files.task(SequenceTask, splits, remarks, kind=kind, labels=names, columns=columns, metrics=metrics)


def _load_similarity(files: Files, loss: str | None) -> EmbedderTask:
    """Loads pairs of texts with a score, or pairs or triplets without one."""
    sentence_transformers()
    labelled = any(spellings(name, files.first) for tier in LABEL_COLUMNS for (name,) in tier)
    triplets = len(files.text_columns) > 2 or bool(not files.text_columns and spellings("negative", files.first))
    if files.label_column or (labelled and not triplets):
        pairs = _load_sequences(files, "regression")
        check_texts(pairs.columns, scored=True)
        return scored_pairs(pairs, loss)
    texts = files.find("text", UNSCORED_COLUMNS + TEXT_COLUMNS)
    check_texts(texts, scored=False)
    rows = {split: _read(split, sources, texts, ()) for split, sources in files.sources.items()}
    types, splits = features("regression", (), texts), {}
    for split, each in rows.items():
        # Every row says that its first two texts are alike.
        splits[split] = _dataset(each.texts, np.ones(len(each.texts[texts[0]]), np.float32), types)
    chosen = choose_loss(loss, texts, scored=False)
    return files.task(
        EmbedderTask,
        splits,
        [f"texts in {', '.join(texts)}", f"loss {chosen}"],
        kind="sentence-similarity",
        labels=(),
        columns=texts,
        metrics=("cosine_accuracy",),
        loss=chosen,
    )


def _label_columns(files: Files) -> tuple[str, ...]:
    """The label column, or several that the user has named."""
    named = files.label_column or ""
    if "," in named and not spellings(named, files.first):
        parts = [part.strip() for part in named.split(",")]
        return tuple(column for part in parts for column in files.named("label", part))
    return files.find("label", LABEL_COLUMNS)


@dataclass(frozen=True)
class _Rows:
    """The rows of a split.

    Attributes:
        texts: column name -> texts as Arrow strings.
        labels: value of each row's label column; a tuple where there are several label columns.
        where: names a row's file and line.
    """

    texts: Mapping[str, pa.ChunkedArray]
    labels: Sequence[Any]
    where: Places

    def scalars(self, split: str, column: str) -> Labels:
        """The labels, one a row."""
        labels = [read_label(value, column, partial(self.where, row)) for row, value in enumerate(self.labels)]
        return Labels(split, column, labels, self.where)


def _read(split: str, sources: Sequence[Source], texts: Sequence[str], answers: Sequence[str]) -> _Rows:
    """Reads the named columns of a split's files, one after the other."""
    chunks: dict[str, list[pa.Array]] = {column: [] for column in texts}
    labels: list[Any] = []
    places = Places()
    for batch in batches(split, sources, texts, answers):
        places.add(batch.start, batch.source, batch.numbers)
        for column, values in zip(texts, batch.texts, strict=True):
            checked = [
                check_text(value, column, partial(places, row)) for row, value in enumerate(values, start=batch.start)
            ]
            chunks[column].append(pa.array(checked, type=pa.string()))
        found = batch.labels
        if not batch.source.typed:
            found = [[value if value is None else Untyped(value) for value in each] for each in found]
        labels += found[0] if len(answers) == 1 else zip(*found, strict=True)
    columns = {column: pa.chunked_array(parts, type=pa.string()) for column, parts in chunks.items()}
    return _Rows(columns, labels, places)


def _dataset(texts: Mapping[str, pa.ChunkedArray], labels: Any, types: datasets.Features) -> datasets.Dataset:
    """Makes the data set of a split; without a label column if the labels are hidden."""
    columns = [column for column in types if column != "label"]
    arrays = dict(zip(columns, texts.values(), strict=True))
    if labels is None:
        types = datasets.Features({column: types[column] for column in columns})
    else:
        arrays["label"] = pa.array(labels)
    return datasets.Dataset(pa.table(arrays), info=datasets.DatasetInfo(features=types))
