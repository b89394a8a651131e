"""What is used of torch and Triton beside their public interfaces, held to the versions that are installed."""

import importlib.util
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ticketops.ops import private

#: Of `private`, what has a public way instead: each is there in this version, so that nobody takes the slow one unseen.
FOUND = ["_dispatch_modes", "_functorch_active", "_below_autograd", "_copy_all", "_assert_async"]
FOUND += ["_function_modes", "_is_batched", "_saving_hooks", "_keeps_graph", "_unflatten", "_active_ddp"]


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", FOUND)
def test_this_version_of_torch_has(name):
    assert getattr(private, name) is not None


def test_a_constant_result_is_marked_as_torch_marks_it():
    ours, theirs = private.assume_constant_result(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}


def test_modes_transforms_and_tangents_are_seen(monkeypatch):
    x = torch.ones(2)
    assert not private.has_modes()
    with Mode():
        assert private.has_modes()
    seen = []
    torch.func.vmap(lambda x: seen.append(private.in_transform()) or x)(x)
    assert seen == [True]
    assert not private.in_transform()
    assert not private.in_forward_ad()
    with forward_ad.dual_level():
        assert private.in_forward_ad()
        assert private.has_tangent(forward_ad.make_dual(x, x))
        assert not private.has_tangent(x)
    # Where torch does not say, the slow and safe way is taken.
    for name in ("_dispatch_modes", "_functorch_active"):
        monkeypatch.setattr(private, name, None)
    monkeypatch.delattr(forward_ad, "_current_level")
    assert private.has_modes()
    assert not private.in_transform()
    assert private.in_forward_ad()


def test_function_modes_and_batched_gradients_are_seen():
    class FunctionMode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    assert not private.has_function_modes()
    with torch.device("cpu"):
        assert not private.has_function_modes()
    with FunctionMode():
        assert private.has_function_modes()
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(private.is_batched(gradient)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)
    assert seen == [True]
    assert not private.is_batched(x)


def test_modules_that_are_compiled_by_themselves_are_seen():
    module = torch.nn.Linear(2, 2)
    assert not private.is_compiled(module)
    module.compile(backend="eager")
    assert private.is_compiled(module)


def test_hooks_of_what_is_saved_and_kept_graphs_are_seen(monkeypatch):
    assert not private.has_saving_hooks()
    with torch.autograd.graph.save_on_cpu():
        assert private.has_saving_hooks()
    x, seen = torch.ones(2, requires_grad=True), []
    x.register_hook(lambda gradient: seen.append(private.keeps_graph()))
    loss = x.sum()
    loss.backward(retain_graph=True)
    loss.backward()
    assert seen == [True, False]
    for name in ("_saving_hooks", "_keeps_graph"):
        monkeypatch.setattr(private, name, None)
    # What is not known is not relied on.
    assert private.has_saving_hooks()
    assert private.keeps_graph()


@pytest.mark.parametrize("there", [True, False])
def test_copies_and_assertions_have_a_public_way(monkeypatch, there):
    if not there:
        monkeypatch.setattr(private, "_copy_all", None)
        monkeypatch.setattr(private, "_assert_async", None)
    targets = [torch.zeros(3), torch.zeros(2, dtype=torch.float64)]
    private.copy_all(targets, [torch.ones(3, dtype=torch.bfloat16), torch.ones(2)])
    assert [x.tolist() for x in targets] == [[1.0] * 3, [1.0] * 2]
    private.assert_on_device(torch.tensor(True), "wrong")
    with pytest.raises(RuntimeError, match="wrong"):
        private.assert_on_device(torch.tensor(False), "wrong")


@pytest.mark.skipif(not private.has_onednn_linear(), reason="needs oneDNN")
def test_onednns_products_are_what_they_are_called():
    generator = torch.Generator().manual_seed(0)
    x, weight, bias, total = (torch.randn(shape, generator=generator) for shape in ((5, 8), (6, 8), (6,), (5, 6)))
    torch.testing.assert_close(private.onednn_linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    torch.testing.assert_close(private.onednn_linear_add(x, total.clone(), weight), total + x @ weight.t())
    assert isinstance(private.has_onednn_bf16(), bool)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
class TestTriton:
    def test_this_version_launches_compiled_kernels_as_we_do(self):
        from triton.backends.nvidia.driver import CudaLauncher
        from triton.compiler import CompiledKernel
        from triton.runtime.jit import JITFunction

        assert private.knows_launcher()
        names = [*inspect.signature(CudaLauncher.__call__).parameters]
        assert names[1:6] == ["gridX", "gridY", "gridZ", "stream", "function"]
        # Triton itself calls a compiled kernel with the same arguments in the same order.
        own = "".join(inspect.getsource(JITFunction.run).split())
        assert "kernel.run(grid_0,grid_1,grid_2,stream,kernel.function,kernel.packed_metadata,launch_metadata," in own
        assert isinstance(inspect.getattr_static(CompiledKernel, "run"), property)
        source = inspect.getsource(CompiledKernel)
        assert "self.function" in source
        assert "self.packed_metadata" in source

    def test_another_launcher_leaves_launches_to_triton(self, monkeypatch):
        driver = pytest.importorskip("triton.backends.nvidia.driver")

        class Other:
            def __call__(self, stream, gridX, gridY, gridZ, function, *args):
                raise AssertionError("must not be called")

        compiled = SimpleNamespace(run=None, function=None, packed_metadata=None)
        assert private.can_launch(compiled)
        assert not private.can_launch(SimpleNamespace(run=None, function=None))
        monkeypatch.setattr(driver, "CudaLauncher", Other)
        private.knows_launcher.cache_clear()
        try:
            assert not private.can_launch(compiled)
        finally:
            monkeypatch.undo()
            private.knows_launcher.cache_clear()

    def test_hooks_of_profilers_are_seen(self, monkeypatch):
        import triton

        assert not private.follows_launches()
        monkeypatch.setattr(triton.knobs.runtime.launch_exit_hook, "calls", [print])
        assert private.follows_launches()


@pytest.mark.parametrize("known", [True, False])
def test_a_function_is_applied_as_torch_applies_it(monkeypatch, known):
    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, factor, x, y):
            ctx.save_for_backward(x)
            ctx.factor = factor
            return factor * x, y

        @staticmethod
        def backward(ctx, dx, dy):
            assert ctx.saved_tensors[0] is x
            return None, ctx.factor * dx, dy

    if not known:
        monkeypatch.setattr(private, "_function_base", None)
    else:
        # Where torch's own is taken, the test shows nothing.
        assert private._function_base is not None
        monkeypatch.setattr(Scaled, "apply", None)
    x, y = torch.randn(3, requires_grad=True), torch.randn(3)
    out, same = private.apply(Scaled, 2.0, x, y)
    assert torch.equal(out, 2 * x)
    assert torch.equal(same, y)
    out.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def test_nothing_private_is_used_elsewhere():
    is_private = re.compile(r"torch\._\w+|torch\.ops\.mkldnn|packed_metadata|triton\.knobs\.(?!runtime\.interpret)")
    for file in Path(private.__file__).parent.rglob("*.py"):
        found = is_private.findall(file.read_text())
        assert not found or file.name == "private.py", (file, found)
