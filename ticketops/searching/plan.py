"""The configuration of a search and the list of its trials. Imports no torch."""

import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ticketops.errors import OWN_LOOP, InputError, shown, spelled
from ticketops.files import text_encoding, user_path
from ticketops.kinds import KINDS, SCORED_LOSSES, UNSCORED_LOSSES, Kind
from ticketops.searching.config import (
    DATA,
    PLAN,
    SCORING,
    TRAINING,
    WHAT,
    check_choice,
    list_of,
    option,
    read_columns,
    read_seeds,
    read_sparsities,
    real,
    text,
    whole,
)
from ticketops.searching.recipes import BY_RECIPE, RECIPES
from ticketops.searching.run_config import SCHEDULES, TRACKERS, RunConfig
from ticketops.text import count

TicketKind = Literal["winning", "random", "losing"]
TICKET_KINDS: tuple[str, ...] = get_args(TicketKind)


@dataclass(frozen=True, kw_only=True)
class SearchConfig(RunConfig):
    """Everything a search depends on; each field is a flag of `ticketops search` and a key of its YAML file.

    Values are normalised when the object is made ("0.1,0.3" becomes (0.1, 0.3); 3 seeds become (0, 1, 2)), and what the
    recipe decides is filled in, so that two equal searches are two equal objects.

    Raises:
        InputError: a value is out of range, of the wrong type, or unknown.
    """

    verb = "search"
    decisive = ("task",)

    task: str = option(
        "demo",
        "A GLUE task by name, a data file or folder (jsonl, csv, tsv, parquet, arrow), or 'demo' (movie sentiment).",
        WHAT,
    )
    output: str = option(
        "ticketops-run", "Folder for records, tickets and the report; the same command resumes there.", WHAT
    )
    kinds: tuple[str, ...] = option(
        ("winning", "random"),
        "Of winning, random, losing, comma-separated; 'random@0.3' is that kind at that sparsity only.",
        PLAN,
        additive=True,
    )
    halving: bool = option(
        False,
        "Successive halving: all sparsities train with one seed, the better half with two, a quarter with four. It "
        "needs a split that reports: --report-fraction, or labelled test data.",
        PLAN,
        bool,
        additive=True,
    )
    epochs: int = option(None, "Passes over the training split.", TRAINING, int, shown="recipe")
    gradient_accumulation_steps: int = option(1, "Batches whose gradients add up to one optimizer step.", TRAINING, int)
    early_stopping_patience: int | None = option(
        None,
        "Epochs without a better score on the validation rows after which training stops; the best epoch's weights "
        "are kept. It selects on the validation split.",
        TRAINING,
        int,
        shown="all epochs, the last one's weights",
    )
    class_weights: Literal["balanced"] | tuple[float, ...] | None = option(
        None,
        "Weights of the classes in the loss: 'balanced' (rare ones count more, as in scikit-learn), or a number for "
        "each label, comma-separated; of several labels a text, those of rows that have the label.",
        TRAINING,
        shown="all alike",
    )
    importance: Literal["pass", "on_the_fly", "both"] = option(
        "pass",
        "Scores heads and FFNs in a clean pass after training, on_the_fly in its last epoch, or both (pass ranks).",
        SCORING,
    )
    metric: str | None = option(
        None,
        "Metric that selects the super ticket, such as accuracy, macro_f1, matthews_correlation or spearman; in Python "
        "also a function.",
        DATA,
        shown="the task's first",
    )
    threshold: float | None = option(
        None,
        "Probability from which on a label of a multi-label task is predicted, in (0, 1).",
        DATA,
        float,
        shown="0.5",
    )
    text_columns: tuple[str, ...] | None = option(
        None, "Local data: the text columns, comma-separated.", DATA, shown="found by name"
    )
    label_column: str | None = option(
        None,
        "Local data: the label column; of a multi-label task also one 0/1 column a label, comma-separated.",
        DATA,
        shown="found by name",
    )
    task_kind: Kind | None = option(None, f"Local data: {', '.join(KINDS)}.", DATA, shown="as columns and labels look")
    loss: str | None = option(
        None,
        f"sentence-similarity: loss of sentence-transformers; {', '.join(SCORED_LOSSES)} for pairs with a score, "
        f"{', '.join(UNSCORED_LOSSES)} without.",
        DATA,
        shown="the first that fits",
    )
    encoding: str | None = option(
        None, "Local data: encoding of text files, such as latin-1 or utf-16.", DATA, shown="utf-8"
    )
    max_length: int = option(128, "Longest input in tokens; longer ones are cut.", DATA, int)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("model", "task"):
            put(name, text(name, getattr(self, name)))
        put("output", str(user_path(text("output", self.output), spelled("output"))))
        if self.revision is not None:
            put("revision", text("revision", self.revision))
        put("recipe", self.recipe if self.recipe is not None else ("demo" if self.task == "demo" else "default"))
        check_choice("recipe", self.recipe, tuple(RECIPES))
        recipe = RECIPES[self.recipe]
        # In any of the usual spellings, or a folder of that name.
        name = Path(self.task).name.lower().replace("-", "").replace("_", "")
        epochs = recipe.long_epochs if name in recipe.long_tasks else recipe.epochs
        chosen = {"epochs": epochs, **{field: getattr(recipe, name) for field, name in BY_RECIPE.items()}}
        for name, value in chosen.items():
            if getattr(self, name) is None:
                put(name, value)

        if self.sparsities != "paper":
            put("sparsities", read_sparsities("sparsities", self.sparsities))
        put("kinds", tuple(dict.fromkeys(_kind(entry) for entry in list_of("kinds", self.kinds))))
        put("seeds", read_seeds(self.seeds))
        if self.text_columns is not None:
            put("text_columns", read_columns("text_columns", self.text_columns))
        if self.label_column is not None:
            put("label_column", text("label_column", self.label_column))
        if self.metric is not None:
            put("metric", text("metric", self.metric))
        if self.threshold is not None:
            put("threshold", real("threshold", self.threshold))
            if not 0 < self.threshold < 1:
                raise InputError(f"{spelled('threshold')} {self.threshold:g} is outside (0, 1): give a probability")
        if self.class_weights is not None:
            put("class_weights", _class_weights(self.class_weights))
        if self.task_kind is not None and self.task_kind not in KINDS:
            raise InputError(
                f"{spelled('task_kind')} {shown(self.task_kind)} is unknown: choose from {', '.join(KINDS)}; {OWN_LOOP}"
            )
        if self.loss is not None:
            check_choice("loss", self.loss, SCORED_LOSSES + UNSCORED_LOSSES)
            if self.task_kind != "sentence-similarity":
                raise InputError(
                    f"{spelled('loss')} {self.loss} goes with {spelled('task_kind', 'sentence-similarity')} alone: "
                    "give that too, or leave it out"
                )
        if self.encoding is not None:
            put("encoding", text_encoding(text("encoding", self.encoding)))
        for name in ("epochs", "batch_size", "max_length", "gradient_accumulation_steps"):
            put(name, whole(name, getattr(self, name), 1))
        for name in ("min_heads", "retries"):
            put(name, whole(name, getattr(self, name), 0))
        check_choice("executor", self.executor, ("local", "ray"))
        if self.address is not None:
            put("address", text("address", self.address))
        if self.cpus_per_trial is not None:
            put("cpus_per_trial", whole("cpus_per_trial", self.cpus_per_trial, 1))
        if self.gpus_per_trial is not None:
            put("gpus_per_trial", real("gpus_per_trial", self.gpus_per_trial))
            if not 0 <= self.gpus_per_trial < math.inf:
                raise InputError(
                    f"{spelled('gpus_per_trial')} {self.gpus_per_trial:g} is out of range: give 0.25 for four trials "
                    "on a GPU, or a number of GPUs"
                )
        for name in ("train_rows", "validation_rows"):
            if getattr(self, name) is not None:
                put(name, whole(name, getattr(self, name), 1))
        rate = real("learning_rate", self.learning_rate)
        if not 0 < rate < 1:
            raise InputError(f"{spelled('learning_rate')} {rate:g} is not between 0 and 1: 5e-5 suits most encoders")
        put("learning_rate", rate)
        fraction = real("report_fraction", self.report_fraction)
        if not 0 <= fraction < 1:
            raise InputError(
                f"{spelled('report_fraction')} {fraction:g} is outside [0, 1): give the share, such as 0.5"
            )
        put("report_fraction", fraction)
        for name in ("warmup_steps", "weight_decay", "max_grad_norm"):
            value = real(name, getattr(self, name))
            if not 0 <= value < math.inf:
                raise InputError(f"{spelled(name)} {value:g} is out of range: give a number from 0 on")
            put(name, value)
        if self.warmup_steps >= 1 and self.warmup_steps % 1:
            raise InputError(
                f"{spelled('warmup_steps')} {self.warmup_steps:g} is neither a whole number of steps nor a share of "
                "them below 1"
            )
        check_choice("lr_scheduler_type", self.lr_scheduler_type, SCHEDULES)
        check_choice("dtype", self.dtype, ("fp32", "bf16", "fp16"))
        check_choice("importance", self.importance, ("pass", "on_the_fly", "both"))
        if self.early_stopping_patience is not None:
            put("early_stopping_patience", whole("early_stopping_patience", self.early_stopping_patience, 1))
            if self.importance != "pass":
                raise InputError(
                    f"{spelled('importance')} {self.importance} records the last epoch, and "
                    f"{spelled('early_stopping_patience')} keeps the best one: choose pass, or leave one of them out"
                )
        check_choice("granularity", self.granularity, ("example", "token", "batch"))
        if self.report_to in ((), [], "none"):
            put("report_to", ())
        else:
            put("report_to", tuple(dict.fromkeys(list_of("report_to", self.report_to))))
            for name in self.report_to:
                check_choice("report_to", name, TRACKERS)
        for name in ("save_models", "prune_neurons", "halving", "graphs"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{spelled(name)} {shown(getattr(self, name))} is neither true nor false")
        if self.halving and "winning" not in self.kinds:
            raise InputError(
                f"{spelled('halving', True)} keeps the sparsities whose winning tickets are best, and "
                f"{spelled('kinds')} {','.join(self.kinds)} has none of all sparsities: add winning"
            )
        if self.prune_neurons and self.sparsities == "paper":
            raise InputError(
                "the paper's levels prune whole FFNs: give fractions with "
                f"{spelled('prune_neurons', True)}, such as 0.1,0.3"
            )


@dataclass(frozen=True)
class Trial:
    """One training run of a search: which ticket, which seed.

    Attributes:
        kind: "full" for the whole model, otherwise the ticket's kind.
        sparsity: the level's name, in [0, 1).
        seed: of the task head, the data order, dropout, and a random ticket's draw.
        heads_pruned: heads that its ticket removes.
        ffns_pruned: FFN sublayers that its ticket removes.
        neurons_pruned: single neurons of FFNs that it removes in their place, among them all of some FFN perhaps.
    """

    kind: str
    sparsity: float
    seed: int
    heads_pruned: int
    ffns_pruned: int
    neurons_pruned: int = 0

    @property
    def id(self) -> str:
        """A name that is unique in its search and can be a file's name."""
        level = "" if self.kind == "full" else f"-{self.sparsity:g}"
        return f"{self.kind}{level}-seed-{self.seed}"


def make_plan(config: SearchConfig, layers: int, heads: int, neurons: int | None = None) -> list[Trial]:
    """Lists the trials of a search in the order in which they run: seed by seed, the full model first.

    Args:
        config: the search.
        layers: encoder layers of the model.
        heads: attention heads a layer.
        neurons: of each FFN; needed where these are pruned.

    Raises:
        InputError: a level prunes nothing, more than `min_heads` allows, or is no level of the paper's.
    """
    from ticketops.tickets import PAPER_LEVELS, level_counts

    levels: dict[float, tuple[int, int]] = {}
    if config.sparsities == "paper":
        if (layers, heads) != (12, 12):
            raise InputError(
                f"the paper's levels are for 12 layers x 12 heads, and {config.model} has {layers} x {heads}: "
                f"give fractions, such as {spelled('sparsities', '0.1,0.3,0.5')}"
            )
        levels = dict(PAPER_LEVELS)

    @functools.cache
    def counts(sparsity: float) -> tuple[int, ...]:
        if config.sparsities == "paper" and sparsity not in levels:
            raise InputError(f"sparsity {sparsity:g} is none of the paper's levels {', '.join(map(str, levels))}")
        found = levels.get(sparsity) or level_counts(sparsity, layers, heads, neurons if config.prune_neurons else None)
        most = layers * max(heads - config.min_heads, 0)
        if not any(found):
            raise InputError(
                f"sparsity {sparsity:g} prunes nothing of {count(layers, 'layer')} x {count(heads, 'head')}: "
                f"give at least {math.ceil(1e4 / (layers * heads)) / 1e4:g}"
            )
        if found[0] > most:
            raise InputError(
                f"sparsity {sparsity:g} prunes {count(found[0], 'head')}, and {spelled('min_heads')} "
                f"{config.min_heads} leaves at most {most} of {layers * heads} to prune: lower one of them"
            )
        return (found[0], 0, found[1]) if config.prune_neurons else found

    entries = [entry.partition("@") for entry in config.kinds]
    general = tuple(levels) if config.sparsities == "paper" else config.sparsities
    tickets = []
    for kind in TICKET_KINDS:
        own = {float(level) for name, _, level in entries if name == kind and level}
        shared = set(general) if (kind, "", "") in entries else set()
        # Level 0 is the full model.
        tickets += [(kind, level, counts(level)) for level in sorted(own | shared) if level]
    trials = []
    for seed in config.seeds:
        trials.append(Trial("full", 0.0, seed, 0, 0))
        trials += [Trial(kind, level, seed, *pruned) for kind, level, pruned in tickets]
    return trials


def check_names(trials: Iterable[Any]) -> None:
    """Makes sure that no two trials of a run have one name, under which one's files would replace the other's.

    Args:
        trials: of the run.

    Raises:
        InputError: two do.
    """
    for name, number in Counter(trial.id for trial in trials).items():
        if number > 1:
            raise InputError(
                f"two trials would be called {name}, since sparsities and fractions are named to six digits: leave one "
                "of them out"
            )


def search_plan(config: SearchConfig, identity: Mapping[str, Any]) -> list[Trial]:
    """Lists the trials of a search as `make_plan` does.

    Args:
        config: the search.
        identity: with the model's numbers of layers, heads and neurons.
    """
    return make_plan(config, identity["layers"], identity["heads"], identity.get("neurons"))


def _class_weights(value: Any) -> str | tuple[float, ...]:
    entries = list_of("class_weights", value)
    if list(entries) == ["balanced"]:
        return "balanced"
    try:
        weights = tuple(real("class_weights", entry) for entry in entries)
    except InputError as error:
        raise InputError(f"{error}: give 'balanced', or a number for each label") from error
    if not all(0 < weight < math.inf for weight in weights):
        raise InputError(f"{spelled('class_weights')} {shown(value)} has a weight that is not above 0: give others")
    return weights


def _kind(entry: Any) -> str:
    kind, at, level = str(entry).partition("@")
    check_choice("kinds", kind, TICKET_KINDS)
    if not at:
        return kind
    sparsity = read_sparsities("kinds", level)[0] if level else 0.0
    if not sparsity:
        raise InputError(f"{spelled('kinds')} {entry!r} needs a sparsity in (0, 1) after '@', such as {kind}@0.3")
    return f"{kind}@{sparsity:g}"
