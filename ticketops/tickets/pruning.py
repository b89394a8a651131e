"""Pruning: makes winning, losing and random tickets of any sparsity from importance scores."""

import operator
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.tickets.importance import Importance
from ticketops.tickets.levels import level_counts
from ticketops.tickets.ticket import Ticket

Kind = Literal["winning", "losing", "random"]


def prune(
    importance: Importance,
    sparsity: float | None = None,
    *,
    counts: tuple[int, int] | None = None,
    kind: Kind = "winning",
    min_heads: int = 1,
    seed: int = 0,
    neurons: bool = False,
) -> Ticket:
    """Makes a ticket by pruning the least important structures (winning), the most important (losing) or random ones.

    All heads are in one ranking by layer-normalised score, all FFNs in another; equal scores are ordered by layer, then
    head. A winning ticket prunes from the lower end of the ranking, a losing one from the upper end, a random one along
    a permutation that `seed` determines. A head is skipped if its layer has only `min_heads` left. So the counts are
    exact, and for the same `kind` and `seed` a sparser ticket is a subset of a denser one.

    If winning and losing tickets prune n of N heads each, they prune no common head as long as 2 n <= N and no head is
    skipped. Each skipped head moves its order one place towards the other. So with m = `min_heads` of H heads per layer
    they have no pruned head in common while 2 (n + m floor(n / (H - m))) <= N, and at most the excess over N after
    that. For 12 x 12 heads and m = 1 this holds up to n = 66. Pruned FFNs are disjoint up to half of them.

    With `neurons`, single neurons are pruned instead of whole FFNs, along one ranking of all neurons by
    layer-normalised score. There is no minimum per FFN: without neurons the whole FFN is pruned.

    Args:
        importance: the scores; for `random` only their shape is read.
        sparsity: share of heads and of FFNs to prune, in [0, 1), see `level_counts`; pass this or `counts`.
        counts: numbers of heads and of FFNs (with `neurons`: of neurons) to prune; pass this or `sparsity`.
        kind: `winning`, `losing` or `random`.
        min_heads: minimum number of heads that every layer keeps; there is no minimum for FFNs.
        seed: seed of the random permutation, in [0, 2**32).
        neurons: True prunes single neurons instead of whole FFNs; requires an importance recorded with `neurons`.

    Returns:
        The ticket; its metadata records the arguments.

    Raises:
        InputError: an argument is out of range, more structures are to be pruned than allowed, or scores are missing or
            not finite.

    Source: arXiv 2105.12002, section 3; neurons go beyond the paper.
    """
    layers, heads = importance.num_layers, importance.num_heads
    if neurons and importance.num_neurons is None:
        raise InputError("this importance has no neurons; record with record_importance(neurons=True)")
    width = importance.num_neurons if neurons else None
    if sparsity is not None and counts is None:
        counts = level_counts(sparsity, layers, heads, width)
    elif sparsity is not None or counts is None:
        raise InputError("prune takes a sparsity or counts; give exactly one of them")
    if kind not in get_args(Kind):
        raise InputError(f"kind {kind!r} is unknown; use one of {', '.join(get_args(Kind))}")
    if min_heads not in range(heads + 1):
        raise InputError(f"min_heads {min_heads} is impossible with {heads} heads a layer; use 0 to {heads}")
    try:
        num_heads, num_ffns = map(operator.index, counts)
    except (TypeError, ValueError):
        raise InputError(
            f"counts {counts!r} are not two whole numbers; give those of heads and of FFNs, as (72, 5)"
        ) from None
    what_ffns = "FFNs" if width is None else "neurons"
    ranges = (("heads", num_heads, layers * (heads - min_heads)), (what_ffns, num_ffns, layers * (width or 1)))
    for what, count, most in ranges:
        if count not in range(most + 1):
            floor = f" while each of {layers} layers keeps {min_heads}" if what == "heads" else ""
            raise InputError(f"cannot prune {count} {what}{floor}; the maximum is {most}")
    head_order, ffn_order = _orders(importance, kind, seed, width)
    ffn_mask = torch.ones(layers * (width or 1), dtype=torch.bool)
    ffn_mask[ffn_order[:num_ffns]] = False
    metadata: dict[str, Any] = {
        "kind": kind,
        "sparsity": None if sparsity is None else float(sparsity),
        "counts": [num_heads, num_ffns],
        "min_heads": min_heads,
        "granularity": importance.granularity,
    }
    if kind == "random":
        metadata["seed"] = seed
    head_mask = _head_mask(head_order, num_heads, layers, heads, min_heads)
    if width is None:
        return Ticket(head_mask, ffn_mask, metadata)
    whole = torch.ones(layers, dtype=torch.bool)
    return Ticket(head_mask, whole, {**metadata, "neurons": True}, ffn_mask.view(layers, width))


def _orders(importance: Importance, kind: Kind, seed: int, width: int | None) -> tuple[Tensor, Tensor]:
    """Returns heads (numbered layer * heads + head) and FFNs (or neurons) in the order in which they are pruned."""
    layers, heads = importance.num_layers, importance.num_heads
    if kind == "random":
        if not 0 <= seed < 2**32:
            raise InputError(f"seed {seed} is outside [0, 2**32); use a smaller one")
        # RandomState, because numpy guarantees its stream for ever: a seed gives the same ticket in every version.
        generator = np.random.RandomState(seed)
        heads_first = torch.from_numpy(generator.permutation(layers * heads))
        return heads_first, torch.from_numpy(generator.permutation(layers * (width or 1)))
    ranked = [(scores.cpu(), order.cpu()) for scores, order in importance.rank(neurons=width is not None)]
    for name, (scores, _) in zip(("head", "FFN" if width is None else "neuron"), ranked, strict=True):
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).sum())
            raise InputError(
                f"{bad} of {scores.numel()} {name} scores are NaN or infinite: a gradient overflowed; record "
                "again in float32, or with record_importance(skip_overflow=True)"
            )
    ascending = [order for _, order in ranked]
    # Losing is the exact reverse of winning, ties included, so that both do not prune the same structures.
    head_order, ffn_order = ascending if kind == "winning" else [order.flip(0) for order in ascending]
    return head_order, ffn_order


def _head_mask(order: Tensor, count: int, layers: int, heads: int, min_heads: int) -> Tensor:
    mask = torch.ones(layers, heads, dtype=torch.bool)
    spare = [heads - min_heads] * layers
    for index in order.tolist():
        if count == 0:
            break
        layer, head = divmod(index, heads)
        if spare[layer]:
            mask[layer, head] = False
            spare[layer] -= 1
            count -= 1
    return mask
