"""An encoder layer as a registered op of torch, which is what compilers, tracers, dispatch modes and hooks on saved
tensors see of it."""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ticketops.ops import backends
from ticketops.ops.layer import native
from ticketops.ops.layer.arguments import GRADIENTS, PARAMETERS, Inputs, Saved, Settings, Wanted, Weights, needed
from ticketops.ops.registration import define


def module_of(x: Tensor) -> Any:
    """Returns the backend's module for tokens x. Requires `serves_layer`."""
    return native if x.is_cpu and backends.requested() != "triton" else _triton()


@cache
def _triton() -> Any:
    # Imported on first use: Triton may be missing where its kernels cannot run.
    return importlib.import_module("ticketops.ops.layer.triton")


#: The op's arguments are, in order: tensors, up to index _TENSORS; the three importance sinks, up to _SINKS; the fields
#: of Settings; and per_token.
_TENSORS = len(Weights._fields) + len(Inputs._fields) - 1
_SINKS = _TENSORS + 3


def _inputs(tensors: tuple[Any, ...]) -> Inputs:
    x, *weights = tensors[: 1 + len(Weights._fields)]
    return Inputs(x, Weights(*weights), *tensors[1 + len(Weights._fields) :])


def _forward(*arguments):
    inputs, settings = _inputs(arguments[:_TENSORS]), Settings(*arguments[_SINKS:-1])
    return module_of(inputs.x).forward(inputs, settings)


def _fake_forward(*arguments):
    inputs, settings = _inputs(arguments[:_TENSORS]), Settings(*arguments[_SINKS:-1])
    return native.fake_forward(inputs, settings, on_gpu=module_of(inputs.x) is not native)


def _split_backward(arguments):
    """Splits the backward op's arguments into dout, Inputs, Saved, Settings and Wanted."""
    dout, *tensors = arguments[: 1 + _TENSORS]
    others = arguments[1 + _TENSORS :]
    saved, others = Saved(*others[: len(Saved._fields)]), others[len(Saved._fields) :]
    settings, wanted = Settings(*others[: len(Settings._fields)]), Wanted(*others[len(Settings._fields) :])
    return dout, _inputs(tensors), saved, settings, wanted


def _backward(*arguments):
    return module_of(arguments[1]).backward(*_split_backward(arguments))


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
    found = encoder_layer_backward_op(dout, *ctx.saved_tensors, *ctx.settings, *ctx.wanted)
    dx, gradients, partials = as_gradients(found, ctx.wanted, ctx.sinks)
    indices = (None,) * (_TENSORS - 1 - PARAMETERS)
    return dx, *gradients, *indices, *partials, *(None,) * (len(Settings._fields) + 1)


def as_gradients(
    found: tuple[Tensor, ...], wanted: Wanted, sinks: Sequence[torch.dtype | None]
) -> tuple[Tensor | None, list[Tensor | None], list[Tensor | None]]:
    """Returns what autograd takes of a backward pass.

    Args:
        found: results of a backend's backward pass.
        wanted: what was asked of it.
        sinks: dtypes of the importance sinks; None for those that are not there.

    Returns:
        The gradients of the tokens, of the parameters in the order of Weights, and of the sinks.
    """
    dx, signed, absolute, ffn_signed, ffn_absolute, by_neuron, *parameters = found
    # Parameters of structures that are not computed get None instead of zeros, so that optimizers skip them.
    gradients = [
        p if there and p is not None and p.numel() else None
        for p, there in zip(parameters, wanted.parameters, strict=True)
    ]
    of_sinks = (absolute, ffn_absolute, by_neuron) if wanted.per_token else (signed, ffn_signed, by_neuron)
    partials = [None if dtype is None else sums.to(dtype) for sums, dtype in zip(of_sinks, sinks, strict=True)]
    return dx if wanted.tokens else None, gradients, partials


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
#: Takes tokens, the fields of Weights, the other fields of Inputs, the three importance sinks, the fields of Settings,
#: and per_token. Returns the tokens.
encoder_layer_op = define(
    f"encoder_layer({_TENSOR_ARGUMENTS}, Tensor? head_importance, Tensor? ffn_importance, Tensor? neuron_importance, "
    f"{_SETTING_ARGUMENTS}, bool per_token) -> ({', '.join(['Tensor'] * (1 + len(Saved._fields)))})",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
    shares=True,
    only_first=True,
)
#: Takes the gradient of the tokens, the tensors of the forward pass, and the fields of Saved, Settings and Wanted.
#: Returns what a backend's backward pass does.
encoder_layer_backward_op = define(
    f"encoder_layer_backward(Tensor dout, {_TENSOR_ARGUMENTS}, {_schema(Saved)}, {_SETTING_ARGUMENTS}, "
    f"{_schema(Wanted)}) -> ({', '.join(['Tensor'] * GRADIENTS)})",
    _backward,
    _fake_backward,
    shares=True,
)
