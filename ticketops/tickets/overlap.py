"""The overlap of tickets, and that of tickets drawn at random."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from ticketops.tickets.ticket import Ticket


def jaccards(tickets: Sequence[Ticket]) -> np.ndarray:
    """Computes the Jaccard overlap of each pair of tickets, as `Ticket.jaccard` does.

    Args:
        tickets: of one shape, n of them.

    Returns:
        float64 [n, n].

    Raises:
        InputError: the shapes differ.
    """
    width = max(map(_width, tickets))
    for ticket in tickets:
        ticket.check(tickets[0].num_layers, tickets[0].num_heads)
    kept = np.stack([_structures(ticket, width) for ticket in tickets])
    # A neuron counts as a fraction of an FFN, as in Ticket.jaccard.
    worth = np.where(np.arange(kept.shape[1]) < tickets[0].head_mask.numel(), 1.0, 1 / width)
    both = (kept * worth) @ kept.T
    either = both.diagonal()[:, None] + both.diagonal() - both
    return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def mean_jaccard(tickets: Sequence[Ticket]) -> tuple[float, float]:
    """Averages the overlap over all pairs of several tickets.

    Args:
        tickets: of one shape, at least two.

    Returns:
        The mean of `Ticket.jaccard`, and what it would be if each were drawn at random, see `chance_jaccard`.

    Raises:
        InputError: the shapes differ.
    """
    # Chance depends on sizes alone, of which there are few.
    sizes = [(ticket.heads_pruned, ticket.ffns_pruned, ticket.neurons_pruned, _width(ticket)) for ticket in tickets]
    examples, numbers = dict(zip(sizes, tickets, strict=True)), Counter(sizes)
    chance = 0.0
    for one, other in itertools.combinations_with_replacement(numbers, 2):
        pairs = numbers[one] * (numbers[other] - 1) / 2 if one == other else numbers[one] * numbers[other]
        if pairs:
            chance += pairs * chance_jaccard(examples[one], examples[other])[0]
    every = jaccards(tickets)[np.triu_indices(len(tickets), 1)]
    return float(every.mean()), chance / every.size


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
    numbers = np.arange(max(0, one + other - places), min(one, other) + 1)
    # The hypergeometric distribution. That of scipy.stats would take a second to import.
    ways = _log_choices(one, numbers) + _log_choices(places - one, other - numbers) - _log_choices(places, other)
    return numbers, np.exp(ways), one + other


def _log_choices(places: int, numbers: Any) -> Any:
    """Returns the logarithm of the number of subsets of so many elements."""
    return special.gammaln(places + 1) - special.gammaln(numbers + 1) - special.gammaln(places - numbers + 1)


def _width(ticket: Ticket) -> int:
    return 1 if ticket.neuron_mask is None else ticket.neuron_mask.shape[1]


def _structures(ticket: Ticket, width: int) -> np.ndarray:
    """Returns 1.0 for each head, then for each of `width` neurons of each FFN, that a ticket keeps."""
    neurons = ticket.ffn_mask[:, None].expand(-1, width) if ticket.neuron_mask is None else ticket.neuron_mask
    return np.concatenate([ticket.head_mask.flatten().numpy(), neurons.flatten().numpy()]).astype(np.float64)


def _parts(ticket: Ticket, width: int) -> int:
    """Returns the number of neurons that a ticket keeps, in FFNs of `width` neurons."""
    neurons = ticket.neuron_mask
    return int(ticket.ffn_mask.sum()) * width if neurons is None else int(neurons.sum())
