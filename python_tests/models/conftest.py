import copy
import gc

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

LAYERS, HEADS = 3, 4


def tiny_config(**changes):
    """A BERT small enough for finite patience; dropout off unless asked for, so that runs compare exactly."""
    settings = {
        "vocab_size": 100,
        "hidden_size": 48,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 64,
        "max_position_embeddings": 40,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        # Large enough weights that every head and FFN matters to the loss.
        "initializer_range": 0.2,
    }
    return BertConfig(**(settings | changes))


def tiny_batch(rows=5, width=17, seed=0):
    """Token ids, a right-padded mask of uneven lengths, and labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([width, 3, 9, 1, 12, 7, 2, 16])[:rows]
    return {
        "input_ids": torch.randint(0, 100, (rows, width), generator=generator),
        "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
        "token_type_ids": torch.randint(0, 2, (rows, width), generator=generator),
        "labels": torch.randint(0, 3, (rows,), generator=generator),
    }


@pytest.fixture
def model():
    torch.manual_seed(0)
    return BertForSequenceClassification(tiny_config()).eval()


@pytest.fixture
def stock(model):
    return copy.deepcopy(model)


@pytest.fixture
def batch():
    return tiny_batch()


@pytest.fixture
def process_group(tmp_path):
    """A process group of torch.distributed with this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "process-group"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    # Whoever frees the group last waits for its threads; a DDP model would do so holding the GIL, which they need.
    gc.collect()
    torch.distributed.destroy_process_group()
