"""Options of single tasks in a run of several: `a,b` for all tasks, `TASK=a,b` for one. Imports no torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from ticketops.errors import InputError, spelled
from ticketops.searching.config import list_of, read_columns
from ticketops.searching.plan import SearchConfig

#: Fields of `SearchConfig` that say how a task's files are read.
DATA_OPTIONS = ("text_columns", "label_column", "task_kind", "encoding")
#: Fields of `SearchConfig` that may differ from task to task.
TASK_OPTIONS = (*DATA_OPTIONS, "metric", "threshold", "class_weights", "max_length")
# Those that take several values.
_LISTS = ("text_columns", "class_weights")


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
    entries = read_columns(
        name, [str(entry) if type(entry) in (int, float) else entry for entry in list_of(name, value)]
    )
    for entry in entries:
        if "=" in entry and not _is_named(entry, tasks):
            raise InputError(f"{spelled(name)} {entry!r} names none of the tasks {', '.join(tasks)}: write TASK=VALUE")
    return entries


def option_of(name: str, entries: Any, own: Iterable[str], tasks: Iterable[str]) -> Any:
    """The value of an option for one task.

    Args:
        name: name of the option's field.
        entries: entries as `read_option` returns them, or one value for all tasks.
        own: names of this task.
        tasks: names of all tasks.

    Returns:
        A value for the field of `SearchConfig`: the task's own, else the one for all tasks, else None.

    Raises:
        InputError: an option has several values that takes one.
    """
    if not isinstance(entries, tuple):
        return entries
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
    if name in _LISTS:
        return tuple(found)
    if len(found) > 1:
        raise InputError(
            f"{spelled(name)} {','.join(found)} gives one task several values: write VALUE, or TASK=VALUE for each"
        )
    return found[0]


def read_options(config: Any, names: Iterable[str]) -> None:
    """Reads all options of single tasks in a run's configuration.

    Args:
        config: the run, changed in place.
        names: task names that may precede an equals sign.
    """
    names = tuple(names)
    for name in TASK_OPTIONS:
        value: Any = read_option(name, getattr(config, name), names)
        # One value for all tasks is kept as a search has it. A tuple stays one of entries.
        if name not in DATA_OPTIONS and value is not None and len(value) == 1 and not _is_named(value[0], names):
            one = getattr(SearchConfig(**{name: value[0]}), name)
            value = value if isinstance(one, tuple) else one
        object.__setattr__(config, name, value)


def options_of(config: Any, own: Iterable[str], names: Iterable[str]) -> dict[str, Any]:
    """The options of one task, by field of `SearchConfig`, without those that are left out.

    Args:
        config: the run.
        own: names of this task.
        names: names of all tasks.
    """
    own, names = tuple(own), tuple(names)
    found = {name: option_of(name, getattr(config, name), own, names) for name in TASK_OPTIONS}
    return {name: value for name, value in found.items() if value is not None}


def _is_named(entry: str, tasks: Iterable[str]) -> str:
    """The task name before an entry's equals sign; empty if there is none."""
    return max((task for task in tasks if entry.startswith(f"{task}=")), key=len, default="")
