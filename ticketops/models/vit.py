"""ViT: LayerNorm before each sublayer, other names, and images that need no packing."""

from typing import Any

from torch import Tensor, nn
from transformers.models.vit import modeling_vit

from ticketops.models.adapter import Adapter, Call, LayerParts, LayerState, given
from ticketops.models.bert import attend, feed_forward, project
from ticketops.models.inputs import Images


class PreNormLayer(nn.Module):
    """A layer over the kept heads, with its FFN or without."""

    _ticketops: LayerState
    attention: Any
    mlp: Any
    layernorm_before: nn.LayerNorm
    layernorm_after: nn.LayerNorm
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Tensor:
        """Takes and returns hidden states [B, S, C]."""
        ticketops, state, attention = given(ticketops), self._ticketops, self.attention
        state.check(_parts(self), ticketops)
        linears = (attention.q_proj, attention.k_proj, attention.v_proj)
        dropout_p, normed = attention.attention_dropout if self.training else 0.0, self.layernorm_before(hidden_states)
        contexts = attend(state, linears, normed, ticketops, attention.scaling, dropout_p)
        projected = project(state, attention.o_proj, contexts, hidden_states) + attention.o_proj.bias
        hidden_states = hidden_states + self.dropout(projected)
        if not state.kept.ffn:
            return hidden_states
        output = feed_forward(state, self.mlp.fc1, self.mlp.fc2, self.layernorm_after(hidden_states), ticketops)
        return hidden_states + self.dropout(output.view_as(hidden_states))


def _parts(layer: Any) -> LayerParts:
    attention = layer.attention
    return LayerParts(
        qkv=(attention.q_proj, attention.k_proj, attention.v_proj),
        output=attention.o_proj,
        fc1=layer.mlp.fc1,
        fc2=layer.mlp.fc2,
        activation=layer.mlp.activation_fn,
        attention_norm=layer.layernorm_before,
        ffn_norm=layer.layernorm_after,
        dropouts=(layer.dropout,),
    )


def _resize(layer: Any, heads: int) -> None:
    layer.attention.num_attention_heads = heads


def vit_like(modeling: Any, prefix: str, extra: int) -> Adapter:
    """Makes the adapter of an architecture whose modules are named and built as ViT's.

    Args:
        modeling: its module in transformers.
        prefix: of its class names.
        extra: tokens in front of the patches.
    """
    stock = getattr(modeling, f"{prefix}Layer")
    names = {"__doc__": PreNormLayer.__doc__, "__module__": __name__}
    # Pickle looks a class up by its name in its module.
    swapped = globals()[f"Ticket{stock.__name__}"] = type(f"Ticket{stock.__name__}", (PreNormLayer, stock), names)
    return Adapter(
        base=getattr(modeling, f"{prefix}Model"),
        swaps={stock: swapped},
        encoder=lambda base: base,
        parts=_parts,
        resize=_resize,
        refusal=lambda config: None,
        calls=lambda layer: (layer.layernorm_before, layer.layernorm_after, layer.dropout),
        stack="layers",
        inputs=Images(extra),
        ops=("attention", "ffn", "projection"),
    )


VIT = vit_like(modeling_vit, "ViT", extra=1)
