"""Expected overlap of two tickets if they were drawn at random."""

import math

import numpy as np

from ticketops.tickets.ticket import Ticket


def chance_jaccard(one: Ticket, other: Ticket) -> tuple[float, float]:
    """Computes the Jaccard overlap that two tickets of these sizes would have if each were drawn at random, without
    replacement.

    If the tickets keep a and b of N heads, the number of heads that they share has a hypergeometric distribution. The
    same holds for FFNs, or for neurons if one of the tickets prunes single ones. (The minimum of one head per layer is
    ignored; at light sparsity it seldom matters.)

    Args:
        one: a ticket.
        other: a ticket of the same shape.

    Returns:
        Mean and standard deviation of `Ticket.jaccard`; exact.

    Raises:
        InputError: the shapes differ.
    """
    other.check(one.num_layers, one.num_heads)
    layers, heads = one.num_layers, one.num_layers * one.num_heads
    # A neuron counts as a fraction of an FFN, as in Ticket.jaccard.
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
    """Returns the possible numbers of elements that two random subsets of `places` share, their probabilities, and the
    sum of the subsets' sizes."""
    # Imported on first use: patching a model does not need it, and it takes a tenth of the time of all imports.
    from scipy.stats import hypergeom

    numbers = np.arange(max(0, one + other - places), min(one, other) + 1)
    return numbers, hypergeom.pmf(numbers, places, one, other), one + other


def _width(ticket: Ticket) -> int:
    return 1 if ticket.neuron_mask is None else ticket.neuron_mask.shape[1]


def _parts(ticket: Ticket, width: int) -> int:
    """Returns the number of neurons that a ticket keeps, in FFNs of `width` neurons."""
    neurons = ticket.neuron_mask
    return int(ticket.ffn_mask.sum()) * width if neurons is None else int(neurons.sum())
