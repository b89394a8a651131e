"""EuroBERT: RMSNorm before each sublayer, rotary positions, and FFNs whose gate is a linear layer of its own."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.eurobert.modeling_eurobert import EuroBertRMSNorm, apply_rotary_pos_emb

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts
from ticketops.models.bert import NO_DROPOUT, pre_norm_layer, rotation
from ticketops.models.boundary import TicketModel
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in


class TicketEuroBertLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState
    input_layernorm: nn.Module
    post_attention_layernorm: nn.Module

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes and returns hidden states [.., C]; takes cosines and sines [.., head_dim] of the tokens' positions."""
        state = self._ticketops
        if ticketops is None:
            state.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        turn = rotation(apply_rotary_pos_emb, kwargs["position_embeddings"], hidden_states, ticketops)
        norms, drops = (self.input_layernorm, self.post_attention_layernorm), (NO_DROPOUT, NO_DROPOUT)
        return pre_norm_layer(state, _parts(self), norms, drops, hidden_states, ticketops, turn)


def _parts(layer: Any) -> LayerParts:
    attention, mlp = layer.self_attn, layer.mlp
    return LayerParts(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        # What transformers calls the gate goes through the activation, and what it calls up multiplies the result.
        fc1=mlp.gate_proj,
        gate=mlp.up_proj,
        fc2=mlp.down_proj,
        activation=mlp.act_fn,
        attention_norm=layer.input_layernorm,
        ffn_norm=layer.post_attention_layernorm,
        norm=EuroBertRMSNorm,
        dropouts=(),
        scale=attention.scaling,
        rates=(attention.attention_dropout if attention.training else 0.0, 0.0, 0.0),
        head_dim=attention.head_dim,
        causal=attention.is_causal,
        norm_first=True,
        gated=True,
        biased=(),
    )


def _refusal(config: Any) -> str | None:
    if config.num_key_value_heads != config.num_attention_heads:
        return (
            f"num_key_value_heads={config.num_key_value_heads} for num_attention_heads={config.num_attention_heads}: "
            "heads that share keys and values cannot be pruned one by one, so ticketops serves EuroBERT-210m's kind, "
            "which has as many of both"
        )
    return None


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes EuroBERT's adapter.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    mixins = {modeling.EuroBertModel: TicketModel, modeling.EuroBertDecoderLayer: TicketEuroBertLayer}
    return Adapter(
        modeling=modeling,
        base=modeling.EuroBertModel,
        swaps={stock: stand_in(mixin, stock) for stock, mixin in mixins.items()},
        encoder=lambda base: base,
        embeddings=lambda base: base.embed_tokens,
        parts=_parts,
        # Attention takes the number of heads from the weights.
        resize=lambda layer, heads: None,
        refusal=_refusal,
        calls=lambda layer: (layer.input_layernorm, layer.post_attention_layernorm),
        calls_with_heads=lambda layer: (layer.input_layernorm, layer.post_attention_layernorm),
        stack="layers",
        gated=architecture.gated,
        biases=lambda config: (config.attention_bias, config.mlp_bias, config.mlp_bias),
        reads_positions=True,
    )
