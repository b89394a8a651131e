"""What the backends of a layer are handed, and what their forward passes keep for their backward passes."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor


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


#: Of Weights: the parameters, which come first.
PARAMETERS = 16


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
        bf16: the products are in bfloat16.
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
    bf16: bool
    first_tokens: bool


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
    """What is wanted of a backward pass beside the gradient of the tokens and the importance of heads.

    Attributes:
        weight_gradients: those of the parameters.
        ffn_sums: the importance of the FFN.
        neuron_sums: that of its neurons.
        per_token: neurons' importance sums absolute values.
    """

    weight_gradients: bool
    ffn_sums: bool
    neuron_sums: bool
    per_token: bool


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
