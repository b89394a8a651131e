"""What happens around a forward pass: whether the ops can compute it, packing on the way in, padding on the way out."""

import inspect
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ticketops.errors import InputError
from ticketops.models.adapter import Adapter, LayerParts
from ticketops.models.collators import PACKED, TOKEN_COUNTS
from ticketops.models.embeddings import SWAPS, counts_no_tokens
from ticketops.models.hooks import (
    any_module_is_hooked,
    computing_methods,
    is_hooked,
    minds_packing,
    own_method,
    sees_keywords,
    transform,
)
from ticketops.models.record import APPLIED
from ticketops.models.state import Call, LayerState
from ticketops.models.swapping import stock_class, unsharded_class
from ticketops.ops import Packing, private
from ticketops.ops.packing import TokenCounts, begins_with_token, check_rows, is_unbroken, on_host, require
from ticketops.ops.products import compute_dtype

if TYPE_CHECKING:
    from ticketops.models.handle import PatchHandle

#: By this argument a task head's hook tells the base model's forward that nothing but first tokens is read.
ONLY_FIRST = "ticketops_only_first"

#: A task head's hook leaves the counts on the mask under this name, since not every head hands arguments on.
_COUNTS = "_ticketops_counts"

#: Arguments of a forward pass that stock layers honour and ticketops' layers do not.
_STOCK_ARGUMENTS = (
    "output_attentions",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "cache",
    "past_key_values",
    "use_cache",
    "is_causal",
)

#: Arguments that tell flash attention where sequences begin that come one behind the other. Other functions pass over
#: them.
_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
_FLASH = ("flash_attention_2", "flash_attention_3")

#: Inputs of a model that have a value, or a vector, for each token.
_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "task_type_ids")

#: Attention functions that compute what ops.attention computes: of each name the function and the one that makes its
#: mask, as they were when ticketops was imported.
_ATTENTIONS = {
    name: (ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name))
    for name in (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
}

#: Classes among the embeddings that treat each token alone, where they have no hooks.
_TOKENWISE = frozenset((nn.Linear, nn.Identity, *SWAPS, *SWAPS.values()))


class TicketModel(nn.Module):
    """The bare model: a forward pass that the ops can compute runs on packed tokens, any other on the stock code."""

    # Its PatchHandle. transformers evaluates annotations when a class is made.
    _ticketops: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the stock model does; hidden states at padding are zeros."""
        handle: PatchHandle = self._ticketops
        if PACKED in kwargs:
            raise InputError(
                f"a batch of PackingCollator reached {type(handle.model).__name__} otherwise than through "
                "model(**batch) of a ...ForSequenceClassification: only these take it; pad the batch for others"
            )
        # What is exported cannot leave its graph to pack.
        enter = _enter_packed if handle.unpad and not torch.compiler.is_exporting() else _enter
        entered = enter(handle, self, args, kwargs)
        if entered is None:
            for name in (ONLY_FIRST, TOKEN_COUNTS):
                kwargs.pop(name, None)
            return super().forward(*args, **kwargs)
        call: Call = entered["ticketops"]
        output = super().forward(**entered)
        if call.packing.indices is not None:
            output = _padded(handle.packs, call, output)
        if call.recorded is not None:
            call.recorded.follow(output[0])
        return output

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        handle: PatchHandle = self._ticketops
        # What is said beside the tensors disturbs no model that loads them, and torch.save keeps it.
        if handle.note.record is not None and hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]][APPLIED] = handle.note.record

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: Any,
        unexpected: Any,
        errors: Any,
    ) -> None:
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        if (record := local_metadata.get(APPLIED)) is not None:
            try:
                self._ticketops.load_note(record)
            except InputError as error:
                errors.append(str(error))


#: What `examine` reads of modules besides their parts and weights: of dropouts, activations, attention and tables.
_SETTINGS = (
    "p",
    "approximate",
    "attention_dropout",
    "is_causal",
    "attention_head_size",
    "head_dim",
    "max_norm",
    "scale_grad_by_freq",
    "act",
    "scaling",
    "attention_type",
    "sparse",
    "padding_idx",
)


class Look(NamedTuple):
    """What stands between a model's modules and the ops.

    Attributes:
        obstacle: why the ops cannot compute the layers, or None.
        watched: somebody has hooks on modules that patched layers call; these must see padded tensors.
        front_packs: what is in front of the layers takes packed tokens, and nobody looks on.
    """

    obstacle: str | None
    watched: bool = False
    front_packs: bool = True


def _enter(handle: "PatchHandle", base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Turns a forward pass's arguments into those of the packed one.

    Args:
        handle: the model's.
        base: the bare model; a copy of the handle's where a wrapper runs replicas of it.
        args, kwargs: of its forward.

    Returns:
        Keyword arguments with the Call as `ticketops`; None where the stock code computes the pass from the arguments
        as they are.

    Raises:
        UnsupportedError: the stock code would have to compute it, and would ignore a ticket or a recording.
        InputError: an attention mask that is not served.
    """
    arguments = dict(zip(handle.arguments, args, strict=False)) | kwargs
    shape = handle.inputs.shape(base.config, arguments)
    if shape is None or len(arguments) < len(args) + len(kwargs):
        # The stock model has the right words for missing and surplus arguments.
        return None
    batch, width, device = shape
    mask = arguments.get("attention_mask")
    counts = _counts_of(mask, arguments.pop(TOKEN_COUNTS, None), batch, width)
    obstacle, look = transform() or stock_argument(base, arguments), Look(None)
    if obstacle is None and device.type not in ("cpu", "cuda"):
        obstacle = f"a device of type {device.type!r}"
    if obstacle is None and mask is not None:
        obstacle = _mask_obstacle(handle, mask, counts, batch, width)
    if obstacle is None:
        look = Look(*_look_of(handle.key)) if torch.compiler.is_compiling() else examine(handle, base)
        obstacle = look.obstacle
    if obstacle is None and look.watched and not handle.restricts:
        obstacle = "hooks inside it"
    hidden = arguments.get("output_hidden_states")
    hidden = base.config.output_hidden_states if hidden is None else hidden
    # It may be the number of a layer, 0 too.
    hidden = hidden is not None and hidden is not False
    if obstacle is None and look.watched and handle.unpad and mask is not None and _has_holes(mask, counts):
        obstacle = "hooks inside it, which see padded batches, with holes in the attention mask"
    if obstacle is not None:
        handle.refuse_stock(obstacle)
        return None
    only_first = arguments.pop(ONLY_FIRST, False)
    unpad, bucket = handle.unpad and not look.watched, handle.bucket_on(device)
    if mask is not None and device.type == "cpu" and unpad and not bucket and mask.all():
        # Nothing to pack, as in a batch of one; where shapes are to repeat themselves, values are not asked for.
        mask = None
    dtype = compute_dtype(handle.weight(base))
    flat = _flat(handle, base, arguments, batch, width)
    if flat is None:
        bucket, closes = bucket if unpad else None, handle.close_holes
        packing = Packing.from_mask(mask, batch, width, device, unpad, bucket, closes, dtype, counts)
    else:
        packing = flat
    if not look.watched:
        # The layers read the packing; without a mask the stock model builds no [B, 1, S, S] one, which hooks may see.
        arguments["attention_mask"] = handle.adapter.no_mask
    embeddings = handle.adapter.embeddings(base)
    embeds_positions = "position_ids" in handle.arguments and hasattr(embeddings, "position_embeddings")
    # On a GPU the embeddings of padding are no time worth a further launch.
    spread = packing.indices is not None and ((hidden and torch.is_grad_enabled()) or _follow_width(base.config))
    packed = (
        packing.indices is not None
        and not spread
        and (handle.packs or (device.type == "cpu" and embeds_positions and look.front_packs))
    )
    rows = batch * width if packing.indices is None else len(packing.indices)
    # Of packed inputs a head reads the first token of a row, not of each sequence.
    only_first = only_first and flat is None and rows > 0 and not hidden
    seen = "hooks inside the model" if look.watched else "output_hidden_states" if hidden else None
    arguments["ticketops"] = handle.call(base, packing, device, packed, spread, only_first, seen)
    if packing.indices is not None and packed:
        _pack_inputs(embeddings, packing, packing.indices.clamp_min(0), arguments)
    return arguments


def _follow_width(config: Any) -> bool:
    """True if a model's rotary positions depend on the width of its batch, padding included."""
    parameters = getattr(config, "rope_parameters", None) or {}
    # One set for all layers, or one for each kind of layer.
    sets = [parameters] if "rope_type" in parameters else parameters.values()
    return any(each is not None and each["rope_type"] in ("dynamic", "longrope") for each in sets)


# Packing asks for the number of real tokens, which a compiler cannot know: it runs outside of compiled graphs.
@torch.compiler.disable
def _enter_packed(
    handle: "PatchHandle", base: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Any] | None:
    return _enter(handle, base, args, kwargs)


def stock_argument(base: Any, arguments: dict[str, Any]) -> str | None:
    """Names an argument, or a setting of the configuration, that asks for what only stock layers do, or None."""
    for name in _STOCK_ARGUMENTS:
        value = arguments.get(name)
        if value is not None and value is not False:
            return f"the argument {name}"
    config = base.config
    if not _has_bounds(base, arguments):
        for name in _BOUNDS[:2]:
            if arguments.get(name) is not None:
                return f"the argument {name}, beside padding or without flash attention"
    if config.output_attentions and arguments.get("output_attentions") is None:
        return "config.output_attentions"
    name = config._attn_implementation
    if name not in _ATTENTIONS:
        return f"the attention implementation {name!r}"
    if (ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)) != _ATTENTIONS[name]:
        return f"other functions registered for the attention implementation {name!r}"
    for name in ("input_ids", "inputs_embeds", "attention_mask", "pixel_values"):
        value = arguments.get(name)
        if value is not None and type(value) not in (Tensor, nn.Parameter):
            return f"{name} of type {type(value).__name__}"
    return None


def _tells_sequences_apart(base: Any, arguments: dict[str, Any]) -> bool:
    """True if the stock model's attention tells packed sequences apart, as flash attention does without padding."""
    if base.config._attn_implementation not in _FLASH:
        return False
    mask = arguments.get("attention_mask")
    return mask is None or (isinstance(mask, Tensor) and bool(mask.all()))


def _has_bounds(base: Any, arguments: dict[str, Any]) -> bool:
    """True if the stock model would tell sequences apart by the bounds among a pass's arguments."""
    return all(arguments.get(name) is not None for name in _BOUNDS) and _tells_sequences_apart(base, arguments)


def _flat(handle: "PatchHandle", base: Any, arguments: dict[str, Any], batch: int, width: int) -> Packing | None:
    """The packing of inputs that come packed, as flash attention takes them; None for others."""
    if _has_bounds(base, arguments):
        bounds, others = arguments["cu_seq_lens_q"], arguments["cu_seq_lens_k"]
        problem = "cu_seq_lens_q and cu_seq_lens_k differ, and self-attention has one of them"
        if bounds.shape != others.shape:
            raise InputError(problem)
        require((bounds == others).all(), problem)
        return Packing.from_bounds(bounds, int(arguments["max_length_q"]), batch, width)
    positions = arguments.get("position_ids")
    if positions is None or batch != 1 or not handle.adapter.reads_positions:
        return None
    if not _tells_sequences_apart(base, arguments) or bool((positions.diff() == 1).all()):
        return None
    # Each sequence begins where the positions do.
    starts = (positions.flatten() == positions.min()).nonzero().flatten()
    bounds = torch.cat([starts, starts.new_full((1,), width)])
    return Packing.from_bounds(bounds, int(bounds.diff().max()), batch, width)


# On a tensor that a compiler follows it could be left nowhere.
@torch.compiler.disable
def leave_counts(mask: Any, counts: TokenCounts) -> None:
    """Leaves the counts of a mask with it, for the bare model that a task head calls.

    Args:
        mask: attention mask of a batch; anything else is left alone.
        counts: what came with it.
    """
    if isinstance(mask, Tensor):
        vars(_whole(mask))[_COUNTS] = counts, _version(mask)


def _counts_of(mask: Any, counts: Any, batch: int, width: int) -> TokenCounts | None:
    """The counts of a mask: those of the batch, or what a task head's hook has left. None for those of another shape,
    as where DataParallel has divided the batch."""
    # What is compiled whole has static shapes, and would be compiled anew for each batch's numbers.
    if not isinstance(mask, Tensor) or torch.compiler.is_compiling():
        return None
    counts, version = vars(_whole(mask)).pop(_COUNTS, (counts, _version(mask)))
    fits = isinstance(counts, TokenCounts) and (counts.rows, counts.width) == (batch, width)
    # The counts stay behind where a pass fails before the bare model takes them, and then the mask may change.
    return counts if fits and version == _version(mask) else None


def _version(mask: Tensor) -> int | None:
    """How often a tensor has been changed in place; None for a tensor of inference mode, which does not tell."""
    return None if mask.is_inference() else mask._version


def _whole(mask: Tensor) -> Tensor:
    """The tensor that a mask is a view of, as the head of a multiple choice makes one; else the mask itself."""
    return mask if mask._base is None else mask._base


def _mask_obstacle(
    handle: "PatchHandle", mask: Tensor, counts: TokenCounts | None, batch: int, width: int
) -> str | None:
    """Says why an attention mask needs the stock code, or None."""
    if not handle.inputs.ragged:
        return "an attention_mask of images"
    if mask.shape != (batch, width):
        return (
            f"an attention_mask of shape {list(mask.shape)}, where one of shape {[batch, width]} has one value a token"
        )
    if not handle.reads_first:
        return None
    remedy = "where its first token is read: pad on the right (padding_side='right')"
    padded, fine = f"padding in front of a row, {remedy}", begins_with_token(mask)
    if counts is None and (handle.unpad or on_host(mask)):
        # Packing waits for the device anyway.
        return None if fine.all() else padded
    if counts is not None and counts.padded_in_front:
        return padded
    # Static graphs and what does not wait for the device have no other way left.
    check_rows(fine, f"begins with padding, {remedy}")
    return None


def _has_holes(mask: Tensor, counts: TokenCounts | None) -> bool:
    return counts.holes > 0 if counts else not is_unbroken(mask).all()


class Snapshot:
    """What a model's modules were like when they were looked at; comparing takes a tenth of the time of looking.

    Args:
        base: the bare model.
        look: what was found.
    """

    def __init__(self, base: nn.Module, look: Look) -> None:
        self._base, self.look = base, look
        self._modules = list(map(_noted, _inside(base)))
        #: What is set in all modules, by which snapshots are equal.
        self._settings = tuple(setting for *_, settings in self._modules for setting in settings)

    def __hash__(self) -> int:
        return hash(self._settings)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Snapshot) and other._settings == self._settings

    def holds(self, base: nn.Module) -> bool:
        """True if nothing that `examine` looks at has changed.

        Args:
            base: the bare model.
        """
        if base is not self._base:
            return False
        for module, state, kind, methods, children, hooks, parameters, settings in self._modules:
            if (
                module.__class__ is not kind
                or not state.keys().isdisjoint(methods)
                or (children and tuple(state["_modules"].values()) != children)
                or (not children and state["_modules"])
                or _hook_numbers(state) != hooks
            ):
                return False
            for name, parameter, shape, dtype in parameters:
                now = state["_parameters"].get(name)
                if now is not parameter or (now is not None and (now.dtype is not dtype or now.shape != shape)):
                    return False
            for name, value in settings:
                if state.get(name) != value:
                    return False
        return True


def _noted(module: nn.Module) -> tuple[Any, ...]:
    """What a Snapshot compares of a module."""
    state = module.__dict__
    parameters = [
        (name, each, None if each is None else each.shape, None if each is None else each.dtype)
        for name, each in state["_parameters"].items()
    ]
    if unsharded_class(type(module)) is not type(module):
        # FSDP puts others there for the time of each pass.
        parameters = []
    settings = [(name, state[name]) for name in _SETTINGS if name in state]
    if "attention_dropout" in state:
        settings.append(("training", module.training))
    kind: Any = type(module)
    children = tuple(state["_modules"].values())
    return module, state, kind, computing_methods(kind), children, _hook_numbers(state), parameters, settings


def _hook_numbers(state: dict[str, Any]) -> tuple[int, ...]:
    """The numbers of a module's hooks. torch never uses a number twice."""
    kinds = forward, before, backward, before_backward = (
        state["_forward_hooks"],
        state["_forward_pre_hooks"],
        state["_backward_hooks"],
        state["_backward_pre_hooks"],
    )
    if not (forward or before or backward or before_backward):
        return ()
    return tuple(number for hooks in kinds for number in hooks)


#: Handles by their keys: a compiler can hand a number to what it takes the result of, but no object.
HANDLES: "WeakValueDictionary[int, PatchHandle]" = WeakValueDictionary()


@private.assume_constant_result
def _look_of(key: int) -> tuple[str | None, bool, bool]:
    """What `examine` finds when a model is compiled; as in a stock model, hooks must be there by then."""
    handle = HANDLES[key]
    look = examine(handle, handle.base)
    return look.obstacle, look.watched, look.front_packs


def examine(handle: "PatchHandle", base: Any) -> Look:
    """Looks at a patched model's modules as they are now: anything may have been changed since the last forward pass.

    Args:
        handle: the model's.
        base: the bare model.
    """
    if any_module_is_hooked():
        return Look("hooks for all modules of the process")
    adapter = handle.adapter
    if reason := adapter.refusal(base.config) or adapter.altered():
        return Look(reason)
    if (number := base.config.num_hidden_layers) != handle.num_layers:
        # Some stock models then compute fewer.
        return Look(f"config.num_hidden_layers={number} where it was {handle.num_layers} when it was patched")
    if handle.snapshot is not None and handle.snapshot.holds(base):
        return handle.snapshot.look
    look = _examine_modules(handle, base)
    if look.obstacle is None and handle.ticket is None:
        handle.thaw(base)
    # Hooks mean something else under each ticket.
    handle.snapshot = None if look.obstacle or look.watched else Snapshot(base, look)
    return look


def _examine_modules(handle: "PatchHandle", base: Any) -> Look:
    adapter = handle.adapter
    encoder = adapter.encoder(base)
    if not adapter.knows(encoder):
        return Look(f"an encoder of class {type(encoder).__name__}")
    if fault := adapter.bias_fault(encoder):
        return Look(fault)
    if adapter.position_bias is not None and is_hooked(table := adapter.position_bias(encoder)):
        return Look(f"hooks on its {_name_of(base, table)}, which a patched encoder does not call")
    if not adapter.knows(stack := getattr(encoder, adapter.stack)):
        return Look(f"its layers in a {type(stack).__name__}, which need not give all of them in their order")
    layers = adapter.layers(base)
    if len(layers) != handle.num_layers:
        return Look(f"{len(layers)} layers where there were {handle.num_layers} when it was patched")
    if (method := own_method(base)) not in (None, "forward"):
        return Look(f"a {method} method of its own")
    watched, first = False, None
    if encoder is not base and (fault := _interest(base, encoder)):
        return Look(fault)
    for index, layer in enumerate(layers):
        state = layer.__dict__.get("_ticketops")
        if not isinstance(state, LayerState) or state.index != index:
            return Look(f"a layer {index} that was put there after it was patched")
        modules = list(_inside(layer))
        try:
            parts = adapter.parts(layer)
        except AttributeError as error:
            return Look(f"layer {index} without the parts of a stock layer ({error})")
        first = first or parts
        fault = state.fault(parts) or _weights_fault(state, layer, parts, first)
        if fault is None and not all(map(adapter.knows, modules)):
            fault = adapter.foreign(layer)
        if fault is not None:
            return Look(f"layer {index} has {fault}")
        if hooked := list(filter(is_hooked, modules)):
            called = [layer, *adapter.calls(layer), *(() if parts.shares_positions else parts.qkv)]
            if state.kept.heads is not None:
                # Where a ticket picks heads, their weights are read past their modules, and contexts are narrower.
                called = [layer, *adapter.calls_with_heads(layer)]
            if base.config._attn_implementation in (None, "eager"):
                # Their results have attention weights then.
                called = [each for each in called if not any(each is one for one in adapter.attentions(layer))]
            for module in hooked:
                fault = _interest(layer, module)
                if fault is None and not any(module is each for each in called):
                    place = _name_of(layer, module)
                    fault = f"hooks on its {place}, which a patched layer does not call as a stock one does"
                if fault is not None:
                    return Look(f"layer {index} has {fault}")
            watched = True
    front = not is_hooked(encoder)
    for name, child in base.named_children():
        if child is encoder or name == "pooler" or (handle.packs and name == adapter.stack):
            continue
        tokenwise = all(
            (type(module) in _TOKENWISE or adapter.knows(module))
            and not minds_packing(module)
            and counts_no_tokens(module)
            for module in _inside(child)
        )
        front = front and tokenwise
        # Where the model is its own encoder, its other modules get what the layers get.
        watched = watched or (handle.packs and not tokenwise)
    return Look(None, watched, front)


def _interest(owner: nn.Module, module: nn.Module) -> str | None:
    """What somebody has attached to a module that no patched module could call as a stock one does, or None."""
    if method := own_method(module):
        return f"a {method} method of its own on its {_name_of(owner, module)}"
    if sees_keywords(module):
        return f"hooks on its {_name_of(owner, module)} with keyword arguments, which differ from a stock model's"
    return None


def _name_of(owner: nn.Module, module: nn.Module) -> str:
    return next(name for name, each in owner.named_modules() if each is module) or type(owner).__name__


def _weights_fault(state: LayerState, layer: nn.Module, parts: LayerParts, first: LayerParts) -> str | None:
    """Says which weights of a layer are not as the ops would read them, or None."""
    # Replicas and sharded layers have their weights at hand in their forward pass only.
    if getattr(layer, "_is_replica", False) or unsharded_class(type(layer)) is not type(layer):
        return None
    if fault := parts.weights_fault():
        return fault
    tensors = parts.tensors()
    weight = first.ffn_norm.weight
    dtype, device = weight.dtype, weight.device
    for tensor, shape in zip(tensors, state.shapes, strict=True):
        if tensor is None:
            if shape is not None:
                return "no weights of its own where it had some"
        elif tensor.shape != shape:
            return f"weights of shape {list(tensor.shape)} where they had {None if shape is None else list(shape)}"
        elif tensor.dtype != dtype or tensor.device != device:
            return f"weights of {tensor.dtype} on {tensor.device} beside others of {dtype} on {device}"
    return None


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    """A module and all inside it, each as often as it occurs; `Module.modules` takes longer."""
    yield module
    for child in module._modules.values():
        if child is not None:
            yield from _inside(child)


def _pack_inputs(embeddings: Any, packing: Packing, indices: Tensor, kwargs: dict[str, Any]) -> None:
    """Takes the real tokens out of a model's inputs, so that no padding is embedded either."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    positions = kwargs.get("position_ids")
    if positions is None:
        # RoBERTa and its kin count positions from the ids; others with a table may have them in a buffer.
        if not hasattr(embeddings, "create_position_ids_from_input_ids"):
            buffer = getattr(embeddings, "position_ids", None) if hasattr(embeddings, "position_embeddings") else None
            positions = torch.arange(packing.width, device=indices.device) if buffer is None else buffer
            positions = positions[..., : packing.width]
        elif ids is not None:
            positions = embeddings.create_position_ids_from_input_ids(ids, embeddings.padding_idx)
        else:
            positions = embeddings.create_position_ids_from_inputs_embeds(embeds, embeddings.padding_idx)
    kwargs["position_ids"] = positions.expand(packing.batch, packing.width)
    for name in _TOKEN_INPUTS:
        value = kwargs.get(name)
        if value is not None:
            # One row may stand for all, and a multiple choice's may still be in groups, as stock models allow.
            vector = value.shape[-1:] if name == "inputs_embeds" else ()
            rows = value.reshape(-1, packing.width, *vector).expand(packing.batch, packing.width, *vector)
            kwargs[name] = rows.flatten(0, 1).index_select(0, indices)[None]


def _padded(packs: bool, call: Call, output: Any) -> Any:
    """Pads hidden states that were captured between packed layers, and the last one where no encoder has (`packs`)."""
    # An encoder has padded this one, and it is the last of the captured states. Shapes would not tell: one sequence
    # in a bucket as long as its row has the same packed and padded.
    packing, last = call.packing, output[0]
    # Layers that are spread have padded the others. What comes behind them need not leave zeros at padding.
    packs = packs and call.first_tokens is None and call.padded_by is None
    clean = packing.unpack(packing.pack(last) if call.spread else last[0]) if packs else last

    def padded(state: Tensor | None) -> Tensor | None:
        if state is last:
            return clean
        return state if state is None or call.spread else packing.unpack(state[0])

    if isinstance(output, tuple):
        output = tuple(tuple(map(padded, x)) if isinstance(x, tuple) else x for x in output)
        return (clean, *output[1:])
    output["last_hidden_state"] = clean
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(map(padded, output["hidden_states"]))
    return output


def only_first_tokens(adapter: Adapter, model: PreTrainedModel) -> bool:
    """True if a task head reads nothing of the last layer but each row's first token, and nobody else looks on.

    Args:
        adapter: of the encoder.
        model: with the head, which is known by its class.
    """
    # A compiler would have to follow all this; what it compiles computes every token.
    if torch.compiler.is_compiling() or stock_class(model) not in adapter.first_token_heads:
        return False
    own = model.__dict__.get("forward")
    # Accelerate wraps a model's forward, which still is the same inside.
    if own is not None and not _hands_on(own, type(model).forward):
        return False
    # These hooks would see the argument that tells the bare model so.
    if len(model._forward_pre_hooks_with_kwargs) > 1 or model._forward_hooks_with_kwargs:
        return False
    # ModernBERT's head may read the mean of the tokens.
    if getattr(model.config, "classifier_pooling", "cls") != "cls":
        return False
    base: Any = model.base_model
    # DeBERTa's pooler is the task head's.
    pooler = getattr(base, "pooler", getattr(model, "pooler", None))
    classifier = adapter.first_token_heads[stock_class(model)]
    readers: list[Any] = [base, adapter.encoder(base), adapter.layers(base)[-1]]
    # What else takes the layers' result in a model that is its own encoder.
    readers += [base.final_norm] if hasattr(base, "final_norm") else []
    readers += [] if pooler is None else [pooler]
    readers += [] if classifier is None else [model.classifier]
    stock = pooler is None or type(pooler) is adapter.pooler
    stock = stock and (classifier is None or type(model.classifier) is classifier)
    return stock and not any(map(is_hooked, readers))


def _hands_on(own: Any, forward: Any) -> bool:
    """True if a forward method that was put on a model wraps its class's and takes any keyword arguments."""
    if inspect.unwrap(own) is not inspect.unwrap(forward):
        return False
    parameters = inspect.signature(own, follow_wrapped=False).parameters.values()
    return any(each.kind is each.VAR_KEYWORD for each in parameters)
