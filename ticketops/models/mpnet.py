"""MPNet: BERT's layers under other names, with a relative-position bias that all layers share."""

from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPooling
from transformers.models.mpnet import modeling_mpnet

from ticketops import ops
from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import TicketEncoder, post_norm_layer, with_unread
from ticketops.models.embeddings import TicketEmbeddings
from ticketops.models.first_tokens import TellingClassifier, ToldModel
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in

#: What the stock encoder looks up by, whatever the configuration says.
_BUCKETS, _MAX_DISTANCE = 32, 128


class _Model(nn.Module):
    """The bare model's forward pass with a Call, which the stock one hands on to nobody."""

    config: Any
    embeddings: Any
    encoder: Any
    pooler: Any

    def forward(self, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes and returns what the stock model does."""
        names = ("input_ids", "inputs_embeds", "position_ids", "output_hidden_states", "return_dict")
        ids, embeds, positions, states, named = map(kwargs.get, names)
        if ticketops is None or (ids is None) == (embeds is None):
            # The stock model has the right words for both.
            return super().forward(*args, **kwargs)
        embedded = self.embeddings(input_ids=ids, position_ids=positions, inputs_embeds=embeds)
        states = self.config.output_hidden_states if states is None else states
        encoded = self.encoder(embedded, output_hidden_states=states, ticketops=ticketops)
        last = encoded.last_hidden_state
        pooled = None if self.pooler is None else self.pooler(last)
        if not (self.config.return_dict if named is None else named):
            return last, pooled, *encoded[1:]
        return BaseModelOutputWithPooling(
            last_hidden_state=last, pooler_output=pooled, hidden_states=encoded.hidden_states
        )


class TicketMPNetModel(ToldModel, _Model):
    """The bare model, see TicketModel."""


class _Encoder(nn.Module):
    """The layers one by one with a Call, to which the bias of every distance is added."""

    layer: Any
    relative_attention_bias: nn.Embedding

    def forward(
        self,
        hidden_states: Tensor,
        *args: Any,
        ticketops: Call | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Takes and returns what the stock encoder does."""
        if ticketops is None:
            return super().forward(hidden_states, *args, output_hidden_states=output_hidden_states, **kwargs)
        table, longest = self.relative_attention_bias.weight.t(), ticketops.packing.sequences.max_length
        # A bucket's gradient is a sum over many distances, which half precision would round at each.
        table = table if table.dtype == torch.float64 else table.float()
        bias = ops.bucketed_bias(table, longest, max_distance=_MAX_DISTANCE)
        call = replace(ticketops, position_bias=bias)
        if not any(layer._ticketops.kept.attention for layer in self.layer):
            hidden_states = with_unread(self.relative_attention_bias, hidden_states)
        states = [hidden_states]
        for layer in self.layer:
            (hidden_states,) = layer(hidden_states, ticketops=call)
            states.append(hidden_states)
        return BaseModelOutput(
            last_hidden_state=hidden_states, hidden_states=tuple(states) if output_hidden_states else None
        )


class TicketMPNetEncoder(TicketEncoder, _Encoder):
    """Runs the layers on real tokens only, see TicketEncoder."""


class TicketMPNetLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes hidden states [.., C]; returns a tuple of them, or of [B, 1, C] where only first tokens are read."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        return (post_norm_layer(self._ticketops, _parts(self), hidden_states, ticketops),)


class TicketMPNetEmbeddings(TicketEmbeddings):
    """Words and positions, which are numbered as RoBERTa numbers them."""

    def create_position_ids_from_input_ids(self, input_ids: Tensor, padding_idx: int) -> Tensor:
        """Takes ids [B, S]; returns the positions of tokens that are no padding, [B, S]."""
        positions: Tensor = modeling_mpnet.create_position_ids_from_input_ids(input_ids, padding_idx)
        return positions

    def create_position_ids_from_inputs_embeds(self, inputs_embeds: Tensor, *_: int) -> Tensor:
        """Takes embeddings of words [B, S, C]; returns positions [B, S]."""
        stock: Any = super()
        positions: Tensor = stock.create_position_ids_from_inputs_embeds(inputs_embeds)
        return positions


class PrunedSelfAttention(modeling_mpnet.MPNetSelfAttention):
    """Attention of a shrunk layer in stock code, which takes its heads' rows of the bias that all layers share.

    Attributes:
        kept_heads: its heads by their numbers in the architecture.
    """

    kept_heads: list[int]

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        output_attentions: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Takes hidden states [B, S, C] and the bias [B, H, S, S] of the architecture's heads; returns a tuple of
        hidden states and, if wanted, attention weights."""
        if self.kept_heads:
            bias = None if position_bias is None else position_bias[:, self.kept_heads]
            return super().forward(hidden_states, attention_mask, bias, output_attentions, **kwargs)
        # Products of size 0 are more than ONNX and quantizers take.
        length = hidden_states.shape[1]
        weights = hidden_states.new_empty((len(hidden_states), 0, length, length))
        projected = self.o(hidden_states[..., :0])
        if position_bias is not None and position_bias.requires_grad:
            # What distributes a model waits for a gradient of every parameter, also if no layer reads the table.
            projected = projected + position_bias[:0].sum()
        return (projected, weights) if output_attentions else (projected,)


def _parts(layer: Any) -> LayerParts:
    attention, inner, last = layer.attention, layer.attention.attn, layer.output
    return LayerParts(
        qkv=(inner.q, inner.k, inner.v),
        output=inner.o,
        fc1=layer.intermediate.dense,
        fc2=last.dense,
        activation=layer.intermediate.intermediate_act_fn,
        attention_norm=attention.LayerNorm,
        ffn_norm=last.LayerNorm,
        dropouts=(inner.dropout, attention.dropout, last.dropout),
        scale=inner.attention_head_size**-0.5,
        rates=(rate(inner.dropout), rate(attention.dropout), rate(last.dropout)),
        head_dim=inner.attention_head_size,
        causal=False,
    )


def _resize(layer: Any, heads: list[int]) -> None:
    attention = layer.attention.attn
    attention.num_attention_heads = len(heads)
    attention.all_head_size = len(heads) * attention.attention_head_size
    if len(heads) < attention.o.out_features // attention.attention_head_size:
        attention.__class__, attention.kept_heads = PrunedSelfAttention, heads


def _refusal(config: Any) -> str | None:
    if config.relative_attention_num_buckets != _BUCKETS:
        return (
            f"relative_attention_num_buckets={config.relative_attention_num_buckets}: transformers looks up {_BUCKETS} "
            "whatever it is; set it to that"
        )
    return None


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes MPNet's adapter.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    mixins = {
        modeling.MPNetModel: TicketMPNetModel,
        modeling.MPNetEmbeddings: TicketMPNetEmbeddings,
        modeling.MPNetEncoder: TicketMPNetEncoder,
        modeling.MPNetLayer: TicketMPNetLayer,
        modeling.MPNetForSequenceClassification: TellingClassifier,
    }
    return Adapter(
        modeling=modeling,
        base=modeling.MPNetModel,
        swaps={stock: stand_in(mixin, stock) for stock, mixin in mixins.items()},
        encoder=lambda base: base.encoder,
        parts=_parts,
        resize=_resize,
        refusal=_refusal,
        calls=lambda layer: (),
        calls_with_heads=lambda layer: (),
        first_token_heads={modeling.MPNetForSequenceClassification: modeling.MPNetClassificationHead},
        shrunk=(PrunedSelfAttention,),
        position_bias=lambda encoder: encoder.relative_attention_bias,
    )
