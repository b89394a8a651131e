"""The search: the jobs of its trials, and what each leaves in the store."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from ticketops.errors import TrialError
from ticketops.files import new_folder, write_manifest
from ticketops.models import latencies, patch, shrink
from ticketops.models.checkpoint import NOTE
from ticketops.models.containers import save
from ticketops.searching import environment
from ticketops.searching.engine import Call, Job
from ticketops.searching.execution import Execution
from ticketops.searching.halving import dropped, judges
from ticketops.searching.objects import Objects
from ticketops.searching.plan import SearchConfig, Trial
from ticketops.searching.selection import select
from ticketops.searching.setting import Setting, quiet
from ticketops.searching.store import Named, Record, Store, extended
from ticketops.searching.tracking import Run
from ticketops.searching.trial import Listener, Outcome, run_trial
from ticketops.tickets import Importance, Ticket, prune

AnyTrial = TypeVar("AnyTrial", bound=Named)

WAYS: Mapping[str, tuple[str, ...]] = {
    "pass": ("pass",),
    "on_the_fly": ("on_the_fly",),
    "both": ("pass", "on_the_fly"),
}


def run_search(
    config: SearchConfig,
    listener: Listener | None = None,
    objects: Objects | None = None,
) -> Path:
    """Runs what is still missing of a search in its output folder.

    Args:
        config: the search; seeds, sparsities and kinds that the folder has beside these stay.
        listener: callbacks on the progress of trials and steps.
        objects: the task and the metric that `config` names, where they are objects in Python.

    Returns:
        The output folder, without a report.

    Raises:
        InputError: model, task and configuration do not fit each other, or cannot be loaded.
        StoreError: the output folder cannot be used; finished trials stay.
        TrialError: every trial failed.
    """
    listener, execution = listener or Listener(), Execution.of(config)
    execution.check()
    setting = Setting.load(extended(config), objects=objects)
    jobs = search_jobs(setting)
    store = jobs[0].store
    execution.run(jobs, listener)
    level = select(store.records(), setting.config.seeds).super_level
    # Where other processes train on this machine, times would be theirs, too.
    if level is not None and store.latencies() is None and not store.running():
        store.write_latencies(_time(setting, store.tickets(level.kind, level.sparsity)[level.best_seed]))
    return store.folder


def search_jobs(setting: Setting, name: str = "") -> list[Job]:
    """Lists the jobs of a search, and begins or extends the run in its output folder.

    Args:
        setting: model, task and configuration.
        name: what a larger run calls the search, e.g. "sst2"; empty for a search by itself.

    Raises:
        StoreError: the output folder cannot be used, or a file of a finished trial is damaged.
    """
    config, plan = setting.config, setting.plan()
    notes = {
        **environment.circumstances(),
        "validation": setting.task.validation_name,
        "report": setting.task.report_name,
    }
    store = Store.create(config.output, setting.identity(), notes)
    ways = WAYS[config.importance]

    def ways_of(trial: Trial) -> tuple[str, ...]:
        return ways if trial.kind == "full" else ()

    def named(trial: Trial) -> Named:
        return Stage(name, trial) if name else trial

    def draw_ticket(trial: Trial) -> Ticket | None:
        if trial.kind == "full":
            return None
        importance = store.importance(trial.seed, ways[0])
        if importance is None:
            raise TrialError(f"its ticket is drawn from the scores of full-seed-{trial.seed}, which failed")
        return draw(importance, trial, config)

    def call(trial: Trial, ticket: Ticket | None) -> Call:
        tracked = Run.of(config, trial.id)
        return Call(train, setting, (trial, ticket, ways_of(trial), config.save_models, tracked))

    def keep(trial: Trial, outcome: Outcome) -> Record:
        return keep_outcome(store, trial, setting, outcome, store.ticket(trial))

    def is_dropped(trial: Trial) -> bool:
        return config.halving and trial in dropped(plan, store.ended(each for each in plan if each.kind == "winning"))

    finished = finished_trials(store, plan, ways_of, lambda trial: config.save_models)
    full = {trial.seed: named(trial).id for trial in plan if trial.kind == "full"}
    known = {trial.id: named(trial).id for trial in plan}

    def needs(trial: Trial) -> list[str]:
        judging = judges(trial, plan) if config.halving else []
        return [] if trial.kind == "full" else [full[trial.seed], *(known[name] for name in judging)]

    return [
        trial_job(
            store,
            trial,
            named(trial),
            draw_ticket,
            call,
            keep,
            finished=trial in finished,
            needs=needs(trial),
            is_dropped=functools.partial(is_dropped, trial),
            ways=ways_of(trial),
            keeps_model=config.save_models,
        )
        for trial in plan
    ]


def train(
    setting: Setting,
    trial: Trial,
    ticket: Ticket | None,
    ways: Sequence[str],
    with_model: bool,
    tracked: Run | None = None,
    listener: Listener | None = None,
) -> Outcome:
    """Runs a trial as `run_trial` does, and leaves the model behind where nobody wants it.

    Args:
        setting, trial, ticket, ways, tracked, listener: as in `run_trial`.
        with_model: whether the outcome has the model.
    """
    outcome = run_trial(setting, trial, ticket, ways, listener, tracked)
    return outcome if with_model else replace(outcome, model=None)


def keep_outcome(
    store: Store, trial: Named, setting: Setting, outcome: Outcome, ticket: Ticket | None, suffix: str = ""
) -> Record:
    """Writes what a trial leaves beside its record.

    Args:
        store: of the run.
        trial: the trial.
        setting: that it was trained in.
        outcome: of the training.
        ticket: that it was trained with.
        suffix: of the importance's files.

    Returns:
        The record to write.
    """
    keep_importance(store, trial, outcome.importance, suffix)
    if outcome.model is not None:
        keep_model(store, trial, setting.task.product(outcome.model), setting.tokenizer, ticket)
    return {**outcome.record, "predictions": store.write_predictions(trial, outcome.predictions)}


def trial_job(
    store: Store,
    trial: AnyTrial,
    named: Named,
    draw_ticket: Callable[[AnyTrial], Ticket | None],
    call: Callable[[AnyTrial, Ticket | None], Call],
    keep: Callable[[AnyTrial, Any], Record],
    finished: bool,
    needs: Sequence[str],
    ways: Sequence[str] = (),
    keeps_model: bool = False,
    files: Callable[[AnyTrial], Iterable[Path]] = lambda trial: (),
    is_dropped: Callable[[], bool] = bool,
) -> Job:
    """Makes the job of a trial whose ticket is drawn when it starts.

    Args:
        store: where its files are.
        trial: the trial.
        named: the trial as the listener knows it.
        draw_ticket: draws its ticket, if it draws one; that of a finished trial only where it was lost.
        call: makes the training.
        keep: writes what the training leaves, and returns the record.
        finished: True if an earlier run has finished it.
        needs: names of the jobs before it.
        ways: how it scores its model, as `Store.importance` takes it.
        keeps_model: whether its model is kept.
        files: further files that its result stands on.
        is_dropped: asked when what it needs has ended: True if it need not be trained.
    """

    def prepare() -> Call | None:
        if not finished and is_dropped():
            return None
        ticket = None
        if not (finished and store.ticket_path(trial).exists()):
            ticket = draw_ticket(trial)
        if ticket is not None and not store.keep_ticket(trial, ticket, finished):
            # Its record is of a ticket that is lost.
            store.discard_record(trial)
            return call(trial, ticket)
        return None if finished else call(trial, ticket)

    def is_finished() -> bool:
        return trial in finished_trials(store, [trial], lambda trial: ways, lambda trial: keeps_model)

    def scores_and_files() -> list[Path]:
        return [*(store.importance_path(trial.seed, way) for way in ways), *files(trial)]

    return Job(
        named, store, trial, prepare, functools.partial(keep, trial), needs, scores_and_files, is_finished, finished
    )


def finished_trials(
    store: Store,
    plan: Iterable[AnyTrial],
    ways: Callable[[AnyTrial], Iterable[str]] = lambda trial: (),
    keeps: Callable[[AnyTrial], bool] = lambda trial: False,
) -> set[AnyTrial]:
    """Finds the trials that need not run again, and reads every file of a plan: a damaged one is better reported now
    than after hours.

    Args:
        store: of the run.
        plan: its trials.
        ways: how a trial scores its model, as `Store.importance` takes it; without these scores it is not finished.
        keeps: whether a trial's model is kept; without it, whole, or its predictions, the trial is not finished.

    Raises:
        StoreError: a file is damaged.
    """
    finished = {trial for trial in plan if store.predictions(trial) is not None}
    for trial in plan:
        store.ticket(trial)
    finished = {trial for trial in finished if not keeps(trial) or store.has_model(trial)}
    scored = {trial: [store.importance(trial.seed, way, trial) for way in ways(trial)] for trial in plan}
    return {trial for trial in finished if None not in scored[trial]}


def keep_importance(store: Store, trial: Named, importance: Mapping[str, Importance], suffix: str = "") -> None:
    """Writes the importance of a full model.

    Where the trial is finished and only its model was lost, the importance that tickets were drawn from already stays:
    trained on another machine, the model would be scored a little differently.

    Args:
        store: of the run.
        trial: that has scored its model.
        importance: way -> scores.
        suffix: of each way's name.
    """
    for way, scores in importance.items():
        if store.record(trial) is None or store.importance(trial.seed, way + suffix) is None:
            store.write_importance(trial.seed, way + suffix, scores)


def _time(setting: Setting, ticket: Ticket) -> Record:
    """Times the full model and what the ticket leaves of it; what the weights are does not matter."""
    models = [setting.fresh_model(0).eval() for _ in range(2)]
    shrink(models[1], ticket)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in models:
        patch(model.to(device))
    return {"machine": environment.machine(), "rows": latencies(models[0], models[1])}


@dataclass(frozen=True)
class Stage:
    """A trial of a search inside a larger run.

    Attributes:
        name: key of the search within the larger run, e.g. "sst2".
        trial: trial of that search.
    """

    name: str
    trial: Trial

    @property
    def id(self) -> str:
        """Its name in the larger run."""
        return f"{self.name} {self.trial.id}"

    @property
    def seed(self) -> int:
        """The trial's."""
        return self.trial.seed

    @property
    def kind(self) -> str:
        """The trial's."""
        return self.trial.kind


def draw(importance: Importance, trial: Trial, config: SearchConfig) -> Ticket:
    """Draws a trial's ticket from its seed's importance and notes in its metadata what it was drawn for.

    Args:
        importance: of the full model with the same seed.
        trial: names the kind and the counts.
        config: the search.
    """
    ticket = prune(
        importance,
        counts=(trial.heads_pruned, trial.neurons_pruned if config.prune_neurons else trial.ffns_pruned),
        kind=trial.kind,  # type: ignore[arg-type]
        min_heads=config.min_heads,
        seed=trial.seed,
        neurons=config.prune_neurons,
    )
    note = {"sparsity": trial.sparsity, "model": config.model, "task": config.task, "trial_seed": trial.seed}
    return ticket.described({**ticket.metadata, **note})


def keep_model(
    store: Store, trial: Named, model: Any, tokenizer: PreTrainedTokenizerBase, ticket: Ticket | None
) -> None:
    """Writes a trial's trained model, in place of an earlier one; all of it or nothing.

    Args:
        store: of the run.
        trial: names the folder.
        model: a model of stock classes, or an object of sentence-transformers.
        tokenizer: saved along, so that an export needs nothing else.
        ticket: saved along.

    Raises:
        StoreError: the folder cannot be written.
    """
    with new_folder(store.clear_model(trial)) as folder, quiet():
        # Its weights are whole; the patched model's configuration says which ticket they were trained with.
        with patch(model) as handle:
            handle.apply(ticket)
            save(model, folder)
        tokenizer.save_pretrained(folder)
        if ticket is not None:
            ticket.save(folder / "ticket.safetensors")
        write_manifest(folder, NOTE, {"format": "whole", "trial": trial.id})
