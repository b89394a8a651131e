"""Rows of padded batches and of packed tokens: numbering a mask's tokens, and moving rows between the two.

    out[i] = x[index[i]], zeros where index[i] is -1

`inverse` is the same way back: the row of `out` in which each row of x ends, -1 where it ends nowhere. So the gradient
is the same op with the two exchanged, and every element of a result is written once, padding included.
"""

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.backends import implementation
from ticketops.ops.registration import define

__all__ = ["move_rows", "number_tokens"]


def move_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Makes rows out of rows; differentiable any number of times.

    Args:
        x: [N, C], any dtype.
        index: int64 [M], rows of x, none of them twice, or -1 for zeros; its values are not checked.
        inverse: int64 [N], for each row of x its row in the result, or -1.

    Returns:
        [M, C], contiguous.

    Raises:
        InputError: shapes, dtypes or devices that do not fit together.
    """
    if x.ndim != 2 or index.ndim != 1 or inverse.shape != x.shape[:1]:
        raise InputError(
            f"move_rows needs x [N, C], index [M] and inverse [N], got {list(x.shape)}, {list(index.shape)} and "
            f"{list(inverse.shape)}"
        )
    for name, rows in (("index", index), ("inverse", inverse)):
        if rows.dtype != torch.int64 or rows.device != x.device:
            raise InputError(f"move_rows needs {name} as int64 on {x.device}, got {rows.dtype} on {rows.device}")
    return _move_rows_op(x, index, inverse)


def number_tokens(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Numbers the tokens of a padded batch in order, without waiting for the device where there is a kernel for it.

    Args:
        mask: [B, S], nonzero for a real token, any dtype.

    Returns:
        starts, lengths: int32 [B], the number of each row's first token and how many it has;
        indices: int64 [B * S], the place of each token in the flattened batch, -1 past the last token;
        numbers: int64 [B * S], the number of the token at each place, -1 for padding.

    Raises:
        InputError: the mask is not two-dimensional, or has more places than int32 counts.
    """
    if mask.ndim != 2 or mask.numel() >= 2**31:
        raise InputError(f"number_tokens needs a mask [B, S] of fewer than 2^31 places, got {list(mask.shape)}")
    return implementation("rows", mask.device, mask.dtype).number_tokens(mask)


def _forward(x, index, inverse):
    return implementation("rows", x.device, x.dtype).move_rows(x, index, inverse)


def _fake_forward(x, index, inverse):
    return x.new_empty((index.shape[0], x.shape[1]))


def _setup_context(ctx, inputs, output):
    _, index, inverse = inputs
    ctx.save_for_backward(index, inverse)


def _gradients(ctx, dout):
    index, inverse = ctx.saved_tensors
    return _move_rows_op(dout, inverse, index), None, None


_move_rows_op = define(
    "move_rows(Tensor x, Tensor index, Tensor inverse) -> Tensor", _forward, _fake_forward, _gradients, _setup_context
)
