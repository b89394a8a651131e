"""Inputs for searches that take seconds: a random BERT and a task that it can learn."""

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import BertTokenizerFast

FILLERS = ["film", "the", "a", "plot", "and", "of", "to", "is", "in", "that", "it", "with", "this", "not", "story"]
LAYERS, HEADS = 2, 4
#: What makes a DeBERTa-v2 a v3. Distances of more than four tokens share logarithmic buckets.
DEBERTA_V3: dict[str, Any] = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_buckets": 8,
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
    "position_biased_input": False,
    "type_vocab_size": 0,
}
#: Keyword arguments of a search over these inputs: 4 trials of 6 steps each.
FIELDS = {
    "sparsities": "0.25,0.5",
    "kinds": "winning,random@0.5",
    "epochs": 2,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "max_length": 16,
    "train_rows": 48,
}


def make_model(folder: Path, encoder: str = "Bert", **changes: Any) -> Path:
    """Saves an encoder of 2 layers x 4 heads with random weights, and a tokenizer of BERT's kind.

    Args:
        folder: where to.
        encoder: name of its classes in transformers, without "Model".
        changes: what else its configuration says.
    """
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", *FILLERS]
    BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
        "initializer_range": 0.1,
    }
    config = getattr(transformers, f"{encoder}Config")(**(sizes | changes))
    getattr(transformers, f"{encoder}Model")(config).save_pretrained(folder)
    return folder


def make_task(folder: Path) -> Path:
    """Writes sentences that are labelled by whether they hold "good" or "bad"."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    for split, rows in (("train", 64), ("validation", 40)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(rows):
                label = draw.randrange(2)
                words = [draw.choice(FILLERS) for _ in range(draw.randrange(2, 9))]
                words.insert(draw.randrange(len(words)), ("bad", "good")[label])
                file.write(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    return folder


def make_pairs(folder: Path) -> Path:
    """Writes pairs of texts that are scored by how often the first says "good": a regression, of fewer rows."""
    folder.mkdir(parents=True)
    draw = random.Random(1)
    for split, rows in (("train", 40), ("validation", 30)):
        with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as file:
            for _ in range(rows):
                words = [draw.choice(["good", "film"]) for _ in range(4)]
                pair = {"sentence1": " ".join(words), "sentence2": "the plot is"}
                file.write(json.dumps({**pair, "label": words.count("good") / 2}) + "\n")
    return folder
