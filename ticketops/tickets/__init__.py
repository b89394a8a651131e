"""Importance scores, tickets, and pruning: data and arithmetic, independent of any model."""

from ticketops.tickets.importance import Granularity, Importance
from ticketops.tickets.overlap import chance_jaccard
from ticketops.tickets.paper import PAPER_LEVELS, PAPER_WEIGHTS
from ticketops.tickets.prune import Kind, level_counts, prune
from ticketops.tickets.ticket import Ticket
from ticketops.tickets.weights import WeightCounts

__all__ = [
    "PAPER_LEVELS",
    "PAPER_WEIGHTS",
    "Granularity",
    "Importance",
    "Kind",
    "Ticket",
    "WeightCounts",
    "chance_jaccard",
    "level_counts",
    "prune",
]
