"""What domain transfer does, before anything is loaded: its configuration and the list of its trials. No torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ticketops.errors import InputError, shown, spelled
from ticketops.searching.config import (
    DATA,
    PLAN,
    TRAINING,
    WHAT,
    check_choice,
    inherited,
    list_of,
    option,
    real,
    text,
    whole,
)
from ticketops.searching.plan import SearchConfig, Trial, search_plan
from ticketops.searching.task_options import TASK_OPTIONS, option_of
from ticketops.searching.tasks_config import TasksConfig, task_names

#: The folder of the source's search, inside a transfer's own, and the file of what it scored.
SOURCE, SCORES = "source", "source.json"

Ladder = Literal["target", "source"]


@dataclass(frozen=True, kw_only=True)
class TransferConfig(TasksConfig):
    """Everything that a transfer depends on; each field is a flag of `ticketops transfer`.

    Values are normalised when the object is made, as those of `SearchConfig` are.

    Raises:
        InputError: a value is out of range, of the wrong type, or unknown.
    """

    verb = "transfer"
    decisive = ("source", "target")

    model: str | None = inherited(  # type: ignore[assignment]
        TasksConfig, "model", default=None, shown="that of the source's search, else demo"
    )
    source: str = option(
        None, "The task to come from, or the output folder of its search, made with --save-models.", WHAT, shown="none"
    )
    target: str = option(None, "The task to adapt to, as --task of a search.", WHAT, shown="none")
    output: str = inherited(SearchConfig, "output", default="ticketops-transfer", shown="ticketops-transfer")
    fractions: tuple[float, ...] = option(
        (0.001, 0.01, 0.1, 1.0),
        "Shares of the training rows, in (0, 1], comma-separated; a larger one contains a smaller one.",
        DATA,
        additive=True,
    )
    head: Literal["keep", "fresh"] = option(
        "keep", "The task head: keep the source's, which needs the same labels, or fresh for a new one.", WHAT
    )
    source_ladder: bool = option(
        True, "Train the source task itself on the same shares of its rows, with tickets found in them.", PLAN, bool
    )
    min_steps: int = option(
        0, "Optimizer steps that a trial on few rows takes at least, by more epochs.", TRAINING, int
    )
    gradient_accumulation_steps: int = inherited(SearchConfig, "gradient_accumulation_steps")
    early_stopping_patience: int | None = inherited(SearchConfig, "early_stopping_patience")
    save_models: bool = inherited(
        TasksConfig,
        "save_models",
        help="Keep each target trial's model (the checkpoint's size each); a finished trial without its "
        "model trains again.",
    )
    train_rows: int | None = inherited(
        TasksConfig, "train_rows", help="Training rows of source and target at most; the fractions are of these."
    )

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("source", "target"):
            put(name, text(name, getattr(self, name)))
        model = self.model
        self.read_common((self.source, self.target))
        # Left out, it is that of the source's search.
        put("model", None if model is None else self.model)
        fractions = set()
        for entry in list_of("fractions", self.fractions):
            fraction = real("fractions", entry)
            if not 0 < fraction <= 1:
                raise InputError(
                    f"{spelled('fractions')} {fraction:g} is outside (0, 1]: give shares of the rows, such as 0.01"
                )
            fractions.add(fraction)
        put("fractions", tuple(sorted(fractions)))
        check_choice("head", self.head, ("keep", "fresh"))
        put("min_steps", whole("min_steps", self.min_steps, 0))
        if not isinstance(self.source_ladder, bool):
            raise InputError(f"{spelled('source_ladder')} {shown(self.source_ladder)} is neither true nor false")

    @property
    def source_options(self) -> list[str]:
        """Names of the options that are given for the source alone, rather than for both tasks."""
        entries = {name: getattr(self, name) for name in TASK_OPTIONS}
        own, names = self.names_of(self.source), self.names_of()
        return [
            name
            for name, entry in entries.items()
            if option_of(name, entry, own, names) != option_of(name, entry, (), names)
        ]

    def names_of(self, task: str | None = None) -> list[str]:
        """Names of a task, or of both, in options of single tasks."""
        roles = {"source": self.source, "target": self.target}
        return [name for role, spec in roles.items() if task in (None, spec) for name in (role, *task_names(spec))]


@dataclass(frozen=True)
class TransferTrial:
    """One training on a share of a task's rows.

    Attributes:
        ladder: "target": from the source's fine-tuned weights; "source": from the pre-trained weights.
        fraction: of the training rows.
        kind: "full" or "winning".
        sparsity: of a ticket found in the share; 0 for the full model, and for the source's super ticket.
        seed: draws the rows, their order, dropout and a fresh head.
        heads_pruned: heads removed; 0 where that depends on the source's super ticket.
        ffns_pruned: likewise FFNs.
        neurons_pruned: likewise single neurons.
    """

    ladder: Ladder
    fraction: float
    kind: str
    sparsity: float
    seed: int
    heads_pruned: int = 0
    ffns_pruned: int = 0
    neurons_pruned: int = 0

    @property
    def search_trial(self) -> Trial:
        """The equivalent trial of a search, on all rows."""
        counts = (self.heads_pruned, self.ffns_pruned, self.neurons_pruned)
        return Trial(self.kind, self.sparsity, self.seed, *counts)

    @property
    def id(self) -> str:
        """A name that is unique in its run and can be a file's name."""
        level = f"-{self.sparsity:g}" if self.sparsity else ""
        return f"{self.ladder}-{self.fraction:g}-{self.kind}{level}-seed-{self.seed}"


def transfer_plan(config: TransferConfig, identity: Mapping[str, Any]) -> list[TransferTrial]:
    """Lists the trials after the source's search, in the order in which they run: by seed, then by growing share.

    Args:
        config: the run.
        identity: with "source", the source search's configuration, and the model's layers and heads.
    """
    search = SearchConfig.from_dict(identity["source"])
    trials = []
    for seed in config.seeds:
        levels = search_plan(search, identity)
        for fraction in config.fractions:
            trials += [TransferTrial("target", fraction, kind, 0.0, seed) for kind in ("full", "winning")]
            # All rows are what the source's search itself has trained on.
            if config.source_ladder and fraction < 1:
                trials += [ladder_trial(trial, fraction) for trial in levels if trial.seed == seed and is_scored(trial)]
    return trials


def ladder_trial(trial: Trial, fraction: float) -> TransferTrial:
    """A trial of the source's search, on a share of the rows.

    Args:
        trial: of the search.
        fraction: of the rows.
    """
    counts = (trial.heads_pruned, trial.ffns_pruned, trial.neurons_pruned)
    return TransferTrial("source", fraction, trial.kind, trial.sparsity, trial.seed, *counts)


def is_scored(trial: Trial) -> bool:
    """True if a trial of the source's search belongs on the source's ladder.

    Args:
        trial: of the search.
    """
    return trial.kind in ("full", "winning")
