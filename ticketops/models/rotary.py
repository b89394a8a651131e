"""GTE, Jina v3 and NomicBert: LayerNorm after each sublayer as in BERT, rotary positions, and, but for Jina, FFNs whose
gate is a linear layer of its own."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn
from transformers.models.nomic_bert.modeling_nomic_bert import apply_rotary_pos_emb

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import post_norm_layer, rotation
from ticketops.models.boundary import TicketModel
from ticketops.models.embeddings import embed
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in

#: Whether the linear layers of attention, the first ones of the FFN and its last one have biases.
_BIASES = {
    "gte": (True, False, True),
    "jina_embeddings_v3": (True, True, True),
    "nomic_bert": (False, False, False),
}


class TicketRotaryLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes hidden states [.., C], and cosines and sines [.., head_dim] of the tokens' positions; returns hidden
        states, or [B, 1, C] where only first tokens are read."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        turn = rotation(apply_rotary_pos_emb, kwargs["position_embeddings"], hidden_states, ticketops)
        return post_norm_layer(self._ticketops, _parts(self), hidden_states, ticketops, turn)


class TicketRotaryEmbeddings(nn.Module):
    """Words and token types, by one op where `embed` can."""

    def forward(
        self,
        input_ids: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
    ) -> Tensor:
        """Takes ids [B, S], or embeddings of words [B, S, C]; returns [B, S, C]."""
        done = embed(self, input_ids, None, token_type_ids) if inputs_embeds is None else None
        if done is None:
            done = super().forward(input_ids, token_type_ids, position_ids, inputs_embeds)
        return done


def _parts(layer: Any) -> LayerParts:
    attention, mlp, drop = layer.self_attn, layer.mlp, layer.post_attention_dropout
    gated, inner = hasattr(mlp, "gate_proj"), [mlp.dropout] if hasattr(mlp, "dropout") else []
    # What transformers calls the gate goes through the activation, and what it calls up multiplies the result.
    first, gate, last = (mlp.gate_proj, mlp.up_proj, mlp.down_proj) if gated else (mlp.fc1, None, mlp.fc2)
    return LayerParts(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        fc1=first,
        fc2=last,
        activation=mlp.act_fn if gated else mlp.activation_fn,
        attention_norm=layer.post_attention_layernorm,
        ffn_norm=layer.post_mlp_layernorm,
        dropouts=(drop, layer.post_mlp_dropout, *inner),
        scale=attention.scaling,
        rates=(attention.attention_dropout if attention.training else 0.0, rate(drop), rate(layer.post_mlp_dropout)),
        head_dim=attention.head_dim,
        causal=attention.is_causal,
        gated=gated,
        gate=gate,
        biased=(nn.LayerNorm,),
        activation_dropout=sum(map(rate, inner)),
    )


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes the adapter of an architecture whose modules are named and built as NomicBert's.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """

    def stock(name: str) -> Any:
        return getattr(modeling, architecture.prefix + name)

    mixins = {"Model": TicketModel, "Embeddings": TicketRotaryEmbeddings, "Layer": TicketRotaryLayer}
    return Adapter(
        modeling=modeling,
        base=stock("Model"),
        swaps={stock(name): stand_in(mixin, stock(name)) for name, mixin in mixins.items()},
        encoder=lambda base: base,
        parts=_parts,
        # Attention takes the number of heads from the weights.
        resize=lambda layer, heads: None,
        refusal=lambda config: None,
        calls=lambda layer: (),
        calls_with_heads=lambda layer: (),
        # Jina's classifier takes the first token from the row, and the others have a pooler.
        first_token_heads={
            stock("ForSequenceClassification"): getattr(modeling, f"{architecture.prefix}ClassificationHead", None)
        },
        pooler=stock("Pooler"),
        stack="layers",
        gated=architecture.gated,
        biases=lambda config: _BIASES[architecture.package],
        # The layers of the others do not get to see the positions.
        reads_positions=architecture.package == "nomic_bert",
    )
