"""Tasks, metrics and Trainers that are objects in Python, which go beside a configuration. Imports no torch."""

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ticketops.errors import InputError, shown, spelled

#: How a configuration begins the name of such an object.
PREFIX = "python:"


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects that a configuration names, and what makes the Trainers of a search.

    Attributes:
        tasks: name -> data set or Task.
        metrics: name -> function, or object with `compute`.
        trainer_factory: function that takes the keyword arguments of a transformers Trainer and returns one; None for
            ticketops' own.
    """

    tasks: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    trainer_factory: Callable[..., Any] | None = None

    def task(self, name: str) -> tuple[Any, str]:
        """What to load for a configuration's task, and the task's name.

        Args:
            name: as the configuration has it.

        Raises:
            InputError: it names an object that is not here.
        """
        return self._find("task", name, self.tasks), bare(name)

    def metric(self, name: str | None) -> Any:
        """A configuration's metric: its name, or the object of that name.

        Args:
            name: as the configuration has it.

        Raises:
            InputError: it names an object that is not here.
        """
        return None if name is None else self._find("metric", name, self.metrics)

    def _find(self, option: str, name: str, objects: Mapping[str, Any]) -> Any:
        if not is_object(name):
            return name
        if name not in objects:
            raise InputError(
                f"{spelled(option)} {bare(name)} is an object in Python, which no folder keeps: give the same one "
                "again, in Python"
            )
        return objects[name]


def is_object(name: Any) -> bool:
    """True if a configuration's value names an object.

    Args:
        name: the value.
    """
    return isinstance(name, str) and name.startswith(PREFIX)


def bare(name: str) -> str:
    """A name without the prefix of objects.

    Args:
        name: as a configuration has it.
    """
    return name.removeprefix(PREFIX)


def named_task(given: Any, option: str, fallback: str = "data", name: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Names one task that may be an object.

    Args:
        given: a name or path, which stays as it is, or an object.
        option: name of the option, for error messages.
        fallback: name of a data set that has none.
        name: name that the user has given it.

    Returns:
        What a configuration has for it, and name -> object.

    Raises:
        InputError: its own name cannot be a file's.
    """
    if given is None or isinstance(given, str | os.PathLike | int | float):
        return given, {}
    name = name or own_name(given) or fallback
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w .+-]*", name):
        raise InputError(f"{spelled(option)} is called {shown(name)}: use letters, digits, spaces and any of . + - _")
    return PREFIX + name, {PREFIX + name: given}


def named_tasks(given: Any) -> tuple[Any, dict[str, Any]]:
    """Names several tasks, of which some may be objects.

    Args:
        given: names or paths and objects: text, a list, or name -> object.

    Returns:
        What a configuration has for them, and name -> object.

    Raises:
        InputError: two objects have one name, or a name cannot be a file's.
    """
    if given is None or isinstance(given, str | os.PathLike):
        return given, {}
    entries = [*given.items()] if isinstance(given, Mapping) else [(None, entry) for entry in given]
    names: list[Any] = []
    objects: dict[str, Any] = {}
    for name, entry in entries:
        if name is not None and isinstance(entry, str | os.PathLike):
            raise InputError(f"{spelled('tasks')} calls {shown(entry)} {name}, and only objects get names: use a list")
        found, own = named_task(entry, "tasks", name=name)
        if own.keys() & objects.keys():
            raise InputError(f"two objects of {spelled('tasks')} are called {bare(found)}: give {{name: object, ...}}")
        names.append(found)
        objects |= own
    return names, objects


def own_name(data: Any) -> str:
    """The name that a task or a data set has itself; empty for none.

    Args:
        data: a Task, data set, or dictionary of splits.
    """
    if isinstance(data, Mapping):
        data = next(iter(data.values()), None)
    found = getattr(data, "name", None) or getattr(getattr(data, "info", None), "dataset_name", None)
    return found if isinstance(found, str) else ""


def named_metric(given: Any, several: bool = False) -> tuple[Any, dict[str, Any]]:
    """Names a metric that may be an object.

    Args:
        given: a name, which stays as it is, or an object.
        several: True in a run of several tasks, where a mapping is from tasks to their metrics.

    Returns:
        What a configuration has for it, and name -> (name, function).

    Raises:
        InputError: the object is no metric.
    """
    if given is None or isinstance(given, str | list | tuple):
        return given, {}
    if several and isinstance(given, Mapping):
        read = {task: named_metric(metric) for task, metric in given.items()}
        objects = {name: own for _, found in read.values() for name, own in found.items()}
        return {task: name for task, (name, _) in read.items()}, objects
    from ticketops.tasks.metrics import own_metric

    name, function = own_metric(given)
    return PREFIX + name, {PREFIX + name: (name, function)}
