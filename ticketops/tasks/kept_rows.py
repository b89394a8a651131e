"""Tokenized rows in the cache folder, where a run that goes on, and every other run on the same rows, reads them.

They are memory-mapped: what training does not touch takes no memory. A checksum is compared before rows are used, and
whatever is damaged, or cannot be written, is made again.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import os
import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import transformers
from transformers import PreTrainedTokenizerBase

from ticketops.errors import StoreError, TicketopsError
from ticketops.files import cache_folder, make_folder, read_json, sha256, write_json
from ticketops.tasks.loading import tokenize
from ticketops.tasks.task import Task

#: Rows that were not used for longest go when all take more bytes than this.
MOST_BYTES = 4_000_000_000


def tokenized_splits(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> dict[str, datasets.Dataset]:
    """Tokenizes the rows of a task, or reads them where that has been done before.

    Args:
        task: the task.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens in an input, special tokens included.

    Returns:
        "train", "validation" and, where there are rows to report on, "report" -> rows as `tokenize` returns them.

    Raises:
        InputError: as `tokenize` does.
    """
    folder = _folder(task, tokenizer, max_length)
    rows = {"train": task.train, "validation": task.validation, "report": task.report}
    found = {}
    for split, data in rows.items():
        if data is not None:
            make = partial(tokenize, data, task, tokenizer, max_length, split != "train")
            found[split] = make() if folder is None else _kept(folder / split, make)
    return found


def _folder(task: Task, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Path | None:
    """A folder named after everything that tokenized rows depend on; None where that cannot be told: with a class of
    task or a tokenizer in Python of the user's own."""
    if not type(task).__module__.startswith("ticketops.") or not tokenizer.is_fast:
        return None
    try:
        source = [inspect.getsource(kind) for kind in type(task).__mro__ if kind.__module__.startswith("ticketops.")]
    except OSError:
        return None
    apart = ("functions", "remarks", "metrics")
    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task) if field.name not in apart}
    told = {name: value for name, value in fields.items() if not isinstance(value, datasets.Dataset)}
    # It holds the last call's truncation, which `encode` chooses anew.
    tokenizer.backend_tokenizer.no_truncation()
    versions = [each.__version__ for each in (datasets, tokenizers, transformers)]
    state = [tokenizer.backend_tokenizer.to_str(), repr(tokenizer), max_length]
    text = json.dumps([task.fingerprint, told, source, state, versions], default=repr)
    # The address of an object is another in every process.
    return None if " at 0x" in text else cache_folder() / "rows" / hashlib.sha256(text.encode()).hexdigest()[:32]


def _kept(path: Path, make: Callable[..., datasets.Dataset]) -> datasets.Dataset:
    """Reads the rows of a split, or makes and keeps them; in memory where they cannot be kept."""
    file, note = path.with_suffix(".arrow"), path.with_suffix(".json")
    # Damaged, or removed by another process: made again.
    with contextlib.suppress(OSError, TicketopsError, ValueError):
        if read_json(note, "", unsealed=False).get("sha256") == sha256(file):
            os.utime(path.parent)
            return datasets.Dataset.from_file(str(file))
    # The disk is full, or the folder is not ours to write.
    try:
        make_folder(path.parent)
        rows = make(file=file)
        write_json(note, {"sha256": sha256(file)})
        _make_room(path.parent)
    except (OSError, StoreError):
        return make()
    return rows


def _make_room(newest: Path) -> None:
    """Removes the rows that were not used for longest."""

    def size(folder: Path) -> int:
        return sum(file.stat().st_size for file in folder.iterdir())

    with contextlib.suppress(OSError):
        others: Iterable[Any] = (folder for folder in newest.parent.iterdir() if folder != newest)
        left = MOST_BYTES - size(newest)
        for folder in sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True):
            left -= size(folder)
            if left < 0:
                shutil.rmtree(folder, ignore_errors=True)
