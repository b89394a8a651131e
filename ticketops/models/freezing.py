"""Keeps pruned weights still: no optimizer of torch.optim moves them, whatever its momentum or weight decay."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ticketops.models.indices import Indices

_MARK = "_ticketops_frozen"
_SAVED = "_ticketops_saved"


@dataclass(frozen=True)
class Frozen:
    """Slices of a parameter that no optimizer may move.

    Attributes:
        dim: the dimension that is divided into groups.
        groups: equal slices along `dim` (heads).
        places: which of them are frozen.
    """

    dim: int
    groups: int
    places: Indices

    def slices(self, tensor: Tensor) -> Tensor:
        """A view of a tensor with its dimension `dim` divided into [groups, size of a group]."""
        return tensor.unflatten(self.dim, (self.groups, -1))


def freeze(parameter: Tensor, frozen: Frozen) -> None:
    """Marks slices of a parameter as frozen, in place of what was marked before.

    Args:
        parameter: the weight or bias.
        frozen: which slices; none lifts the mark.
    """
    if frozen.places:
        _install_hooks()
        setattr(parameter, _MARK, frozen)
    else:
        unfreeze(parameter)


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


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    """Hides wholly frozen parameters from the optimizer and copies the frozen slices of the others, with their
    state."""
    saved = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            frozen: Frozen | None = getattr(parameter, _MARK, None)
            if frozen is None or parameter.grad is None:
                continue
            if len(frozen.places) == frozen.groups:
                parameter.grad = None
                continue
            index, state = frozen.places.on(parameter.device), optimizer.state.get(parameter, {})
            saved += [
                (tensor, frozen, index, frozen.slices(tensor.detach()).index_select(frozen.dim, index))
                for tensor in (parameter, *state.values())
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape
            ]
            if not state:
                # Momentum that this step makes must not begin with the decay of weights at rest: it decays zeros.
                frozen.slices(parameter.detach()).index_fill_(frozen.dim, index, 0)
    setattr(optimizer, _SAVED, saved)


@torch.no_grad()
def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for tensor, frozen, index, copy in getattr(optimizer, _SAVED, ()):
        frozen.slices(tensor).index_copy_(frozen.dim, index, copy)
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
