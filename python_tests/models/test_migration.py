"""Checkpoints of transformers 4.x with `pruned_heads`."""

import copy
import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import ticketops
from models.test_apply import masked
from models.test_shrink import close
from ticketops import Ticket
from ticketops.errors import InputError

HEADS_ONLY = Ticket(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool(), torch.ones(3).bool())


@pytest.fixture
def old(model, tmp_path):
    """A folder as 4.x wrote it: true shapes, and what is gone instead of what is there."""
    folder = tmp_path / "old"
    ticketops.shrink(copy.deepcopy(model), HEADS_ONLY).save_pretrained(folder)
    content = json.loads((folder / "config.json").read_text())
    del content["ticketops"]
    (folder / "config.json").write_text(json.dumps(content | {"pruned_heads": {"0": [1, 3], "2": [2, 1, 0]}}))
    return folder


def test_it_loads_and_leaves_as_a_ticket(old, model, batch, tmp_path):
    want = masked(copy.deepcopy(model), HEADS_ONLY)(**batch).logits
    loaded = ticketops.load(old)
    for each in (loaded, AutoModelForSequenceClassification.from_pretrained(old)):
        torch.testing.assert_close(each(**batch).logits, want, **close)
    new = ticketops.export(loaded, tmp_path / "new")
    content = json.loads((new / "config.json").read_text())
    assert content["ticketops"]["heads"] == [[0, 2], [0, 1, 2, 3], [3]]
    assert "pruned_heads" not in content
    assert Ticket.load(new / "ticket.safetensors") == HEADS_ONLY
    torch.testing.assert_close(ticketops.load(new)(**batch).logits, want, **close)


@pytest.mark.parametrize("junk", [{"3": [0]}, {"0": [4]}, {"0": 1}, {"x": []}, [1], {"0": [True]}, "all"])
def test_damaged_records_are_refused(junk, old):
    content = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(content | {"pruned_heads": junk}))
    with pytest.raises(InputError, match="pruned_heads"):
        ticketops.load(old)
