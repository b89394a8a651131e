"""ModernBERT: LayerNorm before each sublayer, one linear layer for q, k and v, rotary positions, gated FFNs without
biases, and attention within a window in most layers."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import NO_DROPOUT, pre_norm_layer, rotation
from ticketops.models.boundary import TicketModel
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in


class TicketModernBertEncoderLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState
    attn: Any
    attn_norm: nn.Module
    mlp: Any
    mlp_norm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes and returns hidden states [.., C]; takes cosines and sines [.., head_dim] of the tokens' positions."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        turn = rotation(apply_rotary_pos_emb, kwargs["position_embeddings"], hidden_states, ticketops)
        norms, drops = (self.attn_norm, self.mlp_norm), (self.attn.out_drop, NO_DROPOUT)
        return pre_norm_layer(self._ticketops, _parts(self), norms, drops, hidden_states, ticketops, turn)


def _window(config: Any, kind: str) -> int | None:
    return config.local_attention // 2 if kind == "sliding_attention" else None


def _parts(layer: Any) -> LayerParts:
    # The first layer's input is normed by the embeddings already.
    norm, attention = None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm, layer.attn
    dropouts = [attention.out_drop, layer.mlp.drop]
    return LayerParts(
        qkv=(attention.Wqkv,),
        output=attention.Wo,
        fc1=layer.mlp.Wi,
        fc2=layer.mlp.Wo,
        activation=layer.mlp.act,
        attention_norm=norm,
        ffn_norm=layer.mlp_norm,
        dropouts=tuple(dropout for dropout in dropouts if not isinstance(dropout, nn.Identity)),
        scale=attention.head_dim**-0.5,
        rates=(attention.attention_dropout if attention.training else 0.0, rate(attention.out_drop), 0.0),
        norm_first=True,
        head_dim=attention.head_dim,
        causal=attention.is_causal,
        gated=True,
        biased=(),
        activation_dropout=rate(layer.mlp.drop),
        window=_window(attention.config, layer.attention_type),
    )


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes ModernBERT's adapter.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    mixins = {modeling.ModernBertModel: TicketModel, modeling.ModernBertEncoderLayer: TicketModernBertEncoderLayer}
    return Adapter(
        modeling=modeling,
        base=modeling.ModernBertModel,
        swaps={stock: stand_in(mixin, stock) for stock, mixin in mixins.items()},
        encoder=lambda base: base,
        parts=_parts,
        # Its attention takes the number of heads from the weights.
        resize=lambda layer, heads: None,
        refusal=lambda config: None,
        calls=lambda layer: (layer.attn_norm, layer.mlp_norm, layer.attn.out_drop),
        calls_with_heads=lambda layer: (layer.attn_norm, layer.mlp_norm, layer.attn.out_drop),
        first_token_heads={modeling.ModernBertForSequenceClassification: None},
        stack="layers",
        gated=architecture.gated,
        biases=lambda config: (config.attention_bias, config.mlp_bias, config.mlp_bias),
        window=lambda config, layer: _window(config, config.layer_types[layer]),
        no_mask={"full_attention": None, "sliding_attention": None},
    )
