"""Arguments of the encoder layer's backends: parameters, inputs and settings; tensors that the forward pass saves for
the backward pass; and the gradients wanted from it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.ops.packing import Sequences


class Weights(NamedTuple):
    """Parameters of a layer, and the heads and neurons that are computed.

    Attributes:
        wq, wk, wv: [H * D, C], projections of all heads.
        bq, bk, bv: [H * D], biases of these.
        wo: [C, H * D], output projection.
        bo: [C], bias of the output projection.
        gamma1, beta1: [C], LayerNorm after attention.
        w1, b1: [N, C] and [N], first linear layer of the FFN; None if the FFN is pruned.
        w2, b2: [C, N] and [C], second linear layer of the FFN; None if the FFN is pruned.
        gamma2, beta2: [C], LayerNorm after the FFN.
        position_bias: float32 [K, 2 R + 1], of the computed heads, see `ticketops.ops.attention`; None for no bias.
        heads: int64 [K], indices of the computed heads, ascending; None for all.
        neurons: int64 [n], indices of the computed neurons, ascending; None for all.
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
    position_bias: Tensor | None
    heads: Tensor | None
    neurons: Tensor | None

    def ffn(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Returns w1, b1, w2 and b2; None if the FFN is pruned."""
        if self.w1 is None or self.b1 is None or self.w2 is None or self.b2 is None:
            return None
        return self.w1, self.b1, self.w2, self.b2


#: Number of parameters in Weights; they are its first fields.
PARAMETERS = 17


class Settings(NamedTuple):
    """Non-tensor arguments of a call: sizes, probabilities, flags.

    Attributes:
        max_length: length of the longest sequence in tokens.
        head_dim: D.
        scale: multiplies the attention scores.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        attention_dropout, output_dropout, ffn_dropout: dropout probabilities of attention weights, the output of
            attention and the output of the FFN.
        eps1, eps2: added to the variance in the first and second LayerNorm.
        dtype: dtype of the matrix products.
        first_tokens: True computes the first token of each sequence only.
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
    """Tensor arguments of a call.

    Attributes:
        x: [T, C] tokens.
        weights: parameters of the layer.
        starts, lengths: int32 [B], first row and number of rows of each sequence.
        seeds: int64 [n], a seed for each dropout whose probability is not 0; None if there is none.
    """

    x: Tensor
    weights: Weights
    starts: Tensor
    lengths: Tensor
    seeds: Tensor | None

    def heads(self, settings: Settings) -> tuple[int, int]:
        """Returns the number of heads in the weights, and the number of heads that are computed."""
        all_heads = self.weights.wq.shape[0] // settings.head_dim
        return all_heads, all_heads if self.weights.heads is None else self.weights.heads.shape[0]

    def rows(self, settings: Settings) -> Tensor | None:
        """Returns the rows that are computed after attention: int64 [B] with `first_tokens`, else None for all."""
        if not settings.first_tokens:
            return None
        return Sequences(self.starts, self.lengths, settings.max_length).first_rows(self.x.shape[0])

    def spans_after_attention(self, settings: Settings) -> tuple[Tensor, Tensor]:
        """Returns the starts and lengths of the sequences after attention: with `first_tokens`, each has one token."""
        if not settings.first_tokens:
            return self.starts, self.lengths
        batch = self.lengths.shape[0]
        return torch.arange(batch, dtype=torch.int32, device=self.x.device), torch.ones_like(self.lengths)


class Saved(NamedTuple):
    """Tensors that the forward pass saves for the backward pass, in the dtype of the matrix products unless said
    otherwise; empty if not needed.

    Attributes:
        cast_x: [T, C], the tokens, cast.
        qkv: [T, 3, K, D], queries, keys and values.
        context: [T, K, D], output of attention before the output projection.
        lse: float32 [T, K], log-sum-exp of the scaled scores.
        projected: output of the output projection without its bias.
        mean1, rstd1: float32 statistics of each row in the first LayerNorm.
        middle: output of the first LayerNorm, in x's dtype.
        cast_middle: `middle`, cast.
        pre, hidden: input and output of the activation.
        output: output of the FFN's second linear layer; on a CPU without its bias.
        mean2, rstd2: float32 statistics of each row in the second LayerNorm.
        w_qkv, w_o, w_1, w_2: copies of weights that were used instead of the parameters, if these were cast, joined or
            compacted.
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
    """Flags for the results that a backward pass is to compute.

    Attributes:
        tokens: the gradient of x.
        parameters: a flag for the gradient of each parameter, in the order of Weights.
        head_sums: the importance of heads.
        ffn_sums: the importance of the FFN.
        neuron_sums: the importance of neurons.
        per_token: True sums the absolute values of the tokens' terms in the importance of neurons.
    """

    tokens: bool
    parameters: list[bool]
    head_sums: bool
    ffn_sums: bool
    neuron_sums: bool
    per_token: bool

    def any(self, *names: str) -> bool:
        """True if the gradient of any of the named parameters is wanted; the names are those of Weights."""
        return any(self.parameters[Weights._fields.index(name)] for name in names)

    def attention(self) -> bool:
        """True if attention's backward pass must run, for the gradients of q, k, v and the bias or the importance of
        heads."""
        return self.tokens or self.head_sums or any(self.parameters[:6]) or self.any("position_bias")

    def projected(self) -> bool:
        """True if the gradient of the first LayerNorm's input is needed: the residual plus the output of attention."""
        return self.attention() or any(self.parameters[6:10])

    def inner(self) -> bool:
        """True if the gradient of the activation's input is needed, or the importance of neurons, computed with it."""
        return self.projected() or self.neuron_sums or self.any("w1", "b1")


def needed(saved: Saved, wanted: Wanted, none: Tensor) -> Saved:
    """Drops saved tensors that the backward pass will not read.

    Args:
        saved: all tensors that the forward pass saved.
        wanted: results that the backward pass is to compute.
        none: empty tensor that replaces the dropped ones.
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
    return saved._replace(**{name: none for name, is_read in read.items() if not is_read})


#: Number of results of a backward pass: dx, five importance partials, the gradients of the parameters.
GRADIENTS = 6 + PARAMETERS


def seeds_of(seeds: Tensor | None, settings: Settings) -> Iterator[Tensor | None]:
    """Assigns seeds to the three dropouts of a layer.

    Args:
        seeds: int64 [n], a seed for each dropout whose probability is not 0; None if there is none.
        settings: settings with the probabilities.

    Yields:
        For each of the three dropouts its seed [1], or None if its probability is 0.
    """
    drawn = iter(() if seeds is None else seeds.split(1))
    for p in (settings.attention_dropout, settings.output_dropout, settings.ffn_dropout):
        yield next(drawn, None) if p else None


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which autocast is off. If it is off already, as in backward passes, the context does
    nothing, which is faster than torch.autocast.

    Args:
        x: a tensor on the device of the products.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def select(x: Tensor, rows: Tensor | None) -> Tensor:
    """Returns the given rows of x; all of x if `rows` is None."""
    return x if rows is None else x.index_select(0, rows)


def in_weights_order(gradients: dict[str, Tensor]) -> Iterator[Tensor | None]:
    """Orders the gradients of the parameters as in Weights.

    Args:
        gradients: gradients by their parameter's name in Weights.

    Yields:
        The gradient of each parameter, None if there is none.
    """
    return map(gradients.get, Weights._fields[:PARAMETERS])


def results(out: Tensor, saved: Saved, none: Tensor) -> tuple[Tensor, ...]:
    """Returns the results of a forward pass as one tuple. torch does not allow the same tensor twice in it, so every
    occurrence of `none` becomes a new empty tensor.

    Args:
        out: output of the layer.
        saved: tensors for the backward pass.
        none: placeholder in `saved` for tensors that are not needed.
    """
    return out, *(out.new_empty(0) if kept is none else kept for kept in saved)
