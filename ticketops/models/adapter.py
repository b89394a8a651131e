"""What ticketops must know of an architecture: where its linear layers live and which classes to swap."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import activations

from ticketops.errors import UnsupportedError
from ticketops.models.hooks import methods_of
from ticketops.models.inputs import TEXT, Inputs
from ticketops.models.record import head_dim
from ticketops.models.removed import RemovedLinear
from ticketops.models.swapping import unsharded_class

#: Activation modules and what the FFN op calls them. A class of the same name from elsewhere may compute anything.
_ACTIVATIONS: dict[type[nn.Module], str] = {
    getattr(activations, name): kind
    for name, kind in {
        "GELUActivation": "gelu",
        "NewGELUActivation": "gelu_tanh",
        "GELUTanh": "gelu_tanh",
        "PytorchGELUTanh": "gelu_tanh",
        "FastGELUActivation": "gelu_tanh",
        "SiLUActivation": "silu",
    }.items()
    if hasattr(activations, name)
} | {nn.ReLU: "relu", nn.SiLU: "silu"}

#: Classes from elsewhere that occur in the layers of some architecture.
_OTHER_CLASSES = (nn.Linear, nn.LayerNorm, nn.Dropout, nn.Identity, nn.ModuleList, nn.GELU, RemovedLinear)


@dataclass(frozen=True)
class LayerParts:
    """The current prunable parts of one encoder layer.

    Attributes:
        qkv: linear layers of queries, keys and values, from the hidden size to heads * head_dim; or one linear layer
            with the rows of all three. A linear layer without inputs or outputs is a RemovedLinear, here and below.
        output: linear layer from heads * head_dim back to the hidden size; its bias stays if heads are pruned.
        fc1, fc2: linear layers of the FFN.
        activation: module between fc1 and fc2.
        attention_norm, ffn_norm: LayerNorm of each sublayer; None if there is none.
        norm: class of these.
        dropouts: dropout modules inside the layer.
        scale: factor of the attention scores.
        rates: current dropout probabilities of the attention weights, attention's output and the FFN's output; 0 for a
            module in evaluation mode.
        norm_first: True for a LayerNorm before each sublayer, False for one after it.
        head_dim: width of a head.
        causal: True if tokens of a batch without padding do not attend to later ones.
        gated: a gate multiplies the activations; its rows are in fc1 behind those of the neurons, or in `gate`.
        gate: linear layer of the gate; None if its rows are in fc1, or there is no gate.
        biased: kinds of modules that need a bias.
        activation_dropout: current dropout probability of the activations, after the gate.
        window: how far its attention reaches; None for the whole sequence.
        positions: linear layers of its own from position vectors to heads * head_dim, pruned as those of queries are.
        shares_positions: the linear layers of queries and keys project position vectors, too.
    """

    qkv: tuple[nn.Linear, ...]
    output: nn.Linear
    fc1: nn.Linear
    fc2: nn.Linear
    activation: nn.Module
    attention_norm: Any
    ffn_norm: Any
    dropouts: tuple[nn.Dropout, ...]
    scale: float
    rates: tuple[float, float, float]
    head_dim: int
    causal: bool
    norm: type[nn.Module] = nn.LayerNorm
    gated: bool = False
    gate: nn.Linear | None = None
    biased: tuple[type[nn.Module], ...] = (nn.Linear, nn.LayerNorm)
    activation_dropout: float = 0.0
    window: int | None = None
    norm_first: bool = False
    positions: tuple[nn.Linear, ...] = ()
    shares_positions: bool = False

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers by name."""
        names = ("query", "key", "value") if len(self.qkv) == 3 else ("query, key and value",)
        return (
            dict(zip(names, self.qkv, strict=True))
            | {"output": self.output}
            | dict(zip(("fc1", "gate"), self.first, strict=False))
            | {"fc2": self.fc2}
            | {f"position projection {index}": linear for index, linear in enumerate(self.positions)}
        )

    @property
    def first(self) -> tuple[nn.Linear, ...]:
        """The linear layers that the FFN's input goes to: fc1, and the gate's where it has one of its own."""
        return (self.fc1,) if self.gate is None else (self.fc1, self.gate)

    @property
    def repeats(self) -> tuple[int, int]:
        """Number of row blocks of each head in a linear layer of `qkv` (3 if joined), and of each neuron in a linear
        layer of `first` (2 if a gate is joined to the neurons)."""
        return 3 // len(self.qkv), 1 + (self.gated and self.gate is None)

    def tensors(self) -> list[Tensor | None]:
        """Returns weights and biases of all parts in a fixed order; None for a missing one."""
        modules = (*self.qkv, *self.positions, self.output, self.attention_norm, *self.first, self.fc2, self.ffn_norm)
        there = [module._parameters for module in modules if module is not None]
        return [parameters.get(name) for parameters in there for name in ("weight", "bias")]

    def fault(self) -> str | None:
        """Says which part is not what the ops compute, or None.

        The ops read these modules' parameters and never call the modules, so whatever changes a module's forward (an
        adapter, quantization) would be passed over in silence.
        """
        for name, module, expected in self._expected():
            if type(module) is not expected:
                plain = getattr(nn, expected.__name__, None) is expected
                return (
                    f"a {type(module).__module__}.{type(module).__name__} as its {name}, not a plain "
                    f"{'torch.nn.' if plain else ''}{expected.__name__}: merge adapters and undo quantization before "
                    "patching"
                )
        return None

    def weights_fault(self) -> str | None:
        """Says which part has weights that the ops cannot read, or None."""
        for name, module, expected in self._expected():
            if expected is nn.Dropout:
                continue
            weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
            if getattr(module, "weight", None) is None:
                return f"no weight in its {name}, which ticketops does not serve"
            if weight is None or type(weight) not in (nn.Parameter, Tensor) or not weight.is_floating_point():
                kind = type(getattr(module, "weight", None))
                return (
                    f"a {kind.__module__}.{kind.__name__} as the weight of its {name}, not a plain parameter: undo "
                    "quantization before patching, and what torch.nn.utils computes it by (prune, weight_norm, ...)"
                )
            if bias is None and expected in self.biased:
                return f"no bias in its {name}, which ticketops does not serve"
        return None

    def _expected(self) -> Iterator[tuple[str, nn.Module, type[nn.Module]]]:
        for name, linear in self.linears().items():
            # What `shrink` left of one has no weight to read.
            if type(linear) is not RemovedLinear:
                yield name, linear, nn.Linear
        if self.attention_norm is not None:
            yield "attention_norm", self.attention_norm, self.norm
        yield "ffn_norm", self.ffn_norm, self.norm
        for index, dropout in enumerate(self.dropouts):
            yield f"dropout {index}", dropout, nn.Dropout


def rate(dropout: Any, training: bool | None = None) -> float:
    """Returns the current dropout probability of a module.

    Args:
        dropout: dropout module. A module of another class counts as 0; `LayerParts.fault` refuses it.
        training: True for training mode; by default the module's own mode.
    """
    return getattr(dropout, "p", 0.0) if (dropout.training if training is None else training) else 0.0


@dataclass(frozen=True)
class Adapter:
    """Describes one architecture to ticketops.

    Attributes:
        modeling: module of the architecture in transformers.
        base: class of the bare model, `model.base_model` of every task head.
        swaps: stock class -> the subclass that replaces it when a model is patched, of modules and of task heads.
        encoder: function that returns the module with the list of layers in a bare model.
        embeddings: function that returns the module that embeds a bare model's inputs.
        parts: function that returns the parts of a layer.
        resize: function (layer, heads) that tells a shrunk layer's attention modules which heads of the architecture
            they have, in ascending order.
        refusal: function that returns why a configuration is not supported, or None.
        calls: the modules of a layer that its patched class still calls, besides itself and those to queries, keys and
            values; hooks on the others are refused.
        attentions: those of them whose results have attention weights under eager attention.
        calls_with_heads: those of them that see what they see in a stock layer where a ticket picks heads.
        first_token_heads: task heads that read nothing but each row's first token, and for each the class of its
            `classifier` where that takes the token from the row; None where the pooler or the head's forward does.
        pooler: the class of the bare model's pooler, which reads each row's first token.
        stack: the name of the list of layers in the encoder; their parameters are "the encoder" of weight counts.
        inputs: kind of the model's inputs.
        gated: True if the FFNs have a gate.
        biases: function of a configuration that returns if the linear layers of attention, the first ones of the FFN
            and its last one have biases.
        window: function (configuration, layer) that returns the attention window in tokens; None for the whole
            sequence.
        reads_positions: True if layers get position_ids, with which flash attention separates packed sequences.
        no_mask: attention mask argument with which the bare model builds no mask, since the layers read the packing.
        shrunk: classes that `resize` gives to modules of a shrunk layer.
        position_terms: function of a configuration that returns how many products with position vectors are added to
            each attention score, and how many linear layers of its own a layer projects them by.
        position_bias: function that returns an encoder's table of a bias by distance, an embedding [buckets, heads]
            that all layers share; None if attention has no such bias.
    """

    modeling: ModuleType
    base: type[nn.Module]
    swaps: dict[type[nn.Module], type[nn.Module]]
    encoder: Callable[[Any], nn.Module]
    parts: Callable[[Any], LayerParts]
    resize: Callable[[Any, list[int]], None]
    refusal: Callable[[Any], str | None]
    calls: Callable[[Any], tuple[nn.Module, ...]]
    calls_with_heads: Callable[[Any], tuple[nn.Module, ...]]
    attentions: Callable[[Any], tuple[nn.Module, ...]] = lambda layer: ()
    embeddings: Callable[[Any], nn.Module] = lambda base: base.embeddings
    first_token_heads: Mapping[type[nn.Module], type[nn.Module] | None] = field(default_factory=dict)
    pooler: type[nn.Module] | None = None
    stack: str = "layer"
    inputs: Inputs = TEXT
    gated: bool = False
    biases: Callable[[Any], tuple[bool, bool, bool]] = lambda config: (True, True, True)
    window: Callable[[Any, int], int | None] = lambda config, layer: None
    reads_positions: bool = False
    no_mask: Mapping[str, None] | None = None
    shrunk: tuple[type[nn.Module], ...] = ()
    position_terms: Callable[[Any], tuple[int, int]] = lambda config: (0, 0)
    position_bias: Callable[[Any], nn.Module] | None = None

    def layers(self, base: Any) -> list[Any]:
        """Returns the current layers of the bare model's encoder."""
        return list(getattr(self.encoder(base), self.stack))

    def weights(self, config: Any) -> tuple[int, int, int]:
        """Returns the number of weights of a head, of a neuron, and of an FFN apart from its neurons (the output
        bias)."""
        (of_attention, of_first, of_last), hidden = self.biases(config), config.hidden_size
        inputs = 3 + self.position_terms(config)[1]
        head = ((1 + inputs) * hidden + inputs * of_attention) * head_dim(config)
        return head, (2 + self.gated) * hidden + (1 + self.gated) * of_first, hidden * of_last

    def by_distance(self, config: Any) -> bool:
        """True if attention depends on how far apart two tokens are, so that none between them may be left out."""
        windowed = any(window is not None for window in self.windows(config))
        return windowed or self.position_bias is not None or self.position_terms(config)[0] > 0

    def windows(self, config: Any) -> list[int | None]:
        """How far each layer's attention reaches; None for the whole sequence."""
        return [self.window(config, layer) for layer in range(config.num_hidden_layers)]

    @functools.cached_property
    def _kinds(self) -> dict[type[nn.Module], None]:
        """The stock classes that layers are made of."""
        own = [kind for kind in vars(self.modeling).values() if isinstance(kind, type) and issubclass(kind, nn.Module)]
        own = [kind for kind in own if kind.__module__ == self.modeling.__name__]
        return dict.fromkeys((*own, *self.swaps, *self.shrunk, *_ACTIVATIONS, *_OTHER_CLASSES))

    @functools.cached_property
    def _code(self) -> list[tuple[Any, str, Any]]:
        """What stock models are computed by, as it was when ticketops was imported: the methods of their classes and
        the functions of their module, each as its owner, its name and itself."""
        methods = [(kind, name) for kind in self._kinds for name in dict.fromkeys(("forward", *methods_of(kind)))]
        functions = [name for name, value in vars(self.modeling).items() if isinstance(value, FunctionType)]
        names: list[tuple[Any, str]] = [*methods, *((self.modeling, name) for name in functions)]
        return [(owner, name, getattr(owner, name)) for owner, name in names]

    @functools.cached_property
    def _known(self) -> frozenset[type[nn.Module]]:
        return frozenset((*self._kinds, *self.swaps.values()))

    def knows(self, module: nn.Module) -> bool:
        """True if a module's class is one that a stock model of the architecture is made of, or stands in for one."""
        kind = type(module)
        return kind in self._known or unsharded_class(kind) in self._known

    def bias_fault(self, encoder: Any) -> str | None:
        """Says what in an encoder's table of a bias by distance the ops cannot read, or None.

        Args:
            encoder: module with the list of layers.
        """
        if self.position_bias is None:
            return None
        table: Any = self.position_bias(encoder)
        if type(table) is not nn.Embedding or type(table.weight) not in (nn.Parameter, Tensor):
            kind = type(table if type(table) is not nn.Embedding else table.weight)
            return f"a {kind.__module__}.{kind.__name__} as its relative-position bias, not a plain torch.nn.Embedding"
        if table.max_norm is not None or table.scale_grad_by_freq or table.sparse or table.padding_idx is not None:
            return "a relative-position bias with max_norm, scale_grad_by_freq, sparse or padding_idx: leave these out"
        return None

    def foreign(self, layer: nn.Module) -> str | None:
        """Says which module of a layer is not of the architecture's own classes, or None."""
        for name, module in layer.named_modules():
            if not self.knows(module):
                kind = type(module)
                return (
                    f"a {kind.__module__}.{kind.__name__} as its {name}, no class of {self.modeling.__name__}: its "
                    "forward would not be called"
                )
        return None

    def altered(self) -> str | None:
        """Names a stock class's method, or a function, that has been replaced since ticketops was imported, or None."""
        for owner, name, code in self._code:
            if getattr(owner, name, None) is not code:
                return f"{owner.__name__}.{name} has been replaced by other code"
        return None


def activation_name(module: nn.Module) -> str:
    """Returns the name of an activation module in the FFN op.

    Args:
        module: activation module of the FFN.

    Returns:
        "gelu", "gelu_tanh", "relu" or "silu".

    Raises:
        UnsupportedError: any other activation.
    """
    kind = type(module)
    if kind is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    if kind not in _ACTIVATIONS:
        raise UnsupportedError(
            f"the activation {kind.__name__} is not supported: ticketops serves gelu (erf), its tanh "
            "approximations, relu and silu"
        )
    if not _computes_its_own(module, _ACTIVATIONS[kind]):
        raise UnsupportedError(f"the activation {kind.__name__} is not supported with another function as its act")
    return _ACTIVATIONS[kind]


def _computes_its_own(module: nn.Module, name: str) -> bool:
    """True unless an activation module calls a function that its class does not give it."""
    act = vars(module).get("act")
    if isinstance(act, functools.partial):
        return name == "gelu_tanh" and act.func is functional.gelu and act.keywords == {"approximate": "tanh"}
    own = getattr(act, "__func__", None) in vars(type(module)).values()
    return act is None or own or (name == "gelu" and act is functional.gelu)
