"""Whole encoder layers as one autograd op, on the backends that support it: attention and FFN of the structures that a
ticket keeps, each with its projections, dropout, residual and LayerNorm.

LayerNorm may be after each sublayer or before it, the FFN gated, positions rotary, attention within a window, biases
absent. The layer is defined by the other ops of this package. One op for all layers instead of seven for each saves
time on small batches: autograd is entered once (not at all without gradients), activations and weights are cast once,
and gradients are added up without separate passes. On a CPU, inference of few tokens, such as one sentence, is a single
kernel a layer for layers like BERT's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import backends, private
from ticketops.ops.dropout import draw_seed
from ticketops.ops.layer import native
from ticketops.ops.layer.arguments import Inputs, Settings, Weights
from ticketops.ops.layer.chain import Call, differentiable
from ticketops.ops.layer.registered import encoder_layer_op, module_of
from ticketops.ops.packing import Sequences
from ticketops.ops.products import compute_dtype
from ticketops.ops.registration import check_devices, is_watched


def serves_layer(x: Tensor, weights: Tensor) -> bool:
    """True if `encoder_layer` supports a layer on this device and dtype. Otherwise, use the other ops.

    Args:
        x: [.., C] tokens.
        weights: any weight of the layer.
    """
    dtype = compute_dtype(x)
    if x.dtype != weights.dtype or x.dtype not in (torch.float32, dtype):
        return False
    backend = backends.common("attention", "ffn", "residual", device=x.device, dtype=dtype)
    return backend in ("native", "triton")


class Layer(NamedTuple):
    """An encoder layer, as a call computes it.

    With S a sublayer (attention or the FFN) and its dropout, a layer is y = LayerNorm(x + S(x)) for each, or with
    `norm_first` y = x + S(LayerNorm(x)).

    Attributes:
        weights: parameters of the layer, in the tokens' dtype. LayerNorms may have another, a position bias has
            float32, position keys and queries have that of the matrix products, which run in autocast's dtype if
            autocast is on.
        head_dim: D.
        scale: multiplies the attention scores.
        activation: "gelu" (erf), "gelu_tanh", "relu" or "silu".
        norm_first: True for a LayerNorm before each sublayer, False for one after it.
        gated: True if the FFN has a gate.
        window: number of tokens to either side that a token attends to; None for the whole sequence.
        rotary: cosines and sines [T, D] of the tokens' positions, which turn queries and keys, see
            `ticketops.ops.rotary`; None for none.
        dropouts: probabilities in [0, 1) for attention weights, the output of attention and the output of the FFN.
        inner_dropout: probability in [0, 1) for the activations within the FFN.
        eps: added to the variance in the first and second LayerNorm.
        head_importance: [B, K] float tensor that requires a gradient, as a sink: its gradient is the importance of the
            computed heads, see `ticketops.ops.attention`.
        ffn_importance: [B], a sink for the importance of the FFN, see `ticketops.ops.ffn`.
        neuron_importance: [B, computed neurons], a sink for the importance of neurons.
        per_token: True sums the absolute values of the tokens' terms.
        first_tokens: True returns the first token of each sequence only, for a task head that reads no other. Other
            tokens only serve as keys and values. Requires at least one token in the batch.
    """

    weights: Weights
    head_dim: int
    scale: float
    activation: str
    norm_first: bool = False
    gated: bool = False
    window: int | None = None
    rotary: tuple[Tensor, Tensor] | None = None
    dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    inner_dropout: float = 0.0
    eps: tuple[float, float] = (1e-12, 1e-12)
    head_importance: Tensor | None = None
    ffn_importance: Tensor | None = None
    neuron_importance: Tensor | None = None
    per_token: bool = False
    first_tokens: bool = False


def encoder_layer(x: Tensor, weights: Weights, sequences: Sequences, **options: Any) -> Tensor:
    """Computes one encoder layer, see `encoder_layers`.

    Args:
        x: [T, C] tokens.
        weights: parameters of the layer.
        sequences: rows of each sequence.
        options: the other fields of `Layer`.
    """
    return encoder_layers(x, [Layer(weights, **options)], sequences)


def encoder_layers(x: Tensor, layers: Sequence[Layer], sequences: Sequences) -> Tensor:
    """Computes encoder layers, one after the other, as one node of autograd. Requires `serves_layer`.

    Args:
        x: [T, C] tokens; float32, or half precision in a half-precision model.
        layers: at least one, in their order. Only the last one may have `first_tokens`.
        sequences: rows of each sequence.

    Returns:
        [T, C] in x's dtype; with `first_tokens` [B, C], in which rows of empty sequences are finite but arbitrary, and
        must not get a gradient.

    Raises:
        InputError: tensors are on different devices, a parameter's dtype differs from the tokens', or there is no
            LayerNorm after attention.
    """
    calls = _calls(x, layers, sequences)
    given = [(*call.tensors(), *call.sinks) for call in calls]
    tensors = [each for some in given for each in some]
    needs_gradient = torch.is_grad_enabled() and any(each is not None and each.requires_grad for each in tensors)
    if is_watched(*tensors) or (needs_gradient and private.has_saving_hooks()):
        # Whoever traces, counts or saves sees one op for each layer.
        for call in calls:
            x = encoder_layer_op(*call.of(x).tensors(), *call.sinks, *call.settings, call.per_token)
        return x
    for some in given:
        check_devices("encoder_layer", _NAMES, some)
    if needs_gradient:
        return differentiable(x, calls)
    module, half = module_of(x), calls[0].settings.dtype == torch.bfloat16
    for call in calls:
        inputs, settings = call.of(x).inputs, call.settings
        few = module is native and inputs.seeds is None and native.is_few(len(x), half)
        infers = few and native.infers(inputs, settings)
        x = native.infer(inputs, settings) if infers else module.forward(inputs, settings, keep=False)[0]
    return x


def _calls(x: Tensor, layers: Sequence[Layer], sequences: Sequences) -> list[Call]:
    """Checks layers, and draws the seeds of their dropouts."""
    dtype, rows = compute_dtype(x), (sequences.starts, sequences.lengths, sequences.real)
    calls, draws = [], []
    for layer in layers:
        w, window = layer.weights, layer.window
        _check_dtypes(x, w, dtype)
        if w.gamma1 is None and not layer.norm_first:
            raise InputError("encoder_layer needs gamma1 for a LayerNorm after attention: give it, or norm_first=True")
        if window is not None and window >= sequences.max_length - 1:
            # The window covers every sequence, so use the cheaper kernels without one.
            window = None
        attends, feeds = w.heads is None or len(w.heads) > 0, w.w1 is not None
        # With LayerNorm first, nothing is dropped of what is not computed.
        whole = attends or not layer.norm_first or w.bo is not None
        computed, (first, second, last) = (attends, whole, feeds, feeds), layer.dropouts
        rates = (first, second, layer.inner_dropout, last)
        drops = [p if there else 0.0 for p, there in zip(rates, computed, strict=True)]
        settings = Settings(
            *(sequences.max_length, layer.head_dim, layer.scale, layer.activation, drops, list(layer.eps), dtype),
            *(layer.first_tokens, layer.norm_first, layer.gated, window),
        )
        inputs = Inputs(x, w, *rows, None, *(layer.rotary or (None, None)))
        sinks = layer.head_importance, layer.ffn_importance, layer.neuron_importance
        calls.append(Call(inputs, sinks, settings, layer.per_token))
        draws.append(sum(p > 0 for p in drops))
    if not any(draws):
        return calls
    seeds = draw_seed(x.device, sum(draws))
    parts = [seeds] if len(draws) == 1 else seeds.split_with_sizes(draws)
    return [
        call._replace(inputs=call.inputs._replace(seeds=part)) if count else call
        for call, part, count in zip(calls, parts, draws, strict=True)
    ]


#: Names of the tensors that a caller passes, for error messages.
_NAMES = ("x", *Weights._fields, *Inputs._fields[2:], "head_importance", "ffn_importance", "neuron_importance")
#: Parameters of the LayerNorms, whose dtype may differ: a half-precision model may keep them in float32.
_NORMS = ("gamma1", "beta1", "gamma2", "beta2")


#: Number of parameters that have the dtype of the tokens; they are the first fields of Weights.
_WITH_DTYPE = Weights._fields.index("position_bias")


def _check_dtypes(x: Tensor, weights: Weights, dtype: torch.dtype) -> None:
    """Raises InputError if a parameter has a dtype that the layer's matrix products, in `dtype`, do not support."""
    parameters = weights[:_WITH_DTYPE]
    for name, wanted in (("position_bias", torch.float32), ("position_keys", dtype), ("position_queries", dtype)):
        table = getattr(weights, name)
        if table is not None and table.dtype != wanted:
            raise InputError(f"encoder_layer needs {name} in {wanted}, got {table.dtype}: convert it")
    for name, parameter in zip(Weights._fields, parameters, strict=False):
        if parameter is None or parameter.dtype == x.dtype:
            continue
        if name not in _NORMS or not parameter.is_floating_point() or parameter.dtype == torch.float64:
            raise InputError(
                f"encoder_layer needs {name} in the dtype of its tokens, {x.dtype}, got {parameter.dtype}: convert the "
                "layer to one dtype, of which only LayerNorms may be left out"
            )
