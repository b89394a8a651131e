"""Who looks on while a model computes: hooks on modules, tracers, transforms. Patched layers call few of their
modules, and kernels read raw memory."""

import functools
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

from ticketops.ops import private

#: The attributes in which a module has its hooks.
KINDS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WITH_KWARGS = {"_forward_hooks": "_forward_hooks_with_kwargs", "_forward_pre_hooks": "_forward_pre_hooks_with_kwargs"}

#: What stock layers and embeddings are computed by, as it was when ticketops was imported.
_FUNCTIONS = {
    function: getattr(functional, function)
    for function in (
        *("linear", "layer_norm", "dropout", "embedding", "gelu", "relu", "softmax"),
        "scaled_dot_product_attention",
    )
}


def is_hooked(module: nn.Module) -> bool:
    """True if a module has hooks, forward or backward, or a method of its own in place of its class's.

    Three kinds of hooks do not count. Those with which transformers captures outputs are on every layer and attention
    once any output was asked for, and wait until it is again. FSDP's gather weights, and the FLOP counter's note which
    module runs; they look at no values.

    Args:
        module: itself, not what is inside it.
    """
    if own_method(module):
        return True
    # Most modules have none, and each is asked in every forward pass.
    state = module.__dict__
    hooks = [hook for kind in KINDS if state[kind] for hook in state[kind].values()]
    return not all(map(_is_neutral, hooks))


def minds_packing(module: nn.Module) -> bool:
    """True if a hook on a module, or a method of its own, could tell packed tokens from a padded batch.

    Beside the hooks that `is_hooked` passes over, transformers' for gradient checkpointing could not: it only has a
    module's result require a gradient. It must be called all the same.

    Args:
        module: itself, not what is inside it.
    """
    state = module.__dict__
    hooks = [hook for kind in KINDS for hook in state[kind].values()]
    return bool(own_method(module)) or not all(_is_neutral(hook) or _requires_gradients(hook) for hook in hooks)


def sees_keywords(module: nn.Module) -> bool:
    """True if a module has hooks that get the keyword arguments of its forward.

    Args:
        module: itself, not what is inside it.
    """
    state = module.__dict__
    return any(
        number in state[hooks] and not _is_neutral(state[hooks][number])
        for hooks, numbers in _WITH_KWARGS.items()
        for number in state[numbers]
    )


def own_method(module: nn.Module) -> str | None:
    """Names a method that was put on a module in place of its class's, or None.

    Args:
        module: itself, not what is inside it.
    """
    state = module.__dict__
    if torch.compiler.is_compiling():
        return "forward" if "forward" in state else None
    kind: Any = type(module)
    names = computing_methods(kind)
    return None if state.keys().isdisjoint(names) else next(name for name in names if name in state)


@functools.cache
def computing_methods(kind: Any) -> tuple[str, ...]:
    """The methods by which a class computes: `forward`, and of transformers' classes those that it may call.

    Args:
        kind: of a module.
    """
    names = (name for each in kind.__mro__ if each.__module__.startswith("transformers.") for name in methods_of(each))
    return tuple(dict.fromkeys(("forward", *names)))


def methods_of(kind: type) -> list[str]:
    """The names of a class's own methods, without those that every model of transformers has for other ends.

    Args:
        kind: any class.
    """
    if issubclass(PreTrainedModel, kind):
        return []
    functions = [name for name, value in vars(kind).items() if isinstance(value, FunctionType)]
    return [
        name
        for name in functions
        if name == "forward"
        or not (name.startswith("__") or (issubclass(kind, PreTrainedModel) and hasattr(PreTrainedModel, name)))
    ]


def any_module_is_hooked() -> bool:
    """True if torch's hooks for all modules of the process are in use."""
    kinds = (getattr(torch_module, f"_global{name}", None) or {} for name in KINDS)
    return any(not all(map(_is_neutral, hooks.values())) for hooks in kinds)


def _requires_gradients(hook: object) -> bool:
    """True for the hook of PreTrainedModel.enable_input_require_grads."""
    module, name = getattr(hook, "__module__", None), getattr(hook, "__qualname__", "")
    return module == "transformers.modeling_utils" and name.endswith(".make_inputs_require_grads")


def _is_neutral(hook: object) -> bool:
    """True for transformers' hook that captures outputs, FSDP's own and those of torch's module tracker."""
    module, name = getattr(hook, "__module__", None) or "", getattr(hook, "__qualname__", "")
    captures = module == "transformers.utils.output_capturing" and name.endswith(".output_capturing_hook")
    return captures or module.startswith(("torch.distributed.fsdp.", "torch.utils.module_tracker"))


def transform() -> str | None:
    """Names what follows a forward pass in ways that kernels on raw memory cannot serve, or None."""
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    if torch.compiler.is_exporting():
        return "torch.export"
    if torch.compiler.is_compiling():
        return None
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transform of torch.func"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if private.has_function_modes():
        return "a TorchFunctionMode"
    for name, function in _FUNCTIONS.items():
        if getattr(functional, name) is not function:
            return f"torch.nn.functional.{name} that has been replaced by other code"
    return None
