"""The search: runs the trials of the plan in order and stores each one when it is finished."""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
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
from ticketops.searching.objects import Objects
from ticketops.searching.plan import SearchConfig, Trial
from ticketops.searching.selection import select
from ticketops.searching.setting import Setting, quiet
from ticketops.searching.store import Named, Record, Store, extended
from ticketops.searching.tracking import Run
from ticketops.searching.trial import Listener, run_trial
from ticketops.tickets import Importance, Ticket, prune

AnyTrial = TypeVar("AnyTrial", bound=Named)

WAYS: Mapping[str, tuple[str, ...]] = {
    "pass": ("pass",),
    "on_the_fly": ("on_the_fly",),
    "both": ("pass", "on_the_fly"),
}


def run_search(config: SearchConfig, listener: Listener | None = None, objects: Objects | None = None) -> Path:
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
    return search_in(Setting.load(extended(config), objects=objects), listener)


def search_in(setting: Setting, listener: Listener | None = None, timed: bool = True) -> Path:
    """Does what `run_search` does, with inputs that are loaded already.

    Args:
        setting: model, task and configuration.
        listener: callbacks on the progress of trials and steps.
        timed: whether to time the super ticket in the end.
    """
    config, listener = setting.config, listener or Listener()
    plan = setting.plan()
    ways = WAYS[config.importance]
    notes = {
        **environment.circumstances(),
        "validation": setting.task.validation_name,
        "report": setting.task.report_name,
    }
    with Store.create(config.output, setting.identity(), notes) as store:

        def draw_ticket(trial: Trial) -> Ticket | None:
            if trial.kind == "full":
                return None
            importance = store.importance(trial.seed, ways[0])
            if importance is None:
                raise TrialError(f"its ticket is drawn from the scores of full-seed-{trial.seed}, which failed")
            return draw(importance, trial, config)

        def run(trial: Trial, ticket: Ticket | None) -> Record:
            outcome = run_trial(setting, trial, ticket, () if ticket else ways, listener, Run.of(config, trial.id))
            keep_importance(store, trial, outcome.importance)
            if config.save_models:
                keep_model(store, trial, setting.task.product(outcome.model), setting.tokenizer, ticket)
            return {**outcome.record, "predictions": store.write_predictions(trial, outcome.predictions)}

        finished = _finished(store, plan, config)
        listener.planned(plan, finished)

        def scores(trial: Trial) -> list[Path]:
            return [store.importance_path(trial.seed, way) for way in _ways(config)(trial)]

        run_missing(store, plan, finished, run, listener, draw_ticket, scores)
        level = select(store.records(), config.seeds).super_level
        if timed and level is not None and store.latencies() is None:
            store.write_latencies(_time(setting, store.tickets(level.kind, level.sparsity)[level.best_seed]))
        return store.folder


def _ways(config: SearchConfig) -> Callable[[Trial], tuple[str, ...]]:
    """Makes a function from a trial to the ways in which it scores its model."""
    return lambda trial: WAYS[config.importance] if trial.kind == "full" else ()


def _finished(store: Store, plan: Iterable[Trial], config: SearchConfig) -> set[Trial]:
    return finished_trials(store, plan, _ways(config), lambda trial: config.save_models)


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


def run_missing(
    store: Store,
    plan: Iterable[AnyTrial],
    finished: Collection[AnyTrial],
    run: Callable[[AnyTrial, Ticket | None], Record],
    listener: Listener,
    draw_ticket: Callable[[AnyTrial], Ticket | None] = lambda trial: None,
    files: Callable[[AnyTrial], Iterable[Path]] = lambda trial: (),
) -> None:
    """Runs the trials that are not finished, in the plan's order, and keeps each one's record as soon as it is there.

    A trial that fails is recorded with its error, and the others go on.

    Args:
        store: of the run.
        plan: its trials.
        finished: those that do not run.
        run: trains a trial and writes what it leaves but its record, which comes last: it says that the rest is there.
        listener: callbacks on the progress of trials.
        draw_ticket: draws a trial's ticket, where it draws one; that of a finished trial only where it was lost.
        files: what a trial leaves or stands on beside its own ticket and model, for the record's checksums.

    Raises:
        StoreError: a file is damaged, or cannot be written.
        TrialError: all trials failed.
    """
    failed: dict[str, str] = {}
    for trial in plan:
        try:
            done = trial in finished
            ticket = None
            if not (done and store.ticket_path(trial).exists()):
                ticket = draw_ticket(trial)
            if ticket is not None and not store.keep_ticket(trial, ticket, done):
                done = False
            if not done:
                listener.started(trial)
                record = run(trial, ticket)
                store.write_record(trial, record, files(trial))
                listener.finished(trial, record)
        except (TrialError, torch.OutOfMemoryError) as error:
            reason = " ".join(str(error).split())[:500]
            failed[trial.id] = reason
            store.write_failure(trial, reason)
            listener.failed(trial, reason)
    if failed and len(failed) == len(list(plan)):
        first = next(iter(failed))
        raise TrialError(f"all {len(failed)} trials failed; {first}: {failed[first]}")


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


def stages(setting: Setting, name: str) -> tuple[list["Stage"], list["Stage"]]:
    """The trials of a search inside a larger run, and those of them that are finished.

    Args:
        setting: of the search.
        name: what the larger run calls it.
    """
    plan, begun = setting.plan(), (Path(setting.config.output) / "config.json").is_file()
    finished = _finished(Store.read(setting.config.output, "search"), plan, setting.config) if begun else set()
    trials = [Stage(name, trial) for trial in plan]
    return trials, [stage for stage in trials if stage.trial in finished]


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


class Inner(Listener):
    """Forwards events of a search inside a larger run to that run's listener, which already knows its trials.

    Args:
        outer: the larger run's listener.
        name: of the search.
    """

    def __init__(self, outer: Listener, name: str):
        self._outer, self._name = outer, name

    def started(self, trial: Named) -> None:
        """A trial starts to train."""
        assert isinstance(trial, Trial)
        self._outer.started(Stage(self._name, trial))

    def stepped(self, trial: Named, step: int, steps: int) -> None:
        """A trial has done `step` of its `steps` optimizer steps."""
        assert isinstance(trial, Trial)
        self._outer.stepped(Stage(self._name, trial), step, steps)

    def finished(self, trial: Named, record: Record) -> None:
        """A trial's record is written."""
        assert isinstance(trial, Trial)
        self._outer.finished(Stage(self._name, trial), record)

    def failed(self, trial: Named, reason: str) -> None:
        """A trial failed."""
        assert isinstance(trial, Trial)
        self._outer.failed(Stage(self._name, trial), reason)


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
