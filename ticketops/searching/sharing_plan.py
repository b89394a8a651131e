"""What ticket sharing does, before anything is loaded: its configuration and the list of its trials. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ticketops.errors import InputError
from ticketops.searching.config import NO_RESULT, PLAN, TRAINING, WHAT, Config, check_choice, list_of, option, text
from ticketops.searching.objects import bare
from ticketops.searching.plan import RECIPES, SearchConfig
from ticketops.searching.task_options import options_of, read_options

Mixing = Literal["proportional", "annealed", "uniform"]
MIXINGS: tuple[str, ...] = get_args(Mixing)
Arm = Literal["tickets", "plain", "random", "union", "intersection"]
ARMS: tuple[str, ...] = get_args(Arm)

#: What a single-task search has in common with runs of several tasks, where they have the field.
COMMON = (
    *NO_RESULT,
    "model",
    "revision",
    "sparsities",
    "prune_neurons",
    "seeds",
    "min_heads",
    "recipe",
    "epochs",
    "batch_size",
    "learning_rate",
    "warmup_steps",
    "lr_scheduler_type",
    "weight_decay",
    "max_grad_norm",
    "gradient_accumulation_steps",
    "early_stopping_patience",
    "dtype",
    "granularity",
    "train_rows",
    "validation_rows",
    "report_fraction",
)


#: The folder of a share's single-task searches, inside its own, and the file of what these scored.
SEARCHES, SINGLE = "single", "single.json"


def inherited_from_search(name: str, **changes: Any) -> Any:
    """Makes a field like the one of the same name in `SearchConfig`.

    Args:
        name: name of the field.
        changes: arguments of `option` that differ.
    """
    field = SearchConfig.__dataclass_fields__[name]
    return option(**{"default": field.default, **field.metadata, **changes})


def per_task(name: str) -> Any:
    """A configuration's field whose value may differ from task to task.

    Args:
        name: field of a search's configuration.
    """
    help = SearchConfig.__dataclass_fields__[name].metadata["help"]
    return inherited_from_search(name, help=f"{help} TASK=VALUE for one task, VALUE for all.", flag_type=str)


def task_names(spec: str) -> tuple[str, ...]:
    """Names that stand for a task in options of single tasks.

    Args:
        spec: the task as the user names it: a name or a path.

    Returns:
        The whole of it, and the name of its file or folder with and without the ending.
    """
    path = Path(bare(spec))
    return tuple(dict.fromkeys(filter(None, (spec, path.name, path.stem, Path(path.stem).stem))))


def common_fields(config: Any) -> dict[str, Any]:
    """Values of a run of several tasks that the searches of its tasks have, too.

    Args:
        config: the run.
    """
    return {name: getattr(config, name) for name in COMMON if hasattr(config, name)}


def put_common(config: Any, tasks: Sequence[str]) -> None:
    """Copies the normalized values and defaults of the tasks' searches into a run of several tasks.

    Where the recipe trains these tasks for different numbers of epochs, the run's `epochs` stays None, so that each
    task has its own number, as its search alone would.

    Args:
        config: the run, changed in place.
        tasks: as its `search` takes them.
    """
    object.__setattr__(config, "recipe", config.recipe or "default")
    searches = [config.search(task) for task in tasks]
    epochs = {search.epochs for search in searches}
    for name in common_fields(config):
        value = getattr(searches[0], name) if name != "epochs" or len(epochs) == 1 else None
        object.__setattr__(config, name, value)


@dataclass(frozen=True, kw_only=True)
class ShareConfig(Config):
    """Everything that sharing tickets among tasks depends on; each field is a flag of `ticketops share`.

    Values are normalised when the object is made, as those of `SearchConfig` are.

    Raises:
        InputError: a value is out of range, of the wrong type, or unknown.
    """

    verb = "share"
    decisive = ("tasks",)

    model: str = inherited_from_search("model")
    revision: str | None = inherited_from_search("revision")
    tasks: tuple[str, ...] = option(
        None,
        "Two tasks or more, comma-separated: GLUE names, data files or folders.",
        WHAT,
        shown="none",
        additive=True,
    )
    output: str = inherited_from_search("output", default="ticketops-share", shown="ticketops-share")
    tickets: tuple[str, ...] | None = option(
        None,
        "Where the tasks' tickets are, comma-separated: output folders of searches of single tasks or of an earlier "
        "share; 'TASK=FOLDER' or 'TASK=FILE.safetensors' where the name does not say whose it is.",
        WHAT,
        shown="found on the way, by a search of each task",
    )
    arms: tuple[str, ...] = option(
        ("tickets", "plain", "random"),
        "What is compared: tickets (each task its own), plain (no tickets), random (same counts), union and "
        "intersection (of all tasks' tickets, for every task).",
        PLAN,
        additive=True,
    )
    mixing: Literal["proportional", "annealed", "uniform"] = option(
        "proportional", "How tasks share the steps: proportional to their size, annealed or uniform.", TRAINING
    )
    sparsities: tuple[float, ...] | Literal["paper"] = inherited_from_search("sparsities")
    prune_neurons: bool = inherited_from_search("prune_neurons")
    seeds: tuple[int, ...] = inherited_from_search("seeds")
    min_heads: int = inherited_from_search("min_heads")
    recipe: str = inherited_from_search("recipe", shown="default")
    epochs: int | None = inherited_from_search(
        "epochs",
        help="Passes over all training rows, of sharing and of single-task searches.",
        shown="recipe, for each task its own",
    )
    batch_size: int = inherited_from_search("batch_size", help="Examples a step, all of one task.")
    learning_rate: float = inherited_from_search("learning_rate")
    warmup_steps: float = inherited_from_search("warmup_steps")
    lr_scheduler_type: str = inherited_from_search("lr_scheduler_type")
    weight_decay: float = inherited_from_search("weight_decay")
    max_grad_norm: float = inherited_from_search("max_grad_norm")
    class_weights: str | tuple[str, ...] | None = per_task("class_weights")
    dtype: Literal["fp32", "bf16", "fp16"] = inherited_from_search("dtype")
    save_models: bool = inherited_from_search(
        "save_models",
        help="Keep each trial's shared model in models/ (the size of the checkpoint each); a finished trial "
        "without its model trains again.",
    )
    executor: Literal["local", "ray"] = inherited_from_search("executor")
    address: str | None = inherited_from_search("address")
    cpus_per_trial: int | None = inherited_from_search("cpus_per_trial")
    gpus_per_trial: float | None = inherited_from_search("gpus_per_trial")
    retries: int = inherited_from_search("retries")
    report_to: tuple[str, ...] = inherited_from_search("report_to")
    granularity: Literal["example", "token", "batch"] = inherited_from_search("granularity")
    metric: str | tuple[str, ...] | None = per_task("metric")
    threshold: float | tuple[str, ...] | None = per_task("threshold")
    text_columns: tuple[str, ...] | None = per_task("text_columns")
    label_column: tuple[str, ...] | None = per_task("label_column")
    task_kind: tuple[str, ...] | None = per_task("task_kind")
    encoding: tuple[str, ...] | None = per_task("encoding")
    max_length: int | tuple[str, ...] = per_task("max_length")
    train_rows: int | None = inherited_from_search("train_rows", help="Training rows of each task at most.")
    validation_rows: int | None = inherited_from_search("validation_rows", help="Validation rows of each task at most.")
    report_fraction: float = inherited_from_search("report_fraction")

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        tasks = tuple(text("tasks", task) for task in list_of("tasks", self.tasks or ()))
        if len(tasks) < 2:
            raise InputError(f"sharing takes two tasks or more, not {tasks[0]!r} alone: use ticketops search for one")
        put("tasks", tasks)
        read_options(self, self._names())
        put_common(self, tasks)
        if self.tickets is not None:
            put("tickets", tuple(text("tickets", entry) for entry in list_of("tickets", self.tickets)))
        put("arms", tuple(dict.fromkeys(str(arm) for arm in list_of("arms", self.arms))))
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        check_choice("mixing", self.mixing, MIXINGS)

    def _names(self) -> list[str]:
        return [name for task in self.tasks for name in task_names(task)]

    @property
    def joint_epochs(self) -> int:
        """Passes over all tasks' rows of a multi-task training: `epochs`, else the recipe's."""
        return self.epochs or RECIPES[self.recipe].epochs

    def search(self, task: str, **changes: Any) -> SearchConfig:
        """The search of one of the tasks alone, for its tickets.

        Args:
            task: as `tasks` has it.
            changes: of the search's fields.
        """
        common = {**common_fields(self), **options_of(self, task_names(task), self._names())}
        return SearchConfig(**{**common, "task": task, "kinds": ("winning",), **changes})


@dataclass(frozen=True)
class ShareTrial:
    """One multi-task training: which tickets, which seed.

    Attributes:
        kind: the arm.
        seed: of the task heads, the order of steps and rows, dropout, and random tickets.
        tasks: how many tasks it trains, where the run began with fewer; else None.
    """

    kind: Arm
    seed: int
    tasks: int | None = None

    @property
    def id(self) -> str:
        """A name that is unique in its run and can be a file's name."""
        tasks = "" if self.tasks is None else f"-{self.tasks}-tasks"
        return f"{self.kind}{tasks}-seed-{self.seed}"


@dataclass(frozen=True)
class TaskTicket:
    """Names a task's ticket among a share's files."""

    task: str
    seed: int

    @property
    def id(self) -> str:
        """The file's name."""
        return f"{self.task}-seed-{self.seed}"


def share_plan(config: ShareConfig, first_tasks: int | None = None) -> list[ShareTrial]:
    """Lists the multi-task trials in the order in which they run: seed by seed, the arms in the order of `ARMS`.

    Args:
        config: the run.
        first_tasks: with how many tasks it began; None for all of them. Trials of fewer tasks stay beside those of all.
    """
    arms = [arm for arm in ARMS if arm in config.arms]
    tasks = len(config.tasks) if first_tasks not in (None, len(config.tasks)) else None
    return [ShareTrial(arm, seed, tasks) for seed in config.seeds for arm in arms]  # type: ignore[arg-type]
