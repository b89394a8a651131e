"""Importance of a fully fine-tuned model: in a clean pass after training, or during its last epoch."""

import contextlib
from collections.abc import Iterable
from typing import Any

import torch
from transformers import TrainerCallback

from ticketops.models import PatchHandle
from ticketops.tickets import Granularity, Importance


def score_pass(
    handle: PatchHandle, batches: Iterable[Any], granularity: Granularity, autocast: bool, neurons: bool = False
) -> Importance:
    """Scores heads and FFNs in one pass over the training rows: dropout off, no weight gradient computed.

    Args:
        handle: the patched, fine-tuned model; left in evaluation mode.
        batches: of the training split, with labels, as the model's keyword arguments; moved to its device.
        granularity: "example", "token" or "batch".
        autocast: whether to run under bfloat16 autocast.
        neurons: whether to score single neurons too.

    Returns:
        The average importance over the rows.

    Source: arXiv 2105.12002, section 3.
    """
    model = handle.model
    model.eval()
    model.zero_grad(set_to_none=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with handle.record_importance(granularity, neurons=neurons) as importance:
            for batch in batches:
                batch = {key: value.to(model.device) for key, value in batch.items()}
                with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                    loss = model(**batch).loss
                loss.backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return importance


class LastEpochScorer(TrainerCallback):
    """Records importance while the last epoch trains: no extra pass, but dropout on and weights still moving.

    Args:
        handle: the patched model that trains.
        granularity: "example", "token" or "batch".
        neurons: whether to score single neurons too.
    """

    def __init__(self, handle: PatchHandle, granularity: Granularity, neurons: bool = False):
        self.importance: Importance | None = None
        self._handle = handle
        self._granularity = granularity
        self._neurons = neurons
        self._open = contextlib.ExitStack()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts to record when the last epoch begins."""
        if state.global_step >= state.max_steps - state.max_steps // int(args.num_train_epochs):
            self.importance = self._open.enter_context(
                self._handle.record_importance(self._granularity, neurons=self._neurons)
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stops recording."""
        self._open.close()
