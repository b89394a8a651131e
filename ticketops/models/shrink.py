"""Physical removal of pruned structures: rows and columns of weights, and whole sublayers."""

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

    The remaining structures keep their indices: tickets and importances of a shrunk model have the architecture's
        shape.
    The model runs in stock transformers code. It can be patched, trained, saved and shrunk further; its
    `save_pretrained` folders load with `AutoModel` if ticketops is imported. Parameters stay the same objects, with
    smaller data. The biases of a removed FFN are removed, and no parameter or module of size 0 remains.

    Args:
        model: stock or patched model, or an object that contains one and that `patch` accepts. A ticket that is applied
            to a patched model stays applied.
        ticket: structures to keep, in the architecture's shape. Structures that are already removed are ignored.
        optimizer: optimizer of the model; its state (moments) and the gradients are cut too.

    Returns:
        `model`.

    Raises:
        InputError: the ticket is for another number of layers, heads or neurons.
        UnsupportedError: ticketops does not support the model, or the optimizer's state cannot be cut.
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
    # Copied, because other models may use the same configuration object.
    config = copy.deepcopy(base.config)
    write_record(config, left)
    noted = applied_ticket(config)
    if noted is not None and left & noted == left:
        # The model was saved with this ticket applied. Now the ticket prunes nothing that it still has.
        delattr(config, APPLIED)
    replace_config(inner, base.config, config)
    if handle is not None:
        handle.set_present(left)
        handle.restrict(applied)
    return model


@torch.no_grad()
def put_back(shrunk: PreTrainedModel, whole: PreTrainedModel) -> None:
    """Copies the weights of a shrunk model back into a whole model, in place.

    Args:
        shrunk: shrunk model of the same architecture as `whole`.
        whole: stock or patched model; structures that `shrunk` lacks keep their weights.
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
    """Cuts a new encoder of full shape to the shapes in its configuration's record.

    Args:
        encoder: new encoder of a stock class, on any device.
        config: configuration with a record.

    Raises:
        InputError: the record is damaged.
    """
    adapter = next(adapter for adapter in ADAPTERS if isinstance(encoder, (adapter.base, *adapter.swaps)))
    # In from_pretrained the default device is "meta", on which masks would have no values.
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
        # transformers initialises nn.Linear, not RemovedLinear.
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    # Files of earlier versions have tensors of size 0 under these names, about which transformers would warn.
    ignored = [rf"{re.escape(name)}\.(weight|bias)$" for name, _ in removed]
    setattr(encoder, _IGNORED, {*(getattr(encoder, _IGNORED, None) or ()), *ignored})


def cut_indices(model: nn.Module, held: Ticket, left: Ticket) -> dict[str, tuple[int, Tensor]]:
    """Finds the slices of a model's parameters that remain when the model is shrunk.

    Args:
        model: transformers model with the structures of `held`, or already shrunk to `left`; or an object that contains
            one.
        held: structures before shrinking.
        left: structures after shrinking, a subset of `held`.

    Returns:
        Parameter name -> (dimension, indices along it) for each parameter that shrinking changes; the indices are empty
        if the parameter is removed.
    """
    adapter, base = find_adapter(transformers_model(model))
    names = {id(child): f"{name}.{key}" for name, module in model.named_modules() for key, child in _children(module)}
    none = torch.empty(0, dtype=torch.int64)
    cuts = _cuts(adapter, adapter.encoder(base), base.config, held, left)
    return {f"{names[id(linear)]}.{name}": (dim, none if kept is None else kept) for linear, name, dim, kept in cuts}


Cut = tuple[nn.Linear, str, int, Tensor | None]


def _cuts(adapter: Adapter, encoder: Any, config: Any, held: Ticket, left: Ticket) -> Iterator[Cut]:
    """Yields the parameters to cut: (linear layer, name of the parameter, dimension, indices to keep or None to
    remove)."""
    dim, neurons, (of_attention, of_first, of_last) = head_dim(config), num_neurons(config), adapter.biases(config)
    masks = (held.head_mask, left.head_mask, kept_neurons(held, neurons), kept_neurons(left, neurons))
    for layer, heads, left_heads, neurons_of, left_neurons in zip(getattr(encoder, adapter.stack), *masks, strict=True):
        parts: LayerParts = adapter.parts(layer)
        if not torch.equal(heads, left_heads):
            kept = left_heads[heads].repeat_interleave(dim).nonzero().flatten()
            rows = _repeated(kept, dim * int(heads.sum()), parts.repeats[0]) if len(kept) else None
            for linear in (*parts.qkv, *parts.positions):
                yield linear, "weight", 0, rows
                if of_attention:
                    yield linear, "bias", 0, rows
            yield parts.output, "weight", 1, kept if len(kept) else None
        if not torch.equal(neurons_of, left_neurons):
            kept = left_neurons[neurons_of].nonzero().flatten()
            rows = _repeated(kept, int(neurons_of.sum()), parts.repeats[1]) if len(kept) else None
            for linear in parts.first:
                yield linear, "weight", 0, rows
                if of_first:
                    yield linear, "bias", 0, rows
            yield parts.fc2, "weight", 1, kept if len(kept) else None
            # A removed FFN has no output bias either.
            if of_last and rows is None:
                yield parts.fc2, "bias", 0, None


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields (name, submodule), including each RemovedLinear, which is a plain attribute."""
    yield from module.named_children()
    yield from ((name, value) for name, value in vars(module).items() if isinstance(value, RemovedLinear))


def _repeated(kept: Tensor, structures: int, times: int) -> Tensor:
    """Repeats the indices for a matrix that consists of several blocks of `structures` rows."""
    return kept if times == 1 else torch.cat([kept + turn * structures for turn in range(times)])


def _states(optimizer: Optimizer, cuts: list[Cut]) -> dict[int, dict[str, Any]]:
    """Returns the optimizer's state of each parameter to cut by the parameter's id. Raises if a state cannot be cut."""
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
    """Cuts parameters, gradients and optimizer states. Returns the ids of removed parameters."""
    gone = set()
    # Slices to copy, and for each a function that stores the copy: all copies of a model are made in one call.
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
    for layer, mask in zip(getattr(encoder, adapter.stack), left.head_mask, strict=True):
        heads = mask.nonzero().flatten().tolist()
        adapter.resize(layer, heads)
        drop_removed(layer)
        if not heads:
            _attend_without_heads(layer)
    return gone


def _attend_without_heads(layer: nn.Module) -> None:
    """Replaces the attention function of a layer without heads. Fused functions divide by the number of heads, and
    quantizers fail on products of size 0."""
    for module in layer.modules():
        config: Any = getattr(module, "config", None)
        if isinstance(config, PretrainedConfig):
            config = copy.copy(config)
            config._attn_implementation = _NO_HEADS
            module.config = config


def _attention_of_no_heads(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """Attention function in transformers' interface for [B, 0, S, D]; returns contexts [B, S, 0, D] and weights
    [B, 0, S, S]."""
    return query.transpose(1, 2), query.new_empty(*query.shape[:3], key.shape[2])


_IGNORED = "_keys_to_ignore_on_load_unexpected"
_NO_HEADS = "ticketops_no_heads"
AttentionInterface.register(_NO_HEADS, _attention_of_no_heads)
