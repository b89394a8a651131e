"""Ticket: the heads, FFN sublayers and FFN neurons that a pruned encoder keeps."""

import json
import os
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.text import count, structures
from ticketops.tickets import storage
from ticketops.tickets.grid import grid
from ticketops.tickets.weights import WeightCounts


class Ticket:
    """The set of structures that a pruned encoder keeps. Immutable; two tickets are equal if they keep the same
    structures.

    An FFN without any kept neuron is pruned as a whole, its output bias included.

    Args:
        head_mask: bool [layers, heads], True if the head is kept; copied.
        ffn_mask: bool [layers], True if the FFN is kept; copied.
        metadata: origin of the ticket, as JSON values; copied, and ignored in comparisons.
        neuron_mask: bool [layers, neurons], True if the neuron is kept; copied. Neurons of a pruned FFN are ignored.
            None keeps all neurons of kept FFNs.

    Raises:
        InputError: a mask is not a bool tensor, the shapes do not fit each other, or the metadata is not JSON.
    """

    __slots__ = ("_ffn_mask", "_head_mask", "_metadata", "_neuron_mask")

    def __init__(
        self,
        head_mask: Tensor,
        ffn_mask: Tensor,
        metadata: Mapping[str, Any] | None = None,
        neuron_mask: Tensor | None = None,
    ) -> None:
        for name, mask in (("head_mask", head_mask), ("ffn_mask", ffn_mask), ("neuron_mask", neuron_mask)):
            if name == "neuron_mask" and mask is None:
                continue
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(f"{name} is {kind}, not a torch.bool tensor; convert it, True for kept")
        if head_mask.ndim != 2 or head_mask.numel() == 0 or ffn_mask.shape != head_mask.shape[:1]:
            shapes = f"head_mask {list(head_mask.shape)} and ffn_mask {list(ffn_mask.shape)}"
            raise InputError(f"{shapes} do not describe an encoder; they must be [layers, heads] and [layers]")
        if neuron_mask is not None and (neuron_mask.ndim != 2 or len(neuron_mask) != len(head_mask)):
            raise InputError(
                f"neuron_mask {list(neuron_mask.shape)} is not of {len(head_mask)} layers; it must be [layers, neurons]"
            )
        if metadata is not None and not isinstance(metadata, Mapping):
            raise InputError(f"metadata is {type(metadata).__name__}, not a mapping; give a dict of JSON values")
        self._head_mask = head_mask.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._ffn_mask = ffn_mask.detach().cpu().clone(memory_format=torch.contiguous_format)
        self._neuron_mask: Tensor | None = None
        if neuron_mask is not None:
            # Canonical form, so that equal tickets have equal masks: neurons of pruned FFNs are False, and a mask that
            # prunes no neuron is None.
            neurons = neuron_mask.detach().cpu() & self._ffn_mask[:, None]
            self._ffn_mask &= neurons.any(1)
            self._neuron_mask = None if neurons[self._ffn_mask].all() else neurons.contiguous()
        # Stored as text, so that no caller can change it.
        self._metadata = storage.to_json(dict(metadata or {}))

    @classmethod
    def full(cls, layers: int, heads: int) -> "Ticket":
        """Makes the ticket that keeps everything.

        Args:
            layers: number of encoder layers.
            heads: number of heads in each.

        Returns:
            The full ticket.

        Raises:
            InputError: a number is below 1.
        """
        if min(layers, heads) < 1:
            raise InputError(f"{layers} layers x {heads} heads is not an encoder; both must be at least 1")
        return cls(torch.ones(layers, heads, dtype=torch.bool), torch.ones(layers, dtype=torch.bool), {"kind": "full"})

    @property
    def head_mask(self) -> Tensor:
        """Bool [layers, heads] on the CPU, True where the head is kept; a copy."""
        return self._head_mask.clone()

    @property
    def ffn_mask(self) -> Tensor:
        """Bool [layers] on the CPU, True where the FFN is kept; a copy."""
        return self._ffn_mask.clone()

    @property
    def neuron_mask(self) -> Tensor | None:
        """Bool [layers, neurons] on the CPU, True where the neuron is kept; all False in a pruned FFN; a copy. None if
        every kept FFN keeps all of its neurons."""
        return None if self._neuron_mask is None else self._neuron_mask.clone()

    @property
    def ffn_shares(self) -> Tensor:
        """Float64 [layers] on the CPU: the share of each FFN's neurons that is kept, 0 for a pruned FFN."""
        return self._ffn_mask.double() if self._neuron_mask is None else self._neuron_mask.double().mean(1)

    @property
    def metadata(self) -> Mapping[str, Any]:
        """Origin of the ticket, as JSON values; a read-only copy."""
        return MappingProxyType(json.loads(self._metadata))

    @property
    def num_layers(self) -> int:
        """Number of encoder layers."""
        return self._head_mask.shape[0]

    @property
    def num_heads(self) -> int:
        """Number of heads in each layer, kept and pruned."""
        return self._head_mask.shape[1]

    @property
    def heads_pruned(self) -> int:
        """Number of heads pruned in all layers."""
        return int((~self._head_mask).sum())

    @property
    def ffns_pruned(self) -> int:
        """Number of FFN sublayers pruned."""
        return int((~self._ffn_mask).sum())

    @property
    def neurons_pruned(self) -> int:
        """Number of neurons pruned in the FFNs that are kept."""
        return 0 if self._neuron_mask is None else int((~self._neuron_mask[self._ffn_mask]).sum())

    @property
    def is_full(self) -> bool:
        """True if nothing is pruned."""
        return self._neuron_mask is None and self.heads_pruned == 0 and self.ffns_pruned == 0

    def described(self, metadata: Mapping[str, Any]) -> "Ticket":
        """Returns an equal ticket with other metadata.

        Args:
            metadata: JSON values that replace this ticket's metadata.

        Returns:
            The new ticket.

        Raises:
            InputError: the metadata is not JSON.
        """
        return Ticket(self._head_mask, self._ffn_mask, metadata, self._neuron_mask)

    def check(self, layers: int, heads: int, neurons: int | None = None) -> None:
        """Checks that the ticket fits an encoder of this shape.

        Args:
            layers: number of encoder layers.
            heads: number of heads per layer.
            neurons: number of neurons per FFN; None does not check it.

        Raises:
            InputError: the ticket is for another shape.
        """
        if (self.num_layers, self.num_heads) != (layers, heads):
            raise InputError(
                f"a ticket for {count(self.num_layers, 'layer')} x {count(self.num_heads, 'head')} does not fit "
                f"{count(layers, 'layer')} x {count(heads, 'head')}; use a ticket made for this architecture"
            )
        mine = self._neuron_mask
        if mine is not None and neurons is not None and mine.shape[1] != neurons:
            raise InputError(
                f"a ticket for FFNs of {count(mine.shape[1], 'neuron')} does not fit FFNs of {neurons}; use a "
                "ticket made for this architecture"
            )

    def union(self, other: "Ticket") -> "Ticket":
        """Returns the ticket of all structures that at least one of two tickets keeps.

        Args:
            other: a ticket of the same shape.

        Returns:
            The union; also written `a | b`.

        Raises:
            InputError: the shapes differ.
        """
        neurons = self._neurons(other)
        return Ticket(
            self._head_mask | other._head_mask,
            self._ffn_mask | other._ffn_mask,
            {"kind": "union"},
            neurons and neurons[0] | neurons[1],
        )

    def intersection(self, other: "Ticket") -> "Ticket":
        """Returns the ticket of all structures that both tickets keep.

        Args:
            other: a ticket of the same shape.

        Returns:
            The intersection; also written `a & b`.

        Raises:
            InputError: the shapes differ.
        """
        neurons = self._neurons(other)
        return Ticket(
            self._head_mask & other._head_mask,
            self._ffn_mask & other._ffn_mask,
            {"kind": "intersection"},
            neurons and neurons[0] & neurons[1],
        )

    def jaccard(self, other: "Ticket") -> float:
        """Computes the Jaccard index of two tickets: structures that both keep over structures that either keeps.

        Args:
            other: a ticket of the same shape.

        Returns:
            A number in [0, 1]; 1 if neither ticket keeps anything. A head and an FFN count 1 each, an FFN with some of
            its neurons that fraction of 1.

        Raises:
            InputError: the shapes differ.
        """
        either = (self | other)._kept
        return (self & other)._kept / either if either else 1.0

    def weights_remaining(self, counts: WeightCounts, embeddings: bool = True) -> float:
        """Computes the share of weights that the ticket keeps.

        Args:
            counts: numbers of weights of the model.
            embeddings: True for the share of all weights, False for the share of the encoder layers' weights.

        Returns:
            A fraction in [0, 1].

        Raises:
            InputError: the ticket removes more weights than there are, so the counts are of another model.
        """
        whole = counts.total if embeddings else counts.encoder
        removed = self.heads_pruned * counts.head + self.ffns_pruned * counts.ffn
        removed += self.neurons_pruned * counts.neuron
        if removed > whole:
            raise InputError(f"the ticket prunes {removed} of {whole} weights; use the counts of the model it is for")
        return (whole - removed) / whole

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the ticket to one safetensors file, atomically.

        Args:
            path: the file to write, conventionally `*.safetensors`.

        Raises:
            StoreError: the file cannot be written.
        """
        masks = {"head_mask": self._head_mask, "ffn_mask": self._ffn_mask}
        if self._neuron_mask is not None:
            masks["neuron_mask"] = self._neuron_mask
        storage.save(path, "ticket", masks, {"metadata": dict(self.metadata)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Ticket":
        """Reads a ticket that `save` wrote. The file is validated, and nothing in it is executed.

        Args:
            path: the file to read.

        Returns:
            The ticket, with its metadata.

        Raises:
            InputError: the file is missing, damaged, too large, not a ticket, or of an unknown version.
        """
        layout = {"head_mask": ("BOOL", 2), "ffn_mask": ("BOOL", 1)}
        return storage.load(
            path,
            "ticket",
            layout,
            lambda masks, fields: cls(**masks, metadata=fields["metadata"]),
            optional={"neuron_mask": ("BOOL", 2)},
        )

    @property
    def _kept(self) -> float:
        return float(self._head_mask.sum() + self.ffn_shares.sum())

    def _neurons(self, other: "Ticket") -> tuple[Tensor, Tensor] | None:
        """Checks that two tickets fit each other, and returns the neuron masks of both; None if neither prunes single
        neurons."""
        width = next((t._neuron_mask.shape[1] for t in (self, other) if t._neuron_mask is not None), None)
        other.check(self.num_layers, self.num_heads, width)
        if width is None:
            return None

        def spread(ticket: Ticket) -> Tensor:
            found = ticket._neuron_mask
            return ticket._ffn_mask[:, None].expand(-1, width) if found is None else found

        return spread(self), spread(other)

    def __or__(self, other: "Ticket") -> "Ticket":
        return self.union(other)

    def __and__(self, other: "Ticket") -> "Ticket":
        return self.intersection(other)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ticket):
            return NotImplemented
        pairs = zip(self._masks, other._masks, strict=True)
        return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)

    def __hash__(self) -> int:
        masks = (None if mask is None else mask.numpy().tobytes() for mask in self._masks)
        return hash((self._head_mask.shape, *masks))

    @property
    def _masks(self) -> tuple[Tensor | None, ...]:
        return self._head_mask, self._ffn_mask, self._neuron_mask

    def __repr__(self) -> str:
        neurons = None if self._neuron_mask is None else self.neurons_pruned
        pruned = f"{structures(self.heads_pruned, self.ffns_pruned, neurons)} pruned"
        return f"<Ticket: {count(self.num_layers, 'layer')} x {count(self.num_heads, 'head')}, {pruned}>"

    def __str__(self) -> str:
        width = max(len("heads"), 2 * self.num_heads - 1)
        neurons = [""] * self.num_layers
        pruned = f"{self.ffns_pruned} of {count(self.num_layers, 'FFN')} pruned"
        if self._neuron_mask is not None:
            each = self._neuron_mask.shape[1]
            neurons = [f"  {kept}/{each}" for kept in self._neuron_mask.sum(1).tolist()]
            left = int(self._ffn_mask.sum()) * each
            pruned += f", and {self.neurons_pruned} of the {count(left, 'neuron')} of the others"
        rows = [f"layer  {'heads':<{width}}  FFN{'  neurons' * (self._neuron_mask is not None)}"]
        for layer, (heads, ffn) in enumerate(zip(self._head_mask.tolist(), self._ffn_mask.tolist(), strict=True)):
            blocks = " ".join("■" if kept else "·" for kept in heads)
            rows.append(
                f"{layer:>5}  {blocks:<{width}}  {' ■' if ffn else ' ·'}{neurons[layer] and ' '}{neurons[layer]}"
            )
        heads_total = self.num_layers * self.num_heads
        rows.append(f"■ kept, · pruned: {self.heads_pruned} of {count(heads_total, 'head')} and {pruned}")
        return "\n".join(rows)

    def _repr_html_(self) -> str:
        origin = ", ".join(f"{name} {value}" for name, value in self.metadata.items())
        notes = ["blue: kept, grey: pruned; a lighter FFN keeps a part of its neurons", *([origin] if origin else [])]
        return grid(self._head_mask.double().tolist(), self.ffn_shares.tolist(), repr(self).strip("<>"), notes)
