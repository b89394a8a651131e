"""Task heads that hand no keyword arguments on, and tell their bare model past the arguments what they read of it."""

from contextvars import ContextVar
from typing import Any

import torch
from torch import nn

from ticketops.models.boundary import ONLY_FIRST, TicketModel

#: The bare model of a task head under way that reads nothing but first tokens.
_reads_first: ContextVar[nn.Module | None] = ContextVar("reads_first", default=None)


class TellingClassifier(nn.Module):
    """A task head that tells its bare model where it reads nothing but first tokens; the stock one hands on none of its
    keyword arguments."""

    base_model: nn.Module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the stock model does."""
        if not kwargs.pop(ONLY_FIRST, False):
            return super().forward(*args, **kwargs)
        before = _reads_first.set(self.base_model)
        try:
            return super().forward(*args, **kwargs)
        finally:
            _reads_first.reset(before)


class ToldModel(TicketModel):
    """The bare model of such a task head, see TicketModel."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes and returns what the stock model does; hidden states at padding are zeros."""
        if not torch.compiler.is_compiling() and _reads_first.get() is self:
            kwargs[ONLY_FIRST] = True
        return super().forward(*args, **kwargs)
