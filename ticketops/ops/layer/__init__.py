"""A whole encoder layer as one autograd op, on the backends that have one: attention and FFN over what a ticket keeps,
each with its projections, dropout, residual and LayerNorm.

Its parts are the other ops of this package, whose definitions hold here too. One op instead of seven has what small
batches need: one boundary, activations and weights cast once, gradients that meet in one tensor without passes of their
own, and without gradients no boundary at all. On a CPU, few tokens without gradients, as one sentence that is
classified, are one kernel's; on a GPU neurons that a ticket picks from the weights of all, and heads where there are
many tokens, are left to the other ops.
"""

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.ops import backends, projection
from ticketops.ops.dropout import draw_seed
from ticketops.ops.layer import native
from ticketops.ops.packing import Sequences
from ticketops.ops.products import compute_dtype
from ticketops.ops.registration import define, is_watched


class Weights(NamedTuple):
    """The parameters of a layer, with which places of them are computed.

    Attributes:
        wq, wk, wv: [H * D, C] projections of all heads.
        bq, bk, bv: [H * D] their biases.
        wo: [C, H * D] output projection.
        bo: [C] its bias.
        gamma1, beta1: [C] LayerNorm after attention.
        w1, b1: [N, C] and [N], first linear layer of the FFN; None where the FFN is not computed.
        w2, b2: [C, N] and [C], its second.
        gamma2, beta2: [C] LayerNorm after the FFN.
        heads: int64 [K], the computed heads in ascending order; None for all.
        neurons: int64, the FFN's computed neurons in ascending order; None for all.
    """

    wq: Tensor
    wk: Tensor
    wv: Tensor
    bq: Tensor
    bk: Tensor
    bv: Tensor
    wo: Tensor
    bo: Tensor
    gamma1: Tensor
    beta1: Tensor
    w1: Tensor | None
    b1: Tensor | None
    w2: Tensor | None
    b2: Tensor | None
    gamma2: Tensor
    beta2: Tensor
    heads: Tensor | None
    neurons: Tensor | None


def serves_layer(
    x: Tensor, weights: Tensor, *, picked_heads_of: int | None = None, picked_neurons: bool = False
) -> bool:
    """Whether `encoder_layer` runs here; where it does not, the other ops compute the same layer.

    Args:
        x: [.., C] tokens.
        weights: any of the layer's weights.
        picked_heads_of: the size of heads of which some are computed, but not all; None for all or none.
        picked_neurons: likewise, some of the neurons are computed.
    """
    dtype = compute_dtype(x)
    if x.dtype != weights.dtype or x.dtype not in (torch.float32, dtype):
        return False
    # Of half precision autocast knows two kinds, and `encoder_layer` one.
    if x.dtype != dtype != torch.bfloat16:
        return False
    backend = backends.common("attention", "ffn", "residual", device=x.device, dtype=dtype)
    if backend == "triton":
        return not picked_neurons and (picked_heads_of is None or projection.indexed(x, picked_heads_of))
    return backend == "native"


def _module(x: Tensor) -> Any:
    """The backend's module, where `serves_layer` said that there is one."""
    return native if x.is_cpu and backends.requested() != "triton" else _triton()


@cache
def _triton() -> Any:
    # Triton need not be installed where its kernels cannot run.
    return importlib.import_module(f"{__name__}.triton")


def encoder_layer(
    x: Tensor,
    weights: Weights,
    sequences: Sequences,
    *,
    head_dim: int,
    scale: float,
    activation: str,
    dropouts: tuple[float, float, float] = (0.0, 0.0, 0.0),
    eps: tuple[float, float] = (1e-12, 1e-12),
    head_importance: Tensor | None = None,
    ffn_importance: Tensor | None = None,
    neuron_importance: Tensor | None = None,
    per_token: bool = False,
    first_tokens: bool = False,
) -> Tensor:
    """Computes one post-LayerNorm encoder layer, where `serves_layer` says so.

    Args:
        x: [T, C] tokens; float32, or bfloat16 in a bfloat16 model.
        weights: the layer's, in x's dtype; the matrix products run in autocast's.
        sequences: which rows belong together.
        head_dim: D.
        scale: multiplies the scores of attention.
        activation: "gelu" (erf), "gelu_tanh" or "relu".
        dropouts: probabilities in [0, 1) for attention weights, the attention's output and the FFN's output.
        eps: of the two LayerNorms.
        head_importance: [B, K] float tensor that requires a gradient, which becomes the importance partials of the
            computed heads; see `ticketops.ops.attention`.
        ffn_importance: [B], the same for the FFN; see `ticketops.ops.ffn`.
        neuron_importance: [B, computed neurons], the same for its neurons.
        per_token: takes the absolute value of each token's term before summing.
        first_tokens: only each sequence's first token is wanted, as by a task head that reads no other; nothing else
            need attend, or be computed behind attention. There must be a token.

    Returns:
        [T, C] in x's dtype; [B, C] of `first_tokens`, where the rows of empty sequences hold anything finite and must
        get no gradient.
    """
    computed = (weights.heads is None or len(weights.heads) > 0, True, weights.w1 is not None)
    drops = [p if there else 0.0 for p, there in zip(dropouts, computed, strict=True)]
    seeds = draw_seed(x.device, sum(p > 0 for p in drops)) if any(drops) else None
    settings: tuple[Any, ...] = (sequences.max_length, head_dim, scale, activation, *drops, *eps)
    bf16 = compute_dtype(x) == torch.bfloat16
    tensors: tuple[Any, ...] = (x, *weights, sequences.starts, sequences.lengths, seeds)
    if not (torch.is_grad_enabled() or is_watched(*tensors)):
        module = _module(x)
        same = all(p is None or p.dtype == x.dtype for p in weights[:16])
        if module is native and same and seeds is None and native.is_few(len(x), bf16):
            shape = (sequences.max_length, head_dim, scale, activation)
            return native.infer(tensors[:-1], *shape, *eps, bf16, first_tokens)
        out: Tensor = module.forward(*tensors, *settings, bf16, first_tokens, keep=False)[0]
        return out
    sinks = (head_importance, ffn_importance, neuron_importance)
    return _encoder_layer_op(*tensors, *sinks, *settings, bf16, first_tokens, per_token)[0]


def _forward(*arguments):
    *tensors, _, _, _ = arguments[: native.TENSORS + 4]
    return _module(tensors[0]).forward(*tensors, *arguments[native.TENSORS + 4 : -1], keep=True)


def _fake_forward(*arguments):
    tensors, settings = arguments[: native.TENSORS + 1], arguments[native.TENSORS + 4 : -1]
    return native.fake_forward(*tensors, *settings, on_gpu=_module(tensors[0]) is not native)


def _backward(dout, x, *arguments):
    return _module(x).backward(dout, x, *arguments)


def _setup_context(ctx, inputs, output):
    ctx.per_token = inputs[-1]
    sinks = inputs[native.TENSORS + 1 : native.TENSORS + 4]
    ctx.sinks = [None if sink is None else sink.dtype for sink in sinks]
    ctx.settings = inputs[native.TENSORS + 4 : -1]
    ctx.save_for_backward(*inputs[: native.TENSORS + 1], *output[1:])


def _gradients(ctx, dout, *_):
    # The parameters without the residual stream before them and the indices behind them.
    wanted = any(ctx.needs_input_grad[1 : native.TENSORS - 4])
    heads, ffn, neurons = ctx.sinks
    dx, signed, absolute, ffn_signed, ffn_absolute, by_neuron, *parameters = _encoder_layer_backward_op(
        dout, *ctx.saved_tensors, *ctx.settings, wanted, ffn is not None, neurons is not None, ctx.per_token
    )
    partials = (
        None if heads is None else (absolute if ctx.per_token else signed).to(heads),
        None if ffn is None else (ffn_absolute if ctx.per_token else ffn_signed).to(ffn),
        None if neurons is None else by_neuron.to(neurons),
    )
    # What is not computed has no gradient: None, so that no optimizer sees it.
    gradients = [p if wanted and p.numel() else None for p in parameters]
    return dx, *gradients, None, None, None, None, None, *partials, *(None,) * (len(ctx.settings) + 1)


_TENSORS = (
    "Tensor x, Tensor wq, Tensor wk, Tensor wv, Tensor bq, Tensor bk, Tensor bv, Tensor wo, Tensor bo, Tensor gamma1, "
    "Tensor beta1, Tensor? w1, Tensor? b1, Tensor? w2, Tensor? b2, Tensor gamma2, Tensor beta2, Tensor? heads, "
    "Tensor? neurons, Tensor starts, Tensor lengths, Tensor? seeds"
)
_SETTINGS = (
    "SymInt max_length, int head_dim, float scale, str activation, float attention_dropout, float output_dropout, "
    "float ffn_dropout, float eps1, float eps2, bool bf16, bool first_tokens"
)
_encoder_layer_op = define(
    f"encoder_layer({_TENSORS}, Tensor? head_importance, Tensor? ffn_importance, Tensor? neuron_importance, "
    f"{_SETTINGS}, bool per_token) -> ({', '.join(['Tensor'] * (1 + len(native.SAVED)))})",
    _forward,
    _fake_forward,
    _gradients,
    _setup_context,
)
_encoder_layer_backward_op = define(
    f"encoder_layer_backward(Tensor dout, {_TENSORS}, {', '.join(f'Tensor {name}' for name in native.SAVED)}, "
    f"{_SETTINGS}, bool weight_gradients, bool ffn_sums, bool neuron_sums, bool per_token) "
    f"-> ({', '.join(['Tensor'] * native.GRADIENTS)})",
    _backward,
    native.fake_backward,
    shares=True,
)
