"""The handle of a patched model: swaps the classes of its layers in place, records importance, applies tickets."""

import inspect
import itertools
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ticketops import ops
from ticketops.errors import InputError, TicketopsError, UnsupportedError
from ticketops.models.adapter import Adapter
from ticketops.models.boundary import HANDLES, ONLY_FIRST, Snapshot, leave_counts, only_first_tokens
from ticketops.models.collators import PACKED, TOKEN_COUNTS, put_in_rows
from ticketops.models.containers import callers, refuse_readers_of_padding, separate_columns, transformers_model
from ticketops.models.embeddings import SWAPS
from ticketops.models.encoder import EncoderPass, Stack
from ticketops.models.freezing import Frozen, freeze, is_frozen_as, unfreeze
from ticketops.models.graphs import DEVICES, Graphs
from ticketops.models.inputs import Inputs
from ticketops.models.note import Note
from ticketops.models.record import applied_ticket, held_ticket, kept_neurons, num_neurons, read_applied, record_of
from ticketops.models.recording import Recording
from ticketops.models.registry import adapter_of, check_layers, find_adapter
from ticketops.models.state import Call, Kept, LayerState
from ticketops.models.swapping import stock_class
from ticketops.ops import Packing
from ticketops.text import html
from ticketops.tickets import Granularity, Importance, Ticket

_KEYS = itertools.count()
#: Task heads that read the first position of each row.
_FIRST_TOKEN_HEADS = (
    "ForSequenceClassification",
    "ForMultipleChoice",
    "ForNextSentencePrediction",
    "ForPreTraining",
)


def patch(
    model: Any, *, unpad: bool = True, bucket: int | None = None, graphs: bool | Literal["auto"] = False
) -> "PatchHandle":
    """Makes a transformers model run on ticketops' ops, in place.

    Parameter names, state_dict, optimizer references and isinstance checks stay as they are; only the classes of the
    encoder's modules change, to subclasses of the stock ones.

    Args:
        model: a BERT, RoBERTa, XLM-R, XLM-R-XL, CamemBERT, ELECTRA, ERNIE, Data2Vec-text, DistilBERT, MPNet, DeBERTa-v2
            or v3, GTE, Jina v3, NomicBert, ModernBERT, EuroBERT, ViT or DeiT of transformers, bare or with a task head,
            on any device. Or a SentenceTransformer, CrossEncoder or SparseEncoder of sentence-transformers with one of
            them inside.
        unpad: compute real tokens only, packed inside the encoder; False keeps shapes static and never waits for the
            device, for graphs that capture the whole model, and then every row of the attention mask must be one
            unbroken run.
        bucket: round the number of packed tokens up to a multiple of this, with rows that belong to no sequence, and
            the longest length to a power of two. Batches padded to one width then come in a few shapes, and what
            `torch.compile(model, mode="reduce-overhead")` captures for one of them serves the others. A few percent of
            a batch's tokens is a good size. None packs to the exact number, or on a CPU to the next of the sizes that
            oneDNN's products are compiled for, at most 3 % more above 512 tokens.
        graphs: "auto" computes the encoder by CUDA graphs on a GPU, with which the host launches all kernels at once.
            They are captured by themselves for each shape that comes a third time, and shapes are rounded up if no
            bucket is given. True does so too, and refuses a model on another device. `handle.graphs` says what they
            computed, and why other passes ran without. No GPU has run them yet, so they are off by default.

    Returns:
        The handle that records importance, applies tickets and reverts; usable as a context manager that reverts at its
        end.

    Raises:
        UnsupportedError: a model, configuration or layer that is not served; the message names it.
        InputError: the model is patched already, a bucket that is none, or graphs=True for a model that is on no GPU.
    """
    refuse_readers_of_padding(model)
    handle = PatchHandle(transformers_model(model), unpad=unpad, bucket=bucket, graphs=graphs)
    for caller in callers(model):
        handle.prepare_calls(caller)
    try:
        handle.restore()
    except TicketopsError:
        handle.revert()
        raise
    return handle


class PatchHandle:
    """A patched model's handle; made by `patch`.

    Attributes:
        model: the patched model, of transformers.
        num_layers: encoder layers.
        num_heads: attention heads a layer of the architecture; a shrunk layer has fewer, under their old numbers.
        num_neurons: the same of the neurons of an FFN.
        ticket: the ticket applied, None for the whole model.
        note: what is saved of it along with the model.
        graphs: CUDA graphs of the encoder; None for none.
        loads_tickets: load_state_dict applies the ticket that was applied where the weights come from.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        unpad: bool = True,
        bucket: int | None = None,
        graphs: bool | Literal["auto"] = False,
    ) -> None:
        if bucket is not None and (not unpad or type(bucket) is not int or bucket < 1):
            raise InputError(
                f"bucket={bucket!r} with unpad={unpad} is not served: a bucket is a number of tokens of at least 1, "
                "and only packed tokens are counted"
            )
        if graphs not in (True, False, "auto"):
            raise InputError(f"graphs={graphs!r} is not served: it is True, False or 'auto'")
        adapter, base = find_adapter(model)
        if graphs is True and base.device.type not in DEVICES:
            raise InputError(
                f"graphs=True for a model on {base.device}: CUDA graphs need a GPU; move the model there first, or "
                "take graphs='auto', which has them where there is one"
            )
        if find_handle(model) is not None:
            raise InputError(f"this {type(model).__name__} is patched already: use its handle, or revert() it first")
        parts, encoder = check_layers(adapter, base), adapter.encoder(base)
        # Copies and pickles of the model take the handle along; an adapter has functions that none could take.
        self.model, self._base, self._architecture = model, base, adapter.base
        self._register()
        self.unpad, self.bucket = unpad, bucket
        self.graphs = Graphs() if graphs else None
        self.num_layers = len(parts)
        self.num_heads: int = base.config.num_attention_heads
        self.num_neurons = num_neurons(base.config)
        self.ticket: Ticket | None = None
        # A model that is its own encoder takes packed inputs, and its outputs are padded behind it.
        self.packs = adapter.inputs.ragged and encoder is base
        parameters = inspect.signature(base.forward).parameters.values()
        self.arguments = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self._recording: Recording | None = None
        self.snapshot: Snapshot | None = None
        self.stack: Stack | None = None
        self._states = [LayerState(self, index, each) for index, each in enumerate(parts)]
        self.note, self.loads_tickets = Note(), True
        # Whether somebody has called `apply`.
        self._chosen = False
        # Of each ticket that was applied: whether it is full, what it keeps of each layer, what is noted of it.
        self._known: dict[Ticket | None, tuple[bool, list[Kept], dict[str, Any] | None]] = {}
        self._tickets = 0
        self.set_present(held_ticket(base.config))
        self._swapped: list[tuple[nn.Module, type[nn.Module]]] = []
        for module in dict.fromkeys((base, encoder)):
            self._swap(module, adapter.swaps, self)
        for layer, state in zip(adapter.layers(base), self._states, strict=True):
            for module in layer.modules():
                if stock_class(module) in adapter.swaps:
                    self._swap(module, adapter.swaps, state)
        swaps = SWAPS | adapter.swaps
        for module in adapter.embeddings(base).modules():
            if stock_class(module) in swaps:
                self._swap(module, swaps, None)
        self._hooks: list[RemovableHandle] = []
        self._first_token_head = False
        self.watch(model)

    def watch(self, model: PreTrainedModel) -> None:
        """Notes a task head on the patched encoder, for what it reads of the encoder's result.

        Args:
            model: the patched model, or another with the same encoder.
        """
        self.note.add(model)
        if model is not self._base and stock_class(model) in self.adapter.swaps:
            self._swap(model, self.adapter.swaps, None)
        names = [kind.__name__ for kind in type(model).__mro__ if kind.__module__.startswith("transformers.")]
        pooling = getattr(model.config, "classifier_pooling", None)
        if pooling is None:
            self._first_token_head |= any(name.endswith(_FIRST_TOKEN_HEADS) for name in names)
        else:
            # ModernBERT's head for multiple choice looks for the first real token itself.
            # EuroBERT calls the first token bos.
            first = pooling in ("cls", "bos") and any(name.endswith("ForSequenceClassification") for name in names)
            self._first_token_head |= first
        self.prepare_calls(model)

    def prepare_calls(self, caller: nn.Module) -> None:
        """Has the bare model know where nothing but first tokens is read of its result, rows of what is packed, and how
        many tokens the host has counted.

        Args:
            caller: the model with its task head, or a module that hands keyword arguments to that one's forward.
        """
        if _head_of(caller) is not self._base:
            hook = partial(_before_head, self._architecture, self.unpad)
            self._hooks.append(caller.register_forward_pre_hook(hook, with_kwargs=True))

    def _swap(self, module: nn.Module, swaps: dict[type[nn.Module], type[nn.Module]], state: object) -> None:
        stock = stock_class(module)
        self._swapped.append((module, stock))
        module.__class__ = swaps.get(stock, stock)
        module.__dict__["_ticketops"] = state

    def _register(self) -> None:
        self.key = next(_KEYS)
        HANDLES[self.key] = self

    @property
    def base(self) -> Any:
        """The bare model."""
        return self._base

    def __repr__(self) -> str:
        state = f"ticket={self.ticket!r}" if self._swapped else "reverted"
        return f"PatchHandle({type(self.model).__name__}, {state})"

    def _repr_html_(self) -> str:
        shown = "" if self.ticket is None or not self._swapped else self.ticket._repr_html_()
        return f"<div>{html(repr(self))}{shown}</div>"

    def __enter__(self) -> "PatchHandle":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.revert()

    def _check_live(self) -> None:
        if not self._swapped:
            raise InputError("this model was reverted: patch it again to go on")

    @property
    def adapter(self) -> Adapter:
        """The architecture's."""
        return adapter_of(self._architecture)

    @property
    def close_holes(self) -> bool:
        """True if packing may close holes in a mask, which brings the tokens behind a hole nearer than they are."""
        return not self.adapter.by_distance(self._base.config)

    def window(self, layer: int) -> int | None:
        """How far a layer's attention reaches by the configuration as it is now; None for the whole sequence.

        Args:
            layer: its index.
        """
        return self.adapter.window(self._base.config, layer)

    def bucket_on(self, device: torch.device) -> int | Literal["geometric"] | None:
        """How the number of packed tokens is rounded up, see `Packing.from_mask`; graphs need shapes that come again.

        Args:
            device: of the inputs.
        """
        rounds = self.bucket is None and self.graphs is not None and device.type in DEVICES
        return "geometric" if rounds else self.bucket

    @property
    def inputs(self) -> Inputs:
        """What the model reads."""
        return self.adapter.inputs

    @property
    def reads_first(self) -> bool:
        """True if a pooler or a task head reads each row's first token."""
        return self._first_token_head or getattr(self._base, "pooler", None) is not None

    @property
    def restricts(self) -> bool:
        """True if stock code would not do: it would ignore a ticket, or leave no importance behind."""
        return self.ticket is not None or (self._recording is not None and torch.is_grad_enabled())

    def refuse_stock(self, reason: str) -> None:
        """Refuses to leave a forward pass to the stock code where that would ignore a ticket or a recording.

        Args:
            reason: why it would be left.

        Raises:
            UnsupportedError: names the reason and the remedy.
        """
        if self.ticket is not None:
            raise UnsupportedError(
                f"{reason}: only the stock code serves that, and it would ignore the applied ticket; undo it, shrink "
                "the model to the ticket, or take the ticket off with handle.apply(None)"
            )
        if self._recording is not None and torch.is_grad_enabled():
            raise UnsupportedError(
                f"{reason}: only the stock code serves that, and it would leave no importance behind; undo it before "
                "recording"
            )

    def set_present(self, held: Ticket) -> None:
        """Notes which structures the model's weights have, after `shrink` has removed the others.

        Args:
            held: keeps what is there.
        """
        self.snapshot = None
        neurons = kept_neurons(held, self.num_neurons).tolist()
        parts = map(self.adapter.parts, self.adapter.layers(self._base))
        for state, heads, there, each in zip(self._states, held.head_mask.tolist(), neurons, parts, strict=True):
            state.set_present(heads, there, each)
        self._known.clear()

    def apply(self, ticket: Ticket | None) -> "PatchHandle":
        """Restricts the model to a ticket: what it prunes costs no compute, gets no gradient and no optimizer moves it.

        Holds for every optimizer of torch.optim, with momentum and weight decay too; weights stay in place at full
        shape. Applying a ticket once more is cheap enough for every training step: it copies nothing, makes no tensor
        and does not wait for the device.

        The model's configuration and state_dict say which ticket is applied: `patch` applies it again to a model that
        `from_pretrained` loads, and so does `load_state_dict` of a patched model to which nobody has applied another.

        Args:
            ticket: which heads, FFNs and neurons to keep; None for the whole model.

        Returns:
            The handle itself.

        Raises:
            InputError: a ticket for another number of layers, heads or neurons, or a reverted model.
        """
        self._check_live()
        self.restrict(ticket)
        self._chosen = True
        return self

    def restrict(self, ticket: Ticket | None, *, noted: bool = True) -> None:
        """Applies a ticket, and leaves it to what is loaded later to apply another one.

        Args:
            ticket: see `apply`.
            noted: whether what is saved of the model is to say so.
        """
        known = self._known.get(ticket)
        if known is None:
            known = self._known[ticket] = self._keep(ticket)
        full, layers, record = known
        if not full and self._is_sharded():
            raise UnsupportedError(_SHARDED)
        before = [state.kept for state in self._states]
        for state, kept in zip(self._states, layers, strict=True):
            state.kept = kept
        try:
            # Without a ticket nothing is frozen, whatever layers there are now.
            self._freeze(self._base, others=full)
        except UnsupportedError:
            for state, kept in zip(self._states, before, strict=True):
                state.kept = kept
            raise
        self.ticket = None if full else ticket
        if noted:
            self.note.write(record)

    def restore(self) -> None:
        """Applies the ticket that the model's configuration says was applied when it was saved."""
        if (ticket := applied_ticket(self._base.config)) is not None:
            self.restrict(ticket)

    def load_note(self, record: Any) -> None:
        """Applies the ticket that was applied where a state_dict comes from, if nobody has applied another.

        Args:
            record: of the ticket.

        Raises:
            InputError: it is damaged, or of another architecture.
        """
        ticket = read_applied(record, self._base.config)
        if ticket == self.ticket or not self.loads_tickets:
            return
        if not self._chosen:
            self.restrict(ticket)
            return
        stays = "no ticket" if self.ticket is None else repr(self.ticket)
        warnings.warn(
            f"these weights were saved with {ticket!r} applied, and {stays} stays applied here, as handle.apply has "
            "set it: apply the other one where it is meant",
            stacklevel=2,
        )

    def _keep(self, ticket: Ticket | None) -> tuple[bool, list[Kept], dict[str, Any] | None]:
        """Whether a ticket is full, what it keeps of each layer, and what is noted of it."""
        if ticket is None:
            ticket = Ticket.full(self.num_layers, self.num_heads)
        ticket.check(self.num_layers, self.num_heads, self.num_neurons)
        masks = ticket.head_mask.tolist(), kept_neurons(ticket, self.num_neurons).tolist()
        self._tickets += not ticket.is_full
        number = 0 if ticket.is_full else self._tickets
        rows = zip(self._states, *masks, strict=True)
        kept = [state.keep(heads, neurons, number) for state, heads, neurons in rows]
        held = held_ticket(self._base.config)
        # Of what is there it may prune nothing.
        return ticket.is_full, kept, None if held & ticket == held else record_of(ticket)

    def _prunable(self, base: Any, others: bool = False) -> Iterator[tuple[nn.Linear, str, Frozen]]:
        """Each prunable parameter by its module and name, with the slices of it that no optimizer may move.

        Args:
            base: the bare model.
            others: pass over layers that were put there after patching, which are refused otherwise.
        """
        layers = self.adapter.layers(base)
        states = [layer.__dict__.get("_ticketops") for layer in layers]
        if not others and [getattr(state, "index", None) for state in states] != list(range(self.num_layers)):
            raise UnsupportedError(
                f"the model's layers are not the {self.num_layers} that it had when it was patched, which a ticket is "
                "for: revert() and patch it again"
            )
        for layer, state in zip(layers, states, strict=True):
            if state is not None:
                yield from state.kept.frozen(self.adapter.parts(layer))

    def _freeze(self, base: Any, others: bool = False) -> None:
        """Marks what the applied ticket prunes, so that no optimizer moves it; see `_prunable`."""
        marks: list[tuple[nn.Parameter, Frozen]] = []
        seen: dict[int, Frozen] = {}
        for linear, name, frozen in self._prunable(base, others):
            parameter = getattr(linear, name, None)
            if parameter is None:
                continue
            if type(parameter) is not nn.Parameter:
                if linear._parameters.get(name) is parameter and type(parameter) is Tensor:
                    # functional_call has put it there for one forward pass, and no optimizer knows it.
                    continue
                if not getattr(linear, "_is_replica", False):
                    raise UnsupportedError(_SHARDED)
                continue
            if (other := seen.setdefault(id(parameter), frozen)) is not frozen and (frozen.places or other.places):
                raise UnsupportedError(
                    f"two of the layers' parts share one {name}, of which a ticket would prune a part in one place "
                    "only: give each a copy of its own before the ticket is applied"
                )
            marks.append((parameter, frozen))
        for parameter, frozen in marks:
            freeze(parameter, frozen)

    def thaw(self, base: Any) -> None:
        """Removes marks that no ticket asks for: a layer that was taken away under a ticket comes back with them.

        Args:
            base: the bare model.
        """
        for linear, name, _ in self._prunable(base, others=True):
            if (parameter := linear._parameters.get(name)) is not None:
                unfreeze(parameter)

    def _hold_still(self, base: Any) -> None:
        """Marks again where marks are gone: copies, other processes and new parameters have none."""
        if self._has_fsdp(base):
            raise UnsupportedError(_SHARDED)
        prunable = ((linear._parameters.get(name), frozen) for linear, name, frozen in self._prunable(base))
        if not all(parameter is None or is_frozen_as(parameter, frozen) for parameter, frozen in prunable):
            self._freeze(base)

    def _is_sharded(self) -> bool:
        """True if optimizers see other parameters than the layers' own, as those that FSDP makes of them."""
        parameters = [linear._parameters.get(name) for linear, name, _ in self._prunable(self._base)]
        weights = [each for each in parameters if each is not None and each.ndim]
        if any(type(weight) is not nn.Parameter for weight in weights):
            return True
        return self._has_fsdp(self._base)

    def _has_fsdp(self, base: Any) -> bool:
        """True if fully_shard has been applied to the model or to parts of it, whose weights may look whole."""
        fsdp = sys.modules.get("torch.distributed.fsdp")
        modules = (self.model, base, self.adapter.encoder(base), *self.adapter.layers(base))
        return fsdp is not None and any(isinstance(module, fsdp.FSDPModule) for module in modules)

    @contextmanager
    def record_importance(
        self,
        granularity: Granularity = "example",
        sequences_per_example: int | None = None,
        *,
        neurons: bool = False,
        skip_overflow: bool = False,
    ) -> Iterator[Importance]:
        """Collects |dL/d mask| of every head and FFN from each backward pass inside the `with` block, at no extra pass.

        The loss must be the mean over the batch's examples. Dropout is the caller's: model.eval() for a clean pass.
        Only mask gradients are needed, so a scoring pass may call model.requires_grad_(False) and skip every weight
        gradient. Forward passes that share a backward pass, as in R-Drop, SimCSE and siamese models, must have the same
        examples in the same order: a mask is one number for an example in all of them.

        Args:
            granularity: where the absolute value is taken: "example" (paper's formula), "token" (its code) or "batch".
            sequences_per_example: rows of the batch that make one example; needed for multiple choice, else 1.
            neurons: record every neuron of the FFNs too, for `prune(neurons=True)`.
            skip_overflow: leave out batches with a gradient that is not finite, as a loss scaled for float16 gives now
                and then; `importance.skipped` counts them. Waits for the device once a batch.

        Yields:
            The Importance, which fills up; a structure that the applied ticket prunes is not computed and scores 0.

        Raises:
            InputError: a recording is under way, an unknown granularity, multiple choice without sequences_per_example.
        """
        self._check_live()
        if self._recording is not None:
            raise InputError("importance is being recorded already: leave the outer record_importance() first")
        if sequences_per_example is None:
            if type(self.model).__name__.endswith("ForMultipleChoice"):
                raise InputError(
                    "a multiple-choice example is several sequences: pass sequences_per_example=<number of choices>"
                )
            sequences_per_example = 1
        importance = Importance(
            self.num_layers,
            self.num_heads,
            granularity,
            sequences_per_example=sequences_per_example,
            neurons=self.num_neurons if neurons else None,
        )
        recording = self._recording = Recording(importance, skip_overflow)
        importance.connect(recording.settle)
        try:
            with separate_columns():
                yield importance
        finally:
            self._recording = None
            try:
                # What comes after an error goes on from all batches before it.
                recording.settle()
            finally:
                importance.connect(None)

    def __copy__(self) -> "PatchHandle":
        # A second handle of one model would not know what the first has applied.
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy that is made while importance is recorded does not record, and has modules of its own.
        return {**vars(self), "_recording": None, "snapshot": None, "stack": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._register()

    def revert(self) -> None:
        """Gives every module its stock class back; the weights are untouched. Reverting twice is allowed."""
        if not self._swapped:
            return
        self.ticket = None
        if self.note.record is not None:
            self.note.write(None)
        for hook in self._hooks:
            hook.remove()
        for module, stock in self._swapped:
            for parameter in module.parameters():
                unfreeze(parameter)
            module.__class__ = stock
            del module.__dict__["_ticketops"]
        self._swapped = []

    def weight(self, base: Any) -> Tensor:
        """One of the layers' weights, for their dtype.

        Args:
            base: the bare model.
        """
        weight: Tensor = self.adapter.parts(self.adapter.layers(base)[0]).ffn_norm.weight
        return weight

    def call(
        self,
        base: Any,
        packing: Packing,
        device: torch.device,
        packed: bool,
        spread: bool,
        only_first: bool,
        seen: str | None = None,
    ) -> Call:
        """What a forward pass hands to the layers, with a leaf for each importance partial if it records.

        Args:
            base: the bare model.
            packing: of its inputs.
            device: of its inputs.
            packed: the encoder's input is packed already.
            spread: layers hand on padded batches.
            only_first: only first tokens of the last layer's result are read.
            seen: who looks at the hidden states between the layers; None for nobody.
        """
        for state in self._states:
            for places in (state.kept.heads, state.kept.numbers, state.kept.neurons):
                if places is not None:
                    # Made here, outside of compiled graphs, which then find them ready.
                    places.on(device)
        if self.ticket is not None:
            self._hold_still(base)
        # Each layer compares the dtype of its input with that of its own weights.
        weight = self.weight(base)
        whole = ops.serves_layer(weight, weight)
        last, first = self.num_layers - 1, whole and only_first
        pads = packed and self.packs and not first and getattr(base, "pooler", None) is not None
        encoder = None
        if not torch.compiler.is_compiling():
            encoder = EncoderPass(self, base, seen or (None if base is self._base else "a replica of the model"))
        call = Call(
            packing,
            self._states[0].kept.number,
            packed=packed,
            spread=spread,
            whole=whole,
            first_tokens=last if first else None,
            padded_by=last if pads else None,
            encoder=encoder,
        )
        if self._recording is None or not torch.is_grad_enabled():
            return call
        return self._recorded(call, device)

    @torch.compiler.disable
    def _recorded(self, call: Call, device: torch.device) -> Call:
        assert self._recording is not None
        one = self._recording.start(self._states, len(call.packing.sequences), device)
        return replace(
            call,
            head_importance=one.head_importance,
            ffn_importance=one.ffn_importance,
            neuron_importance=one.neuron_importance,
            per_token=self._recording.importance.granularity == "token",
            recorded=one,
        )


_SHARDED = (
    "a ticket is applied to a model whose weights are sharded, as by FSDP, where optimizers would move what it prunes: "
    "shrink the model to the ticket before it is sharded"
)


def find_handle(model: PreTrainedModel) -> PatchHandle | None:
    """The handle of a patched model; None of a stock one.

    Args:
        model: of transformers, bare or with a task head.
    """
    handle: PatchHandle | None = model.base_model.__dict__.get("_ticketops")
    return handle


def _before_head(
    architecture: type[nn.Module], unpad: bool, caller: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Puts a packed batch in rows, takes the counts of its tokens out, and tells the bare model where a task head reads
    nothing but first tokens."""
    head, counts = _head_of(caller), kwargs.pop(TOKEN_COUNTS, None)
    if PACKED in kwargs and _classifies_sequences(head):
        kwargs, counts = put_in_rows(head.config, kwargs)
    if unpad and counts is not None:
        leave_counts(kwargs.get("attention_mask"), counts)
    only = only_first_tokens(adapter_of(architecture), head)
    return args, {**kwargs, ONLY_FIRST: True} if only else kwargs


def _classifies_sequences(head: nn.Module) -> bool:
    return any(kind.__name__.endswith("ForSequenceClassification") for kind in type(head).__mro__)


def _head_of(caller: Any) -> PreTrainedModel:
    """The model with a task head that a module is, or calls."""
    head: PreTrainedModel = caller if isinstance(caller, PreTrainedModel) else caller.model
    return head
