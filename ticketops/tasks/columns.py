"""Finds columns in the files of a task and reads them, split by split."""

import bisect
import itertools
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import datasets

from ticketops.errors import OWN_LOOP, InputError, spelled
from ticketops.tasks.formats import Source, bare_name
from ticketops.tasks.splits import Layout
from ticketops.tasks.task import Task
from ticketops.text import some

AnyTask = TypeVar("AnyTask", bound=Task)

# Share of the training rows that is held out for validation if there is no validation split.
HELD_OUT = 0.1


@dataclass(frozen=True)
class Files:
    """The files of a task, and what the user has said about them.

    Attributes:
        path: the file or folder that the user named.
        layout: which files are which split.
        sources: split -> its opened files.
        text_columns: names of the text columns; empty to find them by name.
        label_column: name of the label column; None to find it by name.
        seed: seed of the choice of held-out rows.
    """

    path: Path
    layout: Layout
    sources: Mapping[str, Sequence[Source]]
    text_columns: tuple[str, ...] = ()
    label_column: str | None = None
    seed: int = 0

    @property
    def first(self) -> Source:
        """The first file of the training split, whose columns all files must have."""
        return self.sources["train"][0]

    @property
    def everything(self) -> list[Source]:
        """The files of all splits."""
        return list(itertools.chain(*self.sources.values()))

    def find(self, role: str, candidates: Sequence[Sequence[tuple[str, ...]]]) -> tuple[str, ...]:
        """Finds the columns that the user named, or else the candidate whose columns are there: the longest of several.

        Args:
            role: "text" or "label".
            candidates: groups of accepted names; a group is searched only if none of those before it is there.

        Returns:
            The names in the spelling of the first file.

        Raises:
            InputError: there are no such columns, or several choices of them.
        """
        named = self.text_columns if role == "text" else (self.label_column,) if self.label_column else ()
        if named:
            return self.named(role, *named)
        if not self.first.columns:
            raise empty(self.first)
        for tier in candidates:
            found = [names for names in tier if all(spellings(name, self.first) for name in names)]
            found = [names for names in found if not any(set(names) < set(other) for other in found)]
            if len(found) == 1:
                return tuple(find_column(role, name, self.first) for name in found[0])
            if found:
                raise _no_column(f"more than one choice of {role} column", role, self.first)
        raise _no_column(f"no known {role} column", role, self.first)

    def peek(self, column: str) -> Any:
        """The first value of a column of the first file; None if the file has no such column or no value in it.

        Args:
            column: name of the column, in any case.
        """
        found = spellings(column, self.first)
        if len(found) != 1:
            return None
        values = (value for batch in self.first.read(found) for value in batch.columns[found[0]])
        return next((value for value in values if value is not None), None)

    def answered_by(self, candidates: Sequence[Sequence[tuple[str, ...]]]) -> list[str]:
        """The label column that the user named, or else those of the accepted names that the first file has.

        Args:
            candidates: groups of accepted names.
        """
        names = [self.label_column] if self.label_column else [name for tier in candidates for (name,) in tier]
        return [name for name in names if spellings(name, self.first)]

    def named(self, role: str, *columns: str) -> tuple[str, ...]:
        """Finds columns by the names that the user gave.

        Args:
            role: "text" or "label", for the error message.
            columns: the names.

        Returns:
            The names in the spelling of the first file.

        Raises:
            InputError: there is no such column.
        """
        if not self.first.columns:
            raise empty(self.first)
        return tuple(find_column(role, column, self.first) for column in columns)

    def class_names(self, label: str) -> tuple[str, ...] | None:
        """The label names that the files themselves have.

        Args:
            label: name of the label column.

        Returns:
            Names by id; None if the files have none.

        Raises:
            InputError: two files name them differently.
        """
        found = {
            source.classes[name]
            for source in self.everything
            for name in spellings(label, source)
            if name in source.classes
        }
        if len(found) > 1:
            listing = " and ".join(", ".join(names) for names in sorted(found))
            raise InputError(f"the files name the classes of column {label} differently ({listing}): write them alike")
        return found.pop() if found else None

    def tables(self, texts: Sequence[str], label: str) -> dict[str, "Table"]:
        """Reads the text columns and the label column of every split.

        Args:
            texts: names of the text columns.
            label: name of the label column, which a test split may lack.

        Returns:
            Split -> its rows.

        Raises:
            InputError: a file lacks a column or is damaged, a split is empty, or a split other than test has no labels.
        """
        found = {}
        for split, sources in self.sources.items():
            places = Places()
            columns: dict[str, list[Any]] = {column: [] for column in (*texts, label)}
            for batch in batches(split, sources, texts, [label]):
                places.add(batch.start, batch.source, batch.numbers)
                for column, values in zip((*texts, label), (*batch.texts, *batch.labels), strict=True):
                    columns[column] += values
            found[split] = Table(columns, places)
            hidden = all(value is None or value in ("", -1) for value in columns[label])
            if hidden and split != "test":
                raise self.no_labels(split, label)
            if hidden:
                del columns[label]
        return found

    def no_labels(self, split: str, label: str) -> InputError:
        """The error for a split that must have labels and has none."""
        name = self.layout.validation_name if split == "validation" else split
        return InputError(
            f"split {name} of {self.path} has hidden labels (none, or -1, in column {label}): use a split with labels"
        )

    def task(
        self,
        task_class: type[AnyTask],
        splits: Mapping[str, datasets.Dataset],
        remarks: Sequence[str] = (),
        **fields: Any,
    ) -> AnyTask:
        """Makes the task, with a part of the training rows held out where there is no validation split.

        Args:
            task_class: class of the task.
            splits: split -> its rows.
            remarks: how the data were read, if that is not obvious.
            fields: other fields of the task.
        """
        made = task_class(
            name=self.path.resolve().name if self.path.is_dir() else bare_name(self.path),
            train=splits["train"],
            validation=splits.get("validation", splits["train"]),
            validation_name=self.layout.validation_name or f"held out of {self.layout.train[0].name}",
            test=splits.get("test"),
            remarks=tuple(
                dict.fromkeys(
                    [
                        *(f"{source.path.name}: {source.remark}" for source in self.everything if source.remark),
                        *remarks,
                        *([f"not read: {some(self.layout.unread)}"] if self.layout.unread else []),
                    ]
                )
            ),
            **fields,
        )
        return made if "validation" in splits else made.with_validation(HELD_OUT, self.seed)


class Places:
    """Names the file and line of each row of a split."""

    def __init__(self) -> None:
        # For each batch: the number of its first row in the split, its file, and the numbers of its rows in the file.
        self._batches: list[tuple[int, Source, Sequence[int]]] = []

    def add(self, start: int, source: Source, numbers: Sequence[int]) -> None:
        """Adds a batch of rows.

        Args:
            start: number of its first row in the split.
            source: its file.
            numbers: numbers of its rows in the file.
        """
        self._batches.append((start, source, numbers))

    def __call__(self, row: int) -> str:
        """Names the file and line of a row.

        Args:
            row: number of the row in the split.
        """
        start, source, numbers = self._batches[bisect.bisect_right(self._batches, row, key=lambda each: each[0]) - 1]
        return f"{source.path}, {source.unit} {numbers[row - start]}"


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a split.

    Attributes:
        start: number of the first row in the split.
        source: their file.
        numbers: numbers of the rows in the file.
        texts: values of each text column.
        labels: values of each label column; None everywhere in a test split without one.
    """

    start: int
    source: Source
    numbers: Sequence[int]
    texts: Sequence[Sequence[Any]]
    labels: list[list[Any]]


@dataclass(frozen=True)
class Table:
    """The rows of a split.

    Attributes:
        columns: name -> value of each row; without the label column if the labels are hidden.
        where: names a row's file and line.
    """

    columns: Mapping[str, Sequence[Any]]
    where: Callable[[int], str] = field(default_factory=Places)

    def values(self, column: str) -> Iterator[tuple[Any, Callable[[], str]]]:
        """Yields each value of a column with a function that names its file and line.

        Args:
            column: name of the column.
        """
        return ((value, partial(self.where, row)) for row, value in enumerate(self.columns[column]))

    def texts(self, column: str) -> list[str]:
        """Reads a text column.

        Args:
            column: name of the column.

        Raises:
            InputError: a value is missing or no text.
        """
        return [check_text(value, column, where) for value, where in self.values(column)]


def batches(split: str, sources: Sequence[Source], texts: Sequence[str], labels: Sequence[str]) -> Iterator[Batch]:
    """Reads the named columns of a split's files, one file after the other.

    Args:
        split: name of the split; a test split may have no label columns.
        sources: its files.
        texts: names of the text columns in the training split.
        labels: names of the label columns in the training split.

    Raises:
        InputError: a file lacks a column or is damaged, or there are no rows.
    """
    start = 0
    for source in sources:
        if not source.columns:
            raise empty(source)
        found = [find_column("text", column, source) for column in texts]
        # Kaggle's test files have no label column.
        hidden = split == "test" and not any(spellings(label, source) for label in labels)
        answers = [] if hidden else [find_column("label", label, source) for label in labels]
        for batch in source.read(list(dict.fromkeys([*found, *answers]))):
            values = [list(batch.columns[name]) for name in answers] or [[None] * len(batch.numbers) for _ in labels]
            yield Batch(start, source, batch.numbers, [batch.columns[name] for name in found], values)
            start += len(batch.numbers)
    if not start:
        raise empty(sources[0])


def find_column(role: str, name: str, source: Source) -> str:
    """The file's own spelling of a column name: the same, or else one that differs in case alone.

    Args:
        role: "text" or "label", for the error message.
        name: name of the column.
        source: the file.

    Raises:
        InputError: there is no such column, or several differ in case alone.
    """
    found = spellings(name, source)
    if len(found) != 1:
        raise _no_column(f"{'more than one choice of' if found else 'no'} {role} column {name}", role, source)
    return found[0]


def spellings(name: str, source: Source) -> list[str]:
    """The columns of a file that have a name: exactly, or else in another case.

    Args:
        name: name of the column.
        source: the file.
    """
    if name in source.columns:
        return [name]
    return [column for column in source.columns if column.casefold() == name.casefold()]


def check_text(value: Any, column: str, where: Callable[[], str]) -> str:
    """Checks one value of a text column.

    Args:
        value: the value in the file.
        column: name of the column, for the error message.
        where: names the row's file and line, for the error message.

    Raises:
        InputError: the value is missing, no text, or not valid Unicode.
    """
    if value is None:
        raise InputError(f"{where()}: no text in column {column}: fill it in or remove the row")
    if not isinstance(value, str):
        raise InputError(f"{where()}: column {column} holds {reprlib.repr(value)}, not a text: put a string there")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where()}: column {column} is not valid Unicode ({error.reason}): repair the text"
        ) from error
    return value


def empty(source: Source) -> InputError:
    """The error for a file without rows."""
    return InputError(f"file {source.path} is empty: it needs at least one row with text and label")


def _no_column(problem: str, role: str, source: Source) -> InputError:
    flag = spelled("text_columns" if role == "text" else "label_column")
    return InputError(
        f"{problem}: {source.path} has the columns {some(source.columns)}; name the right one with {flag}; {OWN_LOOP}"
    )
