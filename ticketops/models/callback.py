"""TicketCallback: records importance in an epoch of a transformers Trainer, draws a ticket and has it trained."""

import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from ticketops.errors import InputError, shown
from ticketops.models.containers import is_container, transformers_model
from ticketops.models.drawing import Drawing
from ticketops.models.handle import PatchHandle, find_handle
from ticketops.models.record import read_applied, record_of
from ticketops.models.registry import weight_counts
from ticketops.tickets import Importance, Ticket

#: Under this key a Trainer's checkpoints keep the ticket, in trainer_state.json.
_KEY = "ticketops"


class TicketCallback(TrainerCallback):
    """Draws a ticket while a transformers Trainer trains: importance is recorded in one epoch, at no extra pass.

    At the end of that epoch the ticket is drawn. It is applied when the next epoch begins, after the evaluation and the
    checkpoint of the epoch that was recorded, or at the end of training where that was the last epoch. Rewinding resets
    the weights to the pre-trained ones and clears the optimizer's state; the learning rate's schedule goes on. What is
    best for `load_best_model_at_end` and early stopping is found anew among the ticket's own evaluations.

    Checkpoints keep the ticket: a training that resumes from one after the recorded epoch goes on with it. Batches of
    all processes count. Under fp16, batches whose gradients overflow are left out.

    Args:
        model: handle of the Trainer's patched model, or the patched model.
        sparsity: share of heads and of FFNs to prune, in [0, 1). Without sparsity and counts, importance is recorded
            and no ticket drawn.
        counts: numbers of heads and of FFNs (with `neurons`: of neurons) to prune, in place of a sparsity.
        epoch: epoch to record, from 1; None for the last.
        rewind: copy of the pre-trained state_dict, to rewind the weights to; None keeps the weights.
        log: function that takes the ticket's numbers in a dictionary, such as `trainer.log`, which hands them to
            tensorboard, wandb and others; None adds them to the Trainer's `state.log_history` alone.
        options: kind, min_heads, seed and neurons of `prune`, granularity, sequences_per_example and skip_overflow of
            `PatchHandle.record_importance`.

    Raises:
        InputError: when training begins, before its first step: a model that is not patched, a reverted handle or that
            of another model, an epoch beyond the last, an argument out of range, or a checkpoint to resume from in
            whose epoch importance would have been recorded.

    Source: arXiv 2105.12002, section 3.
    """

    def __init__(
        self,
        model: Any,
        sparsity: float | None = None,
        *,
        counts: tuple[int, int] | None = None,
        epoch: int | None = None,
        rewind: Mapping[str, Tensor] | None = None,
        log: Callable[[dict[str, float]], Any] | None = None,
        **options: Any,
    ) -> None:
        if epoch is not None and (type(epoch) is not int or epoch < 1):
            raise InputError(f"epoch={epoch!r} is no epoch: they count from 1, and None is the last")
        self._patched, self._epoch, self._log = model, epoch, log
        self._options = {"sparsity": sparsity, "counts": counts, "rewind": rewind, **options}
        # An option of another name is refused here.
        inspect.signature(Drawing).bind(None, model=None, **self._options)
        self._drawing: Drawing | None = None
        self._why_none = "training has not begun"
        # Number of the epoch that trains, and of the one that is recorded; whether the ticket is yet to be applied.
        self._now = self._recorded = 0
        self._waits = False

    @property
    def importance(self) -> Importance:
        """What has been recorded; InputError where nothing has."""
        found = None if self._drawing is None else self._drawing.importance
        if found is None:
            raise InputError(f"no importance was recorded: {self._why_none}")
        return found

    @property
    def ticket(self) -> Ticket:
        """The ticket; InputError where none was drawn."""
        found = None if self._drawing is None else self._drawing.ticket
        if found is None:
            raise InputError(f"no ticket was drawn: {self._why_none}")
        return found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Checks all arguments; applies the ticket of the checkpoint that training resumes from."""
        if self._drawing is not None:
            # A training before this one may have ended with an error.
            self._drawing.close()
            self._drawing = None
        handle, model = self._handle(kwargs["model"]), kwargs["model"]
        last, done = state.num_train_epochs, state.epoch or 0
        if self._epoch is None and state.max_steps < last:
            raise InputError(
                "which epoch is the last is not known for training data without a length: give TicketCallback an "
                "epoch, such as 1"
            )
        self._recorded = self._epoch or last
        if self._recorded > last:
            raise InputError(f"importance is to be recorded in epoch {self._recorded}, and training has {last}")
        options = {"skip_overflow": args.fp16, **self._options}
        drawing = Drawing(handle, model=model if is_container(model) else None, **options)
        drawing.check()
        self._now, self._waits = int(done), False
        self._why_none = f"training has not come to the end of epoch {self._recorded}"
        if (saved := state.stateful_callbacks.get(_KEY)) is not None:
            masks = read_applied(saved, handle.model.base_model.config)
            drawing.ticket = Ticket(masks.head_mask, masks.ffn_mask, saved["metadata"], masks.neuron_mask)
            self._recorded, self._waits = saved["epoch"], done <= saved["epoch"]
            self._why_none = "training was resumed after it, and checkpoints keep the ticket alone"
            if not self._waits:
                handle.apply(drawing.ticket)
        elif done > self._recorded - 1:
            raise InputError(
                f"training resumes after {done:g} epochs, and importance was to be recorded from the begin of epoch "
                f"{self._recorded}: resume from a checkpoint before that, or record a later epoch"
            )
        self._drawing = drawing

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Applies the ticket that the epoch before has drawn; starts to record."""
        self._now += 1
        assert self._drawing is not None
        if self._waits:
            self._apply(kwargs["optimizer"])
            # What was best before is not the ticket.
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None
        if self._now == self._recorded and self._drawing.ticket is None:
            self._drawing.start()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops recording, and draws the ticket."""
        drawing = self._drawing
        assert drawing is not None
        if self._now != self._recorded or drawing.ticket is not None:
            return
        drawing.stop()
        self._why_none = "neither sparsity nor counts were given"
        if drawing.ticket is None:
            return
        self._waits, ticket = True, drawing.ticket
        masks = {**record_of(ticket), "metadata": dict(ticket.metadata)}
        state.stateful_callbacks[_KEY] = {**masks, "epoch": self._now}
        model = transformers_model(kwargs["model"])
        numbers: dict[str, float] = {
            "ticket_heads_pruned": ticket.heads_pruned,
            "ticket_ffns_pruned": ticket.ffns_pruned,
            "ticket_neurons_pruned": ticket.neurons_pruned,
        }
        if isinstance(model, PreTrainedModel):
            numbers["ticket_weights_remaining"] = ticket.weights_remaining(weight_counts(model))
        if self._log is not None:
            self._log(numbers)
        else:
            state.log_history.append({**numbers, "epoch": state.epoch, "step": state.global_step})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Applies the ticket of the last epoch."""
        if self._waits:
            self._apply(kwargs["optimizer"])
        elif self._now < self._recorded:
            warnings.warn(
                f"training ended in epoch {self._now}, before epoch {self._recorded}, which TicketCallback was to "
                "record, so there is no ticket: give it an earlier epoch",
                stacklevel=2,
            )

    def _apply(self, optimizer: Any) -> None:
        assert self._drawing is not None
        self._drawing.apply()
        if self._drawing.rewinds and optimizer is not None:
            # The moments of the weights that are gone.
            optimizer.state.clear()
            inner = getattr(optimizer, "optimizer", optimizer)
            if isinstance(inner, torch.optim.Adagrad):
                # Others make theirs in their first step.
                inner.state.update(torch.optim.Adagrad(inner.param_groups, **inner.defaults).state)
        self._waits = False

    def _handle(self, trained: Any) -> PatchHandle:
        """The handle of the Trainer's model."""
        handle = self._patched
        if not isinstance(handle, PatchHandle):
            inner = transformers_model(handle)
            if not isinstance(inner, PreTrainedModel):
                raise InputError(
                    f"TicketCallback takes the handle of a patched model, or the patched model, not {shown(handle)}"
                )
            found = find_handle(inner)
            if found is None:
                raise InputError(
                    f"the {type(inner).__name__} of TicketCallback is not patched: call ticketops.patch(model) first"
                )
            handle = found
        base = handle.model.base_model
        if all(module is not base for module in trained.modules()):
            raise InputError(
                f"the Trainer trains another model than the {type(handle.model).__name__} of TicketCallback's handle: "
                "give both the same one"
            )
        return handle
