"""State of a patched layer: the structures that a ticket keeps, and the arguments of the current forward pass."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ticketops.errors import UnsupportedError
from ticketops.models.adapter import LayerParts, activation_name
from ticketops.models.freezing import Frozen
from ticketops.models.indices import Indices
from ticketops.ops import Packing

if TYPE_CHECKING:
    from ticketops.models.handle import PatchHandle


_BOTH = ("weight", "bias")


@dataclass(frozen=True)
class Kept:
    """The structures of one layer that a ticket keeps. Made once per ticket, so that applying it again makes no tensor.

    Attributes:
        attention: True if any head is computed.
        heads: indices of the computed heads among those that the weights have; None for all.
        numbers: indices of the computed heads in the architecture; None for all heads of the architecture.
        ffn: True if the FFN is computed.
        neurons: indices of the FFN's computed neurons among those that the weights have; None for all.
        neuron_numbers: indices of the computed neurons in the architecture; None for all neurons of the architecture.
        frozen_rows: frozen slices of the weights and biases of q, k and v.
        frozen_columns: frozen slices of the output projection's weight.
        frozen_fc1: frozen slices of the weight and bias of the FFN's first linear layer, and of that of its gate.
        frozen_fc2: frozen slices of the weight of its second linear layer.
        frozen_bias: frozen slices of the bias of its second linear layer.
        number: id of the ticket among those applied to the model. An object's identity would not do, since wrappers for
            distributed training may copy the arguments of layers.
    """

    attention: bool
    heads: Indices | None
    numbers: Indices | None
    ffn: bool
    neurons: Indices | None
    neuron_numbers: Indices | None
    frozen_rows: Frozen
    frozen_columns: Frozen
    frozen_fc1: Frozen
    frozen_fc2: Frozen
    frozen_bias: Frozen
    number: int

    def frozen(self, parts: LayerParts) -> list[tuple[nn.Linear, str, Frozen]]:
        """Returns (module, name, frozen slices) for each prunable parameter of a layer.

        Args:
            parts: parts of the layer.
        """
        return [
            *((linear, name, self.frozen_rows) for linear in (*parts.qkv, *parts.positions) for name in _BOTH),
            (parts.output, "weight", self.frozen_columns),
            *((linear, name, self.frozen_fc1) for linear in parts.first for name in _BOTH),
            (parts.fc2, "weight", self.frozen_fc2),
            (parts.fc2, "bias", self.frozen_bias),
        ]


class LayerState:
    """State of a patched layer, one object per layer, shared by the layer's patched modules.

    Attributes:
        handle: handle of the whole model.
        index: index of the layer.
        activation: name of its activation in the FFN op.
        head_dim: width of a head.
        repeats: see LayerParts.
        shapes: shapes of the parameters, in the order of LayerParts.tensors.
        kept: structures that are computed.
    """

    kept: Kept

    def __init__(self, handle: "PatchHandle", index: int, parts: LayerParts) -> None:
        self.handle = handle
        self.index = index
        self.activation = activation_name(parts.activation)
        self.repeats, self.head_dim = parts.repeats, parts.head_dim

    def set_present(self, heads: list[bool], neurons: list[bool], parts: LayerParts) -> None:
        """Sets the structures that the layer's weights have; all of them are computed.

        Args:
            heads: for each head of the architecture, True if the weights have it.
            neurons: for each neuron of the architecture's FFN, True if the weights have it.
            parts: parts of the layer.
        """
        self.heads = tuple(head for head, there in enumerate(heads) if there)
        self.neurons = tuple(neuron for neuron, there in enumerate(neurons) if there)
        self.shapes = [None if each is None else each.shape for each in parts.tensors()]
        self.kept = self.keep(heads, neurons)

    def keep(self, heads: list[bool], neurons: list[bool], number: int = 0) -> Kept:
        """Makes the value of `kept` for a ticket.

        Args:
            heads: for each head of the architecture, True to compute it.
            neurons: for each neuron of the architecture's FFN, True to compute it.
            number: id of the ticket.

        Returns:
            The structures that the weights have and the ticket keeps.
        """
        places = [place for place, head in enumerate(self.heads) if heads[head]]
        pruned = Indices(place for place, head in enumerate(self.heads) if not heads[head])
        ffn_places = [place for place, neuron in enumerate(self.neurons) if neurons[neuron]]
        in_qkv, in_fc1 = self.repeats
        if ffn_places:
            groups, idle = len(self.neurons), Indices(p for p, neuron in enumerate(self.neurons) if not neurons[neuron])
        else:
            # The whole FFN is pruned, with its output's bias: one group that is frozen, if the weights have it.
            groups, idle, in_fc1 = 1, Indices([0] if self.neurons else []), 1
        return Kept(
            attention=bool(places),
            heads=None if places and not pruned else Indices(places),
            numbers=None if len(places) == len(heads) else Indices(self.heads[place] for place in places),
            ffn=bool(ffn_places),
            neurons=Indices(ffn_places) if ffn_places and idle else None,
            neuron_numbers=None if all(neurons) else Indices(self.neurons[place] for place in ffn_places),
            frozen_rows=Frozen(0, in_qkv * self.num_heads, _repeated(pruned, self.num_heads, in_qkv)),
            frozen_columns=Frozen(1, self.num_heads, pruned),
            frozen_fc1=Frozen(0, in_fc1 * groups, _repeated(idle, groups, in_fc1)),
            frozen_fc2=Frozen(1, groups, idle),
            frozen_bias=Frozen(0, 1, Indices([] if ffn_places else idle.values)),
            number=number,
        )

    def fault(self, parts: LayerParts) -> str | None:
        """Describes a change of the layer since it was patched that the ops do not support; None if there is none.

        Args:
            parts: current parts of the layer.
        """
        if fault := parts.fault():
            return fault
        try:
            activation = activation_name(parts.activation)
        except UnsupportedError as error:
            return f"another activation than when it was patched: {error}"
        if activation != self.activation:
            return f"another activation ({type(parts.activation).__name__}) than when it was patched"
        if parts.head_dim != self.head_dim:
            return f"heads of width {parts.head_dim} where they had {self.head_dim} when it was patched"
        if parts.causal:
            return "causal attention (is_causal=True)"
        if not isinstance(parts.scale, (float, int)):
            return f"a {type(parts.scale).__name__} as the factor of its attention scores, not a number"
        window = self.handle.window(self.index)
        if parts.window != window:
            return f"attention that reaches {_reach(parts.window)} where its configuration says {_reach(window)}"
        if any(dropout.p >= 1 for dropout in parts.dropouts) or max(*parts.rates, parts.activation_dropout) >= 1:
            return "a dropout of everything"
        return None

    def check(self, call: "Call") -> None:
        """Makes sure that a layer that is computed again computes what it did before.

        Args:
            call: of the forward pass.

        Raises:
            UnsupportedError: another ticket was applied before a backward pass that computes the layer again.
        """
        if call.number != self.kept.number:
            raise UnsupportedError(
                "another ticket was applied between a forward pass and its backward pass, which under gradient "
                "checkpointing computes the layers again: apply it after backward()"
            )

    def refuse_stock(self) -> None:
        """Refuses a call past the model's own forward, where a ticket would be ignored."""
        self.handle.refuse_stock(f"layer {self.index} was called past the model's own forward")

    @property
    def num_heads(self) -> int:
        """How many heads the layer's weights have."""
        return len(self.heads)


def _reach(window: int | None) -> str:
    """How far attention reaches, in words."""
    return "over the whole sequence" if window is None else f"{window} tokens to either side"


def _repeated(places: Indices, groups: int, times: int) -> Indices:
    """Places among groups that come several times, one set behind the other."""
    return Indices(place + turn * groups for turn in range(times) for place in places.values)


@dataclass(frozen=True)
class Call:
    """What one forward pass of the whole model hands to its layers.

    Attributes:
        packing: where the real tokens are.
        number: of the ticket that it computes, see Kept.
        head_importance: per layer, the leaf whose gradient becomes the head importance partials; empty when not
            recording.
        ffn_importance: the same for the FFN.
        neuron_importance: the same for its computed neurons; empty also when these are not recorded.
        per_token: the granularity is "token".
        packed: the encoder's input is packed already.
        spread: layers take and return padded batches and pack inside, since somebody may ask for the gradients of the
            hidden states between them, or positions depend on the batch's width.
        whole: one op computes each layer whose input has its weights' dtype.
        first_tokens: number of the layer of whose result only the first token of each row is read; None where all may
            be.
        padded_by: number of the layer that pads its result again, since the bare model reads rows of it and has no
            encoder that would pad; None where no layer does.
        position_bias: [H, 2 R + 1] for the architecture's heads, see `ticketops.ops.attention`; None for no bias.
        encoder: computes all layers at once, or none, see `encoder.EncoderPass`; None computes them one by one.
        position_vectors: what `ticketops.ops.position_vectors` returns, before each layer projects it; None for none.
        positions: position keys and queries of the heads that a layer computes, see `ticketops.ops.attention`; given to
            this layer alone.
        recorded: notes in which backward pass the forward pass's gradients arrive; None when not recording.
    """

    packing: Packing
    number: int
    head_importance: dict[int, Tensor] = field(default_factory=dict)
    ffn_importance: dict[int, Tensor] = field(default_factory=dict)
    neuron_importance: dict[int, Tensor] = field(default_factory=dict)
    per_token: bool = False
    packed: bool = False
    spread: bool = False
    whole: bool = False
    first_tokens: int | None = None
    padded_by: int | None = None
    position_bias: Tensor | None = None
    encoder: Any = None
    position_vectors: tuple[Tensor, Tensor | None] | None = None
    positions: tuple[Tensor | None, Tensor | None] = (None, None)
    recorded: Any = None

    def by_encoder(self, index: int, hidden_states: Tensor, turn: Any = None) -> Tensor | None:
        """A layer's result where all layers are computed at once; None where the layer has to be computed.

        Args:
            index: of the layer.
            hidden_states: [.., C], its input; behind the first layer the result of all.
            turn: rotary positions; None for none.
        """
        # A compiler sees layer by layer.
        if self.encoder is None or torch.compiler.is_compiling():
            return None
        done: Tensor | None = self.encoder(index, hidden_states, self, turn)
        return None if done is None else self.leave(done, index)

    def bias_of(self, kept: Kept) -> Tensor | None:
        """The position bias of the heads that a layer computes, [K, 2 R + 1]; None for no bias or no heads.

        Args:
            kept: structures of the layer that are computed.
        """
        bias = self.position_bias
        if bias is None or not kept.attention:
            return None
        return bias if kept.numbers is None else bias.index_select(0, kept.numbers.on(bias.device))

    def enter(self, hidden_states: Tensor) -> Tensor:
        """What a layer computes: its input, packed if it is spread.

        Args:
            hidden_states: [.., C].
        """
        return self.packing.pack(hidden_states)[None] if self.spread else hidden_states

    def leave(self, hidden_states: Tensor, index: int) -> Tensor:
        """What a layer returns: its result, padded again if its input was or the model reads rows of it.

        Args:
            hidden_states: [.., C], or [B, 1, C] where only first tokens are read, which are zeros in rows without any.
            index: the layer's number.
        """
        if self.first_tokens == index:
            return hidden_states.masked_fill((self.packing.sequences.lengths == 0)[:, None, None], 0)
        return self.packing.unpack(hidden_states[0]) if self.spread or self.padded_by == index else hidden_states
