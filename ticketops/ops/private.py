"""The interfaces of torch and Triton that are not public, all in one place, each with a public way where a version
lacks it. python_tests/ops/test_private.py holds them to the installed versions."""

import inspect
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def _find(path: str) -> Any:
    """An attribute of torch; None where this version has none of that name."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


_dispatch_modes = _find("_C._len_torch_dispatch_stack")
_functorch_active = _find("_C._are_functorch_transforms_active")
_below_autograd = _find("_C._AutoDispatchBelowAutograd")
_raw_stream = _find("_C._cuda_getCurrentRawStream")
_copy_all = _find("_foreach_copy_")
_assert_async = _find("_assert_async")

#: A tensor from a DLPack capsule, which every result of a native kernel is.
from_dlpack = _find("_C._from_dlpack") or torch.from_dlpack


def has_modes() -> bool:
    """True if a dispatch mode follows which ops run; also where torch does not say."""
    return _dispatch_modes is None or _dispatch_modes() > 0


def in_transform() -> bool:
    """True inside torch.func's vmap, grad, jvp and the like; torch's own autograd.Function refuses what it does not
    say here."""
    return _functorch_active is not None and _functorch_active()


def in_forward_ad() -> bool:
    """True if tensors may have tangents, inside torch.autograd.forward_ad.dual_level; also where torch does not say."""
    return getattr(forward_ad, "_current_level", 0) >= 0


def has_tangent(x: Tensor) -> bool:
    """True if forward-mode differentiation follows a tensor."""
    return forward_ad.unpack_dual(x).tangent is not None


def can_dispatch_below_autograd() -> bool:
    """True if `below_autograd` does what it is for."""
    return _below_autograd is not None


def below_autograd() -> AbstractContextManager[Any]:
    """Where ops run their implementation and not their autograd formula."""
    return nullcontext() if _below_autograd is None else _below_autograd()


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies tensors, casting them, in as few launches as torch can.

    Args:
        targets: written.
        sources: of the targets' shapes, any dtypes.
    """
    if _copy_all is not None:
        _copy_all(targets, sources)
        return
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def assert_on_device(condition: Tensor, message: str) -> None:
    """Stops the program where a condition on a GPU does not hold, without waiting for it.

    Args:
        condition: bool scalar.
        message: what to say.
    """
    if _assert_async is not None:
        _assert_async(condition, message)
    elif not bool(condition):
        raise RuntimeError(message)


@cache
def has_onednn_bf16() -> bool:
    """True if oneDNN has bfloat16 products at the speed of the hardware's."""
    supported = _find("ops.mkldnn._is_mkldnn_bf16_supported")
    return supported is not None and supported()


@cache
def has_onednn_linear() -> bool:
    """True if `onednn_linear` and `onednn_linear_add` are there."""
    return _find("ops.mkldnn._linear_pointwise") is not None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias by oneDNN, whatever torch takes for the dtype."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def onednn_linear_add(x: Tensor, total: Tensor, weight: Tensor) -> Tensor:
    """total + x weight^T by oneDNN."""
    return torch.ops.mkldnn._linear_pointwise(x, total, weight, None, "add")


def raw_stream(device: int) -> int:
    """The handle of torch's current stream of a GPU."""
    return torch.cuda.current_stream(device).cuda_stream if _raw_stream is None else _raw_stream(device)


#: What Triton's launcher takes before a kernel's own arguments, in the versions that `launch_compiled` knows: the last
#: four have names of their own in some.
_LAUNCHER = (
    *("self", "gridX", "gridY", "gridZ", "stream", "function"),
    *("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook"),
)


@cache
def knows_launcher() -> bool:
    """True if this version of Triton launches compiled kernels as `launch_compiled` does."""
    try:
        from triton.backends.nvidia.driver import CudaLauncher
    except ImportError:
        return False
    *parameters, rest = inspect.signature(CudaLauncher.__call__).parameters.values()
    names = tuple(parameter.name for parameter in parameters)
    return names in (_LAUNCHER[:6], _LAUNCHER) and rest.kind is inspect.Parameter.VAR_POSITIONAL


def can_launch(compiled: Any) -> bool:
    """True if `launch_compiled` serves a kernel that Triton has compiled; else Triton's own launch must.

    Args:
        compiled: what Triton's own launch of the kernel returned.
    """
    return knows_launcher() and all(hasattr(compiled, name) for name in ("run", "function", "packed_metadata"))


def follows_launches() -> bool:
    """True if a profiler hooks into Triton's own launches, or Triton does not say."""
    import triton

    runtime = getattr(getattr(triton, "knobs", None), "runtime", None)
    hooks = [getattr(runtime, name, None) for name in ("launch_enter_hook", "launch_exit_hook")]
    return any(hook is None or bool(getattr(hook, "calls", True)) for hook in hooks)


def launch_compiled(compiled: Any, programs: int, stream: int, arguments: Sequence[Any]) -> None:
    """Launches a kernel that Triton has compiled, past Triton's look at each argument; see `can_launch`.

    Args:
        compiled: the kernel.
        programs: size of the flat grid.
        stream: see `raw_stream`.
        arguments: all of the kernel's in their order, tensors as addresses.
    """
    compiled.run(programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
