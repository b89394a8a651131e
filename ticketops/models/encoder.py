"""All layers of an encoder at once: by CUDA graphs, or as one node of autograd."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from ticketops.models.bert import compute_layers, serves_whole
from ticketops.models.state import Call
from ticketops.models.swapping import unsharded_class
from ticketops.ops import private

if TYPE_CHECKING:
    from ticketops.models.handle import PatchHandle


class EncoderPass:
    """One forward pass whose layers may be computed at once: the first layer stands for all, and the others hand on its
    result.

    Args:
        handle: the model's.
        base: the bare model.
        seen: who looks at the hidden states between the layers; None for nobody.
    """

    def __init__(self, handle: "PatchHandle", base: Any, seen: str | None) -> None:
        self._handle, self._base, self._seen = handle, base, seen
        self._done = False

    def __call__(self, index: int, hidden_states: Tensor, call: Call, turn: Any) -> Tensor | None:
        """What a layer returns.

        Args:
            index: of the layer.
            hidden_states: its input, [.., C].
            call: of the forward pass.
            turn: rotary positions, which differ from layer to layer; None for none.

        Returns:
            The layer's result, or None where the layers have to be computed one by one.
        """
        if index:
            return hidden_states if self._done else None
        found, graphs = None, self._handle.graphs
        reason = self._seen or self._obstacle(call, hidden_states, turn)
        if graphs is not None:
            found = graphs.run(self._handle, self._base, call, hidden_states, reason)
        if found is None and reason is None:
            found = self._by_one_op(call, hidden_states)
        self._done = found is not None
        return found

    def _obstacle(self, call: Call, hidden_states: Tensor, turn: Any) -> str | None:
        """Says why the layers have to be computed one by one, or None."""
        layer = self._handle.adapter.layers(self._base)[0]
        if turn is not None:
            return "rotary positions"
        if call.position_vectors is not None:
            return "position vectors, which each layer projects"
        if not call.whole:
            return "layers that no single op computes"
        if layer.training and getattr(layer, "gradient_checkpointing", False):
            return "gradient checkpointing"
        if type(hidden_states) is not Tensor or unsharded_class(type(layer)) is not type(layer):
            return "tensors or layers that are distributed"
        return None

    def _by_one_op(self, call: Call, hidden_states: Tensor) -> Tensor | None:
        # DistributedDataParallel sends a layer's gradients while those of the layers before it are computed.
        if private.in_distributed_forward():
            return None
        adapter = self._handle.adapter
        layers = [(layer._ticketops, adapter.parts(layer)) for layer in adapter.layers(self._base)]
        if not all(serves_whole(parts, hidden_states, call) for _, parts in layers):
            return None
        return compute_layers(layers, hidden_states, call)
