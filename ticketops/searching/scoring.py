"""Importance scores of a fine-tuned model, from a separate pass after training."""

import itertools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import send_to_device

from ticketops.launch import processes, rank
from ticketops.models import PatchHandle
from ticketops.models.drawing import of_all_processes
from ticketops.tickets import Importance


def score_pass(
    handle: PatchHandle,
    batches: Iterable[Any],
    autocast: bool,
    compute_loss: Callable[[Any, dict[str, Any]], Any],
    **options: Any,
) -> Importance:
    """Scores heads and FFNs in one pass over the training rows, without dropout and without weight gradients.

    Args:
        handle: handle of the patched, fine-tuned model; the model is left in evaluation mode.
        batches: batches of the training split: the model's keyword arguments, with labels; moved to its device.
        autocast: True to run under bfloat16 autocast.
        compute_loss: takes the model and a batch and returns the loss, as a Trainer's method of this name does.
        options: granularity, neurons and sequences_per_example of `PatchHandle.record_importance`.

    Returns:
        The importance, averaged over the rows.

    Source: arXiv 2105.12002, section 3.
    """
    model = handle.model
    model.eval()
    model.zero_grad(set_to_none=True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with handle.record_importance(**options) as importance:
            # Those that train together score together, each every so many batches.
            for batch in itertools.islice(batches, rank(), None, processes()):
                batch = send_to_device(batch, model.device, non_blocking=True)
                with torch.autocast(model.device.type, torch.bfloat16, enabled=autocast):
                    loss = compute_loss(model, batch)
                loss.backward()
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return of_all_processes(importance)
