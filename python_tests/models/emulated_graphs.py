"""CUDA graphs without a GPU: what is captured is run again, on the same memory and with the same weights' storages.

As on a GPU, a captured function's results lie where they lay, and replaying one graph overwrites the results of others.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch import Tensor

from ticketops.models import graphs, handle
from ticketops.ops.graphs import Capture


def emulated_capture() -> Capture:
    """Stands in for `ticketops.ops.graphs.cuda_capture`."""
    everything: list[list[Tensor]] = []

    def spoil(mine: list[Tensor]) -> None:
        for results in everything:
            for x in results:
                if results is not mine and x.is_floating_point():
                    x.fill_(float("nan"))

    def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        state = torch.get_rng_state()
        results = [x.clone() for x in function()]
        # On a GPU capturing computes nothing.
        torch.set_rng_state(state)
        everything.append(results)
        spoil([])

        def replay() -> None:
            spoil(results)
            for x, value in zip(results, function(), strict=True):
                x.copy_(value)

        return results, replay

    return capture


@contextlib.contextmanager
def emulated(sightings: int = 0) -> Iterator[None]:
    """Gives models on a CPU emulated graphs, where `patch` is asked for graphs.

    Args:
        sightings: passes of one shape before it is captured.
    """
    devices = ("cpu", "cuda")
    with contextlib.ExitStack() as stack:
        for owner in (graphs, handle):
            stack.enter_context(mock.patch.object(owner, "DEVICES", devices))
        stack.enter_context(mock.patch.object(graphs, "SIGHTINGS", sightings))
        stack.enter_context(mock.patch.object(graphs.Graphs.__init__, "__defaults__", (emulated_capture,)))
        yield
