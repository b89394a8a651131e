"""A differentiable function of tensors as two CUDA graphs, one of its forward and one of its backward pass.

The host launches a graph at once, however many kernels it has. A graph reads and writes the memory that it was captured
with, so inputs are copied in and results are copied out; weights are read where they lie. All graphs of one Memory
share what they compute with: between a forward pass and its backward pass no other graph may run.

Source: torch.cuda.make_graphed_callables, which returns the graph's own memory as gradients and keeps one set of them
for each function.
"""

import itertools
import math
import weakref
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ticketops.errors import UnsupportedError
from ticketops.ops import private
from ticketops.ops.registration import refuse_batched

#: Captures a function without arguments: returns its results, in memory of their own, and what computes them again.
Capture = Callable[[Callable[[], list[Tensor]]], tuple[list[Tensor], Callable[[], None]]]


def cuda_capture() -> Capture:
    """Returns a function that captures others as CUDA graphs, all in one pool of memory."""
    pool = torch.cuda.graph_pool_handle()

    def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on, such as one that loads the next batch.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = function()
        return results, graph.replay

    return capture


class Memory:
    """What the graphs of one model share.

    Args:
        capture: makes the graphs, see `cuda_capture`.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture = capture
        self.turn = 0
        self._waiting: weakref.ref[_Turn] | None = None
        self._rooms: dict[tuple[int, ...], tuple[Tensor, Sequence[Tensor]]] = {}

    @property
    def is_busy(self) -> bool:
        """True between a forward pass and its backward pass, as long as somebody may still ask for that."""
        waiting = None if self._waiting is None else self._waiting()
        return waiting is not None and not waiting.done

    def start(self, waits: bool) -> "_Turn":
        """Starts a forward pass.

        Args:
            waits: a backward pass may follow.
        """
        self.turn += 1
        turn = _Turn(self.turn)
        self._waiting = weakref.ref(turn) if waits else None
        return turn

    def room_for(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        """Returns memory for the gradients of some weights; all graphs with gradients of just these write to it.

        Args:
            tensors: of one dtype.

        Returns:
            One tensor, and a view of it for each weight.
        """
        key = tuple(x.data_ptr() for x in tensors)
        if key not in self._rooms:
            room = tensors[0].new_empty(sum(x.numel() for x in tensors))
            self._rooms[key] = room, private.unflatten(room, tensors)
        return self._rooms[key]


class _Turn:
    """One forward pass by a graph. Whoever may ask for its backward pass holds it."""

    def __init__(self, number: int) -> None:
        self.number, self.done = number, False


class Graphed:
    """A function of tensors as graphs, captured when it is made. It computes what the function does, bit for bit, with
    dropout drawn anew.

    Args:
        function: takes three lists of tensors, as below, and returns one tensor. It must have run before on inputs of
            these shapes, and must not wait for the device.
        copied: inputs whose values differ from call to call.
        sinks: inputs whose values are never read and whose gradients are wanted.
        weights: inputs that are read where they lie.
        memory: of the model.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor], list[Tensor], list[Tensor]], Tensor],
        copied: Sequence[Tensor],
        sinks: Sequence[Tensor],
        weights: Sequence[Tensor],
        memory: Memory,
    ) -> None:
        self.memory = memory
        differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (*copied, *sinks, *weights))
        # The first pass of a shape may be one of inference mode, whose tensors other passes could not use.
        with torch.inference_mode(False):
            self._copied = [x.detach().clone().requires_grad_(x.requires_grad) for x in copied]
            unread = [torch.empty_like(x).requires_grad_() for x in sinks]
            # Leaves of their own: gradients of the weights themselves would be added up outside of the graph.
            aliases = [x.detach().requires_grad_(x.requires_grad) for x in weights]
            self.in_place = len(self._copied) + len(unread)
            self._out, self._replay, self._differentiate = self._capture(function, unread, aliases, differentiable)

    def _capture(
        self, function: Callable[..., Tensor], unread: list[Tensor], aliases: list[Tensor], differentiable: bool
    ) -> tuple[Tensor, Callable[[], None], Callable[[], None] | None]:
        inputs = [*self._copied, *unread, *aliases]
        self._pieces: list[_Piece] = []
        #: Places, among the weights, of those that get no gradient although they ask for one.
        self._without: list[int] = []
        self._number = len(inputs)
        result: Tensor | None = None

        def forward() -> list[Tensor]:
            nonlocal result
            with torch.set_grad_enabled(differentiable):
                result = function(self._copied, unread, aliases)
            return [result.detach()]

        (out,), replay = self.memory.capture(forward)
        if not differentiable:
            return out, replay, None
        self._dout = torch.empty_like(out)
        wanted = [place for place, x in enumerate(inputs) if x.requires_grad]
        groups: list[list[int]] = []

        def backward() -> list[Tensor]:
            assert result is not None
            # With what autograd has saved kept, the backward graph can run twice.
            gradients = torch.autograd.grad(
                result, [inputs[place] for place in wanted], self._dout, allow_unused=True, retain_graph=True
            )
            there = {place: x for place, x in zip(wanted, gradients, strict=True) if x is not None}
            groups.clear()
            results = []
            for places in self._grouped(there):
                mine = [there[place] for place in places]
                if places[0] >= self.in_place:
                    room, parts = self.memory.room_for([inputs[place] for place in places])
                else:
                    room = mine[0].new_empty(sum(x.numel() for x in mine))
                    parts = private.unflatten(room, mine)
                private.copy_all(parts, mine)
                results.append(room)
                groups.append(places)
            return results

        with torch.autocast(out.device.type, enabled=False):
            rooms, differentiate = self.memory.capture(backward)
        self._pieces = [
            _Piece(places, [inputs[place].shape for place in places], room)
            for places, room in zip(groups, rooms, strict=True)
        ]
        reached = {place for places in groups for place in places}
        self._without = [place - self.in_place for place in wanted if place >= self.in_place and place not in reached]
        # The graphs have their memory, and no longer need what autograd has saved.
        result = None
        return out, replay, differentiate

    def _grouped(self, gradients: dict[int, Tensor]) -> list[list[int]]:
        """Places of gradients that are copied together: those of weights of one dtype; importance partials, which are
        kept for longer; and each other one by itself. Those of one shape follow each other."""
        groups: dict[Any, list[int]] = {}
        for place, x in gradients.items():
            kind = place if place < len(self._copied) else (place >= self.in_place, x.dtype)
            groups.setdefault(kind, []).append(place)
        return [sorted(places, key=lambda place: gradients[place].shape) for places in groups.values()]

    def __call__(self, copied: Sequence[Tensor], sinks: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
        """Computes the function of inputs of the shapes that it was captured with.

        Args:
            copied, sinks, weights: see above; weights at the same addresses.
        """
        if self._differentiate is None:
            self.memory.start(waits=False)
            return self.forward(copied)
        if self._without:
            # Hooks on what a ticket prunes are not called, as without a graph.
            weights = list(weights)
            for place in self._without:
                weights[place] = weights[place].detach()
        out: Tensor = private.apply(_Replay, self, len(copied), *copied, *sinks, *weights)
        return out

    def forward(self, copied: Sequence[Tensor]) -> Tensor:
        """Runs the forward graph. Returns a copy of its result."""
        with torch.no_grad():
            private.copy_all(self._copied, copied)
            self._replay()
        return self._out.clone()

    def backward(self, dout: Tensor) -> list[Tensor | None]:
        """Runs the backward graph. Returns copies of the gradients."""
        assert self._differentiate is not None
        self._dout.copy_(dout)
        self._differentiate()
        found: list[Tensor | None] = [None] * self._number
        for piece in self._pieces:
            piece.copy_to(found)
        return found


class _Piece:
    """Gradients that lie one behind the other in one tensor, those of one shape together.

    Args:
        places: of their inputs.
        shapes: of the gradients.
        room: the tensor, [total].
    """

    def __init__(self, places: Sequence[int], shapes: Sequence[torch.Size], room: Tensor) -> None:
        self._room = room
        #: The places of each run of equal shapes, and the run's shape.
        self._runs: list[tuple[list[int], list[int]]] = []
        for shape, run in itertools.groupby(zip(shapes, places, strict=True), itemgetter(0)):
            mine = [place for _, place in run]
            self._runs.append((mine, [len(mine), *shape]))
        self._sizes = [math.prod(shape) for _, shape in self._runs]

    def copy_to(self, found: list[Tensor | None]) -> None:
        """Puts a copy of each gradient at its input's place."""
        # A view for each shape and one call for all gradients of it: views one by one take longer than all else here.
        for (places, shape), run in zip(self._runs, self._room.clone().split_with_sizes(self._sizes), strict=True):
            for place, gradient in zip(places, run.view(shape).unbind(), strict=True):
                found[place] = gradient


class _Replay(torch.autograd.Function):
    """A graphed function in autograd's eyes."""

    @staticmethod
    def forward(ctx: Any, graphed: Graphed, copied: int, *inputs: Tensor) -> Tensor:
        ctx.graphed, ctx.turn = graphed, graphed.memory.start(waits=True)
        # For autograd's check that nobody changes a weight in place before the backward pass.
        ctx.save_for_backward(*inputs[graphed.in_place :])
        return graphed.forward(inputs[:copied])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Any, ...]:
        graphed, turn = ctx.graphed, ctx.turn
        ctx.saved_tensors  # noqa: B018
        refuse_batched("an encoder in CUDA graphs has", dout, otherwise="patch(model) without graphs")
        if turn.number != graphed.memory.turn:
            raise UnsupportedError(
                "the encoder ran again, in CUDA graphs, before this backward pass: keep its graph alive by "
                "retain_graph=True from the first backward pass on, or patch(model) without graphs"
            )
        turn.done = not private.keeps_graph()
        return None, None, *graphed.backward(dout)
