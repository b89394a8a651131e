"""Look-up of a model's adapter, and checks that the ops support its layers."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import transformers
from packaging.version import Version
from torch import nn
from transformers import PreTrainedModel

from ticketops.architectures import ARCHITECTURES, Architecture
from ticketops.errors import UnsupportedError
from ticketops.models.adapter import Adapter, LayerParts, activation_name
from ticketops.models.containers import is_container
from ticketops.models.record import head_dim, held_ticket, kept_neurons, num_neurons
from ticketops.models.refusals import why_not
from ticketops.models.swapping import stock_class
from ticketops.tickets import WeightCounts


def _adapter(architecture: Architecture) -> Adapter:
    family = import_module(f"ticketops.models.{architecture.family}")
    adapter: Adapter = family.make_adapter(import_module(architecture.module), architecture)
    # Records the stock forward methods before anyone can replace them.
    adapter.altered()
    return adapter


def _is_installed(architecture: Architecture) -> bool:
    if architecture.since and Version(transformers.__version__) < Version(architecture.since):
        return False
    return find_spec(f"transformers.models.{architecture.package}") is not None


#: Those of the architectures that the installed transformers has.
ADAPTERS = tuple(map(_adapter, filter(_is_installed, ARCHITECTURES)))
_BY_BASE = {adapter.base: adapter for adapter in ADAPTERS}


def check_installed(model_type: Any) -> None:
    """Checks that the installed transformers has an architecture.

    Args:
        model_type: from config.json; what ticketops does not know is not refused here.

    Raises:
        UnsupportedError: ticketops serves it, and a later version of transformers brought it.
    """
    for architecture in ARCHITECTURES:
        if architecture.package == model_type and not _is_installed(architecture):
            raise UnsupportedError(
                f"transformers {transformers.__version__} has no {architecture.prefix} models that ticketops serves: "
                f"install transformers {architecture.since} or later"
            )


def adapter_of(base: type[nn.Module]) -> Adapter:
    """Returns the adapter of an architecture.

    Args:
        base: stock class of the bare model.
    """
    return _BY_BASE[base]


def find_adapter(model: nn.Module) -> tuple[Adapter, Any]:
    """Finds the adapter that serves a model, and the bare model inside it.

    Args:
        model: a transformers model, bare or with a task head.

    Raises:
        UnsupportedError: names what is not served.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedError(f"{type(model).__name__} is not a transformers model{_hint(model)}")
    base = model.base_model
    for adapter in ADAPTERS:
        if isinstance(base, adapter.base):
            refusal = adapter.refusal(base.config)
            if refusal:
                raise UnsupportedError(f"{type(model).__name__} with {refusal}")
            return adapter, base
    check_installed(getattr(base.config, "model_type", None))
    served = ", ".join(adapter.base.__name__ for adapter in ADAPTERS)
    raise UnsupportedError(
        f"{type(model).__name__} is not supported: {why_not(model)}; ticketops serves {served} and their task heads"
    )


def _hint(model: nn.Module) -> str:
    """Returns a remedy for a model inside another object, or an empty string."""
    if hasattr(model, "peft_config"):
        if hasattr(model, "merge_and_unload"):
            return ": merge its adapters first, model = model.merge_and_unload()"
        # With prompt learning, the layers are stock ones.
        return ": patch the model inside, model.get_base_model()"
    if is_container(model):
        return ": give the model inside, or shrink the object itself and call its save()"
    if hasattr(model, "model_body"):
        # SetFit's, whose body is a SentenceTransformer.
        return ": give its model_body"
    if hasattr(model, "_orig_mod") or hasattr(model, "module"):
        return ": patch before torch.compile and before wrapping"
    return ""


def check_supported(model: nn.Module) -> None:
    """Checks that `patch` would serve a model, without touching it.

    Args:
        model: a transformers model, bare or with a task head.

    Raises:
        UnsupportedError: names what is not served.
    """
    check_layers(*find_adapter(model))


def check_layers(adapter: Adapter, base: Any) -> list[LayerParts]:
    """Checks that the ops support a model's layers.

    Args:
        adapter: adapter of the model.
        base: bare model.

    Returns:
        The prunable parts of each layer.

    Raises:
        UnsupportedError: names the layer and what in it is not served.
    """
    found = []
    if fault := adapter.bias_fault(adapter.encoder(base)):
        raise UnsupportedError(f"the model has {fault}")
    held, layers, dim = held_ticket(base.config), adapter.layers(base), head_dim(base.config)
    if len(layers) != held.num_layers:
        raise UnsupportedError(
            f"the model has {len(layers)} layers where its configuration says {held.num_layers}: set "
            f"model.config.num_hidden_layers = {len(layers)}, which saving needs too"
        )
    if len(set(map(id, layers))) < len(layers):
        raise UnsupportedError(
            "several places in the model share one layer, which a ticket could not tell apart: give each place a copy "
            "of it (copy.deepcopy)"
        )
    for module in base.modules():
        if hasattr(module, "_hf_hook"):
            raise UnsupportedError(
                "accelerate moves this model's weights between devices (device_map or offload): load the whole model "
                "on one device before patching"
            )
    widths = kept_neurons(held, num_neurons(base.config)).sum(1).tolist()
    rows = zip(layers, held.head_mask.sum(1).tolist(), widths, strict=True)
    for index, (layer, heads, width) in enumerate(rows):
        if stock_class(layer) not in adapter.swaps:
            name = type(layer).__name__
            raise UnsupportedError(f"layer {index} is a {name}, no stock layer of {adapter.base.__name__}")
        parts = adapter.parts(layer)
        activation_name(parts.activation)
        if fault := parts.fault() or adapter.foreign(layer) or parts.weights_fault():
            raise UnsupportedError(f"layer {index} has {fault}")
        in_qkv, in_fc1 = parts.repeats
        channels, neurons = parts.qkv[0].out_features // in_qkv, parts.fc1.out_features // in_fc1
        if (channels, neurons) != (heads * dim, width):
            raise UnsupportedError(
                f"layer {index} has weights for {channels / dim:g} heads where its configuration says {heads}, or for "
                f"{neurons} neurons where it says {width}: remove structures with ticketops.shrink, "
                "which keeps the two in step"
            )
        found.append(parts)
    return found


def weight_counts(model: nn.Module) -> WeightCounts:
    """Counts the weights that pruning can remove from a model.

    Args:
        model: a transformers model, patched or stock; shared weights count once.

    Returns:
        Weights in one head, in one FFN, in the encoder's layers and in the whole model.

    Raises:
        UnsupportedError: a model that ticketops does not serve.
    """
    adapter, base = find_adapter(model)
    head, neuron, rest = adapter.weights(base.config)
    return WeightCounts(
        head=head,
        ffn=num_neurons(base.config) * neuron + rest,
        encoder=sum(p.numel() for layer in adapter.layers(base) for p in layer.parameters()),
        total=sum(p.numel() for p in model.parameters()),
        neuron=neuron,
    )
