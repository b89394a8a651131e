"""Arguments of the encoder layer's backends: parameters, inputs and settings; tensors that the forward pass saves for
the backward pass; and the gradients wanted from it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.ops.ffn.reference import first_places
from ticketops.ops.packing import Sequences


class Weights(NamedTuple):
    """Parameters of a layer, and the heads and neurons that are computed.

    Attributes:
        wq, wk, wv: [H * D, C], projections of all heads. If wk and wv are None, wq [3 * H * D, C] has the rows of all
            three.
        bq, bk, bv: [H * D], biases of these, joined as the weights are; None for no biases.
        wo: [C, H * D], output projection.
        bo: [C], bias of the output projection; None for none.
        gamma1, beta1: [C], LayerNorm after attention, or with `norm_first` before it; beta1 is None for no bias, both
            are None for no LayerNorm before attention.
        w1, b1: [N, C] and [N], first linear layer of the FFN; w1 is None if the FFN is pruned, b1 for no bias. A gated
            FFN has [2N, C] and [2N], the gate's rows last.
        w2, b2: [C, N] and [C], second linear layer of the FFN; w2 is None if the FFN is pruned, b2 for no bias.
        gamma2, beta2: [C], LayerNorm after the FFN, or with `norm_first` before it; beta2 is None for no bias.
        position_bias: float32 [K, 2 R + 1], of the computed heads, see `ticketops.ops.attention`; None for no bias.
        position_keys, position_queries: [2 R + 1, K, D] in the dtype of the matrix products, of the computed heads, see
            `ticketops.ops.attention`; None for none.
        heads: int64 [K], indices of the computed heads, ascending; None for all.
        neurons: int64 [n], indices of the computed neurons, ascending; None for all.
    """

    wq: Tensor
    wk: Tensor | None
    wv: Tensor | None
    bq: Tensor | None
    bk: Tensor | None
    bv: Tensor | None
    wo: Tensor
    bo: Tensor | None
    gamma1: Tensor | None
    beta1: Tensor | None
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    gamma2: Tensor
    beta2: Tensor | None
    position_bias: Tensor | None
    position_keys: Tensor | None
    position_queries: Tensor | None
    heads: Tensor | None
    neurons: Tensor | None

    @property
    def projections(self) -> list[str]:
        """Names of the projections' weights: of q, k and v, or only of q if it has the rows of all three."""
        return ["wq"] if self.wk is None else ["wq", "wk", "wv"]

    @property
    def biases(self) -> list[str]:
        """Names of their biases; empty without biases."""
        return [] if self.bq is None else [name.replace("w", "b") for name in self.projections]

    def positions(self) -> tuple[Tensor | None, Tensor | None]:
        """Returns the position keys and the position queries."""
        return self.position_keys, self.position_queries

    def ffn(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None] | None:
        """Returns w1, b1, w2 and b2; None if the FFN is pruned."""
        if self.w1 is None or self.w2 is None:
            return None
        return self.w1, self.b1, self.w2, self.b2

    def has_all(self) -> bool:
        """True if the projections are apart, and every linear layer and LayerNorm has a bias."""
        ffn = () if self.w1 is None else (self.b1, self.b2)
        return all(parameter is not None for parameter in (*self[:10], self.gamma2, self.beta2, *ffn))


#: Number of parameters in Weights; they are its first fields.
PARAMETERS = 19
#: Their positions by name.
_PLACES = {name: place for place, name in enumerate(Weights._fields[:PARAMETERS])}


class Settings(NamedTuple):
    """Non-tensor arguments of a call: sizes, probabilities, flags.

    Attributes:
        max_length: length of the longest sequence in tokens.
        head_dim: D.
        scale: multiplies the attention scores.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        dropouts: dropout probabilities of attention weights, the output of attention, the FFN's activations and the
            output of the FFN.
        eps: added to the variance in the first and second LayerNorm.
        dtype: dtype of the matrix products.
        first_tokens: True computes the first token of each sequence only.
        norm_first: True for a LayerNorm before each sublayer, False for one after it.
        gated: True if the FFN has a gate.
        window: number of tokens to either side that a token attends to; None for the whole sequence.
    """

    max_length: int
    head_dim: int
    scale: float
    activation: str
    dropouts: list[float]
    eps: list[float]
    dtype: torch.dtype
    first_tokens: bool
    norm_first: bool
    gated: bool
    window: int | None


#: Of a parameter that is not divided: dimension, number of slices, and no indices. See `Inputs.slices`.
WHOLE = (0, 1, None)


class Inputs(NamedTuple):
    """Tensor arguments of a call.

    Attributes:
        x: [T, C] tokens.
        weights: parameters of the layer.
        starts, lengths: int32 [B], first row and number of rows of each sequence.
        real: bool [T], see `ticketops.ops.Sequences`; None for no holes.
        seeds: int64 [n], a seed for each dropout whose probability is not 0; None if there is none.
        cosines, sines: [T, D], rotary positions of the tokens, see `ticketops.ops.rotary`; None for none.
    """

    x: Tensor
    weights: Weights
    starts: Tensor
    lengths: Tensor
    real: Tensor | None
    seeds: Tensor | None
    cosines: Tensor | None
    sines: Tensor | None

    def heads(self, settings: Settings) -> tuple[int, int]:
        """Returns the number of heads in the weights, and the number of heads that are computed."""
        all_heads = self.weights.wq.shape[0] // (settings.head_dim * (3 // len(self.weights.projections)))
        return all_heads, all_heads if self.weights.heads is None else self.weights.heads.shape[0]

    def joined(self, settings: Settings) -> Tensor | None:
        """Returns the weight of q, k and v together if it is a parameter that products can read; else None."""
        w = self.weights
        return w.wq if w.wk is None and w.heads is None and w.wq.dtype == settings.dtype else None

    def slices(self, settings: Settings) -> dict[str, tuple[int, int, Tensor | None]]:
        """Returns how heads and neurons divide parameters: by the parameter's name the dimension, the number of slices,
        and the indices of those that are computed; None for all. Parameters that are not there are `WHOLE`."""
        w, (all_heads, _) = self.weights, self.heads(settings)
        heads, blocks = w.heads, 3 // len(w.projections)
        if heads is None and w.neurons is None:
            return {}
        if heads is not None and blocks > 1:
            heads = torch.cat([heads + all_heads * block for block in range(blocks)])
        found: dict[str, tuple[int, int, Tensor | None]] = dict.fromkeys(
            (*w.projections, *w.biases), (0, blocks * all_heads, heads)
        )
        found["wo"] = 1, all_heads, w.heads
        if w.w1 is not None and w.w2 is not None:
            count, neurons = w.w2.shape[1], w.neurons
            rows = None if neurons is None else first_places(neurons, count, settings.gated)
            found |= {"w1": (0, w.w1.shape[0], rows), "b1": (0, w.w1.shape[0], rows), "w2": (1, count, neurons)}
        return found

    def rows(self, settings: Settings) -> Tensor | None:
        """Returns the rows that are computed after attention: int64 [B] with `first_tokens`, else None for all."""
        if not settings.first_tokens:
            return None
        return Sequences(self.starts, self.lengths, settings.max_length).first_rows(self.x.shape[0])

    def norm_rows(self, settings: Settings) -> tuple[int, int]:
        """Returns the number of rows of the first and the second LayerNorm; 0 for one that is not computed."""
        w, tokens = self.weights, self.x.shape[0]
        rows = self.lengths.shape[0] if settings.first_tokens else tokens
        if not settings.norm_first:
            return rows, rows
        attends = self.heads(settings)[1] > 0
        return tokens if attends and w.gamma1 is not None else 0, 0 if w.w1 is None else rows

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
        attention_input: [T, C], input of the projections to q, k and v, if it is not x: cast, normed or both.
        qkv: [T, 3 * K * D], queries and keys, turned by their positions, and values.
        context: [T, K * D], output of attention before the output projection.
        lse: float32 [T, K], log-sum-exp of the scaled scores. On a GPU one vector has mean1, rstd1, mean2 and rstd2
            behind it, which are empty themselves.
        projected: output of the output projection without its bias.
        mean1, rstd1: float32 statistics of each row in the first LayerNorm.
        middle: output of the first LayerNorm after attention, in x's dtype.
        ffn_input: input of the FFN's first linear layer, if it is not `middle`: cast, or the output of a LayerNorm
            before the FFN.
        pre: input of the activation, and of the gate.
        hidden: input of the FFN's second linear layer.
        output: output of the FFN's second linear layer; on a CPU without its bias.
        mean2, rstd2: float32 statistics of each row in the second LayerNorm.
        w_qkv, w_o, w_1, w_2: copies of weights that were used instead of the parameters, if these were cast, joined or
            compacted.
    """

    attention_input: Tensor
    qkv: Tensor
    context: Tensor
    lse: Tensor
    projected: Tensor
    mean1: Tensor
    rstd1: Tensor
    middle: Tensor
    ffn_input: Tensor
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
        return True in [self.parameters[_PLACES[name]] for name in names]

    def all(self, *names: str) -> bool:
        """True if the gradients of all named parameters are wanted."""
        return False not in [self.parameters[_PLACES[name]] for name in names]

    def before_attention(self, settings: Settings) -> bool:
        """True if the gradient of the input of q, k and v is needed."""
        return self.tokens or (settings.norm_first and self.any("gamma1", "beta1"))

    def attention(self, settings: Settings) -> bool:
        """True if attention's backward pass must run, for the gradients of q, k, v and of what depends on distances, or
        for the importance of heads."""
        others = self.head_sums or any(self.parameters[:6])
        others = others or self.any("position_bias", "position_keys", "position_queries")
        return others or self.before_attention(settings)

    def projected(self, settings: Settings) -> bool:
        """True if the gradient of the residual plus the output of attention is needed."""
        norm = self.any("gamma2", "beta2") if settings.norm_first else self.any("gamma1", "beta1")
        return norm or self.attention(settings) or self.any("wo", "bo")

    def inner(self, settings: Settings) -> bool:
        """True if the gradient of the activation's input is needed, or the importance of neurons, computed with it."""
        return self.projected(settings) or self.neuron_sums or self.any("w1", "b1")


def needed(saved: Saved, wanted: Wanted, settings: Settings) -> Saved:
    """Replaces saved tensors that the backward pass will not read by empty ones.

    Args:
        saved: all tensors that the forward pass saved.
        wanted: results that the backward pass is to compute.
        settings: of the call.
    """
    attention, projected, inner = wanted.attention(settings), wanted.projected(settings), wanted.inner(settings)
    read = {
        "attention_input": wanted.any("wq", "wk", "wv"),
        "qkv": attention,
        "context": attention or wanted.any("wo"),
        "ffn_input": wanted.any("w1"),
        "pre": inner,
        "hidden": wanted.neuron_sums or wanted.any("w2"),
        "w_qkv": wanted.before_attention(settings),
        "w_o": attention,
        "w_1": projected,
        "w_2": inner,
    }
    if all(read.values()):
        return saved
    none = saved.qkv.new_empty(0)
    return saved._replace(**{name: none for name, is_read in read.items() if not is_read})


#: Number of results of a backward pass: dx, five importance partials, the gradients of the parameters.
GRADIENTS = 6 + PARAMETERS


def seeds_of(
    seeds: Tensor | None, settings: Settings, split: Callable[[Tensor], Iterable[Any]] = lambda seeds: seeds.split(1)
) -> Iterator[Any]:
    """Assigns seeds to the dropouts of a layer.

    Args:
        seeds: int64 [n], a seed for each dropout whose probability is not 0; None if there is none.
        settings: settings with the probabilities.
        split: divides the seeds into single ones.

    Yields:
        For the dropouts of attention weights, attention's output, activations and the FFN's output, its seed [1], or
        None if its probability is 0.
    """
    drawn = iter(() if seeds is None else split(seeds))
    for p in settings.dropouts:
        yield next(drawn, None) if p else None


_NOTHING = nullcontext()


def autocast_off(x: Tensor) -> AbstractContextManager[Any]:
    """Returns a context in which autocast is off. If it is off already, as in backward passes, the context does
    nothing, which is faster than torch.autocast.

    Args:
        x: a tensor on the device of the products.
    """
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else _NOTHING


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
