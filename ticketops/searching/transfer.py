"""Domain transfer and low data: the source's super ticket against its full model, on growing shares of the rows."""

import hashlib
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from torch import Tensor

from ticketops.errors import InputError, TrialError, spelled
from ticketops.files import user_path
from ticketops.models import load
from ticketops.searching import environment
from ticketops.searching.engine import Barrier, Call, Job
from ticketops.searching.execution import Execution
from ticketops.searching.objects import Objects
from ticketops.searching.plan import Trial, check_names
from ticketops.searching.run import WAYS, draw, finished_trials, keep_outcome, search_jobs, train, trial_job
from ticketops.searching.selection import Level, Selection, at_sparsity, select
from ticketops.searching.setting import Setting, quiet
from ticketops.searching.store import Record, Store, extended
from ticketops.searching.task_tickets import single_scores
from ticketops.searching.tracking import Run
from ticketops.searching.transfer_plan import SCORES, SOURCE, TransferConfig, TransferTrial, transfer_plan
from ticketops.searching.trial import Listener, Outcome
from ticketops.tasks import tokenize
from ticketops.tasks.sampling import spread
from ticketops.tickets import Ticket

# What tasks without label names answer with.
_WITHOUT_NAMES = {"regression": "a number", "question-answering": "a part of the context"}


@dataclass(frozen=True, eq=False)
class Source:
    """The source task of a transfer and its search.

    Attributes:
        setting: of the source task, as its search has it.
        folder: of the search.
        searched_before: True if the search existed before this run.
        chosen: the sparsity that finished trials' source has been trained at; None where none is finished.
    """

    setting: Setting
    folder: Path
    searched_before: bool
    chosen: float | None = None

    def selection(self) -> tuple[Selection, list[Record]]:
        """The search's levels, the super ticket's among them, and all records.

        Raises:
            InputError: the search lacks a super ticket.
        """
        store = Store.read(self.folder, "search")
        records = store.records()
        # One level for all seeds: what finished trials were trained with stays, whatever a longer search would choose.
        selection = at_sparsity(select(records, store.config.seeds), self.chosen)
        if selection.super_level is None:
            raise InputError(
                f"{self.folder} has no super ticket yet: finish that search, with winning among its {spelled('kinds')}"
            )
        return selection, records

    def level(self) -> Level:
        """The super ticket's level."""
        level = self.selection()[0].super_level
        assert level is not None
        return level

    def check(self, seeds: Iterable[int]) -> None:
        """Makes sure that a search which was there before has what the run starts from.

        Args:
            seeds: of the run.

        Raises:
            InputError: the search lacks a super ticket, a seed or a model.
            StoreError: a model was changed or damaged.
        """
        store, level = Store.read(self.folder, "search"), self.level()
        for seed, kind in itertools.product(seeds, ("full", "winning")):
            trial = self.trial(kind, level, seed)
            if store.record(trial) is None:
                raise InputError(
                    f"{self.folder} has no finished trials of seed {seed}: give {spelled('seeds')} that it has"
                )
            if store.model(trial) is None:
                raise InputError(
                    f"{self.folder} has no model of {trial.id}: repeat that search with "
                    f"{spelled('save_models', True)}, or name the source task itself"
                )

    def trial(self, kind: str, level: Level, seed: int) -> Trial:
        """The search's trial of the full model, or of the super ticket.

        Args:
            kind: "full" or "winning".
            level: the super ticket's.
            seed: of the trial.
        """
        if kind == "full":
            return Trial(kind, 0.0, seed, 0, 0)
        return Trial(kind, level.sparsity, seed, level.heads_pruned, level.ffns_pruned, level.neurons_pruned)

    def digests(self, seeds: Iterable[int]) -> dict[str, str]:
        """What tells the search's results that the run starts from from others: seed -> digest.

        Args:
            seeds: of the run.
        """
        records, level = {record["id"]: record for record in self.selection()[1]}, self.level()
        trials = {seed: [self.trial(kind, level, seed).id for kind in ("full", "winning")] for seed in seeds}
        return {
            str(seed): hashlib.sha256(
                "".join(records[name]["predictions_sha256"] for name in names).encode()
            ).hexdigest()
            for seed, names in trials.items()
        }


@dataclass(frozen=True, eq=False)
class Prepared:
    """A transfer whose inputs are loaded and checked.

    Attributes:
        config: the run, with the source's model, and with what its output folder has beside its own seeds and levels.
        source: where it comes from.
        target: the target task's setting.
        identity: what its results depend on.
        plan: its trials, without those of the source's search.
    """

    config: TransferConfig
    source: Source
    target: Setting
    identity: Record
    plan: list[TransferTrial]


def prepare_transfer(config: TransferConfig, objects: Objects | None = None) -> Prepared:
    """Loads and checks everything that a transfer needs, before anything is trained or written.

    Args:
        config: the run.
        objects: the tasks and metrics that `config` names, where they are objects in Python.

    Raises:
        InputError: model, tasks, labels, fractions and configuration do not fit each other, or cannot be loaded.
    """
    config = extended(config)
    source = load_source(config, objects)
    config = replace(config, model=source.setting.config.model, revision=source.setting.config.revision)
    target = Setting.load(config.search(config.target), at_most=True, objects=objects)
    for setting in (source.setting, target):
        setting.require_head("transfer")
    _check_head(config, source.setting, target)
    for setting in (target, *([source.setting] if config.source_ladder else [])):
        _check_shares(setting, config)
    if source.searched_before:
        source.check(config.seeds)
    identity = {
        **target.identity(),
        "kind": "transfer",
        "config": config.decided(),
        "source": source.setting.config.decided(),
        "source_fingerprint": source.setting.task.fingerprint,
        "source_results": source.digests(config.seeds) if source.searched_before else None,
    }
    # The levels are checked by listing them.
    plan = transfer_plan(config, identity)
    check_names(plan)
    return Prepared(config, source, target, identity, plan)


def run_transfer(
    config: TransferConfig,
    listener: Listener | None = None,
    objects: Objects | None = None,
) -> Path:
    """Runs what is still missing of a transfer in its output folder.

    Args:
        config: the run; fractions, seeds and levels that the folder has beside these stay.
        listener: callbacks on the progress of trials and steps.
        objects: the tasks and metrics that `config` names, where they are objects in Python.

    Returns:
        The output folder, without a report.

    Raises:
        InputError: model, tasks, labels, fractions and configuration do not fit each other, or cannot be loaded.
        StoreError: the output folder cannot be used; finished trials stay.
        TrialError: every trial failed.
    """
    listener, execution = listener or Listener(), Execution.of(config)
    execution.check()
    ready = prepare_transfer(config, objects)
    config, source, target, plan = ready.config, ready.source, ready.target, ready.plan
    notes = {
        **environment.circumstances(),
        "validation": target.task.validation_name,
        "tasks": {"source": source.setting.task.describe(), "target": target.task.describe()},
    }
    store = Store.create(config.output, ready.identity, notes)
    finished = finished_trials(
        store, plan, lambda trial: _ways(trial, source), lambda trial: keeps_model(trial, config)
    )
    searches = [] if source.searched_before else search_jobs(source.setting, "source")

    def choose() -> None:
        selection, records = source.selection()
        scores = single_scores(records, selection)
        scores["train_rows"] = len(source.setting.task.train)
        store.write_facts(SCORES, scores)

    chosen = Barrier("choose the source's super ticket")
    names = {trial: trial.id for trial in plan if _ways(trial, source)}

    def needs(trial: TransferTrial) -> list[str]:
        """The choice; of a ticket on the source's ladder also the full model on the same rows, which scores them."""
        own = (trial.ladder, trial.fraction, trial.seed)
        scored = [
            name
            for full, name in names.items()
            if (full.ladder, full.fraction, full.seed) == own and trial.kind == "winning"
        ]
        return [chosen.id, *scored]

    def call(trial: TransferTrial, ticket: Ticket | None) -> Call:
        return _call(trial, config, source, target, ticket)

    def keep(trial: TransferTrial, outcome: Outcome) -> Record:
        ticket = store.ticket(trial)
        if trial.ladder == "target" and trial.kind == "winning":
            ticket = Store.read(source.folder, "search").ticket(source.trial(trial.kind, source.level(), trial.seed))
        setting = target if trial.ladder == "target" else source.setting
        record = keep_outcome(store, trial, setting, outcome, ticket, _of_share(trial))
        return {**record, "id": trial.id, "ladder": trial.ladder, "fraction": trial.fraction}

    trials = [
        trial_job(
            store,
            trial,
            trial,
            lambda trial: _drawn(store, trial, source),
            call,
            keep,
            finished=trial in finished,
            needs=needs(trial),
            ways=_ways(trial, source),
            keeps_model=keeps_model(trial, config),
        )
        for trial in plan
    ]
    step = Job(chosen, store, chosen, choose, needs=[job.trial.id for job in searches])
    execution.run([*searches, step, *trials], listener)
    return store.folder


def load_source(config: TransferConfig, objects: Objects | None = None) -> Source:
    """Loads and checks the source task, and its search where there is one already.

    Args:
        config: the run.
        objects: the tasks and metrics that `config` names, where they are objects in Python.

    Raises:
        InputError: it cannot be loaded, or the search in the folder was made with other rows or another model.
    """
    folder, output, chosen = user_path(config.source, spelled("source")), Path(config.output), None
    if (output / "config.json").is_file() and (own := Store.read(output)).kind == "transfer":
        finished = any((output / "trials").glob("target-*.json"))
        chosen = (own.facts(SCORES) or {}).get("sparsity") if finished else None
    if not (folder / "config.json").is_file():
        search = config.search(config.source, output=str(Path(config.output) / SOURCE), save_models=True)
        setting = Setting.load(search, at_most=True, objects=objects)
        return Source(setting, Path(search.output), False, chosen)
    store = Store.read(folder, "search")
    if config.model not in (None, store.config.model):
        raise InputError(
            f"{folder} searched {store.config.model}, not {config.model}: leave {spelled('model')} out, or name the "
            "source "
            "task itself"
        )
    if config.source_options:
        names = ", ".join(config.source_options)
        raise InputError(f"{names} of the source: the search in {folder} says that already; give it for target= alone")
    if config.revision not in (None, store.config.revision):
        raise InputError(
            f"{folder} searched revision {store.config.revision or 'main'}, not {config.revision}: leave "
            f"{spelled('revision')} "
            "out, or name the source task itself"
        )
    setting = Setting.load(store.config, objects=objects)
    identity, stored = setting.identity(), store.description["identity"]
    for what, name in (("rows of its task", "task_fingerprint"), ("pre-trained weights", "model_fingerprint")):
        if identity[name] != stored[name]:
            raise InputError(f"the {what} have changed since the search in {folder}: search again into a new folder")
    return Source(setting, folder, True, chosen)


def subset(setting: Setting, fraction: float, seed: int, min_steps: int = 0) -> Setting:
    """A setting with a share of its training rows.

    Args:
        setting: setting with all training rows.
        fraction: share of the rows, in (0, 1]; rounded down to whole rows.
        seed: seed of the choice, stratified by label; a larger share contains a smaller one.
        min_steps: minimum number of optimizer steps, reached by more epochs.

    Raises:
        InputError: no row is left, or rows of one label only.
    """
    name, rows = setting.task.name, len(setting.task.train)
    # 0.29 * 100 is 28.999999999999996, and 29 is meant.
    count = math.floor(round(fraction * rows, 6))
    if not count:
        raise InputError(
            f"{100 * fraction:g} % of the {rows:,} training rows of task {name} leave no row: give "
            f"{spelled('fractions')} from "
            f"{min(1.0, math.ceil(2e5 / rows) / 1e5):g} on, or more rows"
        )
    chosen = np.sort(spread(setting.task.train, seed)[:count])
    if setting.task.kind == "classification" and len({*np.asarray(setting.task.train["label"][:])[chosen]}) < 2:
        raise InputError(
            f"{100 * fraction:g} % of the {rows:,} training rows of task {name} leave {count} of one label: give "
            f"larger {spelled('fractions')}"
        )
    config = setting.config
    steps = math.ceil(math.ceil(count / config.batch_size) / config.gradient_accumulation_steps)
    epochs = max(config.epochs, math.ceil(min_steps / steps))
    whole = setting.splits["train"]
    # Where long rows are several inputs, these have no numbers to choose by.
    part = (
        whole.select(chosen)
        if len(whole) == rows
        else tokenize(setting.task.train.select(chosen), setting.task, setting.tokenizer, config.max_length)
    )
    task = replace(setting.task, train=setting.task.train.select(chosen))
    return replace(setting, task=task, splits={**setting.splits, "train": part}, config=replace(config, epochs=epochs))


def _check_shares(setting: Setting, config: TransferConfig) -> None:
    """Whether every share of a task's rows can be trained on, and in a new run is another one than the next."""
    for seed in config.seeds:
        sizes = [len(subset(setting, fraction, seed).task.train) for fraction in config.fractions]
    # Earlier versions began such runs, and these go on.
    begun = (Path(config.output) / "config.json").is_file()
    for (one, size), (other, larger) in itertools.pairwise(zip(config.fractions, sizes, strict=True)):
        if size == larger and not begun:
            raise InputError(
                f"fractions {one:g} and {other:g} are both {size:,} of the {len(setting.task.train):,} training rows "
                f"of task {setting.task.name}: leave one of them out"
            )


def _check_head(config: TransferConfig, source: Setting, target: Setting) -> None:
    """Whether the target can go on with the source's task head."""
    one, other = source.task, target.task
    if config.head == "keep" and (one.kind, one.labels) != (other.kind, other.labels):
        described = [", ".join(task.labels) or _WITHOUT_NAMES.get(task.kind, task.kind) for task in (one, other)]
        raise InputError(
            f"the labels of source {one.name} ({described[0]}) are not those of target {other.name} ({described[1]}), "
            f"so its task head cannot be kept: start the target with a new one, {spelled('head', 'fresh')}, or give "
            "both the same ones"
        )


def _ways(trial: TransferTrial, source: Source) -> tuple[str, ...]:
    """Name of the importance file of a source trial of the full model; empty for other trials, which are not scored."""
    scored = trial.ladder == "source" and trial.kind == "full"
    return (_way(trial, source),) if scored else ()


def keeps_model(trial: TransferTrial, config: TransferConfig) -> bool:
    """True if a trial's model is kept: only the target's, since the source's search keeps its own."""
    return config.save_models and trial.ladder == "target"


def _way(trial: TransferTrial, source: Source) -> str:
    return WAYS[source.setting.config.importance][0] + _of_share(trial)


def _of_share(trial: TransferTrial) -> str:
    return f"-of-{trial.fraction:g}"


def _drawn(store: Store, trial: TransferTrial, source: Source) -> Ticket | None:
    """The ticket that a trial finds in its share; the target's is the source's."""
    if trial.ladder != "source" or trial.kind != "winning":
        return None
    importance = store.importance(trial.seed, _way(trial, source))
    if importance is None:
        raise TrialError("its ticket is drawn from the scores of its share's full model, which failed")
    return draw(importance, trial.search_trial, source.setting.config)


def _call(trial: TransferTrial, config: TransferConfig, source: Source, target: Setting, ticket: Ticket | None) -> Call:
    """The training of one trial."""
    origin, setting, weights = trial.search_trial, source.setting, None
    if trial.ladder == "target":
        origin = source.trial(trial.kind, source.level(), trial.seed)
        weights, ticket = _adapted(source, origin, config.head)
    ways = WAYS[setting.config.importance][:1] if _ways(trial, source) else ()
    inputs = target if trial.ladder == "target" else setting
    share, tracked = (trial.fraction, config.min_steps), Run.of(config, trial.id)
    return Call(_train, inputs, (origin, ticket, ways, keeps_model(trial, config), tracked, share, weights))


def _train(
    setting: Setting,
    trial: Trial,
    ticket: Ticket | None,
    ways: Sequence[str],
    with_model: bool,
    tracked: Run | None,
    share: tuple[float, int],
    weights: tuple[dict[str, Tensor], dict[str, Tensor]] | None,
    listener: Listener | None = None,
) -> Outcome:
    """Trains on a share of the rows.

    Args:
        setting: of the task, with all rows.
        trial, ticket, ways, with_model, tracked, listener: as in `train`.
        share: share of the rows, and the smallest number of steps.
        weights: those of the encoder and of the head to start from; None for the pre-trained ones.
    """
    if weights is not None:
        setting = replace(setting, pretrained=weights[0], head=weights[1])
    part = subset(setting, share[0], trial.seed, share[1])
    outcome = train(part, trial, ticket, ways, with_model, tracked, listener)
    rows = {"train_rows": len(part.task.train), "epochs": part.config.epochs}
    return replace(outcome, record={**outcome.record, **rows})


def _adapted(
    source: Source, origin: Trial, head: str
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], Ticket | None]:
    """Encoder's and head's weights of a trial's fine-tuned model, and the ticket that they were trained with."""
    store = Store.read(source.folder, "search")
    if (folder := store.model(origin)) is None:
        raise TrialError(f"it starts from {origin.id} of the source, which failed")
    with quiet():
        model = load(folder)
    inside = f"{model.base_model_prefix}."
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(inside)}
    ticket = None if origin.kind == "full" else store.ticket(origin)
    return (model.base_model.state_dict(), weights if head == "keep" else {}), ticket
