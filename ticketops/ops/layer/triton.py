"""An encoder layer on a GPU: the Triton kernels of the layer's parts, with cuBLAS's products between them.

With small batches the host's launches take longer than the GPU's work (bench/results/first-look-nvidia-h200.md). Module
by module, a layer of BERT-base takes some 70 launches under autocast, most of them casts; as one op it takes some 22.
All weights are cast at once, and those of selected heads and neurons put side by side in the same pass; q, k and v are
one product; the products for weight gradients write float32 directly; and products with transposed weights add to the
gradient of the residual stream.
"""

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ticketops.ops.attention import triton as attention
from ticketops.ops.ffn import triton as ffn
from ticketops.ops.layer.arguments import (
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
from ticketops.ops.layer.copies import Table
from ticketops.ops.residual import triton as residual
from ticketops.ops.rotary import triton as rotary
from ticketops.ops.triton_common import Part, linear, thirds, transposed


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


@cache
def _nothing(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns an empty tensor that stands for those that are not there."""
    # The first pass may be one of inference mode, whose tensors others could not save.
    with torch.inference_mode(False):
        return torch.empty(0, dtype=dtype, device=device)


def _equal(x: Tensor, count: int) -> Sequence[Tensor]:
    """Divides a tensor into equal parts along its first dimension, with fewer calls of torch than `chunk`."""
    return (x,) if count == 1 else x.split_with_sizes([len(x) // count] * count)


def _each(seeds: Tensor) -> Iterator[Part]:
    """Yields the elements of a vector one by one, for kernels to read."""
    return (Part(seeds, i, (1,)) for i in range(len(seeds)))


def _statistics(whole: Tensor, lse: tuple[int, int], norm_rows: tuple[int, int]) -> list[Part]:
    """Divides `Saved.lse` into lse [T, K], mean1, rstd1, mean2 and rstd2."""
    parts, end = [Part(whole, 0, lse)], lse[0] * lse[1]
    for rows in norm_rows:
        parts += Part(whole, end, (rows,)), Part(whole, end + rows, (rows,))
        end += 2 * rows
    return parts


def _scatter(x: Tensor, rows: Tensor | None, tokens: int) -> Tensor:
    """Computes the gradient of `select`: rows of x at their positions among zeros. Only one sequence's gradient counts
    for a row that several sequences refer to; the others are empty and have a gradient of 0."""
    return x if rows is None else x.new_zeros((tokens, x.shape[1])).index_add_(0, rows, x)


class _Read(NamedTuple):
    """A layer's weights as products read them: copies of the computed heads and neurons in the products' dtype, or the
    parameters themselves.

    Attributes:
        w_qkv: weight of q, k and v together; empty if a parameter has it, or no head is computed.
        biases: of these; None for none.
        w_o, w_1, w_2: copies of weights, see Saved.
        b1, b2: biases of the FFN; None for none.
    """

    w_qkv: Tensor
    biases: Tensor | None
    w_o: Tensor
    w_1: Tensor
    w_2: Tensor
    b1: Tensor | None
    b2: Tensor | None


def prepare(layers: Sequence[tuple[Inputs, Settings]]) -> tuple[list[_Read], Tensor | None]:
    """Copies the weights of several layers, which takes few launches for all of them.

    Args:
        layers: tensor arguments and other arguments of each.

    Returns:
        What `forward` takes as `weights` for each layer, and as `entered` for the first one.
    """
    copies = Table()
    entered = _entered(*layers[0], copies)
    found = [_read(inputs, settings, copies) for inputs, settings in layers]
    copies.run()
    return found, entered


def _entered(inputs: Inputs, s: Settings, copies: Table) -> Tensor | None:
    """Adds a copy of the tokens in the products' dtype to a table, if products need it; else returns None."""
    normed = s.norm_first and inputs.weights.gamma1 is not None
    needed = s.dtype != inputs.x.dtype and inputs.heads(s)[1] and not normed
    return copies.select(inputs.x, 0, 1, None, s.dtype) if needed else None


def _read(inputs: Inputs, s: Settings, copies: Table) -> _Read:
    """Adds a layer's copies to a table that will run them."""
    x, w, slices = inputs.x, inputs.weights, inputs.slices(s)
    (_, count), dtype = inputs.heads(s), s.dtype
    cast, width = dtype != x.dtype, count * s.head_dim
    w_qkv = w_o = w_1 = w_2 = _nothing(x.device, x.dtype)
    biases, b1, b2 = None, w.b1, w.b2

    def copied(name: str, target: Tensor | None = None) -> Tensor:
        return copies.select(getattr(w, name), *slices.get(name, WHOLE), dtype, target)

    if count:
        if inputs.joined(s) is None:
            w_qkv = torch.empty((3 * width, x.shape[1]), dtype=dtype, device=x.device)
            for name, target in zip(w.projections, _equal(w_qkv, len(w.projections)), strict=True):
                copied(name, target)
        if w.biases:
            biases = torch.empty(3 * width, dtype=dtype, device=x.device)
            for name, target in zip(w.biases, _equal(biases, len(w.biases)), strict=True):
                copied(name, target)
        if cast or w.heads is not None:
            w_o = copied("wo")
    if w.ffn() is not None:
        if cast or w.neurons is not None:
            w_1, w_2 = copied("w1"), copied("w2")
            b1 = None if b1 is None else copied("b1")
        b2 = copied("b2") if cast and b2 is not None else b2
    return _Read(w_qkv, biases, w_o, w_1, w_2, b1, b2)


def forward(
    inputs: Inputs,
    settings: Settings,
    keep: bool = True,
    weights: _Read | None = None,
    entered: Tensor | None = None,
    half: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """See ticketops.ops.layer.encoder_layer and the native backend.

    Args:
        keep: True saves tensors for a backward pass.
        weights: result of `prepare`; None copies the weights here.
        entered, half: see the native backend.

    Returns:
        [T, C], or [B, C] with `first_tokens`; and the fields of Saved, if `keep`.
    """
    (x, w, starts, lengths, real, seeds, cosines, sines), s = inputs, settings
    ffn_weights = w.ffn()
    tokens, dtype = x.shape[0], s.dtype
    _, count = inputs.heads(s)
    attention_seed, output_seed, inner_seed, ffn_seed = seeds_of(seeds, s, _each)
    attention_dropout, output_dropout, inner_dropout, ffn_dropout = s.dropouts
    cast, width, none = dtype != x.dtype, count * s.head_dim, _nothing(x.device, x.dtype)
    qkv = context = pre = hidden = output = middle = ffn_input = none
    norm_rows = inputs.norm_rows(s)
    statistics = torch.empty(tokens * count + 2 * sum(norm_rows), dtype=torch.float32, device=x.device)
    lse, *of_norms = _statistics(statistics, (tokens, count), norm_rows)
    normed, projected = s.norm_first and w.gamma1 is not None, None
    if weights is None:
        (weights,), entered = prepare([(inputs, s)])
    elif entered is None:
        copies = Table()
        entered = _entered(inputs, s, copies)
        copies.run()
    attention_input = none if entered is None else entered
    w_qkv, biases, w_o, w_1, w_2, b1, b2 = weights
    rows = inputs.rows(s)
    stream = select(x, rows)
    # Autocast, if it is on, has nothing to cast: all factors of products have its dtype.
    if count:
        if normed:
            _, attention_input = residual.forward_before(
                None, x, None, w.gamma1, w.beta1, None, 0.0, s.eps[0], dtype, of_norms[:2]
            )
        taken = attention_input if cast or normed else x
        joined = inputs.joined(s)
        qkv = linear(taken, w_qkv if joined is None else joined, biases)
        shape = (tokens, count, s.head_dim)
        if cosines is not None and sines is not None:
            rotary.turn_(qkv.view(tokens, 3, *shape[1:]), cosines, sines)
        context = torch.empty((tokens, width), dtype=dtype, device=x.device)
        attention.forward(
            *(*thirds(qkv, shape), starts, lengths, None, attention_seed, s.max_length, s.scale, attention_dropout),
            window=s.window,
            bias=w.position_bias,
            positions=w.positions(),
            real=real,
            into=(Part(context, 0, shape), lse),
        )
        projected = linear(select(context, rows), w_o if w_o.numel() else w.wo, None)
    if s.norm_first:
        gamma2, beta2 = (None, None) if ffn_weights is None else (w.gamma2, w.beta2)
        total, normed2 = residual.forward_before(
            projected, stream, w.bo, gamma2, beta2, output_seed, output_dropout, s.eps[1], dtype, of_norms[2:]
        )
        if ffn_weights is not None:
            ffn_input = normed2
        # A layer without anything returns its input, which an op of torch must not.
        out = total.clone() if ffn_weights is None and total is stream else total
    else:
        assert w.gamma1 is not None
        inner_half = None
        if cast and ffn_weights is not None:
            ffn_input = inner_half = torch.empty(stream.shape, dtype=dtype, device=x.device)
        if projected is None:
            projected = x.new_zeros(stream.shape, dtype=dtype)
        middle, *_ = residual.forward(
            projected, stream, w.bo, w.gamma1, w.beta1, output_seed, output_dropout, s.eps[0], inner_half, of_norms[:2]
        )
        if ffn_weights is None:
            # The LayerNorms before and after the FFN follow each other.
            _, out = residual.forward_before(
                None, middle, None, w.gamma2, w.beta2, None, 0.0, s.eps[1], x.dtype, of_norms[2:]
            )
    if ffn_weights is not None:
        inner = ffn_input if cast or s.norm_first else middle
        w1, w2 = (copy if copy.numel() else whole for copy, whole in ((w_1, ffn_weights[0]), (w_2, ffn_weights[2])))
        output, pre, hidden = ffn.forward(
            *(inner, w1, b1, w2, b2, None, None, s.activation), seed=inner_seed, dropout_p=inner_dropout
        )
        if s.norm_first:
            out, *_ = residual.forward_before(output, total, None, None, None, ffn_seed, ffn_dropout, 0.0, dtype)
        else:
            out, *_ = residual.forward(
                output, middle, None, w.gamma2, w.beta2, ffn_seed, ffn_dropout, s.eps[1], half, of_norms[2:]
            )
    if not keep:
        return (out,)
    if not count or projected is None:
        projected = none
    saved = Saved(
        *(attention_input, qkv, context, statistics, projected, none, none, middle, ffn_input, pre, hidden, output),
        *(none, none, w_qkv, w_o, w_1, w_2),
    )
    return out, *saved


def backward(
    dout: Tensor, inputs: Inputs, saved: Saved, settings: Settings, wanted: Wanted
) -> tuple[Tensor | None, ...]:
    """Computes the gradients of `forward` and the importance partials. The results are as the native backend's; some
    are views of one tensor."""
    (x, w, starts, lengths, real, seeds, cosines, sines), s = inputs, settings
    (tokens, channels), batch, dtype = x.shape, lengths.shape[0], s.dtype
    cast, normed = dtype != x.dtype, s.norm_first and w.gamma1 is not None
    (_, count), slices = inputs.heads(s), inputs.slices(s)
    attention_seed, output_seed, inner_seed, ffn_seed = seeds_of(seeds, s, _each)
    attention_dropout, output_dropout, inner_dropout, ffn_dropout = s.dropouts
    gradients: dict[str, Tensor] = {}
    # Asked for many times.
    asked = {name for name, there in zip(w._fields, wanted.parameters, strict=False) if there}
    rows = inputs.rows(s)
    spans = inputs.spans_after_attention(s)
    none = _nothing(x.device, torch.float32)
    lse, mean1, rstd1, mean2, rstd2 = _statistics(saved.lse, (tokens, count), inputs.norm_rows(s))
    by_neuron, parts = None, ffn.Parts(None, None, None)
    #: Names of a bias and of a LayerNorm's two parameters, "" for one that is not there, and partial sums [parts, 3 C]
    #: of their gradients, to be added up. At most two of these.
    vectors: list[tuple[tuple[str, str, str], Tensor]] = []
    unread = []
    if s.norm_first:
        # A LayerNorm before what is pruned is not read, yet whoever distributes a model waits for its gradients.
        unread = [] if count else ["gamma1", "beta1"]
        unread += ["gamma2", "beta2"] if w.w1 is None else []

    def finish(dx: Tensor = none, signed: Tensor = none, absolute: Tensor = none) -> tuple[Tensor | None, ...]:
        some = [(names, sums) for names, sums in vectors if not asked.isdisjoint(names)]
        first, more = ([sums for _, sums in some] + [None, None])[:2]
        # All sums in one tensor, that of b1 last: it may have any length.
        names, sizes = [name for names, _ in some for name in names], [channels] * (3 * len(some))
        if parts.db1 is not None:
            names, sizes = [*names, "b1"], [*sizes, parts.db1.shape[1]]
        total = torch.empty(sum(sizes), dtype=torch.float32, device=x.device)
        places = [Part(total, i * 3 * channels, (3 * channels,)) for i in range(len(some))]
        db1 = None if parts.db1 is None else Part(total, len(some) * 3 * channels, (sizes[-1],))
        into = (db1, *places, *(None,) * (2 - len(some)))
        _, *of_ffn = ffn.finish(parts._replace(db2=first), *spans, None, torch.float32, more, into)
        if names:
            gradients.update(zip(names, total.split_with_sizes(sizes), strict=True))
        copies, found = Table(), {}
        for name, gradient in gradients.items():
            if name in asked:
                like, (dim, groups, index) = getattr(w, name), slices.get(name, WHOLE)
                # Sums are in float32.
                if index is not None:
                    gradient = copies.spread(gradient, like, dim, groups, index)
                found[name] = gradient if gradient.dtype == like.dtype else gradient.to(like.dtype)
        copies.run()
        found |= {name: torch.zeros_like(getattr(w, name)) for name in unread if name in asked}
        return dx, signed, absolute, *of_ffn, by_neuron, *in_weights_order(found)

    with autocast_off(x):
        # Of the tokens between the sublayers: the gradient, and with `norm_first` what reaches it past the FFN.
        dmiddle, dnormed = dout, None
        if (ffn_weights := w.ffn()) is not None:
            w1, _, w2, b2 = ffn_weights
            if s.norm_first:
                doutput = dout
                if cast or ffn_dropout:
                    doutput, *_ = residual.first_stage(
                        *(None, None, dout, None, None, None, None, ffn_seed, ffn_dropout), dtotal=dout, dtype=dtype
                    )
                if "b2" in asked:
                    gradients["b2"] = doutput.sum(0, dtype=torch.float32)
            else:
                doutput, dmiddle, sums = residual.first_stage(
                    dout, saved.output, saved.middle, None, w.gamma2, mean2, rstd2, ffn_seed, ffn_dropout
                )
                doutput = doutput if doutput.ndim > 1 else dmiddle
                vectors.append((("" if b2 is None else "b2", "gamma2", "" if w.beta2 is None else "beta2"), sums))
            if "w2" in asked:
                gradients["w2"] = _product(transposed(doutput), saved.hidden, w2.dtype)
            if wanted.inner(s):
                gradient, pre = torch.mm(doutput, saved.w_2 if saved.w_2.numel() else w2), saved.pre
            else:
                gradient = pre = doutput.new_empty((len(doutput), 0))
            if wanted.inner(s) or wanted.ffn_sums:
                flags = ffn.Wanted("b1" in asked, False, wanted.ffn_sums, wanted.neuron_sums, wanted.per_token)
                dpre, parts, by_neuron = ffn.activation_backward(
                    *(gradient, doutput, saved.output, pre, *spans, None, None, s.activation, flags),
                    seed=inner_seed,
                    dropout_p=inner_dropout,
                )
            if "w1" in asked:
                entered = saved.ffn_input if cast or s.norm_first else saved.middle
                gradients["w1"] = _product(transposed(dpre), entered, w1.dtype)
            if not wanted.projected(s):
                return finish()
            weight = saved.w_1 if saved.w_1.numel() else w1
            if s.norm_first:
                dnormed = torch.mm(dpre, weight)
            else:
                # Not earlier: without dropout and casts, doutput is the same tensor, which this overwrites.
                dmiddle = _add_product(dmiddle, dpre, weight)
        elif not s.norm_first:
            _, dmiddle, sums = residual.first_stage(dout, None, saved.middle, None, w.gamma2, mean2, rstd2, None, 0.0)
            vectors.append((("", "gamma2", "" if w.beta2 is None else "beta2"), sums))
            if not wanted.projected(s):
                return finish()
        stream, projected = select(x, rows), saved.projected if count else None
        bo = "" if w.bo is None else "bo"
        if s.norm_first:
            of_norm: tuple[Any, Any, Any] = (None, None, None) if dnormed is None else (w.gamma2, mean2, rstd2)
            dprojected, dx, sums = residual.first_stage(
                dnormed, projected, stream, w.bo, *of_norm, output_seed, output_dropout, dmiddle, dtype
            )
            vectors.append(
                ((bo, *(("", "") if dnormed is None else ("gamma2", "" if w.beta2 is None else "beta2"))), sums)
            )
        else:
            projected = x.new_zeros(stream.shape, dtype=dtype) if projected is None else projected
            dprojected, dx, sums = residual.first_stage(
                dmiddle, projected, stream, w.bo, w.gamma1, mean1, rstd1, output_seed, output_dropout
            )
            vectors.append(((bo, "gamma1", "" if w.beta1 is None else "beta1"), sums))
        dprojected = dprojected if dprojected.ndim > 1 else dx
        width = count * s.head_dim
        if count and "wo" in asked:
            gradients["wo"] = _product(transposed(dprojected), select(saved.context, rows), w.wo.dtype)
        if not wanted.attention(s):
            return finish()
        dx = _scatter(dx, rows, tokens) if wanted.before_attention(s) else none
        if dx is dout:
            dx = dout.clone()
        if not count:
            return finish(dx, *(none.new_empty((batch, 0)) for _ in range(2)))
        dseen = torch.mm(dprojected, saved.w_o if saved.w_o.numel() else w.wo)
        shape = (tokens, count, s.head_dim)
        flat = torch.empty((tokens, 3 * width), dtype=dtype, device=x.device)
        *_, signed, absolute, dbias, dkeys, dqueries = attention.backward(
            Part(_scatter(dseen, rows, tokens), 0, shape),
            *thirds(saved.qkv, shape),
            Part(saved.context, 0, shape),
            lse,
            starts,
            lengths,
            None,
            attention_seed,
            s.max_length,
            s.scale,
            attention_dropout,
            window=s.window,
            into=flat,
            bias=w.position_bias,
            positions=w.positions(),
            real=real,
        )
        by_distance = {"position_bias": dbias, "position_keys": dkeys, "position_queries": dqueries}
        gradients |= {name: gradient for name, gradient in by_distance.items() if gradient is not None}
        if cosines is not None and sines is not None:
            rotary.turn_(flat.view(tokens, 3, *shape[1:]), cosines, sines, back=True)
        taken = saved.attention_input if cast or normed else x
        names, biases = w.projections, w.biases
        if asked.issuperset(names):
            gradients |= zip(names, _equal(_product(transposed(flat), taken, w.wq.dtype), len(names)), strict=True)
        else:
            for name, dpart in zip(names, flat.chunk(len(names), 1), strict=True):
                if name in asked:
                    gradients[name] = _product(transposed(dpart), taken, w.wq.dtype)
        if not asked.isdisjoint(biases):
            gradients |= zip(biases, _equal(flat.sum(0, dtype=torch.float32), len(biases)), strict=True)
        if not wanted.before_attention(s):
            return finish(none, signed, absolute)
        joined = inputs.joined(s)
        weight = saved.w_qkv if joined is None else joined
        if normed:
            _, dx, sums = residual.first_stage(
                torch.mm(flat, weight), None, x, None, w.gamma1, mean1, rstd1, None, 0.0, dtotal=dx
            )
            vectors.append((("", "gamma1", "" if w.beta1 is None else "beta1"), sums))
        else:
            dx = _add_product(dx, flat, weight)
        return finish(dx if wanted.tokens else none, signed, absolute)
