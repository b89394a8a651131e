"""An encoder layer on the CPU: the native kernels, with torch's matrix products between them. Weights are compacted and
cast in one copy. Inference of few tokens runs as one kernel, csrc/cpu/encoder.cpp."""

import torch
from torch import Tensor

from ticketops.ops.attention import native as attention
from ticketops.ops.copies.native import Table
from ticketops.ops.embedding import embedding_gradient
from ticketops.ops.extension import address, checked, native, run
from ticketops.ops.ffn import native as ffn
from ticketops.ops.layer.arguments import (
    PARAMETERS,
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
from ticketops.ops.memory import empty
from ticketops.ops.products import add_product, gradient_product, has_bf16_products, product
from ticketops.ops.residual import native as residual

#: Largest number of tokens for which csrc/cpu/encoder.cpp infers faster than torch's products between kernels: in
#: general; in bfloat16 with AMX; and in bfloat16 where encoder.cpp lacks the bfloat16 instructions that oneDNN uses.
#: Measured: milliseconds of MiniLM on one sequence, two cores, with oneDNN's products and with encoder.cpp. AMD EPYC
#: (Zen 5): float32 5.67 and 3.21 at 32 tokens, 10.96 and 8.15 at 128, 18.61 and 16.63 at 256; bfloat16 autocast 5.67
#: and 3.31 at 32, 8.43 and 6.19 at 128, 13.72 and 12.05 at 256; with kernels for AVX-512 only, both were equal at 112
#: tokens in bfloat16. Intel Xeon with AMX: bfloat16 autocast 5.52 and 3.30 at 32, 7.53 and 5.67 at 128, 10.49 and 9.74
#: at 256, 14.29 and 15.02 at 384.
FEW_TOKENS = 128
FEW_TOKENS_AMX = 256
FEW_TOKENS_BF16 = 48


def _bias(bias: Tensor, places: Tensor | None) -> Tensor:
    """Returns the biases of the computed neurons, in float32."""
    return (bias if places is None else bias[places]).float()


def _scatter(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """Computes the gradient of `select`: rows of x at their positions among zeros."""
    return x if rows is None else embedding_gradient(x, rows, tokens, -1)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Computes total + a b, possibly in place of `total`."""
    if a.dtype == total.dtype == torch.float32:
        return add_product(total, a, b)
    terms = product(a, b)
    return ffn.add_(total, terms) if total.dtype == torch.float32 else total.add_(terms)


def is_few(tokens: int, bf16: bool) -> bool:
    """True if `infer` is faster than `forward`.

    Args:
        tokens: T.
        bf16: True if matrix products are in bfloat16.
    """
    isa = native.isa()
    if bf16 and isa == "amx":
        return tokens <= FEW_TOKENS_AMX
    slower = bf16 and has_bf16_products() and (native.is_intel() or isa != "avx512bf16")
    return tokens <= (FEW_TOKENS_BF16 if slower else FEW_TOKENS)


def infer(inputs: Inputs, settings: Settings) -> Tensor:
    """Computes a layer for few tokens, without dropout and gradients; see ticketops.ops.layer.encoder_layer.

    Args:
        inputs: tensor arguments, with all parameters in the dtype of the tokens.
        settings: non-tensor arguments.

    Returns:
        [T, C]; [B, C] with `first_tokens`.
    """
    (x, weights, starts, lengths, _), s = inputs, settings
    bf16 = s.dtype == torch.bfloat16
    wq, w1, heads, neurons = weights.wq, weights.w1, weights.heads, weights.neurons
    (tokens, channels), dtype, batch = x.shape, x.dtype, starts.shape[0]
    all_heads, neuron_count = wq.shape[0] // s.head_dim, 0 if w1 is None else w1.shape[0]
    width = all_heads * s.head_dim
    square, row, column = (width, channels), (width,), (channels,)
    shapes = (
        *(square, square, square, row, row, row, (channels, width), column, column, column),
        *((neuron_count, channels), (neuron_count,), (channels, neuron_count), column, column, column),
    )
    # Some of these may be copies, which must live until the call is over.
    parameters = [checked("a parameter", p, dtype, *shape) for p, shape in zip(weights, shapes, strict=False)]
    x = checked("x", x, dtype, tokens, channels)
    bias, reach = attention.checked_bias(weights.position_bias, inputs.heads(s)[1])
    heads, neurons = (p if p is None else checked("places", p, torch.int64, p.shape[0]) for p in (heads, neurons))
    starts, lengths = (checked("sequences", p, torch.int32, batch) for p in (starts, lengths))
    out = empty((batch if s.first_tokens else tokens, channels), dtype)
    run(
        native.encoder,
        *(dtype == torch.bfloat16, bf16, ffn.ACTIVATIONS[s.activation], address(x), address(out)),
        *([address(p) for p in parameters], address(bias), reach, address(heads), address(neurons)),
        *(address(starts), address(lengths)),
        *(batch, tokens, channels, all_heads, s.head_dim, all_heads if heads is None else heads.shape[0]),
        *(neuron_count, neuron_count if neurons is None else neurons.shape[0], s.max_length, s.first_tokens),
        *(s.scale, s.eps1, s.eps2),
    )
    return out


def forward(inputs: Inputs, settings: Settings, keep: bool = True) -> tuple[Tensor, ...]:
    """See ticketops.ops.layer.encoder_layer.

    Args:
        keep: True saves tensors for a backward pass.

    Returns:
        [T, C], or [B, C] with `first_tokens`; and the fields of Saved, if `keep`.
    """
    (x, w, starts, lengths, seeds), s = inputs, settings
    ffn_weights, heads, neurons = w.ffn(), w.heads, w.neurons
    tokens, dtype, bf16 = x.shape[0], s.dtype, s.dtype == torch.bfloat16
    all_heads, count = inputs.heads(s)
    attention_seed, output_seed, ffn_seed = seeds_of(seeds, s)
    none = x.new_empty(0)
    cast = dtype != x.dtype
    w_qkv = w_o = w_1 = w_2 = qkv = context = lse = pre = hidden = output = none
    width = count * s.head_dim
    copies = Table()
    cast_x = copies.select(x, 0, 1, None, dtype) if cast else x
    if count:
        # One matrix product for q, k and v together, forward and backward. In float32 with MKL, three products of a
        # MiniLM layer take 3.11 ms and one, copies included, 2.98 (420 tokens; 1.60 and 1.44 with half of the heads);
        # with 2,400 tokens 18.1 and 16.9 (two cores of an Intel Xeon).
        w_qkv = empty((3 * width, x.shape[1]), dtype)
        biases = empty(3 * width, torch.float32)
        for source, target in zip((w.wq, w.wk, w.wv), w_qkv.chunk(3), strict=True):
            copies.select(source, 0, all_heads, heads, dtype, target)
        for source, target in zip((w.bq, w.bk, w.bv), biases.chunk(3), strict=True):
            copies.select(source, 0, all_heads, heads, biases.dtype, target)
        if cast or heads is not None:
            w_o = copies.select(w.wo, 1, all_heads, heads, dtype)
    if ffn_weights is not None:
        w1, b1, w2, b2 = ffn_weights
        if cast or neurons is not None:
            all_neurons = w1.shape[0]
            w1 = w_1 = copies.select(w1, 0, all_neurons, neurons, dtype)
            w2 = w_2 = copies.select(w2, 1, all_neurons, neurons, dtype)
    copies.run()
    rows = inputs.rows(s)
    stream = select(x, rows)
    with autocast_off(x):
        if count:
            # [T, 3 K D]
            flat = ffn.add_(product(cast_x, w_qkv.t()), biases) if bf16 else product(cast_x, w_qkv.t(), biases)
            qkv = flat.view(tokens, 3, count, s.head_dim)
            q, k, v = qkv.unbind(1)
            context, lse = attention.forward(
                *(q, k, v, starts, lengths, None, attention_seed, s.max_length, s.scale, s.attention_dropout),
                first_tokens=s.first_tokens,
                bias=w.position_bias,
            )
            projected = product(select(context.view(tokens, width), rows), (w_o if w_o.numel() else w.wo).t())
        else:
            projected = None
        half = empty(stream.shape, dtype) if cast and ffn_weights is not None else None
        ends = (projected, stream, w.bo, w.gamma1, w.beta1, output_seed, s.output_dropout, s.eps1)
        if ffn_weights is not None:
            middle, mean1, rstd1 = residual.forward(*ends, half)
            # The kernels after the products add the biases; in the products they would cost a pass over the results.
            pre = product(middle if half is None else half, w1.t())
            hidden, _ = ffn.activate(pre, s.activation, in_place=not keep, bias=_bias(b1, neurons))
            output = product(hidden, w2.t())
            out, mean2, rstd2 = residual.forward(output, middle, b2, w.gamma2, w.beta2, ffn_seed, s.ffn_dropout, s.eps2)
        else:
            middle = none
            out, mean1, rstd1, mean2, rstd2 = residual.forward(*ends, second=residual.Second(w.gamma2, w.beta2, s.eps2))
    if not keep:
        return (out,)
    saved = Saved(
        *(cast_x if cast else none, qkv, context, lse, none if projected is None else projected, mean1, rstd1, middle),
        none if half is None else half,
        *(pre, hidden, output, mean2, rstd2, w_qkv, w_o, w_1, w_2),
    )
    return results(out, saved, none)


def backward(dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted) -> tuple[Tensor, ...]:
    """Computes the gradients of `forward` and the importance partials, as the chain of the backward passes of its
    parts.

    Returns:
        dx; the signed and absolute importance of the computed heads, both [B, K]; those of the FFN, both [B]; that of
        the computed neurons [B, N]; and the gradients of the parameters in the order of Weights. Each is empty if it is
        not wanted, or if it belongs to a parameter that was not used. (The importance of heads is also computed
        whenever attention's backward pass runs.)
    """
    (x, w, starts, lengths, seeds), s = inputs, settings
    heads, neurons = w.heads, w.neurons
    tokens, batch, dtype = x.shape[0], lengths.shape[0], s.dtype
    cast = dtype != x.dtype
    all_heads, count = inputs.heads(s)
    attention_seed, output_seed, ffn_seed = seeds_of(seeds, s)
    gradients: dict[str, Tensor] = {}
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    rows = inputs.rows(s)
    spans = inputs.spans_after_attention(s)

    copies = Table()

    def keep(
        name: str, gradient: Tensor, dim: int = 0, groups: int = 1, index: Tensor | None = None, shared: bool = False
    ) -> None:
        """Stores a parameter's gradient, if wanted. Copies it if it covers selected slices only (`index`), has another
        dtype than the parameter, or is part of a larger tensor (`shared`)."""
        if not wanted.any(name):
            return
        like = getattr(w, name)
        if shared or index is not None or gradient.dtype != like.dtype:
            gradient = copies.spread(gradient, like, dim, groups, index)
        gradients[name] = gradient

    def finish(dx: Tensor = none, signed: Tensor = none, absolute: Tensor = none) -> tuple[Tensor, ...]:
        copies.run()
        results = (dx, signed, absolute, ffn_signed, ffn_absolute, by_neuron, *in_weights_order(gradients))
        # torch does not allow the same tensor twice among an op's results.
        return tuple(torch.empty_like(none) if x is None or x is none else x for x in results)

    with autocast_off(x):
        ffn_signed, ffn_absolute, by_neuron = none, none, none
        if (ffn_weights := w.ffn()) is not None:
            w1, b1, w2, b2 = ffn_weights
            second = None
            doutput, dmiddle, db2, dgamma2, dbeta2 = residual.backward(
                dout, saved.output, saved.middle, b2, w.gamma2, saved.mean2, saved.rstd2, ffn_seed, s.ffn_dropout
            )
            doutput = doutput if doutput.ndim > 1 else dmiddle
            if wanted.ffn_sums:
                ffn_signed, ffn_absolute = ffn.token_sums(doutput, saved.output, *spans, 1.0, b2.float())
            if wanted.any("w2"):
                keep("w2", gradient_product(doutput, saved.hidden), 1, w1.shape[0], neurons)
            for name, gradient in (("b2", db2), ("gamma2", dgamma2), ("beta2", dbeta2)):
                keep(name, gradient)
            if not wanted.inner():
                return finish()
            dpre = product(doutput, saved.w_2 if saved.w_2.numel() else w2)
            db1, by_neuron = ffn.activate_backward(
                *(dpre, saved.pre, saved.hidden if wanted.neuron_sums else None, None, None, s.activation),
                *(wanted.any("b1"), wanted.neuron_sums, wanted.per_token, *spans),
                bias=_bias(b1, neurons),
            )
            if wanted.any("w1"):
                keep("w1", gradient_product(dpre, saved.cast_middle if cast else saved.middle), 0, w1.shape[0], neurons)
            keep("b1", db1, 0, w1.shape[0], neurons)
            copies.run()
            copies = Table()
            if not wanted.projected():
                return finish()
            # Not earlier: without dropout and casts, doutput is the same tensor, which this overwrites.
            dmiddle = _add_product(dmiddle, dpre, saved.w_1 if saved.w_1.numel() else w1)
        else:
            dmiddle, second = dout, (w.beta1, w.gamma2, saved.mean2, saved.rstd2)
        dprojected, dx, dbo, dgamma1, dbeta1, *of_second = residual.backward(
            dmiddle,
            saved.projected if count else None,
            select(x, rows),
            w.bo,
            w.gamma1,
            saved.mean1,
            saved.rstd1,
            output_seed,
            s.output_dropout,
            second,
        )
        dprojected = dprojected if dprojected.ndim > 1 else dx
        after = ("bo", "gamma1", "beta1", "gamma2", "beta2")
        for name, gradient in zip(after, (dbo, dgamma1, dbeta1, *of_second), strict=False):
            keep(name, gradient)
        width = count * s.head_dim
        if count and wanted.any("wo"):
            dwo = gradient_product(dprojected, select(saved.context.view(tokens, width), rows))
            keep("wo", dwo, 1, all_heads, heads)
        if not wanted.attention():
            return finish()
        dx = _scatter(dx, rows, tokens) if wanted.tokens else none
        signed, absolute = (none.new_empty((batch, 0)) for _ in range(2))
        if count:
            dcontext = _scatter(product(dprojected, saved.w_o if saved.w_o.numel() else w.wo), rows, tokens)
            dqkv = empty((tokens, 3, count, s.head_dim), dtype)
            q, k, v = saved.qkv.unbind(1)
            *_, signed, absolute, dbias = attention.backward(
                dcontext.view(tokens, count, s.head_dim),
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
                dqkv,
                first_tokens=s.first_tokens,
                bias=w.position_bias,
            )
            if dbias is not None:
                keep("position_bias", dbias)
            flat = dqkv.view(tokens, 3 * width)
            # If the gradients of q, k and v are all wanted, compute them in one product.
            taken, parts = saved.cast_x if cast else x, flat.split(width, 1)
            whole = wanted.parameters[:3] == [True] * 3
            dweights = gradient_product(flat, taken).chunk(3) if whole else (None,) * 3
            for name, part, dweight in zip(w._fields[:3], parts, dweights, strict=True):
                if wanted.any(name):
                    dweight = gradient_product(part, taken) if dweight is None else dweight
                    keep(name, dweight, 0, all_heads, heads, shared=whole)
            if any(wanted.parameters[3:6]):
                for name, gradient in zip(w._fields[3:6], ffn.column_sums(flat).chunk(3), strict=True):
                    keep(name, gradient, 0, all_heads, heads, shared=True)
            if wanted.tokens:
                dx = _add_product(dx, flat, saved.w_qkv)
        return finish(dx, signed, absolute)


def fake_forward(inputs: Inputs, settings: Settings, on_gpu: bool = False) -> tuple[Tensor, ...]:
    """Returns empty tensors of the shapes and dtypes of `forward`'s results. With `on_gpu`, those of the Triton
    backend, which also saves `middle` if the FFN is pruned, and does not copy weights of selected heads."""
    x, w, starts, _, _ = inputs
    (tokens, channels), dtype = x.shape, settings.dtype
    cast, head_dim, (_, count) = dtype != x.dtype, settings.head_dim, inputs.heads(settings)
    neuron_count = 0 if w.w1 is None else w.w1.shape[0] if w.neurons is None else w.neurons.shape[0]

    def new(*shape: int, needed: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype) if needed else x.new_empty(0)

    attends, feeds = count != 0, w.w1 is not None
    rows = starts.shape[0] if settings.first_tokens else tokens
    stream = (rows, channels)

    def statistics() -> Tensor:
        return new(rows, dtype=torch.float32)

    saved = Saved(
        cast_x=new(tokens, channels, needed=cast),
        qkv=new(tokens, 3, count, head_dim, needed=attends),
        context=new(tokens, count, head_dim, needed=attends),
        lse=new(tokens, count, needed=attends, dtype=torch.float32),
        projected=new(*stream, needed=attends),
        mean1=statistics(),
        rstd1=statistics(),
        middle=new(*stream, needed=feeds or on_gpu, dtype=x.dtype),
        cast_middle=new(*stream, needed=cast and feeds),
        pre=new(rows, neuron_count, needed=feeds),
        hidden=new(rows, neuron_count, needed=feeds),
        output=new(*stream, needed=feeds),
        mean2=statistics(),
        rstd2=statistics(),
        w_qkv=new(3 * count * head_dim, channels, needed=attends and not (on_gpu and w.heads is not None)),
        w_o=new(channels, count * head_dim, needed=attends and (cast if w.heads is None else not on_gpu)),
        w_1=new(neuron_count, channels, needed=feeds and (cast or w.neurons is not None)),
        w_2=new(channels, neuron_count, needed=feeds and (cast or w.neurons is not None)),
    )
    return x.new_empty(stream), *saved


def fake_backward(dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted) -> tuple[Tensor, ...]:
    """Returns empty tensors of the shapes and dtypes of `backward`'s results."""
    x, w, _, lengths, _ = inputs
    batch, (_, count) = lengths.shape[0], inputs.heads(settings)

    def new(*shape: int, needed: bool = True) -> Tensor:
        return x.new_empty(shape if needed else (0,), dtype=torch.float32)

    attends, feeds = count != 0, w.w1 is not None
    neuron_count = 0 if w.w1 is None else w.w1.shape[0] if w.neurons is None else w.neurons.shape[0]
    parts = [attends] * 7 + [True] * 3 + [feeds] * 4 + [True] * 2 + [attends]
    return (
        x.new_empty(x.shape) if wanted.tokens else new(0),
        *(new(batch, count, needed=wanted.attention()) for _ in range(2)),
        *(new(batch, needed=feeds and wanted.ffn_sums) for _ in range(2)),
        new(batch, neuron_count, needed=feeds and wanted.neuron_sums),
        *(
            new(0) if p is None or not (part and needed) else p.new_empty(p.shape)
            for p, part, needed in zip(w[:PARAMETERS], parts, wanted.parameters, strict=True)
        ),
    )
