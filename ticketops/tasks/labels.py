"""Finds out whether labels are classes or numbers, and encodes them as class ids or float32."""

import math
import re
import reprlib
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np

from ticketops.errors import OWN_LOOP, InputError, shown, spelled
from ticketops.kinds import Kind
from ticketops.text import count, some

# Numeric labels mean regression if at least this share of the training labels are fractions.
_FRACTIONS = 0.25
# Up to this many different whole numbers are accepted as classes, however few rows there are.
_FEW = 20
# Labels of a regression are float32.
_LARGEST = float(np.finfo(np.float32).max)
# Numbers as programs write them: 1, -2.5, 1e-05; but not 01, +1 or 1_000.
_NUMBER = re.compile(r"-?(?:(?:0|[1-9][0-9]*)(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# How programs and people write that a row has no label, as SNLI does by "-".
_NO_LABEL = {"-1", "-", "--", "?", "na", "n/a", "#n/a", "<na>", "nan", "null"}
_OPPOSITES = {"-1": {"1", "+1"}, "-": {"+"}, "--": {"++"}}
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+")

Label = str | bool | int | float


class Untyped(str):
    """A label from a file without types, such as CSV, where "1" may be text or a number."""


@dataclass(frozen=True)
class Labels:
    """The labels of a split as its files have them.

    Attributes:
        split: "train", "validation" or "test".
        column: the label column, for error messages.
        values: label of each row; None where a row has none. Of several labels a row, what the files have.
        where: function that names a row's file and line, for error messages.
    """

    split: str
    column: str
    values: Sequence[Any]
    where: Callable[[int], str]

    @property
    def hidden(self) -> bool:
        """True if the split has no labels: all values are missing, or all are -1, the hub's mark of hidden labels."""
        return all(
            value is None or (isinstance(value, tuple) and set(value) == {None}) for value in self.values
        ) or all(str(value) == "-1" for value in self.values)


def find_label_sets(
    splits: Sequence[Labels], columns: Sequence[str], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...], dict[str, list[list[int]]]]:
    """Reads the labels of texts that have any number of them.

    Args:
        splits: labels as the files have them, the training split first: lists, strings such as "a, b", or one value a
            column, 0 or 1.
        columns: names of the label columns; of several, each is a label.
        names: label names by id, if the files have them.

    Returns:
        Label names by id, and for each labelled split the ids of each row, ascending.

    Raises:
        InputError: a value cannot be read, no training row has a label, or a label is unknown.
    """
    several = len(columns) > 1
    read = {
        labels.split: [
            _read_flags(value, columns, labels, row) if several else _read_set(value, labels, row)
            for row, value in enumerate(labels.values)
        ]
        for labels in splits
        if not labels.hidden
    }
    for labels in splits:
        if labels.split not in read and labels.split != "test":
            raise InputError(f"split {labels.split} has no labels in column {labels.column}: use a split with labels")
    train = splits[0]
    found = columns if several else sorted({name for row in read[train.split] for name in row}, key=_rank)
    known = names or tuple(found)
    by_number = names is not None and all(name.isdigit() for rows in read.values() for row in rows for name in row)
    ids = {str(number) if by_number else name: number for number, name in enumerate(known)}
    if len(known) < 2 or not any(read[train.split]):
        raise InputError(
            f"column {train.column} has {count(len(known), 'label')} in the training rows: give two or more"
        )
    for labels in splits:
        for row, found in enumerate(read.get(labels.split, ())):
            if unknown := [name for name in found if name not in ids]:
                raise _unknown(labels, row, unknown[0], ids)
    return known, {split: [sorted({ids[name] for name in row}) for row in rows] for split, rows in read.items()}


def _read_set(value: Any, labels: Labels, row: int) -> list[str]:
    """The names in one value of a column of several labels."""
    if value is None:
        return []
    if isinstance(value, str):
        separators = [mark for mark in ("|", ";", ",") if mark in value]
        if len(separators) > 1:
            raise InputError(
                f"{labels.where(row)}: label {value!r:.80} in column {labels.column} has both {separators[0]} and "
                f"{separators[1]}: separate labels by one of them"
            )
        value = value.split(separators[0]) if separators else [value]
    if not isinstance(value, list | tuple):
        value = [value]
    found = [read_label(each, labels.column, lambda: labels.where(row)) for each in value]
    if None in found:
        raise InputError(f"{labels.where(row)}: an empty label in column {labels.column}: remove it")
    return [str(each).lower() if isinstance(each, bool) else str(each) for each in found]


def _read_flags(values: Sequence[Any], columns: Sequence[str], labels: Labels, row: int) -> list[str]:
    """The names of the columns whose value says that the row has their label."""
    found = []
    for column, value in zip(columns, values, strict=True):
        flag = {"0": False, "1": True, "0.0": False, "1.0": True, "true": True, "false": False}.get(str(value).lower())
        if flag is None:
            raise InputError(f"{labels.where(row)}: column {column} holds {shown(value)}: give 0 or 1 for each label")
        found += [column] if flag else []
    return found


@dataclass(frozen=True)
class Scheme:
    """The meaning of a task's labels.

    Attributes:
        kind: "classification" or "regression".
        names: class names by id; empty for regression.
        remark: note for the user on how the labels are read; often empty.
    """

    kind: Kind
    names: tuple[str, ...]
    remark: str = ""


def read_label(value: Any, column: str, where: Callable[[], str]) -> Label | None:
    """Converts one value of a label column to a built-in Python type; whole numbers become int.

    Args:
        value: the value in the file; `Untyped` from files that have only text.
        column: name of the label column, for error messages.
        where: function that names the row's file and line, for error messages.

    Returns:
        The label; None for a missing value.

    Raises:
        InputError: the value is not finite, or is neither text nor a number nor a truth value.
    """
    if isinstance(value, str):
        value = type(value)(value.strip())
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where()}: column {column} is not valid Unicode ({error.reason}): repair it") from error
        if "\0" in value:
            raise InputError(f"{where()}: label {value!r:.80} in column {column} has a zero byte: write the file again")
        unreal = isinstance(value, Untyped) and value.lower().lstrip("+-") in ("nan", "inf", "infinity")
        if not unreal:
            return value or None
    elif value is None or isinstance(value, bool):
        return value
    elif isinstance(value, int | np.integer):
        return int(value)
    elif isinstance(value, float | Decimal | np.floating):
        # A Decimal may be too large for a float.
        if math.isfinite(value):
            return int(value) if value % 1 == 0 else float(value)
    else:
        shown = reprlib.repr(value)
        raise InputError(
            f"{where()}: label {shown} in column {column}: give one number, string or true/false a row; {OWN_LOOP}"
        )
    raise InputError(f"{where()}: label {value} in column {column} is not a number: fill it in or remove the row")


def number(value: Label | None) -> int | float | None:
    """The label as a number, parsed if it is `Untyped`; None if it is not a number."""
    if isinstance(value, Untyped):
        return _parse(value) if _NUMBER.fullmatch(value) else None
    return None if isinstance(value, str | bool) else value


def find_scheme(splits: Sequence[Labels], kind: Kind | None, names: tuple[str, ...] | None) -> Scheme:
    """Decides whether labels are classes or numbers, and lists the classes.

    Args:
        splits: labels of the labelled splits, the training split first.
        kind: kind that the user asked for; None to decide by the labels.
        names: class names by id, if they are known beforehand.

    Returns:
        The kind and the class names, sorted: numbers by value, then words.

    Raises:
        InputError: a row has no label, or the labels can be read in two ways.
    """
    for labels in splits:
        _check_present(labels)
    if names is not None and kind != "regression":
        return Scheme("classification", names)
    rows = [(labels, row, number(value)) for labels in splits for row, value in enumerate(labels.values)]
    numeric = all(value is not None for _, _, value in rows)
    train = splits[0]
    if kind is None and numeric:
        fractions = [(labels, row, value) for labels, row, value in rows if isinstance(value, float)]
        if sum(labels is train for labels, *_ in fractions) >= _FRACTIONS * len(train.values):
            kind = "regression"
        elif fractions:
            labels, row, value = fractions[0]
            raise InputError(
                f"{labels.where(row)}: label {value} in column {labels.column} is a fraction, like "
                f"{len(fractions):,} of {len(rows):,} labels: correct it, or say "
                f"{spelled('task_kind', 'regression')} (or classification)"
            )
    if kind == "regression":
        return Scheme("regression", ())
    if not numeric:
        _refuse_decimal_commas(splits)
        if kind is None:
            _refuse_strays(rows)
    written = {str(value).lower() for labels in splits for value in labels.values}
    # Beside their opposites these are classes.
    marks = {mark for mark in _NO_LABEL & written if not written & _OPPOSITES.get(mark, set())}
    # Of three classes, -1 may be the negative one.
    marks |= {"-1"} & written if "0" in written else set()
    hidden = [(labels, row) for labels, row, _ in rows if str(labels.values[row]).lower() in marks]
    if hidden and kind is None:
        labels, row = hidden[0]
        mark = str(labels.values[row])
        raise InputError(
            f"{labels.where(row)}: label {mark}, like {len(hidden):,} of {len(rows):,}, may mean that there is none: "
            f"remove these rows, or say {spelled('task_kind', 'classification')} where {mark} is a class"
        )
    negative = sum(str(labels.values[row]) == "-1" for labels, row, _ in rows)
    remarks = [f"{negative:,} labels of -1 are a class"] if negative else []
    known = sorted(set(class_names(splits)[0]), key=_rank)
    if kind is None and numeric and len(known) > max(_FEW, len(train.values) // 2):
        raise InputError(
            f"column {train.column} holds {len(known):,} different numbers in {len(train.values):,} training rows: say "
            f"{spelled('task_kind', 'regression')} (or classification), or name the label column with "
            f"{spelled('label_column')}"
        )
    alike: dict[str, list[str]] = {}
    for name in known:
        alike.setdefault(unicodedata.normalize("NFKC", name).casefold(), []).append(name)
    remarks += [f"the labels {some(names)} are different classes" for names in alike.values() if len(names) > 1]
    return Scheme("classification", tuple(known), "; ".join(remarks))


def class_names(splits: Sequence[Labels]) -> list[list[str]]:
    """The class name of each row, for each split.

    Args:
        splits: labels, none of them missing. Untyped labels are read as numbers if all labels of all splits can be.
    """
    values = [value for labels in splits for value in labels.values]
    numeric = all(number(value) is not None for value in values)
    # pandas writes True and False where JSON writes true and false.
    truth = all(str(value).lower() in ("true", "false") for value in values if not isinstance(value, bool))

    def name(value: Label | None) -> str:
        found = number(value) if numeric else value
        text = repr(found) if isinstance(found, float) else str(found)
        return text.lower() if isinstance(value, bool) or (truth and isinstance(value, Untyped)) else text

    return [[name(value) for value in labels.values] for labels in splits]


def encode(splits: Sequence[Labels], scheme: Scheme, by_id: bool) -> list[np.ndarray]:
    """Encodes the labels of every split for training.

    Args:
        splits: labels of the labelled splits, the training split first.
        scheme: meaning of the labels.
        by_id: True if the class names were known beforehand, so that whole numbers are class ids.

    Returns:
        For each split, class ids int64 [rows], or numbers float32 [rows].

    Raises:
        InputError: a label is not a number, or not one of the classes.
    """
    if scheme.kind == "regression":
        return [np.array([_real(labels, row) for row in range(len(labels.values))], np.float32) for labels in splits]
    ids = {name: i for i, name in enumerate(scheme.names)}
    encoded = []
    for labels, found in zip(splits, class_names(splits), strict=True):
        if by_id and all(isinstance(number(value), int) for value in labels.values):
            ids_here: Mapping[str, int] = {str(i): i for i in range(len(scheme.names))}
        else:
            ids_here = ids
        for row, name in enumerate(found):
            if name not in ids_here:
                raise _unknown(labels, row, name, ids_here)
        encoded.append(np.array([ids_here[name] for name in found], np.int64))
    return encoded


def _check_present(labels: Labels) -> None:
    for row, value in enumerate(labels.values):
        if value is None:
            raise InputError(f"{labels.where(row)}: no label in column {labels.column}: fill it in or remove the row")


def _refuse_strays(rows: Sequence[tuple[Labels, int, int | float | None]]) -> None:
    """Refuses words among numbers, by which a few damaged rows would make classes of all numbers."""
    words = [(labels, row) for labels, row, value in rows if value is None]
    fractions = any(isinstance(value, float) for *_, value in rows)
    if len(words) < len(rows) and (fractions or len(words) < _FRACTIONS * len(rows)):
        labels, row = words[0]
        raise InputError(
            f"{labels.where(row)}: label {shown(labels.values[row])} in column {labels.column} is no number, like "
            f"{len(words):,} of {len(rows):,} labels: correct it, or say {spelled('task_kind', 'classification')}"
        )


def _refuse_decimal_commas(splits: Iterable[Labels]) -> None:
    values = {value for labels in splits for value in labels.values}
    commas = [value for value in values if isinstance(value, Untyped) and _DECIMAL_COMMA.fullmatch(value)]
    if commas and all(value in commas or number(value) is not None for value in values):
        raise InputError(f"label {commas[0]!r}: write numbers with a point, such as 0.5")


def _unknown(labels: Labels, row: int, name: str, ids: Iterable[str]) -> InputError:
    where = labels.where(row)
    if name == "-1":
        return InputError(f"{where}: label -1 means a hidden label: use a split with labels")
    return InputError(
        f"{where}: label {name!r:.80} is not one of the training labels ({some(ids)}): correct or remove the row"
    )


def _real(labels: Labels, row: int) -> float:
    label = labels.values[row]
    value = _parse(label) if isinstance(label, str) else label
    if value is None or isinstance(value, bool):
        raise InputError(
            f"{labels.where(row)}: label {label!r} is no number: regression needs one, or say "
            f"{spelled('task_kind', 'classification')}"
        )
    if abs(value) > _LARGEST:
        shown = f"{value!r:.20}"
        raise InputError(
            f"{labels.where(row)}: label {shown}... is beyond what float32 holds, {_LARGEST:.1e}: scale the labels"
        )
    return float(value)


def _parse(text: str) -> int | float | None:
    """Parses a finite number, as int if it is whole; None if the text is not such a number."""
    # Python would read 1_0 as 10.
    if "_" in text:
        return None
    try:
        value = int(text) if re.fullmatch(r"[+-]?[0-9]+", text) else float(text)
    # Python raises ValueError for an integer of more than 4,300 digits.
    except ValueError:
        return None
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() else value
    return value


def _rank(name: str) -> tuple[bool, Decimal, str]:
    is_number = _NUMBER.fullmatch(name) is not None
    return (not is_number, Decimal(name) if is_number else Decimal(0), name)
