"""Whether anybody looks at what a module does: patched layers compute without calling most of their modules."""

from collections.abc import Collection

from torch import nn


def is_hooked(module: nn.Module, known: Collection[int] = ()) -> bool:
    """Whether a module has hooks, forward or backward.

    Those with which transformers captures outputs do not count: they are on every attention once any output was asked
    for, and wait for what a patched model refuses or hands out by itself.

    Args:
        module: itself, not what is inside it.
        known: ids of hooks that do not count either.
    """
    # Most modules have none, and each is asked in every forward pass.
    if not (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks):
        return False
    kinds = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(
        key not in known and not str(getattr(hook, "__module__", "")).startswith("transformers.")
        for hooks in kinds
        for key, hook in hooks.items()
    )
