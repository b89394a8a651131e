"""Freezing of slices of parameters: no optimizer of torch.optim changes them, whatever its momentum or weight decay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import Parameter
from torch.optim import LBFGS
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ticketops.errors import UnsupportedError
from ticketops.models.indices import Indices
from ticketops.ops.copies import Saved, Slices, scatter

_MARK = "_ticketops_frozen"
_FROZEN_SLICES = "_ticketops_frozen_slices"


@dataclass(frozen=True)
class Frozen:
    """Slices of a parameter that no optimizer may change.

    Attributes:
        dim: dimension that is divided into groups.
        groups: number of equal slices along `dim`, e.g. heads.
        places: indices of the frozen ones.
    """

    dim: int
    groups: int
    places: Indices

    def slices(self, tensor: Tensor) -> Slices:
        """Returns the frozen slices of the parameter, or of a tensor of its shape."""
        return Slices(tensor, self.dim, self.groups, self.places.on(tensor.device))


def freeze(parameter: Tensor, frozen: Frozen) -> None:
    """Marks slices of a parameter as frozen; replaces an earlier mark.

    Args:
        parameter: weight or bias.
        frozen: slices to freeze; if there are none, the mark is removed.
    """
    if frozen.places:
        _install_hooks()
        setattr(parameter, _MARK, frozen)
    else:
        unfreeze(parameter)


def unfreeze(parameter: Tensor) -> None:
    """Removes the mark of `freeze`.

    Args:
        parameter: weight or bias.
    """
    if hasattr(parameter, _MARK):
        delattr(parameter, _MARK)


def is_frozen_as(parameter: Tensor, frozen: Frozen) -> bool:
    """Returns True if exactly this mark is on a parameter and effective in this process.

    Args:
        parameter: weight or bias.
        frozen: slices of the mark; if there are none, True means that the parameter has no mark.
    """
    return getattr(parameter, _MARK, None) is (frozen if frozen.places else None) and (_installed or not frozen.places)


def trainable_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Returns gradients in which those of frozen slices are zeros.

    Args:
        parameters: weights and biases, each with a gradient.

    Returns:
        The gradient tensors themselves; for parameters with frozen slices, copies with zeros in these.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    frozen = []
    for place, parameter in enumerate(parameters):
        mark: Frozen | None = getattr(parameter, _MARK, None)
        if mark is not None:
            gradients[place] = gradients[place].clone()
            frozen.append(mark.slices(gradients[place]))
    scatter(frozen, [each.tensor.new_zeros(each.shape) for each in frozen])
    return gradients


class FrozenSlices:
    """The frozen slices of an optimizer's parameters and states, and a copy of them that is reused from step to step.

    Args:
        parts: parameters and state tensors, each with its frozen slices.

    Attributes:
        stepping: True from `save` to `restore`, during a step.
    """

    def __init__(self, parts: list[tuple[Tensor, Frozen]]) -> None:
        self._parts = parts
        # Only the optimizer writes its state, so its copy stays valid. Parameters are written by others too, e.g.
        # through `parameter.data`, and must be copied at each step.
        parameters, state = (
            [frozen.slices(tensor) for tensor, frozen in parts if tensor.requires_grad == wanted]
            for wanted in (True, False)
        )
        self._saved = Saved(parameters, lasting=state)
        self.stepping = False

    def holds(self, parts: list[tuple[Tensor, Frozen]]) -> bool:
        """Returns True if the object was made for these tensors and frozen slices."""
        pairs = zip(parts, self._parts, strict=False)
        return len(parts) == len(self._parts) and all(x is y and a is b for (x, a), (y, b) in pairs)

    def save(self) -> None:
        """Copies the frozen slices before a step."""
        self._saved.save()
        self.stepping = True

    def restore(self) -> None:
        """Writes the copies back after a step."""
        if self.stepping:
            self._saved.restore()
            self.stepping = False


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Saves the frozen slices before a step. If the step has a closure that computes gradients, saves them after each
    call of the closure."""
    # If the last step raised an error, its slices have not been restored yet.
    _after_step(optimizer, args, kwargs)
    # args[0] is the optimizer.
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _put_aside(optimizer)
        return None

    def then_put_aside() -> Any:
        loss = closure()
        _put_aside(optimizer)
        return loss

    if len(args) > 1:
        return (args[0], then_put_aside, *args[2:]), kwargs
    return args, {**kwargs, "closure": then_put_aside}


def _put_aside(optimizer: Optimizer) -> None:
    """Hides completely frozen parameters from the optimizer; saves the frozen slices of the others and of their
    state."""
    parts: list[tuple[Tensor, Frozen]] = []
    fresh = []
    # LBFGS changes parameters without a gradient too, along its history.
    moves_all = isinstance(optimizer, LBFGS)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            frozen: Frozen | None = getattr(parameter, _MARK, None)
            if frozen is None or (parameter.grad is None and not moves_all):
                continue
            if type(parameter) is not Parameter:
                raise UnsupportedError(
                    f"what a ticket prunes of a {type(parameter).__name__} cannot be kept from an optimizer: shrink "
                    "the model to the ticket before it is sharded"
                )
            if len(frozen.places) == frozen.groups:
                parameter.grad = None
                if not moves_all:
                    continue
            state = optimizer.state.get(parameter, {})
            parts += [
                (tensor, frozen)
                for tensor in (parameter, *state.values())
                if isinstance(tensor, Tensor) and tensor.shape == parameter.shape
            ]
            if not state:
                fresh.append(frozen.slices(parameter))
    slices: FrozenSlices | None = getattr(optimizer, _FROZEN_SLICES, None)
    if slices is not None and slices.stepping:
        # The closure is called again within one step, and the weights have changed since: keep the first copy.
        return
    if slices is None or not slices.holds(parts):
        slices = FrozenSlices(parts)
        setattr(optimizer, _FROZEN_SLICES, slices)
    slices.save()
    # A state that this step creates must not contain the weight decay of frozen weights, so they are zeros during the
    # step.
    scatter(fresh, [each.tensor.new_zeros(each.shape) for each in fresh])


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    slices: FrozenSlices | None = getattr(optimizer, _FROZEN_SLICES, None)
    if slices is not None:
        slices.restore()


_installed = False


def _install_hooks() -> None:
    """Installs hooks for all optimizers, because a ticket may be applied before or after an optimizer is created."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True
