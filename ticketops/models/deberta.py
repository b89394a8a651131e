"""DeBERTa-v2, DeBERTa-v3 and mDeBERTa: BERT's layers, with position vectors in the attention scores."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta_v2 import modeling_deberta_v2

from ticketops import ops
from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import TicketEncoder, post_norm_layer
from ticketops.models.boundary import ONLY_FIRST
from ticketops.models.collators import TOKEN_COUNTS
from ticketops.models.embeddings import TicketEmbeddings
from ticketops.models.first_tokens import TellingClassifier, ToldModel
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in
from ticketops.ops import Packing


class _Model(nn.Module):
    """The bare model's forward pass with a Call, which the stock one hands on to nobody."""

    config: Any
    embeddings: Any
    encoder: Any

    def forward(self, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes and returns what the stock model does."""
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        if ticketops is None or (ids is None) == (embeds is None):
            # The stock model has the right words for both.
            return super().forward(*args, **kwargs)
        names = ("input_ids", "inputs_embeds", "position_ids", "token_type_ids")
        embedded = self.embeddings(**{name: kwargs.get(name) for name in names})
        states, named = kwargs.get("output_hidden_states"), kwargs.get("return_dict")
        states = self.config.output_hidden_states if states is None else states
        encoded = self.encoder(embedded, output_hidden_states=states, ticketops=ticketops)
        named = self.config.return_dict if named is None else named
        return encoded if named else encoded.to_tuple()


class TicketDebertaModel(ToldModel, _Model):
    """The bare model, see TicketModel."""

    _ticketops: Any
    encoder: Any
    z_steps: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the stock model does; hidden states at padding are zeros."""
        if self.z_steps > 1:
            self._ticketops.refuse_stock(f"z_steps={self.z_steps}, which passes the last layer several times")
            for name in (ONLY_FIRST, TOKEN_COUNTS):
                kwargs.pop(name, None)
            return self._ticketops.adapter.base.forward(self, *args, **kwargs)
        return super().forward(*args, **kwargs)


class _Encoder(nn.Module):
    """The layers one by one with a Call, to which the position vectors of all distances are added."""

    layer: Any
    conv: Any
    get_rel_embedding: Any
    position_buckets: int
    max_relative_positions: int

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        ticketops: Call | None = None,
        output_hidden_states: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Takes and returns what the stock encoder does."""
        if ticketops is None:
            return super().forward(hidden_states, *args, output_hidden_states=output_hidden_states, **kwargs)
        call, table = ticketops, self.get_rel_embedding()
        if table is not None:
            longest, buckets = call.packing.sequences.max_length, self.position_buckets
            vectors = ops.position_vectors(
                table, longest, buckets=buckets if buckets > 0 else None, max_distance=self.max_relative_positions
            )
            call = replace(call, position_vectors=vectors)
            if not any(layer._ticketops.kept.attention for layer in self.layer):
                # What distributes a model waits for a gradient of every parameter.
                hidden_states = hidden_states + table[:0].sum()
        if self.conv is not None:
            # It is between two layers.
            call = replace(call, encoder=None)
        states = [hidden_states]
        for layer in self.layer:
            hidden_states, _ = layer(hidden_states, ticketops=call)
            if self.conv is not None and len(states) == 1:
                hidden_states = _convolve(self.conv, states[0], hidden_states, call)
            states.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(states) if output_hidden_states else None
        )


class TicketDebertaEncoder(TicketEncoder, _Encoder):
    """Runs the layers on real tokens only, see TicketEncoder."""


class TicketDebertaLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState
    attention: Any

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes hidden states [.., C]; returns a tuple of them, or of [B, 1, C] where only first tokens are read, and
        None for attention weights."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        call = replace(ticketops, positions=_project_vectors(self._ticketops, self.attention.self, ticketops))
        return post_norm_layer(self._ticketops, _parts(self), hidden_states, call), None


class TicketDebertaEmbeddings(TicketEmbeddings):
    """Words, and positions and token types where a model has them."""

    embed_proj: nn.Module | None

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes what the stock embeddings do; returns [B, S, C]."""
        if self.embed_proj is not None or kwargs.get("mask") is not None:
            # Past TicketEmbeddings, which knows neither.
            stock: Any = super(TicketEmbeddings, self)
            embedded: Tensor = stock.forward(*args, **kwargs)
            return embedded
        return super().forward(*args, **kwargs)


class PrunedSelfAttention(modeling_deberta_v2.DisentangledSelfAttention):
    """Attention of a shrunk layer without heads, in stock code."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        output_attentions: bool = False,
        query_states: Tensor | None = None,
        relative_pos: Tensor | None = None,
        rel_embeddings: Tensor | None = None,
    ) -> Any:
        """Takes hidden states [B, S, C]; returns contexts [B, S, 0] and, if wanted, attention weights [B, 0, S, S]."""
        length = hidden_states.shape[1]
        contexts = hidden_states[..., :0]
        if rel_embeddings is not None and rel_embeddings.requires_grad:
            # What distributes a model waits for a gradient of every parameter, also if no layer reads the table.
            contexts = contexts + rel_embeddings[:0].sum()
        return contexts, hidden_states.new_empty((len(contexts), 0, length, length)) if output_attentions else None


def _project_vectors(state: LayerState, attention: Any, call: Call) -> tuple[Tensor | None, Tensor | None]:
    """Returns the position keys and the position queries of the heads that a layer computes."""
    if call.position_vectors is None or not state.kept.attention:
        return None, None
    vectors, places = call.position_vectors
    vectors = attention.pos_dropout(vectors)
    heads = state.kept.heads

    def projected(linear: nn.Linear) -> Tensor:
        weight, bias = linear.weight, linear.bias
        if heads is not None:
            by_head = (p.unflatten(0, (state.num_heads, -1)) for p in (weight, bias))
            weight, bias = (p.index_select(0, heads.on(p.device)).flatten(0, 1) for p in by_head)
        table = functional.linear(vectors, weight, bias).unflatten(1, (-1, state.head_dim))
        return table if places is None else table.index_select(0, places)

    keys, queries = _projections(attention)
    return None if keys is None else projected(keys), None if queries is None else projected(queries)


def _projections(attention: Any) -> tuple[nn.Linear | None, nn.Linear | None]:
    """Returns the linear layers that make position keys and position queries of position vectors."""
    if not attention.relative_attention:
        return None, None
    shared, kinds = attention.share_att_key, attention.pos_att_type
    keys = (attention.key_proj if shared else attention.pos_key_proj) if "c2p" in kinds else None
    return keys, (attention.query_proj if shared else attention.pos_query_proj) if "p2c" in kinds else None


def _convolve(conv: nn.Module, before: Tensor, after: Tensor, call: Call) -> Tensor:
    """Adds the convolution of the first layer's input to its output."""
    packing = call.packing
    real = _real(packing, after.device)
    if packing.indices is None or call.spread:
        convolved: Tensor = conv(before * real.unsqueeze(-1).to(before.dtype), after, real)
        return convolved
    return packing.pack(conv(*(packing.unpack(x[0]) for x in (before, after)), real))[None]


def _real(packing: Packing, device: torch.device) -> Tensor:
    """Returns the attention mask of a packing, int64 [B, S]."""
    if packing.numbers is not None:
        return (packing.numbers >= 0).long().view(packing.batch, packing.width)
    rows, spans = torch.arange(packing.batch, device=device), packing.sequences
    place = torch.arange(packing.width, device=device) - (spans.starts - rows * packing.width)[:, None]
    return ((place >= 0) & (place < spans.lengths[:, None])).long()


def _parts(layer: Any) -> LayerParts:
    attention, inner, last = layer.attention, layer.attention.self, layer.output
    projections = () if inner.share_att_key else tuple(x for x in _projections(inner) if x is not None)
    dropouts = (inner.dropout, attention.output.dropout, last.dropout)
    terms = 1 + sum(kind in inner.pos_att_type for kind in ("c2p", "p2c"))
    return LayerParts(
        qkv=(inner.query_proj, inner.key_proj, inner.value_proj),
        output=attention.output.dense,
        fc1=layer.intermediate.dense,
        fc2=last.dense,
        activation=layer.intermediate.intermediate_act_fn,
        attention_norm=attention.output.LayerNorm,
        ffn_norm=last.LayerNorm,
        dropouts=(*dropouts, inner.pos_dropout) if inner.relative_attention else dropouts,
        scale=(inner.attention_head_size * terms) ** -0.5,
        rates=(rate(inner.dropout), rate(attention.output.dropout), rate(last.dropout)),
        head_dim=inner.attention_head_size,
        causal=False,
        positions=projections,
        shares_positions=inner.relative_attention and inner.share_att_key,
    )


def _resize(layer: Any, heads: list[int]) -> None:
    attention = layer.attention.self
    attention.num_attention_heads = len(heads)
    attention.all_head_size = len(heads) * attention.attention_head_size
    if not heads:
        attention.__class__ = PrunedSelfAttention


def _position_terms(config: Any) -> tuple[int, int]:
    if not config.relative_attention:
        return 0, 0
    terms = sum(kind in (config.pos_att_type or ()) for kind in ("c2p", "p2c"))
    return terms, 0 if getattr(config, "share_att_key", False) else terms


def _refusal(config: Any) -> str | None:
    dim = getattr(config, "attention_head_size", None)
    if dim not in (None, config.hidden_size // config.num_attention_heads):
        return f"attention_head_size={dim}, of which its heads are {config.num_attention_heads}: leave it out"
    if getattr(config, "conv_kernel_size", 0) > 0 and config.num_hidden_layers == 1:
        return f"conv_kernel_size={config.conv_kernel_size} with one layer: ticketops serves it with more"
    return None


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes the adapter of DeBERTa-v2 and its successors.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    mixins = {
        modeling.DebertaV2Model: TicketDebertaModel,
        modeling.DebertaV2Embeddings: TicketDebertaEmbeddings,
        modeling.DebertaV2Encoder: TicketDebertaEncoder,
        modeling.DebertaV2Layer: TicketDebertaLayer,
        modeling.DebertaV2ForSequenceClassification: TellingClassifier,
    }
    return Adapter(
        modeling=modeling,
        base=modeling.DebertaV2Model,
        swaps={stock: stand_in(mixin, stock) for stock, mixin in mixins.items()},
        encoder=lambda base: base.encoder,
        parts=_parts,
        resize=_resize,
        refusal=_refusal,
        calls=lambda layer: (),
        calls_with_heads=lambda layer: (),
        first_token_heads={modeling.DebertaV2ForSequenceClassification: None},
        pooler=modeling.ContextPooler,
        shrunk=(PrunedSelfAttention,),
        position_terms=_position_terms,
    )
