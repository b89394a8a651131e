"""Loads the task that a user names, and tokenizes its rows."""

import dataclasses
import logging
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from ticketops.errors import InputError, spelled
from ticketops.files import user_path
from ticketops.kinds import Kind
from ticketops.tasks.demo import load_demo
from ticketops.tasks.formats import FORMATS
from ticketops.tasks.glue import GLUE, glue_name, load_glue
from ticketops.tasks.local import load_local
from ticketops.tasks.metrics import Metric
from ticketops.tasks.objects import load_object
from ticketops.tasks.sampling import hold_out, take
from ticketops.tasks.sequences import SequenceTask
from ticketops.tasks.task import Task

logger = logging.getLogger(__name__)

# A warning is given if at least this share of a split's rows also occurs in the training rows.
_MOST_SHARED = 0.05


def load_task(
    spec: Any,
    *,
    name: str = "data",
    text_columns: Sequence[str] | None = None,
    label_column: str | None = None,
    kind: Kind | None = None,
    encoding: str | None = None,
    loss: str | None = None,
    metric: str | tuple[str, Metric] | None = None,
    threshold: float | None = None,
    train_rows: int | None = None,
    validation_rows: int | None = None,
    report_fraction: float = 0.0,
    seed: int = 0,
    at_most: Collection[str] = (),
) -> Task:
    """Loads a task: `demo`, a GLUE task by name from the hub, a local file or folder, or an object in Python.

    Args:
        spec: `demo`, a GLUE name (`rte`, `SST-2`), or a path (`./rte` is a folder, `rte` is the GLUE task); or a data
            set or Task as `load_object` takes it.
        name: name of a data set in memory.
        text_columns: names of the text columns; found by name by default. Local data only.
        label_column: name of the label column, or comma-separated names of 0/1 columns of a multi-label task; found by
            name by default. Local data only.
        kind: kind of the task; recognized by columns and labels by default. Local data only.
        encoding: encoding of text files; UTF-8 by default. Local data only.
        loss: loss of a sentence-similarity task, by its name in sentence-transformers. Local data only.
        metric: name of the metric that selects, or name and function as `own_metric` returns them; the kind's by
            default.
        threshold: probability from which on a label of a multi-label task is predicted; the task's by default.
        train_rows: number of training rows to use, chosen by seed and stratified; all by default.
        validation_rows: number of validation rows to use, before report rows are held out of them; all by default.
        report_fraction: share of the validation rows, in [0, 1), that is held out to report. With 0, the data's own
            test split reports if it has labels, with at most `validation_rows` rows.
        seed: seed of these choices.
        at_most: which of `train_rows` and `validation_rows` are upper bounds, so that a smaller task uses all its rows.

    Returns:
        The task with the rows that will be used.

    Raises:
        InputError: there is no such task or file, its rows are unusable, or it has fewer rows than requested.
    """
    if not 0.0 <= report_fraction < 1.0:
        raise InputError(
            f"{spelled('report_fraction')} {report_fraction} is outside [0, 1): give the share of validation rows"
        )
    with _no_progress_bars():
        local = {"text_columns": text_columns, "label_column": label_column, "kind": kind, "encoding": encoding}
        local["loss"] = loss
        task = _whole_task(spec, name, local, seed)
        if train_rows and "train_rows" in at_most:
            train_rows = min(train_rows, len(task.train))
        if validation_rows and "validation_rows" in at_most:
            validation_rows = min(validation_rows, len(task.validation))
        train = _limit(task.train, train_rows, "train_rows", "training", seed)
        validation = _limit(task.validation, validation_rows, "validation_rows", "validation", seed)
        report, test, report_name = task.report, task.test, task.report_name
        if report_fraction:
            report_name = f"{100 * report_fraction:g} % of the validation rows, held out"
            validation, report = hold_out(
                validation, task.grouped_by, max(1, round(report_fraction * len(validation))), seed
            )
        elif report is None and test is not None and "label" in test.column_names:
            report, test, report_name = test, None, "the data's own test split"
            if validation_rows is not None:
                report = take(report, min(validation_rows, len(report)), seed)
    for role, rows in (("training", train), ("validation", validation)):
        if not len(rows):
            raise InputError(f"task {task.name} has no {role} rows left: give it more distinct rows")
    if _is_classification(task) and (only := _only_label(task, train)):
        raise InputError(
            f"every training row of task {task.name} has the label {only}: give rows of two labels or more"
        )
    task = dataclasses.replace(
        task, train=train, validation=validation, report=report, report_name=report_name, test=test
    )
    if metric is not None:
        task = task.with_metric(*((metric,) if isinstance(metric, str) else metric))
    task = _with_threshold(task, threshold)
    # A metric or a task of the user's own is tried before anything is trained.
    try:
        task.majority()
    except InputError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{type(task).__name__}.majority() of task {task.name} failed ({type(error).__name__}: {reason}): return "
            "the score of a constant answer"
        ) from error
    doubts = _doubts(task)
    for doubt in doubts:
        logger.warning("task %s: %s", task.name, doubt)
    return dataclasses.replace(task, remarks=(*task.remarks, *doubts))


def _doubts(task: Task) -> list[str]:
    """Warnings about splits that make scores misleading: rows with one label, or rows shared with training."""
    doubts = []
    splits = {"validation": task.validation, "report": task.report, "test": task.test}
    earlier = {"training": set(_texts(task, task.train))}
    for split, rows in splits.items():
        if rows is None:
            continue
        if _is_classification(task) and "label" in rows.column_names and (only := _only_label(task, rows)):
            doubts.append(f"every {split} row has the label {only}, so all answers of that kind score the same")
        for other, texts in earlier.items():
            shared = sum(text in texts for text in _texts(task, rows))
            if shared >= _MOST_SHARED * len(rows):
                doubts.append(f"{shared:,} of {len(rows):,} {split} rows have a text of the {other} rows")
        earlier[split] = set(_texts(task, rows))
    return doubts


def _texts(task: Task, rows: datasets.Dataset) -> Iterator[int]:
    """Hashes of the texts of each row, without differences of case and spaces, which many models do not see."""
    for batch in rows.select_columns([*task.columns]).iter(batch_size=1_000):
        columns = (map(_plain, batch[column]) for column in task.columns)
        yield from map(hash, zip(*columns, strict=True))


def _plain(text: Any) -> str:
    return " ".join((" ".join(map(str, text)) if isinstance(text, list) else str(text)).casefold().split())


def _is_classification(task: Task) -> bool:
    return isinstance(task, SequenceTask) and task.kind == "classification"


def _with_threshold(task: Task, threshold: float | None) -> Task:
    if threshold is None or threshold == getattr(task, "threshold", 0.5):
        return task
    if not isinstance(task, SequenceTask) or task.kind != "multi-label":
        raise InputError(
            f"{spelled('threshold')} {threshold:g} is for labels of a multi-label task, and {task.name} is {task.kind}"
            ": leave it out"
        )
    return dataclasses.replace(task, threshold=threshold)


def _only_label(task: Task, rows: datasets.Dataset) -> str:
    """The label of all rows if they have the same one; else empty."""
    labels = set(rows["label"][:])
    return task.labels[labels.pop()] if len(labels) == 1 else ""


def tokenize(
    dataset: datasets.Dataset,
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    scored: bool = False,
    file: Path | None = None,
) -> datasets.Dataset:
    """Turns rows into inputs of the model, in the rows' order, truncated but not padded.

    Args:
        dataset: rows of one of the task's splits.
        task: the task.
        tokenizer: tokenizer of the model.
        max_length: maximum number of tokens in an input, special tokens included.
        scored: True for rows that `task.score` will score, which may need more than the model's arguments.
        file: where to write the rows, which are memory-mapped then; None to keep them in memory.

    Returns:
        Rows of `input_ids`, `attention_mask`, `token_type_ids` if the tokenizer has them, and labels, as `task.encode`
        makes them. Question answering makes several inputs of a row with a long context.

    Raises:
        InputError: `max_length` leaves no room for text or exceeds the tokenizer's limit.
    """
    special = tokenizer.num_special_tokens_to_add(pair=task.segments == 2)
    least, most = special + task.segments, tokenizer.model_max_length
    if not isinstance(most, int | float) or most < least:
        raise InputError(f"the tokenizer takes at most {most!r:.40} tokens: correct model_max_length in its files")
    if not least <= max_length <= most:
        # A tokenizer without a limit has 1e30 as its maximum.
        choices = f"from {least} to {most}" if most < 2**31 else f"at least {least}"
        raise InputError(f"{spelled('max_length')} {max_length} does not suit the tokenizer and task: choose {choices}")

    def encode(batch: Mapping[str, list], indices: list[int]) -> dict[str, Any]:
        return task.encode(batch, indices, tokenizer, max_length, scored)

    with _no_progress_bars():
        return dataset.map(
            encode,
            batched=True,
            with_indices=True,
            remove_columns=dataset.column_names,
            keep_in_memory=file is None,
            cache_file_name=None if file is None else str(file),
            load_from_cache_file=False,
            # Avoids the slow hash of the tokenizer, which only the cache would need.
            new_fingerprint=datasets.fingerprint.generate_random_fingerprint(),
        )


def _whole_task(spec: Any, name: str, local: Mapping[str, Any], seed: int) -> Task:
    if not isinstance(spec, str | os.PathLike):
        return load_object(spec, name, local, seed)
    path = user_path(spec, spelled("task"))
    named = None if isinstance(spec, os.PathLike) else "demo" if spec == "demo" else glue_name(spec)
    if named is None and os.path.lexists(path):
        return load_local(path, **local, seed=seed)
    if named is None:
        raise InputError(
            f"unknown task {os.fspath(spec)!r:.100}: name one of demo, {', '.join(GLUE)}, or an existing file "
            f"({', '.join(FORMATS)}) or a folder with train.* and validation.*"
        )
    if options := [name for name, value in local.items() if value is not None]:
        raise InputError(
            f"{', '.join(spelled('task_kind' if name == 'kind' else name) for name in options)} given for task "
            f"{named}: only local files and folders take it; leave it out"
        )
    return load_demo() if named == "demo" else load_glue(named)


def _limit(rows: datasets.Dataset, count: int | None, option: str, role: str, seed: int) -> datasets.Dataset:
    if count is None:
        return rows
    if not 1 <= count <= len(rows):
        raise InputError(
            f"{spelled(option)} {count} of {len(rows)} {role} rows: choose from 1 to {len(rows)}, or leave it out"
        )
    return take(rows, count, seed)


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    disabled = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not disabled:
            datasets.enable_progress_bars()
