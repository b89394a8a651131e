"""What `pytest bench` measures: the ops of ticketops and what stock transformers computes in their place, on the same
values, with the least work that each takes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, gelu, layer_norm, linear, scaled_dot_product_attention
from transformers import BertConfig, BertForSequenceClassification
from transformers.models.bert.modeling_bert import BertLayer

from bench import step
from bench.gpu.measure import Work, gate
from ticketops import ops
from ticketops.ops import Sequences, Weights, backends
from ticketops.ops.products import product

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
#: The name of ticketops' kernels among the contenders: the backend that serves this device.
OURS = backends.choose("attention", DEVICE, torch.float32)[0]
DROPOUT, EPS = 0.1, 1e-12


@dataclass(frozen=True)
class Shape:
    """Sizes of a batch and of a model.

    Attributes:
        lengths: tokens of each row.
        channels: C.
        heads: H.
        neurons: N of the FFN.
        layers: of the whole model.
    """

    lengths: tuple[int, ...]
    channels: int
    heads: int
    neurons: int
    layers: int

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

    def config(self, attention: str = "sdpa", p: float = DROPOUT) -> BertConfig:
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
        packed: each computes it by another library from packed tokens.
        work: least work of each pass, in operations and in elements that memory is read and written for.
        unchecked: places of arguments whose gradient is 0 but for rounding.
    """

    shape: Shape
    tokens: list[Tensor]
    weights: list[Tensor]
    ours: Bind
    stock: dict[str, Bind]
    work: dict[str, tuple[float, float]]
    unchecked: frozenset[int] = field(default_factory=frozenset)
    packed: dict[str, Bind] = field(default_factory=dict)

    def names(self, dtype: torch.dtype) -> list[str]:
        """The contenders of a dtype; libraries for packed tokens take half precision alone."""
        return [OURS, *self.stock, *(self.packed if dtype.itemsize == 2 else ())]

    def runs(self, dtype: torch.dtype, kind: str) -> dict[str, Callable[[], object]]:
        """Returns what to time by contender, with dropout where the contender has it.

        Args:
            dtype: of all tensors.
            kind: one of PASSES.
        """
        return {name: self._run(name, dtype, kind) for name in self.names(dtype)}

    def _is_packed(self, name: str) -> bool:
        return name == OURS or name in self.packed

    def _bound(self, name: str, dtype: torch.dtype, p: float) -> tuple[Callable[[], Tensor], list[Tensor], Tensor]:
        layout = (lambda x: x) if self._is_packed(name) else self.shape.padded
        # The result has the shape of the first argument.
        generator = torch.Generator().manual_seed(1)
        gradient = torch.randn(self.tokens[0].shape, generator=generator, dtype=torch.float64).to(DEVICE)
        values = [*map(layout, self.tokens), *self.weights]
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in values]
        bind = {OURS: self.ours, **self.stock, **self.packed}[name]
        return bind(leaves, p), leaves, layout(gradient).to(dtype)

    def _run(self, name: str, dtype: torch.dtype, kind: str) -> Callable[[], object]:
        call, leaves, gradient = self._bound(name, dtype, DROPOUT)
        if kind == "forward":
            return torch.no_grad()(call)
        return lambda: torch.autograd.grad(call(), leaves, gradient)

    def verdicts(self, dtype: torch.dtype) -> dict[str, str]:
        """Compares each contender, without dropout, with plain PyTorch in float64, as `bench.gpu.measure.gate` does.
        Rivals may round more coarsely."""

        def results(name: str, dtype: torch.dtype) -> list[Tensor]:
            call, leaves, gradient = self._bound(name, dtype, 0.0)
            out = call()
            found = [out, *torch.autograd.grad(out, leaves, gradient)]
            if not self._is_packed(name):
                per_token = 1 + len(self.tokens)
                found = [x[self.shape.real.flatten()] for x in found[:per_token]] + found[per_token:]
            return [x for place, x in enumerate(found) if place - 1 not in self.unchecked]

        exact, same = results("eager", torch.float64), results("eager", dtype)
        return {
            name: gate(results(name, dtype), same, exact, terms=1.0, slack=1.0 if name == OURS else 10.0)
            for name in self.names(dtype)
        }


#: Rivals under torch.compile -> its mode. CUDA graphs are a GPU's.
MODES = {name: mode for name, mode in step.COMPILED.items() if mode is None or DEVICE.type == "cuda"}


def with_compiled(name: str, problem: Problem) -> Problem:
    """Adds rivals under torch.compile to a problem: the best of transformers, and to attention FlexAttention.

    Args:
        name: key of the problem in OPS.
        problem: of that name.
    """

    def compiled(leaves: list[Tensor], p: float, mode: str | None) -> Callable[[], Tensor]:
        bind = problem.stock.get("sdpa", problem.stock["eager"])
        return torch.compile(bind(leaves, p), mode=mode)

    more: dict[str, Bind] = {mode: partial(compiled, mode=MODES[mode]) for mode in MODES}
    if name == "attention":
        # On a CPU it has no backward pass.
        more = {"flex": partial(flex, problem.shape)} if DEVICE.type == "cuda" else {}
    return replace(problem, stock={**problem.stock, **more})


def _normal(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Random values; matrices are scaled as weights are."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    return [(draw(shape) * (shape[1] ** -0.5 if len(shape) == 2 else 1)).to(DEVICE) for shape in shapes]


def attention(shape: Shape) -> Problem:
    """Attention, with dropout, of q, k and v."""
    heads, head_dim = shape.heads, shape.channels // shape.heads
    rows, width = shape.real.shape
    mask = shape.real[:, None, None]

    def padded(leaves: list[Tensor]) -> list[Tensor]:
        return [x.view(rows, width, heads, head_dim).transpose(1, 2) for x in leaves]

    def flat(context: Tensor) -> Tensor:
        return context.transpose(1, 2).reshape(rows * width, heads, head_dim)

    def ours(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        return lambda: ops.attention(*leaves, shape.sequences, dropout_p=p)

    def sdpa(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        return lambda: flat(scaled_dot_product_attention(*padded(leaves), attn_mask=mask, dropout_p=p))

    def eager(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        def call() -> Tensor:
            q, k, v = padded(leaves)
            scores = (q @ k.transpose(2, 3) * head_dim**-0.5).masked_fill(~mask, torch.finfo(q.dtype).min)
            return flat(dropout(scores.softmax(-1, dtype=_wide(q.dtype)).to(q.dtype), p) @ v)

        return call

    size, products = shape.tokens * shape.channels, 2 * shape.pairs * shape.channels
    work = {"forward": (2 * products, 4 * size), "forward+backward": (7 * products, 12 * size)}
    values = _normal(*[(shape.tokens, heads, head_dim)] * 3)
    there = [name for name, home in _HOMES.items() if DEVICE.type == "cuda" and find_spec(home)]
    packed: dict[str, Bind] = {name: partial(_PACKED[name], shape) for name in there}
    return Problem(shape, values, [], ours, {"sdpa": sdpa, "eager": eager}, work, packed=packed)


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
    lengths = torch.tensor(shape.lengths, device=DEVICE)
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


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def ffn(shape: Shape) -> Problem:
    """Two linear layers with GELU between them."""

    def ours(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        return lambda: ops.ffn(*leaves, shape.sequences)

    def eager(leaves: list[Tensor], p: float) -> Callable[[], Tensor]:
        x, w1, b1, w2, b2 = leaves
        return lambda: linear(gelu(linear(x, w1, b1)), w2, b2)

    tokens, channels, neurons = shape.tokens, shape.channels, shape.neurons
    products, size, matrices = 2 * tokens * channels * neurons, tokens * channels, 2 * channels * neurons
    work = {
        "forward": (2 * products, 2 * size + matrices),
        "forward+backward": (6 * products, 5 * size + 3 * matrices),
    }
    x, *weights = _normal((tokens, channels), (neurons, channels), (neurons,), (channels, neurons), (channels,))
    return Problem(shape, [x], weights, ours, {"eager": eager}, work)


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
    work = {"forward": (0.0, 3 * size), "forward+backward": (0.0, 8 * size)}
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
        "forward": (operations, 2 * size + shape.weights),
        "forward+backward": (3 * operations, 5 * size + 3 * shape.weights),
    }
    square, vector = (channels, channels), (channels,)
    x, *weights = _normal(
        *((tokens, channels), *[square] * 3, *[vector] * 3, square, *[vector] * 3),
        *((neurons, channels), (neurons,), (channels, neurons), *[vector] * 3),
    )
    # The bias of the keys adds the same to all scores of a query.
    rivals: dict[str, Bind] = {name: partial(stock, attention=name) for name in ("sdpa", "eager")}
    return Problem(
        shape, [x], weights, ours, rivals, work, frozenset([1 + _PARAMETERS.index("attention.self.key.bias")])
    )


OPS = {"attention": attention, "ffn": ffn, "residual": residual, "encoder": encoder}
#: The contenders of a step by their names in bench.step.
STEPS = {OURS: "full", f"{OURS}-importance": "importance", "sdpa": "sdpa"}


class Step:
    """A training step of a model (forward, backward, AdamW), and the model's inference as its forward pass.

    Args:
        shape: of the first batch and of the model, whose weights are random.
        batches: lengths of the rows of each batch.
        folder: where to keep the model.
        dtype: "fp32" or "bf16" (autocast).
        compiles: True adds rivals under torch.compile.
    """

    def __init__(
        self, shape: Shape, batches: Sequence[tuple[int, ...]], folder: Path, dtype: str, compiles: bool
    ) -> None:
        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        model = BertForSequenceClassification(shape.config())
        model.save_pretrained(folder)
        drawn = [self._batch(lengths) for lengths in batches]
        self._setup = step.Setup("random tokens", str(folder), model.config, drawn, dtype, earlier=drawn)
        named = {**STEPS, **(dict(zip(MODES, MODES, strict=True)) if compiles else {})}
        self._contenders = {name: step.contender(self._setup, each) for name, each in named.items()}

    def _batch(self, lengths: tuple[int, ...]) -> step.Batch:
        real = Shape(lengths, *[0] * 4).real
        ids = torch.randint(1, 1000, real.shape, device=DEVICE) * real
        return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.arange(len(real), device=DEVICE) % 2}

    def runs(self, kind: str) -> dict[str, Callable[[], object]]:
        """Returns what to time by contender.

        Args:
            kind: one of PASSES.
        """

        def run(each: step.Contender) -> Callable[[], object]:
            batches = cycle(self._setup.batches)
            each.model.train(kind != "forward")
            if kind != "forward":
                return lambda: each.step(next(batches))

            def forward() -> object:
                with torch.inference_mode(), self._autocast():
                    return each.forward(**next(batches))

            return forward

        # Importance is recorded in backward passes.
        return {
            name: run(each) for name, each in self._contenders.items() if kind != "forward" or each.name != "importance"
        }

    def _autocast(self) -> torch.autocast:
        return torch.autocast(DEVICE.type, torch.bfloat16, enabled=self.dtype == "bf16")

    def verdicts(self) -> dict[str, str]:
        """Compares logits and the gradients of the weights, without dropout, with the stock model in float64."""

        def results(
            model: torch.nn.Module, call: Callable[..., Any] | None = None, autocast: bool = True
        ) -> list[Tensor]:
            model.eval()
            model.zero_grad()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast and self.dtype == "bf16"):
                out = (model if call is None else call)(**self._setup.batches[0])
            out.loss.backward()
            gradients = [p.grad.clone() for p in model.parameters() if p.ndim == 2 and p.grad is not None]
            model.zero_grad()
            return [out.logits.detach(), *gradients]

        stock = BertForSequenceClassification.from_pretrained(self._setup.model, attn_implementation="sdpa").to(DEVICE)
        same, exact = results(stock), results(stock.double(), autocast=False)
        return {name: gate(results(each.model, each.forward), same, exact) for name, each in self._contenders.items()}

    @property
    def work(self) -> dict[str, tuple[float, float]]:
        """As a Problem's. Behind the last attention only first tokens are read; AdamW reads parameters, gradients and
        two moments and writes all but the gradients."""
        s = self.shape
        rows, square = len(s.lengths), s.channels**2
        whole = 2 * s.tokens * s.weights + 4 * s.channels * s.pairs
        last = 2 * s.tokens * 2 * square + 2 * rows * (s.weights - 2 * square) + 4 * s.channels * s.tokens
        operations = (s.layers - 1) * whole + last
        parameters = sum(p.numel() for p in self._contenders[OURS].model.parameters())
        return {"forward": (operations, s.layers * s.weights), "forward+backward": (3 * operations, 7 * parameters)}


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
