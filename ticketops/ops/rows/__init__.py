"""Moves rows between padded batches and packed tokens, and numbers the tokens of an attention mask.

    out[i] = x[index[i]], or zeros if index[i] is -1

`inverse` is the inverse mapping: for each row of x its row in `out`, or -1 if it is dropped. So the gradient is the
same op with `index` and `inverse` exchanged, and every element of a result, padding included, is written exactly once.
"""

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.backends import implementation
from ticketops.ops.registration import define

__all__ = ["move_rows", "number_tokens"]


def move_rows(x: Tensor, index: Tensor, inverse: Tensor) -> Tensor:
    """Gathers rows by an index in which each row occurs at most once. Differentiable any number of times.

    Args:
        x: [N, C], any dtype.
        index: int64 [M], indices of rows of x, unique, or -1 for a row of zeros. Values are not checked.
        inverse: int64 [N], for each row of x its row in the result, or -1 if it is dropped.

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
    """Numbers the real tokens of a padded batch in order. Does not wait for the device if there is a kernel for it.

    Args:
        mask: [B, S], nonzero for a real token, any dtype.

    Returns:
        starts, lengths: int32 [B], number of the first token of each row, and how many tokens the row has;
        indices: int64 [B * S], position in the flattened batch of each token, -1 after the last token;
        numbers: int64 [B * S], number of the token at each position, -1 for padding.

    Raises:
        InputError: the mask is not two-dimensional, or has 2^31 or more elements.
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
