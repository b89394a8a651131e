"""Moving and numbering rows in plain PyTorch."""

import torch
from torch import Tensor


def refusal(device: torch.device, dtype: torch.dtype) -> None:
    """Never refuses: plain PyTorch runs everywhere."""


def move_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """See ticketops.ops.rows.move_rows."""
    rows, channels = len(index), x.shape[1]
    if rows <= len(x):
        return x.index_select(0, index.clamp(min=0)).masked_fill_((index < 0)[:, None], 0)
    # Dropped rows (-1) are written to one extra row at the end.
    out = x.new_zeros(rows + 1, channels)
    return out.index_copy_(0, torch.where(inverse < 0, rows, inverse), x)[:rows]


def number_tokens(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ticketops.ops.rows.number_tokens; on a GPU this waits for the device."""
    real = mask != 0
    lengths = real.sum(1, dtype=torch.int32)
    starts = lengths.cumsum(0, dtype=torch.int32) - lengths
    places = real.flatten().nonzero().squeeze(1)
    indices = torch.full((mask.numel(),), -1, device=mask.device)
    numbers = indices.clone()
    indices[: len(places)] = places
    numbers[places] = torch.arange(len(places), device=mask.device)
    return starts, lengths, indices, numbers
