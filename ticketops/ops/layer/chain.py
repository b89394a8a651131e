"""Encoder layers, one after the other, as one node of autograd.

Autograd is entered once in place of once a layer, and a GPU casts all weights at once. What a layer saves is freed as
soon as its gradients are there, as with a node for each layer.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.ops import private
from ticketops.ops.layer.arguments import PARAMETERS, Inputs, Saved, Settings, Wanted, needed
from ticketops.ops.layer.registered import as_gradients, encoder_layer_backward_op, module_of
from ticketops.ops.memory import empty
from ticketops.ops.registration import is_watched, refuse_batched, without_base

#: Number of a layer's tensors that may get a gradient: parameters and importance sinks.
_WIDTH = PARAMETERS + 3


class Call(NamedTuple):
    """The arguments of one layer.

    Attributes:
        inputs: tensors.
        sinks: of the importance of heads, of the FFN and of neurons; None for those that are not wanted.
        settings: other arguments.
        per_token: True sums the absolute values of the tokens' terms.
    """

    inputs: Inputs
    sinks: tuple[Tensor | None, Tensor | None, Tensor | None]
    settings: Settings
    per_token: bool

    def of(self, x: Tensor) -> "Call":
        """The same for other tokens."""
        return self._replace(inputs=self.inputs._replace(x=x))

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors but the sinks, in the order of the registered op."""
        x, weights, *others = self.inputs
        return x, *weights, *others


def differentiable(x: Tensor, calls: Sequence[Call]) -> Tensor:
    """Computes layers, some of whose tensors require a gradient.

    Args:
        x: [T, C], the first layer's tokens.
        calls: of the layers.

    Returns:
        The last layer's tokens.
    """
    parameters = [each for call in calls for each in (*call.inputs.weights[:PARAMETERS], *call.sinks)]
    out: Tensor = private.apply(_Chain, calls, x, *parameters)
    return out


class _Chain(torch.autograd.Function):
    """See `differentiable`."""

    @staticmethod
    def forward(ctx: Any, calls: Sequence[Call], x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.set_materialize_grads(False)
        module = module_of(x)
        _, tokens, *needs = ctx.needs_input_grad
        ctx.layers, read = [], []
        prepared, entered = module.prepare([(call.inputs, call.settings) for call in calls])
        for place, (call, weights) in enumerate(zip(calls, prepared, strict=True)):
            inputs, settings = call.of(x).inputs, call.settings
            flags = needs[place * _WIDTH : (place + 1) * _WIDTH]
            of_heads, of_ffn, of_neurons = flags[PARAMETERS:]
            wanted = Wanted(tokens, flags[:PARAMETERS], of_heads, of_ffn, of_neurons, call.per_token)
            sinks = [sink.dtype if sink is not None and sink.requires_grad else None for sink in call.sinks]
            keep = tokens or any(flags)
            half = _half(call, calls[place + 1], x) if place + 1 < len(calls) else None
            x, *saved = module.forward(inputs, settings, keep, weights, entered, half)
            if keep:
                # Nobody else has the tokens between two layers.
                given = (None if place else inputs.x, *inputs.weights[:PARAMETERS])
                read += [each for each in given if each is not None]
                ctx.layers.append((inputs, needed(Saved(*saved), wanted, settings), settings, wanted, sinks))
            else:
                ctx.layers.append(None)
            entered, tokens = half, keep
        # For autograd's check that nobody changes them in place before the backward pass.
        ctx.save_for_backward(*read)
        out: Any = without_base(x)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None) -> tuple[Any, ...]:
        if dout is None:
            return (None,) * len(ctx.needs_input_grad)
        refuse_batched("encoder layers have", dout)
        # Raises what torch does for a second backward pass without retain_graph=True, and where a weight has changed.
        ctx.saved_tensors  # noqa: B018
        if (layers := ctx.layers) is None:
            raise RuntimeError("a backward pass broke off in these encoder layers: run their forward pass again")
        module, keeps = module_of(dout), private.keeps_graph()
        if not keeps:
            # Layers are freed one by one, so no other pass may go on with those that are left.
            ctx.layers = None
        watched = torch.is_grad_enabled() or is_watched(dout)
        gradients: list[Tensor | None] = [None] * (_WIDTH * len(layers))
        for place in reversed(range(len(layers))):
            if layers[place] is None:
                continue
            inputs, saved, settings, wanted, sinks = layers[place]
            if watched:
                tensors = (inputs.x, *inputs.weights, *inputs[2:])
                found = encoder_layer_backward_op(dout, *tensors, *saved, *settings, *wanted)
            else:
                found = module.backward(dout, inputs, saved, settings, wanted)
            dout, parameters, partials = as_gradients(found, wanted, sinks)
            gradients[place * _WIDTH : (place + 1) * _WIDTH] = *parameters, *partials
            if not keeps:
                layers[place] = None
        return None, dout, *gradients


def _half(call: Call, following: Call, x: Tensor) -> Tensor | None:
    """Returns memory for a layer's tokens in the dtype of products, where the next layer needs a cast and this layer's
    last kernel can write it; else None."""
    s, weights = call.settings, following.inputs.weights
    attends = weights.heads is None or len(weights.heads) > 0
    writes = not s.norm_first and call.inputs.weights.w1 is not None
    if s.dtype == x.dtype or not writes or not attends or following.settings.norm_first:
        return None
    return empty(x.shape, s.dtype, x.device)
