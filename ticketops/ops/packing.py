"""Which rows of a flat token matrix belong to which sequence, and the way between padded batches and packed tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops import private
from ticketops.ops.products import granule
from ticketops.ops.rows import move_rows, number_tokens


@dataclass(frozen=True)
class Sequences:
    """One description for right-padded and packed batches alike: sequence b owns rows starts[b] .. starts[b] +
    lengths[b] - 1.

    Attributes:
        starts: int32 [B], the first row of each sequence in the flat token matrix.
        lengths: int32 [B], its number of tokens; 0 is an empty sequence.
        max_length: an upper bound on the lengths, known on the host so that no kernel launch waits for the device.
    """

    starts: Tensor
    lengths: Tensor
    max_length: int

    @classmethod
    def from_lengths(cls, lengths: list[int] | Tensor, width: int | None = None) -> "Sequences":
        """Describes sequences that lie one behind the other (packed) or one in each block of `width` rows (padded).

        Args:
            lengths: integers [B], tokens in each sequence.
            width: rows between two starts in a padded batch; None for packed tokens.

        Returns:
            The description, on the device of `lengths` (the CPU for a list).
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
        """The row of each sequence's first token, int64 [B]; another's for an empty sequence.

        Args:
            rows: of the flat token matrix, at least 1.
        """
        return self.starts.clamp_max(rows - 1).long()

    def spans(self) -> list[tuple[int, int]]:
        """Start and end of every sequence as Python numbers; on a GPU this waits for the device.

        Returns:
            One (first row, row after the last) pair a sequence.
        """
        return [(start, start + n) for start, n in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)]


@dataclass(frozen=True)
class Packing:
    """The way from a padded batch [B, S, C] to its real tokens [T, C] and back.

    Attributes:
        indices: int64 [T], the rows of the flattened batch that are real tokens, in order; -1 packs a row of zeros, to
            round their number up; None where every row stays in place.
        numbers: int64 [B * S], the packed row of each row of the flattened batch, -1 for padding; None likewise.
        sequences: where each sequence lies among the rows that `pack` returns.
        batch: B, rows of the padded batch.
        width: S, tokens a row including padding.
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
        bucket: int | None = None,
        holes: bool = True,
        dtype: torch.dtype | None = None,
    ) -> "Packing":
        """Builds the packing that an attention mask asks for; any 0/1 mask can be packed, padding on the left or inside
        too.

        Packing waits for the mask's device once, to learn how many tokens are real; `unpad=False` never does.

        Args:
            mask: [B, S], nonzero for a real token, any dtype; None when all are real.
            batch: B.
            width: S.
            device: where the tokens lie.
            unpad: False leaves the tokens where they are, which needs the real tokens of every row to be one unbroken
                run.
            bucket: rounds the rows up to a multiple of this (or all of the batch), and the longest length to a power of
                two, so that batches of about one size have the same shapes.
            holes: the distance of two tokens does not matter, so padding may lie between them.
            dtype: of the matrix products that the packed tokens are for; without a bucket, the rows are rounded up as
                those had better be (`products.granule`). None packs real tokens only.

        Returns:
            The packing.

        Raises:
            InputError: `unpad=False` or `holes=False`, and some row's real tokens are not one unbroken run, in a mask
                on the CPU; one on a GPU, where the host does not see it, stops the program with an assertion there.
        """
        if mask is None:
            lengths = torch.full((batch,), width, dtype=torch.int32, device=device)
            starts = torch.arange(batch, dtype=torch.int32, device=device) * width
            return cls(None, None, Sequences(starts, lengths, width), batch, width)
        if unpad:
            if not holes:
                problem = "has holes, which attention within a window cannot serve: pad on one side only"
                check_rows(_unbroken(mask.to(torch.bool))[2], problem, wait=False)
            starts, lengths, indices, numbers = number_tokens(mask.to(device))
            # The one wait for the device: the number of tokens is a size, and sizes live on the host.
            counts = lengths.tolist()
            rows, longest = sum(counts), max(counts, default=0)
            if bucket is not None:
                longest = min(width, 1 << max(0, longest - 1).bit_length())
            size = bucket or (1 if dtype is None else granule(rows, dtype, device))
            # All of the batch is a size that comes up again, too.
            rows = min(-(-rows // size) * size, batch * width)
            return cls(indices[:rows], numbers, Sequences(starts, lengths, longest), batch, width)
        first, lengths, unbroken = _unbroken(mask.to(torch.bool))
        problem = "has holes, which unpad=False cannot serve: patch(model, unpad=True) packs it"
        check_rows(unbroken, problem, wait=False)
        starts = torch.arange(batch, dtype=torch.int32, device=mask.device) * width + first
        starts, lengths = (x.to(device, non_blocking=True) for x in (starts, lengths))
        return cls(None, None, Sequences(starts, lengths, width), batch, width)

    def pack(self, padded: Tensor) -> Tensor:
        """Takes the real tokens out of a padded batch.

        Args:
            padded: [B, S, C].

        Returns:
            [T, C], or [B * S, C] where every row stays in place.
        """
        rows = padded.reshape(self.batch * self.width, padded.shape[-1])
        if self.indices is None or self.numbers is None:
            return rows
        return move_rows(rows, self.indices, self.numbers)

    def unpack(self, packed: Tensor) -> Tensor:
        """Puts packed tokens back to where they came from; padding becomes zeros.

        Args:
            packed: [T, C].

        Returns:
            [B, S, C].
        """
        if self.indices is not None and self.numbers is not None:
            packed = move_rows(packed, self.numbers, self.indices)
        return packed.view(self.batch, self.width, packed.shape[-1])


def _unbroken(real: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first real token of each row of a mask, how many there are, and whether they are one unbroken run."""
    lengths = real.sum(1, dtype=torch.int32)
    first = real.int().argmax(1).int()
    columns = torch.arange(real.shape[1], device=real.device)
    run = (columns >= first[:, None]) & (columns < (first + lengths)[:, None])
    return first, lengths, (run == real).all(1)


def check_rows(fine: Tensor, problem: str, wait: bool) -> None:
    """Refuses an attention mask with a row that cannot be served.

    Args:
        fine: bool [B], False where a row is not.
        problem: what such a row of the mask does, and the remedy.
        wait: the host may wait for a GPU to learn which row it is; else the GPU stops the program with an assertion.

    Raises:
        InputError: some row is not fine, and the host knows.
    """
    if (wait or fine.is_cpu) and not torch.compiler.is_compiling():
        bad = (~fine).nonzero()
        if len(bad):
            raise InputError(f"row {int(bad[0])} of the attention mask {problem}")
    else:
        private.assert_on_device(fine.all(), f"a row of the attention mask {problem}")
