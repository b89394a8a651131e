"""What a model costs: parameters, multiply-accumulates, bytes, time; of the whole model and of what a ticket left."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ticketops.models.inputs import Inputs
from ticketops.models.record import head_dim, held_ticket, kept_neurons, num_neurons
from ticketops.models.registry import find_adapter
from ticketops.tickets import Ticket


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: of the whole model, shared ones once.
        macs_per_token: multiply-accumulates of the encoder's layers for one token among `length`, on average.
        bytes: of the parameters.
        length: tokens of a sequence, all of which attend to each other.
    """

    parameters: int
    macs_per_token: int
    bytes: int
    length: int = 128


def costs(model: PreTrainedModel, length: int | None = None, ticket: Ticket | None = None) -> tuple[Cost, Cost]:
    """Counts what a model costs, and what its architecture does with nothing removed.

    Args:
        model: stock, patched or shrunk.
        length: tokens of a sequence, all of which attend to each other; by default 128 of text, or an image's.
        ticket: counts what it would leave; by default what is only masked counts as there.

    Returns:
        The whole architecture's cost, and the model's.

    Raises:
        InputError: a ticket of another shape.
        UnsupportedError: a model that ticketops does not serve.
    """
    adapter, base = find_adapter(model)
    length = adapter.inputs.length(base.config) if length is None else length
    held, hidden, dim = held_ticket(base.config), base.config.hidden_size, head_dim(base.config)
    width = num_neurons(base.config)
    # A head's share of q, k, v and o, and its scores and contexts with every token within reach.
    reach = [_reach(length, window) for window in adapter.windows(base.config)]
    head = torch.tensor([4 * hidden * dim + 2 * dim * tokens // max(length, 1) for tokens in reach])
    neuron = (2 + adapter.gated) * hidden
    head_weights, neuron_weights, rest = adapter.weights(base.config)
    size = next(model.parameters()).element_size()
    present = sum(parameter.numel() for parameter in model.parameters())

    def weights(of: Ticket) -> int:
        """Of the layers' parts that a ticket keeps."""
        heads, neurons = int(of.head_mask.sum()), int(kept_neurons(of, width).sum())
        return heads * head_weights + neurons * neuron_weights + int(of.ffn_mask.sum()) * rest

    def cost(of: Ticket) -> Cost:
        parameters = present + weights(of) - weights(held)
        heads, neurons = int((of.head_mask.sum(1) * head).sum()), int(kept_neurons(of, width).sum()) * neuron
        return Cost(parameters, heads + neurons, parameters * size, length)

    if ticket is not None:
        ticket.check(held.num_layers, held.num_heads, width)
    return cost(Ticket.full(held.num_layers, held.num_heads)), cost(held if ticket is None else held & ticket)


def _reach(length: int, window: int | None) -> int:
    """Pairs of tokens of a sequence that attend to each other, both ways."""
    if window is None or window >= length - 1:
        return length * length
    # Each token sees 2 w + 1, less what lies beyond either end.
    return length * (2 * window + 1) - window * (window + 1)


def latencies(
    whole: PreTrainedModel,
    left: PreTrainedModel,
    batches: Iterable[int] = (1, 8, 32),
    lengths: Iterable[int] = (32, 128),
    turns: int = 7,
) -> list[dict[str, Any]]:
    """Measures how long two models take for a batch without padding, in turns, since a machine's speed drifts.

    Args:
        whole, left: the same task head on the same device, in evaluation mode, patched or stock.
        batches: sequences a batch.
        lengths: tokens a sequence; those beyond the models' positions are left out, and images have only theirs.
        turns: of each model at most; after 5 seconds no more are begun.

    Returns:
        One row a batch and length: `batch`, `length`; the medians `whole_ms` and `left_ms` in milliseconds and their
        lower and upper quartiles over the turns, `whole_quartiles_ms` and `left_quartiles_ms`; and `turns`, each turn's
        pair of times.
    """
    inputs: Inputs = find_adapter(whole)[0].inputs
    rows = []
    for length in inputs.lengths(whole.base_model, lengths):
        for batch in batches:
            arguments = inputs.draw(whole.config, batch, length, whole.device)
            models = list(enumerate((whole, left)))
            for _, model in models:
                # The first time warms up.
                _milliseconds(model, arguments)
            times: list[list[float]] = []
            end = time.perf_counter() + 5
            while not times or (len(times) < turns and time.perf_counter() < end):
                times.append([0.0, 0.0])
                # Either is first in every other turn: what one leaves in the caches touches the next.
                for place, model in models if len(times) % 2 else models[::-1]:
                    times[-1][place] = _milliseconds(model, arguments)
            row: dict[str, Any] = {"batch": batch, "length": length}
            for name, values in zip(("whole", "left"), np.array(times).T, strict=True):
                low, median, high = np.percentile(values, (25, 50, 75)).round(3).tolist()
                row |= {f"{name}_ms": median, f"{name}_quartiles_ms": [low, high]}
            rows.append({**row, "turns": np.array(times).round(4).tolist()})
    return rows


@torch.inference_mode()
def _milliseconds(model: PreTrainedModel, arguments: dict[str, Tensor]) -> float:
    def wait() -> None:
        if model.device.type == "cuda":
            torch.cuda.synchronize(model.device)

    wait()
    start = time.perf_counter()
    model(**arguments)
    wait()
    return 1e3 * (time.perf_counter() - start)
