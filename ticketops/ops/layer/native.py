"""An encoder layer on the CPU: the native kernels, with torch's matrix products between them. Weights are compacted and
cast in one copy. Inference of few tokens runs as one kernel, csrc/cpu/encoder.cpp."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ticketops.ops.attention import native as attention
from ticketops.ops.copies.native import Table
from ticketops.ops.embedding import embedding_gradient
from ticketops.ops.extension import address, checked, native, run
from ticketops.ops.ffn import native as ffn
from ticketops.ops.layer.arguments import (
    PARAMETERS,
    WHOLE,
    Inputs,
    Saved,
    Settings,
    Wanted,
    autocast_off,
    in_weights_order,
    seeds_of,
    select,
)
from ticketops.ops.memory import empty
from ticketops.ops.products import add_product, gradient_product, has_bf16_products, product
from ticketops.ops.residual import native as residual
from ticketops.ops.rotary import native as rotary

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


def _bias(bias: Tensor | None, places: Tensor | None = None) -> Tensor | None:
    """Returns a bias, or its elements at `places`, in float32."""
    if bias is None:
        return None
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


def infers(inputs: Inputs, settings: Settings) -> bool:
    """True if `infer` computes such a layer: one like BERT's, with all parameters in the dtype of the tokens.

    Args:
        inputs: tensor arguments.
        settings: non-tensor arguments.
    """
    x, w, s = inputs.x, inputs.weights, settings
    other = s.norm_first or s.gated or s.window is not None or inputs.cosines is not None or not w.has_all()
    other = other or w.positions() != (None, None) or inputs.real is not None
    return not other and all(p is None or p.dtype == x.dtype for p in w[: PARAMETERS - 3])


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
    (x, weights, starts, lengths, *_), s = inputs, settings
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
        *(s.scale, *s.eps),
    )
    return out


def prepare(layers: Sequence[tuple[Inputs, Settings]]) -> tuple[list[None], None]:
    """Does nothing: on a CPU each layer copies its weights right before its products, which find them in the caches."""
    return [None] * len(layers), None


def forward(
    inputs: Inputs,
    settings: Settings,
    keep: bool = True,
    weights: None = None,
    entered: Tensor | None = None,
    half: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See ticketops.ops.layer.encoder_layer.

    Args:
        keep: True saves tensors for a backward pass.
        weights: result of `prepare`.
        entered: x in the dtype of the products, if there is such a copy; None makes one where products need it.
        half: [T, C] of that dtype to write a copy of the result to; None for no copy. Only of a layer with an FFN and a
            LayerNorm behind it.

    Returns:
        [T, C], or [B, C] with `first_tokens`; and the fields of Saved, if `keep`.
    """
    (x, w, starts, lengths, real, seeds, cosines, sines), s = inputs, settings
    ffn_weights, heads, neurons = w.ffn(), w.heads, w.neurons
    tokens, dtype, bf16 = x.shape[0], s.dtype, s.dtype == torch.bfloat16
    (_, count), slices = inputs.heads(s), inputs.slices(s)
    attention_seed, output_seed, inner_seed, ffn_seed = seeds_of(seeds, s)
    attention_dropout, output_dropout, inner_dropout, ffn_dropout = s.dropouts
    none = x.new_empty(0)
    cast = dtype != x.dtype
    attention_input = w_qkv = w_o = w_1 = w_2 = qkv = context = lse = pre = hidden = output = none
    ffn_input = mean1 = rstd1 = mean2 = rstd2 = none
    projected = None
    normed = s.norm_first and w.gamma1 is not None
    width = count * s.head_dim
    copies = Table()
    if cast and count and not normed:
        attention_input = copies.select(x, 0, 1, None, dtype) if entered is None else entered
    biases = None
    if count:
        if inputs.joined(s) is None:
            # One matrix product for q, k and v together, forward and backward. In float32 with MKL, three products of a
            # MiniLM layer take 3.11 ms and one, copies included, 2.98 (420 tokens; 1.60 and 1.44 with half of the
            # heads); with 2,400 tokens 18.1 and 16.9 (two cores of an Intel Xeon).
            w_qkv = empty((3 * width, x.shape[1]), dtype)
            for name, target in zip(w.projections, w_qkv.chunk(len(w.projections)), strict=True):
                copies.select(getattr(w, name), *slices.get(name, WHOLE), dtype, target)
        if w.biases:
            biases = empty(3 * width, torch.float32)
            for name, target in zip(w.biases, biases.chunk(len(w.biases)), strict=True):
                copies.select(getattr(w, name), *slices.get(name, WHOLE), biases.dtype, target)
        if cast or heads is not None:
            w_o = copies.select(w.wo, *slices.get("wo", WHOLE), dtype)
    if ffn_weights is not None:
        w1, b1, w2, b2 = ffn_weights
        if cast or neurons is not None:
            w1 = w_1 = copies.select(w1, *slices.get("w1", WHOLE), dtype)
            w2 = w_2 = copies.select(w2, *slices.get("w2", WHOLE), dtype)
    copies.run()
    rows = inputs.rows(s)
    stream = select(x, rows)
    with autocast_off(x):
        if count:
            if normed:
                _, attention_input, mean1, rstd1 = residual.forward_before(
                    None, x, None, w.gamma1, w.beta1, None, 0.0, s.eps[0], dtype
                )
            taken, joined = attention_input if cast or normed else x, inputs.joined(s)
            weight = (w_qkv if joined is None else joined).t()
            # [T, 3 K D]
            qkv = product(taken, weight) if bf16 or biases is None else product(taken, weight, biases)
            if bf16 and biases is not None:
                ffn.add_(qkv, biases)
            by_head = qkv.view(tokens, 3, count, s.head_dim)
            if cosines is not None and sines is not None:
                rotary.turn_(by_head, cosines, sines)
            q, k, v = by_head.unbind(1)
            context, lse = attention.forward(
                *(q, k, v, starts, lengths, None, attention_seed, s.max_length, s.scale, attention_dropout),
                window=s.window,
                first_tokens=s.first_tokens,
                bias=w.position_bias,
                positions=w.positions(),
                real=real,
            )
            context = context.view(tokens, width)
            projected = product(select(context, rows), (w_o if w_o.numel() else w.wo).t())
        middle = none
        if s.norm_first:
            gamma2, beta2 = (None, None) if ffn_weights is None else (w.gamma2, w.beta2)
            total, *of_norm = residual.forward_before(
                projected, stream, w.bo, gamma2, beta2, output_seed, output_dropout, s.eps[1], dtype
            )
            if ffn_weights is not None:
                ffn_input, mean2, rstd2 = of_norm
            # A layer without anything returns its input, which an op of torch must not.
            out = total.clone() if ffn_weights is None and total is stream else total
        else:
            assert w.gamma1 is not None
            inner_half = empty(stream.shape, dtype) if cast and ffn_weights is not None else None
            second = residual.Second(w.gamma2, w.beta2, s.eps[1]) if ffn_weights is None else None
            out, mean1, rstd1, *of_second = residual.forward(
                projected, stream, w.bo, w.gamma1, w.beta1, output_seed, output_dropout, s.eps[0], inner_half, second
            )
            if ffn_weights is None:
                mean2, rstd2 = of_second
            else:
                middle, ffn_input = out, none if inner_half is None else inner_half
        if ffn_weights is not None:
            # The kernels after the products add the biases; in the products they would cost a pass over the results.
            pre = product(ffn_input if cast or s.norm_first else middle, w1.t())
            hidden, _ = ffn.activate(
                *(pre, s.activation, None, s.gated, not (keep or s.gated), _bias(b1, slices.get("w1", WHOLE)[2])),
                *(inner_seed, inner_dropout),
            )
            output = product(hidden, w2.t())
            if s.norm_first:
                out, *_ = residual.forward_before(output, total, b2, None, None, ffn_seed, ffn_dropout, 0.0, dtype)
            else:
                out, mean2, rstd2 = residual.forward(
                    output, middle, b2, w.gamma2, w.beta2, ffn_seed, ffn_dropout, s.eps[1], half
                )
    if not keep:
        return (out,)
    saved = Saved(
        *(attention_input, qkv, context, lse, none if projected is None else projected, mean1, rstd1, middle),
        *(ffn_input, pre, hidden, output, mean2, rstd2, w_qkv, w_o, w_1, w_2),
    )
    return out, *saved


def backward(
    dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of `forward` and the importance partials, as the chain of the backward passes of its
    parts.

    Returns:
        dx; the signed and absolute importance of the computed heads, both [B, K]; those of the FFN, both [B]; that of
        the computed neurons [B, N]; and the gradients of the parameters in the order of Weights. Each is empty if it is
        not wanted; that of a parameter is None then, or if the parameter was not used. (The importance of heads is also
        computed whenever attention's backward pass runs.)
    """
    (x, w, starts, lengths, real, seeds, cosines, sines), s = inputs, settings
    tokens, batch, dtype = x.shape[0], lengths.shape[0], s.dtype
    (_, count), slices = inputs.heads(s), inputs.slices(s)
    attention_seed, output_seed, inner_seed, ffn_seed = seeds_of(seeds, s)
    attention_dropout, output_dropout, inner_dropout, ffn_dropout = s.dropouts
    gradients: dict[str, Tensor] = {}
    none = torch.empty(0, dtype=torch.float32, device=x.device)
    rows = inputs.rows(s)
    spans = inputs.spans_after_attention(s)

    copies = Table()

    def keep(name: str, gradient: Tensor, shared: bool = False) -> None:
        """Stores a parameter's gradient, if wanted. Copies it if it covers selected slices only, has another dtype than
        the parameter, or is part of a larger tensor (`shared`)."""
        if not wanted.any(name):
            return
        like, (dim, groups, index) = getattr(w, name), slices.get(name, WHOLE)
        if shared or index is not None or gradient.dtype != like.dtype:
            gradient = copies.spread(gradient, like, dim, groups, index)
        gradients[name] = gradient

    def finish(dx: Tensor = none, signed: Tensor = none, absolute: Tensor = none) -> tuple[Tensor | None, ...]:
        copies.run()
        # A LayerNorm before what is pruned is not read, yet whoever distributes a model waits for its gradients.
        for name in unread:
            if wanted.any(name):
                gradients[name] = torch.zeros_like(getattr(w, name))
        return dx, signed, absolute, ffn_signed, ffn_absolute, by_neuron, *in_weights_order(gradients)

    unread = []
    if s.norm_first:
        unread = [] if count else ["gamma1", "beta1"]
        unread += ["gamma2", "beta2"] if w.w1 is None else []
    with autocast_off(x):
        ffn_signed, ffn_absolute, by_neuron = none, none, none
        # Of the tokens between the sublayers: the gradient, and with `norm_first` what reaches it past the FFN.
        dmiddle = dout
        # What the LayerNorm before the FFN gives.
        dnormed, second = None, None
        if (ffn_weights := w.ffn()) is not None:
            w1, b1, w2, b2 = ffn_weights
            if s.norm_first:
                doutput, _, db2, *_ = residual.backward_before(
                    None, dout, None, dout, b2, None, None, None, ffn_seed, ffn_dropout, dtype
                )
                keep("b2", db2)
            else:
                doutput, dmiddle, db2, dgamma2, dbeta2 = residual.backward(
                    dout, saved.output, saved.middle, b2, w.gamma2, saved.mean2, saved.rstd2, ffn_seed, ffn_dropout
                )
                doutput = doutput if doutput.ndim > 1 else dmiddle
                for name, gradient in (("b2", db2), ("gamma2", dgamma2), ("beta2", dbeta2)):
                    keep(name, gradient)
            if wanted.ffn_sums:
                ffn_signed, ffn_absolute = ffn.token_sums(doutput, saved.output, *spans, 1.0, _bias(b2))
            if wanted.any("w2"):
                keep("w2", gradient_product(doutput, saved.hidden))
            if not wanted.inner(s):
                return finish()
            dhidden = product(doutput, saved.w_2 if saved.w_2.numel() else w2)
            dpre = empty(saved.pre.shape, dtype) if s.gated else dhidden
            db1, by_neuron = ffn.activate_backward(
                *(dhidden, saved.pre, saved.hidden if wanted.neuron_sums else None, None, None, s.activation),
                *(wanted.any("b1"), wanted.neuron_sums, wanted.per_token, *spans, dpre if s.gated else None),
                *(_bias(b1, slices.get("w1", WHOLE)[2]), inner_seed, inner_dropout),
            )
            if wanted.any("w1"):
                entered = saved.ffn_input if dtype != x.dtype or s.norm_first else saved.middle
                keep("w1", gradient_product(dpre, entered))
            keep("b1", db1)
            copies.run()
            copies = Table()
            if not wanted.projected(s):
                return finish()
            weight = saved.w_1 if saved.w_1.numel() else w1
            if s.norm_first:
                dnormed = product(dpre, weight)
            else:
                # Not earlier: without dropout and casts, doutput is the same tensor, which this overwrites.
                dmiddle = _add_product(dmiddle, dpre, weight)
        elif not s.norm_first:
            second = (w.beta1, w.gamma2, saved.mean2, saved.rstd2)
        projected, stream = saved.projected if count else None, select(x, rows)
        if s.norm_first:
            gamma2 = None if dnormed is None else w.gamma2
            dprojected, dx, dbo, *of_norm = residual.backward_before(
                *(dnormed, dmiddle, projected, stream, w.bo, gamma2, saved.mean2, saved.rstd2, output_seed),
                dropout_p=output_dropout,
                dtype=dtype,
            )
            after: tuple[str, ...] = ("bo",) if dnormed is None else ("bo", "gamma2", "beta2")
        else:
            assert w.gamma1 is not None
            dprojected, dx, dbo, *of_norm = residual.backward(
                *(dmiddle, projected, stream, w.bo, w.gamma1, saved.mean1, saved.rstd1, output_seed, output_dropout),
                second=second,
            )
            dprojected = dprojected if dprojected.ndim > 1 else dx
            after = ("bo", "gamma1", "beta1", "gamma2", "beta2")
        for name, gradient in zip(after, (dbo, *of_norm), strict=False):
            keep(name, gradient)
        width = count * s.head_dim
        if count and wanted.any("wo"):
            keep("wo", gradient_product(dprojected, select(saved.context, rows)))
        if not wanted.attention(s):
            return finish()
        dx = _scatter(dx, rows, tokens) if wanted.before_attention(s) else none
        if dx is dout:
            dx = dout.clone()
        signed, absolute = (none.new_empty((batch, 0)) for _ in range(2))
        if count:
            shape = (tokens, count, s.head_dim)
            dcontext = _scatter(product(dprojected, saved.w_o if saved.w_o.numel() else w.wo), rows, tokens)
            dqkv = empty((tokens, 3, count, s.head_dim), dtype)
            q, k, v = saved.qkv.view(dqkv.shape).unbind(1)
            _, _, _, signed, absolute, *by_distance = attention.backward(
                *(dcontext.view(shape), q, k, v, saved.context.view(shape), saved.lse, starts, lengths, None),
                *(attention_seed, s.max_length, s.scale, attention_dropout, dqkv),
                window=s.window,
                first_tokens=s.first_tokens,
                bias=w.position_bias,
                positions=w.positions(),
                real=real,
            )
            for name, dtable in zip(w._fields[PARAMETERS - 3 : PARAMETERS], by_distance, strict=True):
                if dtable is not None:
                    keep(name, dtable)
            if cosines is not None and sines is not None:
                rotary.turn_(dqkv, cosines, sines, back=True)
            flat = dqkv.view(tokens, 3 * width)
            normed = s.norm_first and w.gamma1 is not None
            taken = saved.attention_input if dtype != x.dtype or normed else x
            parts = flat.split(flat.shape[1] // len(w.projections), 1)
            # If the gradients of q, k and v are all wanted, compute them in one product.
            whole = wanted.all(*w.projections)
            dweights = gradient_product(flat, taken).chunk(len(parts)) if whole else (None,) * len(parts)
            for name, part, dweight in zip(w.projections, parts, dweights, strict=True):
                if wanted.any(name):
                    dweight = gradient_product(part, taken) if dweight is None else dweight
                    keep(name, dweight, shared=len(parts) > 1 and whole)
            if wanted.any(*w.biases):
                sums = ffn.column_sums(flat).chunk(len(parts))
                for name, gradient in zip(w.biases, sums, strict=True):
                    keep(name, gradient, shared=len(parts) > 1)
            if wanted.before_attention(s):
                joined = inputs.joined(s)
                weight = saved.w_qkv if joined is None else joined
                if normed:
                    dentered = product(flat, weight)
                    _, dx, _, dgamma1, dbeta1 = residual.backward_before(
                        dentered, dx, None, x, None, w.gamma1, saved.mean1, saved.rstd1, None, 0.0, x.dtype
                    )
                    keep("gamma1", dgamma1)
                    keep("beta1", dbeta1)
                else:
                    dx = _add_product(dx, flat, weight)
        return finish(dx if wanted.tokens else none, signed, absolute)


def fake_forward(inputs: Inputs, settings: Settings, on_gpu: bool = False) -> tuple[Tensor, ...]:
    """Returns empty tensors of the shapes and dtypes of `forward`'s results. With `on_gpu`, those of the Triton
    backend, which also saves `middle` if the FFN is pruned."""
    x, w, starts = inputs.x, inputs.weights, inputs.starts
    (tokens, channels), dtype, s = x.shape, settings.dtype, settings
    cast, head_dim, (_, count) = dtype != x.dtype, s.head_dim, inputs.heads(s)
    neuron_count = 0 if w.w2 is None else w.w2.shape[1] if w.neurons is None else w.neurons.shape[0]

    def new(*shape: int, needed: bool = True, dtype: torch.dtype = dtype) -> Tensor:
        return x.new_empty(shape, dtype=dtype) if needed else x.new_empty(0)

    attends, feeds = count != 0, w.w1 is not None
    rows = starts.shape[0] if s.first_tokens else tokens
    stream = (rows, channels)
    first = s.norm_first
    normed = first and attends and w.gamma1 is not None
    joins = attends and (w.wk is not None or cast or w.heads is not None)

    norm_rows = inputs.norm_rows(s)
    mean1, mean2 = (new(0 if on_gpu else n, dtype=torch.float32) for n in norm_rows)
    if on_gpu:
        lse = new(tokens * count + 2 * sum(norm_rows), dtype=torch.float32)
    else:
        lse = new(tokens, count, needed=attends, dtype=torch.float32)
    saved = Saved(
        attention_input=new(tokens, channels, needed=normed or (cast and attends)),
        qkv=new(tokens, 3 * count * head_dim, needed=attends),
        context=new(tokens, count * head_dim, needed=attends),
        lse=lse,
        projected=new(*stream, needed=attends),
        mean1=mean1,
        rstd1=torch.empty_like(mean1),
        middle=new(*stream, needed=(feeds or on_gpu) and not first, dtype=x.dtype),
        ffn_input=new(*stream, needed=feeds and (cast or first)),
        pre=new(rows, neuron_count * (1 + s.gated), needed=feeds),
        hidden=new(rows, neuron_count, needed=feeds),
        output=new(*stream, needed=feeds),
        mean2=mean2,
        rstd2=torch.empty_like(mean2),
        w_qkv=new(3 * count * head_dim, channels, needed=joins),
        w_o=new(channels, count * head_dim, needed=attends and (cast or w.heads is not None)),
        w_1=new(neuron_count * (1 + s.gated), channels, needed=feeds and (cast or w.neurons is not None)),
        w_2=new(channels, neuron_count, needed=feeds and (cast or w.neurons is not None)),
    )
    return x.new_empty(stream), *saved


def fake_backward(dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted) -> tuple[Tensor, ...]:
    """Returns empty tensors of the shapes and dtypes of `backward`'s results."""
    x, w, lengths = inputs.x, inputs.weights, inputs.lengths
    batch, (_, count) = lengths.shape[0], inputs.heads(settings)

    def new(*shape: int, needed: bool = True) -> Tensor:
        return x.new_empty(shape if needed else (0,), dtype=torch.float32)

    attends, feeds = count != 0, w.w1 is not None
    neuron_count = 0 if w.w2 is None else w.w2.shape[1] if w.neurons is None else w.neurons.shape[0]
    parts = [attends] * 7 + [True] * 3 + [feeds] * 4 + [True] * 2 + [attends] * 3
    return (
        x.new_empty(x.shape) if wanted.tokens else new(0),
        *(new(batch, count, needed=wanted.attention(settings)) for _ in range(2)),
        *(new(batch, needed=feeds and wanted.ffn_sums) for _ in range(2)),
        new(batch, neuron_count, needed=feeds and wanted.neuron_sums),
        *(
            new(0) if p is None or not (part and needed) else p.new_empty(p.shape)
            for p, part, needed in zip(w[:PARAMETERS], parts, wanted.parameters, strict=True)
        ),
    )
