"""A whole encoder layer as one autograd op, on the backends that support it: attention and FFN of the structures that a
ticket keeps, each with its projections, dropout, residual and LayerNorm.

LayerNorm may be after each sublayer or before it, the FFN gated, positions rotary, attention within a window, biases
absent. The layer is defined by the other ops of this package. One op instead of seven saves time on small batches:
autograd is entered once (not at all without gradients), activations and weights are cast once, and gradients are added
up without separate passes. On a CPU, inference of few tokens, such as one sentence, is a single kernel for layers like
BERT's.
"""

import importlib
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import backends
from ticketops.ops.dropout import draw_seed
from ticketops.ops.layer import native
from ticketops.ops.layer.arguments import GRADIENTS, PARAMETERS, Inputs, Saved, Settings, Wanted, Weights, needed
from ticketops.ops.packing import Sequences
from ticketops.ops.products import compute_dtype
from ticketops.ops.registration import check_devices, define, is_watched


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


def _module(x: Tensor) -> Any:
    """Returns the backend's module. Requires `serves_layer`."""
    return native if x.is_cpu and backends.requested() != "triton" else _triton()


@cache
def _triton() -> Any:
    # Imported on first use: Triton may be missing where its kernels cannot run.
    return importlib.import_module(f"{__name__}.triton")


def encoder_layer(
    x: Tensor,
    weights: Weights,
    sequences: Sequences,
    *,
    head_dim: int,
    scale: float,
    activation: str,
    norm_first: bool = False,
    gated: bool = False,
    window: int | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0),
    inner_dropout: float = 0.0,
    eps: tuple[float, float] = (1e-12, 1e-12),
    head_importance: Tensor | None = None,
    ffn_importance: Tensor | None = None,
    neuron_importance: Tensor | None = None,
    per_token: bool = False,
    first_tokens: bool = False,
) -> Tensor:
    """Computes one encoder layer. Requires `serves_layer`.

    With S a sublayer (attention or the FFN) and its dropout, a layer is y = LayerNorm(x + S(x)) for each, or with
    `norm_first` y = x + S(LayerNorm(x)).

    Args:
        x: [T, C] tokens; float32, or half precision in a half-precision model.
        weights: parameters of the layer, in x's dtype. LayerNorms may have another, a position bias has float32,
            position keys and queries have that of the matrix products, which run in autocast's dtype if autocast is on.
        sequences: rows of each sequence.
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

    Returns:
        [T, C] in x's dtype; with `first_tokens` [B, C], in which rows of empty sequences are finite but arbitrary, and
        must not get a gradient.

    Raises:
        InputError: tensors are on different devices, a parameter's dtype differs from the tokens', or there is no
            LayerNorm after attention.
    """
    cosines, sines = (None, None) if rotary is None else rotary
    rows = sequences.starts, sequences.lengths, sequences.real
    dtype = compute_dtype(x)
    _check_dtypes(x, weights, dtype)
    if weights.gamma1 is None and not norm_first:
        raise InputError("encoder_layer needs gamma1 for a LayerNorm after attention: give it, or norm_first=True")
    if window is not None and window >= sequences.max_length - 1:
        # The window covers every sequence, so use the cheaper kernels without one.
        window = None
    attends, feeds = weights.heads is None or len(weights.heads) > 0, weights.w1 is not None
    # With LayerNorm first, nothing is dropped of what is not computed.
    whole = attends or not norm_first or weights.bo is not None
    computed = (attends, whole, feeds, feeds)
    drops = [
        p if there else 0.0 for p, there in zip((*dropouts[:2], inner_dropout, dropouts[2]), computed, strict=True)
    ]
    seeds = draw_seed(x.device, sum(p > 0 for p in drops)) if any(drops) else None
    fixed = (head_dim, scale, activation, drops, list(eps), dtype, first_tokens, norm_first, gated, window)
    settings = Settings(sequences.max_length, *fixed)
    inputs = Inputs(x, weights, *rows, seeds, cosines, sines)
    if not (torch.is_grad_enabled() or is_watched(x, *weights, *inputs[2:])):
        check_devices("encoder_layer", _NAMES, (x, *weights, *rows, cosines, sines))
        module = _module(x)
        few = module is native and seeds is None and native.is_few(len(x), dtype == torch.bfloat16)
        if few and native.infers(inputs, settings):
            return native.infer(inputs, settings)
        out: Tensor = module.forward(inputs, settings, keep=False)[0]
        return out
    sinks = (head_importance, ffn_importance, neuron_importance)
    return _encoder_layer_op(x, *weights, *inputs[2:], *sinks, *settings, per_token)


#: Names of the tensors that a caller passes, for error messages.
_NAMES = ("x", *Weights._fields, "starts", "lengths", "real", "cosines", "sines")
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


#: The op's arguments are, in order: tensors, up to index _TENSORS; the three importance sinks, up to _SINKS; the fields
#: of Settings; and per_token.
_TENSORS = len(Weights._fields) + len(Inputs._fields) - 1
_SINKS = _TENSORS + 3


def _inputs(tensors: tuple[Any, ...]) -> Inputs:
    x, *weights = tensors[: 1 + len(Weights._fields)]
    return Inputs(x, Weights(*weights), *tensors[1 + len(Weights._fields) :])


def _forward(*arguments):
    inputs, settings = _inputs(arguments[:_TENSORS]), Settings(*arguments[_SINKS:-1])
    return _module(inputs.x).forward(inputs, settings)


def _fake_forward(*arguments):
    inputs, settings = _inputs(arguments[:_TENSORS]), Settings(*arguments[_SINKS:-1])
    return native.fake_forward(inputs, settings, on_gpu=_module(inputs.x) is not native)


def _split_backward(arguments):
    """Splits the backward op's arguments into dout, Inputs, Saved, Settings and Wanted."""
    dout, *tensors = arguments[: 1 + _TENSORS]
    others = arguments[1 + _TENSORS :]
    saved, others = Saved(*others[: len(Saved._fields)]), others[len(Saved._fields) :]
    settings, wanted = Settings(*others[: len(Settings._fields)]), Wanted(*others[len(Settings._fields) :])
    return dout, _inputs(tensors), saved, settings, wanted


def _backward(*arguments):
    return _module(arguments[1]).backward(*_split_backward(arguments))


def _fake_backward(*arguments):
    return native.fake_backward(*_split_backward(arguments))


def _setup_context(ctx, inputs, output):
    ctx.per_token = inputs[-1]
    ctx.sinks = [None if sink is None else sink.dtype for sink in inputs[_TENSORS:_SINKS]]
    ctx.settings = inputs[_SINKS:-1]
    tokens, *parameters = ctx.needs_input_grad[: 1 + PARAMETERS]
    ctx.wanted = Wanted(tokens, parameters, *(sink is not None for sink in ctx.sinks), ctx.per_token)
    saved = needed(Saved(*output[1:]), ctx.wanted, Settings(*ctx.settings))
    ctx.save_for_backward(*inputs[:_TENSORS], *saved)


def _gradients(ctx, dout, *_):
    heads, ffn, neurons = ctx.sinks
    dx, signed, absolute, ffn_signed, ffn_absolute, by_neuron, *parameters = _encoder_layer_backward_op(
        dout, *ctx.saved_tensors, *ctx.settings, *ctx.wanted
    )
    partials = (
        None if heads is None else (absolute if ctx.per_token else signed).to(heads),
        None if ffn is None else (ffn_absolute if ctx.per_token else ffn_signed).to(ffn),
        None if neurons is None else by_neuron.to(neurons),
    )
    # Parameters of structures that are not computed get None instead of zeros, so that optimizers skip them.
    gradients = [
        p if there and p is not None and p.numel() else None
        for p, there in zip(parameters, ctx.wanted.parameters, strict=True)
    ]
    indices = (None,) * (_TENSORS - 1 - PARAMETERS)
    return dx if ctx.wanted.tokens else None, *gradients, *indices, *partials, *(None,) * (len(Settings._fields) + 1)


def _schema(fields: type) -> str:
    """Writes the fields of a NamedTuple as arguments in torch's schema language."""
    names: dict[Any, str] = {kind: kind.__name__ for kind in (Tensor, int, float, str, bool)}
    names |= {
        Tensor | None: "Tensor?",
        int | None: "int?",
        list[float]: "float[]",
        list[bool]: "bool[]",
        torch.dtype: "ScalarType",
    }
    return ", ".join(f"{names[hint]} {name}" for name, hint in fields.__annotations__.items())


_TENSOR_ARGUMENTS = (
    f"Tensor x, {_schema(Weights)}, Tensor starts, Tensor lengths, Tensor? real, Tensor? seeds, Tensor? cosines, "
    "Tensor? sines"
)
# SymInt, because the longest sequence differs from batch to batch, and an int would make torch.compile recompile.
_SETTING_ARGUMENTS = _schema(Settings).replace("int max_length", "SymInt max_length")
_encoder_layer_op = define(
    f"encoder_layer({_TENSOR_ARGUMENTS}, Tensor? head_importance, Tensor? ffn_importance, Tensor? neuron_importance, "
    f"{_SETTING_ARGUMENTS}, bool per_token) -> ({', '.join(['Tensor'] * (1 + len(Saved._fields)))})",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
    shares=True,
    only_first=True,
)
_encoder_layer_backward_op = define(
    f"encoder_layer_backward(Tensor dout, {_TENSOR_ARGUMENTS}, {_schema(Saved)}, {_SETTING_ARGUMENTS}, "
    f"{_schema(Wanted)}) -> ({', '.join(['Tensor'] * GRADIENTS)})",
    _backward,
    _fake_backward,
    shares=True,
)
