"""Checkpoints of transformers 4.x with `pruned_heads`."""

import copy
import json

import pytest
import torch
import transformers
from transformers import AutoModelForSequenceClassification

import ticketops
from models.test_apply import masked
from models.test_encoders import CLASSIFIERS, draw, make
from models.test_encoders import masked as masked_encoder
from models.test_shrink import close
from ticketops import Ticket
from ticketops.errors import InputError
from ticketops.models.record import held_ticket

HEADS_ONLY = Ticket(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [0, 0, 0, 1]]).bool(), torch.ones(3).bool())


@pytest.fixture
def old(model, tmp_path):
    return as_old(model, tmp_path / "old")


def as_old(model, folder):
    """A folder as 4.x wrote it: true shapes, and what is gone instead of what is there."""
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


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_encoder_loads_everywhere(name, tmp_path):
    model, auto = make(name), getattr(transformers, "AutoModelFor" + name.split("For")[1])
    batch = draw(model)
    want = masked_encoder(copy.deepcopy(model), HEADS_ONLY)(**batch).logits
    folder = as_old(model, tmp_path / "old")
    for each in (ticketops.load(folder), auto.from_pretrained(folder)):
        assert held_ticket(each.config) == HEADS_ONLY
        torch.testing.assert_close(each(**batch).logits, want, **close)
        with ticketops.patch(each):
            torch.testing.assert_close(each(**batch).logits, want, **close)


def test_weights_that_do_not_fit_their_record_are_refused(old):
    content = json.loads((old / "config.json").read_text())
    # Layer 0 has two heads' weights, and would be said to have three.
    (old / "config.json").write_text(json.dumps(content | {"pruned_heads": {"0": [1], "2": [2, 1, 0]}}))
    with pytest.raises(InputError, match="which its configuration does not make"):
        ticketops.load(old)
    with pytest.raises(RuntimeError, match="mismatch"):
        AutoModelForSequenceClassification.from_pretrained(old)
    # Other heads of the same number fit the weights: which ones they are, only the record knows.
    (old / "config.json").write_text(json.dumps(content | {"pruned_heads": {"0": [0, 3], "2": [2, 1, 0]}}))
    assert held_ticket(ticketops.load(old).config).head_mask[0].tolist() == [False, True, True, False]


@pytest.mark.parametrize("junk", [{"3": [0]}, {"0": [4]}, {"0": 1}, {"x": []}, [1], {"0": [True]}, "all"])
def test_damaged_records_are_refused(junk, old):
    content = json.loads((old / "config.json").read_text())
    (old / "config.json").write_text(json.dumps(content | {"pruned_heads": junk}))
    with pytest.raises(InputError, match="pruned_heads"):
        ticketops.load(old)
