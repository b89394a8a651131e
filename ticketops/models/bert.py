"""BERT: the bare model and every task head of transformers."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertConfig, BertModel
from transformers.models.bert.modeling_bert import BertEncoder, BertLayer, BertSelfAttention, BertSelfOutput

from ticketops import ops
from ticketops.models.adapter import Adapter, Call, LayerParts, LayerState


class TicketBertEncoder(BertEncoder):
    """Runs the layers on real tokens only: packs on entry, pads again at the exit."""

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call, **kwargs: Any) -> Any:
        """Takes and returns padded hidden states [B, S, C]."""
        packing = ticketops.packing
        if packing.indices is not None:
            hidden_states = packing.pack(hidden_states)[None]
        output: Any = super().forward(hidden_states, *args, ticketops=ticketops, **kwargs)
        if packing.indices is not None:
            output.last_hidden_state = packing.unpack(output.last_hidden_state[0])
        return output


class TicketBertSelfAttention(BertSelfAttention):
    """Attention through ops.attention, over the kept heads only."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call, **kwargs: Any) -> tuple[Tensor, None]:
        """Takes [.., C] hidden states, returns the kept heads' contexts [.., heads * head_dim] and no attention
        weights."""
        state = self._ticketops
        if state.kept_heads is None:
            projected = [linear(hidden_states) for linear in (self.query, self.key, self.value)]
        elif state.kept_heads:
            projected = [
                functional.linear(hidden_states, *state.rows(linear)) for linear in (self.query, self.key, self.value)
            ]
        else:
            return hidden_states[..., :0], None
        query, key, value = (
            x.reshape(-1, x.shape[-1] // self.attention_head_size, self.attention_head_size) for x in projected
        )
        context = ops.attention(
            query,
            key,
            value,
            ticketops.packing.sequences,
            dropout_p=self.dropout.p if self.training else 0.0,
            scale=self.scaling,
            importance=ticketops.head_importance.get(self.layer_idx),
            per_token=ticketops.per_token,
        )
        return context.view(*hidden_states.shape[:-1], -1), None


class TicketBertSelfOutput(BertSelfOutput):
    """The output projection over the kept heads' columns; its bias stays."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        """Takes contexts [.., heads * head_dim] and the residual [.., C]; returns [.., C]."""
        state = self._ticketops
        if state.kept_heads is None:
            projected = functional.linear(hidden_states, self.dense.weight)
        elif state.kept_heads:
            projected = functional.linear(hidden_states, state.columns(self.dense))
        else:
            projected = torch.zeros_like(input_tensor)
        return _residual_norm(self, projected, input_tensor, self.dense.bias)


class TicketBertLayer(BertLayer):
    """A layer whose FFN runs through ops.ffn, or not at all where the ticket prunes it."""

    _ticketops: LayerState

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call, **kwargs: Any) -> Tensor:
        """Takes and returns hidden states [.., C]."""
        hidden_states, _ = self.attention(hidden_states, ticketops=ticketops)
        if not self._ticketops.ffn_kept:
            return self.output.LayerNorm(hidden_states)
        fc1, fc2 = self.intermediate.dense, self.output.dense
        output = ops.ffn(
            hidden_states.flatten(0, -2),
            fc1.weight,
            fc1.bias,
            fc2.weight,
            fc2.bias,
            ticketops.packing.sequences,
            activation=self._ticketops.activation,
            importance=ticketops.ffn_importance.get(self.attention.self.layer_idx),
            per_token=ticketops.per_token,
        )
        return _residual_norm(self.output, output, hidden_states)


def _residual_norm(module: Any, output: Tensor, residual: Tensor, bias: Tensor | None = None) -> Tensor:
    """The end of a sublayer: dropout, residual and LayerNorm of a BertSelfOutput or BertOutput."""
    norm = module.LayerNorm
    return ops.residual_norm(
        output.flatten(0, -2),
        residual.flatten(0, -2),
        norm.weight,
        norm.bias,
        bias=bias,
        dropout_p=module.dropout.p if module.training else 0.0,
        eps=norm.eps,
    ).view_as(residual)


def _parts(layer: Any) -> LayerParts:
    attention = layer.attention
    return LayerParts(
        query=attention.self.query,
        key=attention.self.key,
        value=attention.self.value,
        output=attention.output.dense,
        fc1=layer.intermediate.dense,
        fc2=layer.output.dense,
        activation=layer.intermediate.intermediate_act_fn,
        attention_norm=attention.output.LayerNorm,
        ffn_norm=layer.output.LayerNorm,
        dropouts=(attention.self.dropout, attention.output.dropout, layer.output.dropout),
    )


def _resize(layer: Any, heads: int) -> None:
    attention = layer.attention.self
    attention.num_attention_heads = heads
    attention.all_head_size = heads * attention.attention_head_size


def _refusal(config: BertConfig) -> str | None:
    if config.is_decoder:
        return "is_decoder=True (causal attention): ticketops serves encoders; load it with is_decoder=False"
    if config.add_cross_attention:
        return "add_cross_attention=True: ticketops serves encoders without cross attention"
    if config.chunk_size_feed_forward:
        return f"chunk_size_feed_forward={config.chunk_size_feed_forward}: set it to 0"
    return None


BERT = Adapter(
    base=BertModel,
    swaps={
        BertEncoder: TicketBertEncoder,
        BertLayer: TicketBertLayer,
        BertSelfAttention: TicketBertSelfAttention,
        BertSelfOutput: TicketBertSelfOutput,
    },
    encoder=lambda base: base.encoder,
    parts=_parts,
    resize=_resize,
    refusal=_refusal,
)
