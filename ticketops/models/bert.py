"""BERT and the encoders of its class pattern: the bare models and every task head of transformers."""

from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig

from ticketops import ops
from ticketops.architectures import Architecture
from ticketops.models.adapter import Adapter, LayerParts, rate
from ticketops.models.boundary import TicketModel
from ticketops.models.embeddings import TicketEmbeddings
from ticketops.models.hooks import is_hooked
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stand_in

#: What stands where other architectures have a dropout.
NO_DROPOUT = nn.Identity()


class TicketEncoder(nn.Module):
    """Runs the layers on real tokens only: packs on entry, pads again at the exit."""

    _ticketops: Any

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes hidden states [B, S, C], or [1, T, C] where the call says they are packed; returns [B, S, C], or
        [B, 1, C] where only first tokens are read."""
        if ticketops is None:
            self._ticketops.refuse_stock("its encoder was called past the model's own forward")
            return super().forward(hidden_states, *args, **kwargs)
        packing = ticketops.packing
        if packing.indices is not None and not ticketops.packed:
            real = packing.pack(hidden_states)
            hidden_states = packing.unpack(real) if ticketops.spread else real[None]
        output: Any = super().forward(hidden_states, *args, ticketops=ticketops, **kwargs)
        if packing.indices is not None and not ticketops.spread and ticketops.first_tokens is None:
            output.last_hidden_state = packing.unpack(output.last_hidden_state[0])
        return output


class TicketSelfAttention(nn.Module):
    """Attention through ops.attention, over the kept heads only."""

    _ticketops: LayerState
    scaling: float
    dropout: nn.Dropout
    query: nn.Linear
    key: nn.Linear
    value: nn.Linear

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes [.., C] hidden states, returns the kept heads' contexts [.., heads * head_dim] and no attention
        weights."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        linears, dropout_p = (self.query, self.key, self.value), self.dropout.p if self.training else 0.0
        return attend(self._ticketops, linears, hidden_states, ticketops, self.scaling, dropout_p), None


class TicketAttention(nn.Module):
    """Attention, its output projection over the kept heads' columns, and what ends the sublayer."""

    _ticketops: LayerState
    self: Any
    output: Any

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes [.., C] hidden states, returns [.., C] and no attention weights."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        contexts, _ = self.self(hidden_states, ticketops=ticketops)
        return self.output(contexts, hidden_states, ticketops=ticketops), None


class TicketSelfOutput(nn.Module):
    """The output projection over the kept heads' columns; its bias stays."""

    _ticketops: LayerState
    dense: nn.Linear
    LayerNorm: nn.LayerNorm
    dropout: nn.Dropout

    def forward(self, hidden_states: Tensor, input_tensor: Tensor, ticketops: Call | None = None) -> Tensor:
        """Takes contexts [.., heads * head_dim] and the residual [.., C]; returns [.., C]."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            stock: Tensor = super().forward(hidden_states, input_tensor)
            return stock
        projected = project(self._ticketops, self.dense, hidden_states, input_tensor)
        return residual_norm(self.LayerNorm, projected, input_tensor, self.dense.bias, rate(self.dropout))


class TicketLayer(nn.Module):
    """A layer whose FFN runs through ops.ffn, or not at all where the ticket prunes it."""

    _ticketops: LayerState
    attention: Any
    intermediate: Any
    output: Any

    def forward(self, hidden_states: Tensor, *args: Any, ticketops: Call | None = None, **kwargs: Any) -> Any:
        """Takes hidden states [.., C]; returns them, or [B, 1, C] where only first tokens are read."""
        if ticketops is None:
            self._ticketops.refuse_stock()
            return super().forward(hidden_states, *args, **kwargs)
        self._ticketops.check(ticketops)
        if (done := ticketops.by_encoder(self._ticketops.index, hidden_states)) is not None:
            return done
        attention, parts = self.attention, _parts(self)
        around, hidden_states = (attention, attention.self, attention.output), ticketops.enter(hidden_states)
        done = whole_layer(self._ticketops, parts, around, hidden_states, ticketops)
        if done is None:
            done = self._by_modules(hidden_states, parts, args[:1], ticketops)
            done = read_tokens(self._ticketops, done, ticketops)
        return ticketops.leave(done, self._ticketops.index)

    def _by_modules(self, hidden_states: Tensor, parts: LayerParts, mask: tuple[Any, ...], ticketops: Call) -> Tensor:
        # Nobody but hooks reads the mask.
        hidden_states, _ = self.attention(hidden_states, *mask, ticketops=ticketops)
        if not self._ticketops.kept.ffn:
            return self.output.LayerNorm(hidden_states)
        output = feed_forward(self._ticketops, parts, hidden_states, ticketops)
        return residual_norm(self.output.LayerNorm, output, hidden_states, None, rate(self.output.dropout))


class Turn(NamedTuple):
    """Rotary positions, which turn q and k before their product.

    Attributes:
        apply: function of transformers that turns q and k [tokens, heads, head_dim] by cosines and sines.
        cosines, sines: [tokens, head_dim], of the tokens' positions.
    """

    apply: Callable[..., tuple[Tensor, Tensor]]
    cosines: Tensor
    sines: Tensor


def pre_norm_layer(
    state: LayerState,
    parts: LayerParts,
    norms: tuple[nn.Module, nn.Module],
    drops: tuple[nn.Module, nn.Module],
    hidden_states: Tensor,
    call: Call,
    turn: Turn | None = None,
) -> Tensor:
    """Computes a layer with a norm before each sublayer: by one op where there is one, else by several and by its own
    norms and dropouts.

    Args:
        state: of the layer.
        parts: the layer's.
        norms: in front of attention and of the FFN.
        drops: behind attention and behind the FFN.
        hidden_states: [.., C].
        call: of the forward pass.
        turn: rotary positions; None for none.

    Returns:
        [.., C], or [B, 1, C] where only first tokens are read.
    """
    state.check(call)
    if (done := call.by_encoder(state.index, hidden_states, turn)) is not None:
        return done
    hidden_states = call.enter(hidden_states)
    done = whole_layer(state, parts, (*norms, *drops), hidden_states, call, turn)
    if done is None:
        done = read_tokens(state, _by_modules(state, parts, norms, drops, hidden_states, call, turn), call)
    return call.leave(done, state.index)


def _by_modules(
    state: LayerState,
    parts: LayerParts,
    norms: tuple[nn.Module, nn.Module],
    drops: tuple[nn.Module, nn.Module],
    hidden_states: Tensor,
    call: Call,
    turn: Turn | None,
) -> Tensor:
    normed = norms[0](hidden_states)
    contexts = attend(state, parts.qkv, normed, call, parts.scale, parts.rates[0], parts.window, turn)
    projected = project(state, parts.output, contexts, hidden_states)
    if parts.output.bias is not None:
        projected = projected + parts.output.bias
    hidden_states = hidden_states + drops[0](projected)
    if not state.kept.attention:
        hidden_states = with_unread(norms[0], hidden_states, normed)
    if state.kept.ffn:
        output = feed_forward(state, parts, norms[1](hidden_states), call)
        return hidden_states + drops[1](output.view_as(hidden_states))
    hidden_states = with_unread(norms[1], hidden_states)
    if is_hooked(drops[1]):
        nothing = torch.zeros_like(hidden_states).requires_grad_(hidden_states.requires_grad)
        hidden_states = hidden_states + drops[1](nothing)
    return hidden_states


def post_norm_layer(
    state: LayerState, parts: LayerParts, hidden_states: Tensor, call: Call, turn: Turn | None = None
) -> Tensor:
    """Computes a layer that calls none of its modules: by one op where there is one, else by several.

    Args:
        state: of the layer.
        parts: the layer's.
        hidden_states: [.., C].
        call: of the forward pass.
        turn: rotary positions; None for none.

    Returns:
        [.., C], or [B, 1, C] where only first tokens are read.
    """
    state.check(call)
    if (done := call.by_encoder(state.index, hidden_states, turn)) is not None:
        return done
    hidden_states = call.enter(hidden_states)
    done = whole_layer(state, parts, (), hidden_states, call, turn)
    if done is None:
        done = read_tokens(state, _by_parts(state, parts, hidden_states, call, turn), call)
    return call.leave(done, state.index)


def _by_parts(state: LayerState, parts: LayerParts, hidden_states: Tensor, call: Call, turn: Turn | None) -> Tensor:
    assert parts.attention_norm is not None
    attention_dropout, output_dropout, ffn_dropout = parts.rates
    contexts = attend(state, parts.qkv, hidden_states, call, parts.scale, attention_dropout, turn=turn)
    projected = project(state, parts.output, contexts, hidden_states)
    hidden_states = residual_norm(parts.attention_norm, projected, hidden_states, parts.output.bias, output_dropout)
    if not state.kept.ffn:
        normed: Tensor = parts.ffn_norm(hidden_states)
        return normed
    output = feed_forward(state, parts, hidden_states, call)
    return residual_norm(parts.ffn_norm, output, hidden_states, None, ffn_dropout)


def whole_layer(
    state: LayerState,
    parts: LayerParts,
    around: Sequence[nn.Module],
    hidden_states: Tensor,
    call: Call,
    turn: Turn | None = None,
) -> Tensor | None:
    """Computes a layer by one op, where there is one for its device and dtype.

    Args:
        state: of the layer.
        parts: the layer's.
        around: the modules that are called where the op does not compute the layer.
        hidden_states: [.., C].
        call: of the forward pass.
        turn: rotary positions; None for none.

    Returns:
        [.., C], or [B, 1, C] where only first tokens are read; None where the layer's modules must compute it.
    """
    if not serves_whole(parts, hidden_states, call) or any(map(is_hooked, (*around, *parts.qkv))):
        return None
    return compute_layers([Given(state, parts, call, turn)], hidden_states)


def serves_whole(parts: LayerParts, hidden_states: Tensor, call: Call) -> bool:
    """True if one op computes a layer, see `whole_layer`."""
    # The op has no RMSNorm.
    return call.whole and hidden_states.dtype == parts.ffn_norm.weight.dtype and parts.norm is nn.LayerNorm


class Given(NamedTuple):
    """What a layer is computed from, besides its input.

    Attributes:
        state: of the layer.
        parts: the layer's.
        call: of the forward pass.
        turn: rotary positions; None for none.
    """

    state: LayerState
    parts: LayerParts
    call: Call
    turn: Turn | None = None


def compute_layers(
    layers: Sequence[Given],
    hidden_states: Tensor,
    read: Callable[[Tensor | None], Tensor | None] = lambda parameter: parameter,
) -> Tensor:
    """Computes layers, one after the other, by one op. Requires `serves_whole` of each.

    Args:
        layers: what each is computed from.
        hidden_states: [.., C], the first one's input.
        read: returns what is read for a parameter.

    Returns:
        [.., C], or [B, 1, C] where only first tokens are read.
    """
    described = [_described(*each, read) for each in layers]
    out = ops.encoder_layers(hidden_states.flatten(0, -2), described, layers[0].call.packing.sequences)
    return out[:, None] if described[-1].first_tokens else out.view(hidden_states.shape)


def _described(
    state: LayerState,
    parts: LayerParts,
    call: Call,
    turn: Turn | None,
    read: Callable[[Tensor | None], Tensor | None],
) -> ops.Layer:
    """Describes a layer to its op, see `compute_layers`."""
    kept, linears, norm = state.kept, parts.qkv, parts.attention_norm
    gamma2, beta2 = _parameters(parts.ffn_norm)
    device, none = gamma2.device, (None,) * (3 - len(linears))

    def of_heads(parameter: Tensor | None) -> Tensor | None:
        found = read(parameter)
        # The op needs the shapes, but hooks on parameters without a gradient must not be called.
        return found if found is None or kept.attention else found.detach()

    if state.num_heads:
        weights, biases = zip(*(map(of_heads, _parameters(linear)) for linear in linears), strict=True)
        output = of_heads(_parameters(parts.output)[0])
    else:
        weights = tuple(gamma2.new_empty(0, len(gamma2)) for _ in linears)
        biases = tuple(gamma2.new_empty(0) for _ in linears)
        output = gamma2.new_empty(len(gamma2), 0)
    tensors: list[Any] = [
        *(*weights, *none, *biases, *none, output, read(parts.output.bias)),
        *((None, None) if norm is None else map(read, _parameters(norm))),
        *((*_joined(parts.first, read), *map(read, _parameters(parts.fc2))) if kept.ffn else (None,) * 4),
        *(read(gamma2), read(beta2), call.bias_of(kept), *call.positions),
        None if kept.heads is None else kept.heads.on(device),
        None if kept.neurons is None else kept.neurons.on(device),
    ]
    return ops.Layer(
        ops.Weights(*tensors),
        head_dim=parts.head_dim if state.num_heads else 1,
        scale=parts.scale,
        activation=state.activation,
        norm_first=parts.norm_first,
        gated=parts.gated,
        window=parts.window,
        rotary=None if turn is None else (turn.cosines, turn.sines),
        dropouts=parts.rates,
        inner_dropout=parts.activation_dropout,
        eps=(parts.ffn_norm.eps if norm is None else norm.eps, parts.ffn_norm.eps),
        head_importance=call.head_importance.get(state.index),
        ffn_importance=call.ffn_importance.get(state.index),
        neuron_importance=call.neuron_importance.get(state.index),
        per_token=call.per_token,
        first_tokens=call.first_tokens == state.index,
    )


def read_tokens(state: LayerState, hidden_states: Tensor, call: Call) -> Tensor:
    """What is read of a layer's result.

    Args:
        state: of the layer.
        hidden_states: [.., C], the result.
        call: of the forward pass.

    Returns:
        [.., C], or [B, 1, C] where only first tokens are read.
    """
    if call.first_tokens != state.index:
        return hidden_states
    rows = hidden_states.flatten(0, -2)
    return rows.index_select(0, call.packing.sequences.first_rows(len(rows)))[:, None]


def attend(
    state: LayerState,
    linears: tuple[nn.Linear, ...],
    hidden_states: Tensor,
    call: Call,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    turn: Turn | None = None,
) -> Tensor:
    """Attends over the kept heads.

    Args:
        state: of the layer.
        linears: the projections to q, k and v, or one with the rows of all three.
        hidden_states: [.., C].
        call: of the forward pass.
        scale: multiplies the scores.
        dropout_p: of attention weights, 0 in evaluation.
        window: how far attention reaches; None for the whole sequence.
        turn: rotary positions; None for none.

    Returns:
        The kept heads' contexts [.., heads * head_dim].
    """
    heads, fused = state.kept.heads, len(linears) == 1
    projected: Sequence[Tensor]
    if heads is None:
        projected = linears[0](hidden_states).chunk(3, -1) if fused else [linear(hidden_states) for linear in linears]
    elif heads:
        weights: Sequence[Tensor] = [linear.weight for linear in linears]
        biases: Sequence[Tensor | None] = [linear.bias for linear in linears]
        if fused:
            weights, biases = weights[0].chunk(3), [None] * 3 if biases[0] is None else biases[0].chunk(3)
        projected = ops.project_rows(hidden_states, weights, biases, heads.on(hidden_states.device), state.num_heads)
    else:
        return hidden_states[..., :0]
    size = linears[0].out_features // (state.num_heads * (3 if fused else 1))
    query, key, value = (x.reshape(-1, x.shape[-1] // size, size) for x in projected)
    if turn is not None:
        query, key = turn.apply(query, key, turn.cosines, turn.sines)
    context = ops.attention(
        query,
        key,
        value,
        call.packing.sequences,
        dropout_p=dropout_p,
        scale=scale,
        importance=call.head_importance.get(state.index),
        per_token=call.per_token,
        window=window,
        position_bias=call.bias_of(state.kept),
        position_keys=call.positions[0],
        position_queries=call.positions[1],
    )
    # Without any token, -1 would be ambiguous.
    return context.view(*hidden_states.shape[:-1], context.shape[1] * context.shape[2])


def rotation(
    apply: Callable[..., tuple[Tensor, Tensor]], embeddings: tuple[Tensor, Tensor], hidden_states: Tensor, call: Call
) -> Turn:
    """Returns the rotary positions of a layer's tokens.

    Args:
        apply: function of transformers that turns q and k by cosines and sines.
        embeddings: cosines and sines [.., head_dim] of the positions, which one row of a batch may give for all.
        hidden_states: [.., C], what the layer is called with.
        call: of the forward pass.
    """
    rows = (x.expand(*hidden_states.shape[:-1], -1) for x in embeddings)
    cosines, sines = (call.enter(x).flatten(0, 1) for x in rows)
    return Turn(apply, cosines, sines)


def project(state: LayerState, linear: nn.Linear, contexts: Tensor, residual: Tensor) -> Tensor:
    """Applies the output projection's columns of the kept heads, without its bias.

    Args:
        state: of the layer.
        linear: the output projection.
        contexts: [.., heads * head_dim] of the kept heads.
        residual: [.., C], for the shape.
    """
    heads = state.kept.heads
    if heads is None:
        return functional.linear(contexts, linear.weight)
    if heads:
        return ops.project_columns(contexts, linear.weight, heads.on(contexts.device), state.num_heads)
    return torch.zeros_like(residual)


def with_unread(norm: nn.Module, hidden_states: Tensor, normed: Tensor | None = None) -> Tensor:
    """Keeps a LayerNorm in the graph where nothing of the sublayer behind it is computed.

    The gradients of its parameters are zeros, as in stock code: what distributes a model waits for a gradient of every
    parameter. Where the LayerNorm has hooks, it is called, and they see what they see in a stock layer.

    Args:
        norm: LayerNorm in front of the sublayer.
        hidden_states: residual stream behind the sublayer, [.., C].
        normed: result of the LayerNorm, if it was called already.
    """
    if is_hooked(norm):
        normed = norm(hidden_states) if normed is None else normed
        return hidden_states + normed.flatten()[:0].sum()
    trained = [parameter for parameter in norm.parameters() if parameter.requires_grad]
    if not trained or not torch.is_grad_enabled():
        return hidden_states
    return hidden_states + torch.stack([parameter[:0].sum() for parameter in trained]).sum()


def feed_forward(state: LayerState, parts: LayerParts, hidden_states: Tensor, call: Call) -> Tensor:
    """Applies the FFN.

    Args:
        state: of the layer.
        parts: the layer's.
        hidden_states: [.., C].
        call: of the forward pass.

    Returns:
        [tokens, C], before dropout and residual.
    """
    neurons = state.kept.neurons
    return ops.ffn(
        hidden_states.flatten(0, -2),
        *_joined(parts.first),
        parts.fc2.weight,
        parts.fc2.bias,
        call.packing.sequences,
        activation=state.activation,
        gated=parts.gated,
        dropout_p=parts.activation_dropout,
        importance=call.ffn_importance.get(state.index),
        neuron_importance=call.neuron_importance.get(state.index),
        per_token=call.per_token,
        blocks=None if neurons is None else neurons.on(hidden_states.device),
        count=len(state.neurons),
    )


def _joined(
    linears: tuple[nn.Linear, ...], read: Callable[[Tensor | None], Any] = lambda parameter: parameter
) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of one linear layer with the rows of all; a copy where there are several."""
    weights, biases = zip(*(map(read, _parameters(linear)) for linear in linears), strict=True)
    if len(linears) == 1:
        return weights[0], biases[0]
    if all(bias is None for bias in biases):
        return torch.cat(weights), None
    there = [x.new_zeros(len(x)) if bias is None else bias for x, bias in zip(weights, biases, strict=True)]
    return torch.cat(weights), torch.cat(there)


def residual_norm(
    norm: nn.LayerNorm, output: Tensor, residual: Tensor, bias: Tensor | None, dropout_p: float
) -> Tensor:
    """Ends a sublayer: bias, dropout, residual and LayerNorm.

    Args:
        norm: the LayerNorm.
        output: [.., C] of the sublayer.
        residual: [.., C].
        bias: [C] still to be added to the output, or None.
        dropout_p: of the output, 0 in evaluation.
    """
    return ops.residual_norm(
        output.flatten(0, -2),
        residual.flatten(0, -2),
        norm.weight,
        norm.bias,
        bias=bias,
        dropout_p=dropout_p,
        eps=norm.eps,
    ).view_as(residual)


def _parameters(module: nn.Module) -> tuple[Any, Any]:
    """Finds a module's weight and bias, as fast as `_modules`."""
    found = module._parameters
    if "weight" in found and "bias" in found:
        return found["weight"], found["bias"]
    return module.weight, module.bias


def _modules(module: nn.Module, *names: str) -> Iterator[Any]:
    """Finds modules inside a module in a quarter of the time that attributes take, which nn.Module seeks among
    parameters and buffers first. Every forward pass asks for all of a layer's."""
    inside = module._modules
    return (inside[name] if name in inside else getattr(module, name) for name in names)


def _parts(layer: Any) -> LayerParts:
    attention, first, last = _modules(layer, "attention", "intermediate", "output")
    inner, output = _modules(attention, "self", "output")
    query, key, value, attention_dropout = _modules(inner, "query", "key", "value", "dropout")
    projection, attention_norm, output_dropout = _modules(output, "dense", "LayerNorm", "dropout")
    fc1, activation = _modules(first, "dense", "intermediate_act_fn")
    fc2, ffn_norm, ffn_dropout = _modules(last, "dense", "LayerNorm", "dropout")
    return LayerParts(
        qkv=(query, key, value),
        output=projection,
        fc1=fc1,
        fc2=fc2,
        activation=activation,
        attention_norm=attention_norm,
        ffn_norm=ffn_norm,
        dropouts=(attention_dropout, output_dropout, ffn_dropout),
        scale=inner.scaling,
        # transformers asks the attention itself, not its dropout, whether it trains.
        rates=(rate(attention_dropout, inner.training), rate(output_dropout), rate(ffn_dropout)),
        head_dim=inner.attention_head_size,
        causal=inner.is_causal,
    )


def resize_attention(layer: Any, heads: list[int]) -> None:
    """Tells a layer's self-attention how many heads it has, see `Adapter.resize`."""
    attention = layer.attention.self
    attention.num_attention_heads = len(heads)
    attention.all_head_size = len(heads) * attention.attention_head_size


def decoder_refusal(config: PretrainedConfig) -> str | None:
    """Says which part of a decoder, or which other way to compute, a configuration asks for; None for none."""
    if config.is_decoder:
        return "is_decoder=True (causal attention): ticketops serves encoders; load it with is_decoder=False"
    if config.add_cross_attention:
        return "add_cross_attention=True: ticketops serves encoders without cross attention"
    if config.chunk_size_feed_forward:
        return f"chunk_size_feed_forward={config.chunk_size_feed_forward}: set it to 0"
    return None


_MIXINS = {
    "Model": TicketModel,
    "Embeddings": TicketEmbeddings,
    "Encoder": TicketEncoder,
    "Layer": TicketLayer,
    "Attention": TicketAttention,
    "SelfAttention": TicketSelfAttention,
    "SelfOutput": TicketSelfOutput,
}


def make_adapter(modeling: ModuleType, architecture: Architecture) -> Adapter:
    """Makes the adapter of an architecture whose modules are named and built as BERT's.

    Args:
        modeling: its module in transformers.
        architecture: its row in the table.
    """

    def stock(name: str) -> Any:
        return getattr(modeling, architecture.prefix + name, None)

    heads = {stock("ForSequenceClassification"): stock("ClassificationHead"), stock("ForNextSentencePrediction"): None}
    return Adapter(
        modeling=modeling,
        base=stock("Model"),
        swaps={stock(name): stand_in(mixin, stock(name)) for name, mixin in _MIXINS.items()},
        encoder=lambda base: base.encoder,
        parts=_parts,
        resize=resize_attention,
        refusal=decoder_refusal,
        calls=lambda layer: (layer.attention, layer.attention.self, layer.attention.output),
        calls_with_heads=lambda layer: (layer.attention,),
        attentions=lambda layer: (layer.attention, layer.attention.self),
        first_token_heads={head: reader for head, reader in heads.items() if head is not None},
        pooler=stock("Pooler"),
        reads_positions=True,
    )
