"""An encoder layer on a GPU: cuBLAS's products between the Triton kernels of the layer's parts.

Small batches wait for the host, not for the GPU (bench/results/first-look-nvidia-h200.md). By its modules a layer of
BERT-base takes some 70 launches under autocast, most of them casts; as one op it takes some 25: all weights are cast at
once, one product serves q, k and v, weights' gradients leave their products in float32, and the results of products
with transposed weights are added to the residual stream's gradient as they are formed. Heads that a ticket picks are
read where they lie, by the kernels of ops.projection.
"""

import torch
from torch import Tensor

from ticketops.ops.attention import triton as attention
from ticketops.ops.ffn import triton as ffn
from ticketops.ops.layer.arguments import (
    Inputs,
    Saved,
    Settings,
    Wanted,
    as_given,
    in_order,
    results,
    seeds_of,
    select,
)
from ticketops.ops.projection import triton as projection
from ticketops.ops.residual import triton as residual


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a b in a dtype that may be wider than the inputs'; a GPU's product writes it itself."""
    if a.dtype == dtype:
        return torch.mm(a, b)
    return torch.mm(a, b, out_dtype=dtype) if a.is_cuda else torch.mm(a, b).to(dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total + a b in total's dtype, in its place: otherwise torch would copy it first."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if total.is_cuda:
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(a, b))


def _scatter(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """The gradient of `select`. A row that several sequences name is some one's, and the others' gradients are 0."""
    return x if rows is None else x.new_zeros((tokens, x.shape[1])).index_add_(0, rows, x)


def forward(inputs: Inputs, settings: Settings, keep: bool = True) -> tuple[Tensor, ...]:
    """See ticketops.ops.layer.encoder_layer and the native backend; of neurons all.

    Args:
        keep: whether a backward pass may follow.

    Returns:
        [T, C], or [B, C] of `first_tokens`, and Saved; without `keep` only the former.
    """
    (x, w, starts, lengths, seeds), s = inputs, settings
    ffn_weights, heads = w.ffn(), w.heads
    (tokens, channels), dtype = x.shape, inputs.dtype(s)
    all_heads, count = inputs.heads(s)
    attention_seed, output_seed, ffn_seed = seeds_of(seeds, s)
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
        torch._foreach_copy_(copies, sources)
    rows = inputs.rows(s)
    stream = select(x, rows)
    with as_given(x):
        if count:
            if heads is None:
                qkv = torch.addmm(biases, cast_x, w_qkv.t()).view(tokens, 3, count, s.head_dim)
            else:
                qkv = x.new_empty((tokens, 3, count, s.head_dim), dtype=dtype)
                given = [p.contiguous() for p in w[:6]]
                projection.into(cast_x, given[:3], given[3:], heads, all_heads, ys=qkv.view(tokens, 3, width).unbind(1))
            q, k, v = qkv.unbind(1)
            context, lse = attention.forward(
                q, k, v, starts, lengths, None, attention_seed, s.max_length, s.scale, s.attention_dropout
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
            projected, stream, w.bo, w.gamma1, w.beta1, output_seed, s.output_dropout, s.eps1, half
        )
        if ffn_weights is not None:
            inner = middle if half is None else half
            output, pre, hidden = ffn.forward(inner, w1, b1, w2, b2, None, None, s.activation)
            out, mean2, rstd2 = residual.forward(
                output, middle, None, w.gamma2, w.beta2, ffn_seed, s.ffn_dropout, s.eps2
            )
        else:
            out, mean2, rstd2 = torch.native_layer_norm(middle, [channels], w.gamma2, w.beta2, s.eps2)
    if not keep:
        return (out,)
    saved = Saved(
        *(cast_x if cast else none, qkv, context, lse, projected if count else none, mean1, rstd1, middle),
        none if half is None else half,
        *(pre, hidden, output, mean2.flatten(), rstd2.flatten(), w_qkv, w_o, w_1, w_2),
    )
    return results(out, saved, none)


def backward(dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted) -> tuple[Tensor, ...]:
    """Gradients and importance partials of `forward`; results as the native backend's, some of them parts of one
    tensor."""
    (x, w, starts, lengths, seeds), s = inputs, settings
    heads = w.heads
    tokens, batch, dtype = x.shape[0], lengths.shape[0], inputs.dtype(s)
    cast = dtype != x.dtype
    all_heads, count = inputs.heads(s)
    attention_seed, output_seed, ffn_seed = seeds_of(seeds, s)
    gradients: dict[str, Tensor] = {}
    rows = inputs.rows(s)
    left = inputs.left(s)
    parts, by_neuron, of_ffn = ffn.Parts(None, None, None), None, None
    with as_given(x):
        if (ffn_weights := w.ffn()) is not None:
            w1, _, w2, _ = ffn_weights
            doutput, dmiddle, of_ffn = residual.first_stage(
                dout, saved.output, saved.middle, None, w.gamma2, saved.mean2, saved.rstd2, ffn_seed, s.ffn_dropout
            )
            doutput = doutput if doutput.ndim > 1 else dmiddle
            inner = saved.cast_middle if cast else saved.middle
            dpre, parts, by_neuron = ffn.activation_backward(
                torch.mm(doutput, saved.w_2 if saved.w_2.numel() else w2),
                doutput,
                saved.output,
                saved.pre,
                *left,
                None,
                None,
                s.activation,
                ffn.Wanted(wanted.weight_gradients, False, wanted.ffn_sums, wanted.neuron_sums, wanted.per_token),
            )
            if wanted.weight_gradients:
                gradients["w1"] = _product(dpre.t(), inner, w1.dtype)
                gradients["w2"] = _product(doutput.t(), saved.hidden, w2.dtype)
            # Only now, since without a dropout and a cast doutput is the same tensor.
            dmiddle = _add_product(dmiddle, dpre, saved.w_1 if saved.w_1.numel() else w1)
        else:
            dmiddle, dgamma2, dbeta2 = torch.ops.aten.native_layer_norm_backward(
                dout,
                saved.middle,
                [x.shape[1]],
                saved.mean2[:, None],
                saved.rstd2[:, None],
                w.gamma2,
                w.beta2,
                [True, wanted.weight_gradients, wanted.weight_gradients],
            )
            if wanted.weight_gradients:
                gradients |= {"gamma2": dgamma2, "beta2": dbeta2}
        stream = select(x, rows)
        projected = saved.projected if count else x.new_zeros(stream.shape, dtype=dtype)
        dprojected, dx, of_attention = residual.first_stage(
            dmiddle, projected, stream, w.bo, w.gamma1, saved.mean1, saved.rstd1, output_seed, s.output_dropout
        )
        vectors, ffn_signed, ffn_absolute = ffn.finish(
            parts._replace(db2=None if of_ffn is None else of_ffn.flatten(1)),
            *left,
            None,
            torch.float32,
            of_attention.flatten(1),
        )
        dprojected = dprojected if dprojected.ndim > 1 else dx
        dx = _scatter(dx, rows, tokens)
        if wanted.weight_gradients:
            db1, after_ffn, after_attention = vectors
            if db1 is not None:
                gradients["b1"] = db1
            if after_attention is not None:
                gradients |= zip(("bo", "gamma1", "beta1"), after_attention.chunk(3), strict=True)
            if after_ffn is not None:
                gradients |= zip(("b2", "gamma2", "beta2"), after_ffn.chunk(3), strict=True)
            # Sums are in float32.
            gradients = {name: gradient.to(getattr(w, name).dtype) for name, gradient in gradients.items()}
        if not count:
            signed, absolute = (x.new_empty((batch, 0), dtype=torch.float32) for _ in range(2))
        else:
            width = count * s.head_dim
            if heads is None:
                dseen = torch.mm(dprojected, saved.w_o if saved.w_o.numel() else w.wo)
            else:
                (dseen,) = projection.into(dprojected, [w.wo.t()], None, heads, all_heads)
            dqkv = torch.empty_like(saved.qkv)
            q, k, v = saved.qkv.unbind(1)
            *_, signed, absolute = attention.backward(
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
                s.attention_dropout,
                into=dqkv,
            )
            flat, seen = dqkv.view(tokens, 3 * width), select(saved.context.view(tokens, width), rows)
            taken = saved.cast_x if cast else x
            if heads is None:
                if wanted.weight_gradients:
                    gradients["wo"] = _product(dprojected.t(), seen, w.wo.dtype)
                    qkv_weights = _product(flat.t(), taken, w.wq.dtype).chunk(3)
                    qkv_biases = flat.sum(0, dtype=w.bq.dtype).chunk(3)
                    gradients |= zip(w._fields[:6], (*qkv_weights, *qkv_biases), strict=True)
                dx = _add_product(dx, flat, saved.w_qkv)
            else:
                dqkv_parts = flat.view(tokens, 3, width).unbind(1)
                if wanted.weight_gradients:
                    new = [torch.empty(p.shape, dtype=p.dtype, device=p.device) for p in w[:7]]
                    projection.gradients(dqkv_parts, taken, new[:3], new[3:6], heads, all_heads)
                    projection.gradients([seen], dprojected, [new[6].t()], None, heads, all_heads)
                    gradients |= zip(w._fields[:7], new, strict=True)
                dx += projection.out_of(dqkv_parts, [p.contiguous() for p in w[:3]], heads, all_heads)
    return tuple(
        x.new_empty(0, dtype=torch.float32) if result is None else result
        for result in (dx, signed, absolute, ffn_signed, ffn_absolute, by_neuron, *in_order(gradients))
    )
