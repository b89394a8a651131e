"""Where ticketops meets Hugging Face: patching models and counting their weights."""

from ticketops.models.callback import TicketCallback
from ticketops.models.checkpoint import load
from ticketops.models.collators import CountingCollator, PackingCollator
from ticketops.models.cost import Cost, costs, latencies
from ticketops.models.drawing import Drawing, draw
from ticketops.models.export import Format, expand, export
from ticketops.models.handle import PatchHandle, patch
from ticketops.models.registry import check_supported, weight_counts
from ticketops.models.rewind import rewind
from ticketops.models.shared import SharedModel
from ticketops.models.shrink import put_back, shrink
from ticketops.models.support import describe

__all__ = [
    "Cost",
    "CountingCollator",
    "Drawing",
    "Format",
    "PackingCollator",
    "PatchHandle",
    "SharedModel",
    "TicketCallback",
    "check_supported",
    "costs",
    "describe",
    "draw",
    "expand",
    "export",
    "latencies",
    "load",
    "patch",
    "put_back",
    "rewind",
    "shrink",
    "weight_counts",
]
