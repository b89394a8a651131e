"""ViT: LayerNorm before each sublayer, other names, and images that need no packing."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import pre_norm_layer
from ticketops.models.boundary import TicketModel
from ticketops.models.inputs import Images
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in


class PreNormLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState
    attention: Any
    mlp: Any
    layernorm_before: nn.LayerNorm
    layernorm_after: nn.LayerNorm
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes and returns hidden states [B, S, C]."""
        state = self._ticketops
        if ticketops is None:
            state.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        norms, drops = (self.layernorm_before, self.layernorm_after), (self.dropout, self.dropout)
        return pre_norm_layer(state, _parts(self), norms, drops, hidden_states, ticketops)


def _parts(layer: Any) -> LayerParts:
    attention = layer.attention
    return LayerParts(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        fc1=layer.mlp.fc1,
        fc2=layer.mlp.fc2,
        activation=layer.mlp.activation_fn,
        attention_norm=layer.layernorm_before,
        ffn_norm=layer.layernorm_after,
        dropouts=(layer.dropout,),
        scale=attention.scaling,
        rates=(attention.attention_dropout if attention.training else 0.0, rate(layer.dropout), rate(layer.dropout)),
        norm_first=True,
        head_dim=attention.head_dim,
        causal=attention.is_causal,
    )


def _resize(layer: Any, heads: list[int]) -> None:
    layer.attention.num_attention_heads = len(heads)


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes the adapter of an architecture whose modules are named and built as ViT's.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    base, layer = (getattr(modeling, architecture.prefix + name) for name in ("Model", "Layer"))
    return Adapter(
        modeling=modeling,
        base=base,
        swaps={base: stand_in(TicketModel, base), layer: stand_in(PreNormLayer, layer)},
        encoder=lambda base: base,
        parts=_parts,
        resize=_resize,
        refusal=lambda config: None,
        calls=lambda layer: (layer.layernorm_before, layer.layernorm_after, layer.dropout),
        calls_with_heads=lambda layer: (layer.layernorm_before, layer.layernorm_after, layer.dropout),
        stack="layers",
        inputs=Images(architecture.extra_tokens),
    )
