"""Base class of all configurations: fields that are flags and YAML keys, with readers that check their values."""

import dataclasses
import difflib
import inspect
import json
import shlex
import textwrap
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from ticketops.errors import InputError, as_keyword, current_spelling, shown, spelled, spelling
from ticketops.searching.objects import bare, is_object
from ticketops.searching.yaml_file import read_yaml

#: A larger number of seeds is probably meant as the seed itself.
_MOST_SEEDS = 1_000
#: Names of options in other tools (the Trainer, its example scripts, short forms) -> names of our fields.
_ALIASES = {
    "lr": ("learning_rate",),
    "rate": ("learning_rate",),
    "bs": ("batch_size",),
    "per_device_train_batch_size": ("batch_size",),
    "train_batch_size": ("batch_size",),
    "num_train_epochs": ("epochs",),
    "num_epochs": ("epochs",),
    "max_seq_length": ("max_length",),
    "max_len": ("max_length",),
    "max_train_samples": ("train_rows",),
    "max_eval_samples": ("validation_rows",),
    "output_dir": ("output",),
    "out": ("output",),
    "model_name_or_path": ("model",),
    "model_name": ("model",),
    "model_revision": ("revision",),
    "dataset": ("task", "tasks", "target"),
    "dataset_name": ("task", "tasks", "target"),
    "data": ("task", "tasks", "target"),
    "task_name": ("task", "tasks", "target"),
    "train_file": ("task", "tasks", "target"),
    "levels": ("sparsities",),
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "warmup": ("warmup_steps",),
    "warmup_ratio": ("warmup_steps",),
    "lr_scheduler": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "clip": ("max_grad_norm",),
    "grad_accum": ("gradient_accumulation_steps",),
    "accumulate_grad_batches": ("gradient_accumulation_steps",),
    "patience": ("early_stopping_patience",),
    "early_stopping": ("early_stopping_patience",),
    "precision": ("dtype",),
    "optimizer": ("recipe",),
    "optim": ("recipe",),
}
#: Fields that change no result: where results go, whether models are kept with them, who is told of the training, and
#: where and how trials run.
NO_RESULT = (
    "output",
    "save_models",
    "report_to",
    "executor",
    "address",
    "cpus_per_trial",
    "gpus_per_trial",
    "graphs",
    "retries",
)
#: The groups of flags in a command's help, in their order.
GROUPS = ("What", "Which tickets", "Training", "Where trials run", "Importance", "Data")
WHAT, PLAN, TRAINING, EXECUTION, SCORING, DATA = GROUPS


def option(
    default: Any, help: str, group: str, flag_type: type = str, shown: str | None = None, additive: bool = False
) -> Any:
    """Makes a field of a configuration.

    Args:
        default: default value.
        help: description of the field with its unit.
        group: group of the flag in `--help`.
        flag_type: type of the flag's value.
        shown: text of the default in the help.
        additive: True if another value only adds trials to an existing run or takes some that have not run.

    Returns:
        A dataclass field.
    """
    if shown is None:
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
    metadata = {"help": help, "group": group, "flag_type": flag_type, "shown": shown, "additive": additive}
    return dataclasses.field(default=default, metadata=metadata)


def inherited(kind: Any, name: str, **changes: Any) -> Any:
    """Makes a field like the one of the same name in another configuration.

    Args:
        kind: the other configuration's class.
        name: name of the field.
        changes: arguments of `option` that differ.
    """
    field = kind.__dataclass_fields__[name]
    return option(**{"default": field.default, **field.metadata, **changes})


class Config:
    """Base of the configurations: conversion from and to plain values, and to a command line.

    Deriving classes are frozen dataclasses whose fields are made by `option`, with a `recipe` among them.
    """

    #: Subcommand of `ticketops` that runs the configuration.
    verb: ClassVar[str]
    #: Fields that defaults of other fields depend on.
    decisive: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        """Adds what the fields mean to the class's docstring, from the texts that `--help` prints."""
        super().__init_subclass__()
        # Python -OO drops docstrings.
        if cls.__doc__ is not None:
            about, raises = inspect.cleandoc(cls.__doc__).split("Raises:")
            inherited: dict[str, Any] = getattr(cls, "__dataclass_fields__", {})
            own = {name: field for name, field in vars(cls).items() if isinstance(field, dataclasses.Field)}
            lines = [
                textwrap.fill(
                    f"{name}: {field.metadata['help']} Default: {field.metadata['shown']}.",
                    100,
                    initial_indent=" " * 4,
                    subsequent_indent=" " * 8,
                    break_on_hyphens=False,
                )
                for name, field in _by_group({**inherited, **own}.items())
            ]
            cls.__doc__ = "\n".join([f"{about}Args:", *lines, "", f"Raises:{raises}"])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "the configuration") -> Self:
        """Builds a configuration from plain values, as a YAML or JSON file holds them.

        Args:
            values: field names (dashes allowed) and values; absent fields take their defaults.
            source: where the values come from, for the error message.

        Raises:
            InputError: a key is unknown (the message names the nearest one) or there twice, or a value is bad.
        """
        names = [field.name for field in _fields(cls)]
        fields = _by_name(values, source)
        for key in fields:
            if key not in names:
                near = nearest(key, names)
                remedy = f"did you mean {near!r}?" if near else f"its keys are {', '.join(names)}"
                raise InputError(f"{source} has an unknown key {shown(key)}: {remedy}")
        return cls(**fields)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Reads a configuration file whose keys are the flags of the command.

        Args:
            path: the YAML (or JSON) file.
            overrides: fields that win over the file's.

        Raises:
            InputError: the file cannot be read, is not a mapping, or has an unknown key or a bad value.
        """
        values = read_yaml(path)
        if not isinstance(values, Mapping | None):
            raise InputError(f"the configuration file {path} holds no mapping: write 'flag: value' lines")
        source = f"the configuration file {path}"
        values = _by_name(values or {}, source)

        def spell(option: str, value: Any) -> str:
            """Spells an option as in the file if it has it, otherwise as before."""
            if option in values and option not in overrides:
                return f"{as_keyword(option, value)} (in {path})"
            return outside(option, value)

        outside = current_spelling()
        with spelling(spell):
            return cls.from_dict({**values, **overrides}, source)

    def decided(self) -> dict[str, Any]:
        """Returns the values that results depend on, as `to_dict` has them: all but those of `NO_RESULT`."""
        return {name: value for name, value in self.to_dict().items() if name not in NO_RESULT}

    @classmethod
    def fields(cls) -> "tuple[dataclasses.Field[Any], ...]":
        """Returns the fields, in the order of the flags."""
        return _fields(cls)

    @classmethod
    def additive(cls) -> list[str]:
        """Returns the names of the fields whose other values change no finished trial of a run."""
        return [field.name for field in _fields(cls) if field.metadata["additive"]]

    def to_dict(self) -> dict[str, Any]:
        """Converts to plain values for JSON and YAML, from which `from_dict` makes an equal configuration."""
        values = {field.name: getattr(self, field.name) for field in _fields(type(self))}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def command(self) -> str:
        """Returns the `ticketops` command of this run, with the flags that differ from the defaults."""
        words = ["ticketops", self.verb]
        for name, value in self._choices().items():
            flag = f"--{name.replace('_', '-')}"
            if name == "seeds":
                value = len(value) if value == list(range(len(value))) else ",".join(map(str, value)) + ","
            elif isinstance(value, list):
                value = ",".join(map(str, value))
            words += [f"--no-{flag[2:]}" if value is False else flag, *([] if isinstance(value, bool) else [value])]
        return shlex.join(map(str, words))

    def call(self) -> str:
        """Returns the call in Python of this run, with the fields that differ from the defaults; objects by name."""
        fields = ", ".join(f"{name}={_written(value)}" for name, value in self._choices().items())
        return f"ticketops.{self.verb}({fields})"

    def _choices(self) -> dict[str, Any]:
        """The fields that differ from the defaults."""
        kind: Any = type(self)
        decisive = {name: getattr(self, name) for name in self.decisive}
        fallback = kind(**decisive, recipe=getattr(self, "recipe")).to_dict()  # noqa: B009
        fallback |= {field.name: field.default for field in _fields(kind) if field.name in decisive}
        fallback["recipe"] = kind(**decisive).recipe
        return {name: value for name, value in self.to_dict().items() if value != fallback[name]}


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Finds the option that an unknown name probably means, by its name in other tools or by similar spelling.

    Args:
        name: unknown, in any case, with dashes or underscores.
        names: of the options.

    Returns:
        One of the names, or None where none is near.
    """
    names = tuple(names)
    plain = name.lower().replace("-", "_")
    found = [other for other in (plain, *_ALIASES.get(plain, ())) if other in names]
    found += difflib.get_close_matches(plain, names, n=1, cutoff=0.7)
    return found[0] if found else None


def _written(value: Any) -> str:
    """A value in Python; objects by their bare names."""
    if not isinstance(value, list):
        return bare(value) if is_object(value) else repr(value)
    if value and all(map(is_object, value)):
        return f"{{{', '.join(f'{bare(each)!r}: {bare(each)}' for each in value)}}}"
    named = [str(each).partition("=") for each in value]
    if any(is_object(each) for _, _, each in named):
        return f"{{{', '.join(f'{task!r}: {_written(each)}' for task, _, each in named)}}}"
    return f"[{', '.join(_written(each) for each in value)}]"


def _by_name(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Renames keys with dashes to the names of the fields."""
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = str(key).replace("-", "_")
        if name in fields:
            raise InputError(f"{source} has {shown(name)} twice, with dashes and without: keep one")
        fields[name] = value
    return fields


def _fields(kind: Any) -> "tuple[dataclasses.Field[Any], ...]":
    named = ((field.name, field) for field in dataclasses.fields(kind))
    return tuple(field for _, field in _by_group(named))


def _by_group(fields: "Iterable[tuple[str, dataclasses.Field[Any]]]") -> "list[tuple[str, dataclasses.Field[Any]]]":
    """Fields in the order of their groups, and within one as they are declared, inherited ones first."""
    return sorted(fields, key=lambda each: GROUPS.index(each[1].metadata["group"]))


def list_of(name: str, value: Any) -> list[Any]:
    """Reads one or more values: a list, comma-separated text, or a single value.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.

    Raises:
        InputError: there is none, or they are keys of a mapping.
    """
    if isinstance(value, Mapping):
        raise InputError(f"{spelled(name)} {shown(value)} is a mapping: give a list, or values separated by commas")
    entries = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
    if not isinstance(entries, Iterable):
        entries = [entries]
    entries = [entry for entry in entries if entry != ""]
    if not entries:
        raise InputError(f"{spelled(name)} is empty: give at least one value")
    return entries


def read_sparsities(name: str, value: Any) -> tuple[float, ...]:
    """Reads fractions to prune, in ascending order.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.

    Raises:
        InputError: one is no number in [0, 1).
    """
    levels = set()
    for entry in list_of(name, value):
        level = real(name, entry)
        if not 0 <= level < 1:
            raise InputError(f"{spelled(name)} {level:g} is outside [0, 1): give the fraction to prune, such as 0.3")
        levels.add(level)
    return tuple(sorted(levels))


def read_seeds(value: Any) -> tuple[int, ...]:
    """Reads seeds: a bare number counts them; anything with a comma, and any list, names them.

    Args:
        value: value of the field, from Python, a YAML file or the command line.

    Raises:
        InputError: one is no whole number from 0 on, or they are too many.
    """
    entries = list_of("seeds", value)
    if "," not in value if isinstance(value, str) else not isinstance(value, Iterable):
        count = whole("seeds", entries[0], 1)
        if count > _MOST_SEEDS:
            raise InputError(
                f"{spelled('seeds')} {count} asks for that many seeds, and {_MOST_SEEDS:,} are the most: to name a "
                "seed write "
                f"'{count},'"
            )
        return tuple(range(count))
    return tuple(dict.fromkeys(whole("seeds", entry, 0) for entry in entries))


def text(name: str, value: Any) -> str:
    """Reads a name or path.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.

    Raises:
        InputError: it is empty or no text.
    """
    if not isinstance(value, str | Path) or not str(value).strip():
        # A model in memory, or a data set.
        remedy = ": save it with save_pretrained and give the folder" if hasattr(value, "state_dict") else ""
        remedy = f": give it to ticketops.search({name}=...) itself" if hasattr(value, "column_names") else remedy
        raise InputError(f"{spelled(name)} {shown(value)} is not a name or a path{remedy}")
    return str(value)


def read_columns(name: str, value: Any) -> tuple[str, ...]:
    """Reads names of columns, which may look like numbers.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.

    Raises:
        InputError: there is none, or one is no name.
    """
    entries = list_of(name, value)
    return tuple(str(entry) if type(entry) is int else text(name, entry) for entry in entries)


def whole(name: str, value: Any, least: int) -> int:
    """Reads a whole number.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.
        least: the smallest allowed.

    Raises:
        InputError: it is none, or out of range.
    """
    number: int = _number(int, "whole number", name, value)
    if not least <= number < 2**32:
        raise InputError(f"{spelled(name)} {number} is out of range: give a whole number from {least} on")
    return number


def real(name: str, value: Any) -> float:
    """Reads a number.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.

    Raises:
        InputError: it is none.
    """
    return float(_number(float, "number", name, value))


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Makes sure that a value is one of a few.

    Args:
        name: of the field, for the error message.
        value: value of the field, from Python, a YAML file or the command line.
        choices: what is allowed.

    Raises:
        InputError: it is none of them.
    """
    if value not in choices:
        raise InputError(f"{spelled(name)} {shown(value)} is unknown: choose from {', '.join(choices)}")


def json_identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as JSON gives them back, so that a fresh configuration compares with a stored one."""
    return json.loads(json.dumps(values))


def _number(convert: Callable[[Any], Any], noun: str, name: str, value: Any) -> Any:
    try:
        number = convert(value)
        if isinstance(value, bool) or (not isinstance(value, str) and number != value):
            raise ValueError
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{spelled(name)} {shown(value)} is not a {noun}") from error
    return number
