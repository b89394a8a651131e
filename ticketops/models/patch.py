"""Swaps the classes of a model's layers in place, so that they run on ticketops' ops; parameters stay."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ticketops import ops
from ticketops.errors import InputError, UnsupportedError
from ticketops.models.adapter import Adapter, Call, Kept, LayerParts, LayerState, activation_name, unheard
from ticketops.models.bert import BERT, TicketEncoder
from ticketops.models.camembert import CAMEMBERT
from ticketops.models.data2vec_text import DATA2VEC_TEXT
from ticketops.models.deit import DEIT
from ticketops.models.distilbert import DISTILBERT
from ticketops.models.electra import ELECTRA
from ticketops.models.embeddings import SWAPS
from ticketops.models.ernie import ERNIE
from ticketops.models.freezing import freeze, is_frozen, unfreeze
from ticketops.models.hooks import is_hooked
from ticketops.models.indices import Indices
from ticketops.models.modernbert import MODERNBERT
from ticketops.models.record import head_dim, held_ticket, kept_neurons, num_neurons
from ticketops.models.refusals import why_not
from ticketops.models.roberta import ROBERTA
from ticketops.models.vit import VIT
from ticketops.models.xlm_roberta import XLM_ROBERTA
from ticketops.ops import Packing
from ticketops.ops.packing import check_rows
from ticketops.ops.products import compute_dtype
from ticketops.tickets import Granularity, Importance, Ticket, WeightCounts

ADAPTERS: tuple[Adapter, ...] = (
    BERT,
    CAMEMBERT,
    DATA2VEC_TEXT,
    DEIT,
    DISTILBERT,
    ELECTRA,
    ERNIE,
    MODERNBERT,
    ROBERTA,
    VIT,
    XLM_ROBERTA,
)

#: Arguments of a forward pass that stock layers honour and ticketops' layers do not, with the remedy.
_REFUSED_ARGUMENTS = {
    "output_attentions": "attention weights are never formed: call handle.revert() first",
    "encoder_hidden_states": "cross attention is not served",
    "cache": "caches belong to decoders",
    "past_key_values": "caches belong to decoders",
    "use_cache": "caches belong to decoders",
    "cu_seq_lens_q": "pass a padded batch with its attention_mask, it is packed inside",
    "is_causal": "causal attention is not served",
}

#: Task heads that read the first position of each row.
_FIRST_TOKEN_HEADS = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "BertForPreTraining",
    "ErnieForPreTraining",
)


#: Those of them that read nothing else of the last layer, in every architecture whose layers can leave the rest out.
_ONLY_FIRST_TOKEN_HEADS = ("ForSequenceClassification", "ForNextSentencePrediction")
#: By this argument a task head's hook tells the base model's that nothing else is read; no other call of it says so.
_ONLY_FIRST = "ticketops_only_first"


def _reads_first_tokens(model: PreTrainedModel) -> bool:
    """Whether a task head reads the first position of each row."""
    name, pooling = type(model).__name__, getattr(model.config, "classifier_pooling", None)
    if pooling is not None:
        # ModernBERT's head for multiple choice looks for the first real token itself.
        return pooling == "cls" and name.endswith("ForSequenceClassification")
    return name.endswith(_FIRST_TOKEN_HEADS)


def find_adapter(model: nn.Module) -> tuple[Adapter, Any]:
    """Finds the adapter that serves a model, and the bare model inside it.

    Args:
        model: a transformers model, bare or with a task head.

    Raises:
        UnsupportedError: names what is not served.
    """
    if not isinstance(model, PreTrainedModel):
        wrapped = hasattr(model, "_orig_mod") or hasattr(model, "module")
        hint = ": patch before torch.compile and before wrapping" if wrapped else ""
        raise UnsupportedError(f"{type(model).__name__} is not a transformers model{hint}")
    base = model.base_model
    for adapter in ADAPTERS:
        if isinstance(base, adapter.base):
            refusal = adapter.refusal(base.config)
            if refusal:
                raise UnsupportedError(f"{type(model).__name__} with {refusal}")
            return adapter, base
    served = ", ".join(adapter.base.__name__ for adapter in ADAPTERS)
    raise UnsupportedError(
        f"{type(model).__name__} is not supported: {why_not(model)}; ticketops serves {served} and their task heads"
    )


def check_supported(model: nn.Module) -> None:
    """Checks that `patch` would serve a model, without touching it.

    Args:
        model: a transformers model, bare or with a task head.

    Raises:
        UnsupportedError: names what is not served.
    """
    _check_layers(*find_adapter(model))


def weight_counts(model: nn.Module) -> WeightCounts:
    """Counts the weights that pruning can remove from a model.

    Args:
        model: a transformers model, patched or stock; shared weights count once.

    Returns:
        Weights in one head, in one FFN, in the encoder's layers and in the whole model.

    Raises:
        UnsupportedError: a model that ticketops does not serve.
    """
    adapter, base = find_adapter(model)
    head, neuron, rest = adapter.weights(base.config)
    return WeightCounts(
        head=head,
        ffn=num_neurons(base.config) * neuron + rest,
        encoder=sum(p.numel() for layer in adapter.layers(base) for p in layer.parameters()),
        total=sum(p.numel() for p in model.parameters()),
        neuron=neuron,
    )


def _check_layers(adapter: Adapter, base: Any) -> list[LayerParts]:
    """The prunable parts of each layer, checked to be what the ops assume."""
    found = []
    held = held_ticket(base.config)
    widths = kept_neurons(held, num_neurons(base.config)).sum(1).tolist()
    rows = zip(adapter.layers(base), held.head_mask.sum(1).tolist(), widths, strict=True)
    for index, (layer, heads, width) in enumerate(rows):
        if type(layer) not in {*adapter.swaps, *adapter.swaps.values()}:
            name = type(layer).__name__
            raise UnsupportedError(f"layer {index} is a {name}, no stock layer of {adapter.base.__name__}")
        parts = adapter.parts(layer)
        activation_name(parts.activation)
        refusal = parts.refusal()
        if refusal:
            raise UnsupportedError(f"layer {index} has {refusal}")
        dim, (in_qkv, in_fc1) = head_dim(base.config), parts.repeats
        there, neurons = parts.qkv[0].out_features // in_qkv, parts.fc1.out_features // in_fc1
        if (there, neurons) != (heads * dim, width):
            raise UnsupportedError(
                f"layer {index} has weights for {there / dim:g} heads where its configuration says {heads}, or for "
                f"{neurons} neurons where it says {width}: remove structures with ticketops.shrink, "
                "which keeps the two in step"
            )
        found.append(parts)
    return found


def patch(model: PreTrainedModel, *, unpad: bool = True, bucket: int | None = None) -> "PatchHandle":
    """Makes a transformers model run on ticketops' ops, in place.

    Parameter names, state_dict, optimizer references and isinstance checks stay as they are; only the classes of the
    encoder's modules change, to subclasses of the stock ones.

    Args:
        model: a BERT, RoBERTa, XLM-R, CamemBERT, ELECTRA, ERNIE, Data2Vec-text, DistilBERT, ModernBERT, ViT or
            DeiT of transformers, bare or with a task head, on any device.
        unpad: compute real tokens only, packed inside the encoder; False keeps shapes static and never waits for the
            device, for graphs that capture the whole model, and then every row of the attention mask must be one
            unbroken run.
        bucket: round the number of packed tokens up to a multiple of this, with rows that belong to no sequence, and
            the longest length to a power of two. Batches padded to one width then come in a few shapes, and what
            `torch.compile(model, mode="reduce-overhead")` captures for one of them serves the others. A few percent of
            a batch's tokens is a good size. None packs to the exact number, or on a CPU to the next of the sizes that
            oneDNN's products are compiled for, at most 3 % more above 512 tokens.

    Returns:
        The handle that records importance, applies tickets and reverts; usable as a context manager that reverts at its
        end.

    Raises:
        UnsupportedError: a model, configuration or layer that is not served; the message names it.
        InputError: the model is patched already, or a bucket that is none.
    """
    return PatchHandle(model, unpad=unpad, bucket=bucket)


class PatchHandle:
    """A patched model's handle; made by `patch`.

    Attributes:
        model: the patched model.
        num_layers: encoder layers.
        num_heads: attention heads a layer of the architecture; a shrunk layer has fewer, under their old numbers.
        num_neurons: the same of the neurons of an FFN.
        ticket: the ticket applied, None for the whole model.
    """

    def __init__(self, model: PreTrainedModel, *, unpad: bool = True, bucket: int | None = None) -> None:
        if bucket is not None and (not unpad or type(bucket) is not int or bucket < 1):
            raise InputError(
                f"bucket={bucket!r} with unpad={unpad} is not served: a bucket is a number of tokens of at least 1, "
                "and only packed tokens are counted"
            )
        adapter, base = find_adapter(model)
        encoder = adapter.encoder(base)
        if hasattr(encoder, "_ticketops"):
            raise InputError(f"this {type(model).__name__} is patched already: use its handle, or revert() it first")
        self._parts = _check_layers(adapter, base)
        self.model = model
        self.num_layers = len(self._parts)
        self.num_heads: int = base.config.num_attention_heads
        self.num_neurons = num_neurons(base.config)
        self.ticket: Ticket | None = None
        self._unpad, self._bucket = unpad, bucket
        self._inputs = adapter.inputs
        self._no_mask = adapter.no_mask
        # A model that is its own encoder takes packed inputs, and its outputs are padded behind it.
        self._packs = adapter.inputs.ragged and encoder is base
        # Packing closes holes in a mask, and what was too far apart would come within reach.
        self._holes = not any(window is not None for window in adapter.windows(base.config))
        self._importance: Importance | None = None
        self._states = [
            LayerState(index, activation_name(parts.activation), parts.repeats)
            for index, parts in enumerate(self._parts)
        ]
        # Of each ticket that was applied, whether it is full and what it keeps of each layer.
        self._known: dict[Ticket | None, tuple[bool, list[Kept]]] = {}
        self._tickets = 0
        self.hold(held_ticket(base.config))
        layers = self._layers = list(adapter.layers(base))
        self._called = [adapter.calls(layer) for layer in layers]
        # The latest hook of all that were seen not to be on what is never called; hooks are numbered.
        self._latest_hook: int | None = None
        self._check_hooks()
        self._swapped: list[tuple[nn.Module, type[nn.Module]]] = []
        self._swap(encoder, adapter.swaps, self)
        # Whose results are hidden states that a task head may read.
        self._ends = (base, encoder, layers[-1])
        for layer, state in zip(layers, self._states, strict=True):
            for module in layer.modules():
                if type(module) in adapter.swaps:
                    self._swap(module, adapter.swaps, state)
        swaps = SWAPS | adapter.swaps
        for module in base.embeddings.modules():
            if type(module) in swaps:
                self._swap(module, swaps, None)
        parameters = inspect.signature(base.forward).parameters.values()
        names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        before = _before_packed_forward if unpad else _before_forward
        self._hooks = [
            base.register_forward_pre_hook(partial(before, self, names), with_kwargs=True),
            base.register_forward_hook(partial(_after_forward, self._packs), with_kwargs=True),
        ]
        self.watch(model)

    def watch(self, model: PreTrainedModel) -> None:
        """Serves a task head that reads first tokens.

        Args:
            model: the patched model, or another with the same encoder.
        """
        if _reads_first_tokens(model):
            place = list(inspect.signature(model.forward).parameters).index("attention_mask")
            self._hooks.append(model.register_forward_pre_hook(partial(_before_head, self, place), with_kwargs=True))

    def _swap(self, module: nn.Module, swaps: dict[type[nn.Module], type[nn.Module]], state: object) -> None:
        stock = type(module)
        self._swapped.append((module, stock))
        module.__class__ = swaps.get(stock, stock)
        module.__dict__["_ticketops"] = state

    def __repr__(self) -> str:
        state = f"ticket={self.ticket!r}" if self._swapped else "reverted"
        return f"PatchHandle({type(self.model).__name__}, {state})"

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def _check_live(self) -> None:
        if not self._swapped:
            raise InputError("this model was reverted: patch it again to go on")

    def _check_hooks(self) -> None:
        """Refuses hooks that would never be called."""
        if RemovableHandle.next_id == self._latest_hook:
            return
        for state, layer, called, parts in zip(self._states, self._layers, self._called, self._parts, strict=True):
            # Where a ticket picks heads, their weights are read past their modules.
            reason = unheard(layer, (*called, *parts.qkv) if state.kept.heads is None else called)
            if reason:
                raise UnsupportedError(f"layer {state.index} has {reason}")
        self._latest_hook = RemovableHandle.next_id

    def hold(self, held: Ticket) -> None:
        """Notes which structures the model's weights have, after `shrink` has removed the others.

        Args:
            held: keeps what is there.
        """
        neurons = kept_neurons(held, self.num_neurons).tolist()
        for state, *there in zip(self._states, held.head_mask.tolist(), neurons, strict=True):
            state.hold(*there)
        self._known.clear()

    def apply(self, ticket: Ticket | None) -> "PatchHandle":
        """Restricts the model to a ticket: what it prunes costs no compute, gets no gradient and no optimizer moves it.

        Holds for every optimizer of torch.optim, with momentum and weight decay too; weights stay in place at full
        shape. Applying a ticket once more is cheap enough for every training step: it copies nothing, makes no tensor
        and does not wait for the device.

        Args:
            ticket: which heads, FFNs and neurons to keep; None for the whole model.

        Returns:
            The handle itself.

        Raises:
            InputError: a ticket for another number of layers, heads or neurons, or a reverted model.
        """
        self._check_live()
        known = self._known.get(ticket)
        if known is None:
            known = self._known[ticket] = self._keep(ticket)
        full, layers = known
        for state, kept in zip(self._states, layers, strict=True):
            state.kept = kept
        self._latest_hook = None
        self.ticket = None if full else ticket
        self._freeze()
        return self

    def _keep(self, ticket: Ticket | None) -> tuple[bool, list[Kept]]:
        """Whether a ticket is full, and what it keeps of each layer."""
        if ticket is None:
            ticket = Ticket.full(self.num_layers, self.num_heads)
        ticket.check(self.num_layers, self.num_heads, self.num_neurons)
        masks = ticket.head_mask.tolist(), kept_neurons(ticket, self.num_neurons).tolist()
        self._tickets += not ticket.is_full
        number = 0 if ticket.is_full else self._tickets
        rows = zip(self._states, *masks, strict=True)
        return ticket.is_full, [state.keep(heads, neurons, number) for state, heads, neurons in rows]

    def _freeze(self) -> None:
        """Marks what the applied ticket prunes, so that no optimizer moves it."""
        if self.ticket is not None and self._is_sharded():
            raise UnsupportedError(
                "a ticket is applied to a model whose weights are sharded, as by FSDP, where optimizers would move "
                "what it prunes: shrink the model to the ticket before it is sharded"
            )
        for state, parts in zip(self._states, self._parts, strict=True):
            kept = state.kept
            for linear in parts.qkv:
                for parameter in linear.parameters():
                    freeze(parameter, kept.frozen_rows)
            freeze(parts.output.weight, kept.frozen_columns)
            for parameter in parts.fc1.parameters():
                freeze(parameter, kept.frozen_fc1)
            freeze(parts.fc2.weight, kept.frozen_fc2)
            if parts.fc2.bias is not None:
                freeze(parts.fc2.bias, kept.frozen_bias)

    def _is_sharded(self) -> bool:
        """Whether optimizers see other parameters than the layers' own, as those that FSDP makes of them."""
        weights = [linear.weight for parts in self._parts for linear in parts.linears().values()]
        if any(type(weight) is not nn.Parameter or weight.ndim != 2 for weight in weights):
            return True
        # While its forward pass runs, weights may look whole.
        fsdp = sys.modules.get("torch.distributed.fsdp")
        modules = (self.model, *self._ends, *self._layers)
        return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules)

    @contextmanager
    def record_importance(
        self,
        granularity: Granularity = "example",
        sequences_per_example: int | None = None,
        *,
        neurons: bool = False,
    ) -> Iterator[Importance]:
        """Collects |dL/d mask| of every head and FFN from each backward pass inside the `with` block, at no extra pass.

        The loss must be the mean over the batch's examples. Dropout is the caller's: model.eval() for a clean pass.
        Only mask gradients are needed, so a scoring pass may call model.requires_grad_(False) and skip every weight
        gradient.

        Args:
            granularity: where the absolute value is taken: "example" (paper's formula), "token" (its code) or "batch".
            sequences_per_example: rows of the batch that make one example; needed for multiple choice, else 1.
            neurons: record every neuron of the FFNs too, for `prune(neurons=True)`.

        Yields:
            The Importance, which fills up; a structure that the applied ticket prunes is not computed and scores 0.

        Raises:
            InputError: a recording is under way, an unknown granularity, multiple choice without sequences_per_example.
        """
        self._check_live()
        if self._importance is not None:
            raise InputError("importance is being recorded already: leave the outer record_importance() first")
        if sequences_per_example is None:
            if type(self.model).__name__.endswith("ForMultipleChoice"):
                raise InputError(
                    "a multiple-choice example is several sequences: pass sequences_per_example=<number of choices>"
                )
            sequences_per_example = 1
        self._importance = Importance(
            self.num_layers,
            self.num_heads,
            granularity,
            sequences_per_example=sequences_per_example,
            neurons=self.num_neurons if neurons else None,
        )
        try:
            yield self._importance
        finally:
            self._importance = None

    def revert(self) -> None:
        """Gives every module its stock class back; the weights are untouched. Reverting twice is allowed."""
        if not self._swapped:
            return
        self.apply(None)
        for parts in self._parts:
            for linear in parts.linears().values():
                for parameter in linear.parameters():
                    unfreeze(parameter)
        for hook in self._hooks:
            hook.remove()
        for module, stock in self._swapped:
            module.__class__ = stock
            del module.__dict__["_ticketops"]
        self._swapped = []

    def _call(self, packing: Packing, device: torch.device, packed: bool, first_tokens: bool) -> Call:
        """The per-call information, with a leaf for each importance partial where a backward pass may follow."""
        for state in self._states:
            for places in (state.kept.heads, state.kept.neurons):
                if places is not None:
                    # Made here, outside of compiled graphs, which then find them ready.
                    places.on(device)
        if not torch.compiler.is_compiling():
            self._check_hooks()
        parameters = (p for parts in self._parts for linear in parts.linears().values() for p in linear.parameters())
        if self.ticket is not None and not any(map(is_frozen, parameters)):
            # A deep copy has the ticket but loses the marks on its parameters, and so does another process.
            self._freeze()
        importance = self._importance
        # Each layer compares the dtype of its input with that of its own weights.
        weight = self._parts[0].qkv[0].weight
        whole = ops.serves_layer(weight, weight)
        last = self.num_layers - 1 if whole and first_tokens else None
        number = self._states[0].kept.number
        call = Call(packing, number, packed=packed, whole=whole, first_tokens=last)
        if importance is None or not torch.is_grad_enabled():
            return call
        return self._recording(importance, call, device)

    @torch.compiler.disable
    def _recording(self, importance: Importance, call: Call, device: torch.device) -> Call:
        call = replace(call, per_token=importance.granularity == "token")
        batch = len(call.packing.sequences)
        idle: list[Callable[..., None]] = []
        for layer, state in enumerate(self._states):
            kept = state.kept

            def record(
                sinks: dict[int, Tensor],
                add: Callable[..., None],
                numbers: Indices | None,
                total: int,
                layer: int = layer,
            ) -> None:
                """Has one kind of structure of the layer recorded, where any of it is computed."""
                index = None if numbers is None else numbers.on(device)
                computed = total if index is None else len(index)
                add = partial(_add_some, partial(add, layer), index, total)
                if computed:
                    sinks[layer] = _leaf((batch, computed), device, add)
                else:
                    idle.append(partial(add, torch.zeros(batch, 0, device=device)))

            add_head = partial(importance.add_head, defer=True)
            record(call.head_importance, add_head, kept.numbers, self.num_heads)
            if importance.num_neurons is not None:
                record(call.neuron_importance, importance.add_neuron, kept.neuron_numbers, self.num_neurons)
            add_ffn = partial(_add_ffn, importance, layer)
            if kept.ffn:
                call.ffn_importance[layer] = _leaf((batch,), device, add_ffn)
            else:
                idle.append(partial(add_ffn, torch.zeros(batch, device=device)))

        def add_idle(_: Tensor) -> None:
            for add in idle:
                add()

        # What is pruned away has no backward pass of its own: it scores its 0 when another structure's has run.
        for leaf in [*call.head_importance.values(), *call.ffn_importance.values()][:1]:
            leaf.register_post_accumulate_grad_hook(add_idle)
        # Since the others were looked at only these were added.
        self._latest_hook = RemovableHandle.next_id
        return call


def _leaf(shape: tuple[int, ...], device: torch.device, add: Callable[[Tensor], None]) -> Tensor:
    """A tensor whose gradient, the importance partials, goes to `add` as soon as a backward pass has formed it."""
    # Nobody reads its values, so nothing is launched to write them.
    leaf = torch.empty(shape, device=device).requires_grad_()

    def take(leaf: Tensor) -> None:
        gradient, leaf.grad = leaf.grad, None
        assert gradient is not None
        add(gradient)

    leaf.register_post_accumulate_grad_hook(take)
    return leaf


def _add_some(add: Callable[..., None], kept: Tensor | None, total: int, partials: Tensor) -> None:
    if kept is not None:
        partials = partials.new_zeros(len(partials), total).index_copy_(1, kept, partials)
    add(signed=partials, absolute=partials)


def _add_ffn(importance: Importance, layer: int, partials: Tensor) -> None:
    importance.add_ffn(layer, signed=partials, absolute=partials, defer=True)


def _before_forward(
    handle: PatchHandle, names: list[str], base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    """Turns the attention mask into a packing that travels to the layers, and refuses what they would ignore."""
    if len(args) > len(names):
        raise InputError(f"{type(base).__name__} takes at most {len(names)} positional arguments, got {len(args)}")
    kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
    only_first = kwargs.pop(_ONLY_FIRST, False)
    if base.config.output_attentions:
        kwargs.setdefault("output_attentions", True)
    for name, remedy in _REFUSED_ARGUMENTS.items():
        value = kwargs.get(name)
        if value is not None and value is not False:
            raise UnsupportedError(f"a patched {type(base).__name__} does not serve {name}: {remedy}")
    shape = handle._inputs.shape(base.config, kwargs)
    if shape is None:
        # The stock model has the right words for a missing input.
        return (), kwargs
    batch, width, device = shape
    mask = kwargs.get("attention_mask")
    if mask is not None and not handle._inputs.ragged:
        raise UnsupportedError(f"a patched {type(base).__name__} does not serve attention_mask: give whole images")
    if mask is not None and mask.shape != (batch, width):
        raise UnsupportedError(
            f"a patched {type(base).__name__} needs an attention_mask of shape {[batch, width]}, one value a token, "
            f"got {list(mask.shape)}: masks of single query-key pairs are not served"
        )
    if mask is not None and device.type == "cpu" and handle._unpad and not handle._bucket and mask.all():
        # Nothing to pack, as in a batch of one; where shapes are to repeat themselves, values are not asked for.
        mask = None
    dtype = compute_dtype(handle._parts[0].qkv[0].weight)
    packing = Packing.from_mask(mask, batch, width, device, handle._unpad, handle._bucket, handle._holes, dtype)
    # The layers read the packing; without a mask the stock model builds no [B, 1, S, S] one.
    kwargs["attention_mask"] = handle._no_mask
    embeds_positions = "position_ids" in names and hasattr(base.embeddings, "position_embeddings")
    # On a GPU the embeddings of padding are no time worth a further launch.
    packed = packing.indices is not None and (handle._packs or (device.type == "cpu" and embeds_positions))
    rows = batch * width if packing.indices is None else len(packing.indices)
    hidden = kwargs.get("output_hidden_states")
    hidden = base.config.output_hidden_states if hidden is None else hidden
    kwargs["ticketops"] = handle._call(packing, device, packed, only_first and rows > 0 and not hidden)
    if packing.indices is not None and packed:
        _pack_inputs(base.embeddings, packing, packing.indices.clamp_min(0), kwargs)
    return (), kwargs


#: Inputs of a model that have a value, or a vector, for each token.
_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids", "task_type_ids")


def _pack_inputs(embeddings: Any, packing: Packing, indices: Tensor, kwargs: dict[str, Any]) -> None:
    """Takes the real tokens out of a model's inputs, so that no padding is embedded either."""
    ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    positions = kwargs.get("position_ids")
    if positions is None:
        # RoBERTa and its kin count positions from the ids.
        if not hasattr(embeddings, "create_position_ids_from_input_ids"):
            positions = torch.arange(packing.width, device=indices.device)
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


def _before_head(
    handle: PatchHandle, place: int, model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Refuses padding where the task head reads, and says where it reads nothing else."""
    mask = args[place] if len(args) > place else kwargs.get("attention_mask")
    if mask is not None:
        _check_first_tokens(handle, model, mask)
    if _reads_only_first_tokens(handle, model):
        kwargs = {**kwargs, _ONLY_FIRST: True}
    return args, kwargs


def _check_first_tokens(handle: PatchHandle, model: PreTrainedModel, mask: Tensor) -> None:
    """Refuses padding where the task head reads: stock models leave there what a padding token attends to."""
    rows = mask.flatten(0, -2)
    # The common case, in a few calls; a compiler or a GPU would have to be waited for.
    if rows.is_cpu and not torch.compiler.is_compiling() and rows[:, 0].all():
        return
    rows = rows.bool()
    problem = (
        f"begins with padding, which {type(model).__name__} would read as its first token: pad on the right "
        "(tokenizer.padding_side = 'right')"
    )
    # Packing waits for the device anyway.
    check_rows(rows[:, 0] | ~rows.any(1), problem, wait=handle._unpad)


def _reads_only_first_tokens(handle: PatchHandle, model: PreTrainedModel) -> bool:
    """Whether nobody can see more of the last layer than each row's first token: the head is transformers' own, with
    modules of its own or of torch, and no hook of others looks on."""
    # A compiler would have to follow all this; what it compiles computes every token.
    if torch.compiler.is_compiling() or not type(model).__name__.endswith(_ONLY_FIRST_TOKEN_HEADS):
        return False
    base, encoder, _ = handle._ends
    if not isinstance(encoder, TicketEncoder):
        return False
    skipped = (base, base.embeddings, encoder)
    heads = [child for child in (*model.children(), *base.children()) if child not in skipped]
    readers = [*handle._ends, *(module for head in heads for module in head.modules())]
    ours = {hook.id for hook in handle._hooks}
    return all(map(_is_stock, (model, *readers))) and not any(is_hooked(module, ours) for module in readers)


def _is_stock(module: nn.Module) -> bool:
    """Whether a module is of transformers, torch or ticketops, and computes what its class does."""
    if not type(module).__module__.startswith(("transformers.", "torch.nn.", "ticketops.")):
        return False
    own = module.__dict__.get("forward")
    # Accelerate wraps a model's forward, which still is the same inside.
    return own is None or inspect.unwrap(own) is inspect.unwrap(type(module).forward)


# Packing asks for the number of real tokens, which a compiler cannot know: it runs outside of compiled graphs.
@torch.compiler.disable
def _before_packed_forward(
    handle: PatchHandle, names: list[str], base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[()], dict[str, Any]]:
    return _before_forward(handle, names, base, args, kwargs)


def _after_forward(
    packs: bool, base: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> Any:
    """Pads hidden states that were captured between packed layers, and the last one where no encoder has (`packs`)."""
    packing: Packing = kwargs["ticketops"].packing
    if packing.indices is None:
        return output
    # The encoder has padded this one, and it is the last of the captured states. Shapes would not tell: one sequence
    # in a bucket as long as its row has the same packed and padded.
    last = None if packs else output[0]

    def padded(state: Tensor | None) -> Tensor | None:
        return state if state is None or state is last else packing.unpack(state[0])

    if isinstance(output, tuple):
        output = tuple(tuple(map(padded, x)) if isinstance(x, tuple) else x for x in output)
        return (padded(output[0]), *output[1:]) if packs else output
    if packs:
        output["last_hidden_state"] = padded(output["last_hidden_state"])
    if output.get("hidden_states") is not None:
        output["hidden_states"] = tuple(map(padded, output["hidden_states"]))
    return output
