"""One trial in several processes, each with a GPU of its own, as torchrun and accelerate launch start them.

The first process runs the search and writes its folder; the others follow it, and train what it trains. transformers'
Trainer divides each batch among them.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch

from ticketops.errors import InputError, TicketopsError, TrialError, UnsupportedError, spelled
from ticketops.launch import processes
from ticketops.searching.engine import Call, LocalExecutor
from ticketops.searching.trial import Listener
from ticketops.searching.worker import Inputs, agree, portable

# An error of a training that the other processes may not have had: they may wait for this one for ever.
_broken = False


def check_processes(config: Any) -> None:
    """Makes sure, before anything is loaded, that a run can train in the processes that were started.

    Args:
        config: configuration of the run.

    Raises:
        InputError: its batches cannot be divided, or Ray is to run its trials.
        UnsupportedError: it is a share.
    """
    number = processes()
    if number == 1:
        return
    if config.verb == "share":
        raise UnsupportedError(
            f"share trains in one process, and {number} were started: start it alone, or with "
            f"{spelled('executor', 'ray')}"
        )
    if config.executor == "ray":
        raise InputError(
            f"{spelled('executor', 'ray')} trains several trials at a time, and {number} processes were started to "
            "train one together: start one process, or leave it out"
        )
    if config.batch_size % number:
        raise InputError(
            f"{spelled('batch_size')} {config.batch_size} cannot be divided among {number} processes: give a multiple "
            f"of {number}"
        )


@contextlib.contextmanager
def leading() -> Iterator[None]:
    """Tells the other processes, at the end of the `with` block, that the run has ended, and with which error."""
    if processes() == 1:
        yield
        return
    try:
        yield
    except TicketopsError as error:
        # Otherwise they end with this process, whose launcher stops them.
        if not _broken:
            agree(_End(error))
        raise
    agree(_End(None))


def follow() -> None:
    """Trains what the first process trains, until the run ends there.

    Raises:
        TicketopsError: the run has ended with this error.
    """
    inputs = Inputs()
    while not isinstance(message := agree(None), _End):
        call, name, threads = message
        torch.set_num_threads(threads)
        loaded = inputs.get(name, functools.partial(getattr, call, "inputs"))
        # The first process has the same error, and says so.
        with contextlib.suppress(TrialError):
            call.function(loaded, *call.arguments)
    if message.error is not None:
        raise message.error


class LeadingExecutor(LocalExecutor):
    """Runs one training after the other, in this process and in those that follow it."""

    def __init__(self, listener: Listener):
        super().__init__(listener)
        self._known = Inputs()

    def run(self, call: Call, listener: Listener) -> Any:
        """Runs a training in all processes."""
        global _broken
        name = id(call.inputs)
        sent = self._known.has(name)
        # Kept, so that no other object gets its id.
        self._known.get(name, functools.partial(getattr, call, "inputs"))
        inputs = None if sent else portable(call.inputs)
        agree((Call(call.function, inputs, call.arguments), name, torch.get_num_threads()))
        try:
            return super().run(call, listener)
        except TrialError:
            raise
        except Exception as error:
            _broken = True
            reason = " ".join(str(error).split())[:500]
            raise InputError(
                f"a training in {processes()} processes failed ({type(error).__name__}: {reason}), and the others wait "
                "for it: start the same command again"
            ) from error


class _End:
    """The run has ended.

    Args:
        error: with which error, if any.
    """

    def __init__(self, error: TicketopsError | None):
        self.error = error
