"""The nine GLUE tasks by name: their columns, labels, official metrics, and their rows from the hub."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import datasets
import huggingface_hub

from ticketops.errors import InputError
from ticketops.tasks.task import Kind, Task

HUB_DATASET = "nyu-mll/glue"

# We knock once before the hub's client is let loose: it tries six times with growing pauses (23 s where the name does
# not resolve, minutes where packets vanish). Without an answer it is told to be offline, which leaves it its cache.
_CONTACT_SECONDS = 3.0


@dataclass(frozen=True)
class GlueTask:
    """One GLUE task.

    Attributes:
        columns: the text columns as the hub calls them.
        labels: label names by id; none for regression.
        metrics: the selecting one first.
        validation: the split that selects.
        original_columns: what GLUE's own files call the text columns, where that differs.
    """

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: str = "validation"
    original_columns: tuple[str, ...] = ()

    @property
    def kind(self) -> Kind:
        """Whether the task is a classification or a regression."""
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
    """Finds the GLUE task a name means, in any of the usual spellings (`SST-2`, `sst2`).

    Args:
        name: what the user wrote.

    Returns:
        The hub's name of the task, or None.
    """
    plain = name.lower().replace("-", "").replace("_", "")
    return plain if plain in GLUE else None


def load_glue(name: str) -> Task:
    """Loads a GLUE task from the hub, or from the hub's local cache where the hub cannot be reached.

    MNLI is validated on its matched split; the mismatched one is not loaded.

    Args:
        name: a key of `GLUE`.

    Returns:
        The whole task.

    Raises:
        InputError: the hub cannot be reached (said within seconds) and its cache does not hold the task, or the labels
            are hidden.
    """
    glue = GLUE[name]
    try:
        with _reachable_hub_or_cache():
            splits = datasets.load_dataset(HUB_DATASET, name)
    # The hub's client has raised half a dozen unrelated classes for a missing connection, and changes them.
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(
            f"GLUE task {name} cannot be loaded from the hub ({reason}): check the connection, or get the rows "
            f"elsewhere and use a folder: --task path/to/{name} with train.jsonl and validation.jsonl "
            f"(columns {', '.join(glue.columns)}, label)"
        ) from error
    train, validation = (splits[split].select_columns([*glue.columns, "label"]) for split in ("train", glue.validation))
    for split, rows in (("train", train), (glue.validation, validation)):
        if len(rows) and min(rows["label"][:]) < 0:
            raise InputError(f"split {split} of GLUE task {name} has hidden labels (-1): use a split with labels")
    return Task(name, glue.kind, glue.labels, glue.columns, glue.metrics, train, validation, glue.validation)


@contextmanager
def _reachable_hub_or_cache() -> Iterator[None]:
    constants = huggingface_hub.constants
    offline = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.HfApi().dataset_info(HUB_DATASET, timeout=_CONTACT_SECONDS)
    # Whatever kept the hub from answering, the cache may still hold the task.
    except Exception:
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline
