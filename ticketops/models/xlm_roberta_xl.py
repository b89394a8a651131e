"""XLM-RoBERTa-XL: BERT's class pattern with LayerNorm before each sublayer, and one behind the last layer."""

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.bert import NO_DROPOUT, TicketEncoder, decoder_refusal, pre_norm_layer, resize_attention
from ticketops.models.boundary import TicketModel
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in


class TicketXLMRobertaXLLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState
    attention: Any
    LayerNorm: nn.LayerNorm

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes and returns hidden states [.., C]."""
        state, attention = self._ticketops, self.attention
        if ticketops is None:
            state.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        norms, drops = (attention.self_attn_layer_norm, self.LayerNorm), (attention.output.dropout, NO_DROPOUT)
        return pre_norm_layer(state, _parts(self), norms, drops, hidden_states, ticketops)


def _parts(layer: Any) -> LayerParts:
    attention, inner = layer.attention, layer.attention.self
    return LayerParts(
        qkv=(inner.query, inner.key, inner.value),
        output=attention.output.dense,
        fc1=layer.intermediate.dense,
        fc2=layer.output.dense,
        activation=layer.intermediate.intermediate_act_fn,
        attention_norm=attention.self_attn_layer_norm,
        ffn_norm=layer.LayerNorm,
        norm_first=True,
        dropouts=(inner.dropout, attention.output.dropout),
        scale=inner.scaling,
        # transformers asks the attention itself, not its dropout, whether it trains.
        rates=(rate(inner.dropout, inner.training), rate(attention.output.dropout), 0.0),
        head_dim=inner.attention_head_size,
        causal=inner.is_causal,
    )


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes XLM-RoBERTa-XL's adapter.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """
    mixins = {
        modeling.XLMRobertaXLModel: TicketModel,
        modeling.XLMRobertaXLEncoder: TicketEncoder,
        modeling.XLMRobertaXLLayer: TicketXLMRobertaXLLayer,
    }

    def called(layer: Any) -> tuple[nn.Module, ...]:
        return layer.attention.self_attn_layer_norm, layer.LayerNorm, layer.attention.output.dropout

    return Adapter(
        modeling=modeling,
        base=modeling.XLMRobertaXLModel,
        swaps={stock: stand_in(mixin, stock) for stock, mixin in mixins.items()},
        encoder=lambda base: base.encoder,
        parts=_parts,
        resize=resize_attention,
        refusal=decoder_refusal,
        calls=called,
        calls_with_heads=called,
        reads_positions=True,
    )
