"""Reasons why an architecture is not supported: features of its modules that the ops or adapters lack."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto import modeling_auto as auto

_ROTARY = (
    "rotary position embeddings, which only the adapters of EuroBERT, GTE, Jina v3, ModernBERT and NomicBert apply"
)
_PRE_NORM = "LayerNorm before each sublayer, in modules that no adapter knows"
#: Model type -> reason, for reasons that the names of the modules do not show.
_KNOWN = {
    "albert": "one layer's weights serve all layers, so a ticket has nothing of a single layer to prune",
    "big_bird": "block-sparse attention (ops.attention attends to every token of a row)",
    "canine": "attention over characters in local blocks, then over fewer positions",
    "fnet": "a Fourier transform in place of attention",
    "funnel": "sequences that become shorter from block to block, with relative positions in the scores",
    "longformer": "tokens that attend to all others beside a window (ops.attention has one window for all tokens)",
    "megatron-bert": _PRE_NORM,
    "mobilebert": "bottleneck layers with several FFNs each",
    "mra": "approximate attention",
    "nystromformer": "approximate attention",
    "perceiver": "cross attention between inputs and latents",
    "reformer": "attention by hashing",
    "roformer": _ROTARY,
    "roberta-prelayernorm": _PRE_NORM,
    "squeezebert": "grouped convolutions in place of linear layers",
    "xlnet": "two attention streams with relative position terms in their scores",
    "xmod": "an adapter a language inside each layer",
    "yoso": "approximate attention",
}


def why_not(model: PreTrainedModel) -> str:
    """Returns the reason why an architecture has no adapter, and the remedy.

    Args:
        model: model of any architecture, on any device including "meta".

    Returns:
        The end of a sentence that begins with "X is not supported: ".
    """
    config = model.config
    if config.is_encoder_decoder:
        return "it is an encoder with a decoder, joined by cross attention; ticketops serves encoders alone"
    if type(model.base_model).__module__.startswith("transformers_modules."):
        return (
            "its code came with its weights: load it without trust_remote_code where transformers has its architecture"
        )
    kind = config.model_type
    causal = kind in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if causal and kind not in _KNOWN:
        return "it is a decoder, whose attention is causal; ticketops serves encoders"
    found = list(dict.fromkeys(_signs(model)))
    if found:
        return f"it has {'; '.join(found)}"
    return (
        "no adapter knows where its layers are; where they are built as BERT's, CONTRIBUTING.md adds one in a few lines"
    )


def _signs(model: PreTrainedModel) -> Iterator[str]:
    config: Any = model.config
    if config.model_type in _KNOWN:
        yield _KNOWN[config.model_type]
    modules = dict(model.base_model.named_modules())
    kinds = {type(module).__name__ for module in modules.values()}
    if not any("Attention" in kind for kind in kinds) and config.model_type not in _KNOWN:
        yield "no attention layers"
    leaves = {name.rpartition(".")[2] for name in modules}
    if any("Rotary" in kind for kind in kinds):
        yield _ROTARY
    if any("Disentangled" in kind or "Relative" in kind for kind in kinds) or any(
        "relative" in name for name in leaves
    ):
        yield "relative position terms in the attention scores, of which only MPNet's and DeBERTa-v2's adapters add any"
    if _value(config, "num_key_value_heads") not in (None, _value(config, "num_attention_heads")):
        yield "keys and values shared by several heads (a pruned head takes its own q, k, v and o)"
    if any("RMSNorm" in kind for kind in kinds):
        yield "RMSNorm, which only EuroBERT's adapter serves"
    if any(isinstance(module, nn.Conv1d) and _in_layer(name) for name, module in modules.items()):
        yield "convolutions inside its layers"


def _value(config: Any, name: str) -> Any:
    """Returns an attribute of a configuration; None if the whole model has no single value."""
    # A configuration with different layers raises another error than AttributeError.
    with contextlib.suppress(Exception):
        return getattr(config, name)
    return None


def _in_layer(name: str) -> bool:
    """Returns True if a module of this name is inside a list of layers."""
    return any(part.isdigit() for part in name.split("."))
