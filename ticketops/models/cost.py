"""Cost of a model, whole and shrunk: parameters, multiply-accumulates, bytes, latency."""

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
    """Cost of a model.

    Attributes:
        parameters: number of parameters, embeddings and head included; shared ones count once.
        macs_per_token: multiply-accumulates in the encoder's layers per token, averaged over a sequence of `length`.
        bytes: bytes of the parameters.
        length: tokens per sequence, without padding.
    """

    parameters: int
    macs_per_token: int
    bytes: int
    length: int = 128


def costs(model: PreTrainedModel, length: int | None = None, ticket: Ticket | None = None) -> tuple[Cost, Cost]:
    """Computes the cost of a model and of its whole architecture.

    Args:
        model: stock, patched or shrunk model.
        length: tokens per sequence, without padding; by default 128 for text, or the tokens of an image.
        ticket: if given, the cost is that of the model shrunk to it. Otherwise structures that an applied ticket masks
            count as present.

    Returns:
        Costs of the whole architecture and of the model.

    Raises:
        InputError: the ticket has another shape.
        UnsupportedError: ticketops does not support the model.
    """
    adapter, base = find_adapter(model)
    length = adapter.inputs.length(base.config) if length is None else length
    held, hidden, dim = held_ticket(base.config), base.config.hidden_size, head_dim(base.config)
    width = num_neurons(base.config)
    # Per token: a head's part of q, k, v and o, and its scores and contexts over all tokens in the window. What is
    # projected once for all sequences, position vectors, is not counted.
    reach = [_reach(length, window) for window in adapter.windows(base.config)]
    products = 2 + adapter.position_terms(base.config)[0]
    head = torch.tensor([4 * hidden * dim + products * dim * tokens // max(length, 1) for tokens in reach])
    neuron = (2 + adapter.gated) * hidden
    head_weights, neuron_weights, rest = adapter.weights(base.config)
    size = next(model.parameters()).element_size()
    present = sum(parameter.numel() for parameter in model.parameters())

    def weights(of: Ticket) -> int:
        """Returns the number of weights in the structures that a ticket keeps."""
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
    """Returns the number of (query, key) pairs of a sequence that are at most `window` tokens apart."""
    if window is None or window >= length - 1:
        return length * length
    # Each token attends to 2 window + 1 tokens, minus those beyond the sequence's ends.
    return length * (2 * window + 1) - window * (window + 1)


def latencies(
    whole: PreTrainedModel,
    left: PreTrainedModel,
    batches: Iterable[int] = (1, 8, 32),
    lengths: Iterable[int] = (32, 128),
    turns: int = 7,
) -> list[dict[str, Any]]:
    """Measures the latency of two models on batches without padding. They take turns, because a machine's speed drifts.

    Args:
        whole, left: whole and shrunk model with the same task head, on the same device, in evaluation mode, patched or
            stock.
        batches: batch sizes in sequences.
        lengths: tokens per sequence. Lengths beyond the models' positions are skipped; images have a fixed length.
        turns: maximum number of turns of each model; after 5 seconds no further turn starts.

    Returns:
        One row per batch size and length: `batch`, `length`; the medians `whole_ms` and `left_ms` in milliseconds and
            their
        lower and upper quartiles over the turns, `whole_quartiles_ms` and `left_quartiles_ms`; and `turns`, each turn's
        pair of times.
    """
    inputs: Inputs = find_adapter(whole)[0].inputs
    rows = []
    for length in inputs.lengths(whole.base_model, lengths):
        for batch in batches:
            arguments = inputs.draw(whole, batch, length)
            models = list(enumerate((whole, left)))
            for _, model in models:
                # Warm up.
                _milliseconds(model, arguments)
            times: list[list[float]] = []
            end = time.perf_counter() + 5
            while not times or (len(times) < turns and time.perf_counter() < end):
                times.append([0.0, 0.0])
                # Alternate the order, because each model's caches affect the next one.
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
