"""Importance: how much the loss would change with each mask, accumulated over backward passes."""

import os
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import importance as ops
from ticketops.ops.importance.reference import normalized
from ticketops.text import count, html
from ticketops.tickets import storage
from ticketops.tickets.grid import grid

Granularity = Literal["example", "token", "batch"]


class Importance:
    """Running averages of |dL/d mask| for every head, every FFN and, optionally, every neuron.

    The granularity says where the absolute value is taken: per example (the paper's formula), per token (the authors'
    code) or per batch. L is a mean over the batch, so per-example and per-token terms of a batch of B examples are
    multiplied by B.

    Args:
        layers: number of encoder layers.
        heads: number of heads in each.
        granularity: unit that the absolute value is taken of: `example`, `token` or `batch`.
        sequences_per_example: number of consecutive rows of a batch that make up one example, e.g. the choices of a
            multiple-choice model.
        metadata: JSON values to save with the scores.
        neurons: number of neurons in each FFN, to record their importance too; None does not.

    Attributes:
        skipped: number of batches that a recording left out because a gradient was not finite.

    Raises:
        InputError: an argument is out of range.

    Source: arXiv 2105.12002, section 3; Michel et al., arXiv 1905.10650.
    """

    def __init__(
        self,
        layers: int,
        heads: int,
        granularity: Granularity = "example",
        sequences_per_example: int = 1,
        metadata: Mapping[str, Any] | None = None,
        neurons: int | None = None,
    ) -> None:
        if granularity not in get_args(Granularity):
            raise InputError(f"granularity {granularity!r} is unknown; use one of {', '.join(get_args(Granularity))}")
        numbers = {"layers": layers, "heads": heads, "sequences_per_example": sequences_per_example}
        for name, value in (numbers if neurons is None else {**numbers, "neurons": neurons}).items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}; it must be an integer of at least 1")
        self.num_layers = layers
        self.num_heads = heads
        self.num_neurons = neurons
        self.granularity = granularity
        self.sequences_per_example = sequences_per_example
        self.metadata: dict[str, Any] = dict(metadata or {})
        self.skipped = 0
        # Function that adds the pending terms of an active recording; None without one.
        self._add_pending: Callable[[], None] | None = None
        self._heads = _Sums("head", torch.zeros(layers, heads, dtype=torch.float64), [0] * layers)
        self._ffns = _Sums("FFN", torch.zeros(layers, dtype=torch.float64), [0] * layers)
        # [layers, 0] if neurons are not recorded.
        self._neurons = _Sums("neuron", torch.zeros(layers, neurons or 0, dtype=torch.float64), [0] * layers)

    def add_head(self, layer: int, signed: Tensor | None, absolute: Tensor | None, *, defer: bool = False) -> None:
        """Adds the heads of one layer and one batch, without waiting for the GPU.

        Args:
            layer: the layer, from 0.
            signed: floating [B, heads]: per sequence, the sum over its tokens of <dL/dOut, Out>; read at granularity
                `example` and `batch`.
            absolute: floating [B, heads]: the same sum of absolute values; read at granularity `token`.
            defer: the tensors do not change any more, so they may be read later: on a GPU those of all layers together,
                in one launch.

        Raises:
            InputError: the tensor that the granularity needs is missing or has another shape.
        """
        self._add(self._heads, layer, signed, absolute, defer)

    def add_ffn(self, layer: int, signed: Tensor | None, absolute: Tensor | None, *, defer: bool = False) -> None:
        """Adds the FFN of one layer and one batch, without waiting for the GPU.

        Args:
            layer: the layer, from 0.
            signed: floating [B], as in `add_head`.
            absolute: floating [B], as in `add_head`.
            defer: as in `add_head`.

        Raises:
            InputError: the tensor that the granularity needs is missing or has another shape.
        """
        self._add(self._ffns, layer, signed, absolute, defer)

    def add_neuron(self, layer: int, signed: Tensor | None, absolute: Tensor | None) -> None:
        """Adds the neurons of one layer's FFN and one batch, without waiting for the GPU.

        Args:
            layer: the layer, from 0.
            signed: floating [B, neurons], as in `add_head`.
            absolute: floating [B, neurons], as in `add_head`.

        Raises:
            InputError: the tensor that the granularity needs is missing or has another shape.
        """
        self._add(self._neurons, layer, signed, absolute, defer=False)

    @property
    def head(self) -> Tensor:
        """The heads' averages so far, float64 [layers, heads] on the CPU; InputError where a layer has none."""
        return self._average(self._heads)

    @property
    def ffn(self) -> Tensor:
        """The FFNs' averages so far, float64 [layers] on the CPU; InputError where a layer has none."""
        return self._average(self._ffns)

    @property
    def neuron(self) -> Tensor:
        """The neurons' averages so far, float64 [layers, neurons] on the CPU; InputError where a layer has none."""
        if self.num_neurons is None:
            raise InputError("no neuron importance was recorded; record with record_importance(neurons=True)")
        return self._average(self._neurons)

    def normalized_head(self) -> Tensor:
        """Divides the head scores of each layer by their l2 norm, so that they are comparable across layers.

        Returns:
            float64 [layers, heads] on the CPU; a layer of zeros stays zeros.

        Raises:
            InputError: a layer has no scores.
        """
        return normalized(self.head)

    def normalized_neuron(self) -> Tensor:
        """Divides the neuron scores of each layer by their l2 norm, as `normalized_head` does for heads.

        Returns:
            float64 [layers, neurons] on the CPU; a layer of zeros stays zeros.

        Raises:
            InputError: no neurons were recorded, or a layer has no scores.
        """
        return normalized(self.neuron)

    def rank(self, neurons: bool = False) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Ranks all heads by layer-normalised score, and all FFNs by score (or all neurons by layer-normalised score).

        On a GPU this is one launch. It does not wait for the device, and the results stay there.

        Args:
            neurons: True ranks neurons instead of FFNs.

        Returns:
            ((scores, order) of heads, (scores, order) of FFNs or neurons): float64 and int64 vectors. Heads are
            numbered layer * heads + head, neurons likewise. The order is ascending; equal scores are ordered by layer,
            then head.

        Raises:
            InputError: a layer has no scores.

        Source: arXiv 2105.12002, section 3.
        """
        self.complete()
        others = self._neurons if neurons else self._ffns
        for sums in (self._heads, others):
            sums.check_recorded()
        ranking = ops.rank(_op_sums(self._heads, self._ffns), self._take())
        heads = ranking.head_scores.flatten(), ranking.head_order
        if not neurons:
            return heads, (ranking.ffn_scores, ranking.ffn_order)
        ranking = ops.rank(_op_sums(others))
        return heads, (ranking.head_scores.flatten(), ranking.head_order)

    def merge(self, other: "Importance") -> "Importance":
        """Adds the sums of another importance to this one, as if all batches had been recorded here.

        Args:
            other: an importance of the same shape and granularity; it is not changed.

        Returns:
            This importance, which keeps its own metadata.

        Raises:
            InputError: the two differ in shape or granularity.
        """
        if self._meaning != other._meaning:
            raise InputError(f"cannot merge importance of {other._meaning} into {self._meaning}; record both alike")
        for mine, theirs in zip(self._sums, other._sums, strict=True):
            mine.totals.add_(theirs.totals.to(mine.totals.device))
            mine.counts = [a + b for a, b in zip(mine.counts, theirs.counts, strict=True)]
        return self

    def rank_correlation(self, other: "Importance") -> dict[str, float]:
        """Computes Spearman's rank correlation between two importances.

        Args:
            other: an importance of the same number of layers and heads, of any granularity.

        Returns:
            `head` over the layer-normalised scores of all heads, `ffn` over all FFNs; each in [-1, 1], NaN where one
            of the two gives all structures the same score.

        Raises:
            InputError: the shapes differ, or one of the two has no scores.
        """
        # Imported on first use: it takes longer than all other imports of this module together.
        from scipy.stats import spearmanr

        if (self.num_layers, self.num_heads) != (other.num_layers, other.num_heads):
            raise InputError(f"cannot compare importance of {self._meaning} and {other._meaning}; use one architecture")
        pairs = {"head": (self.normalized_head(), other.normalized_head()), "ffn": (self.ffn, other.ffn)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {
                name: float(spearmanr(a.flatten(), b.flatten()).statistic) if a.numel() > 1 else float("nan")
                for name, (a, b) in pairs.items()
            }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes sums, counts, granularity and metadata to one safetensors file, atomically.

        Args:
            path: the file to write, conventionally `*.safetensors`.

        Raises:
            InputError: the metadata is not JSON.
            StoreError: the file cannot be written.
        """
        kinds = dict(zip(("head", "ffn", "neuron"), self._sums, strict=True))
        if self.num_neurons is None:
            del kinds["neuron"]
        tensors = {f"{kind}_sums": sums.totals.cpu() for kind, sums in kinds.items()}
        tensors |= {f"{kind}_counts": torch.tensor(sums.counts) for kind, sums in kinds.items()}
        names = ("granularity", "sequences_per_example", "metadata")
        storage.save(path, "importance", tensors, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Importance":
        """Reads an importance that `save` wrote. More batches can be added to it.

        Args:
            path: the file to read.

        Returns:
            The importance, on the CPU until gradients on another device are added.

        Raises:
            InputError: the file is missing, damaged, too large, not an importance, or of an unknown version.
        """
        layout = {"head_sums": ("F64", 2), "ffn_sums": ("F64", 1), "head_counts": ("I64", 1), "ffn_counts": ("I64", 1)}
        optional = {"neuron_sums": ("F64", 2), "neuron_counts": ("I64", 1)}
        return storage.load(path, "importance", layout, cls._from_file, optional)

    @classmethod
    def _from_file(cls, tensors: dict[str, Tensor], fields: dict[str, Any]) -> "Importance":
        neurons = tensors["neuron_sums"].shape[1] if "neuron_sums" in tensors else None
        importance = cls(*tensors["head_sums"].shape, **fields, neurons=neurons)  # type: ignore[misc]
        for sums, name in zip(importance._sums, ("head", "ffn", "neuron"), strict=True):
            if f"{name}_sums" not in tensors:
                continue
            totals, counts = tensors[f"{name}_sums"], tensors[f"{name}_counts"]
            if len(totals) != importance.num_layers or len(counts) != len(totals) or (counts < 0).any():
                raise InputError("its tensors do not fit each other; save it again")
            sums.totals, sums.counts = totals, counts.tolist()
        return importance

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Importance):
            return NotImplemented
        return self._meaning == other._meaning and self._sums == other._sums

    # Mutable, so not hashable.
    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        self.complete()
        return f"<Importance: {self._meaning}, {max(self._heads.counts)} recorded>"

    def _repr_html_(self) -> str:
        try:
            heads, ffns = self.normalized_head(), self.ffn
        except InputError:
            # Nothing is recorded of some layer yet.
            return f"<div>{html(repr(self))}</div>"
        shades = [scores / scores.max().clamp_min(1e-30) for scores in (heads, ffns)]
        note = "darker: more important; heads divided by their layer's l2 norm, FFNs by the largest of them"
        return grid(shades[0].tolist(), shades[1].tolist(), repr(self).strip("<>"), [note])

    @property
    def _meaning(self) -> str:
        rows = f", {self.sequences_per_example} sequences an example" if self.sequences_per_example > 1 else ""
        neurons = f" and {count(self.num_neurons, 'neuron')}" if self.num_neurons is not None else ""
        shape = f"{count(self.num_layers, 'layer')} x {count(self.num_heads, 'head')}{neurons}"
        return f"{shape} per {self.granularity}{rows}"

    @property
    def _sums(self) -> "tuple[_Sums, _Sums, _Sums]":
        """Returns the sums of heads, FFNs and neurons, with all pending terms added."""
        self.complete()
        self._settle()
        return self._heads, self._ffns, self._neurons

    def connect(self, add_pending: Callable[[], None] | None) -> None:
        """Connects a recording, whose pending terms are then added before scores are read.

        Args:
            add_pending: function that adds the recording's pending terms; None disconnects it.
        """
        self._add_pending = add_pending

    def complete(self) -> None:
        """Adds the pending terms of an active recording. Every method that reads scores calls it."""
        if self._add_pending is not None:
            self._add_pending()

    def __getstate__(self) -> dict[str, Any]:
        self.complete()
        # A copy is not connected to the recording.
        return {**vars(self), "_add_pending": None}

    def _settle(self) -> None:
        """Adds pending partials to the sums of heads and FFNs."""
        if (waiting := self._take()) is not None:
            ops.accumulate(_op_sums(self._heads, self._ffns), waiting)

    def _take(self) -> ops.Partials | None:
        """Removes and returns the pending partials of heads and FFNs."""
        if not self._heads.waiting and not self._ffns.waiting:
            return None
        return self._partials(self._heads.take(), self._ffns.take())

    def _partials(self, heads: list[Tensor | None], ffns: list[Tensor | None]) -> ops.Partials:
        return ops.Partials(heads, ffns, self.sequences_per_example, self.granularity == "batch")

    def _average(self, sums: "_Sums") -> Tensor:
        self.complete()
        self._settle()
        return sums.average()

    def _add(self, sums: "_Sums", layer: int, signed: Tensor | None, absolute: Tensor | None, defer: bool) -> None:
        name, partial = ("absolute", absolute) if self.granularity == "token" else ("signed", signed)
        if partial is None:
            raise InputError(f"{name} is None, but granularity {self.granularity!r} is computed from it; pass it")
        if not 0 <= layer < self.num_layers:
            raise InputError(f"layer {layer} is not one of {self.num_layers}; count from 0")
        if partial.shape[1:] != sums.totals[layer].shape or not partial.shape or not partial.is_floating_point():
            expected = ", ".join(["B", *map(str, sums.totals[layer].shape)])
            raise InputError(f"{name} is {partial.dtype} {list(partial.shape)}; pass a floating tensor [{expected}]")
        rows, group = partial.shape[0], self.sequences_per_example
        if rows == 0 or rows % group:
            raise InputError(f"a batch of {rows} sequences is not whole examples of {group}; pass whole examples")
        if layer in sums.waiting:
            # This layer is already pending, so a new batch has begun.
            self._settle()
        related = (sums,) if sums is self._neurons else (self._heads, self._ffns)
        if partial.device != sums.totals.device:
            for each in related:
                each.move(partial.device)
            partial = partial.to(sums.totals.device)
        sums.waiting[layer] = partial.detach()
        sums.counts[layer] += 1 if self.granularity == "batch" else rows // group
        if sums is self._neurons:
            ops.accumulate(_op_sums(sums), self._partials(sums.take(), []))
        elif not defer or all(len(each.waiting) == self.num_layers for each in related):
            self._settle()


def _op_sums(heads: "_Sums", ffns: "_Sums | None" = None) -> ops.Sums:
    """Converts sums for the op: of heads and FFNs, or of neurons in the place of heads."""
    if ffns is None:
        return ops.Sums(heads.totals, heads.totals.new_empty(0), heads.counts, [])
    return ops.Sums(heads.totals, ffns.totals, heads.counts, ffns.counts)


class _Sums:
    """Sums and counts of one kind of structure, on the device of the gradients, and partials that are not yet added."""

    def __init__(self, name: str, totals: Tensor, counts: list[int]) -> None:
        self.name = name
        self.totals = totals
        self.counts = counts
        self.waiting: dict[int, Tensor] = {}

    def move(self, device: torch.device) -> None:
        """Moves the sums to a GPU with the first partial that is on one; they stay there."""
        if self.totals.device.type == "cpu" and device.type != "cpu":
            self.totals = self.totals.to(device, non_blocking=True)

    def take(self) -> list[Tensor | None]:
        """Removes and returns the pending partial of each layer."""
        waiting, self.waiting = self.waiting, {}
        return [waiting.get(layer) for layer in range(len(self.counts))]

    def check_recorded(self) -> None:
        if missing := [layer for layer, count in enumerate(self.counts) if count == 0]:
            where = "any layer" if len(missing) == len(self.counts) else f"layers {missing}"
            raise InputError(f"no {self.name} importance was recorded for {where}; record the whole model's backward")

    def average(self) -> Tensor:
        self.check_recorded()
        counts = torch.tensor(self.counts, dtype=torch.float64)
        return self.totals.cpu() / counts.view(-1, *[1] * (self.totals.ndim - 1))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, _Sums)
            and self.counts == other.counts
            and torch.equal(self.totals.cpu(), other.totals.cpu())
        )

    __hash__ = None  # type: ignore[assignment]
