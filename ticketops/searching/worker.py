"""What workers and processes that train together share: inputs that are sent once, and values they agree on."""

import atexit
import datetime
import functools
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import datasets
import torch
from accelerate import PartialState

from ticketops.launch import processes
from ticketops.searching.setting import Setting, quiet

#: Inputs that a worker keeps. A share's searches have one each.
_MOST_LOADED = 2


class Inputs:
    """The inputs that a worker has used last, by name."""

    def __init__(self) -> None:
        self._loaded: dict[Any, Any] = {}

    def has(self, name: Any) -> bool:
        """True if they need not be sent."""
        return name in self._loaded

    def get(self, name: Any, load: Callable[[], Any]) -> Any:
        """Returns inputs, and loads those that it does not have in place of the oldest.

        Args:
            name: their name.
            load: returns them.
        """
        if name not in self._loaded:
            while len(self._loaded) >= _MOST_LOADED:
                del self._loaded[next(iter(self._loaded))]
            self._loaded[name] = load()
        return self._loaded[name]


def portable(inputs: Any) -> Any:
    """Inputs whose rows are in memory: a file that they were read from is on this machine alone.

    Args:
        inputs: what many trainings share: a `Setting`, or several.
    """
    if isinstance(inputs, tuple | list):
        return type(inputs)(map(portable, inputs))
    if isinstance(inputs, dict):
        return {name: portable(value) for name, value in inputs.items()}
    if isinstance(inputs, Setting):
        task = inputs.task
        rows = {split: getattr(task, split) for split in ("train", "validation", "report", "test")}
        moved = {split: _in_memory(part) for split, part in rows.items() if part is not None and part.cache_files}
        splits = {split: _in_memory(part) for split, part in inputs.splits.items()}
        return replace(inputs, task=replace(task, **moved) if moved else task, splits=splits)
    return inputs


def agree(value: Any) -> Any:
    """Returns the value of the first of the processes that train together. All must call it.

    Args:
        value: any value that can be pickled; that of the other processes is not used.
    """
    if processes() == 1:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=_group())
    return values[0]


@functools.cache
def _group() -> Any:
    """The processes, beside the group that exchanges gradients: messages are of the CPU, and are waited for as long as
    the first process has something else to do."""
    PartialState(cpu=not torch.accelerator.is_available())
    atexit.register(_leave)
    return torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(days=30))


def _leave() -> None:
    # What exchanges gradients goes before the threads that it waits for.
    gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _in_memory(rows: datasets.Dataset) -> datasets.Dataset:
    with quiet():
        return rows.flatten_indices(keep_in_memory=True) if rows.cache_files else rows
