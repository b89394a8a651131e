"""What may be done around every op: results changed in place, gradients of some inputs only, tensors on other devices,
tracers and transforms. Each is served as by torch's own ops or refused by name."""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from ticketops import ops
from ticketops.errors import InputError, UnsupportedError
from ticketops.ops import Sequences, Weights, embedding, extension, rows
from ticketops.ops.registration import define

try:
    from ticketops.ops.triton_common import INTERPRETED
except ModuleNotFoundError:
    INTERPRETED = False

SEQUENCES = Sequences.from_lengths([5, 8])
TOKENS, CHANNELS, HEADS, DIM, NEURONS = 13, 32, 2, 16, 40
IDS = torch.arange(14).reshape(2, 7) % 9
INDEX = torch.tensor([0, -1, 3, 5, -1])
INVERSE = torch.full((TOKENS,), -1).index_put_((torch.tensor([0, 3, 5]),), torch.tensor([0, 2, 3]))
#: Of float32 results that are held against float64, sums of some ten numbers.
FLOAT = {"rtol": 100 * torch.finfo(torch.float32).eps, "atol": 100 * torch.finfo(torch.float32).eps}
BACKENDS = ["reference", *(["native"] if extension.native is not None else []), *(["triton"] if INTERPRETED else [])]


@dataclass(frozen=True)
class Op:
    """A call of an op.

    Attributes:
        call: takes the floating inputs by name.
        shapes: of these.
        backends: that have it.
        saves_result: the backward pass reads the result, as those of torch's fused attention do.
        plain: made of torch's own ops.
        twice: can be differentiated twice.
    """

    call: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    backends: tuple[str, ...] = ("reference", "native", "triton")
    saves_result: bool = False
    plain: bool = False
    twice: bool = False

    def inputs(self) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(4)
        return {name: torch.randn(shape, generator=generator) for name, shape in self.shapes.items()}


HEAD = torch.tensor([1])
WIDTH = HEADS * DIM
LAYER = {
    "x": (TOKENS, CHANNELS),
    **dict.fromkeys(("wq", "wk", "wv"), (WIDTH, CHANNELS)),
    **dict.fromkeys(("bq", "bk", "bv"), (WIDTH,)),
    "wo": (CHANNELS, WIDTH),
    **dict.fromkeys(("bo", "gamma1", "beta1"), (CHANNELS,)),
    "w1": (NEURONS, CHANNELS),
    "b1": (NEURONS,),
    "w2": (CHANNELS, NEURONS),
    "b2": (CHANNELS,),
    **dict.fromkeys(("gamma2", "beta2"), (CHANNELS,)),
}
BIAS = (HEADS, 2 * SEQUENCES.max_length - 1)
VECTORS = (2 * SEQUENCES.max_length - 1, HEADS, DIM)
BY_DISTANCE = ("position_bias", "position_keys", "position_queries")
NO_FFN = dict.fromkeys(("w1", "b1", "w2", "b2"))


def layer(heads: Tensor | None = None, **options: Any) -> Callable[..., Tensor]:
    def call(x: Tensor, **weights: Tensor) -> Tensor:
        w = Weights(**{**NO_FFN, **dict.fromkeys(BY_DISTANCE), **weights}, heads=heads, neurons=None)
        return ops.encoder_layer(x, w, SEQUENCES, head_dim=DIM, scale=0.25, activation="gelu", **options)

    return call


def project(x: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor, bk: Tensor, bv: Tensor) -> Tensor:
    return torch.cat(ops.project_rows(x, (wq, wk, wv), (bq, bk, bv), HEAD, HEADS), 1)


FFN = {"x": (TOKENS, CHANNELS)} | {name: LAYER[name] for name in NO_FFN}
TABLES = {"word": (9, CHANNELS), "token_type": (9, CHANNELS), "position": (9, CHANNELS)}
NORM = {"gamma": (CHANNELS,), "beta": (CHANNELS,)}
OPS = {
    "attention": Op(
        lambda q, k, v: ops.attention(q, k, v, SEQUENCES),
        dict.fromkeys("qkv", (TOKENS, HEADS, DIM)),
        saves_result=True,
    ),
    "biased attention": Op(
        lambda q, k, v, position_bias: ops.attention(q, k, v, SEQUENCES, position_bias=position_bias),
        dict.fromkeys("qkv", (TOKENS, HEADS, DIM)) | {"position_bias": BIAS},
        saves_result=True,
    ),
    "attention with position vectors": Op(
        lambda q, k, v, position_keys, position_queries: ops.attention(
            q, k, v, SEQUENCES, position_keys=position_keys, position_queries=position_queries
        ),
        dict.fromkeys("qkv", (TOKENS, HEADS, DIM)) | dict.fromkeys(("position_keys", "position_queries"), VECTORS),
        saves_result=True,
    ),
    "ffn": Op(lambda x, w1, b1, w2, b2: ops.ffn(x, w1, b1, w2, b2, SEQUENCES), FFN),
    "gated ffn": Op(
        lambda x, w1, b1, w2, b2: ops.ffn(x, w1, b1, w2, b2, SEQUENCES, gated=True, activation="relu"),
        FFN | {"w1": (2 * NEURONS, CHANNELS), "b1": (2 * NEURONS,)},
    ),
    "masked ffn": Op(
        lambda x, w1, b1, w2, b2, mask: ops.ffn(x, w1, b1, w2, b2, SEQUENCES, neuron_mask=mask * (mask.detach() > 0)),
        FFN | {"mask": (NEURONS,)},
    ),
    "residual_norm": Op(
        lambda x, residual, bias, gamma, beta: ops.residual_norm(x, residual, gamma, beta, bias=bias),
        dict.fromkeys(("x", "residual"), (TOKENS, CHANNELS)) | {"bias": (CHANNELS,)} | NORM,
    ),
    "project_rows": Op(project, {name: LAYER[name] for name in ("x", "wq", "wk", "wv", "bq", "bk", "bv")}, plain=True),
    "project_columns": Op(
        lambda x, wo: ops.project_columns(x, wo, HEAD, HEADS), {"x": (TOKENS, DIM), "wo": (CHANNELS, WIDTH)}, plain=True
    ),
    "move_rows": Op(lambda x: rows.move_rows(x, INDEX, INVERSE), {"x": (TOKENS, CHANNELS)}, ("reference",), twice=True),
    "move_rows back": Op(lambda x: rows.move_rows(x, INVERSE, INDEX), {"x": (5, CHANNELS)}, ("reference",), twice=True),
    "layer": Op(layer(), LAYER, ("native", "triton")),
    "biased layer": Op(layer(), LAYER | {"position_bias": BIAS}, ("native", "triton")),
    "layer with position vectors": Op(layer(), LAYER | dict.fromkeys(BY_DISTANCE[1:], VECTORS), ("native", "triton")),
    "layer of a head": Op(layer(HEAD), LAYER, ("native", "triton")),
    "layer without heads": Op(layer(HEAD[:0]), LAYER, ("native", "triton")),
    "layer without an FFN": Op(
        layer(), {name: shape for name, shape in LAYER.items() if name not in NO_FFN}, ("native", "triton")
    ),
    "layer's first tokens": Op(layer(first_tokens=True), LAYER, ("native", "triton")),
    "embedding": Op(lambda word: embedding.embedding(word, IDS, 3), {"word": TABLES["word"]}, ("native",)),
    "embeddings": Op(
        lambda word, token_type, position, gamma, beta: embedding.embeddings(
            (word, token_type, position), (IDS,) * 3, (None,) * 3, gamma, beta, dropout_p=0.1, eps=1e-5
        ),
        TABLES | NORM,
        ("native",),
    ),
    "layer_norm": Op(
        lambda x, gamma, beta: embedding.layer_norm(x, gamma, beta, 1e-5), {"x": (2, 7, CHANNELS)} | NORM, ("native",)
    ),
    "dropout": Op(lambda x: embedding.dropout(x, 0.3), {"x": (2, 7, CHANNELS)}, ("native",), twice=True),
}
CALLS = [(name, backend) for name, op in OPS.items() for backend in BACKENDS if backend in op.backends]


@pytest.fixture
def op(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Op:
    name, backend = request.param
    monkeypatch.setenv("TICKETOPS_BACKEND", backend)
    return OPS[name]


every_op = pytest.mark.parametrize("op", CALLS, indirect=True, ids=" by ".join)


def gradients(op: Op, wanted: set[str], change: Callable[[Tensor], Tensor] = lambda out: out) -> dict[str, Any]:
    leaves = {name: x.requires_grad_(name in wanted) for name, x in op.inputs().items()}
    torch.manual_seed(6)
    out = change(op.call(**leaves))
    weights = torch.arange(out.numel(), dtype=torch.float32).reshape(out.shape).cos()
    (out * weights).sum().backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


# Results changed in place


def changed(out: Tensor) -> Tensor:
    out.mul_(2)
    out[:, 0] += 1
    out[0].clamp_(-1, 1)
    return out


@every_op
def test_a_result_can_be_changed_in_place_as_torchs_own(op):
    wanted = {*op.shapes}
    expected = gradients(op, wanted, lambda out: changed(out.clone()))
    if op.saves_result:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradients(op, wanted, changed)
        return
    for name, gradient in gradients(op, wanted, changed).items():
        assert (gradient is None) == (expected[name] is None), name
        assert gradient is None or torch.equal(gradient, expected[name]), name


@every_op
def test_a_result_that_is_kept_stays_as_it_was(op):
    inputs = op.inputs()
    torch.manual_seed(6)
    kept = op.call(**inputs)
    copy, part = kept.clone(), kept[0]
    del kept
    for _ in range(5):
        # Results of the same size, of which each would find the memory of the one before free.
        op.call(**inputs).fill_(float("nan"))
    assert torch.equal(part, copy[0])


# Gradients of some inputs


@every_op
def test_only_what_is_wanted_has_a_gradient_and_it_is_the_same(op):
    everything = gradients(op, {*op.shapes})
    for name in op.shapes:
        # Triton's interpreter takes seconds for what shares its choice of gradients with the native kernels.
        for wanted in ({name}, {*op.shapes} - {name})[: 1 if os.environ["TICKETOPS_BACKEND"] == "triton" else 2]:
            if not wanted:
                continue
            found = gradients(op, wanted)
            for other, gradient in found.items():
                assert (gradient is not None) == (other in wanted and everything[other] is not None), (wanted, other)
                if gradient is not None:
                    # One product of q, k and v sums in another order than one of each.
                    bound = 100 * torch.finfo(torch.float32).eps * everything[other].abs().max().clamp_min(1)
                    assert (gradient - everything[other]).abs().max() <= bound, (wanted, other)


#: Products of a layer's backward pass: the inputs of the second linear layer, the first, the output projection, q k v.
#: A gradient of a vector costs the way to it, a weight's one more.
COSTS = [
    ({"gamma2", "beta2", "b2"}, 0),
    ({"w2"}, 1),
    ({"b1"}, 1),
    ({"w1"}, 2),
    ({"gamma1", "bo"}, 2),
    ({"wo"}, 3),
    ({"bq", "bv"}, 3),
    ({"wk"}, 4),
    ({"wq", "wk", "wv"}, 4),
    ({"x"}, 4),
    ({"x", *LAYER}, 8),
]


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
@pytest.mark.parametrize(("wanted", "products"), COSTS, ids=[",".join(sorted(names)) for names, _ in COSTS])
def test_what_is_frozen_costs_a_layer_no_product(backend, wanted, products, monkeypatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", backend)
    leaves = {name: x.requires_grad_(name in wanted) for name, x in OPS["layer"].inputs().items()}
    out = OPS["layer"].call(**leaves)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        out.sum().backward()
    names = ("aten::mm", "aten::addmm", "aten::addmm_", "mkldnn::_linear_pointwise")
    assert sum(event.name in names for event in profile.events()) == products


@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.backends == ("native", "triton")])
@pytest.mark.skipif(extension.native is None, reason="needs the native extension")
def test_what_no_gradient_needs_is_not_kept(name):
    op = OPS[name]

    def kept(wanted: set[str]) -> int:
        sizes = {}

        def note(x: Tensor) -> Tensor:
            sizes[x.data_ptr()] = x.numel()
            return x

        leaves = {name: x.requires_grad_(name in wanted) for name, x in op.inputs().items()}
        own = {x.data_ptr() for x in leaves.values()}
        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            op.call(**leaves)
        return sum(size for address, size in sizes.items() if address not in own)

    assert kept({"beta2"}) < kept({"w1", "wo"} & {*op.shapes}) < kept({*op.shapes})


# Devices and dtypes


@every_op
def test_a_tensor_on_another_device_is_refused_by_name_after_a_good_call(op):
    inputs = op.inputs()
    op.call(**inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        elsewhere = {name: torch.empty(shape, device="cuda") for name, shape in op.shapes.items()}
    if len(op.shapes) == 1:
        # All others are integers that the test keeps on the CPU.
        pytest.skip("has one input")
    # Some ops have other names for what these calls give them.
    called = {"wo": "weight", "position_bias": "bias", "gamma": "weight", "beta": "bias", "mask": "neuron_mask"}
    for name, shape in op.shapes.items():
        for other in (torch.empty(shape, device="meta"), elsewhere[name]):
            with pytest.raises(InputError) as error:
                op.call(**{**inputs, name: other})
            message = str(error.value)
            assert str(other.device) in message
            assert {name, called.get(name, name)} & {*re.findall(r"\w+", message)}, message
    op.call(**inputs)


def test_what_compiled_code_calls_checks_its_tensors_too():
    x = torch.randn(3, 4)
    call = torch.ops.ticketops.residual_norm
    call(x, x, None, x[0], x[0], None, 0.0, 1e-5)
    with pytest.raises(InputError, match=r"residual_norm needs residual as a dense, strided tensor"):
        call(x, x.to_sparse(), None, x[0], x[0], None, 0.0, 1e-5)


@pytest.mark.parametrize("backend", [backend for backend in BACKENDS if backend != "reference"])
def test_a_layer_takes_one_dtype_but_for_its_norms(backend, monkeypatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", backend)
    half = torch.float16 if backend == "triton" else torch.bfloat16
    for name in ("layer", "layer without an FFN", "layer of a head"):
        op = OPS[name]
        inputs = {key: x.to(half) for key, x in op.inputs().items()}
        for key, x in inputs.items():
            if key == "x" or key in ("gamma1", "beta1", "gamma2", "beta2"):
                continue
            with pytest.raises(InputError, match=f"encoder_layer needs {key} in the dtype of its tokens"):
                op.call(**{**inputs, key: x.float()})
        norms = ("gamma1", "beta1", "gamma2", "beta2")
        mixed = {key: (x.float() if key in norms else x.clone()).requires_grad_() for key, x in inputs.items()}
        same = {key: x.clone().requires_grad_() for key, x in inputs.items()}
        for leaves in (mixed, same):
            op.call(**leaves).float().cos().sum().backward()
        for key, x in mixed.items():
            assert (x.grad is None) == (same[key].grad is None), key
            if x.grad is not None:
                assert x.grad.dtype == x.dtype
                # The gradient of bk is zero but for roundings of what bq's is made of. Norms of a wider dtype round
                # what is between them at other places.
                scale = same["bq" if key == "bk" else key].grad.float().abs().max()
                error = (x.grad.float() - same[key].grad.float()).abs().max()
                assert error <= 16 * torch.finfo(half).eps * scale, key


@pytest.mark.skipif(extension.native is None, reason="needs the native extension")
def test_embeddings_take_a_norm_of_another_dtype():
    op = OPS["embeddings"]
    inputs = {key: x if key in NORM else x.bfloat16() for key, x in op.inputs().items()}
    same = {key: x.bfloat16() for key, x in inputs.items()}
    mixed = {key: (same[key].float() if key in NORM else x).requires_grad_() for key, x in inputs.items()}
    same = {key: x.requires_grad_() for key, x in same.items()}
    for leaves in (mixed, same):
        torch.manual_seed(2)
        out = op.call(**leaves)
        assert out.dtype == torch.bfloat16
        out.float().cos().sum().backward()
    for key, x in mixed.items():
        assert x.grad.dtype == x.dtype
        assert torch.equal(x.grad.bfloat16(), same[key].grad), key
    with pytest.raises(InputError, match=r"the token_type table as torch\.bfloat16"):
        op.call(**{**same, "token_type": same["token_type"].float()})


# Tracers and transforms


def transformed(op: Op) -> dict[str, Callable[[], Any]]:
    inputs = op.inputs()
    name = next(iter(inputs))
    x = inputs.pop(name)

    def call(x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return op.call(**{name: x}, **inputs)

    def dual() -> Tensor:
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(call(forward_ad.make_dual(x, torch.ones_like(x)))).tangent

    return {
        "vmap": lambda: torch.func.vmap(call, randomness="same")(x[None])[0],
        "grad": lambda: torch.func.grad(lambda x: call(x).sum())(x),
        "jvp": lambda: torch.func.jvp(call, (x,), (torch.ones_like(x),))[1],
        "forward mode": dual,
        "forward mode without gradients": torch.no_grad()(dual),
    }


@every_op
@pytest.mark.parametrize("how", ["vmap", "grad", "jvp", "forward mode", "forward mode without gradients"])
def test_transforms_are_served_or_refused_by_name(op, how):
    run = transformed(op)[how]
    if not op.plain:
        with pytest.raises(UnsupportedError, match=r"take gradients with backward\(\)"):
            run()
        return
    found = run().double()
    # What is made of torch's own ops follows them, and right: by central differences, or by the op itself.
    inputs = {key: x.double() for key, x in op.inputs().items()}
    name = next(iter(inputs))
    x = inputs.pop(name)
    if how == "vmap":
        torch.testing.assert_close(found, op.call(**{name: x}, **inputs), **FLOAT)
    elif how == "grad":
        leaf = x.requires_grad_()
        op.call(**{name: leaf}, **inputs).sum().backward()
        torch.testing.assert_close(found, leaf.grad, **FLOAT)
    else:
        step = 1e-6
        slope = op.call(**{name: x + step}, **inputs) - op.call(**{name: x - step}, **inputs)
        torch.testing.assert_close(found, slope / (2 * step), **FLOAT)


@every_op
def test_second_derivatives_are_right_or_refused_by_name(op):
    inputs = {key: x.requires_grad_() for key, x in op.inputs().items()}
    torch.manual_seed(1)
    leaves = [*inputs.values()]
    first = torch.autograd.grad(op.call(**inputs).square().sum(), leaves, create_graph=True, allow_unused=True)
    sums = sum(x.square().sum() for x in first if x is not None)
    if not op.twice and not op.plain:
        with pytest.raises(UnsupportedError, match="has no second derivative: take gradients without create_graph"):
            torch.autograd.grad(sums, leaves)
        return
    second = torch.autograd.grad(sums, leaves, allow_unused=True)
    name, x = next(iter(inputs.items()))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    slopes = []
    for step in (1e-2, -1e-2):
        moved = {**inputs, name: (x + step * direction).detach().requires_grad_()}
        torch.manual_seed(1)
        found = torch.autograd.grad(op.call(**moved).square().sum(), [*moved.values()])
        slopes.append(sum(x.double().square().sum() for x in found))
    expected = (slopes[0] - slopes[1]) / 2e-2
    torch.testing.assert_close((second[0] * direction).sum().double(), expected.double(), rtol=1e-2, atol=1e-2)


@every_op
def test_without_values_there_are_shapes(op):
    inputs = op.inputs()
    real = op.call(**inputs)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    fakes = {name: mode.from_tensor(x) for name, x in inputs.items()}
    for within in (True, False):
        if within:
            with mode:
                found = op.call(**fakes)
        else:
            found = op.call(**fakes)
        assert (found.shape, found.dtype, found.device) == (real.shape, real.dtype, real.device)


@every_op
def test_a_traced_and_an_exported_op_give_the_same(op):
    inputs = op.inputs()
    torch.manual_seed(1)
    expected = op.call(**inputs)

    class Module(torch.nn.Module):
        def forward(self, *values: Tensor) -> Tensor:
            return op.call(**dict(zip(inputs, values, strict=True)))

    given = tuple(inputs.values())
    for traced in (torch.jit.trace(Module(), given, check_trace=False), torch.export.export(Module(), given).module()):
        torch.manual_seed(1)
        torch.testing.assert_close(traced(*given), expected)


def test_where_torch_lacks_what_is_private_ops_are_registered_publicly(monkeypatch):
    monkeypatch.setattr("ticketops.ops.private._below_autograd", None)
    double = define(
        "test_public_double(Tensor x) -> Tensor",
        lambda x: 2 * x,
        torch.empty_like,
        lambda ctx, dout: 2 * dout,
        lambda ctx, inputs, output: None,
    )
    monkeypatch.setattr("ticketops.ops.private._dispatch_modes", None)
    x = torch.ones(3, requires_grad=True)
    double(x).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))
