"""Rewinding: resets a model's weights to earlier values, such as the pre-trained ones, and keeps its ticket."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ticketops.errors import InputError
from ticketops.models.containers import AnyModel, transformers_model
from ticketops.models.record import held_ticket
from ticketops.models.registry import find_adapter
from ticketops.models.shrink import cut_indices
from ticketops.ops.copies import Slices, gather
from ticketops.tickets import Ticket


def rewind(model: AnyModel, weights: Mapping[str, Tensor]) -> AnyModel:
    """Copies earlier weights into a model, in place; on a GPU in one launch.

    A ticket that is applied to a patched model stays applied. For a shrunk model, the rows and columns that it still
    has are taken from the whole model's weights. Parameters stay the same objects, so optimizers can continue; their
    state is not reset.

    Args:
        model: stock, patched or shrunk model, or an object that contains one and that `patch` accepts.
        weights: name in the state_dict of `model`, of the model inside or of its bare model -> tensor of the whole
            model's shape, of any floating dtype, preferably on the model's device. Other weights, such as a task head,
            are not changed.

    Returns:
        `model`.

    Raises:
        InputError: a name is unknown, a tensor has another shape, or the tensors are the model's own weights, as in a
            state_dict that was not copied.
        UnsupportedError: ticketops does not support the model.

    Source: arXiv 2105.12002, section 3: a ticket starts again from the pre-trained weights.
    """
    slices, targets = _copies(model, weights)
    with torch.no_grad():
        gather(slices, targets)
    return model


def check_weights(model: Any, weights: Mapping[str, Tensor]) -> None:
    """Refuses what `rewind` would refuse, and changes nothing.

    Args:
        model: see `rewind`.
        weights: see `rewind`.

    Raises:
        InputError, UnsupportedError: see `rewind`.
    """
    _copies(model, weights)


def _copies(model: Any, weights: Mapping[str, Tensor]) -> tuple[list[Slices], list[Tensor]]:
    """Returns what to copy of the weights, and the model's tensors to copy it to."""
    inner = transformers_model(model)
    _, base = find_adapter(inner)
    held = held_ticket(base.config)
    modules: nn.Module = model
    places = cut_indices(modules, Ticket.full(held.num_layers, held.num_heads), held)
    state = modules.state_dict(keep_vars=True)
    inside = next(f"{name}." if name else "" for name, module in modules.named_modules() if module is inner)
    prefixes = "", inside, f"{inside}{inner.base_model_prefix}."
    slices: list[Slices] = []
    targets: list[Tensor] = []
    indices: dict[tuple[int, torch.device], Tensor] = {}
    for saved, value in weights.items():
        names = [prefix + saved for prefix in prefixes]
        name = next((name for name in names if name in state or name in places), saved)
        target = state.get(name)
        dim, kept = places.get(name, (0, None))
        if target is None and kept is not None:
            # Removed with its FFN.
            continue
        shape = None if target is None else list(target.shape)
        if target is None or list(value.shape) != _whole(shape, dim, value, kept):
            known = "no such weights" if target is None else f"{shape} of it"
            raise InputError(
                f"cannot rewind {saved!r} to {list(value.shape)}: this {type(model).__name__} has {known}; pass the "
                "state_dict of the whole model"
            )
        value = value.detach().to(target.device, target.dtype)
        if kept is None and not value.ndim:
            value, target = value[None], target[None]
        # A parameter that was not cut is copied as one slice.
        groups = 1 if kept is None else value.shape[dim]
        key = id(kept), target.device
        if key not in indices:
            indices[key] = (torch.zeros(1, dtype=torch.int64) if kept is None else kept).to(target.device)
        slices.append(Slices(value, dim, groups, indices[key]))
        targets.append(target)
    pairs = [(each.tensor, target) for each, target in zip(slices, targets, strict=True) if target.numel()]
    if pairs and all(value.data_ptr() == target.data_ptr() for value, target in pairs):
        raise InputError(
            "the weights to rewind to are the model's own and have changed along with it: before training, take "
            "copy.deepcopy(model.state_dict())"
        )
    return slices, targets


def _whole(shape: list[int] | None, dim: int, value: Tensor, kept: Tensor | None) -> list[int] | None:
    """Returns the shape that a tensor of the whole model must have; `shape` is that of the model's parameter."""
    if shape is None or kept is None:
        return shape
    fits = dim < value.ndim and (not len(kept) or value.shape[dim] > int(kept.max()))
    return [*shape[:dim], value.shape[dim] if fits else -1, *shape[dim + 1 :]]
