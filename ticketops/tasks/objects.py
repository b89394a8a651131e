"""Tasks that are objects in Python: data sets of `datasets`, and instances of the user's own class."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import transformers

from ticketops.errors import InputError, shown
from ticketops.tasks.columns import Files
from ticketops.tasks.formats import open_rows
from ticketops.tasks.local import as_columns, load_files
from ticketops.tasks.splits import Layout, name_splits
from ticketops.tasks.task import Task


def load_object(data: Any, name: str, options: Mapping[str, Any], seed: int = 0) -> Task:
    """Loads a task from a data set in memory, by the rules for files, or takes a task as it is.

    Args:
        data: a `datasets.Dataset` of training rows, a `DatasetDict` or dictionary of splits, or a `Task`.
        name: name of the task.
        options: text_columns, label_column, kind and encoding, as `load_local` takes them.
        seed: seed of the choice of held-out rows, where there is no validation split.

    Raises:
        InputError: it is none of these, or its rows are unusable.
    """
    if isinstance(data, Task):
        if given := [option for option, value in options.items() if value is not None]:
            raise InputError(
                f"{', '.join(given)} given for task {name}, whose class says how its rows are read: leave it out"
            )
        _check(data)
        return data if data.name == name else dataclasses.replace(data, name=name)
    if isinstance(data, datasets.Dataset):
        splits, layout = {name: data}, Layout((Path(name),))
    elif isinstance(data, Mapping):
        splits = {str(split): rows for split, rows in data.items()}
        layout = name_splits(splits, name)
    else:
        splits, layout = {"": data}, Layout(())
    for rows in splits.values():
        if isinstance(rows, datasets.IterableDataset):
            raise InputError(f"task {name} is streamed, and its rows are read several times: load it without streaming")
        if not isinstance(rows, datasets.Dataset):
            raise InputError(
                f"task {name}: {shown(rows)} is not a path or a data set: give a datasets.Dataset (Dataset.from_list "
                "and from_pandas make one), a DatasetDict or dictionary of splits, or a ticketops.tasks.Task"
            )
    parts = {"train": layout.train, "validation": layout.validation, "test": layout.test}
    sources = {
        split: [open_rows(splits[part.name], part if part.name == name else Path(f"{name}[{part.name}]"))]
        for split, own in parts.items()
        for part in own
    }
    options = dict(options)
    columns, label = as_columns(options.pop("text_columns")), options.pop("label_column")
    task = load_files(Files(Path(name), layout, sources, columns, label, seed), **options)
    return dataclasses.replace(task, name=name)


def _check(task: Task) -> None:
    """Checks what a class of the user's own says of itself."""
    own = type(task).__name__
    for split in ("train", "validation", "report", "test"):
        rows = getattr(task, split)
        if not isinstance(rows, datasets.Dataset) and (rows is not None or split in ("train", "validation")):
            raise InputError(f"{split} of {own} is {shown(rows)}: give a datasets.Dataset")
    if not task.metrics:
        raise InputError(f"{own} has no metrics: name what its score() returns, the one that selects first")
    if lacking := [column for column in task.columns if column not in task.train.column_names]:
        raise InputError(f"{own} names the column {lacking[0]!r}, which its training rows lack: correct columns")
    standard = type(task).check_model is Task.check_model or type(task).make_model is Task.make_model
    if standard and not hasattr(transformers, str(getattr(task, "head", None))):
        raise InputError(
            f"{own} has the head {getattr(task, 'head', None)!r}: name an auto class of transformers, such as "
            "AutoModelForSequenceClassification, or define make_model and check_model"
        )
