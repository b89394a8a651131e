"""What ticket sharing does, before anything is loaded: its configuration and the list of its trials. No torch."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from ticketops.errors import InputError
from ticketops.searching.config import PLAN, TRAINING, WHAT, check_choice, inherited, list_of, option, text
from ticketops.searching.plan import SearchConfig
from ticketops.searching.recipes import RECIPES
from ticketops.searching.tasks_config import TasksConfig, task_names

Mixing = Literal["proportional", "annealed", "uniform"]
MIXINGS: tuple[str, ...] = get_args(Mixing)
Arm = Literal["tickets", "plain", "random", "union", "intersection"]
ARMS: tuple[str, ...] = get_args(Arm)

#: The folder of a share's single-task searches, inside its own, and the file of what these scored.
SEARCHES, SINGLE = "single", "single.json"


@dataclass(frozen=True, kw_only=True)
class ShareConfig(TasksConfig):
    """Everything that sharing tickets among tasks depends on; each field is a flag of `ticketops share`.

    Values are normalised when the object is made, as those of `SearchConfig` are.

    Raises:
        InputError: a value is out of range, of the wrong type, or unknown.
    """

    verb = "share"
    decisive = ("tasks",)

    tasks: tuple[str, ...] = option(
        None,
        "Two tasks or more, comma-separated: GLUE names, data files or folders.",
        WHAT,
        shown="none",
        additive=True,
    )
    output: str = inherited(SearchConfig, "output", default="ticketops-share", shown="ticketops-share")
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
    epochs: int | None = inherited(
        TasksConfig, "epochs", help="Passes over all training rows, of sharing and of single-task searches."
    )
    batch_size: int = inherited(TasksConfig, "batch_size", help="Examples a step, all of one task.")
    save_models: bool = inherited(
        TasksConfig,
        "save_models",
        help="Keep each trial's shared model in models/ (the size of the checkpoint each); a finished trial "
        "without its model trains again.",
    )
    train_rows: int | None = inherited(TasksConfig, "train_rows", help="Training rows of each task at most.")

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        tasks = tuple(text("tasks", task) for task in list_of("tasks", self.tasks or ()))
        if len(tasks) < 2:
            raise InputError(f"sharing takes two tasks or more, not {tasks[0]!r} alone: use ticketops search for one")
        put("tasks", tasks)
        self.read_common(tasks)
        if self.tickets is not None:
            put("tickets", tuple(text("tickets", entry) for entry in list_of("tickets", self.tickets)))
        put("arms", tuple(dict.fromkeys(str(arm) for arm in list_of("arms", self.arms))))
        for arm in self.arms:
            check_choice("arms", arm, ARMS)
        check_choice("mixing", self.mixing, MIXINGS)

    def names_of(self, task: str | None = None) -> list[str]:
        """Names of a task, or of all, in options of single tasks."""
        return [name for spec in self.tasks if task in (None, spec) for name in task_names(spec)]

    @property
    def joint_epochs(self) -> int:
        """Passes over all tasks' rows of a multi-task training: `epochs`, else the recipe's."""
        return self.epochs or RECIPES[self.recipe].epochs


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
