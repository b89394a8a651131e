"""All uses of private interfaces of torch and Triton. Each falls back to public ones if the installed version lacks it.
python_tests/ops/test_private.py checks them against the installed versions."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _find(path: str) -> Any:
    """Looks up an attribute of torch by its dotted path; None if this version has none of that name."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_dispatch_modes = _find("_C._len_torch_dispatch_stack")
_functorch_active = _find("_C._are_functorch_transforms_active")
_is_batched = _find("_C._functorch.is_legacy_batchedtensor")
_function_modes = _find("overrides._get_current_function_mode_stack")
_below_autograd = _find("_C._AutoDispatchBelowAutograd")
_raw_stream = _find("_C._cuda_getCurrentRawStream")
_copy_all = _find("_foreach_copy_")
_zero_all = _find("_foreach_zero_")
_assert_async = _find("_assert_async")
_saving_hooks = _find("_C._autograd._top_saved_tensors_default_hooks")
_unflatten = _find("_C._nn.unflatten_dense_tensors")
_function_base = _find("_C._FunctionBase.apply")
_active_ddp = _find("nn.parallel.DistributedDataParallel._get_active_ddp_module")
_keeps_graph = _find("_C._autograd._get_current_graph_task_keep_graph")

#: Makes a tensor from a DLPack capsule, as every result of a native kernel is one.
from_dlpack = _find("_C._from_dlpack") or torch.from_dlpack


def assume_constant_result(function: Callable[..., Any]) -> Callable[..., Any]:
    """Marks a function as `torch.compiler.assume_constant_result` does, which imports the whole compiler: 150 MB and a
    second of every process, most of which compile nothing."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def has_modes() -> bool:
    """True if a TorchDispatchMode is active, or if this version of torch does not tell."""
    return _dispatch_modes is None or _dispatch_modes() > 0


def has_function_modes() -> bool:
    """True if a TorchFunctionMode is active, which may replace what any function of torch computes. `torch.device` as a
    context is one that does not. False if this version of torch does not tell."""
    return _function_modes is not None and any(type(mode).__name__ != "DeviceContext" for mode in _function_modes())


def is_batched(x: Tensor) -> bool:
    """True if a tensor stands for several, as gradients do under `torch.autograd.grad(is_grads_batched=True)`. False if
    this version of torch does not tell; then kernels refuse it, since it has no memory."""
    return _is_batched is not None and _is_batched(x)


def in_transform() -> bool:
    """True inside a transform of torch.func (vmap, grad, jvp, ...). False if this version of torch does not tell; then
    autograd.Function itself refuses the transforms that it does not support."""
    return _functorch_active is not None and _functorch_active()


def in_forward_ad() -> bool:
    """True inside torch.autograd.forward_ad.dual_level, where tensors may have tangents; also true if this version of
    torch does not tell."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_tangent(x: Tensor) -> bool:
    """True if a tensor has a tangent of forward-mode differentiation."""
    return forward_ad.unpack_dual(x).tangent is not None


def has_saving_hooks() -> bool:
    """True if somebody's hooks get what autograd saves, as those of checkpointing do; also if this version of torch
    does not tell."""
    return _saving_hooks is None or _saving_hooks(True) is not None


def keeps_graph() -> bool:
    """True inside a backward pass that another one of the same graph may follow (retain_graph=True), or if this version
    of torch does not tell."""
    return _keeps_graph is None or bool(_keeps_graph())


def is_compiled(module: torch.nn.Module) -> bool:
    """True if `module.compile()` has been called. False if this version of torch does not tell."""
    return getattr(module, "_compiled_call_impl", None) is not None


def in_distributed_forward() -> bool:
    """True inside the forward pass of a DistributedDataParallel module. False if this version of torch does not
    tell."""
    return _active_ddp is not None and _active_ddp() is not None


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """Does what `function.apply` does, without its loop over the arguments, which takes as long as all else for many of
    them. It unwraps tensors that are left over from a transform of torch.func, so kernels refuse these here.

    Args:
        function: without a `setup_context` of its own.
        arguments: of its forward.
    """
    if _function_base is None or _functorch_active is None or _functorch_active():
        return function.apply(*arguments)
    base: Any = super(torch.autograd.Function, function)
    return base.apply(*arguments)


def can_dispatch_below_autograd() -> bool:
    """True if `below_autograd` has an effect in this version of torch."""
    return _below_autograd is not None


def below_autograd() -> AbstractContextManager[Any]:
    """Returns a context in which a dispatched op runs its implementation, not its autograd formula."""
    return nullcontext() if _below_autograd is None else _below_autograd()


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors, with casts, in as few launches as torch can.

    Args:
        targets: tensors to write to.
        sources: tensors of the targets' shapes and any dtypes.
    """
    if _copy_all is not None:
        _copy_all(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def zero_all(targets: Sequence[Tensor]) -> None:
    """Fills tensors with zeros, in as few launches as torch can.

    Args:
        targets: tensors to write to.
    """
    if _zero_all is not None:
        _zero_all(targets)
        return
    for target in targets:
        target.zero_()


def unflatten(flat: Tensor, like: Sequence[Tensor]) -> Sequence[Tensor]:
    """Returns parts of a tensor, one behind the other.

    Args:
        flat: [total].
        like: tensors of the parts' shapes.
    """
    if _unflatten is not None:
        return _unflatten(flat, list(like))
    parts = flat.split([x.numel() for x in like])
    return [part.view(x.shape) for part, x in zip(parts, like, strict=True)]


def assert_on_device(condition: Tensor, message: str) -> None:
    """Asserts a condition on the GPU, without waiting for the device. If it is False, the program stops.

    Args:
        condition: bool scalar.
        message: text of the error.
    """
    if _assert_async is not None:
        _assert_async(condition, message)
    elif not bool(condition):
        raise RuntimeError(message)


@cache
def has_onednn_bf16() -> bool:
    """True if torch says that oneDNN has fast bfloat16 products on this processor."""
    supported = _find("ops.mkldnn._is_mkldnn_bf16_supported")
    return supported is not None and supported()


@cache
def has_onednn_linear() -> bool:
    """True if this version of torch supports `onednn_linear` and `onednn_linear_add`."""
    return _find("ops.mkldnn._linear_pointwise") is not None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x weight^T + bias with oneDNN, also for dtypes that torch would give to another library."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_linear_add(x: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """Computes total + x weight^T with oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, total, weight, None, "add")


def raw_stream(device: int) -> int:
    """Returns the CUDA handle of torch's current stream on a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(device)


#: Parameters of Triton's launcher in front of the kernel's own arguments, in the versions that `launch_compiled`
#: supports. Some versions name all ten, others the first six and take the rest as positional arguments.
_LAUNCHER = (
    *("self", "gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"),
)


@cache
def knows_launcher() -> bool:
    """True if the launcher of this version of Triton has the signature that `launch_compiled` relies on."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher
    except ImportError:
        return False
    *parameters, rest = inspect.signature(CudaLauncher.__call__).parameters.values()
    names = tuple(parameter.name for parameter in parameters)
    return names in (_LAUNCHER[:6], _LAUNCHER) and rest.kind is inspect.Parameter.VAR_POSITIONAL


def can_launch(compiled: Any) -> bool:
    """True if `launch_compiled` can launch a compiled kernel. Otherwise use Triton's own launch.

    Args:
        compiled: the compiled kernel, as Triton's own launch returned it.
    """
    return knows_launcher() and all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))


def follows_launches() -> bool:
    """True if a profiler has installed Triton's launch hooks, or if this version of Triton does not tell."""
    runtime = _triton_runtime()
    enter, leave = getattr(runtime, "launch_enter_hook", None), getattr(runtime, "launch_exit_hook", None)
    return enter is None or leave is None or bool(getattr(enter, "calls", True) or getattr(leave, "calls", True))


@cache
def _triton_runtime() -> Any:
    import triton

    return getattr(getattr(triton, "knobs", None), "runtime", None)


def launch_compiled(compiled: Any, programs: int, stream: int, arguments: Sequence[Any]) -> None:
    """Launches a compiled kernel directly, without the inspection of every argument in Triton's own launch. Requires
    `can_launch`.

    Args:
        compiled: the compiled kernel.
        programs: number of programs in the flat grid.
        stream: CUDA handle of the stream, see `raw_stream`.
        arguments: all arguments of the kernel in order, tensors as addresses.
    """
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
