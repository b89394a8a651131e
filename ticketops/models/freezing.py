"""Keeps pruned weights still: no optimizer of torch.optim moves them, whatever its momentum or weight decay."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

_MARK = "_ticketops_frozen"
_SAVED = "_ticketops_saved"


def freeze(parameter: Tensor, dim: int, groups: int, frozen: list[int]) -> None:
    """Marks slices of a parameter as frozen, in place of what was marked before.

    Args:
        parameter: the weight or bias.
        dim: the dimension that is divided into groups.
        groups: equal slices along `dim` (heads).
        frozen: which of them are frozen; none lifts the mark.
    """
    if not frozen:
        unfreeze(parameter)
    else:
        _install_hooks()
        setattr(parameter, _MARK, (dim, groups, torch.tensor(frozen), len(frozen) == groups))


def unfreeze(parameter: Tensor) -> None:
    """Lifts the mark of `freeze`.

    Args:
        parameter: the weight or bias.
    """
    if hasattr(parameter, _MARK):
        delattr(parameter, _MARK)


def is_frozen(parameter: Tensor) -> bool:
    """Tells whether any of a parameter is held still, in this process.

    Args:
        parameter: the weight or bias.
    """
    return _installed and hasattr(parameter, _MARK)


def _slices(tensor: Tensor, dim: int, groups: int) -> Tensor:
    """A view of `tensor` with its dimension `dim` divided into [groups, size of a group]."""
    return tensor.unflatten(dim, (groups, -1))


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hides wholly frozen parameters from the optimizer and copies the frozen slices of the others, with their
    state."""
    saved = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            mark = getattr(parameter, _MARK, None)
            if mark is None or parameter.grad is None:
                continue
            dim, groups, frozen, whole = mark
            if whole:
                parameter.grad = None
                continue
            frozen = frozen.to(parameter.device)
            saved += [
                (tensor, dim, groups, frozen, _slices(tensor.detach(), dim, groups).index_select(dim, frozen))
                for tensor in (parameter, *optimizer.state.get(parameter, {}).values())
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape
            ]
    setattr(optimizer, _SAVED, saved)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for tensor, dim, groups, frozen, copy in getattr(optimizer, _SAVED, ()):
        _slices(tensor, dim, groups).index_copy_(dim, frozen, copy)
    setattr(optimizer, _SAVED, [])


_installed = False


def _install_hooks() -> None:
    """Global hooks, since a ticket may be applied before or after any optimizer is made; unmarked parameters cost a
    look-up."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True
