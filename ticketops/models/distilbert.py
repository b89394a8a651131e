"""DistilBERT: BERT's mathematics under other names, and no dropout after attention."""

from typing import Any

from torch import Tensor, nn
from transformers.models.distilbert import modeling_distilbert as distilbert

from ticketops.models.adapter import Adapter, Call, LayerParts, LayerState
from ticketops.models.bert import TicketEncoder, attend, feed_forward, project, read_tokens, residual_norm, whole_layer
from ticketops.models.embeddings import embed


class TicketTransformerBlock(distilbert.TransformerBlock):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call, **kwargs: Any) -> Tensor:
        """Takes hidden states [.., C]; returns them, or [B, 1, C] where only first tokens are read."""
        parts = _parts(self)
        self._ticketops.check(parts, ticketops)
        done = whole_layer(self._ticketops, parts, (), hidden_states, ticketops)
        if done is not None:
            return done
        return read_tokens(self._ticketops, self._by_modules(hidden_states, ticketops), ticketops)

    def _by_modules(self, hidden_states: Tensor, ticketops: Call) -> Tensor:
        state, attention = self._ticketops, self.attention
        linears = (attention.q_lin, attention.k_lin, attention.v_lin)
        dropout_p = attention.dropout.p if self.training else 0.0
        contexts = attend(state, linears, hidden_states, ticketops, attention.scaling, dropout_p)
        projected = project(state, attention.out_lin, contexts, hidden_states)
        hidden_states = residual_norm(self.sa_layer_norm, projected, hidden_states, attention.out_lin.bias, None)
        if not state.kept.ffn:
            return self.output_layer_norm(hidden_states)
        output = feed_forward(state, self.ffn.lin1, self.ffn.lin2, hidden_states, ticketops)
        return residual_norm(self.output_layer_norm, output, hidden_states, None, self.ffn.dropout)


class TicketTransformer(TicketEncoder, distilbert.Transformer):
    """Runs the layers on real tokens only."""


class TicketDistilBertEmbeddings(distilbert.Embeddings):
    """Words and positions, by one op where `embed` can."""

    def forward(self, input_ids: Any, inputs_embeds: Any = None, position_ids: Any = None) -> Tensor:
        """Takes ids [B, S], or without them embeddings of words [B, S, C]; returns [B, S, C]."""
        done = embed(self, input_ids, position_ids)
        return super().forward(input_ids, inputs_embeds, position_ids) if done is None else done


def _parts(layer: Any) -> LayerParts:
    return LayerParts(
        qkv=(layer.attention.q_lin, layer.attention.k_lin, layer.attention.v_lin),
        output=layer.attention.out_lin,
        fc1=layer.ffn.lin1,
        fc2=layer.ffn.lin2,
        activation=layer.ffn.activation,
        attention_norm=layer.sa_layer_norm,
        ffn_norm=layer.output_layer_norm,
        dropouts=(layer.attention.dropout, layer.ffn.dropout),
    )


def _resize(layer: Any, heads: int) -> None:
    layer.attention.n_heads = heads
    layer.attention.dim = heads * layer.attention.attention_head_size


def _refusal(config: Any) -> str | None:
    if config.chunk_size_feed_forward:
        return f"chunk_size_feed_forward={config.chunk_size_feed_forward}: set it to 0"
    return None


_SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    distilbert.Embeddings: TicketDistilBertEmbeddings,
    distilbert.Transformer: TicketTransformer,
    distilbert.TransformerBlock: TicketTransformerBlock,
}
DISTILBERT = Adapter(
    base=distilbert.DistilBertModel,
    swaps=_SWAPS,
    encoder=lambda base: base.transformer,
    parts=_parts,
    resize=_resize,
    refusal=_refusal,
    calls=lambda layer: (),
)
