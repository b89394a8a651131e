"""ModernBERT: LayerNorm before each sublayer, one linear layer for q, k and v, rotary positions, gated FFNs without
biases, and attention within a window in most layers."""

from functools import partial
from typing import Any

from torch import Tensor, nn
from transformers.models.modernbert import modeling_modernbert as modernbert

from ticketops.models.adapter import Adapter, Call, LayerParts, LayerState, given
from ticketops.models.bert import attend, feed_forward, project


class TicketModernBertEncoderLayer(modernbert.ModernBertEncoderLayer):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Tensor:
        """Takes and returns hidden states [.., C]; takes cosines and sines [.., head_dim] of the tokens' positions."""
        ticketops, state, attention = given(ticketops), self._ticketops, self.attn
        state.check(_parts(self), ticketops)
        contexts = attend(
            state,
            (attention.Wqkv,),
            self.attn_norm(hidden_states),
            ticketops,
            attention.head_dim**-0.5,
            attention.attention_dropout if self.training else 0.0,
            window=_window(attention.config, state.index),
            turn=partial(_turn, hidden_states, kwargs["position_embeddings"]),
        )
        projected = project(state, attention.Wo, contexts, hidden_states)
        if attention.Wo.bias is not None:
            projected = projected + attention.Wo.bias
        hidden_states = hidden_states + attention.out_drop(projected)
        if not state.kept.ffn:
            return hidden_states
        output = feed_forward(state, self.mlp.Wi, self.mlp.Wo, self.mlp_norm(hidden_states), ticketops)
        return hidden_states + output.view_as(hidden_states)


def _turn(
    hidden_states: Tensor, embeddings: tuple[Tensor, Tensor], query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor]:
    """Turns q and k [tokens, heads, head_dim] by their tokens' positions, which one row of a batch may give for all."""
    cosines, sines = (x.expand(*hidden_states.shape[:-1], -1).flatten(0, 1) for x in embeddings)
    turned: tuple[Tensor, Tensor] = modernbert.apply_rotary_pos_emb(query, key, cosines, sines)
    return turned


def _window(config: Any, layer: int) -> int | None:
    return config.local_attention // 2 if config.layer_types[layer] == "sliding_attention" else None


def _parts(layer: Any) -> LayerParts:
    # The first layer's input is normed by the embeddings already.
    norm = None if isinstance(layer.attn_norm, nn.Identity) else layer.attn_norm
    dropouts = [layer.attn.out_drop, layer.mlp.drop]
    return LayerParts(
        qkv=(layer.attn.Wqkv,),
        output=layer.attn.Wo,
        fc1=layer.mlp.Wi,
        fc2=layer.mlp.Wo,
        activation=layer.mlp.act,
        attention_norm=norm,
        ffn_norm=layer.mlp_norm,
        dropouts=tuple(dropout for dropout in dropouts if not isinstance(dropout, nn.Identity)),
        gated=True,
        bare=True,
    )


def _refusal(config: Any) -> str | None:
    if config.mlp_dropout:
        return f"mlp_dropout={config.mlp_dropout}: ops.ffn has no dropout between its layers; set it to 0"
    for kind in set(config.layer_types):
        rope = config.rope_parameters[kind]["rope_type"]
        if rope in ("dynamic", "longrope"):
            return f"rope_type {rope!r}: positions that change with the longest row of a batch; set it to 'default'"
    return None


MODERNBERT = Adapter(
    base=modernbert.ModernBertModel,
    swaps={modernbert.ModernBertEncoderLayer: TicketModernBertEncoderLayer},
    encoder=lambda base: base,
    parts=_parts,
    # Its attention takes the number of heads from the weights.
    resize=lambda layer, heads: None,
    refusal=_refusal,
    calls=lambda layer: (layer.attn_norm, layer.mlp_norm, layer.attn.out_drop),
    stack="layers",
    ops=("attention", "ffn", "projection"),
    gated=True,
    biases=lambda config: (config.attention_bias, config.mlp_bias),
    window=_window,
    no_mask={"full_attention": None, "sliding_attention": None},
)
