"""What a model costs: parameters, multiply-accumulates, bytes; of the whole model and of what a ticket left."""

from dataclasses import dataclass

from transformers import PreTrainedModel

from ticketops.models.patch import find_adapter
from ticketops.models.record import head_dim, held_ticket, kept_neurons, num_neurons


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: of the whole model, shared ones once.
        macs_per_token: multiply-accumulates of the encoder's layers for one token among `length`.
        bytes: of the parameters.
    """

    parameters: int
    macs_per_token: int
    bytes: int


def costs(model: PreTrainedModel, length: int = 128) -> tuple[Cost, Cost]:
    """Counts what a model costs, and what its architecture does with nothing removed.

    Args:
        model: stock, patched or shrunk; what is only masked counts as there.
        length: tokens of a sequence, all of which attend to each other.

    Returns:
        The whole architecture's cost, and the model's.

    Raises:
        UnsupportedError: a model that ticketops does not serve.
    """
    _, base = find_adapter(model)
    held, hidden, dim = held_ticket(base.config), base.config.hidden_size, head_dim(base.config)
    width = num_neurons(base.config)
    # A head's share of q, k, v and o, and its scores and contexts with every token.
    head, neuron = 4 * hidden * dim + 2 * dim * length, 2 * hidden
    heads, neurons = int(held.head_mask.sum()), int(kept_neurons(held, width).sum())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    removed = held.heads_pruned * (3 * (hidden + 1) * dim + dim * hidden) + held.ffns_pruned * hidden
    removed += (held.num_layers * width - neurons) * (neuron + 1)
    size = next(model.parameters()).element_size()
    return (
        Cost(
            parameters + removed,
            held.num_layers * (held.num_heads * head + width * neuron),
            (parameters + removed) * size,
        ),
        Cost(parameters, heads * head + neurons * neuron, parameters * size),
    )
