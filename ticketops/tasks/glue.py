"""The nine GLUE tasks by name: their columns, labels, official metrics, and their rows from the hub."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa

from ticketops.errors import InputError, spelled
from ticketops.hub import causes, contact, explain
from ticketops.kinds import Kind
from ticketops.tasks.sequences import SequenceTask

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task.

    Attributes:
        columns: names of the text columns in the hub's data set.
        labels: label names by id; empty for regression.
        metrics: names of the metrics; the first one selects the super ticket.
        validation: name of the split that selects.
        original_columns: names of the text columns in GLUE's own files, if they differ.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"
    original_columns: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """Classification, or regression if the task has no label names."""
        return "classification" if self.labels else "regression"


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("matthews_correlation",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive")),
    "mrpc": GlueTask(
        _PAIR,
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        original_columns=("#1 String", "#2 String"),
    ),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman")),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("accuracy", "f1")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        validation="validation_matched",
        original_columns=_PAIR,
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT),
    "rte": GlueTask(_PAIR, _ENTAILMENT),
    "wnli": GlueTask(_PAIR, ("not_entailment", "entailment")),
}


def glue_name(name: str) -> str | None:
    """Finds a GLUE task by name, in any of the usual spellings (`SST-2`, `sst2`).

    Args:
        name: name of a task, as the user wrote it.

    Returns:
        The task's name on the hub; None if it is not a GLUE task.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    return plain if plain in GLUE else None


def load_glue(name: str) -> SequenceTask:
    """Loads a GLUE task from the hub, or from the hub's local cache where the hub cannot be reached.

    MNLI is validated on its matched split; the mismatched one is not loaded.

    Args:
        name: a key of `GLUE`.

    Returns:
        The whole task.

    Raises:
        InputError: the hub cannot be reached (found out within seconds) and its cache does not hold the task, or the
            labels are hidden.
    """
    glue = GLUE[name]
    refusal: Exception | None = None
    try:
        contact(HUB_DATASET, "dataset")
    # Whatever the reason, the cache may still hold the task.
    except Exception as error:
        refusal = error
    try:
        with _offline() if refusal is not None else nullcontext():
            splits = _load(name)
    # The hub's client raises half a dozen unrelated classes for a missing connection, different ones in each version.
    except Exception as error:
        reason = explain(refusal or error, HUB_DATASET, "dataset")
        raise InputError(
            f"GLUE task {name} cannot be loaded from {HUB_DATASET}: {reason}; or {_elsewhere(name)}"
        ) from error
    names, columns = ("train", glue.validation), [*glue.columns, "label"]
    for split in names:
        types = splits[split].features if split in splits else {}
        if lacking := [column for column in columns if column not in types]:
            raise InputError(
                f"{HUB_DATASET} has no split {split} of {name} with the column {lacking[0]}: {_elsewhere(name)}"
            )
        if glue.labels and list(glue.labels) != getattr(types["label"], "names", list(glue.labels)):
            raise InputError(
                f"{HUB_DATASET} calls the labels of {name} {', '.join(types['label'].names)}, and GLUE "
                f"{', '.join(glue.labels)}: {_elsewhere(name)}"
            )
    train, validation = (splits[split].select_columns(columns) for split in names)
    for split, rows in zip(names, (train, validation), strict=True):
        if len(rows) and min(rows["label"][:]) < 0:
            raise InputError(f"split {split} of GLUE task {name} has hidden labels (-1): use a split with labels")
    return SequenceTask(name, glue.kind, glue.labels, glue.columns, glue.metrics, train, validation, glue.validation)


def _elsewhere(name: str) -> str:
    return (
        f"get the rows elsewhere and use a folder: {spelled('task', f'path/to/{name}')} with train.jsonl and "
        f"validation.jsonl (columns {', '.join(GLUE[name].columns)}, label)"
    )


def _load(name: str) -> Any:
    try:
        return datasets.load_dataset(HUB_DATASET, name)
    except Exception as error:
        # What an earlier download has left in the cache is damaged, and would be read again each time.
        if not any(isinstance(link, pa.ArrowException) for link in causes(error)):
            raise
        return datasets.load_dataset(HUB_DATASET, name, download_mode="force_redownload")


@contextmanager
def _offline() -> Iterator[None]:
    """Makes the hub's client use its cache alone, since without a network it would retry for minutes."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
