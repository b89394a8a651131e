"""One trial: a pure function of the setting, the seed and the ticket that trains, evaluates and returns a record."""

import contextlib
import hashlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ticketops.errors import TicketopsError
from ticketops.models import costs, patch, weight_counts
from ticketops.searching import environment
from ticketops.searching.plan import RECIPES, Trial
from ticketops.searching.scoring import LastEpochScorer, score_pass
from ticketops.searching.setting import Setting, quiet
from ticketops.searching.store import Record
from ticketops.tickets import Importance, Ticket


class Listener:
    """Hears how a search goes; this one does nothing, and a terminal's progress bars derive from it."""

    def planned(self, trials: Sequence[Trial], finished: int) -> None:
        """The search starts, with this many of its trials finished by an earlier run."""

    def started(self, trial: Trial) -> None:
        """A trial starts to train."""

    def stepped(self, step: int, steps: int) -> None:
        """The current trial has done this many of its optimizer steps."""

    def finished(self, trial: Trial, record: Record) -> None:
        """A trial's record is written."""


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a trial leaves.

    Attributes:
        record: what the store keeps as JSON; all but its `timing` and `environment` is reproducible.
        model: the trained model, reverted to the stock classes; pruned structures have their pre-trained weights.
        importance: way ("pass", "on_the_fly") -> importance, as asked for.
    """

    record: Record
    model: PreTrainedModel
    importance: dict[str, Importance] = field(default_factory=dict)


def run_trial(
    setting: Setting,
    trial: Trial,
    ticket: Ticket | None = None,
    ways: Sequence[str] = (),
    listener: Listener | None = None,
) -> Outcome:
    """Trains one ticket from the pre-trained weights and scores it on the validation rows.

    It seeds everything it draws on, so the same arguments give the same record on the same machine and number of
    threads, whatever ran before.

    Args:
        setting: the search's model, rows and recipe.
        trial: which trial this is; its seed draws the task head, the data order and dropout.
        ticket: what to keep; None for the full model.
        ways: in which ways to score importance: "pass", "on_the_fly", both or neither.
        listener: hears about the steps.

    Raises:
        TicketopsError: training diverged.
    """
    config, recipe = setting.config, RECIPES[setting.config.recipe]
    timing: dict[str, float] = {}
    with quiet(), contextlib.ExitStack() as stack:
        model = setting.fresh_model(trial.seed)
        handle = stack.enter_context(patch(model)).apply(ticket)
        counts, kept = weight_counts(model), ticket or Ticket.full(setting.num_layers, setting.num_heads)
        whole, left = costs(model, ticket=kept)
        scorer = LastEpochScorer(handle, config.granularity, config.prune_neurons) if "on_the_fly" in ways else None
        collator = DataCollatorWithPadding(setting.tokenizer)
        trainer = Trainer(
            model=model,
            args=_arguments(setting, trial.seed),
            data_collator=collator,
            train_dataset=setting.splits["train"],
            callbacks=[_Steps(listener or Listener()), *([scorer] if scorer else [])],
            optimizer_cls_and_kwargs=(
                {"adamw": torch.optim.AdamW, "adamax": torch.optim.Adamax}[recipe.optimizer],
                {"lr": config.learning_rate, "betas": recipe.betas, "eps": recipe.eps},
            ),
        )
        trainer.remove_callback(PrinterCallback)
        set_seed(trial.seed)
        with _timed(timing, "train_seconds"):
            loss = trainer.train().training_loss
        with _timed(timing, "evaluate_seconds"):
            predictions = {split: _predict(trainer, setting, split) for split in setting.splits if split != "train"}
        if not math.isfinite(loss) or not all(np.isfinite(logits).all() for logits in predictions.values()):
            raise TicketopsError(
                f"training diverged in trial {trial.id} (loss {loss:g}): lower --learning-rate, now "
                f"{config.learning_rate:g}"
            )
        importance = {"on_the_fly": scorer.importance} if scorer and scorer.importance is not None else {}
        if "pass" in ways:
            batches = DataLoader(setting.splits["train"], config.batch_size, collate_fn=collator)
            with _timed(timing, "score_seconds"):
                importance["pass"] = score_pass(
                    handle, batches, config.granularity, config.dtype == "bf16", config.prune_neurons
                )

    metric = setting.task.metric
    scores = {
        split: setting.task.compute(logits, np.asarray(setting.splits[split]["labels"]))
        for split, logits in predictions.items()
    }
    record = {
        "id": trial.id,
        "task": setting.task.name,
        "model": config.model,
        "kind": trial.kind,
        "sparsity": trial.sparsity,
        "seed": trial.seed,
        "heads_pruned": kept.heads_pruned,
        "ffns_pruned": kept.ffns_pruned,
        "neurons_pruned": kept.neurons_pruned,
        "weights_remaining": kept.weights_remaining(counts),
        "weights_remaining_encoder": kept.weights_remaining(counts, embeddings=False),
        "weights": counts.total,
        "costs": {"whole": asdict(whole), "left": asdict(left)},
        "split": "validation",
        "metric": metric,
        "score": scores["validation"][metric],
        "report_score": scores["report"][metric] if "report" in scores else None,
        "scores": scores,
        "majority": setting.task.majority(),
        # Tells two runs of a trial apart where their scores happen to be equal.
        "predictions_sha256": hashlib.sha256(b"".join(map(np.ndarray.tobytes, predictions.values()))).hexdigest(),
        "train_loss": loss,
        "steps": trainer.state.global_step,
        "timing": timing,
        "environment": {"versions": environment.versions(), "machine": environment.machine()},
    }
    if len(importance) == 2:
        correlation = importance["pass"].rank_correlation(importance["on_the_fly"])
        record["rank_correlation"] = {
            name: value if math.isfinite(value) else None for name, value in correlation.items()
        }
    return Outcome(record, model, importance)


def _arguments(setting: Setting, seed: int) -> TrainingArguments:
    config, recipe = setting.config, RECIPES[setting.config.recipe]
    arguments = TrainingArguments(
        # Nothing is saved, but the Trainer makes this folder.
        output_dir=tempfile.gettempdir(),
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        num_train_epochs=config.epochs,
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=max(config.batch_size, 64),
        learning_rate=config.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.clip,
        bf16=config.dtype == "bf16",
        # Without this the Trainer refuses bfloat16 where there is no accelerator.
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        data_seed=seed,
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    # The Trainer would wrap the model in DataParallel on several GPUs, whose replicas lose the patch.
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def _predict(trainer: Trainer, setting: Setting, split: str) -> np.ndarray:
    """The model's logits on a split, [rows, labels]."""
    predictions = trainer.predict(setting.splits[split]).predictions
    return predictions[0] if isinstance(predictions, tuple) else predictions


@contextlib.contextmanager
def _timed(timing: dict[str, float], name: str) -> Any:
    start = time.perf_counter()
    yield
    timing[name] = round(time.perf_counter() - start, 3)


class _Steps(TrainerCallback):
    def __init__(self, listener: Listener):
        self._listener = listener

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._listener.stepped(state.global_step, state.max_steps)
