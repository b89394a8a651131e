"""How names from files reach readers: one function for each medium, and counted nouns.

A name may hold anything: a task is called after its file, labels and columns stand in data, a ticket's metadata in a
file that somebody sent. No name may change what a terminal does, what a page links to or what a spreadsheet computes.
"""

import re
from typing import Any

_MARKDOWN = re.compile(r"([\\`*\[\]|~$!#])|(?<![A-Za-z0-9])(_)|(_)(?![A-Za-z0-9])")
_ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}


def count(number: int, noun: str, plural: str | None = None) -> str:
    """A number with its noun in the singular or plural: `count(1, "FFN")` is "1 FFN".

    Args:
        number: how many.
        noun: for one.
        plural: for other numbers; by default with an s.
    """
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def structures(heads: int, ffns: int, neurons: int | None = None) -> str:
    """Counted heads and FFNs, and neurons where they are given: "21 heads, 1 FFN and 30 neurons".

    Args:
        heads, ffns: how many.
        neurons: of other FFNs.
    """
    parts = [count(heads, "head"), count(ffns, "FFN"), *([] if neurons is None else [count(neurons, "neuron")])]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def printable(text: Any) -> str:
    """Text for a terminal or a figure: in one line, without escape codes or characters that reorder or hide text.

    Args:
        text: anything; what cannot be printed stands as Python writes it, such as `\\x1b`.
    """
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in str(text))


def markdown(text: Any) -> str:
    """Text for a Markdown page, as text: no markup, HTML, link or table cell of its own.

    Args:
        text: anything.
    """
    escaped = _MARKDOWN.sub(lambda found: f"\\{found[0]}", printable(text))
    escaped = re.sub("[&<>]", lambda found: _ENTITIES[found[0]], escaped)
    # Bare addresses would become links.
    return re.sub(r"(?i)(:)(?=//)|(?<=www)(\.)", lambda found: f"&#{ord(found[0])};", escaped)


def code(text: Any) -> str:
    """Text for a Markdown page, as code within a line.

    Args:
        text: anything.
    """
    content = printable(text)
    ticks = "`" * (max(map(len, re.findall("`+", content)), default=0) + 1)
    # A bar would end a table's cell even there.
    content = content.replace("|", "\\|")
    return f"{ticks} {content} {ticks}" if len(ticks) > 1 else f"`{content}`"


def fenced(text: str, language: str = "") -> str:
    """Text of several lines for a Markdown page, as a block of code.

    Args:
        text: its lines are kept.
        language: after the opening fence.
    """
    content = "\n".join(map(printable, text.split("\n")))
    fence = "`" * max(3, max(map(len, re.findall("`+", content)), default=0) + 1)
    return f"{fence}{language}\n{content}\n{fence}"


def cell(value: Any) -> Any:
    """A value for a CSV file, which a spreadsheet shows and does not compute.

    Args:
        value: numbers stay as they are; text that a spreadsheet would take for a formula starts with an apostrophe.
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
