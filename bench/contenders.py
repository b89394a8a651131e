"""What `pytest bench` measures: the ops of ticketops, its training steps, and what others compute in their place, on
the same values, with the least work that each takes."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import dropout, gelu, layer_norm, linear, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import AutoConfig, BertConfig, PretrainedConfig
from transformers.models.bert.modeling_bert import BertLayer

from bench import sharing, shrunk, step
from ticketops import ops
from ticketops.ops import Sequences, Weights, backends
from ticketops.ops.products import product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
BACKEND = backends.choose("attention", DEVICE, torch.float32)[0]
OURS = "ticketops"
IMPORTANCE, GRAPHS = f"{OURS}, importance", f"{OURS}, graphs"
#: ticketops under torch.compile(mode="reduce-overhead"), with tokens padded to a multiple of a bucket.
BUCKET = f"{OURS}, reduce-overhead"
HALF_MASKED, HALF_KEPT = f"{OURS}, half the heads masked", f"{OURS}, half the heads kept"
ONE_TICKET = f"{OURS}, one ticket for all tasks"
EPS = 1e-12


class Work(NamedTuple):
    """The least work of a part of a computation, and a machine's rates of both.

    Attributes:
        operations: floating-point operations.
        elements: elements, or bytes, that memory is read and written for.
    """

    operations: float
    elements: float


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch and of a model.

    Attributes:
        lengths: tokens of each row.
        channels: C.
        heads: H.
        neurons: N of the FFN.
        layers: of the whole model.
        dropout: probability of every dropout.
    """

    lengths: tuple[int, ...]
    channels: int
    heads: int
    neurons: int
    layers: int
    dropout: float = 0.1

    @property
    def tokens(self) -> int:
        """T, tokens without padding."""
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Attention weights of one head."""
        return sum(n * n for n in self.lengths)

    @property
    def weights(self) -> int:
        """Elements of a layer's matrices."""
        return 4 * self.channels**2 + 2 * self.channels * self.neurons

    @cached_property
    def real(self) -> Tensor:
        """bool [B, S], True for real tokens of the padded batch."""
        lengths = torch.tensor(self.lengths, device=DEVICE)
        return torch.arange(max(self.lengths), device=DEVICE) < lengths[:, None]

    @cached_property
    def sequences(self) -> Sequences:
        packed = Sequences.from_lengths(list(self.lengths))
        return Sequences(packed.starts.to(DEVICE), packed.lengths.to(DEVICE), packed.max_length)

    def padded(self, x: Tensor) -> Tensor:
        """Puts packed tokens [T, ..] into padded rows [B * S, ..]."""
        out = x.new_zeros((self.real.numel(), *x.shape[1:]))
        out[self.real.flatten()] = x
        return out

    def config(self, attention: str = "sdpa", p: float | None = None) -> BertConfig:
        p = self.dropout if p is None else p
        return BertConfig(
            hidden_size=self.channels,
            num_attention_heads=self.heads,
            intermediate_size=self.neurons,
            num_hidden_layers=self.layers,
            hidden_dropout_prob=p,
            attention_probs_dropout_prob=p,
            layer_norm_eps=EPS,
            attn_implementation=attention,
        )


class Rounded(TorchDispatchMode):
    """Rounds what every operation of float64 returns as if it were of another dtype, and sums by the size of their
    terms, with random errors: where terms of both signs cancel, a result errs as its terms do, however small it is.

    Args:
        dtype: whose roundings to make; sums are of float32 at least, as products of half precision are.
    """

    _aten = torch.ops.aten
    _SUMS = (_aten.mm, _aten.addmm, _aten.bmm, _aten.sum)

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._eps, self._eps_of_sums = (torch.finfo(each).eps for each in (dtype, _wide(dtype)))
        self._generator = torch.Generator(DEVICE).manual_seed(0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket is self._aten._softmax_backward_data:
            # Two terms whose sum over a row is 0; kernels know the second from the attention's output.
            gradient, weights, dim, _ = args
            products = gradient * weights
            return self._rounded(products - weights * self._rounded(products.sum(dim, keepdim=True)))
        out = func(*args, **(kwargs or {}))
        if any(result.alias_info for result in func._schema.returns):
            return out
        if func.overloadpacket in self._SUMS:
            sizes = func(*(x.abs() if isinstance(x, Tensor) else x for x in args), **(kwargs or {}))
            out = out + self._eps_of_sums * sizes * self._noise(sizes)
        return tree_map_only(Tensor, self._rounded, out)

    def _noise(self, x: Tensor) -> Tensor:
        return 2 * torch.rand(x.shape, generator=self._generator, dtype=x.dtype, device=x.device) - 1

    def _rounded(self, x: Tensor) -> Tensor:
        return x * (1 + self._eps * self._noise(x)) if x.is_floating_point() else x


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def gate(
    actual: Iterable[Tensor],
    exact: Iterable[Tensor],
    *others: Iterable[Tensor],
    least: float = 0.0,
    slack: float = 1.0,
) -> str:
    """Compares results with float64. The error of the first, the output, may be twice that of plain PyTorch in the same
    dtype; the errors of the others, gradients, three times.

    Args:
        actual: results to check.
        exact: results of plain PyTorch in float64.
        others: results that err as much as these may: those of plain PyTorch in the same dtype first.
        least: size of results of which four roundings are allowed, however small they are.
        slack: factor on all bounds, for code of others that is only to compute the same thing.

    Returns:
        "green", or a description of the first error that is too large.
    """
    for i, (ours, true, *plain) in enumerate(zip(actual, exact, *others, strict=True)):
        error, *allowed = (_largest(x.double() - true) for x in (ours, *plain))
        roundings = 4 * torch.finfo(plain[0].dtype).eps * max(_largest(true), least)
        bound = slack * ((2 if i == 0 else 3) * max(allowed) + roundings)
        if not error <= bound:
            return f"red: result {i} errs by {error:.2e} of {bound:.2e}, plain PyTorch by {allowed[0]:.2e}"
    return "green"


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


#: Takes the leaves and the dropout probability; returns a function that computes the result.
Bind = Callable[[list[Tensor], float], Callable[[], Tensor]]


@dataclass(frozen=True)
class Problem:
    """An op, the ways to compute it, and values to compute it on.

    Attributes:
        shape: of the batch.
        tokens: [T, ..] arguments, float64 and packed.
        weights: the other arguments, float64.
        ours: computes the op by ticketops from packed tokens.
        stock: each computes it by torch or transformers from padded tokens; "eager" is one.
        work: least work of each pass, in phases that follow each other, in operations and in elements.
        dtype: of all tensors.
        packed: each computes it by another library from packed tokens.
        variants: problems of which `ours` takes turns with this one's, by the contender's name.
        unchecked: places of arguments whose gradient is 0 but for rounding.
        sinks: arguments after the weights that are float32 at least.
    """

    shape: Shape
    tokens: list[Tensor]
    weights: list[Tensor]
    ours: Bind
    stock: dict[str, Bind]
    work: dict[str, list[Work]]
    dtype: torch.dtype = torch.float32
    packed: dict[str, Bind] = field(default_factory=dict)
    variants: dict[str, "Problem"] = field(default_factory=dict)
    unchecked: frozenset[int] = field(default_factory=frozenset)
    sinks: list[Tensor] = field(default_factory=list)

    #: Calls in a row that a turn times, and calls before the first turn.
    steps, warmups = 1, 1
    #: On a GPU the kernels are timed, as the host may have gone ahead of them; else the host waits for them.
    kernels = True

    @property
    def element_size(self) -> int:
        """Bytes of an element that memory is read and written for."""
        return self.dtype.itemsize

    def names(self, kind: str) -> list[str]:
        """The contenders; libraries for packed tokens take half precision alone."""
        # Importance is recorded in backward passes.
        variants = [name for name in self.variants if kind != "forward" or name != IMPORTANCE]
        return [OURS, *variants, *self.stock, *(self.packed if self.dtype.itemsize == 2 else ())]

    def _is_packed(self, name: str) -> bool:
        return name == OURS or name in self.packed

    def _bound(self, name: str, dtype: torch.dtype, p: float) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
        layout = (lambda x: x) if self._is_packed(name) else self.shape.padded
        # The result has the shape of the first argument.
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(self.tokens[0].shape, generator=generator, dtype=torch.float64).to(DEVICE)
        values = [x.to(dtype, copy=True) for x in (*map(layout, self.tokens), *self.weights)]
        values += [x.to(_wide(dtype), copy=True) for x in self.sinks]
        leaves = [x.requires_grad_() for x in values]
        bind = {OURS: self.ours, **self.stock, **self.packed}[name]
        return bind(leaves, p), leaves, layout(gradient).to(dtype)

    def run(self, name: str, kind: str) -> Callable[[], object]:
        """Returns what to time, with dropout where the contender has it.

        Args:
            name: of the contender.
            kind: one of PASSES.
        """
        if name in self.variants:
            return self.variants[name].run(OURS, kind)
        call, leaves, gradient = self._bound(name, self.dtype, self.shape.dropout)
        if kind == "forward":
            return torch.no_grad()(call)
        return lambda: torch.autograd.grad(call(), leaves, gradient)

    def _results(self, name: str, dtype: torch.dtype) -> list[Tensor]:
        call, leaves, gradient = self._bound(name, dtype, 0.0)
        out = call()
        found = [out.detach(), *torch.autograd.grad(out, leaves, gradient)]
        if not self._is_packed(name):
            per_token = 1 + len(self.tokens)
            found = [x[self.shape.real.flatten()] for x in found[:per_token]] + found[per_token:]
        return [x for place, x in enumerate(found) if place - 1 not in self.unchecked]

    @cached_property
    def _plain(self) -> list[list[Tensor]]:
        exact = self._results("eager", torch.float64)
        with Rounded(self.dtype):
            rounded = self._results("eager", torch.float64)
        return [exact, self._results("eager", self.dtype), rounded]

    def verdict(self, name: str) -> str:
        """Compares a contender, without dropout, with plain PyTorch in float64, as `gate` does. Rivals may round more
        coarsely."""
        if name in self.variants:
            return self.variants[name].verdict(OURS)
        return gate(self._results(name, self.dtype), *self._plain, least=1.0, slack=1.0 if name == OURS else 10.0)


#: Rivals under torch.compile -> its mode. CUDA graphs are a GPU's.
MODES = {name: mode for name, mode in step.COMPILED.items() if mode is None or DEVICE.type == "cuda"}


def make(name: str, shape: Shape, dtype: torch.dtype, compiles: bool) -> Problem:
    """Makes the problem of an op.

    Args:
        name: key of OPS.
        shape: of the batch.
        dtype: of all tensors.
        compiles: True adds rivals under torch.compile: the best of transformers, and to attention FlexAttention.
    """
    problem = OPS[name](shape)
    stock = dict(problem.stock)

    def compiled(leaves: list[Tensor], p: float, mode: str | None) -> Callable[[], Tensor]:
        return torch.compile(stock.get("sdpa", stock["eager"])(leaves, p), mode=mode)

    more: dict[str, Bind] = {mode: partial(compiled, mode=MODES[mode]) for mode in MODES}
    if name == "attention":
        # On a CPU it has no backward pass.
        more = {"flex": partial(flex, shape)} if DEVICE.type == "cuda" else {}
    variants = {each: replace(variant, dtype=dtype) for each, variant in problem.variants.items()}
    return replace(problem, dtype=dtype, variants=variants, stock=stock | (more if compiles else {}))


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random values; matrices are scaled as weights are."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(shape) * (shape[1] ** -0.5 if len(shape) == 2 else 1)).to(DEVICE) for shape in shapes]


#: Kernels of sdpa by contender; those that refuse a mask or a machine say so.
SDPA = {
    "sdpa math": SDPBackend.MATH,
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
}


def attention(shape: Shape) -> Problem:
    """Attention, with dropout, of q, k and v; also with importance, and with half of the heads: masked, or kept by a
    ticket."""
    plain = _attention(shape)
    sink = torch.zeros((len(shape.lengths), shape.heads), dtype=torch.float64, device=DEVICE)
    half = torch.arange(shape.heads, device=DEVICE) >= shape.heads // 2
    small = replace(shape, heads=shape.heads // 2, channels=shape.channels // shape.heads * (shape.heads // 2))
    variants = {
        IMPORTANCE: _attention(shape, sinks=[sink]),
        HALF_MASKED: _attention(shape, head_mask=half.float()),
        HALF_KEPT: _attention(small),
    }
    backends = {name: partial(plain.stock["sdpa"], backend=SDPA[name]) for name in SDPA if DEVICE.type == "cuda"}
    there = [name for name, home in _HOMES.items() if DEVICE.type == "cuda" and find_spec(home)]
    packed: dict[str, Bind] = {name: partial(_PACKED[name], shape) for name in there}
    return replace(plain, stock={**plain.stock, **backends}, packed=packed, variants=variants)


def _attention(shape: Shape, head_mask: Tensor | None = None, sinks: Sequence[Tensor] = ()) -> Problem:
    heads, head_dim = shape.heads, shape.channels // shape.heads
    rows, width = shape.real.shape
    # As transformers does, none where no row is padded.
    mask = None if shape.real.all() else shape.real[:, None, None]

    def padded(leaves: list[Tensor]) -> list[Tensor]:
        return [x.view(rows, width, heads, head_dim).transpose(1, 2) for x in leaves[:3]]

    def flat(context: Tensor) -> Tensor:
        return context.transpose(1, 2).reshape(rows * width, heads, head_dim)

    def ours(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        q, k, v, *sink = leaves
        options = {"head_mask": head_mask, "importance": sink[0] if sink else None}
        return lambda: ops.attention(q, k, v, shape.sequences, dropout_p=p, **options)

    def sdpa(leaves: list[Tensor], p: float, backend: SDPBackend | None = None) -> Callable[[], Tensor]:
        def call() -> Tensor:
            return flat(scaled_dot_product_attention(*padded(leaves), attn_mask=mask, dropout_p=p))

        return call if backend is None else sdpa_kernel(backend)(call)

    def eager(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            q, k, v = padded(leaves)
            scores = q @ k.transpose(2, 3) * head_dim**-0.5
            if mask is not None:
                scores = scores.masked_fill(~mask, torch.finfo(q.dtype).min)
            context = dropout(scores.softmax(-1, dtype=_wide(q.dtype)).to(q.dtype), p) @ v
            # Importance is the gradient of a factor on the head's output.
            for sink in leaves[3:]:
                context = context * (1 + sink)[:, :, None, None].to(q.dtype)
            return flat(context if head_mask is None else context * head_mask[:, None, None].to(q.dtype))

        return call

    size, products = shape.tokens * shape.channels, 2 * shape.pairs * shape.channels
    work = {"forward": [Work(2 * products, 4 * size)], "forward+backward": [Work(7 * products, 12 * size)]}
    values = _normal(*[(shape.tokens, heads, head_dim)] * 3)
    return Problem(shape, values, [], ours, {"sdpa": sdpa, "eager": eager}, work, sinks=list(sinks))


def flex(shape: Shape, leaves: list[Tensor], p: float, compiled: bool = True) -> Callable[[], Tensor]:
    """Attention by FlexAttention, which has no dropout.

    Args:
        shape: of the batch.
        leaves: padded q, k and v.
        p: ignored.
        compiled: False computes it step by step, for tests.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    rows, width = shape.real.shape
    lengths, mask = torch.tensor(shape.lengths, device=DEVICE), None
    if not shape.real.all():
        mask = create_block_mask(lambda b, h, i, j: j < lengths[b], rows, None, width, width, DEVICE)
    call = torch.compile(flex_attention) if compiled else flex_attention

    def run() -> Tensor:
        q, k, v = (x.view(rows, width, shape.heads, -1).transpose(1, 2) for x in leaves)
        return call(q, k, v, block_mask=mask).transpose(1, 2).reshape(leaves[0].shape)

    return run


def _ends(shape: Shape) -> Tensor:
    return torch.tensor((0, *shape.lengths), device=DEVICE).cumsum(0, dtype=torch.int32)


def varlen(shape: Shape, leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
    """Attention of packed sequences by torch, which has no dropout there."""
    from torch.nn.attention.varlen import varlen_attn

    ends, width = _ends(shape), max(shape.lengths)
    return lambda: varlen_attn(*leaves, ends, ends, width, width)


def flash(shape: Shape, leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
    """Attention of packed sequences by flash-attn."""
    from flash_attn import flash_attn_varlen_func

    ends, width = _ends(shape), max(shape.lengths)
    return lambda: flash_attn_varlen_func(*leaves, ends, ends, width, width, dropout_p=p)


_PACKED = {"varlen": varlen, "flash-attn": flash}
_HOMES = {"varlen": "torch.nn.attention.varlen", "flash-attn": "flash_attn"}


def ffn(shape: Shape) -> Problem:
    """Two linear layers with GELU between them; also with importance."""
    sink = torch.zeros(len(shape.lengths), dtype=torch.float64, device=DEVICE)
    return replace(_ffn(shape), variants={IMPORTANCE: _ffn(shape, sinks=[sink])})


def _ffn(shape: Shape, sinks: Sequence[Tensor] = ()) -> Problem:
    def ours(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        weights, sink = leaves[:5], leaves[5] if sinks else None
        return lambda: ops.ffn(*weights, shape.sequences, importance=sink)

    def eager(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        x, w1, b1, w2, b2, *sink = leaves

        def call() -> Tensor:
            out = linear(gelu(linear(x, w1, b1)), w2, b2)
            for each in sink:
                out = (out.view(*shape.real.shape, -1) * (1 + each)[:, None, None].to(out.dtype)).flatten(0, 1)
            return out

        return call

    tokens, channels, neurons = shape.tokens, shape.channels, shape.neurons
    products, size, matrices = 2 * tokens * channels * neurons, tokens * channels, 2 * channels * neurons
    work = {
        "forward": [Work(2 * products, 2 * size + matrices)],
        "forward+backward": [Work(6 * products, 5 * size + 3 * matrices)],
    }
    x, *weights = _normal((tokens, channels), (neurons, channels), (neurons,), (channels, neurons), (channels,))
    return Problem(shape, [x], weights, ours, {"eager": eager}, work, sinks=list(sinks))


def residual(shape: Shape) -> Problem:
    """Bias, dropout, residual and LayerNorm."""

    def ours(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        x, before, gamma, beta, bias = leaves
        return lambda: ops.residual_norm(x, before, gamma, beta, bias=bias, dropout_p=p, eps=EPS)

    def eager(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        x, before, gamma, beta, bias = leaves
        return lambda: layer_norm(dropout(x + bias, p) + before, gamma.shape, gamma, beta, EPS)

    size = shape.tokens * shape.channels
    *tokens, gamma, beta, bias = _normal(*[(shape.tokens, shape.channels)] * 2, *[(shape.channels,)] * 3)
    work = {"forward": [Work(0.0, 3 * size)], "forward+backward": [Work(0.0, 8 * size)]}
    return Problem(shape, tokens, [gamma, beta, bias], ours, {"eager": eager}, work)


#: The parameters of a BertLayer in the order of ops.Weights.
_PARAMETERS = (
    *(f"attention.self.{name}.{kind}" for kind in ("weight", "bias") for name in ("query", "key", "value")),
    *("attention.output.dense.weight", "attention.output.dense.bias"),
    *("attention.output.LayerNorm.weight", "attention.output.LayerNorm.bias"),
    *("intermediate.dense.weight", "intermediate.dense.bias", "output.dense.weight", "output.dense.bias"),
    *("output.LayerNorm.weight", "output.LayerNorm.bias"),
)


def encoder(shape: Shape) -> Problem:
    """A whole layer of the encoder."""
    head_dim, (rows, width) = shape.channels // shape.heads, shape.real.shape

    def ours(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        x, *parameters = leaves
        # No bias by distance, and all heads and neurons.
        weights = Weights(*parameters, *[None] * (len(Weights._fields) - len(parameters)))
        settings = {"head_dim": head_dim, "scale": head_dim**-0.5, "activation": "gelu", "dropouts": (p, p, p)}
        return lambda: ops.encoder_layer(x, weights, shape.sequences, **settings)

    def stock(leaves: list[Tensor], p: float, attention: str) -> Callable[[], Tensor]:
        x, *weights = leaves
        layer = BertLayer(shape.config(attention, p)).train()
        for name, weight in zip(_PARAMETERS, weights, strict=True):
            module, _, parameter = name.rpartition(".")
            layer.get_submodule(module)._parameters[parameter] = weight
        mask = shape.real[:, None, None].expand(-1, -1, width, -1)
        if attention == "eager":
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, torch.finfo(x.dtype).min)
        return lambda: layer(x.view(rows, width, -1), mask).flatten(0, 1)

    tokens, channels, neurons = shape.tokens, shape.channels, shape.neurons
    operations = 2 * tokens * shape.weights + 4 * shape.pairs * channels
    size = tokens * channels
    work = {
        "forward": [Work(operations, 2 * size + shape.weights)],
        "forward+backward": [Work(3 * operations, 5 * size + 3 * shape.weights)],
    }
    square, vector = (channels, channels), (channels,)
    x, *weights = _normal(
        *((tokens, channels), *[square] * 3, *[vector] * 3, square, *[vector] * 3),
        *((neurons, channels), (neurons,), (channels, neurons), *[vector] * 3),
    )
    # The bias of the keys adds the same to all scores of a query.
    rivals: dict[str, Bind] = {name: partial(stock, attention=name) for name in ("sdpa", "eager")}
    return Problem(
        shape,
        [x],
        weights,
        ours,
        rivals,
        work,
        unchecked=frozenset([1 + _PARAMETERS.index("attention.self.key.bias")]),
    )


OPS = {"attention": attention, "ffn": ffn, "residual": residual, "encoder": encoder}
#: The contenders of a step by their names in bench.step.
STEPS = {OURS: "full", IMPORTANCE: "importance", GRAPHS: "graphs", BUCKET: "bucket", "sdpa": "sdpa"}


class Step:
    """A training step of a model (forward, backward, AdamW), and the model's inference as its forward pass.

    Args:
        config: of the model, whose weights are random.
        batches: lengths of the rows of each batch.
        dtype: "fp32" or "bf16" (autocast).
        compiles: True adds rivals under torch.compile.
        shape: of the first batch and of the model, if it is a BERT, for the least work.
    """

    #: Each shape of a batch comes that often before it is timed, for what is compiled or captured.
    warmups = 3
    kernels = False
    #: AdamW's: parameters stay float32.
    element_size = 4

    def __init__(
        self,
        config: PretrainedConfig,
        batches: Sequence[tuple[int, ...]],
        dtype: str,
        compiles: bool = False,
        shape: Shape | None = None,
    ) -> None:
        self.shape, self.dtype, self._compiles = shape, dtype, compiles
        drawn = [self._batch(lengths) for lengths in batches]
        self._setup = step.Setup("random tokens", "", config, drawn, dtype, earlier=drawn, random_weights=True)
        self._contenders: dict[str, step.Contender] = {}
        # As a Trainer's host goes ahead of a GPU; a CPU computes one after the other anyway.
        self.steps = 2 * len(drawn) if DEVICE.type == "cuda" else 1

    def _batch(self, lengths: tuple[int, ...]) -> step.Batch:
        real = Shape(lengths, *[0] * 4).real
        ids = torch.randint(1, 1000, real.shape, device=DEVICE) * real
        return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.arange(len(real), device=DEVICE) % 2}

    def names(self, kind: str) -> list[str]:
        """The contenders. Importance is recorded in backward passes."""
        names = [OURS, *([] if kind == "forward" else [IMPORTANCE]), "sdpa"]
        names += [GRAPHS] if BACKEND == "triton" else []
        if self._compiles:
            names += [*MODES, *([BUCKET] if DEVICE.type == "cuda" else [])]
        if self._setup.config.model_type == "deberta-v2" and DEVICE.type == "cuda" and find_spec("flashdeberta"):
            names.append(step.FLASH_DEBERTA)
        return names

    def _contender(self, name: str) -> step.Contender:
        if name not in self._contenders:
            self._contenders[name] = step.contender(self._setup, STEPS.get(name, name))
        return self._contenders[name]

    def run(self, name: str, kind: str) -> Callable[[], object]:
        """Returns what to time: a forward pass or a training step of each batch in turn, `steps` of them in a row.

        Args:
            name: of the contender.
            kind: one of PASSES.
        """
        each, batches = self._contender(name), cycle(self._setup.batches)
        each.model.train(kind != "forward")

        def infer(batch: step.Batch) -> None:
            with torch.inference_mode(), self._autocast():
                each.forward(**batch)

        one = infer if kind == "forward" else each.step

        def run() -> None:
            for _ in range(self.steps):
                one(next(batches))

        return run

    def _autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def _results(self, each: step.Contender, autocast: bool = True) -> list[Tensor]:
        each.model.eval()
        each.model.zero_grad()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast and self.dtype == "bf16"):
            out = each.forward(**self._setup.batches[0])
        out.loss.backward()
        gradients = [p.grad for p in each.model.parameters() if p.ndim == 2 and p.grad is not None]
        each.model.zero_grad()
        return [out.logits.detach(), *gradients]

    @cached_property
    def _plain(self) -> list[list[Tensor]]:
        stock = step.contender(self._setup, "sdpa")
        same = self._results(stock)
        stock.model.double()
        return [self._results(stock, autocast=False), same]

    def verdict(self, name: str) -> str:
        """Compares logits and the gradients of the weights, without dropout, with the stock model in float64."""
        return gate(
            self._results(self._contender(name)), *self._plain, slack=10.0 if name == step.FLASH_DEBERTA else 1.0
        )

    @property
    def work(self) -> dict[str, list[Work]]:
        """As a Problem's. Behind the last attention only first tokens are read; AdamW, after all gradients, reads
        parameters, gradients and two moments and writes all but the gradients. Empty for another model than a BERT."""
        if self.shape is None:
            return {}
        s = self.shape
        rows, square = len(s.lengths), s.channels**2
        whole = 2 * s.tokens * s.weights + 4 * s.channels * s.pairs
        last = 2 * s.tokens * 2 * square + 2 * rows * (s.weights - 2 * square) + 4 * s.channels * s.tokens
        operations = (s.layers - 1) * whole + last
        parameters = sum(p.numel() for p in self._contender(OURS).model.parameters())
        return {
            "forward": [Work(operations, s.layers * s.weights)],
            "forward+backward": [Work(3 * operations, 3 * s.layers * s.weights), Work(0.0, 7 * parameters)],
        }


def base_sized(name: str, tiny: bool) -> PretrainedConfig:
    """Returns a configuration of bench.step.BASE_SIZED.

    Args:
        name: its key.
        tiny: True leaves it one small layer.
    """
    kind, sizes = step.BASE_SIZED[name]
    config = AutoConfig.for_model(kind, **sizes)
    if tiny:
        small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        small |= {"head_dim": 16} if hasattr(config, "head_dim") else {}
        config = AutoConfig.for_model(kind, **{**sizes, **small})
    config.pad_token_id = 0
    return config


class Sharing(Step):
    """Steps of four tasks in turn on one encoder: a ticket per task, or one ticket for all. Arguments as a Step's."""

    steps = 4

    def names(self, kind: str) -> list[str]:
        """The contenders."""
        return [OURS, ONE_TICKET]

    def run(self, name: str, kind: str) -> Callable[[], object]:
        """Returns what to time: a training step of each task.

        Args:
            name: of the contender.
            kind: "forward+backward".
        """
        models: Any = {str(task): step.contender(self._setup, "sdpa").model for task in range(Sharing.steps)}
        run = sharing.contender(models, "switching" if name == OURS else "fixed", DTYPES[self.dtype])

        def steps() -> None:
            for task, batch in zip(models, cycle(self._setup.batches), strict=False):
                run(task, batch)

        return steps

    def verdict(self, name: str) -> str:
        """Checks the patched model, as a Step's."""
        return super().verdict(OURS)

    @property
    def work(self) -> dict[str, list[Work]]:
        """Empty: it is that of half a model."""
        return {}


class Shrunk:
    """A model shrunk by shares of its heads and FFNs beside the whole one.

    Args:
        shape: of the batch and of the whole model.
    """

    steps, warmups, kernels, element_size = 1, 1, False, 4
    work: dict[str, list[Work]] = {}  # noqa: RUF012

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        torch.manual_seed(0)
        whole: Any = step.AutoModelForSequenceClassification.from_config(shape.config()).to(DEVICE)
        known = {shrunk.STOCK: "sdpa", shrunk.WHOLE: OURS}
        self._models = {known.get(name, f"{OURS}, {name}"): each for name, each in shrunk.contenders(whole).items()}

    def names(self, kind: str) -> list[str]:
        """The contenders."""
        return list(self._models)

    def run(self, name: str, kind: str) -> Callable[[], object]:
        """Returns what to time: inference or a training step.

        Args:
            name: of the contender.
            kind: one of PASSES.
        """
        model = self._models[name]
        batch = shrunk.make_batch(model, *self.shape.real.shape)
        batch["attention_mask"] = self.shape.real.long()
        return shrunk.runner(model, batch, "inference" if kind == "forward" else "training")

    def verdict(self, name: str) -> str:
        """Compares the outputs with the whole model under the ticket's masks."""
        return shrunk.check(self._models["sdpa"], {name.removeprefix(f"{OURS}, "): self._models[name]})


class Machine:
    """What this machine reaches where nothing else is to do: a product of square matrices, and a copy in memory.

    Args:
        dtype: of the product.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._count, self._side = (1 << 28, 8192) if DEVICE.type == "cuda" else (1 << 24, 1024)
        source, target = torch.randn(self._count, device=DEVICE), torch.empty(self._count, device=DEVICE)
        square = torch.randn(self._side, self._side, device=DEVICE).to(dtype)
        multiply = product if DEVICE.type == "cpu" else torch.mm
        #: What to time.
        self.runs: dict[str, Callable[[], object]] = {
            "product": lambda: multiply(square, square),
            "copy": lambda: target.copy_(source),
        }

    def rates(self, times: dict[str, list[float]]) -> Work:
        """Returns operations and bytes per second; a copy reads and writes.

        Args:
            times: seconds of each turn of `runs`, of which the fastest counts.
        """
        return Work(2 * self._side**3 / min(times["product"]), 2 * 4 * self._count / min(times["copy"]))
