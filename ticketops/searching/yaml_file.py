"""Reads YAML configuration files, without aliases, tags, duplicate keys and ambiguous numbers."""

import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from ticketops.errors import InputError
from ticketops.files import user_path

_MOST_BYTES = 2**20
#: Maximum depth of nested lists and mappings; a configuration needs two.
_DEEPEST = 16
# Numbers that YAML 1.1 reads otherwise than people or YAML 1.2 do: 010 is 8, 1:30 is 90, 0b1 is 1, 1_000 is 1000.
_AMBIGUOUS = re.compile(
    r"[-+]?(0[0-9_]+|0[xXbBoO][0-9a-fA-F_]+|[0-9][0-9_]*(:[0-5]?[0-9])+(\.[0-9_]*)?|[0-9.]*_[0-9_.]*)"
)
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")


def read_yaml(path: str | Path) -> Any:
    """Reads a YAML or JSON file.

    Args:
        path: the file; "~" is expanded.

    Returns:
        The content: mappings, lists, text, numbers, booleans, None.

    Raises:
        InputError: the path is not a regular file or cannot be read, the text is not YAML, or it has a duplicate key,
            an alias, a tag or a number that is not decimal.
    """
    place = user_path(path, "the configuration file")
    try:
        if not place.is_file():
            raise InputError(
                f"cannot read the configuration file {path}: {'it is no file' if place.exists() else 'no such file'}"
            )
        if place.stat().st_size > _MOST_BYTES:
            raise InputError(f"the configuration file {path} has more than {_MOST_BYTES:,} bytes: check the path")
        text = place.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise InputError(f"cannot read the configuration file {path}: {reason}") from error
    try:
        _check_events(text)
        return yaml.load(text, Loader=_Loader)
    except _Refused as error:
        raise InputError(f"the configuration file {path} has in line {error.line} {error}") from error
    # Python raises ValueError for an integer of more than 4,300 digits.
    except (yaml.YAMLError, ValueError) as error:
        problem = " ".join(str(error).replace(' in "<unicode string>"', "").split())
        raise InputError(
            f"the configuration file {path} is not YAML ({problem:.300}): write 'flag: value' lines"
        ) from error


class _Refused(Exception):
    """Valid YAML that is not accepted; the message names it and the remedy."""

    def __init__(self, problem: str, mark: Any):
        super().__init__(problem)
        self.line = mark.line + 1


def _check_events(text: str) -> None:
    """Refuses aliases, tags and deep nesting before anything is built."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        if isinstance(event, yaml.AliasEvent):
            raise _Refused(f"the alias *{event.anchor:.60}, which is not read: write the value out", event.start_mark)
        if tag := getattr(event, "tag", None):
            raise _Refused(f"the tag {tag:.60}, which is not read: write the plain value", event.start_mark)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise _Refused(f"more than {_DEEPEST} lists or mappings in each other: write fewer", event.start_mark)


class _Loader(yaml.SafeLoader):
    """Loads plain values only, with decimal numbers and without duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key, _ in node.value:
            name = self.construct_object(key, deep=True)
            # Lists and mappings as keys are refused below.
            if not isinstance(name, Hashable):
                continue
            if name in seen:
                raise _Refused(f"the key {name!r:.60} twice: keep one", key.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)

    def construct_number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node))
        if _AMBIGUOUS.fullmatch(text):
            raise _Refused(
                f"the number {text:.40}, which has more than one reading: write it in decimal digits, or in quotes",
                node.start_mark,
            )
        if re.fullmatch(r"[-+]?[0-9]+", text):
            return int(text)
        return float(text) if _FLOAT.fullmatch(text) else float(self.construct_yaml_float(node))


# Dates stay text, since folders are named by dates.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in entries if not tag.endswith(":timestamp")]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# YAML 1.1 reads 1e-3 (no point) and 0o17 as text; YAML 1.2 reads them as 0.001 and 15.
for _tag, _pattern in (("float", _FLOAT), ("int", _AMBIGUOUS)):
    _name = f"tag:yaml.org,2002:{_tag}"
    _Loader.add_implicit_resolver(_name, re.compile(rf"(?:{_pattern.pattern})$"), list("-+.0123456789"))
    _Loader.add_constructor(_name, _Loader.construct_number)
