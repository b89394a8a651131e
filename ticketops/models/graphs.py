"""CUDA graphs of a patched model's encoder: which passes they compute, for which shapes they are there, and why others
run without."""

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ticketops.models.bert import Given, Turn, compute_layers
from ticketops.models.encoder import Stack, with_parts
from ticketops.models.state import Call
from ticketops.ops import Sequences, backends, private
from ticketops.ops.graphs import Capture, Graphed, Memory, cuda_capture
from ticketops.text import count

if TYPE_CHECKING:
    from ticketops.models.handle import PatchHandle

#: Types of devices that have graphs.
DEVICES = ("cuda",)
#: Passes of one shape that run without a graph before one is captured: kernels are compiled and tiles chosen in these.
SIGHTINGS = 2
#: Shapes that are remembered at a time, with and without a graph.
_SHAPES = 1_000
_TOO_LARGE = "a graph larger than handle.graphs.budget"


class Graphs:
    """The graphs of a patched model, `handle.graphs`.

    Args:
        capture: makes what captures a model's graphs.

    Attributes:
        budget: bytes that the graphs of all shapes may reserve together; the least recently used ones leave first.
        replays: forward passes that graphs have computed.
        captures: graphs captured so far.
        eager: why other forward passes ran without one -> how many.
    """

    budget = 4 << 30

    def __init__(self, capture: Callable[[], Capture] = cuda_capture) -> None:
        self._make = capture
        self.replays, self.captures = 0, 0
        self.eager: Counter[str] = Counter()
        self.clear()

    def clear(self) -> None:
        """Forgets all graphs, and frees their memory."""
        self._entries: OrderedDict[Any, tuple[Graphed, int]] = OrderedDict()
        self._seen: OrderedDict[Any, int] = OrderedDict()
        self._too_large: set[Any] = set()
        self._memory: Memory | None = None
        self._addresses: list[int] = []
        self._place: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        """How many shapes have graphs."""
        return len(self._entries)

    @property
    def reserved(self) -> int:
        """Bytes that the graphs reserve."""
        return sum(size for _, size in self._entries.values())

    def __repr__(self) -> str:
        without = ", ".join(f"{number} with {reason}" for reason, number in self.eager.most_common())
        mib = f"{self.reserved / 2**20:.0f} of {self.budget / 2**20:.0f} MiB"
        return (
            f"<Graphs: {count(len(self), 'shape')} in {mib}, {count(self.replays, 'pass', 'passes')} replayed, "
            f"{self.eager.total()} without a graph{': ' + without if without else ''}>"
        )

    def __getstate__(self) -> dict[str, Any]:
        # Graphs belong to one process and one model.
        return {"_make": self._make, "budget": self.budget}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_make"])  # type: ignore[misc]
        self.budget = state["budget"]

    def run(
        self, handle: "PatchHandle", stack: Stack, given: list[tuple[Call, Turn | None]], hidden_states: Tensor
    ) -> Tensor | None:
        """Computes all layers of the encoder by a graph.

        Args:
            handle: the model's.
            stack: the layers.
            given: what each of them is called with.
            hidden_states: the first layer's input, [.., C].

        Returns:
            The last layer's result, [.., C] or [B, 1, C]; None where no graph has computed it.
        """
        call, place = given[0][0], (threading.get_ident(), _stream(hidden_states))
        reason = _obstacle(stack, call, hidden_states)
        if reason is None and self._place not in (None, place):
            reason = "another thread or stream than the first"
        if reason is not None:
            self.eager[reason] += 1
            return None
        weights = stack.weights
        addresses = [x.data_ptr() for x in weights]
        if addresses != self._addresses:
            # The graphs would go on reading where the weights were.
            self.clear()
            self._addresses = addresses
        sequences = call.packing.sequences
        sinks = [x for kind in _sinks(call) for x in kind.values()]
        angles, places = _angles([turn for _, turn in given])
        copied = [hidden_states, sequences.starts, sequences.lengths, *angles]
        if call.position_bias is not None:
            copied.append(call.position_bias)
        key = (
            *[x.shape for x in copied],
            tuple([x.requires_grad for x in (*copied, *weights)]),
            *[(tuple(kind), *[x.shape for x in kind.values()]) for kind in _sinks(call)],
            *(sequences.max_length, call.number, call.first_tokens, call.per_token, places),
            tuple(handle.adapter.windows(stack.base.config)),
            *stack.settings(),
            *_circumstances(hidden_states),
        )
        entry = self._entries.get(key)
        if entry is None and (reason := self._reason_to_wait(key)):
            self.eager[reason] += 1
            return None
        if self._memory is None:
            self._memory, self._place = Memory(self._make()), place
        if self._memory.is_busy:
            self.eager["an earlier pass whose backward pass is to come"] += 1
            return None
        if entry is None:
            entry = self._capture(with_parts(handle, stack, given), places, copied, sinks, weights, key)
            if entry is None:
                return None
        self._entries.move_to_end(key)
        self.replays += 1
        return entry[0](copied, sinks, weights)

    def _reason_to_wait(self, key: Any) -> str | None:
        if key in self._too_large:
            return _TOO_LARGE
        seen = self._seen[key] = self._seen.get(key, 0) + 1
        self._seen.move_to_end(key)
        while len(self._seen) > _SHAPES:
            self._seen.popitem(last=False)
        return None if seen > SIGHTINGS else f"a shape seen at most {count(SIGHTINGS, 'time')} before"

    def _capture(
        self,
        layers: list[Given],
        places: tuple[int | None, ...],
        copied: list[Tensor],
        sinks: list[Tensor],
        weights: list[Tensor],
        key: Any,
    ) -> tuple[Graphed, int] | None:
        assert self._memory is not None
        call, of_weights = layers[0].call, {id(x): place for place, x in enumerate(weights)}
        longest, kinds = call.packing.sequences.max_length, [list(kind) for kind in _sinks(call)]
        # Without what belongs to this one pass.
        call = replace(call, packing=replace(call.packing, indices=None, numbers=None), recorded=None, encoder=None)
        turns = [None if each.turn is None else each.turn.apply for each in layers]
        layers = [each._replace(call=call, turn=None) for each in layers]

        def function(copied: list[Tensor], sinks: list[Tensor], weights: list[Tensor]) -> Tensor:
            x, starts, lengths, *others = copied
            rest = iter(sinks)
            heads, ffns, neurons = ({index: next(rest) for index in kind} for kind in kinds)
            mine = replace(
                call,
                packing=replace(call.packing, sequences=Sequences(starts, lengths, longest)),
                head_importance=heads,
                ffn_importance=ffns,
                neuron_importance=neurons,
                position_bias=None if call.position_bias is None else others[-1],
            )
            angles = list(zip(others[::2], others[1::2], strict=False))
            mine_of = [
                each._replace(call=mine, turn=None if apply is None or place is None else Turn(apply, *angles[place]))
                for each, apply, place in zip(layers, turns, places, strict=True)
            ]
            return compute_layers(mine_of, x, lambda x: None if x is None else weights[of_weights[id(x)]])

        before = _reserved(copied[0])
        graphed = Graphed(function, copied, sinks, weights, self._memory)
        size = _reserved(copied[0]) - before
        self.captures += 1
        if size > self.budget:
            self._too_large.add(key)
            self.eager[_TOO_LARGE] += 1
            return None
        entry = self._entries[key] = graphed, size
        while self.reserved > self.budget:
            self._entries.popitem(last=False)
        return entry


def _obstacle(stack: Stack, call: Call, hidden_states: Tensor) -> str | None:
    """Says why no graph can compute a forward pass, or None."""
    if hidden_states.device.type not in DEVICES:
        return f"tensors on a device of type {hidden_states.device.type!r}"
    if not stack.are_plain:
        return "weights that are no plain tensors"
    if not hidden_states.numel():
        return "no tokens"
    if call.position_vectors is not None:
        return "position vectors, which each layer projects"
    if call.packing.sequences.real is not None:
        return "holes in the attention mask, which are kept"
    if private.has_saving_hooks():
        return "hooks on what autograd saves, as of checkpointing"
    if torch.is_anomaly_enabled() or private.has_modes():
        return "anomaly detection or a dispatch mode"
    if hidden_states.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a graph of the caller's own"
    return None


def _sinks(call: Call) -> tuple[dict[int, Tensor], ...]:
    return call.head_importance, call.ffn_importance, call.neuron_importance


def _circumstances(x: Tensor) -> tuple[Any, ...]:
    """What a captured function depends on besides its inputs."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return (
        *(x.dtype, x.device, autocast, torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        *(torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled(), backends.requested()),
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    )


def _stream(x: Tensor) -> Any:
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def _reserved(x: Tensor) -> int:
    """Bytes that torch has reserved on a tensor's device."""
    return torch.cuda.memory_reserved(x.device) if x.is_cuda else 0


def _angles(turns: list[Turn | None]) -> tuple[list[Tensor], tuple[int | None, ...]]:
    """The cosines and sines of all layers, each pair once, and for each layer the place of its pair; None for none."""
    found: dict[tuple[int, int], int] = {}
    angles: list[Tensor] = []
    places: list[int | None] = []
    for turn in turns:
        if turn is None:
            places.append(None)
            continue
        key = turn.cosines.data_ptr(), turn.sines.data_ptr()
        if key not in found:
            found[key] = len(found)
            angles += turn.cosines, turn.sines
        places.append(found[key])
    return angles, tuple(places)
