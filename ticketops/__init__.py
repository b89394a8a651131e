"""Super tickets in pre-trained language models: find them, retrain them, keep what is small, fast and good."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ticketops.loading import install as _install

if TYPE_CHECKING:
    from ticketops.api import search, share, transfer
    from ticketops.errors import InputError, StoreError, TicketopsError, UnsupportedError
    from ticketops.models.callback import TicketCallback
    from ticketops.models.checkpoint import load
    from ticketops.models.collators import CountingCollator, PackingCollator
    from ticketops.models.drawing import draw
    from ticketops.models.export import export
    from ticketops.models.handle import PatchHandle, patch
    from ticketops.models.rewind import rewind
    from ticketops.models.shared import SharedModel
    from ticketops.models.shrink import shrink
    from ticketops.reporting.report import report
    from ticketops.reporting.results import SearchResult, ShareResult, TransferResult, read
    from ticketops.searching.plan import SearchConfig
    from ticketops.searching.sharing_plan import ShareConfig
    from ticketops.searching.transfer_plan import TransferConfig
    from ticketops.searching.trial import Listener
    from ticketops.tickets import Importance, Ticket, prune

__version__ = "0.1.0"
__all__ = [
    "CountingCollator",
    "Importance",
    "InputError",
    "Listener",
    "PackingCollator",
    "PatchHandle",
    "SearchConfig",
    "SearchResult",
    "ShareConfig",
    "ShareResult",
    "SharedModel",
    "StoreError",
    "Ticket",
    "TicketCallback",
    "TicketopsError",
    "TransferConfig",
    "TransferResult",
    "UnsupportedError",
    "draw",
    "export",
    "load",
    "patch",
    "prune",
    "read",
    "report",
    "rewind",
    "search",
    "share",
    "shrink",
    "transfer",
]

_HOMES = {
    "CountingCollator": "ticketops.models",
    "Importance": "ticketops.tickets",
    "InputError": "ticketops.errors",
    "Listener": "ticketops.searching",
    "PackingCollator": "ticketops.models",
    "PatchHandle": "ticketops.models",
    "SearchConfig": "ticketops.searching",
    "SearchResult": "ticketops.reporting",
    "ShareConfig": "ticketops.searching",
    "ShareResult": "ticketops.reporting",
    "SharedModel": "ticketops.models",
    "StoreError": "ticketops.errors",
    "Ticket": "ticketops.tickets",
    "TicketCallback": "ticketops.models",
    "TicketopsError": "ticketops.errors",
    "TransferConfig": "ticketops.searching",
    "TransferResult": "ticketops.reporting",
    "UnsupportedError": "ticketops.errors",
    "draw": "ticketops.models",
    "export": "ticketops.models",
    "load": "ticketops.models",
    "patch": "ticketops.models",
    "prune": "ticketops.tickets",
    "read": "ticketops.reporting",
    "report": "ticketops.reporting",
    "rewind": "ticketops.models",
    "search": "ticketops.api",
    "share": "ticketops.api",
    "shrink": "ticketops.models",
    "transfer": "ticketops.api",
}


# Loaded on first use, so that `ticketops --help` does not wait for torch and transformers.
def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ticketops' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


_install()
