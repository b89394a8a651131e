"""What the examples train: a small BERT with random weights, and rows of made-up tokens that it can learn."""

import random
from collections.abc import Sequence
from typing import Any

import torch
from transformers import BertConfig, BertForSequenceClassification


def make_model() -> BertForSequenceClassification:
    """Makes the model. Yours comes from `from_pretrained`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 128}
    return BertForSequenceClassification(BertConfig(vocab_size=50, initializer_range=0.1, **sizes)).train()


def make_rows(number: int = 256) -> list[dict[str, Any]]:
    """Makes rows as a tokenizer leaves them, labelled by whether they hold token 7 or token 8."""
    draw, rows = random.Random(0), []
    for _ in range(number):
        label = draw.randrange(2)
        tokens = [draw.randrange(9, 50) for _ in range(draw.randrange(2, 12))]
        tokens.insert(draw.randrange(len(tokens)), 7 + label)
        rows.append({"input_ids": [1, *tokens, 2], "labels": label})
    return rows


def pad(rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Makes a padded batch, as transformers' DataCollatorWithPadding does."""
    width = max(len(row["input_ids"]) for row in rows)
    ids = torch.tensor([row["input_ids"] + [0] * (width - len(row["input_ids"])) for row in rows])
    labels = torch.tensor([row["labels"] for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
