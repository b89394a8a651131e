"""Description of how ticketops supports a model, from its configuration alone: no weights are loaded or allocated."""

from typing import Any

import torch
import transformers
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ticketops.errors import InputError, UnsupportedError
from ticketops.models.adapter import activation_name
from ticketops.models.record import MAX_LAYERS, head_dim, held_ticket, kept_neurons, num_neurons
from ticketops.models.registry import check_supported, find_adapter
from ticketops.ops import backends


def describe(config: PretrainedConfig) -> dict[str, Any]:
    """Describes how ticketops would run a model.

    Args:
        config: configuration of the model.

    Returns:
        JSON values: `architecture`, `model_type`, `adapter` (its bare model's class), `layers`, `heads`,
        `neurons` (the FFNs' width), `hidden_size`, `head_size`, `activation`, `dtype`, `heads_left`, `ffns_left`,
        `neurons_left`, and `backends`: for each op, available device and dtype of the model, the backend and the
        reason for it.

    Raises:
        UnsupportedError: ticketops does not support the model; gives the reason.
        InputError: no model can be built from the configuration.
    """
    if quantized := getattr(config, "quantization_config", None):
        method = quantized.get("quant_method") if isinstance(quantized, dict) else None
        raise UnsupportedError(
            f"its weights are quantized ({method or type(quantized).__name__}), and the ops read plain ones: take the "
            "checkpoint before quantization"
        )
    model = _skeleton(config)
    check_supported(model)
    adapter, base = find_adapter(model)
    config, held, size = base.config, held_ticket(base.config), head_dim(base.config)
    dtype = config.dtype or torch.float32
    rows = [row for row in backends.explain() if row["dtype"] in {str(dtype).removeprefix("torch."), "bfloat16"}]
    for row in rows:
        if (row["op"], row["backend"]) == ("attention", "triton") and size > 128:
            row["why"] = f"it would refuse heads of size {size}, above 128: set TICKETOPS_BACKEND=reference"
    return {
        "architecture": type(model).__name__,
        "model_type": config.model_type,
        "adapter": adapter.base.__name__,
        "layers": held.num_layers,
        "heads": held.num_heads,
        "neurons": num_neurons(config),
        "hidden_size": config.hidden_size,
        "head_size": size,
        "activation": activation_name(adapter.parts(adapter.layers(base)[0]).activation),
        "dtype": str(dtype).removeprefix("torch."),
        "heads_left": int(held.head_mask.sum()),
        "ffns_left": int(held.ffn_mask.sum()),
        "neurons_left": int(kept_neurons(held, num_neurons(config)).sum()),
        "backends": rows,
    }


def _skeleton(config: PretrainedConfig) -> PreTrainedModel:
    """Builds the model on the meta device: the class that the configuration names, otherwise the bare model."""
    layers = getattr(config, "num_hidden_layers", 1)
    if not isinstance(layers, int) or layers > MAX_LAYERS:
        raise InputError(f"its config.json claims {layers} layers: ticketops serves 1 to {MAX_LAYERS}")
    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    make: Any = AutoModel.from_config
    if isinstance(named, type) and issubclass(named, PreTrainedModel) and isinstance(config, named.config_class or ()):
        make = named._from_config
    try:
        with torch.device("meta"), no_init_weights():
            model: PreTrainedModel = make(config)
    except (InputError, UnsupportedError):
        raise
    # An inconsistent configuration raises any exception of the architecture's code.
    except Exception as error:
        reason = " ".join((str(error) or type(error).__name__).split())[:300]
        raise InputError(f"no {config.model_type} model can be made of its config.json ({reason})") from error
    return model
