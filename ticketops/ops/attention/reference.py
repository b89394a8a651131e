"""Reference implementation of masked attention in plain PyTorch, one sequence at a time. All other backends are tested
against it."""

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ticketops.ops.dropout import kept, row_keys

#: Position keys and position queries, each [2 R + 1, H, D] or None, see ticketops.ops.attention.
Positions: TypeAlias = tuple[Tensor | None, Tensor | None]
#: What `backward` returns.
Gradients: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Returns None: the reference serves every device and dtype."""
    return None


def _active_heads(head_mask: Tensor | None, heads: int, device: torch.device) -> Tensor:
    return torch.arange(heads, device=device) if head_mask is None else head_mask.nonzero().squeeze(1)


def _row_keys(seed: Tensor | None, dropout_p: float, tokens: int, heads: Tensor, num_heads: int) -> Tensor:
    """Computes the dropout keys of all rows at once, which is faster than sequence by sequence. Empty without
    dropout."""
    return row_keys(seed, 0, tokens, heads, num_heads) if dropout_p else heads.new_empty((len(heads), 0))


def _by_head(x: Tensor, start: int, end: int, heads: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the rows of one sequence as [heads, tokens, D] in the dtype of the computation."""
    rows = x[start:end]
    if len(heads) != x.shape[1]:
        rows = rows.index_select(1, heads)
    return rows.transpose(0, 1).to(dtype)


def _spans(starts: Tensor, lengths: Tensor) -> list[tuple[int, int]]:
    return [(start, start + n) for start, n in zip(starts.tolist(), lengths.tolist(), strict=True) if n]


def _bias_of(bias: Tensor, heads: Tensor, queries: slice, keys: slice) -> Tensor:
    """Returns the term that a bias [H, 2 R + 1] adds to the scores of some heads: [h, queries, keys]."""
    place = [torch.arange(x.start, x.stop, device=bias.device) for x in (queries, keys)]
    return bias[heads][:, bias.shape[1] // 2 + place[1] - place[0][:, None]]


def _sum_by_distance(dscores: Tensor) -> Tensor:
    """Sums the gradient of scores [h, queries, keys] over the pairs of each distance. Returns [h, queries + keys - 1],
    from the last query and the first key on."""
    _, queries, keys = dscores.shape
    # Behind rows of one element less, each row begins one element earlier: the pairs of a distance are in one column.
    rows = functional.pad(dscores.flip(1), (0, queries)).flatten(1)[:, : queries * (queries + keys - 1)]
    return rows.unflatten(1, (queries, queries + keys - 1)).sum(1)


def _vectors_of(table: Tensor | None, heads: Tensor, n: int, dtype: torch.dtype) -> Tensor | None:
    """Returns the position vectors of some heads for a sequence of n tokens, [h, 2 n - 1, D]."""
    if table is None:
        return None
    reach = len(table) // 2
    return _by_head(table, reach - (n - 1), reach + n, heads, dtype)


def _places(n: int, device: torch.device) -> Tensor:
    """Returns the row of each query's and key's distance in `_vectors_of`, [queries, keys]."""
    tokens = torch.arange(n, device=device)
    return n - 1 + tokens - tokens[:, None]


def _add_positions(scores: Tensor, q: Tensor, k: Tensor, keys: Tensor | None, queries: Tensor | None) -> None:
    """Adds the products of queries and position keys and of keys and position queries to scores [h, n, n]."""
    if keys is None and queries is None:
        return
    places = _places(q.shape[1], q.device)
    if keys is not None:
        scores.add_((q @ keys.transpose(1, 2)).gather(2, places.expand_as(scores)))
    if queries is not None:
        products = (k @ queries.transpose(1, 2)).gather(2, places.t().expand_as(scores))
        scores.add_(products.transpose(1, 2))


def _of_distances(dscores: Tensor, places: Tensor) -> Tensor:
    """Computes the gradient of a row's products with all position vectors, [h, n, 2 n - 1], from that of those that it
    uses, [h, n, n]."""
    gradient = dscores.new_zeros((*dscores.shape[:2], 2 * dscores.shape[1] - 1))
    return gradient.scatter_(2, places.expand_as(dscores), dscores)


def _blocks(
    length: int, window: int | None, device: torch.device, real: Tensor | None
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """Divides a sequence into blocks of queries. Yields for each block its queries, the range of keys that any of them
    attends to, and a bool mask [queries, keys] that is True for pairs outside the window and for keys that are holes.
    Without a window there is one block; without holes either, the mask is None."""
    if window is None and real is None:
        yield slice(0, length), slice(0, length), None
        return
    window = length if window is None else window
    size = max(64, window)
    for first in range(0, length, size):
        queries = slice(first, min(first + size, length))
        keys = slice(max(0, first - window), min(queries.stop + window, length))
        distance = torch.arange(queries.start, queries.stop, device=device)[:, None] - torch.arange(
            keys.start, keys.stop, device=device
        )
        outside = distance.abs() > window
        yield queries, keys, outside if real is None else outside | ~real[keys]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    lengths: Tensor,
    head_mask: Tensor | None,
    seed: Tensor | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    bias: Tensor | None = None,
    positions: Positions = (None, None),
    real: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ticketops.ops.attention. Sums and softmax are in float32 (float64 for float64 inputs).

    Returns:
        out [T, H, D] in q's dtype; and the log-sum-exp of the scaled scores [T, H], infinity for holes.
    """
    tokens, num_heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.zeros((tokens, num_heads), dtype=dtype, device=q.device)
    heads = _active_heads(head_mask, num_heads, q.device)
    if not len(heads):
        return out, lse
    rows = _row_keys(seed, dropout_p, tokens, heads, num_heads)
    for start, end in _spans(starts, lengths):
        qs, ks, vs = (_by_head(x, start, end, heads, dtype) for x in (q, k, v))
        vectors = [_vectors_of(x, heads, end - start, dtype) for x in positions]
        for queries, keys, outside in _blocks(end - start, window, q.device, None if real is None else real[start:end]):
            first, last = start + queries.start, start + queries.stop
            # [h, queries, keys]
            weights = qs[:, queries] @ ks[:, keys].transpose(1, 2)
            _add_positions(weights, qs, ks, *vectors)
            weights.mul_(scale)
            if bias is not None:
                weights.add_(_bias_of(bias, heads, queries, keys))
            if outside is not None:
                weights.masked_fill_(outside, float("-inf"))
            row_lse = weights.logsumexp(-1)
            if real is not None:
                # So all weights of a hole are 0, here and in the backward pass.
                row_lse.masked_fill_(~real[first:last], float("inf"))
            weights.sub_(row_lse[:, :, None]).exp_()
            if dropout_p:
                weights.mul_(kept(rows[:, first:last], keys, dropout_p)).div_(1 - dropout_p)
            context = weights @ vs[:, keys]
            if head_mask is not None:
                context.mul_(head_mask[heads, None, None])
            out[first:last].index_copy_(1, heads, context.transpose(0, 1).to(q.dtype))
            lse[first:last].index_copy_(1, heads, row_lse.transpose(0, 1))
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    lengths: Tensor,
    head_mask: Tensor | None,
    seed: Tensor | None,
    max_length: int,
    scale: float,
    dropout_p: float,
    window: int | None = None,
    bias: Tensor | None = None,
    positions: Positions = (None, None),
    real: Tensor | None = None,
) -> Gradients:
    """Computes the gradients of `forward` and the importance of each sequence and head.

    With P = softmax(S), R = keep / (1 - p), W = P * R, O = W V, out = m O and dO = m dOut:
        dV = W^T dO,   dP = (dO V^T) * R,   delta = rowsum(dO * O) = rowsum(dOut * out),
        dS = P * (dP - delta),   dQ = scale dS K,   dK = scale dS^T Q,   dL/dm = sum <dOut, O> = sum delta / m,
    and the gradient of the bias is the sum of dS over all pairs of one distance. With position keys K' and position
    queries Q', where S = scale (<q_i, k_j> + <q_i, K'_(j - i)> + <k_j, Q'_(j - i)>):
        dq_i += scale sum_j dS_ij K'_(j - i),   dK'_d = scale sum_i dS_i(i + d) q_i,   and likewise for k and Q'.

    Returns:
        dq, dk and dv, each [T, H, D]; the sums of <dOut, O> and of |<dOut, O>| over each sequence, both [B, H]; and the
        gradients of the bias, the position keys and the position queries in the dtype of the computation, None for
        each that is not there.
    """
    num_heads = q.shape[1]
    dtype = lse.dtype
    dq, dk, dv = (torch.zeros(q.shape, dtype=q.dtype, device=q.device) for _ in range(3))
    signed = torch.zeros((len(lengths), num_heads), dtype=dtype, device=q.device)
    absolute = torch.zeros_like(signed)
    dbias, dkeys, dqueries = (None if x is None else signed.new_zeros(x.shape) for x in (bias, *positions))
    heads = _active_heads(head_mask, num_heads, q.device)
    if not len(heads):
        return dq, dk, dv, signed, absolute, dbias, dkeys, dqueries
    rows = _row_keys(seed, dropout_p, q.shape[0], heads, num_heads)
    # [T, H]
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1)
    mask_gradient = delta
    if head_mask is not None:
        mask_gradient = torch.where(head_mask == 0, 0.0, delta / head_mask)
    for b, (start, n) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if not n:
            continue
        end = start + n
        signed[b] = mask_gradient[start:end].sum(0)
        absolute[b] = mask_gradient[start:end].abs().sum(0)
        qs, ks, vs, do = (_by_head(x, start, end, heads, dtype) for x in (q, k, v, dout))
        if head_mask is not None:
            do = do * head_mask[heads, None, None]
        row_lse = lse[start:end].index_select(1, heads).transpose(0, 1)
        row_delta = delta[start:end].index_select(1, heads).transpose(0, 1)
        vectors = [_vectors_of(x, heads, n, dtype) for x in positions]
        sums = () if window is None and real is None else tuple(torch.zeros_like(x) for x in (qs, ks, vs))
        for queries, keys, outside in _blocks(n, window, q.device, None if real is None else real[start:end]):
            # [h, queries, keys]
            weights = qs[:, queries] @ ks[:, keys].transpose(1, 2)
            _add_positions(weights, qs, ks, *vectors)
            weights.mul_(scale)
            if bias is not None:
                weights.add_(_bias_of(bias, heads, queries, keys))
            if outside is not None:
                weights.masked_fill_(outside, float("-inf"))
            weights.sub_(row_lse[:, queries, None]).exp_()
            dscores = do[:, queries] @ vs[:, keys].transpose(1, 2)
            dropped = weights
            if dropout_p:
                keep = kept(rows[:, start + queries.start : start + queries.stop], keys, dropout_p)
                dropped = (weights * keep).div_(1 - dropout_p)
                dscores.mul_(keep).div_(1 - dropout_p)
            dscores.sub_(row_delta[:, queries, None]).mul_(weights)
            if bias is not None and dbias is not None:
                by_distance = _sum_by_distance(dscores)
                first = bias.shape[1] // 2 + keys.start - (queries.stop - 1)
                dbias[:, first : first + by_distance.shape[1]].index_add_(0, heads, by_distance)
            dscores.mul_(scale)
            parts = (
                dscores @ ks[:, keys],
                dscores.transpose(1, 2) @ qs[:, queries],
                dropped.transpose(1, 2) @ do[:, queries],
            )
            if outside is None:
                sums = parts
            _add_position_gradients(dscores, qs, ks, vectors, parts[:2], [dkeys, dqueries], heads)
            for total, some, part in zip(sums, (queries, keys, keys), parts, strict=True):
                if outside is not None:
                    total[:, some] += part
        for gradient, value in zip((dq, dk, dv), sums, strict=True):
            gradient[start:end].index_copy_(1, heads, value.transpose(0, 1).to(q.dtype))
    return dq, dk, dv, signed, absolute, dbias, dkeys, dqueries


def _add_position_gradients(
    dscores: Tensor,
    q: Tensor,
    k: Tensor,
    vectors: list[Tensor | None],
    gradients: tuple[Tensor, ...],
    dpositions: list[Tensor | None],
    heads: Tensor,
) -> None:
    """Adds what a sequence's position vectors give to the gradients of its q and k and to those of the tables."""
    if vectors == [None, None]:
        return
    n = q.shape[1]
    places = _places(n, q.device)
    sides = ((dscores, places, q), (dscores.transpose(1, 2), places.t(), k))
    for (dproducts, at, x), table, dx, dtable in zip(sides, vectors, gradients, dpositions, strict=True):
        if table is None or dtable is None:
            continue
        by_distance, middle = _of_distances(dproducts, at), len(dtable) // 2
        dx.add_(by_distance @ table)
        dtable[middle - (n - 1) : middle + n].index_add_(1, heads, (by_distance.transpose(1, 2) @ x).transpose(0, 1))
