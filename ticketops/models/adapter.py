"""What ticketops must know of an architecture: where its linear layers live and which classes to swap."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ticketops.errors import UnsupportedError
from ticketops.models.freezing import Frozen
from ticketops.models.hooks import is_hooked
from ticketops.models.indices import Indices
from ticketops.models.inputs import TEXT, Inputs
from ticketops.models.record import head_dim
from ticketops.ops import Packing
from ticketops.ops.backends import OPS

#: Activation modules of transformers and torch, by class name, and what the FFN op calls them.
ACTIVATIONS = {
    "GELUActivation": "gelu",
    "GELU": "gelu",
    "NewGELUActivation": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
    "ReLU": "relu",
}


@dataclass(frozen=True)
class LayerParts:
    """The prunable parts of one encoder layer.

    Attributes:
        qkv: the linear layers from the hidden size to heads * head_dim of queries, keys and values, or one that has the
            rows of all three, one behind the other.
        output: linear layer from heads * head_dim back to the hidden size; its bias stays when heads go.
        fc1, fc2: the two linear layers of the FFN.
        activation: the module between them.
        attention_norm, ffn_norm: the LayerNorm of each sublayer; None where there is none.
        dropouts: the dropout modules inside the layer.
        gated: fc1 has the rows of a gate behind those of the neurons.
        bare: nothing of it needs a bias.
    """

    qkv: tuple[nn.Linear, ...]
    output: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    activation: nn.Module
    attention_norm: nn.LayerNorm | None
    ffn_norm: nn.LayerNorm
    dropouts: tuple[nn.Dropout, ...]
    gated: bool = False
    bare: bool = False

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers by name."""
        names = ("query", "key", "value") if len(self.qkv) == 3 else ("query, key and value",)
        return dict(zip(names, self.qkv, strict=True)) | {"output": self.output, "fc1": self.fc1, "fc2": self.fc2}

    @property
    def repeats(self) -> tuple[int, int]:
        """How often a head's rows come in a layer of `qkv`, and a neuron's in fc1."""
        return 3 // len(self.qkv), 1 + self.gated

    @property
    def plain(self) -> bool:
        """Whether all parts are of the classes that the ops stand for; `refusal` says which is not."""
        return (
            all(type(linear) is nn.Linear for linear in (*self.qkv, self.output, self.fc1, self.fc2))
            and all(norm is None or type(norm) is nn.LayerNorm for norm in (self.attention_norm, self.ffn_norm))
            and all(type(dropout) is nn.Dropout for dropout in self.dropouts)
        )

    def refusal(self) -> str | None:
        """Says which part is not what the ops assume, or None.

        The ops read these modules' parameters and never call the modules, so whatever changes a module's forward (an
        adapter, quantization) would be passed over in silence.
        """
        modules: dict[str, tuple[nn.Module, type[nn.Module]]] = {n: (m, nn.Linear) for n, m in self.linears().items()}
        norms = {"attention_norm": self.attention_norm, "ffn_norm": self.ffn_norm}
        modules |= {name: (norm, nn.LayerNorm) for name, norm in norms.items() if norm is not None}
        modules |= {f"dropout {index}": (module, nn.Dropout) for index, module in enumerate(self.dropouts)}
        for name, (module, expected) in modules.items():
            if type(module) is not expected:
                return (
                    f"a {type(module).__module__}.{type(module).__name__} as its {name}, not a plain "
                    f"torch.nn.{expected.__name__}: merge adapters and undo quantization before patching"
                )
            removed = name in ("fc1", "fc2") and self.fc1.out_features == 0
            if expected is not nn.Dropout and module.bias is None and not (removed or self.bare):
                return f"no bias in its {name}, which ticketops does not serve"
        return None


@dataclass(frozen=True)
class Adapter:
    """How ticketops meets one architecture.

    Attributes:
        base: the bare model's class, to which every task head gives access as `model.base_model`.
        swaps: the stock class of each module whose class is swapped, and its replacement, a subclass.
        encoder: finds the module in the bare model that has the list of layers.
        parts: finds the prunable parts of a layer.
        resize: tells a layer's attention how many heads its weights have.
        refusal: says what of a configuration is not served, or None.
        calls: the modules of a layer that its patched class still calls, besides itself and those to queries, keys and
            values; hooks on the others are refused.
        stack: the name of the list of layers in the encoder; their parameters are "the encoder" of weight counts.
        inputs: what the model reads.
        ops: which ops its layers run on.
        gated: the FFNs have a gate.
        biases: whether a configuration gives biases to the layers around attention, and to the FFN's.
        window: how far a layer's attention reaches under a configuration, by its index; None for the whole sequence.
        no_mask: what the bare model takes for an attention mask that was seen to already.
    """

    base: type[nn.Module]
    swaps: dict[type[nn.Module], type[nn.Module]]
    encoder: Callable[[Any], nn.Module]
    parts: Callable[[Any], LayerParts]
    resize: Callable[[Any, int], None]
    refusal: Callable[[Any], str | None]
    calls: Callable[[Any], tuple[nn.Module, ...]]
    stack: str = "layer"
    inputs: Inputs = TEXT
    ops: tuple[str, ...] = OPS
    gated: bool = False
    biases: Callable[[Any], tuple[bool, bool]] = lambda config: (True, True)
    window: Callable[[Any, int], int | None] = lambda config, layer: None
    no_mask: Mapping[str, None] | None = None

    def layers(self, base: Any) -> list[Any]:
        """The layers of the bare model's encoder."""
        return list(getattr(self.encoder(base), self.stack))

    def weights(self, config: Any) -> tuple[int, int, int]:
        """Weights of one head, of one neuron, and of what goes with an FFN besides its neurons."""
        (around_attention, around_ffn), hidden = self.biases(config), config.hidden_size
        head = (4 * hidden + 3 * around_attention) * head_dim(config)
        return head, (2 + self.gated) * hidden + (1 + self.gated) * around_ffn, hidden * around_ffn

    def windows(self, config: Any) -> list[int | None]:
        """How far each layer's attention reaches; None for the whole sequence."""
        return [self.window(config, layer) for layer in range(config.num_hidden_layers)]


def unheard(layer: nn.Module, called: Collection[nn.Module]) -> str | None:
    """Says on which module of a layer there are hooks that would never be called, or None.

    Args:
        layer: stock or patched.
        called: its modules that are called, itself aside.
    """
    for name, module in layer.named_modules():
        if name and is_hooked(module) and not any(module is each for each in called):
            return (
                f"hooks on its {name}, which a patched layer does not call: remove them, or revert() to have them run"
            )
    return None


@dataclass(frozen=True)
class Kept:
    """What a ticket keeps of one layer; made once a ticket, so that applying it again makes no tensor.

    Attributes:
        heads: places of the computed heads among those that are there; None for all, on the path without indexing.
        numbers: the computed heads by their numbers in the architecture; None for all of the architecture.
        ffn: whether the FFN is computed.
        neurons: places of the FFN's computed neurons among those that are there; None for all.
        neuron_numbers: the computed neurons by their numbers in the architecture; None for all of the architecture.
        frozen_rows: what no optimizer moves of the weights and biases of q, k and v.
        frozen_columns: the same of the output projection's weight.
        frozen_fc1: the same of the FFN's first linear layer.
        frozen_fc2: the same of the weight of its second.
        frozen_bias: the same of the second's bias.
        number: tells the ticket from others that were applied to the model. No identity would do: what distributes a
            model may copy what goes to its layers.
    """

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


class LayerState:
    """What a swapped layer needs to know of the ticket; one object a layer, shared by the layer's swapped modules.

    Attributes:
        index: of the layer.
        activation: the FFN op's name for its activation.
        repeats: how often a head's rows come in a layer to queries, keys and values, and a neuron's in the FFN's first.
        kept: what of the layer is computed.
    """

    def __init__(self, index: int, activation: str, repeats: tuple[int, int] = (1, 1)) -> None:
        self.index = index
        self.activation = activation
        self.repeats = repeats

    def hold(self, heads: list[bool], neurons: list[bool]) -> None:
        """Sets which structures the layer's weights have; all of them are computed.

        Args:
            heads: for each head of the architecture, whether it is there.
            neurons: for each neuron of the architecture's FFN, whether it is there; all False where the FFN is not.
        """
        self.heads = tuple(head for head, there in enumerate(heads) if there)
        self.neurons = tuple(neuron for neuron, there in enumerate(neurons) if there)
        self.kept = self.keep(heads, neurons)

    def keep(self, heads: list[bool], neurons: list[bool], number: int = 0) -> Kept:
        """Works out what to compute of the structures that are there.

        Args:
            heads: for each head of the architecture, whether to compute it.
            neurons: for each neuron of the architecture's FFN, whether to compute it.
            number: of the ticket that says so.

        Returns:
            What `kept` is to be for that.
        """
        places = [place for place, head in enumerate(self.heads) if heads[head]]
        pruned = Indices(place for place, head in enumerate(self.heads) if not heads[head])
        ffn_places = [place for place, neuron in enumerate(self.neurons) if neurons[neuron]]
        in_qkv, in_fc1 = self.repeats
        if ffn_places:
            groups, idle = len(self.neurons), Indices(p for p, neuron in enumerate(self.neurons) if not neurons[neuron])
        else:
            # The FFN goes as a whole, with the bias of its output, if it is there.
            groups, idle, in_fc1 = 1, Indices([0] if self.neurons else []), 1
        return Kept(
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

    def check(self, parts: LayerParts, call: "Call") -> None:
        """Makes sure that the layer computes what its forward pass is to compute.

        Args:
            parts: the layer's, as they are now.
            call: of the forward pass.

        Raises:
            UnsupportedError: a part has been replaced by what the ops do not stand for, or another ticket been applied
                before a backward pass that computes the layer again.
        """
        if not parts.plain or ACTIVATIONS.get(type(parts.activation).__name__) != self.activation:
            reason = (
                parts.refusal() or f"another activation ({type(parts.activation).__name__}) than when it was patched"
            )
            raise UnsupportedError(f"layer {self.index} has {reason}")
        if call.number != self.kept.number:
            raise UnsupportedError(
                "another ticket was applied between a forward pass and its backward pass, which under gradient "
                "checkpointing computes the layers again: apply it after backward()"
            )

    @property
    def num_heads(self) -> int:
        """How many heads the layer's weights have."""
        return len(self.heads)


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
        whole: one op computes each layer whose input has its weights' dtype.
        first_tokens: number of the layer of whose result only the first token of each row is read; None where all may
            be.
    """

    packing: Packing
    number: int
    head_importance: dict[int, Tensor] = field(default_factory=dict)
    ffn_importance: dict[int, Tensor] = field(default_factory=dict)
    neuron_importance: dict[int, Tensor] = field(default_factory=dict)
    per_token: bool = False
    packed: bool = False
    whole: bool = False
    first_tokens: int | None = None


def given(call: Call | None) -> Call:
    """What a forward pass was given of its model.

    Args:
        call: None where nothing was.

    Raises:
        UnsupportedError: nothing was, since the model's forward was called past its hooks.
    """
    if call is None:
        raise UnsupportedError(
            "a patched model packs its inputs on the way into its forward: call model(...), not model.forward(...)"
        )
    return call


def activation_name(module: nn.Module) -> str:
    """The FFN op's name for an activation module.

    Args:
        module: what the model applies between the FFN's linear layers.

    Returns:
        "gelu", "gelu_tanh" or "relu".

    Raises:
        UnsupportedError: any other activation.
    """
    name = type(module).__name__
    if name not in ACTIVATIONS:
        raise UnsupportedError(
            f"the activation {name} is not supported: ticketops serves gelu (erf), its tanh approximations and relu"
        )
    return ACTIVATIONS[name]
