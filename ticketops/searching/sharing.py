"""Ticket sharing: trains several tasks on one encoder, each on its own ticket, and the arms it is compared with."""

import gc
import itertools
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, set_seed

from ticketops.errors import InputError, TrialError
from ticketops.models import SharedModel, weight_counts
from ticketops.searching import environment
from ticketops.searching.engine import Barrier, Call, Job
from ticketops.searching.execution import Execution
from ticketops.searching.mixing import Step, make_schedule
from ticketops.searching.objects import Objects
from ticketops.searching.run import finished_trials, search_jobs, trial_job
from ticketops.searching.selection import at_sparsity, select
from ticketops.searching.setting import Setting, quiet
from ticketops.searching.sharing_plan import (
    SEARCHES,
    SINGLE,
    ShareConfig,
    ShareTrial,
    TaskTicket,
    share_plan,
)
from ticketops.searching.store import Record, Store, extended
from ticketops.searching.task_tickets import (
    KnownTickets,
    arm_tickets,
    digests,
    load_tickets,
    single_scores,
)
from ticketops.searching.tracking import Run, Tracker
from ticketops.searching.trial import (
    Listener,
    Steps,
    Timing,
    check_converged,
    predict,
    remaining,
    scored,
    trainer_options,
    with_results,
)
from ticketops.tickets import Ticket


def load_settings(config: ShareConfig, objects: Objects | None = None) -> dict[str, Setting]:
    """Loads and checks the model and every task, before anything is trained.

    Args:
        config: the run.
        objects: the tasks and metrics that `config` names, where they are objects in Python.

    Returns:
        Task name -> its setting, as its single-task search has it; all share one copy of the pre-trained weights.

    Raises:
        InputError: something cannot be loaded or does not fit, or two tasks have the same name.
    """
    settings: dict[str, Setting] = {}
    specs: dict[str, str] = {}
    for spec in config.tasks:
        setting = Setting.load(config.search(spec), at_most=True, objects=objects)
        setting.require_head("share")
        name = setting.task.name
        if name in settings:
            labels = [", ".join(one.task.labels) or "numbers" for one in (settings[name], setting)]
            clash = f", with the labels {labels[0]} and {labels[1]}" if labels[0] != labels[1] else ""
            raise InputError(
                f"tasks {specs[name]} and {spec} are both called {name}{clash}: rename one file or folder, "
                "since a task's head, ticket and scores go by its name"
            )
        first = next(iter(settings.values()), setting)
        output = str(Path(config.output) / SEARCHES / name)
        specs[name] = spec
        settings[name] = replace(
            setting, pretrained=first.pretrained, config=replace(setting.config, output=output, save_models=False)
        )
    return settings


@dataclass(frozen=True, eq=False)
class PreparedShare:
    """A share whose inputs are loaded and checked.

    Attributes:
        config: the run, with what its output folder has beside its own tasks, seeds and levels.
        settings: task name -> its setting, all tasks.
        tickets: the tickets that `config.tickets` names; None if they are to be found by searches.
        chosen: task -> the sparsity whose tickets finished trials were trained with; empty where none is finished.
        identity: what the results depend on.
        plan: the multi-task trials.
    """

    config: ShareConfig
    settings: dict[str, Setting]
    tickets: KnownTickets | None
    chosen: Mapping[str, float | None]
    identity: Record
    plan: list[ShareTrial]


def prepare_share(config: ShareConfig, objects: Objects | None = None) -> PreparedShare:
    """Loads and checks everything that sharing needs, before anything is trained or written.

    Args:
        config: the run.
        objects: the tasks and metrics that `config` names, where they are objects in Python.

    Raises:
        InputError: model, tasks, tickets and configuration do not fit each other, or cannot be loaded.
        StoreError: the output folder's `config.json` is corrupt.
    """
    config = extended(config)
    settings = load_settings(config, objects)
    begun: Record = {}
    chosen: Mapping[str, float | None] = {}
    if (Path(config.output) / "config.json").is_file() and (store := Store.read(config.output)).kind == "share":
        begun = store.description["identity"]
        # One level for all seeds: what finished trials were trained with stays, whatever a longer search would choose.
        finished = any((store.folder / "trials").glob("*.json"))
        chosen = {name: one["sparsity"] for name, one in (store.facts(SINGLE) or {}).items()} if finished else {}
    tickets = load_tickets(config, settings, chosen)
    for setting in () if tickets else settings.values():
        # Its levels are checked by listing them.
        setting.plan()
    identity = {
        **next(iter(settings.values())).identity(),
        "kind": "share",
        "config": config.decided(),
        "task_fingerprint": {name: setting.task.fingerprint for name, setting in settings.items()},
        "tickets": None if tickets is None else digests(tickets.tickets),
    }
    first = begun.get("first_tasks", len(begun["config"]["tasks"])) if begun else len(config.tasks)
    if first < len(config.tasks):
        identity["first_tasks"] = first
    return PreparedShare(config, settings, tickets, chosen, identity, share_plan(config, first))


def run_share_trial(
    config: ShareConfig,
    settings: Mapping[str, Setting],
    trial: ShareTrial,
    tickets: Mapping[str, Ticket | None],
    listener: Listener | None = None,
    tracked: Run | None = None,
) -> tuple[Record, SharedModel, dict[str, np.ndarray]]:
    """Trains all tasks on one encoder from the pre-trained weights, each on its ticket, and scores every task on its.

    It seeds everything it draws on, so the same arguments give the same record on the same machine and number of
    threads. Each step is of one task; gradients are None before it, so clipping to the recipe's norm measures the
    ticket's own gradient. One warm-up and decay of the step size spans all steps, whichever task they are of.

    Args:
        config: the run.
        settings: of the tasks, by name.
        trial: its seed draws the task heads, the order of steps and rows, and dropout.
        tickets: task -> what to keep; None for the full model.
        listener: callbacks on the progress of steps.
        tracked: the trial as trackers know it; None to track nothing.

    Returns:
        The record, the trained model, and its logits [rows, labels] by "TASK.SPLIT".

    Raises:
        TrialError: training diverged.
    """
    timing = Timing()
    first = next(iter(settings.values()))
    sizes = [len(setting.splits["train"]) for setting in settings.values()]
    schedule = make_schedule(sizes, config.batch_size, config.joint_epochs, config.mixing, trial.seed)
    with quiet(), Tracker(tracked) as tracker:
        models = {name: own.fresh_model(trial.seed) for name, own in settings.items()}
        shared = SharedModel(models, tickets, graphs="auto" if config.graphs else False)
        counts = {name: weight_counts(shared.select(name)) for name in settings}
        trainer = MixedTrainer(
            {name: own.loss_function for name, own in settings.items()},
            model=shared.train(),
            train_dataset=MixedSteps(settings, schedule),
            callbacks=[Steps(listener or Listener(), trial), *tracker.callbacks],
            # The schedule has the epochs in it.
            **trainer_options(first, trial.seed, num_train_epochs=1, **tracker.arguments),
        )
        trainer.remove_callback(PrinterCallback)
        tracker.follow(trainer)
        set_seed(trial.seed)
        with timing.of("train_seconds"):
            loss = trainer.train().training_loss
        predictions = {}
        for name, setting in settings.items():
            with timing.of("evaluate_seconds"):
                own = Trainer(model=shared.select(name), **trainer_options(setting, trial.seed))
                predictions[name] = predict(own, setting)
            check_converged(f"{trial.id}, task {name}", config, loss, predictions[name])
            predictions[name] = with_results(setting, predictions[name])
        scores = {name: scored(setting, predictions[name]) for name, setting in settings.items()}
        tracker.log_scores(
            trainer,
            {
                split: {
                    f"{name}_{metric}": value
                    for name, own in scores.items()
                    for metric, value in own["scores"].get(split, {}).items()
                }
                for split in ("validation", "report")
            },
        )
    steps = Counter(step.task for step in schedule)
    tasks = {
        name: {
            **scores[name],
            **remaining(shared.tickets[name], counts[name]),
            "train_rows": len(setting.task.train),
            "steps": steps[place],
        }
        for place, (name, setting) in enumerate(settings.items())
    }
    reports = [task["report_score"] for task in tasks.values()]
    record = {
        "id": trial.id,
        "kind": trial.kind,
        "seed": trial.seed,
        "model": config.model,
        "mixing": config.mixing,
        "metric": "task average",
        "score": statistics.fmean(task["score"] for task in tasks.values()),
        "report_score": None if None in reports else statistics.fmean(reports),
        "tasks": tasks,
        "train_loss": loss,
        "steps": len(schedule),
        "timing": timing,
        "environment": environment.circumstances(),
    }
    logits = {f"{name}.{split}": found for name, splits in predictions.items() for split, found in splits.items()}
    return record, shared, logits


class MixedSteps(Dataset):
    """The steps of a multi-task training as a data set: an item is a whole batch, of one task.

    Args:
        settings: of the tasks, in the order in which the schedule numbers them.
        schedule: the steps.
    """

    def __init__(self, settings: Mapping[str, Setting], schedule: Sequence[Step]):
        self._schedule = schedule
        self._tasks = [(name, setting.splits["train"], setting.collator) for name, setting in settings.items()]

    def __len__(self) -> int:
        return len(self._schedule)

    def __getitem__(self, index: int) -> dict[str, Any]:
        step = self._schedule[index]
        task, rows, collate = self._tasks[step.task]
        return {"task": task, **collate(rows.__getitems__(step.rows.tolist()))}


class MixedTrainer(Trainer):
    """A Trainer whose data set yields whole batches, in the order of the schedule.

    Args:
        losses: of each task; None for the head's own.
        options: of the Trainer.
    """

    def __init__(self, losses: Mapping[str, Any], **options: Any):
        super().__init__(**options)
        self._losses = losses

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Moves the batch to the device, without waiting for that as the Trainer would, and trains on it."""
        inputs = send_to_device(inputs, self.args.device, non_blocking=self.args.dataloader_pin_memory)
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The loss of the step's task."""
        self.compute_loss_func = self._losses[inputs["task"]]
        return super().compute_loss(model, inputs, *args, **kwargs)

    def get_train_dataloader(self) -> DataLoader:
        """The steps one by one."""
        assert self.train_dataset is not None
        return DataLoader(
            self.train_dataset, batch_size=None, collate_fn=_as_it_is, pin_memory=self.args.dataloader_pin_memory
        )


def _as_it_is(batch: Any) -> Any:
    return batch


def run_share(
    config: ShareConfig,
    listener: Listener | None = None,
    objects: Objects | None = None,
) -> Path:
    """Runs what is still missing of a share in its output folder.

    Args:
        config: the run; tasks, seeds, levels, tickets and arms that the folder has beside these stay.
        listener: callbacks on the progress of trials and steps.
        objects: the tasks and metrics that `config` names, where they are objects in Python.

    Returns:
        The output folder, without a report.

    Raises:
        InputError: model, tasks, tickets and configuration do not fit each other, or cannot be loaded.
        StoreError: the output folder cannot be used; finished trials stay.
        TrialError: every trial failed.
    """
    listener, execution = listener or Listener(), Execution.of(config)
    execution.check()
    ready = prepare_share(config, objects)
    config, settings, plan = ready.config, ready.settings, ready.plan
    first = next(iter(settings.values()))
    notes = {
        **environment.circumstances(),
        "validation": {name: setting.task.validation_name for name, setting in settings.items()},
        "tasks": {name: setting.task.describe() for name, setting in settings.items()},
    }
    store = Store.create(config.output, ready.identity, notes)
    finished = finished_trials(store, plan, keeps=lambda trial: config.save_models)
    for name, seed in itertools.product(settings, config.seeds):
        store.ticket(TaskTicket(name, seed))
    found = ready.tickets or KnownTickets({}, {})
    # The searches' trials are the run's, too, and are announced with it.
    searches = {name: search_jobs(setting, name) for name, setting in settings.items() if not ready.tickets}

    def choose() -> None:
        for name, jobs in searches.items():
            search = Store.read(jobs[0].store.folder, "search")
            records = search.records()
            selection = at_sparsity(select(records, search.config.seeds), ready.chosen.get(name))
            level = selection.super_level
            found.tickets[name] = search.tickets("winning", level.sparsity) if level else {}
            if records:
                found.single[name] = single_scores(records, selection)
        for name, by_seed in found.tickets.items():
            for seed, ticket in by_seed.items():
                store.remove_leftovers(TaskTicket(name, seed))
                store.keep_ticket(TaskTicket(name, seed), ticket, seed in {trial.seed for trial in finished})
        store.write_facts(SINGLE, found.single)

    def call(trial: ShareTrial, _: Ticket | None) -> Call:
        if lacking := [name for name, by_seed in found.tickets.items() if trial.seed not in by_seed]:
            raise TrialError(f"it takes the super ticket of {lacking[0]} for seed {trial.seed}, whose trial failed")
        kept = arm_tickets(trial, {name: by_seed[trial.seed] for name, by_seed in found.tickets.items()})
        return Call(_train, (config, settings), (trial, kept))

    def keep(trial: ShareTrial, trained: tuple[Record, SharedModel | None, dict[str, np.ndarray]]) -> Record:
        record, model, predictions = trained
        if model is not None:
            with quiet():
                model.save(store.clear_model(trial), first.tokenizer)
        return {**record, "predictions": store.write_predictions(trial, predictions)}

    chosen = Barrier("choose the tasks' super tickets")
    trials = [
        trial_job(
            store,
            trial,
            trial,
            lambda trial: None,
            call,
            keep,
            finished=trial in finished,
            needs=[chosen.id],
            keeps_model=config.save_models,
            files=lambda trial: [store.ticket_path(TaskTicket(name, trial.seed)) for name in settings],
        )
        for trial in plan
    ]
    before = [job for jobs in searches.values() for job in jobs]
    step = Job(chosen, store, chosen, choose, needs=[job.trial.id for job in before])
    execution.run([*before, step, *trials], listener)
    return store.folder


def _train(
    inputs: tuple[ShareConfig, Mapping[str, Setting]],
    trial: ShareTrial,
    tickets: Mapping[str, Ticket | None],
    listener: Listener | None = None,
) -> tuple[Record, SharedModel | None, dict[str, np.ndarray]]:
    """Runs a trial as `run_share_trial` does, and leaves the model behind where nobody wants it."""
    config, settings = inputs
    record, model, predictions = run_share_trial(config, settings, trial, tickets, listener, Run.of(config, trial.id))
    if config.save_models:
        return record, model, predictions
    # Frees the device's memory before the next trial; the model has reference cycles.
    del model
    gc.collect()
    return record, None, predictions
