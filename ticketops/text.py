"""Escapes untrusted text for terminals, Markdown, HTML and CSV, and formats counted nouns.

Names of tasks, columns and labels and the metadata of tickets come from files that others may have made. They must not
control the terminal, add links or HTML to a report, or run formulas in a spreadsheet.
"""

import re
from collections.abc import Hashable, Iterable
from html import escape
from typing import Any, TypeVar

_MARKDOWN = re.compile(r"([\\`*\[\]|~$!#])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
Key = TypeVar("Key", bound=Hashable)


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun in the singular or plural: `count(1, "FFN")` is "1 FFN".

    Args:
        number: the number.
        noun: the noun in the singular.
        plural: the noun in the plural; by default the singular with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """A duration in its largest units: "40 s", "12 min", "3 h 5 min", "2 d 4 h".

    Args:
        seconds: the duration.
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    days, hours, minutes = minutes // 1440, minutes // 60 % 24, minutes % 60
    parts = [f"{number} {unit}" for number, unit in ((days, "d"), (hours, "h"), (minutes, "min")) if number]
    return " ".join(parts[:2])


def structures(heads: int, ffns: int, neurons: int | None = None) -> str:
    """Counts of heads, FFNs and, optionally, neurons: "21 heads, 1 FFN and 30 neurons".

    Args:
        heads, ffns: number of heads and of FFNs.
        neurons: number of neurons in other FFNs; None to leave them out.
    """
    parts = [count(heads, "head"), count(ffns, "FFN"), *([] if neurons is None else [count(neurons, "neuron")])]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def repeated(keys: Iterable[Key]) -> Key | None:
    """The first key that comes a second time; None if all are different.

    Args:
        keys: names of columns or of a mapping; a file may have 100,000 of them.
    """
    seen = set()
    for key in keys:
        if key in seen:
            return key
        seen.add(key)
    return None


def some(names: Iterable[Any], most: int = 20, longest: int = 80) -> str:
    """Names in a message, separated by commas and cut where they are too many or too long for a line.

    Args:
        names: of columns, files or labels.
        most: number of names that are written out.
        longest: characters of a name that are written out.
    """
    names = [str(name) for name in names]
    text = ", ".join(name if len(name) <= longest else f"{name[:longest]}..." for name in names[:most])
    return text if len(names) <= most else f"{text} and {len(names) - most:,} more"


def printable(text: Any) -> str:
    """Makes text safe for a terminal or a figure: one line, without escape codes or characters that reorder text.

    Args:
        text: any object; unprintable characters become Python escapes such as `\\x1b`.
    """
    found = str(text)
    if found.isprintable():
        return found
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in found)


def markdown(text: Any) -> str:
    """Escapes text for Markdown, so that it adds no markup, HTML, links or table cells.

    Args:
        text: any object.
    """
    escaped = _MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))
    escaped = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], escaped)
    # Markdown viewers turn bare addresses into links.
    return re.sub(r"(?i)(:)(?=//)|(?<=www)(\.)", lambda found: f"&#{ord(found[0])};", escaped)


def html(text: Any) -> str:
    """Escapes text for HTML, as content and as an attribute's value in quotes.

    Args:
        text: any object.
    """
    return escape(printable(text))


def code(text: Any) -> str:
    """Formats text as inline code in Markdown.

    Args:
        text: any object.
    """
    content = printable(text)
    ticks = "`" * (max(map(len, re.findall("`+", content)), default=0) + 1)
    # A bar ends a table cell even inside code.
    content = content.replace("|", "\\|")
    return f"{ticks} {content} {ticks}" if len(ticks) > 1 else f"`{content}`"


def fenced(text: str, language: str = "") -> str:
    """Formats text of several lines as a code block in Markdown.

    Args:
        text: the lines, separated by line feeds.
        language: name of the language for the highlighter.
    """
    content = "\n".join(map(printable, text.split("\n")))
    fence = "`" * max(3, max(map(len, re.findall("`+", content)), default=0) + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def cell(value: Any) -> Any:
    """Makes a value safe for a CSV file, so that a spreadsheet shows it as text and never runs it as a formula.

    Args:
        value: a number, which is returned unchanged, or text; text that looks like a formula gets a leading apostrophe.
    """
    if not isinstance(value, str):
        return value
    content = printable(value)
    return f"'{content}" if content.startswith(tuple("=+-@＝＋－＠")) and not _is_number(content) else content


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
