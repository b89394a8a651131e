"""Draws a ticket from the importance that a stretch of training leaves behind, and starts over from it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, get_args

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.models.handle import PatchHandle
from ticketops.models.rewind import check_weights, rewind
from ticketops.tickets import Granularity, Importance, Kind, Ticket, prune


class Drawing:
    """A ticket on its way: `start` records importance, `stop` draws the ticket, `apply` restricts the model to it.

    Args:
        handle: handle of the patched model.
        sparsity, counts, kind, min_heads, seed, neurons: see `prune`. Without sparsity and counts, importance is
            recorded and no ticket drawn.
        granularity, sequences_per_example, skip_overflow: see `PatchHandle.record_importance`.
        rewind: name -> tensor of the pre-trained weights, see `ticketops.rewind`; None keeps the weights.
        model: object that the names in `rewind` belong to; None for the handle's model.

    Attributes:
        importance: what has been recorded; None before.
        ticket: the ticket; None before it is drawn.
    """

    def __init__(
        self,
        handle: PatchHandle,
        sparsity: float | None = None,
        *,
        counts: tuple[int, int] | None = None,
        kind: Kind = "winning",
        min_heads: int = 1,
        seed: int = 0,
        neurons: bool = False,
        granularity: Granularity = "example",
        sequences_per_example: int | None = None,
        skip_overflow: bool = False,
        rewind: Mapping[str, Tensor] | None = None,
        model: Any = None,
    ) -> None:
        self.importance: Importance | None = None
        self.ticket: Ticket | None = None
        self.draws = sparsity is not None or counts is not None
        self.rewinds = rewind is not None
        self._handle, self._weights, self._model = handle, rewind, handle.model if model is None else model
        self._level: dict[str, Any] = {"sparsity": sparsity, "counts": counts}
        self._options: dict[str, Any] = {"min_heads": min_heads, "seed": seed, "neurons": neurons}
        self._kind = kind
        self._recorded: dict[str, Any] = {
            "granularity": granularity,
            "sequences_per_example": sequences_per_example,
            "neurons": neurons,
            "skip_overflow": skip_overflow,
        }
        self._open = ExitStack()

    def check(self) -> None:
        """Refuses before any training what `stop` and `apply` would refuse behind it.

        Raises:
            InputError: a reverted model, a recording that is under way, an argument out of range, other weights than
                the model's to rewind to, or the model's own.
        """
        with self._handle.record_importance(**self._recorded) as importance:
            pass
        if self.draws:
            # A random ticket reads no scores, of which there are none yet.
            kind: Any = "random" if self._kind in get_args(Kind) else self._kind
            prune(importance, kind=kind, **self._level, **self._options)
        elif self.rewinds:
            raise InputError("rewind is given, but neither sparsity nor counts, so there is no ticket to rewind to")
        if self._weights is not None:
            check_weights(self._model, self._weights)

    def start(self) -> None:
        """Starts recording."""
        self.importance = self._open.enter_context(self._handle.record_importance(**self._recorded))

    def close(self) -> None:
        """Stops recording, and draws nothing."""
        self._open.close()

    def stop(self) -> None:
        """Stops recording and draws the ticket, from the batches of all processes of torch.distributed.

        Raises:
            InputError: nothing was recorded, or a score is not finite.
        """
        self.close()
        assert self.importance is not None
        self.importance = of_all_processes(self.importance)
        if self.draws:
            self.ticket = prune(self.importance, kind=self._kind, **self._level, **self._options)

    def apply(self) -> None:
        """Applies the ticket, and rewinds the weights where asked to."""
        self._handle.apply(self.ticket)
        if self._weights is not None:
            rewind(self._model, self._weights)


@contextmanager
def draw(
    handle: PatchHandle,
    sparsity: float | None = None,
    *,
    counts: tuple[int, int] | None = None,
    rewind: Mapping[str, Tensor] | None = None,
    **options: Any,
) -> Iterator[Drawing]:
    """Draws a ticket from the training inside the `with` block, and applies it at the end of the block.

    The same as `record_importance`, `prune`, `apply` and `rewind` one after the other; the arguments are checked before
    the block runs. After an error in the block no ticket is drawn. Where torch.distributed runs several processes, each
    must enter and leave the block, and all draw the same ticket from all of their batches.

    Args:
        handle: handle of the patched model.
        sparsity: share of heads and of FFNs to prune, in [0, 1); pass this or `counts`.
        counts: numbers of heads and of FFNs (with `neurons`: of neurons) to prune; pass this or `sparsity`.
        rewind: copy of the pre-trained state_dict of `handle.model`, to rewind the weights to; None keeps the weights.
            An optimizer's state is the caller's: a rewound model starts with a new optimizer.
        options: kind, min_heads, seed and neurons of `prune`, granularity, sequences_per_example and skip_overflow of
            `PatchHandle.record_importance`.

    Yields:
        The drawing; its `importance` fills up inside the block, its `ticket` is there behind it.

    Raises:
        InputError: an argument is bad, the model is reverted, or nothing was recorded.

    Source: arXiv 2105.12002, section 3.
    """
    drawing = Drawing(handle, sparsity, counts=counts, rewind=rewind, **options)
    if not drawing.draws:
        raise InputError("draw takes a sparsity or counts; give one of them, or record with record_importance()")
    drawing.check()
    drawing.start()
    try:
        yield drawing
    except BaseException:
        drawing.close()
        raise
    drawing.stop()
    drawing.apply()


def of_all_processes(importance: Importance) -> Importance:
    """Merges the importances of all processes of torch.distributed, each of which has recorded its own batches.

    Args:
        importance: this process's.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return importance
    parts: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(parts, importance)
    # In the order of the processes, so that all get the same sums.
    first, *others = parts
    for other in others:
        first.merge(other)
    merged: Importance = first
    return merged
