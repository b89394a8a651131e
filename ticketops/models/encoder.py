"""All layers of an encoder at once: by CUDA graphs, or as one node of autograd."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ticketops.models.bert import Given, Turn, compute_layers
from ticketops.models.hooks import KINDS, is_hooked
from ticketops.models.state import Call
from ticketops.models.swapping import unsharded_class
from ticketops.ops import private

if TYPE_CHECKING:
    from ticketops.models.handle import PatchHandle


class Stack:
    """An encoder's layers, and what need not be looked up in them anew as long as the handle's snapshot of them holds.

    Args:
        handle: the model's.
        base: the bare model.

    Attributes:
        snapshot: the handle's.
        base: the bare model.
        layers: its layers.
        weights: parameters of all layers, in a fixed order.
        are_plain: True if they are plain tensors.
        dtype: that of the LayerNorms' weights; None if they differ, or there are norms of another kind. One op computes
            all layers where their tokens have this dtype.
    """

    def __init__(self, handle: "PatchHandle", base: Any) -> None:
        self.snapshot, self.base = handle.snapshot, base
        self.layers: list[nn.Module] = handle.adapter.layers(base)
        parts = list(map(handle.adapter.parts, self.layers))
        self.weights = [x for each in parts for x in each.tensors() if x is not None]
        self.are_plain = all(type(x) in (Tensor, nn.Parameter) for x in self.weights)
        dtypes = {each.ffn_norm.weight.dtype if each.norm is nn.LayerNorm else None for each in parts}
        self.dtype: torch.dtype | None = dtypes.pop() if len(dtypes) == 1 else None
        self._modules = [module for layer in self.layers for module in layer.modules()]
        self._hooks = [module.__dict__[kind] for module in self._modules for kind in KINDS]
        self._norms = [norm for each in parts for norm in (each.attention_norm, each.ffn_norm) if norm is not None]

    def is_hooked(self) -> bool:
        """True if there are hooks on the layers that the snapshot does not have, as the embeddings' hooks may add."""
        # Nearly always there are none at all.
        return any(self._hooks) and any(map(is_hooked, self._modules))

    def settings(self) -> tuple[Any, ...]:
        """What the layers' ops depend on besides tensors."""
        return (
            self.snapshot,
            tuple([module.training for module in self._modules]),
            tuple([getattr(norm, "eps", None) for norm in self._norms]),
        )


class EncoderPass:
    """One forward pass whose layers may be computed at once: all but the last hand on their input, and the last one
    computes all of them, each with what it was given.

    Args:
        handle: the model's.
        base: the bare model.
        seen: who looks at the hidden states between the layers; None for nobody.
    """

    def __init__(self, handle: "PatchHandle", base: Any, seen: str | None) -> None:
        self._handle, self._base, self._seen = handle, base, seen
        self._stack: Stack | None = None
        self._given: list[tuple[Call, Turn | None]] = []

    def __call__(self, index: int, hidden_states: Tensor, call: Call, turn: Turn | None) -> Tensor | None:
        """What a layer returns.

        Args:
            index: of the layer.
            hidden_states: its input, [.., C].
            call: of the forward pass, as this layer gets it.
            turn: rotary positions, as this layer gets them; None for none.

        Returns:
            The layer's input, of the last layer the result of all; None where the layers have to be computed one by
            one.
        """
        if index == 0:
            self._stack, self._given = self._stack_for(call, hidden_states), []
        stack = self._stack
        if stack is None:
            return None
        self._given.append((call, turn))
        if len(self._given) < len(stack.layers):
            return hidden_states
        # The calls have this pass: a cycle of them would live on, and their tensors.
        given, self._given = self._given, []
        done, graphs = None, self._handle.graphs
        if graphs is not None:
            done = graphs.run(self._handle, stack, given, hidden_states)
        return self._by_op(stack, given, hidden_states) if done is None else done

    def _stack_for(self, call: Call, hidden_states: Tensor) -> Stack | None:
        """The layers, if they can be computed at once."""
        stack, reason = None, self._seen
        if reason is None:
            stack = self._handle.stack
            if stack is None or stack.snapshot is not self._handle.snapshot or stack.base is not self._base:
                stack = self._handle.stack = Stack(self._handle, self._base)
            reason = _obstacle(stack, call, hidden_states)
        if reason is not None and self._handle.graphs is not None:
            self._handle.graphs.eager[reason] += 1
        return None if reason else stack

    def _by_op(self, stack: Stack, given: list[tuple[Call, Turn | None]], hidden_states: Tensor) -> Tensor:
        layers = with_parts(self._handle, stack, given)
        # DistributedDataParallel sends a layer's gradients while those of the layers before it are computed.
        apart = private.in_distributed_forward() or _accumulates(stack)
        for some in [[each] for each in layers] if apart else [layers]:
            hidden_states = compute_layers(some, hidden_states)
        return hidden_states


def _accumulates(stack: Stack) -> bool:
    """True if there are gradients that others will be added to. All layers' together would take as much memory again,
    those of one layer after the other are added as they come."""
    parameters = (x for x in stack.weights if type(x) is nn.Parameter)
    return torch.is_grad_enabled() and any(x.grad is not None for x in parameters)


def with_parts(handle: "PatchHandle", stack: Stack, given: list[tuple[Call, Turn | None]]) -> list[Given]:
    """What each layer is computed from.

    Args:
        handle: the model's.
        stack: its layers.
        given: what each of them is called with.
    """
    parts = map(handle.adapter.parts, stack.layers)
    states = [layer.__dict__["_ticketops"] for layer in stack.layers]
    return [Given(*each) for each in zip(states, parts, *zip(*given, strict=True), strict=True)]


def _obstacle(stack: Stack, call: Call, hidden_states: Tensor) -> str | None:
    """Says why the layers have to be computed one by one, or None."""
    if not call.whole or stack.dtype != hidden_states.dtype:
        return "layers that no single op computes"
    if call.spread:
        return "layers that hand on padded batches"
    if stack.is_hooked():
        return "hooks that came within the pass"
    # Any layer may differ from the first, such as lower ones that are frozen in evaluation.
    if any(layer.training and getattr(layer, "gradient_checkpointing", False) for layer in stack.layers):
        return "gradient checkpointing"
    if any(map(private.is_compiled, stack.layers)):
        return "layers that are compiled one by one"
    kinds = set(map(type, stack.layers))
    if type(hidden_states) is not Tensor or any(unsharded_class(kind) is not kind for kind in kinds):
        return "tensors or layers that are distributed"
    return None
