"""What runs of several tasks have in common: options of single tasks, and the search of each task. Imports no torch."""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ticketops.searching.config import inherited
from ticketops.searching.objects import bare
from ticketops.searching.plan import SearchConfig
from ticketops.searching.run_config import RunConfig
from ticketops.searching.task_options import TASK_OPTIONS, options_of, read_options


def _per_task(name: str) -> Any:
    """A field like that of a search, whose value may differ from task to task."""
    help = SearchConfig.__dataclass_fields__[name].metadata["help"]
    return inherited(SearchConfig, name, help=f"{help} TASK=VALUE for one task, VALUE for all.", flag_type=str)


def task_names(spec: str) -> tuple[str, ...]:
    """Names that stand for a task in options of single tasks.

    Args:
        spec: the task as the user names it: a name or a path.

    Returns:
        The whole of it, and the name of its file or folder with and without the ending.
    """
    path = Path(bare(spec))
    return tuple(dict.fromkeys(filter(None, (spec, path.name, path.stem, Path(path.stem).stem))))


@dataclass(frozen=True, kw_only=True)
class TasksConfig(RunConfig, abc.ABC):
    """The fields of every run of several tasks, each of which is searched by itself, too.

    Raises:
        InputError: a value is out of range, of the wrong type, or unknown.
    """

    recipe: str = inherited(RunConfig, "recipe", shown="default")
    epochs: int | None = inherited(SearchConfig, "epochs", shown="recipe, for each task its own")
    class_weights: str | tuple[str, ...] | None = _per_task("class_weights")
    metric: str | tuple[str, ...] | None = _per_task("metric")
    threshold: float | tuple[str, ...] | None = _per_task("threshold")
    text_columns: tuple[str, ...] | None = _per_task("text_columns")
    label_column: tuple[str, ...] | None = _per_task("label_column")
    task_kind: tuple[str, ...] | None = _per_task("task_kind")
    encoding: tuple[str, ...] | None = _per_task("encoding")
    max_length: int | tuple[str, ...] = _per_task("max_length")
    validation_rows: int | None = inherited(RunConfig, "validation_rows", help="Validation rows of each task at most.")

    @abc.abstractmethod
    def names_of(self, task: str | None = None) -> list[str]:
        """Names of a task, or of all, in options of single tasks.

        Args:
            task: as `search` takes it; None for all tasks.
        """

    def search(self, task: str, **changes: Any) -> SearchConfig:
        """The search of one of the tasks alone, with this run's values.

        Args:
            task: the task, as the run names it.
            changes: of the search's fields.
        """
        common = {name: getattr(self, name) for name in self._common()}
        common |= options_of(self, self.names_of(task), self.names_of())
        given = {name: value for name, value in common.items() if value is not None}
        return SearchConfig(**{**given, "task": task, "kinds": ("winning",), **changes})

    def read_common(self, tasks: Sequence[str]) -> None:
        """Reads the options of single tasks, and takes the values and defaults that the tasks' searches make of others.

        Where the recipe trains these tasks for different numbers of epochs, `epochs` stays None, so that each task has
        its own number, as its search alone would.

        Args:
            tasks: as `search` takes them.
        """
        read_options(self, self.names_of())
        object.__setattr__(self, "recipe", self.recipe or "default")
        searches = [self.search(task) for task in tasks]
        epochs = {search.epochs for search in searches}
        for name in self._common():
            value = getattr(searches[0], name) if name != "epochs" or len(epochs) == 1 else None
            object.__setattr__(self, name, value)

    @classmethod
    def _common(cls) -> list[str]:
        """Names of the fields that a search has, too, with one value for all tasks."""
        own = SearchConfig.__dataclass_fields__
        return [field.name for field in cls.fields() if field.name in own and field.name not in TASK_OPTIONS]
