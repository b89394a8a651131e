"""Physical removal of what a ticket prunes: rows, columns and whole sublayers go, and nothing else changes."""

import copy
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel

from ticketops.errors import UnsupportedError
from ticketops.models.adapter import Adapter, LayerParts
from ticketops.models.containers import AnyModel, transformers_model
from ticketops.models.handle import find_handle
from ticketops.models.note import replace_config
from ticketops.models.record import (
    APPLIED,
    applied_ticket,
    head_dim,
    held_ticket,
    kept_neurons,
    num_neurons,
    write_record,
)
from ticketops.models.registry import ADAPTERS, check_supported, find_adapter
from ticketops.models.removed import RemovedLinear, drop_removed, remove_linear
from ticketops.ops.copies import Slices, gather
from ticketops.tickets import Ticket


def shrink(model: AnyModel, ticket: Ticket, *, optimizer: Optimizer | None = None) -> AnyModel:
    """Removes pruned heads, FFNs and neurons from a model's weights, in place.

    What is left keeps its numbers: tickets and importances of a shrunk model have the architecture's shape. The model
    runs in stock transformers code; it can be patched, trained, saved and shrunk further, and `save_pretrained` folders
    of it load with `AutoModel` wherever ticketops is imported. Parameters stay the same objects, with smaller data; the
    biases of a removed FFN are gone. Of sublayers with nothing left no parameter or module of size 0 stays behind.

    Args:
        model: stock or patched, or what `patch` takes with one inside; a ticket applied to a patched one stays applied
            to what is left.
        ticket: what to keep, of the architecture's shape; what is gone already is passed over.
        optimizer: of this model; its state (moments) and gradients are cut along.

    Returns:
        What was given, the model itself.

    Raises:
        InputError: a ticket for another number of layers, heads or neurons.
        UnsupportedError: a model that ticketops does not serve, or an optimizer whose state cannot be cut.
    """
    inner: PreTrainedModel = transformers_model(model)
    adapter, base = find_adapter(inner)
    check_supported(inner)
    held = held_ticket(base.config)
    ticket.check(held.num_layers, held.num_heads, num_neurons(base.config))
    left = held & ticket
    cuts = list(_cuts(adapter, adapter.encoder(base), base.config, held, left))
    state = {} if optimizer is None else _states(optimizer, cuts)
    handle = find_handle(inner)
    applied = None if handle is None else handle.ticket
    if handle is not None:
        handle.restrict(None)
    gone = _cut(adapter, adapter.encoder(base), cuts, left, state)
    if optimizer is not None:
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in gone]
        for parameter in [parameter for parameter in optimizer.state if id(parameter) in gone]:
            del optimizer.state[parameter]
    # Another model may have been made from the same configuration object.
    config = copy.deepcopy(base.config)
    write_record(config, left)
    noted = applied_ticket(config)
    if noted is not None and left & noted == left:
        # A stock model that was saved with this ticket applied; now it is nothing but the ticket.
        delattr(config, APPLIED)
    replace_config(inner, base.config, config)
    if handle is not None:
        handle.set_present(left)
        handle.restrict(applied)
    return model


@torch.no_grad()
def put_back(shrunk: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Copies the weights of a shrunk model to where they were cut from.

    Args:
        shrunk: what `shrink` makes of a model like `whole`.
        whole: stock or patched; what the other one lacks keeps its weights here.
    """
    held, left = (held_ticket(model.base_model.config) for model in (whole, shrunk))
    places, small = cut_indices(whole, held, left), shrunk.state_dict()
    for name, value in whole.state_dict().items():
        if name not in places:
            value.copy_(small[name])
        elif name in small:
            dim, index = places[name]
            value.index_copy_(dim, index.to(value.device), small[name].to(value.device))


def narrow(encoder: nn.Module, config: Any) -> None:
    """Gives a new encoder of full shape the shapes that its configuration records.

    Args:
        encoder: just made by its stock class, on any device.
        config: with a record.

    Raises:
        InputError: the record is damaged.
    """
    adapter = next(adapter for adapter in ADAPTERS if isinstance(encoder, (adapter.base, *adapter.swaps)))
    # from_pretrained makes models with the meta device as default, where masks would have no values.
    with torch.device("cpu"):
        left = held_ticket(config)
        full = Ticket.full(left.num_layers, left.num_heads)
        _cut(adapter, encoder, list(_cuts(adapter, encoder, config, full, left)), left, {})
    removed = [
        (f"{name}.{key}", child)
        for name, module in encoder.named_modules()
        for key, child in _children(module)
        if isinstance(child, RemovedLinear)
    ]
    for _, linear in removed:
        # transformers' initialisation knows linear layers only.
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    # Files of earlier versions hold tensors of size 0 under these names, and transformers would warn of them.
    ignored = [rf"{re.escape(name)}\.(weight|bias)$" for name, _ in removed]
    setattr(encoder, _IGNORED, {*(getattr(encoder, _IGNORED, None) or ()), *ignored})


def cut_indices(model: nn.Module, held: Ticket, left: Ticket) -> dict[str, tuple[int, Tensor]]:
    """Tells where in a model's parameters the structures lie that a ticket leaves.

    Args:
        model: of transformers, or an object with one inside; with the structures of `held`, or of `left`.
        held: what the model has, or had.
        left: a part of it.

    Returns:
        Parameter name -> (dimension, indices along it), for each parameter that shrinking would change; no indices for
        one that would be gone.
    """
    adapter, base = find_adapter(transformers_model(model))
    names = {id(child): f"{name}.{key}" for name, module in model.named_modules() for key, child in _children(module)}
    none = torch.empty(0, dtype=torch.int64)
    cuts = _cuts(adapter, adapter.encoder(base), base.config, held, left)
    return {f"{names[id(linear)]}.{name}": (dim, none if kept is None else kept) for linear, name, dim, kept in cuts}


Cut = tuple[nn.Linear, str, int, Tensor | None]


def _cuts(adapter: Adapter, encoder: Any, config: Any, held: Ticket, left: Ticket) -> Iterator[Cut]:
    """What to do to which parameter: (its linear, its name there, dimension, what to keep of it; None for nothing)."""
    dim, neurons, (around_attention, around_ffn) = head_dim(config), num_neurons(config), adapter.biases(config)
    masks = (held.head_mask, left.head_mask, kept_neurons(held, neurons), kept_neurons(left, neurons))
    for layer, heads, left_heads, there, left_there in zip(getattr(encoder, adapter.stack), *masks, strict=True):
        parts: LayerParts = adapter.parts(layer)
        if not torch.equal(heads, left_heads):
            kept = left_heads[heads].repeat_interleave(dim).nonzero().flatten()
            rows = _repeated(kept, dim * int(heads.sum()), parts.repeats[0]) if len(kept) else None
            for linear in parts.qkv:
                yield linear, "weight", 0, rows
                if around_attention:
                    yield linear, "bias", 0, rows
            yield parts.output, "weight", 1, kept if len(kept) else None
        if not torch.equal(there, left_there):
            kept = left_there[there].nonzero().flatten()
            rows = _repeated(kept, int(there.sum()), parts.repeats[1]) if len(kept) else None
            yield parts.fc1, "weight", 0, rows
            yield parts.fc2, "weight", 1, kept if len(kept) else None
            if around_ffn:
                yield parts.fc1, "bias", 0, rows
                # The bias of the output goes with the FFN.
                if rows is None:
                    yield parts.fc2, "bias", 0, None


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The submodules of a module by name, and what `shrink` left of some."""
    yield from module.named_children()
    yield from ((name, value) for name, value in vars(module).items() if isinstance(value, RemovedLinear))


def _repeated(kept: Tensor, structures: int, times: int) -> Tensor:
    """Indices among structures that come several times, one set behind the other."""
    return kept if times == 1 else torch.cat([kept + turn * structures for turn in range(times)])


def _states(optimizer: Optimizer, cuts: list[Cut]) -> dict[int, dict[str, Any]]:
    """The optimizer's state of each parameter that will be cut, checked before anything is touched."""
    states = {}
    for linear, name, _, kept in cuts:
        parameter = getattr(linear, name)
        state = optimizer.state.get(parameter, {})
        for key, value in state.items():
            if kept is not None and isinstance(value, Tensor) and value.numel() > 1 and value.shape != parameter.shape:
                raise UnsupportedError(
                    f"{type(optimizer).__name__} keeps {key!r} of shape {list(value.shape)} for weights of shape "
                    f"{list(parameter.shape)}, which cannot be cut along: shrink without it and make a new optimizer"
                )
        states[id(parameter)] = state
    return states


@torch.no_grad()
def _cut(adapter: Adapter, encoder: Any, cuts: list[Cut], left: Ticket, states: dict[int, dict[str, Any]]) -> set[int]:
    """Cuts parameters, gradients and states; returns the ids of parameters that are gone."""
    gone = set()
    # What to copy out of which tensor, and where to put it: all copies of a model are made together.
    slices: list[Slices] = []
    places: list[Callable[[Tensor], object]] = []
    indices: dict[tuple[int, torch.device], Tensor] = {}

    def keep(tensor: Tensor, dim: int, kept: Tensor, put: Callable[[Tensor], object]) -> None:
        key = id(kept), tensor.device
        if key not in indices:
            indices[key] = kept.to(tensor.device)
        slices.append(Slices(tensor, dim, tensor.shape[dim], indices[key]))
        places.append(put)

    for linear, name, dim, kept in cuts:
        parameter = getattr(linear, name)
        gradient, parameter.grad = parameter.grad, None
        if kept is None:
            gone.add(id(parameter))
            linear.register_parameter(name, None)
            continue
        keep(parameter.data, dim, kept, partial(setattr, parameter, "data"))
        if gradient is not None:
            keep(gradient, dim, kept, partial(setattr, parameter, "grad"))
        state = states.get(id(parameter), {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                keep(value, dim, kept, partial(state.__setitem__, key))
    for put, copy_ in zip(places, gather(slices), strict=True):
        put(copy_)
    for linear, name, dim, kept in cuts:
        if name == "weight":
            if kept is None:
                remove_linear(linear, dim)
            else:
                linear.out_features, linear.in_features = linear.weight.shape
    for layer, heads in zip(getattr(encoder, adapter.stack), left.head_mask.sum(1).tolist(), strict=True):
        adapter.resize(layer, heads)
        drop_removed(layer)
        if not heads:
            _attend_without_heads(layer)
    return gone


def _attend_without_heads(layer: nn.Module) -> None:
    """Has a layer without heads compute no attention: fused functions divide by their number, and quantizers stumble
    over products of size 0."""
    for module in layer.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config = copy.copy(config)
            config._attn_implementation = _NO_HEADS
            module.config = config


def _attention_of_no_heads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """An attention function of transformers, for [B, 0, S, D]: contexts [B, S, 0, D] and weights [B, 0, S, S]."""
    return query.transpose(1, 2), query.new_empty(*query.shape[:3], key.shape[2])


_IGNORED = "_keys_to_ignore_on_load_unexpected"
_NO_HEADS = "ticketops_no_heads"
AttentionInterface.register(_NO_HEADS, _attention_of_no_heads)
