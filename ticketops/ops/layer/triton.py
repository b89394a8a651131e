"""An encoder layer on a GPU: the Triton kernels of the layer's parts, with cuBLAS's products between them.

With small batches the host's launches take longer than the GPU's work (bench/results/first-look-nvidia-h200.md). Module
by module, a layer of BERT-base takes some 70 launches under autocast, most of them casts; as one op it takes some 25.
All weights are cast at once; q, k and v are one product; the products for weight gradients write float32 directly; and
products with transposed weights add to the gradient of the residual stream. The weights of selected heads are read in
place by the kernels of ops.projection.
"""

from typing import Any

import torch
from torch import Tensor

from ticketops.ops import private
from ticketops.ops.attention import triton as attention
from ticketops.ops.ffn import triton as ffn
from ticketops.ops.layer.arguments import (
    Inputs,
    Saved,
    Settings,
    Wanted,
    autocast_off,
    in_weights_order,
    results,
    seeds_of,
    select,
)
from ticketops.ops.projection import picked_gradients
from ticketops.ops.projection import triton as projection
from ticketops.ops.residual import triton as residual


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """Computes a b in `dtype`, which may be wider than that of the inputs; cuBLAS then writes it directly."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes total + a b in place of `total`, in its dtype. Out of place, torch would copy `total` first."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if total.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(a, b))


def _scatter(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """Computes the gradient of `select`: rows of x at their positions among zeros. Only one sequence's gradient counts
    for a row that several sequences refer to; the others are empty and have a gradient of 0."""
    return x if rows is None else x.new_zeros((tokens, x.shape[1])).index_add_(0, rows, x)


def forward(inputs: Inputs, settings: Settings, keep: bool = True) -> tuple[Tensor, ...]:
    """See ticketops.ops.layer.encoder_layer and the native backend. Computes all neurons; a selection is not supported.

    Args:
        keep: True saves tensors for a backward pass.

    Returns:
        [T, C], or [B, C] with `first_tokens`; and the fields of Saved, if `keep`.
    """
    (x, _, starts, lengths, seeds, *_), s = inputs, settings
    # `serves_layer` has seen to it that all parameters are there.
    w: Any = inputs.weights
    ffn_weights, heads = w.ffn(), w.heads
    (tokens, channels), dtype = x.shape, s.dtype
    all_heads, count = inputs.heads(s)
    attention_seed, output_seed, _, ffn_seed = seeds_of(seeds, s)
    attention_dropout, output_dropout, _, ffn_dropout = s.dropouts
    cast, width, none = dtype != x.dtype, count * s.head_dim, x.new_empty(0)
    w_qkv = w_o = w_1 = w_2 = qkv = context = lse = pre = hidden = output = none
    sources: list[Tensor] = []
    copies: list[Tensor] = []

    def copied(source: Tensor, target: Tensor | None = None) -> Tensor:
        copy = torch.empty(source.shape, dtype=dtype, device=x.device) if target is None else target
        sources.append(source)
        copies.append(copy)
        return copy

    cast_x = copied(x) if cast else x
    if heads is None and count:
        w_qkv, biases = x.new_empty((3 * width, channels), dtype=dtype), x.new_empty(3 * width, dtype=dtype)
        for source, target in zip(w[:6], (*w_qkv.chunk(3), *biases.chunk(3)), strict=True):
            copied(source, target)
        if cast:
            w_o = copied(w.wo)
    if ffn_weights is not None:
        w1, b1, w2, b2 = map(copied, ffn_weights) if cast else ffn_weights
        if cast:
            w_1, w_2 = w1, w2
    if sources:
        private.copy_all(copies, sources)
    rows = inputs.rows(s)
    stream = select(x, rows)
    with autocast_off(x):
        if count:
            if heads is None:
                qkv = torch.addmm(biases, cast_x, w_qkv.t()).view(tokens, 3, count, s.head_dim)
            else:
                qkv = x.new_empty((tokens, 3, count, s.head_dim), dtype=dtype)
                projections = [p.contiguous() for p in w[:6]]
                projection.into(
                    cast_x, projections[:3], projections[3:], heads, all_heads, ys=qkv.view(tokens, 3, width).unbind(1)
                )
            q, k, v = qkv.unbind(1)
            context, lse = attention.forward(
                *(q, k, v, starts, lengths, None, attention_seed, s.max_length, s.scale, attention_dropout),
                bias=w.position_bias,
            )
            seen = select(context.view(tokens, width), rows)
            if heads is None:
                projected = torch.mm(seen, (w_o if cast else w.wo).t())
            else:
                projected = projection.out_of([seen], [w.wo.t()], heads, all_heads)
        else:
            projected = x.new_zeros(stream.shape, dtype=dtype)
        half = x.new_empty(stream.shape, dtype=dtype) if cast and ffn_weights is not None else None
        middle, mean1, rstd1 = residual.forward(
            projected, stream, w.bo, w.gamma1, w.beta1, output_seed, output_dropout, s.eps1, half
        )
        if ffn_weights is not None:
            inner = middle if half is None else half
            output, pre, hidden = ffn.forward(inner, w1, b1, w2, b2, None, None, s.activation)
            out, mean2, rstd2 = residual.forward(output, middle, None, w.gamma2, w.beta2, ffn_seed, ffn_dropout, s.eps2)
        else:
            out, mean2, rstd2 = _norm(middle, w, s.eps2)
    if not keep:
        return (out,)
    saved = Saved(
        *(cast_x if cast else none, qkv, context, lse, projected if count else none, mean1, rstd1, middle),
        none if half is None else half,
        *(pre, hidden, output, mean2.flatten(), rstd2.flatten(), w_qkv, w_o, w_1, w_2),
    )
    return results(out, saved, none)


def backward(dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted) -> tuple[Tensor, ...]:
    """Computes the gradients of `forward` and the importance partials. The results are as the native backend's; some
    are views of one tensor."""
    (x, _, starts, lengths, seeds, *_), s = inputs, settings
    # `serves_layer` has seen to it that all parameters are there.
    w: Any = inputs.weights
    heads = w.heads
    tokens, batch, dtype = x.shape[0], lengths.shape[0], s.dtype
    cast = dtype != x.dtype
    all_heads, count = inputs.heads(s)
    attention_seed, output_seed, _, ffn_seed = seeds_of(seeds, s)
    attention_dropout, output_dropout, _, ffn_dropout = s.dropouts
    gradients: dict[str, Tensor] = {}
    rows = inputs.rows(s)
    spans = inputs.spans_after_attention(s)
    none = x.new_empty(0, dtype=torch.float32)
    by_neuron, parts = none, ffn.Parts(None, None, None)
    #: Partial sums [parts, 3, C] of the gradients of a bias and a LayerNorm's two parameters, to be added up.
    after_ffn: Tensor | None = None
    after_attention: Tensor | None = None

    def finish(dx: Tensor = none, signed: Tensor = none, absolute: Tensor = none) -> tuple[Tensor, ...]:
        named = {("b2", "gamma2", "beta2"): after_ffn, ("bo", "gamma1", "beta1"): after_attention}
        sums = [x.flatten(1) if x is not None and wanted.any(*names) else None for names, x in named.items()]
        (db1, *vectors), *of_ffn = ffn.finish(parts._replace(db2=sums[0]), *spans, None, torch.float32, sums[1])
        if db1 is not None:
            gradients["b1"] = db1
        for names, three in zip(named, vectors, strict=True):
            if three is not None:
                gradients.update(zip(names, three.chunk(3), strict=True))
        # Sums are in float32.
        found = {name: gradient.to(getattr(w, name).dtype) for name, gradient in gradients.items() if wanted.any(name)}
        results = (dx, signed, absolute, *of_ffn, by_neuron, *in_weights_order(found))
        return tuple(torch.empty_like(none) if result is None or result is none else result for result in results)

    with autocast_off(x):
        if (ffn_weights := w.ffn()) is not None:
            w1, _, w2, _ = ffn_weights
            doutput, dmiddle, after_ffn = residual.first_stage(
                dout, saved.output, saved.middle, None, w.gamma2, saved.mean2, saved.rstd2, ffn_seed, ffn_dropout
            )
            doutput = doutput if doutput.ndim > 1 else dmiddle
            if wanted.any("w2"):
                gradients["w2"] = _product(doutput.t(), saved.hidden, w2.dtype)
            if wanted.inner(s):
                gradient, pre = torch.mm(doutput, saved.w_2 if saved.w_2.numel() else w2), saved.pre
            else:
                gradient = pre = doutput.new_empty((len(doutput), 0))
            if wanted.inner(s) or wanted.ffn_sums:
                sums = ffn.Wanted(wanted.any("b1"), False, wanted.ffn_sums, wanted.neuron_sums, wanted.per_token)
                dpre, parts, by_neuron = ffn.activation_backward(
                    gradient, doutput, saved.output, pre, *spans, None, None, s.activation, sums
                )
            if wanted.any("w1"):
                gradients["w1"] = _product(dpre.t(), saved.ffn_input if cast else saved.middle, w1.dtype)
            if not wanted.projected(s):
                return finish()
            # Not earlier: without dropout and casts, doutput is the same tensor, which this overwrites.
            dmiddle = _add_product(dmiddle, dpre, saved.w_1 if saved.w_1.numel() else w1)
        else:
            dmiddle, dgamma2, dbeta2 = _norm_backward(dout, saved, w, wanted, wanted.projected(s))
            gradients |= {"gamma2": dgamma2, "beta2": dbeta2}
            if not wanted.projected(s):
                return finish()
        stream = select(x, rows)
        projected = saved.projected if count else x.new_zeros(stream.shape, dtype=dtype)
        dprojected, dx, after_attention = residual.first_stage(
            dmiddle, projected, stream, w.bo, w.gamma1, saved.mean1, saved.rstd1, output_seed, output_dropout
        )
        dprojected = dprojected if dprojected.ndim > 1 else dx
        width = count * s.head_dim
        if count and wanted.any("wo"):
            seen = select(saved.context.view(tokens, width), rows)
            if heads is None:
                gradients["wo"] = _product(dprojected.t(), seen, w.wo.dtype)
            else:
                gradients["wo"] = torch.empty(w.wo.shape, dtype=w.wo.dtype, device=x.device)
                projection.gradients([seen], dprojected, [gradients["wo"].t()], None, heads, all_heads)
        if not wanted.attention(s):
            return finish()
        dx = _scatter(dx, rows, tokens) if wanted.tokens else none
        if not count:
            return finish(dx, *(none.new_empty((batch, 0)) for _ in range(2)))
        if heads is None:
            dseen = torch.mm(dprojected, saved.w_o if saved.w_o.numel() else w.wo)
        else:
            (dseen,) = projection.into(dprojected, [w.wo.t()], None, heads, all_heads)
        dqkv = torch.empty_like(saved.qkv)
        q, k, v = saved.qkv.unbind(1)
        *_, signed, absolute, dbias = attention.backward(
            _scatter(dseen, rows, tokens).view(tokens, count, s.head_dim),
            q,
            k,
            v,
            saved.context,
            saved.lse,
            starts,
            lengths,
            None,
            attention_seed,
            s.max_length,
            s.scale,
            attention_dropout,
            into=dqkv,
            bias=w.position_bias,
        )
        if dbias is not None:
            gradients["position_bias"] = dbias
        flat, taken = dqkv.view(tokens, 3 * width), saved.attention_input if cast else x
        dparts = flat.view(tokens, 3, width).unbind(1)
        if heads is None:
            if all(wanted.parameters[:3]):
                gradients |= zip(w._fields[:3], _product(flat.t(), taken, w.wq.dtype).chunk(3), strict=True)
            else:
                for name, dpart in zip(w._fields[:3], dparts, strict=True):
                    if wanted.any(name):
                        gradients[name] = _product(dpart.t(), taken, w.wq.dtype)
            if any(wanted.parameters[3:6]):
                gradients |= zip(w._fields[3:6], flat.sum(0, dtype=w.bq.dtype).chunk(3), strict=True)
            if wanted.tokens:
                dx = _add_product(dx, flat, saved.w_qkv)
        else:
            six = picked_gradients(dparts, taken, w[:3], heads, all_heads, wanted.parameters[:6])
            gradients |= {name: g for name, g in zip(w._fields[:6], six, strict=True) if g is not None}
            if wanted.tokens:
                dx += projection.out_of(dparts, [p.contiguous() for p in w[:3]], heads, all_heads)
        return finish(dx, signed, absolute)


def _norm(x: Tensor, w: Any, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the second LayerNorm directly after the first, if the FFN is pruned. On a GPU, torch's LayerNorm requires
    parameters of x's dtype."""
    out, mean, rstd = torch.native_layer_norm(*_one_dtype(x, w.gamma2, w.beta2), eps)
    return out.to(x.dtype), mean, rstd


def _norm_backward(dout: Tensor, saved: Saved, w: Any, wanted: Wanted, projected: bool) -> tuple[Tensor, ...]:
    x, shape, gamma, beta = _one_dtype(saved.middle, w.gamma2, w.beta2)
    dx, dgamma, dbeta = torch.ops.aten.native_layer_norm_backward(
        *(dout.to(x.dtype), x, shape, saved.mean2[:, None], saved.rstd2[:, None], gamma, beta),
        [projected, wanted.any("gamma2"), wanted.any("beta2")],
    )
    return dout if dx is None else dx.to(dout.dtype), dgamma, dbeta


def _one_dtype(x: Tensor, gamma: Tensor, beta: Tensor) -> tuple[Tensor, list[int], Tensor, Tensor]:
    if gamma.dtype != x.dtype or beta.dtype != x.dtype:
        x, gamma, beta = x.float(), gamma.float(), beta.float()
    return x, [x.shape[1]], gamma, beta
