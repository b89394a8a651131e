"""Keeps pruned weights still: no optimizer of torch.optim moves them, whatever its momentum or weight decay."""

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
    """Slices of a parameter that no optimizer may move.

    Attributes:
        dim: the dimension that is divided into groups.
        groups: equal slices along `dim` (heads).
        places: which of them are frozen.
    """

    dim: int
    groups: int
    places: Indices

    def slices(self, tensor: Tensor) -> Slices:
        """The frozen slices of the parameter, or of a tensor of its shape."""
        return Slices(tensor, self.dim, self.groups, self.places.on(tensor.device))


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


def is_frozen_as(parameter: Tensor, frozen: Frozen) -> bool:
    """True if a parameter has the mark of these slices, in this process.

    Args:
        parameter: the weight or bias.
        frozen: which slices; none is no mark.
    """
    return getattr(parameter, _MARK, None) is (frozen if frozen.places else None) and (_installed or not frozen.places)


def trainable_gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of what an optimizer may move.

    Args:
        parameters: weights and biases, each with a gradient.

    Returns:
        Their gradients: the very tensors, or where slices are frozen copies with zeros in these.
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
    """What an optimizer's steps must leave alone, and its copy, which stays from step to step.

    Args:
        parts: parameters and their state, each with which of its slices are frozen.

    Attributes:
        stepping: a step has begun.
    """

    def __init__(self, parts: list[tuple[Tensor, Frozen]]) -> None:
        self._parts = parts
        # The state is the optimizer's alone. A parameter is written to in many ways, `parameter.data` among them.
        parameters, state = (
            [frozen.slices(tensor) for tensor, frozen in parts if tensor.requires_grad == wanted]
            for wanted in (True, False)
        )
        self._saved = Saved(parameters, lasting=state)
        self.stepping = False

    def holds(self, parts: list[tuple[Tensor, Frozen]]) -> bool:
        """Whether it was made for these."""
        pairs = zip(parts, self._parts, strict=False)
        return len(parts) == len(self._parts) and all(x is y and a is b for (x, a), (y, b) in pairs)

    def save(self) -> None:
        """Copies what a step is to leave alone."""
        self._saved.save()
        self.stepping = True

    def restore(self) -> None:
        """Undoes what a step has done since `save`."""
        if self.stepping:
            self._saved.restore()
            self.stepping = False


def _before_step(optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
    """Has what is frozen put aside: now, or where the step is given a closure that makes the gradients, behind it."""
    # A step that was cut short has not put back what rests; the next one does.
    _after_step(optimizer, args, kwargs)
    # The optimizer itself comes first.
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
    """Hides wholly frozen parameters from the optimizer and copies the frozen slices of the others, with their
    state."""
    parts: list[tuple[Tensor, Frozen]] = []
    fresh = []
    # It moves along its history what has no gradient any more.
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
        # A closure that is called again in one step finds weights that have moved already.
        return
    if slices is None or not slices.holds(parts):
        slices = FrozenSlices(parts)
        setattr(optimizer, _FROZEN_SLICES, slices)
    slices.save()
    # Momentum that this step makes must not begin with the decay of weights at rest: it decays zeros.
    scatter(fresh, [each.tensor.new_zeros(each.shape) for each in fresh])


def _after_step(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    slices: FrozenSlices | None = getattr(optimizer, _FROZEN_SLICES, None)
    if slices is not None:
        slices.restore()


_installed = False


def _install_hooks() -> None:
    """Global hooks, since a ticket may be applied before or after any optimizer is made; unmarked parameters cost a
    look-up."""
    global _installed
    if not _installed:
        register_optimizer_step_pre_hook(_before_step)
        register_optimizer_step_post_hook(_after_step)
        _installed = True
