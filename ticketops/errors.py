"""The errors a user can meet; each message names the value, the reason and the remedy in one line."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any


class TicketopsError(Exception):
    """Base of every error that ticketops raises on purpose."""


class InputError(TicketopsError, ValueError):
    """A bad argument, file, task or ticket."""


class UnsupportedError(TicketopsError, ValueError):
    """A model, argument, dtype or option that ticketops does not serve."""


class TrialError(TicketopsError):
    """One trial of a run failed, as by diverging; the others go on."""


class StoreError(TicketopsError):
    """The output folder cannot be used: occupied, read-only, full, or made by another configuration."""


#: The remedy for a task that no run serves.
OWN_LOOP = (
    "for other tasks give ticketops.search a ticketops.tasks.Task of your own, or use ticketops.patch in a training "
    "loop of your own"
)

#: Writes an option, and its value where that is not None, as the reader of a message would give it.
Spelling = Callable[[str, Any], str]


def as_keyword(option: str, value: Any = None) -> str:
    """An option in Python and YAML: `max_length`, `head='fresh'`."""
    return option if value is None else f"{option}={value!r}"


def as_flag(option: str, value: Any = None) -> str:
    """An option on the command line: `--max-length`, `--head fresh`, `--save-models`."""
    flag = f"--{option.replace('_', '-')}"
    return flag if value is None or value is True else f"{flag} {value}"


_spelling: ContextVar[Spelling] = ContextVar("spelling", default=as_keyword)


def spelled(option: str, value: Any = None) -> str:
    """Names an option in a message as its reader gives it: as a keyword, or as a flag on the command line.

    Args:
        option: name of the keyword.
        value: what to give for it; None for the name alone.
    """
    return _spelling.get()(option, value)


def current_spelling() -> Spelling:
    """The style in which `spelled` writes options."""
    return _spelling.get()


@contextmanager
def spelling(style: Spelling) -> Iterator[None]:
    """Has `spelled` write options in another style.

    Args:
        style: writes an option and its value.
    """
    token = _spelling.set(style)
    try:
        yield
    finally:
        _spelling.reset(token)


def shown(value: Any) -> str:
    """A value in a message: plain ones as they are, on one short line; of others, such as a module, the type alone.

    Args:
        value: anything.
    """
    if isinstance(value, str | int | float | bool | list | tuple | dict | set | None):
        # Dictionaries of other libraries write themselves on several lines.
        text = " ".join(repr(value).split())
        return text if len(text) <= 80 else f"{text[:80]}..."
    return f"of type {type(value).__name__}"
