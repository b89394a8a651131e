"""Data options in a run of several tasks: `a,b` for all tasks, `TASK=a,b` for one. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from ticketops.errors import InputError, spelled
from ticketops.searching.config import list_of, read_columns

#: Fields of `SearchConfig` that say how a task's files are read.
DATA_OPTIONS = ("text_columns", "label_column", "task_kind", "encoding")


def read_option(name: str, value: Any, tasks: Iterable[str]) -> tuple[str, ...] | None:
    """Reads an option whose value may differ from task to task.

    Args:
        name: name of the option's field, for the error message.
        value: "a,b" for all tasks, "reviews=title,body,mails=text" for single tasks, a list of such entries, or a
            mapping such as {"reviews": ["title", "body"]}; None for no value.
        tasks: task names that may precede an equals sign.

    Returns:
        The entries; the first entry of each single task begins with "TASK=".

    Raises:
        InputError: the value is empty, or an equals sign follows an unknown task.
    """
    if value is None:
        return None
    tasks = tuple(dict.fromkeys(tasks))
    if isinstance(value, Mapping):
        value = [
            f"{task}={entry}" if position == 0 else entry
            for task, entries in value.items()
            for position, entry in enumerate(list_of(name, entries))
        ]
    entries = read_columns(name, value)
    for entry in entries:
        if "=" in entry and not _is_named(entry, tasks):
            raise InputError(f"{spelled(name)} {entry!r} names none of the tasks {', '.join(tasks)}: write TASK=VALUE")
    return entries


def option_of(name: str, entries: tuple[str, ...] | None, own: Iterable[str], tasks: Iterable[str]) -> Any:
    """The value of an option for one task.

    Args:
        name: name of the option's field.
        entries: entries as `read_option` returns them.
        own: names of this task.
        tasks: names of all tasks.

    Returns:
        A value for the field of `SearchConfig`: the task's own, else the one for all tasks, else None.

    Raises:
        InputError: an option other than `text_columns` has several values.
    """
    if entries is None:
        return None
    tasks, own = tuple(tasks), set(own)
    values: dict[bool, list[str]] = {False: [], True: []}
    # Values for all tasks come first; "TASK=" starts the values of one task.
    task: str | None = None
    for entry in entries:
        named = _is_named(entry, tasks)
        task, value = (named, entry[len(named) + 1 :]) if named else (task, entry)
        if task is None or task in own:
            values[task is not None].append(value)
    found = values[True] or values[False]
    if not found:
        return None
    if name == "text_columns":
        return tuple(found)
    if len(found) > 1:
        raise InputError(
            f"{spelled(name)} {','.join(found)} gives one task several values: write VALUE, or TASK=VALUE for each"
        )
    return found[0]


def _is_named(entry: str, tasks: Iterable[str]) -> str:
    """The task name before an entry's equals sign; empty if there is none."""
    return max((task for task in tasks if entry.startswith(f"{task}=")), key=len, default="")
