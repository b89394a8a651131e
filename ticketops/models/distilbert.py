"""DistilBERT: BERT's mathematics under other names, and no dropout after attention."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import TicketEncoder, post_norm_layer
from ticketops.models.boundary import TicketModel
from ticketops.models.embeddings import embed
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in


class TicketTransformerBlock(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes hidden states [.., C]; returns them, or [B, 1, C] where only first tokens are read."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        return post_norm_layer(self._ticketops, _parts(self), hidden_states, ticketops)


class TicketDistilBertEmbeddings(nn.Module):
    """Words and positions, by one op where `embed` can."""

    def forward(self, input_ids: Any, inputs_embeds: Any = None, position_ids: Any = None) -> Tensor:
        """Takes ids [B, S], or without them embeddings of words [B, S, C]; returns [B, S, C]."""
        done = embed(self, input_ids, position_ids)
        if done is None:
            done = super().forward(input_ids, inputs_embeds, position_ids)
        return done


def _parts(layer: Any) -> LayerParts:
    attention = layer.attention
    return LayerParts(
        qkv=(attention.q_lin, attention.k_lin, attention.v_lin),
        output=attention.out_lin,
        fc1=layer.ffn.lin1,
        fc2=layer.ffn.lin2,
        activation=layer.ffn.activation,
        attention_norm=layer.sa_layer_norm,
        ffn_norm=layer.output_layer_norm,
        dropouts=(attention.dropout, layer.ffn.dropout),
        scale=attention.scaling,
        rates=(rate(attention.dropout, attention.training), 0.0, rate(layer.ffn.dropout)),
        head_dim=attention.attention_head_size,
        causal=attention.is_causal,
    )


def _resize(layer: Any, heads: list[int]) -> None:
    layer.attention.n_heads = len(heads)
    layer.attention.dim = len(heads) * layer.attention.attention_head_size


def _refusal(config: Any) -> str | None:
    if config.chunk_size_feed_forward:
        return f"chunk_size_feed_forward={config.chunk_size_feed_forward}: set it to 0"
    return None


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes DistilBERT's adapter.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    mixins = {
        modeling.DistilBertModel: TicketModel,
        modeling.Embeddings: TicketDistilBertEmbeddings,
        modeling.Transformer: TicketEncoder,
        modeling.TransformerBlock: TicketTransformerBlock,
    }
    return Adapter(
        modeling=modeling,
        base=modeling.DistilBertModel,
        swaps={stock: stand_in(mixin, stock) for stock, mixin in mixins.items()},
        encoder=lambda base: base.transformer,
        parts=_parts,
        resize=_resize,
        refusal=_refusal,
        calls=lambda layer: (),
        calls_with_heads=lambda layer: (),
        first_token_heads={modeling.DistilBertForSequenceClassification: None},
    )
