"""One trial: trains and evaluates a ticket; the result depends on setting, seed and ticket alone."""

import contextlib
import copy
import hashlib
import math
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ticketops.errors import InputError, TrialError, shown, spelled
from ticketops.launch import follows, processes
from ticketops.models import TicketCallback, costs, patch, put_back, shrink, weight_counts
from ticketops.optim import Adamax
from ticketops.searching import environment
from ticketops.searching.plan import Trial
from ticketops.searching.recipes import RECIPES
from ticketops.searching.resampling import compact, halves_of
from ticketops.searching.scoring import score_pass
from ticketops.searching.setting import Setting, name_of, precision, quiet
from ticketops.searching.store import ROWS, Named, Record
from ticketops.searching.tracking import PREFIXES, Run, Tracker
from ticketops.searching.worker import agree
from ticketops.tasks import Task
from ticketops.tickets import Importance, Ticket, WeightCounts


class Listener:
    """Callbacks on the progress of a run. This base class does nothing."""

    def planned(self, trials: Sequence[Named], finished: Collection[Named]) -> None:
        """The run starts. `finished` are those of its trials that an earlier run has finished."""

    def started(self, trial: Named) -> None:
        """A trial starts to train."""

    def stepped(self, trial: Named, step: int, steps: int) -> None:
        """A trial has done `step` of its `steps` optimizer steps. Events of several trials may be interleaved."""

    def finished(self, trial: Named, record: Record) -> None:
        """A trial's record is written."""

    def dropped(self, trial: Named) -> None:
        """A trial need not be trained: its sparsity has dropped out of successive halving."""

    def failed(self, trial: Named, reason: str) -> None:
        """A trial failed; the run goes on, and tries it again next time."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """The results of a trial.

    Attributes:
        record: what the store keeps as JSON; all but its `timing` and `environment` is reproducible.
        model: the trained model, reverted to the stock classes; pruned structures have their pre-trained weights. None
            where nobody wants it.
        predictions: split ("validation", "report") -> the trained model's logits, [rows, labels] for whole texts, and
            what `with_results` adds.
        importance: way ("pass", "on_the_fly") -> importance, as asked for.
    """

    record: Record
    model: PreTrainedModel | None
    predictions: dict[str, np.ndarray]
    importance: dict[str, Importance] = field(default_factory=dict)


def run_trial(
    setting: Setting,
    trial: Trial,
    ticket: Ticket | None = None,
    ways: Sequence[str] = (),
    listener: Listener | None = None,
    tracked: Run | None = None,
) -> Outcome:
    """Trains one ticket from the pre-trained weights and scores it on the validation rows.

    It seeds everything it draws on, so the same arguments give the same record on the same machine and number of
    threads, whatever ran before.

    Args:
        setting: the search's model, rows and recipe.
        trial: which trial this is; its seed draws the task head, the data order and dropout.
        ticket: what to keep; None for the full model.
        ways: in which ways to score importance: "pass", "on_the_fly", both or neither.
        listener: callbacks on the progress of steps.
        tracked: the trial as trackers know it; None to track nothing.

    Raises:
        TrialError: training diverged.
    """
    config, timing = setting.config, Timing()
    with quiet(), contextlib.ExitStack() as stack:
        model = setting.fresh_model(trial.seed)
        counts, kept = weight_counts(model), ticket or Ticket.full(setting.num_layers, setting.num_heads)
        whole, left = costs(model, ticket=kept)
        # Shrunk, so that pruned weights cost the optimizer neither time nor memory.
        trained = model if ticket is None else shrink(copy.deepcopy(model), ticket)
        handle = stack.enter_context(patch(trained, graphs="auto" if config.graphs else False))
        options: dict[str, Any] = {
            "granularity": config.granularity,
            "neurons": config.prune_neurons,
            "sequences_per_example": setting.task.sequences_per_example,
        }
        # Of the last epoch. It saves a pass, but dropout is on and weights still change.
        recorder = TicketCallback(handle, **options) if "on_the_fly" in ways else None
        callbacks = [Steps(listener or Listener(), trial), *([recorder] if recorder else [])]
        tracker = stack.enter_context(Tracker(None if follows() else tracked))
        callbacks += tracker.callbacks
        selection: dict[str, Any] = {}
        if config.early_stopping_patience is not None:
            callbacks.append(EarlyStoppingCallback(config.early_stopping_patience))
            # The checkpoints that the best one is loaded from go with this folder.
            folder = agree(stack.enter_context(tempfile.TemporaryDirectory(prefix="ticketops-")))
            selection = best_epoch(setting.task.metric, folder)
        trainer = make_trainer(
            setting,
            model=trained,
            train_dataset=setting.splits["train"],
            eval_dataset=setting.splits["validation"],
            callbacks=callbacks,
            **trainer_options(setting, trial.seed, **selection, **tracker.arguments),
        )
        tracker.follow(trainer)
        set_seed(trial.seed)
        with timing.of("train_seconds"):
            loss = agree(trainer.train().training_loss)
        with timing.of("evaluate_seconds"):
            predictions = predict(trainer, setting)
        check_converged(trial.id, config, loss, predictions)
        predictions = with_results(setting, predictions)
        scores = scored(setting, predictions)
        tracker.log_scores(trainer, scores["scores"])
        importance = {"on_the_fly": recorder.importance} if recorder else {}
        if "pass" in ways:
            batches = DataLoader(
                setting.splits["train"],
                config.batch_size,
                collate_fn=trainer.data_collator,
                pin_memory=torch.cuda.is_available(),
            )
            with timing.of("score_seconds"):
                # Without a scaler of the loss float16 would lose small gradients, so that is scored in float32.
                autocast = config.dtype == "bf16"
                importance["pass"] = score_pass(handle, batches, autocast, trainer.compute_loss, **options)

    if trained is not model:
        put_back(trained, model)
    record = {
        "id": trial.id,
        "task": setting.task.name,
        "model": config.model,
        "kind": trial.kind,
        "sparsity": trial.sparsity,
        "seed": trial.seed,
        **remaining(kept, counts),
        "weights": counts.total,
        "costs": {"whole": asdict(whole), "left": asdict(left)},
        **scores,
        "train_loss": loss,
        "steps": trainer.state.global_step,
        "timing": timing,
        "environment": environment.circumstances(),
    }
    if config.early_stopping_patience is not None:
        record["best_step"] = trainer.state.best_global_step
    if len(importance) == 2:
        correlation = importance["pass"].rank_correlation(importance["on_the_fly"])
        record["rank_correlation"] = {
            name: value if math.isfinite(value) else None for name, value in correlation.items()
        }
    return Outcome(record, model, predictions, importance)


def make_trainer(setting: Setting, **options: Any) -> Trainer:
    """Makes the Trainer of a trial: the user's, where a search was given a `trainer_factory`.

    Args:
        setting: of the search.
        options: keyword arguments of the Trainer.

    Raises:
        InputError: the factory returns no Trainer, or one of another model or without the callbacks that it was given.
    """
    if setting.trainer_factory is None:
        trainer: Trainer = ScoringTrainer(setting, **options)
    else:
        name = f"trainer_factory {name_of(setting.trainer_factory)}"
        trainer = setting.trainer_factory(**options)
        if not isinstance(trainer, Trainer):
            raise InputError(f"{name} returns {shown(trainer)}: return a transformers.Trainer made of its arguments")
        if trainer.model is not options["model"]:
            raise InputError(f"{name} makes a Trainer of another model: pass model= on to the Trainer")
        if lacking := [each for each in options["callbacks"] if each not in trainer.callback_handler.callbacks]:
            lacks = type(lacking[0]).__name__
            raise InputError(f"{name} makes a Trainer without the callback {lacks}: pass callbacks= on to the Trainer")
    trainer.remove_callback(PrinterCallback)
    return trainer


def trainer_options(setting: Setting, seed: int, **changes: Any) -> dict[str, Any]:
    """How a trial's Trainer trains: the recipe's optimizer and schedule, and nothing saved or printed.

    Args:
        setting: model, task and recipe.
        seed: of the data order.
        changes: of the training arguments.

    Returns:
        Keyword arguments of the Trainer.
    """
    config, recipe = setting.config, RECIPES[setting.config.recipe]
    options: dict[str, Any] = {
        # Nothing is saved, but the Trainer makes this folder.
        "output_dir": tempfile.gettempdir(),
        "save_strategy": "no",
        "logging_strategy": "no",
        # The filter would synchronize with the GPU at every step and hide a NaN loss.
        "logging_nan_inf_filter": False,
        "report_to": "none",
        "disable_tqdm": True,
        "num_train_epochs": config.epochs,
        "per_device_train_batch_size": config.batch_size // processes(),
        "per_device_eval_batch_size": max(config.batch_size, 64),
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        **precision(config.dtype),
        "seed": seed,
        "data_seed": seed,
        # Batches travel to a GPU while it computes.
        "dataloader_pin_memory": torch.cuda.is_available(),
        "accelerator_config": {"non_blocking": torch.cuda.is_available()},
    }
    arguments = TrainingArguments(**{**options, **changes})
    # The Trainer would wrap the model in DataParallel on several GPUs, whose replicas lose the patch.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    own: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
        # A fused step reads and writes everything once: 16 ms in place of 87 for MiniLM on two cores of an Intel Xeon.
        "adamw": (torch.optim.AdamW, {"fused": True}),
        # The Trainer has clipped the whole gradient to `max_grad_norm` when Adamax clips each parameter's.
        "adamax": (Adamax, {"max_grad_norm": recipe.parameter_clip}),
    }
    optimizer, extra = own[recipe.optimizer]
    return {
        "args": arguments,
        "data_collator": setting.collator,
        "compute_loss_func": setting.loss_function,
        "optimizer_cls_and_kwargs": (
            optimizer,
            {"lr": config.learning_rate, "betas": recipe.betas, "eps": recipe.eps, **extra},
        ),
    }


def best_epoch(metric: str, folder: str) -> dict[str, Any]:
    """Training arguments that keep the weights of the epoch with the best score on the validation rows.

    Args:
        metric: that selects; higher is better.
        folder: for the checkpoints, of which at most two are there at a time.
    """
    return {
        "output_dir": folder,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "save_total_limit": 1,
        "save_only_model": True,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": True,
    }


class ScoringTrainer(Trainer):
    """A Trainer that evaluates by the task's own scores, whatever inputs and labels it has.

    Args:
        setting: of the task.
        options: of the Trainer.
    """

    def __init__(self, setting: Setting, **options: Any):
        super().__init__(**options)
        self._setting = setting
        # Heads take the argument that would divide the loss by what accumulated batches hold, and then do not.
        self.model_accepts_loss_kwargs = False

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Scores the validation rows."""
        task, rows = self._setting.task, self._setting.splits["validation"]
        logits = task.logits(self.predict(rows, metric_key_prefix=PREFIXES["validation"]).predictions)
        # A training that diverged is reported behind its end, by `check_converged`.
        finite = np.isfinite(logits).all()
        scores = score(task, "validation", logits, rows) if finite else dict.fromkeys(task.metrics, -math.inf)
        metrics = {f"eval_{name}": value for name, value in scores.items()}
        self.log({**metrics})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def predict(trainer: Trainer, setting: Setting) -> dict[str, np.ndarray]:
    """A model's logits on every split that scores it.

    Args:
        trainer: of the model.
        setting: of its task.

    Returns:
        "validation" and, where held out, "report" -> logits, as `Task.logits` returns them.
    """
    logits = {}
    for split, rows in setting.splits.items():
        if split != "train":
            predicted = trainer.predict(rows, metric_key_prefix=PREFIXES[split])
            logits[split] = setting.task.logits(predicted.predictions)
    return logits


def check_converged(name: str, config: Any, loss: float, predictions: Mapping[str, np.ndarray]) -> None:
    """Checks that loss and predictions of a training are finite.

    Args:
        name: of the trial.
        config: with its learning rate.
        loss: mean of its training.
        predictions: its logits.

    Raises:
        TrialError: it did not.
    """
    if not math.isfinite(loss) or not all(np.isfinite(logits).all() for logits in predictions.values()):
        raise TrialError(
            f"training diverged in trial {name} (loss {loss:g}): lower {spelled('learning_rate')}, now "
            f"{config.learning_rate:g}"
        )


def scored(setting: Setting, predictions: Mapping[str, np.ndarray]) -> Record:
    """What a record says of a model's predictions.

    Args:
        setting: of the task.
        predictions: as `with_results` returns them.
    """
    task, metric = setting.task, setting.task.metric
    halves = scores_of_halves(task, predictions.get("validation" + ROWS))
    predictions = {split: logits for split, logits in predictions.items() if not split.endswith(ROWS)}
    scores = {split: score(task, split, logits, setting.splits[split]) for split, logits in predictions.items()}
    return {
        "split": "validation",
        "metric": metric,
        "score": scores["validation"][metric],
        "report_score": scores["report"][metric] if "report" in scores else None,
        "scores": scores,
        "rows": {split: len(getattr(task, split)) for split in predictions},
        "majority": task.majority(),
        "constant_scores": {split: task.majority(getattr(task, split)) for split in predictions},
        **({} if halves is None else {"halves": halves}),
        # Tells two runs of a trial apart where their scores happen to be equal.
        "predictions_sha256": hashlib.sha256(b"".join(map(np.ndarray.tobytes, predictions.values()))).hexdigest(),
    }


def with_results(setting: Setting, predictions: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds to a model's predictions what each row contributes to the metric, where the task knows.

    Args:
        setting: of the task.
        predictions: split -> logits.

    Returns:
        The same, and "SPLIT-rows" -> `Task.row_results`.
    """
    task, found = setting.task, dict(predictions)
    for split, logits in predictions.items():
        results = task.row_results(logits, setting.splits[split], getattr(task, split))
        if results is not None:
            found[split + ROWS] = compact(results)
    return found


def scores_of_halves(task: Task, results: np.ndarray | None) -> list[list[float]] | None:
    """Scores a model on both halves of each random split of the validation rows, by a metric that is known here alone.

    Args:
        task: the task.
        results: what each row contributes, as `Task.row_results` returns it.

    Returns:
        The scores of both halves of each split; None for a metric that can be computed from the results at any time,
        or not at all.
    """
    function = task.functions.get(task.metric)
    if function is None or results is None or len(results) < 2:
        return None
    try:
        scores = [float(function(results[half, 0], results[half, 1])) for half in halves_of(len(results)) > 0]
    # A metric may need more rows, or rows of each class.
    except InputError:
        return None
    return [list(pair) for pair in zip(scores[::2], scores[1::2], strict=True)]


def score(task: Task, split: str, logits: np.ndarray, inputs: Any) -> dict[str, float]:
    """Scores a model's outputs on a split.

    Args:
        task: the task.
        split: "validation" or "report".
        logits: the outputs.
        inputs: tokenized rows of the split.

    Raises:
        TrialError: the task or a metric of the user's own cannot score them.
    """
    try:
        found = task.score(logits, inputs, getattr(task, split))
    except InputError as error:
        raise TrialError(str(error)) from error
    if lacking := [name for name in task.metrics if name not in found]:
        raise TrialError(
            f"{type(task).__name__}.score() of task {task.name} returned no {lacking[0]}: return a value for "
            "each of its metrics"
        )
    return found


def remaining(kept: Ticket, counts: WeightCounts) -> Record:
    """What a record says of a ticket's size.

    Args:
        kept: the ticket.
        counts: of the model's weights.
    """
    return {
        "heads_pruned": kept.heads_pruned,
        "ffns_pruned": kept.ffns_pruned,
        "neurons_pruned": kept.neurons_pruned,
        "weights_remaining": kept.weights_remaining(counts),
        "weights_remaining_encoder": kept.weights_remaining(counts, embeddings=False),
    }


class Timing(dict[str, float]):
    """Seconds by what took them."""

    @contextlib.contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Adds the time of the `with` block to a name's."""
        start = time.perf_counter()
        yield
        self[name] = round(self.get(name, 0.0) + time.perf_counter() - start, 3)


class Steps(TrainerCallback):
    """Tells a listener about a Trainer's steps.

    Args:
        listener: the listener.
        trial: the trial that the Trainer trains.
    """

    def __init__(self, listener: Listener, trial: Named):
        self._listener, self._trial = listener, trial

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Passes the number of the step on."""
        self._listener.stepped(self._trial, state.global_step, state.max_steps)
