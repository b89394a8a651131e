"""Sequences as runs of rows of a flat token matrix, and conversion between padded batches and packed tokens."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import private
from ticketops.ops.products import granule
from ticketops.ops.rows import move_rows, number_tokens


@dataclass(frozen=True)
class Sequences:
    """The position of each sequence in a flat token matrix, the same for padded and packed batches: sequence b is rows
    starts[b] .. starts[b] + lengths[b] - 1.

    Attributes:
        starts: int32 [B], index of each sequence's first row in the flat token matrix.
        lengths: int32 [B], number of tokens in each sequence; 0 for an empty one.
        max_length: upper bound of the lengths; a Python number, so that no kernel launch waits for the device.
        real: bool [T], False for a row of a sequence that takes no part in attention, a hole in its attention mask that
            keeps the distances of the tokens around it; None if there is none.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int
    real: Tensor | None = None

    @classmethod
    def from_lengths(cls, lengths: list[int] | Tensor, width: int | None = None) -> "Sequences":
        """Builds the description from lengths: sequences one behind the other (packed), or at the start of each block
        of `width` rows (padded).

        Args:
            lengths: integers [B], number of tokens in each sequence.
            width: rows per sequence in a padded batch, padding included; None for packed tokens.

        Returns:
            The description, on the device of `lengths` (the CPU for a list).

        Raises:
            InputError: `lengths` is not a vector of numbers >= 0, or a sequence is longer than `width`.
        """
        lengths = torch.as_tensor(lengths, dtype=torch.int32)
        if lengths.ndim != 1 or (lengths < 0).any():
            raise InputError(f"lengths must be a vector of numbers >= 0, got {lengths.tolist()}")
        longest = int(lengths.max()) if len(lengths) else 0
        if width is None:
            starts = torch.cumsum(lengths, 0, dtype=torch.int32) - lengths
        elif longest <= width:
            starts = torch.arange(len(lengths), dtype=torch.int32, device=lengths.device) * width
        else:
            raise InputError(
                f"a sequence of {longest} tokens does not fit rows of width {width}: truncate it or widen them"
            )
        return cls(starts, lengths, longest)

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def first_rows(self, rows: int) -> Tensor:
        """Returns the row index of each sequence's first token, int64 [B]. For an empty sequence it is a valid index,
        but of another sequence's row.

        Args:
            rows: number of rows in the flat token matrix, at least 1.
        """
        return self.starts.clamp_max(rows - 1).long()

    def spans(self) -> list[tuple[int, int]]:
        """Returns (first row, last row + 1) of every sequence as Python numbers. On a GPU this waits for the device."""
        return [(start, start + n) for start, n in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)]


@dataclass
class TokenCounts:
    """What the host knows of an attention mask, so that packing it on a GPU need not wait for the device.

    A batch carries it beside its tensors: `to`, by which loops move a batch to a device, leaves it where it is.

    Attributes:
        rows, width: shape of the mask.
        tokens: number of real tokens.
        holes: number of places without a token between the first and the last token of their row.
        longest: largest number of places from the first to the last token of a row, or more.
        padded_in_front: True if padding comes before the first token of a row.
    """

    rows: int
    width: int
    tokens: int
    holes: int
    longest: int
    padded_in_front: bool

    @classmethod
    def of(cls, mask: Tensor) -> "TokenCounts":
        """Counts a mask. For one on a GPU this waits for the device.

        Args:
            mask: [.., S], nonzero for a real token, any dtype.
        """
        real = mask.bool().flatten(0, -2)
        rows, width = real.shape
        lengths = real.sum(1).tolist()
        tokens = sum(lengths)
        # Padding at the ends of rows alone, as nearly always.
        if (real[:, 1:] <= real[:, :-1]).all():
            return cls(rows, width, tokens, 0, max(lengths, default=0), False)
        spans = _filled(real).sum(1)
        holes, longest = int(spans.sum()) - tokens, int(spans.max())
        return cls(rows, width, tokens, holes, longest, not begins_with_token(real).all())

    def to(self, *args: Any, **kwargs: Any) -> "TokenCounts":
        """Returns the object itself, on the host."""
        return self


@dataclass(frozen=True)
class Packing:
    """Conversion between a padded batch [B, S, C] and its real tokens [T, C].

    Attributes:
        indices: int64 [T], indices of the real tokens among the rows of the flattened batch, in order. -1 packs a row
            of zeros, for a hole in the mask or to round the number of rows up. None if the batch is only flattened,
            with its padding.
        numbers: int64 [B * S], the packed row of each row of the flattened batch, -1 for padding. None if `indices` is.
        sequences: position of each sequence among the rows that `pack` returns.
        batch: B, number of sequences in the padded batch.
        width: S, tokens per sequence, padding included.
    """

    indices: Tensor | None
    numbers: Tensor | None
    sequences: Sequences
    batch: int
    width: int

    @classmethod
    def from_mask(
        cls,
        mask: Tensor | None,
        batch: int,
        width: int,
        device: torch.device,
        unpad: bool = True,
        bucket: int | Literal["geometric"] | None = None,
        close_holes: bool = True,
        dtype: torch.dtype | None = None,
        counts: TokenCounts | None = None,
    ) -> "Packing":
        """Builds the packing for an attention mask. Any 0/1 mask can be packed, also with padding on the left or
        between tokens.

        Packing needs the number of real tokens on the host. It is read from a mask on the CPU before that is sent to
        the device, or taken from `counts`. A mask on a GPU without counts is waited for. `unpad=False` never waits.

        Args:
            mask: [B, S], nonzero for a real token, any dtype; None if all tokens are real.
            batch: B, number of sequences.
            width: S, tokens per sequence, padding included.
            device: device of the tokens.
            unpad: True removes padding; False keeps it, which requires that the real tokens of every sequence are
                contiguous.
            bucket: rounds the number of rows up to a multiple of this (at most B * S), and `max_length` up to a power
                of two, so that batches of similar size have equal shapes: "geometric" to one of 16 sizes between two
                powers of two, at most 6.3 % more (3.1 % on average), and not below 64. None does not.
            close_holes: True removes padding between two tokens of a sequence, too; False packs it as rows of zeros
                that are not attended to, for attention that depends on the distance of tokens.
            dtype: dtype of the matrix products that the packed tokens are used in. If `bucket` is None, the number of
                rows is rounded up to what is fast for them (`products.granule`). None does not round.
            counts: of this mask; None if the host does not know them.

        Returns:
            The packing.

        Raises:
            InputError: `unpad=False`, and the real tokens of a sequence are not contiguous; or the counts are those of
                another mask. For a mask on a GPU, which the host does not read, an assertion on the device stops the
                program instead.
        """
        if mask is None:
            lengths = torch.full((batch,), width, dtype=torch.int32, device=device)
            starts = torch.arange(batch, dtype=torch.int32, device=device) * width
            return cls(None, None, Sequences(starts, lengths, width), batch, width)
        if unpad:
            if counts is None and mask.device != device:
                counts = TokenCounts.of(mask)
            mask = _send(mask, device)
            taken = mask if close_holes else _filled(mask.to(torch.bool))
            starts, lengths, indices, numbers = number_tokens(taken)
            if counts is None:
                asked = lengths if close_holes else torch.cat([lengths, (taken != mask.bool()).sum()[None].int()])
                # This waits for the device, once: a tensor's size must be known on the host.
                read = asked.tolist()
                holes = 0 if close_holes else read.pop()
                rows, longest = sum(read), max(read, default=0)
            else:
                holes, longest = 0 if close_holes else counts.holes, counts.longest
                rows = counts.tokens + holes
                fine = (lengths.sum() == rows) & (lengths <= longest).all()
                if not close_holes:
                    fine &= (taken != mask.bool()).sum() == holes
                require(fine, "the number of tokens that came with the attention mask is that of another mask")
            if bucket is not None:
                longest = min(width, 1 << max(0, longest - 1).bit_length())
            if bucket == "geometric":
                size = max(64, 1 << max(0, rows.bit_length() - 5))
            else:
                size = bucket or (1 if dtype is None else granule(rows, dtype, device))
            # The unpacked batch's size is the upper limit; it recurs from batch to batch as multiples of `size` do.
            rows = min(-(-rows // size) * size, batch * width)
            indices, there = indices[:rows], None
            if holes:
                real = mask.bool().flatten()
                there = (indices >= 0) & real[indices]
                indices, numbers = indices.where(there, -1), numbers.where(real, -1)
            return cls(indices, numbers, Sequences(starts, lengths, longest, there), batch, width)
        first, lengths, unbroken = _unbroken(mask.to(torch.bool))
        problem = "has holes, which unpad=False cannot serve: patch(model, unpad=True) packs it"
        check_rows(unbroken, problem)
        starts = torch.arange(batch, dtype=torch.int32, device=mask.device) * width + first
        starts, lengths = (_send(x, device) for x in (starts, lengths))
        return cls(None, None, Sequences(starts, lengths, width), batch, width)

    @classmethod
    def from_bounds(cls, bounds: Tensor, longest: int, batch: int, width: int) -> "Packing":
        """Builds the packing for tokens that are packed already: sequences one behind the other, without padding.

        Args:
            bounds: integers [sequences + 1] from 0 to B * S: where each sequence begins, and where the last one ends.
            longest: upper bound of the sequences' lengths.
            batch: B, number of rows that the tokens come in; sequences may lie across them.
            width: S, tokens per row.

        Returns:
            The packing; `pack` and `unpack` only flatten and restore the rows.

        Raises:
            InputError: the bounds do not rise from 0 to B * S, or a sequence is longer than `longest`. On a GPU an
                assertion on the device stops the program instead.
        """
        bounds = bounds.to(torch.int32)
        lengths = bounds.diff()
        fine = (bounds[0] == 0) & (bounds[-1] == batch * width) & (lengths >= 0).all() & (lengths <= longest).all()
        problem = f"must rise from 0 to the number of tokens, {batch * width}, in steps of at most {longest}"
        require(fine, f"the bounds of packed sequences (cu_seq_lens_q, or where position_ids begin anew) {problem}")
        return cls(None, None, Sequences(bounds[:-1], lengths, longest), batch, width)

    def pack(self, padded: Tensor) -> Tensor:
        """Flattens a padded batch and removes its padding.

        Args:
            padded: [B, S, C].

        Returns:
            [T, C]; [B * S, C] if the packing keeps padding.
        """
        rows = padded.reshape(self.batch * self.width, padded.shape[-1])
        if self.indices is None or self.numbers is None:
            return rows
        return move_rows(rows, self.indices, self.numbers)

    def unpack(self, packed: Tensor) -> Tensor:
        """Restores the padded batch from packed tokens; padding is filled with zeros.

        Args:
            packed: [T, C].

        Returns:
            [B, S, C].
        """
        if self.indices is not None and self.numbers is not None:
            packed = move_rows(packed, self.numbers, self.indices)
        return packed.view(self.batch, self.width, packed.shape[-1])


def is_unbroken(mask: Tensor) -> Tensor:
    """Returns, for each row of an attention mask [B, S], True if its real tokens are contiguous.

    Args:
        mask: nonzero for a real token, any dtype.
    """
    return _unbroken(mask.bool())[2]


def begins_with_token(mask: Tensor) -> Tensor:
    """Returns, for each row of an attention mask [B, S], True if no padding comes before its first real token.

    Args:
        mask: nonzero for a real token, any dtype; of at least one column.
    """
    real = mask.bool()
    return real.any(1) == real[:, 0]


def on_host(x: Tensor) -> bool:
    """True if the host can read a tensor's values without waiting for a device."""
    return x.is_cpu and not torch.compiler.is_compiling()


def _send(x: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor to a device; from the host without waiting for the device."""
    if x.is_cpu and device.type == "cuda":
        # From other memory the copy would wait for what was queued before.
        return x.pin_memory().to(device, non_blocking=True)
    return x.to(device)


def _filled(real: Tensor) -> Tensor:
    """Returns a mask [B, S] with ones between the first and the last real token of each row."""
    counts = real.cumsum(1)
    return real | ((counts > 0) & (counts < counts[:, -1:]))


def _unbroken(real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns, for each row of a mask: the index of its first real token, the number of real tokens, and True if these
    are contiguous."""
    lengths = real.sum(1, dtype=torch.int32)
    first = real.int().argmax(1).int()
    columns = torch.arange(real.shape[1], device=real.device)
    run = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    return first, lengths, (run == real).all(1)


def require(fine: Tensor, problem: str) -> None:
    """Refuses inputs that are invalid. For a tensor on a GPU, which the host does not read, an assertion on the device
    stops the program.

    Args:
        fine: bool [], False for invalid inputs.
        problem: the error's text.

    Raises:
        InputError: the inputs are invalid, and `fine` is on the CPU.
    """
    if not on_host(fine):
        private.assert_on_device(fine, problem)
    elif not fine:
        raise InputError(problem)


def check_rows(fine: Tensor, problem: str) -> None:
    """Refuses an attention mask if any of its rows is invalid. For a mask on a GPU, which the host does not read, an
    assertion on the device stops the program.

    Args:
        fine: bool [B], False for an invalid row of the mask.
        problem: end of the sentence "row 3 of the attention mask ...": what is wrong and the remedy.

    Raises:
        InputError: a row is invalid, and the mask is on the CPU.
    """
    if on_host(fine):
        bad = (~fine).nonzero()
        if len(bad):
            raise InputError(f"row {int(bad[0])} of the attention mask {problem}")
    else:
        private.assert_on_device(fine.all(), f"a row of the attention mask {problem}")
