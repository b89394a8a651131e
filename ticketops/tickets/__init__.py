"""Importance scores, tickets, and pruning: data and arithmetic, independent of any model. Imports lazily."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ticketops.tickets.importance import Granularity, Importance
    from ticketops.tickets.levels import level_counts
    from ticketops.tickets.overlap import chance_jaccard, jaccards, mean_jaccard
    from ticketops.tickets.paper import PAPER_LEVELS, PAPER_WEIGHTS
    from ticketops.tickets.pruning import Kind, prune
    from ticketops.tickets.ticket import Ticket
    from ticketops.tickets.weights import WeightCounts

_HOMES = {
    "PAPER_LEVELS": "paper",
    "PAPER_WEIGHTS": "paper",
    "Granularity": "importance",
    "Importance": "importance",
    "Kind": "pruning",
    "Ticket": "ticket",
    "WeightCounts": "weights",
    "chance_jaccard": "overlap",
    "jaccards": "overlap",
    "level_counts": "levels",
    "mean_jaccard": "overlap",
    "prune": "pruning",
}

__all__ = [
    "PAPER_LEVELS",
    "PAPER_WEIGHTS",
    "Granularity",
    "Importance",
    "Kind",
    "Ticket",
    "WeightCounts",
    "chance_jaccard",
    "jaccards",
    "level_counts",
    "mean_jaccard",
    "prune",
]


def __getattr__(name: str) -> Any:
    # Plans and reports of runs, which read no ticket, should not wait for torch.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
