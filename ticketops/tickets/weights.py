"""Numbers of weights in a model and in each prunable structure."""

from dataclasses import dataclass

from ticketops.errors import InputError


@dataclass(frozen=True)
class WeightCounts:
    """Numbers of weights of a model, for computing the share that a ticket keeps.

    Args:
        head: weights removed with one head: its rows of W_q, W_k, W_v with their biases, its columns of W_o.
        ffn: weights removed with one FFN: both linears with their biases.
        encoder: all weights of the encoder layers.
        total: all weights of the model, embeddings and task head included.
        neuron: weights removed with one neuron of an FFN: its row of the first linear layer with its bias, its column
            of the second.

    Raises:
        InputError: a number is negative, or a part is larger than the whole.
    """

    head: int
    ffn: int
    encoder: int
    total: int
    neuron: int = 0

    def __post_init__(self) -> None:
        if min(self.head, self.ffn, self.neuron) < 0 or not 0 < self.encoder <= self.total:
            raise InputError(f"{self} is not a model: head, ffn and neuron must be >= 0 and 0 < encoder <= total")
