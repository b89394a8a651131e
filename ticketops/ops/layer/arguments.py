"""What the backends of a layer are handed, what their forward passes keep for their backward passes, and what both read
out of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.ops.packing import Sequences


class Weights(NamedTuple):
    """The parameters of a layer, with which places of them are computed.

    Attributes:
        wq, wk, wv: [H * D, C] projections of all heads.
        bq, bk, bv: [H * D] their biases.
        wo: [C, H * D] output projection.
        bo: [C] its bias.
        gamma1, beta1: [C] LayerNorm after attention.
        w1, b1: [N, C] and [N], first linear layer of the FFN; None where the FFN is not computed.
        w2, b2: [C, N] and [C], its second.
        gamma2, beta2: [C] LayerNorm after the FFN.
        heads: int64 [K], the computed heads in ascending order; None for all.
        neurons: int64, the FFN's computed neurons in ascending order; None for all.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    bq: Tensor
    bk: Tensor
    bv: Tensor
    wo: Tensor
    bo: Tensor
    gamma1: Tensor
    beta1: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    gamma2: Tensor
    beta2: Tensor
    heads: Tensor | None
    neurons: Tensor | None

    def ffn(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """w1, b1, w2 and b2; None where the FFN is not computed."""
        if self.w1 is None or self.b1 is None or self.w2 is None or self.b2 is None:
            return None
        return self.w1, self.b1, self.w2, self.b2


#: Of Weights: the parameters, which come first.
PARAMETERS = 16


class Settings(NamedTuple):
    """What of a call is no tensor.

    Attributes:
        max_length: tokens of the longest sequence.
        head_dim: D.
        scale: multiplies the scores of attention.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
        attention_dropout, output_dropout, ffn_dropout: probabilities, of attention weights and the results of attention
            and FFN.
        eps1, eps2: of the two LayerNorms.
        dtype: of the products.
        first_tokens: only each sequence's first token is wanted.
    """

    max_length: int
    head_dim: int
    scale: float
    activation: str
    attention_dropout: float
    output_dropout: float
    ffn_dropout: float
    eps1: float
    eps2: float
    dtype: torch.dtype
    first_tokens: bool


class Inputs(NamedTuple):
    """The tensors of a call.

    Attributes:
        x: [T, C] tokens.
        weights: of the layer.
        starts, lengths: int32 [B], of the sequences.
        seeds: int64, one of each dropout that there is; None without any.
    """

    x: Tensor
    weights: Weights
    starts: Tensor
    lengths: Tensor
    seeds: Tensor | None

    def heads(self, settings: Settings) -> tuple[int, int]:
        """How many heads the weights have, and how many of them are computed."""
        there = self.weights.wq.shape[0] // settings.head_dim
        return there, there if self.weights.heads is None else self.weights.heads.shape[0]

    def rows(self, settings: Settings) -> Tensor | None:
        """Of the tokens, those that somebody reads behind attention, int64 [B]; None for all."""
        if not settings.first_tokens:
            return None
        return Sequences(self.starts, self.lengths, settings.max_length).first_rows(self.x.shape[0])

    def left(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Starts and lengths of the sequences behind attention, of each of which a first token may be all."""
        if not settings.first_tokens:
            return self.starts, self.lengths
        batch = self.lengths.shape[0]
        return torch.arange(batch, dtype=torch.int32, device=self.x.device), torch.ones_like(self.lengths)


class Saved(NamedTuple):
    """What the backward pass is handed beside the inputs; empty where there is nothing to keep.

    Attributes:
        cast_x: [T, C], in the dtype of the products as all that follow but for statistics and `middle`.
        qkv: [T, 3, K, D].
        context: [T, K, D].
        lse: float32 [T, K].
        projected: what attention adds to the residual stream, before its bias.
        mean1, rstd1: float32, of each row of the first LayerNorm.
        middle: its result.
        cast_middle: the same, cast.
        pre, hidden: before and behind the activation.
        output: of the FFN.
        mean2, rstd2: of the second LayerNorm.
        w_qkv, w_o, w_1, w_2: the weights that took part where the parameters themselves did not.
    """

    cast_x: Tensor
    qkv: Tensor
    context: Tensor
    lse: Tensor
    projected: Tensor
    mean1: Tensor
    rstd1: Tensor
    middle: Tensor
    cast_middle: Tensor
    pre: Tensor
    hidden: Tensor
    output: Tensor
    mean2: Tensor
    rstd2: Tensor
    w_qkv: Tensor
    w_o: Tensor
    w_1: Tensor
    w_2: Tensor


class Wanted(NamedTuple):
    """What is wanted of a backward pass; nothing else is computed.

    Attributes:
        tokens: the gradient of x.
        parameters: for each of the parameters its gradient.
        head_sums: the importance of heads.
        ffn_sums: that of the FFN.
        neuron_sums: that of its neurons.
        per_token: neurons' importance sums absolute values.
    """

    tokens: bool
    parameters: list[bool]
    head_sums: bool
    ffn_sums: bool
    neuron_sums: bool
    per_token: bool

    def any(self, *names: str) -> bool:
        """True if the gradient of any of some parameters is wanted, by their names in Weights."""
        return any(self.parameters[Weights._fields.index(name)] for name in names)

    def attention(self) -> bool:
        """True if the gradients of q, k and v are wanted, or the importance of heads, which is found with them."""
        return self.tokens or self.head_sums or any(self.parameters[:6])

    def projected(self) -> bool:
        """True if the gradient of what attention adds to the residual stream is wanted, or that of the stream."""
        return self.attention() or any(self.parameters[6:10])

    def inner(self) -> bool:
        """True if the gradient of the activation's input is wanted, or the importance of neurons, which is found with
        it."""
        return self.projected() or self.neuron_sums or self.any("w1", "b1")


def needed(saved: Saved, wanted: Wanted, none: Tensor) -> Saved:
    """What a backward pass will read of what a forward pass keeps.

    Args:
        saved: all of it.
        wanted: of the backward pass.
        none: stands in for the rest.
    """
    read = {
        "cast_x": wanted.any("wq", "wk", "wv"),
        "qkv": wanted.attention(),
        "context": wanted.attention() or wanted.any("wo"),
        "lse": wanted.attention(),
        "cast_middle": wanted.any("w1"),
        "pre": wanted.inner(),
        "hidden": wanted.neuron_sums or wanted.any("w2"),
        "w_qkv": wanted.tokens,
        "w_o": wanted.attention(),
        "w_1": wanted.projected(),
        "w_2": wanted.inner(),
    }
    return saved._replace(**{name: none for name, there in read.items() if not there})


#: Results of a backward pass: dx, five importance partials, the gradients of the parameters.
GRADIENTS = 6 + PARAMETERS


def seeds_of(seeds: Tensor | None, settings: Settings) -> Iterator[Tensor | None]:
    """The seed of each dropout that there is.

    Args:
        seeds: those of all that there are; None without any.
        settings: have the probabilities.

    Yields:
        For each dropout its seed [1], or None.
    """
    drawn = iter(() if seeds is None else seeds.split(1))
    for p in (settings.attention_dropout, settings.output_dropout, settings.ffn_dropout):
        yield next(drawn, None) if p else None


def as_given(x: Tensor) -> AbstractContextManager[Any]:
    """In which autocast leaves products alone; where it is off, as in backward passes, entering it takes longer.

    Args:
        x: on the device of the products.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """x's rows, or all of x."""
    return x if rows is None else x.index_select(0, rows)


def in_order(gradients: dict[str, Tensor]) -> Iterator[Tensor | None]:
    """The gradients of the parameters as a backward pass returns them.

    Args:
        gradients: by the names of Weights.

    Yields:
        Each, None where there is none.
    """
    return map(gradients.get, Weights._fields[:PARAMETERS])


def results(out: Tensor, saved: Saved, none: Tensor) -> tuple[Tensor, ...]:
    """What a forward pass returns. An op's results must be tensors of their own.

    Args:
        out: the layer's result.
        saved: for the backward pass.
        none: stands in it where there is nothing to keep.
    """
    return out, *(out.new_empty(0) if kept is none else kept for kept in saved)
