"""Collators: batches that say how many tokens they have; batches for sequence classification and regression without
padding, and what a patched model makes of them."""

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ticketops.errors import InputError
from ticketops.ops.packing import TokenCounts, require

#: By this argument a batch tells a patched model the TokenCounts of its attention mask.
TOKEN_COUNTS = "token_counts"

#: Where a packed batch has its token ids. A stock model has no argument of this name, and refuses a batch without
#: input_ids.
PACKED = "packed_input_ids"

#: Columns of a row with a value for each token.
_TOKENS = ("input_ids", "token_type_ids", "attention_mask")
_LABELS = ("labels", "label", "label_ids")


class CountingCollator:
    """Has the batches of another collator say how many tokens they have, so that a patched model on a GPU never waits
    for it to count: `Trainer(..., data_collator=CountingCollator(DataCollatorWithPadding(tokenizer)))`, or a
    DataLoader's `collate_fn`.

    The counts are a batch's `token_counts`, which stays on the host where its tensors move to a GPU. A patched model of
    any kind takes them out; where they do not fit the mask, it refuses the batch. Batches without an `attention_mask`
    of at least two dimensions stay as they are, and so do those of PackingCollator, whose shapes tell. Other models
    have no such argument.

    Args:
        collator: makes a batch from a list of rows. Its attributes are also those of this collator.
    """

    def __init__(self, collator: Callable[[Any], Any]) -> None:
        self.collator = collator

    def __call__(self, rows: Any) -> Any:
        """Makes a batch.

        Args:
            rows: as the other collator takes them.

        Returns:
            What the other collator returns, with `token_counts`.
        """
        batch = self.collator(rows)
        if isinstance(batch, MutableMapping) and PACKED not in batch:
            mask = batch.get("attention_mask")
            if isinstance(mask, Tensor) and mask.is_cpu and mask.ndim > 1:
                batch[TOKEN_COUNTS] = TokenCounts.of(mask)
        return batch

    def __getattr__(self, name: str) -> Any:
        # Pickle asks before there is anything to ask.
        if name.startswith("__") or name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)


class PackingCollator:
    """Makes batches without padding for patched models that classify sequences: `Trainer(..., data_collator=
    PackingCollator())`, or a DataLoader's `collate_fn`.

    A patched model gives for such a batch what it gives for the padded one: a row of logits for each sequence, the loss
    over these, the same gradients and importance. A stock model, and a patched one with another head, refuse it.
    """

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Puts the tokens of all rows one behind the other.

        Args:
            rows: each with `input_ids` [tokens], and where the model has them `token_type_ids` [tokens]; an
                `attention_mask` [tokens] may only mask the row's end. `labels` (or `label`, `label_ids`): an int for
                classification, a float for regression, a list for several of either; in every row or in none.

        Returns:
            attention_mask: int64 [rows, longest], 1 where a padded batch has tokens.
            packed_input_ids: int64 [1, tokens of all rows].
            token_type_ids: the same, if the rows have them.
            labels: [rows] or [rows, labels], if the rows have them.

        Raises:
            InputError: a row without tokens, with padding elsewhere than at its end, with other columns than these, or
                with others than the first row.
        """
        if not rows:
            raise InputError("PackingCollator was given no rows: a batch has at least one")
        known = {name: _columns(rows, (name,)) for name in _TOKENS}
        labels = _columns(rows, _LABELS)
        for index, row in enumerate(rows):
            if others := row.keys() - {*_TOKENS, *_LABELS}:
                raise InputError(
                    f"row {index} of a batch has {min(others)!r}, which PackingCollator cannot pack: it takes "
                    f"{', '.join(_TOKENS)} and labels; remove the column"
                )
        if (ids := known["input_ids"]) is None:
            raise InputError("row 0 of a batch has no input_ids: give PackingCollator tokenized rows")
        masks = known["attention_mask"] or [[1] * len(each) for each in ids]
        lengths = [_length(index, *each) for index, each in enumerate(zip(ids, masks, strict=True))]
        batch = {
            "attention_mask": (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long(),
            PACKED: _joined("input_ids", ids, ids, lengths),
        }
        if (types := known["token_type_ids"]) is not None:
            batch["token_type_ids"] = _joined("token_type_ids", types, ids, lengths)
        if labels is not None:
            try:
                batch["labels"] = torch.tensor(labels)
            except (TypeError, ValueError) as error:
                raise InputError(
                    f"the labels of a batch make no tensor ({error}): give an int, a float or a list of them for each "
                    "row, of one length"
                ) from error
        return batch


def _columns(rows: Sequence[Mapping[str, Any]], names: tuple[str, ...]) -> list[Any] | None:
    """A column of all rows in plain Python, under one of several names; None if no row has it."""
    found: list[Any] = [next((row[name] for name in names if row.get(name) is not None), None) for row in rows]
    missing = [index for index, value in enumerate(found) if value is None]
    if len(missing) == len(rows):
        return None
    if missing:
        raise InputError(f"row {missing[0]} of a batch has no {names[0]}, and others have: give them to all or to none")
    # Tensors and arrays.
    return [value.tolist() if hasattr(value, "tolist") else value for value in found]


def _length(index: int, ids: list[int], mask: list[int]) -> int:
    """The number of tokens of a row without the padding at its end."""
    length = sum(map(bool, mask))
    if length == 0:
        raise InputError(f"row {index} of a batch has no tokens: leave it out")
    if len(mask) != len(ids) or not all(mask[:length]):
        raise InputError(
            f"the attention_mask of row {index} of a batch masks more than the row's end: leave padding to "
            "PackingCollator, and pad on the right where rows are padded before"
        )
    return length


def _joined(name: str, values: list[list[int]], ids: list[list[int]], lengths: list[int]) -> Tensor:
    for index, (row, tokens) in enumerate(zip(values, ids, strict=True)):
        if len(row) != len(tokens):
            raise InputError(
                f"row {index} of a batch has {len(tokens)} input_ids and {len(row)} {name}: it needs as many"
            )
    return torch.tensor([[value for row, n in zip(values, lengths, strict=True) for value in row[:n]]])


def put_in_rows(config: Any, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], TokenCounts]:
    """Puts the tokens of a packed batch back in rows, as a model's forward takes them. Its layers pack them again.

    The model then numbers positions itself and pools under the mask, so a packed batch cannot differ from a padded one.

    Args:
        config: configuration of the model.
        arguments: of its forward pass, among them those of a PackingCollator.

    Returns:
        The same with `input_ids`, and `token_type_ids` where given, of shape [rows, longest]; and what shapes tell of
        the mask.

    Raises:
        InputError: the attention mask is not that of these tokens.
    """
    arguments = dict(arguments)
    tokens, mask = arguments.pop(PACKED), arguments.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise InputError(f"{PACKED} came without the attention_mask [rows, longest] that PackingCollator makes with it")
    real = mask.bool()
    require(real.sum() == tokens.numel(), f"{PACKED} has another number of tokens than its attention_mask")
    packed = {"input_ids": (tokens, config.pad_token_id or 0), "token_type_ids": (arguments.get("token_type_ids"), 0)}
    for name, (values, padding) in packed.items():
        if values is not None:
            arguments[name] = values.new_full(real.shape, padding).masked_scatter(real, values)
    rows, longest = real.shape
    return arguments, TokenCounts(rows, longest, tokens.numel(), 0, longest, False)
