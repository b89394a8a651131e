"""ModernBERT: LayerNorm before each sublayer, one linear layer for q, k and v, rotary positions, gated FFNs without
biases, and attention within a window in most layers."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.modernbert.modeling_modernbert import apply_rotary_pos_emb

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import Turn, attend, feed_forward, project, rope_refusal, rotation, whole_layer, with_unread
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
        state, parts, around = self._ticketops, _parts(self), (self.attn_norm, self.mlp_norm, self.attn.out_drop)
        state.check(ticketops)
        if (done := ticketops.by_graph(state.index, hidden_states, turn)) is not None:
            return done
        hidden_states = ticketops.enter(hidden_states)
        done = whole_layer(state, parts, around, hidden_states, ticketops, turn)
        if done is None:
            done = self._by_modules(hidden_states, parts, turn, ticketops)
        return ticketops.leave(done, state.index)

    def _by_modules(self, hidden_states: Tensor, parts: LayerParts, turn: Turn, ticketops: Call) -> Tensor:
        state, attention = self._ticketops, self.attn
        normed = self.attn_norm(hidden_states)
        contexts = attend(
            state,
            parts.qkv,
            normed,
            ticketops,
            parts.scale,
            parts.rates[0],
            window=parts.window,
            turn=turn,
        )
        projected = project(state, attention.Wo, contexts, hidden_states)
        if attention.Wo.bias is not None:
            projected = projected + attention.Wo.bias
        hidden_states = hidden_states + attention.out_drop(projected)
        if not state.kept.attention:
            hidden_states = with_unread(self.attn_norm, hidden_states, normed)
        if not state.kept.ffn:
            return with_unread(self.mlp_norm, hidden_states)
        output = feed_forward(state, parts, self.mlp_norm(hidden_states), ticketops)
        return hidden_states + output.view_as(hidden_states)


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


def _refusal(config: Any) -> str | None:
    return next(filter(None, (rope_refusal(config.rope_parameters[kind]) for kind in set(config.layer_types))), None)


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
        refusal=_refusal,
        calls=lambda layer: (layer.attn_norm, layer.mlp_norm, layer.attn.out_drop),
        calls_with_heads=lambda layer: (layer.attn_norm, layer.mlp_norm, layer.attn.out_drop),
        stack="layers",
        ops=("attention", "ffn", "projection"),
        gated=architecture.gated,
        biases=lambda config: (config.attention_bias, config.mlp_bias, config.mlp_bias),
        window=lambda config, layer: _window(config, config.layer_types[layer]),
        no_mask={"full_attention": None, "sliding_attention": None},
    )
