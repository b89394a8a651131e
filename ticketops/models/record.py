"""The record, in a model's configuration, of the structures that its weights still have: `config.ticketops`, plain
JSON."""

import re
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.tickets import Ticket

KEY = "ticketops"
#: Key of the ticket applied to a patched model, in the same form. The weights also have what it prunes.
APPLIED = "ticketops_applied"
#: Key of transformers 4.x for `prune_heads`: layer -> removed heads. transformers 5 does not read it.
_OLD_KEY = "pruned_heads"
# More than any encoder has. Larger values are refused, because a loader would build that many layers.
MAX_LAYERS = MAX_HEADS = 1024


def head_dim(config: Any) -> int:
    """Returns the size of one attention head.

    Args:
        config: configuration of a model, shrunk or not; its `num_attention_heads` is the architecture's.
    """
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def num_neurons(config: Any) -> int:
    """Returns the width of the architecture's FFNs in neurons.

    Args:
        config: configuration of a model, shrunk or not.
    """
    return int(getattr(config, "intermediate_size", None) or config.hidden_dim)


def kept_neurons(ticket: Ticket, neurons: int) -> Tensor:
    """Returns the mask of kept neurons, also for a ticket that has only a mask of FFNs.

    Args:
        ticket: ticket, with or without a mask of neurons.
        neurons: number of neurons of an FFN in the architecture.

    Returns:
        Bool [layers, neurons]; all False in a layer whose FFN is pruned.
    """
    found = ticket.neuron_mask
    return ticket.ffn_mask[:, None].expand(-1, neurons) if found is None else found


def held_ticket(config: Any) -> Ticket:
    """Reads which heads, FFNs and neurons of the architecture a model's weights have.

    Args:
        config: configuration of a transformers model.

    Returns:
        The ticket that keeps these structures; the full ticket if nothing was removed.

    Raises:
        InputError: the record is damaged, or does not fit the architecture.
    """
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    record = getattr(config, KEY, None)
    if not (1 <= layers <= MAX_LAYERS and 1 <= heads <= MAX_HEADS):
        raise InputError(f"config.json claims {layers} layers x {heads} heads: ticketops serves 1 to {MAX_LAYERS}")
    pruned = getattr(config, _OLD_KEY, None)
    if record is None and pruned:
        record = _migrate(pruned, layers, heads)
    if record is None:
        return Ticket.full(layers, heads)
    return _read(record, config, KEY, "held")


def applied_ticket(config: Any) -> Ticket | None:
    """Reads which ticket was applied to a model when it was saved.

    Args:
        config: configuration of a transformers model whose record is valid (`held_ticket`).

    Returns:
        The ticket; None if none was applied.

    Raises:
        InputError: the note is damaged, or does not fit the architecture.
    """
    record = getattr(config, APPLIED, None)
    return None if record is None else read_applied(record, config)


def read_applied(record: Any, config: Any) -> Ticket:
    """Reads an applied ticket from the form that `record_of` returns.

    Args:
        record: plain JSON.
        config: configuration of the model.

    Raises:
        InputError: the record is damaged, or does not fit the architecture.
    """
    return _read(record, config, APPLIED, "applied")


def _read(record: Any, config: Any, key: str, kind: str) -> Ticket:
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    rows, ffns = (record.get("heads"), record.get("ffns")) if isinstance(record, dict) else (None, None)
    neurons = _neurons(record.get("neurons"), layers, config, key) if isinstance(record, dict) else None
    if (
        not _are_numbers(ffns, layers)
        or not isinstance(rows, list)
        or len(rows) != layers
        or not all(_are_numbers(row, heads) for row in rows)
    ):
        raise InputError(
            f'config.json\'s "{key}" does not list the heads of {layers} layers x {heads} heads and the layers with an '
            "FFN: export the model again"
        )
    head_mask = torch.zeros(layers, heads, dtype=torch.bool)
    for mask, row in zip(head_mask, rows, strict=True):
        mask[row] = True
    ffn_mask = torch.zeros(layers, dtype=torch.bool)
    ffn_mask[ffns] = True
    return Ticket(head_mask, ffn_mask, {"kind": kind}, neurons)


def write_record(config: Any, held: Ticket) -> None:
    """Records in a configuration which heads, FFNs and neurons the weights have. A whole model has no record.

    Args:
        config: configuration to change, in place.
        held: ticket that keeps the structures of the weights.
    """
    vars(config).pop(_OLD_KEY, None)
    if held.is_full:
        vars(config).pop(KEY, None)
    else:
        setattr(config, KEY, record_of(held))


def record_of(ticket: Ticket) -> dict[str, Any]:
    """Converts the masks of a ticket to plain JSON.

    Args:
        ticket: ticket, with or without a mask of neurons.

    Returns:
        `heads`: the indices of the kept heads of each layer; `ffns`: the layers with an FFN; and if the ticket has a
        mask of neurons, `neurons`: for each layer its mask as a hexadecimal number, whose highest bit is neuron 0.
    """
    heads = [row.nonzero().flatten().tolist() for row in ticket.head_mask]
    record = {"heads": heads, "ffns": ticket.ffn_mask.nonzero().flatten().tolist()}
    if ticket.neuron_mask is not None:
        record["neurons"] = [_to_hex(row) for row in ticket.neuron_mask]
    return record


def _neurons(rows: Any, layers: int, config: Any, key: str) -> Tensor | None:
    """Returns the mask of neurons in a record, or None."""
    if rows is None:
        return None
    width = num_neurons(config)
    digits = -(-width // 4)
    if (
        not isinstance(rows, list)
        or len(rows) != layers
        or not all(isinstance(row, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", row, re.ASCII) for row in rows)
        or any(int(row, 16) & (2 ** (4 * digits - width) - 1) for row in rows)
    ):
        raise InputError(
            f'config.json\'s "{key}" does not give the neurons of {layers} layers as {digits} digits each: export the '
            "model again"
        )
    bits = [f"{int(row, 16):0{4 * digits}b}"[:width] for row in rows]
    return torch.tensor([[bit == "1" for bit in row] for row in bits])


def _to_hex(row: Tensor) -> str:
    digits = -(-len(row) // 4)
    bits = "".join("1" if kept else "0" for kept in row.tolist()).ljust(4 * digits, "0")
    return f"{int(bits, 2):0{digits}x}"


def _migrate(pruned: Any, layers: int, heads: int) -> dict[str, Any]:
    """Converts `pruned_heads` of transformers 4.x to a record."""
    gone = {str(layer): pruned[layer] for layer in pruned} if isinstance(pruned, dict) else None
    if (
        gone is None
        or not gone.keys() <= {str(layer) for layer in range(layers)}
        or not all(
            isinstance(row, list) and all(type(h) is int and 0 <= h < heads for h in row) for row in gone.values()
        )
    ):
        raise InputError(f'config.json\'s "{_OLD_KEY}" does not fit {layers} layers x {heads} heads; correct it')
    rows = [[head for head in range(heads) if head not in gone.get(str(layer), ())] for layer in range(layers)]
    return {"heads": rows, "ffns": list(range(layers))}


def _are_numbers(values: Any, below: int) -> bool:
    """Returns True if `values` is a list of ascending ints in [0, below)."""
    return (
        isinstance(values, list)
        and all(type(value) is int and 0 <= value < below for value in values)
        and all(a < b for a, b in pairwise(values))
    )
