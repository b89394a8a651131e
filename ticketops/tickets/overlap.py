"""How alike tickets are, and how alike they would be by chance."""

import math

import numpy as np

from ticketops.tickets.ticket import Ticket


def chance_jaccard(one: Ticket, other: Ticket) -> tuple[float, float]:
    """Tells how alike two tickets of these sizes would be if each were drawn at random, without replacement.

    Of N heads, of which the tickets keep a and b, they then share a hypergeometrically distributed number; likewise of
    the FFNs, or of the neurons where one of them prunes single ones. (That a layer keeps a head at least is not part of
    it; at light sparsity random tickets seldom need that.)

    Args:
        one: a ticket.
        other: of the same shape.

    Returns:
        Mean and standard deviation of `Ticket.jaccard`; exact.

    Raises:
        InputError: the shapes differ.
    """
    other.check(one.num_layers, one.num_heads)
    layers, heads = one.num_layers, one.num_layers * one.num_heads
    # Neurons count as parts of an FFN, as they do in the overlap itself.
    width = max(_width(one), _width(other))
    shared_heads, head_odds, either_heads = _shared(heads, *(heads - ticket.heads_pruned for ticket in (one, other)))
    shared_ffns, ffn_odds, either_ffns = _shared(layers * width, *(_parts(ticket, width) for ticket in (one, other)))
    odds = head_odds[:, None] * ffn_odds
    shared = shared_heads[:, None] + shared_ffns / width
    either = either_heads + either_ffns / width - shared
    values = np.divide(shared, either, out=np.ones(shared.shape), where=either > 0)
    mean = float((odds * values).sum())
    return mean, math.sqrt(max(float((odds * values**2).sum()) - mean**2, 0.0))


def _shared(places: int, one: int, other: int) -> tuple[np.ndarray, np.ndarray, int]:
    """How many of `places` two random choices may share, how likely that is, and how many they choose together."""
    # Imported late: patching a model has no use for it, and it takes a tenth of the time of all imports.
    from scipy.stats import hypergeom

    numbers = np.arange(max(0, one + other - places), min(one, other) + 1)
    return numbers, hypergeom.pmf(numbers, places, one, other), one + other


def _width(ticket: Ticket) -> int:
    return 1 if ticket.neuron_mask is None else ticket.neuron_mask.shape[1]


def _parts(ticket: Ticket, width: int) -> int:
    """How many neurons a ticket keeps of FFNs of this width."""
    neurons = ticket.neuron_mask
    return int(ticket.ffn_mask.sum()) * width if neurons is None else int(neurons.sum())
