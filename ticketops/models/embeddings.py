"""The modules before a model's layers, on ticketops' ops where supported: embedding tables, LayerNorm and dropout."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ticketops.models.hooks import any_module_is_hooked, is_hooked, transform
from ticketops.models.swapping import stand_in
from ticketops.ops.embedding import dropout, embedding, embeddings, layer_norm, serves_embedding

#: What torch looks rows up by.
_IDS = (torch.int64, torch.int32)


class TicketEmbedding(nn.Embedding):
    """An embedding table whose gradient is computed for the rows in use only."""

    is_altered: Callable[[], bool]

    def forward(self, input: Tensor) -> Tensor:
        """Takes ids [..], returns rows [.., C]."""
        plain = self.is_plain() and not self.is_altered() and input.dtype in _IDS
        if not plain or transform() or not serves_embedding(self.weight):
            return super().forward(input)
        return embedding(self.weight, input, self.padding_idx)

    def is_plain(self) -> bool:
        """Returns True if the table only looks up rows: no max_norm, scaling by frequency or sparse gradient."""
        return counts_no_tokens(self) and not self.sparse


class TicketLayerNorm(nn.LayerNorm):
    """LayerNorm whose results are in reused memory (ticketops.ops.memory)."""

    is_altered: Callable[[], bool]

    def forward(self, input: Tensor) -> Tensor:
        """Takes and returns [.., C]."""
        plain = self.is_plain() and not self.is_altered() and input.dtype == self.weight.dtype
        if not plain or transform() or not serves_embedding(input):
            return super().forward(input)
        return layer_norm(input, self.weight, self.bias, self.eps)

    def is_plain(self) -> bool:
        """Returns True if it normalises the last dimension, and has a weight and a bias."""
        return self.elementwise_affine and self.bias is not None and len(self.normalized_shape) == 1


class TicketDropout(nn.Dropout):
    """Dropout that draws its masks on all threads."""

    is_altered: Callable[[], bool]

    def forward(self, input: Tensor) -> Tensor:
        """Takes and returns [.., C]."""
        draws = self.training and 0 < self.p < 1 and not self.is_altered()
        if not draws or transform() or not serves_embedding(input):
            return super().forward(input)
        return dropout(input, self.p)


class TicketEmbeddings(nn.Module):
    """The embeddings of BERT-like models, as one op where `embed` supports it."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Takes ids [B, S], or embeddings of words [B, S, C]; returns [B, S, C]."""
        done = None
        # ERNIE may embed the task too.
        if not args and kwargs.get("inputs_embeds") is None and not getattr(self, "use_task_id", False):
            done = embed(self, *(kwargs.get(name) for name in ("input_ids", "position_ids", "token_type_ids")))
        embedded: Tensor = super().forward(*args, **kwargs) if done is None else done
        return embedded


def counts_no_tokens(module: nn.Module) -> bool:
    """Returns True unless a module is an embedding table whose result or gradient depends on all ids of the batch,
    including padding.

    Args:
        module: module of any class.
    """
    return not isinstance(module, nn.Embedding) or (module.max_norm is None and not module.scale_grad_by_freq)


def embed(module: Any, ids: Tensor | None, positions: Tensor | None, types: Tensor | None = None) -> Tensor | None:
    """Computes the embeddings of words, positions and token types, LayerNorm and dropout in one op.

    Args:
        module: module with `word_embeddings`, `LayerNorm`, `dropout` and, if there are positions and token types,
            `position_embeddings` and `token_type_embeddings`.
        ids: int64 [..], ids of the words.
        positions: int64 [..], position of each word; not read without a table of them.
        types: int64 [..], token type of each word; None for the default types.

    Returns:
        [.., C]; None if the op does not support the modules, or a hook or transform must see them.
    """
    words, places, kinds = (getattr(module, f"{name}_embeddings", None) for name in ("word", "position", "token_type"))
    norm, drop = module.LayerNorm, module.dropout
    if transform() or any_module_is_hooked() or ids is None:
        return None
    if places is None:
        positions = None
    elif positions is None or positions.shape != ids.shape:
        return None
    if kinds is None:
        types = None
    else:
        if types is None:
            buffer = None if positions is None else getattr(module, "token_type_ids", None)
            types = torch.zeros_like(ids) if buffer is None else buffer.expand(len(ids), -1).gather(1, positions)
        if types.shape != ids.shape:
            return None
    if any(each is not None and each.dtype not in _IDS for each in (ids, positions, types)):
        return None
    tables = [table for table in (words, kinds, places) if table is not None]
    plain = all(type(table) is SWAPS[nn.Embedding] and table.is_plain() for table in tables)
    if not plain or type(norm) is not SWAPS[nn.LayerNorm] or not norm.is_plain() or type(drop) is not SWAPS[nn.Dropout]:
        return None
    if any(map(is_hooked, (*tables, norm, drop))):
        return None
    if any(type(each).is_altered() for each in (module, *tables, norm, drop)):
        return None
    weight, dropout_p = norm.weight, drop.p if drop.training else 0.0
    if any(table.weight.dtype != weight.dtype for table in tables) or dropout_p >= 1 or not serves_embedding(weight):
        return None
    return embeddings(
        tuple(None if table is None else table.weight for table in (words, kinds, places)),
        (ids, types, positions),
        tuple(None if table is None else table.padding_idx for table in (words, kinds, places)),
        weight,
        norm.bias,
        dropout_p=dropout_p,
        eps=norm.eps,
    )


#: The stock class of a module among the embeddings, and its replacement.
SWAPS: dict[type[nn.Module], Any] = {
    nn.Embedding: stand_in(TicketEmbedding, nn.Embedding),
    nn.LayerNorm: stand_in(TicketLayerNorm, nn.LayerNorm),
    nn.Dropout: stand_in(TicketDropout, nn.Dropout),
}
