"""bench.sharing: what it compares is the same but for the switching, and its result says where it comes from."""

import json
import sys

import pytest
import torch
from searching.tiny import make_model, make_pairs, make_task

from bench import sharing, step
from ticketops import Ticket


def test_tickets_differ_and_cost_the_same():
    first = Ticket(torch.arange(12).expand(6, 12) < 6, torch.tensor([True, False, True, False, False, True]))
    tickets = step.turned(first, 4)
    assert tickets[0] == first
    assert len(set(tickets)) == 4
    for ticket in tickets:
        assert ticket.head_mask.sum(1).tolist() == [6] * 6
        assert ticket.ffns_pruned == 3
        # A classification computes hardly anything of the last layer's.
        assert ticket.ffn_mask[-1]


def test_the_command_prints_the_overhead_and_its_circumstances(tmp_path, monkeypatch, capsys):
    make_task(tmp_path / "good")
    make_pairs(tmp_path / "score")
    model = make_model(tmp_path / "model")
    words = ["--data", str(tmp_path), "--tasks", "good,score", "--model", str(model), "--batch-size", "8", "--json"]
    monkeypatch.setattr(sys, "argv", ["bench.sharing", *words, "--batches", "2", "--rounds", "2", "--max-length", "16"])
    assert sharing.main() == 0
    result = json.loads(capsys.readouterr().out)
    assert result["steps_timed"] == 2 * 2 * 2
    assert -1 < result["switching_overhead"] < 100
    assert result["quartiles"][0] <= result["switching_overhead"] <= result["quartiles"][1]
    assert result["torch"] == torch.__version__
    assert str(tmp_path) not in json.dumps(result)
    monkeypatch.setattr(sys, "argv", ["bench.sharing", *words, "--batches", "99"])
    assert sharing.main() == 2
    assert "lower --batches" in capsys.readouterr().err


@pytest.mark.parametrize("name", sharing.CONTENDERS)
def test_each_contender_trains_every_task(name):
    from models.conftest import tiny_batch, tiny_config
    from transformers import BertForSequenceClassification

    models = {task: BertForSequenceClassification(tiny_config(num_labels=3)) for task in "ab"}
    before = {task: model.classifier.weight.detach().clone() for task, model in models.items()}
    run = sharing.contender(models, name, torch.float32)
    for task in "ab":
        run(task, tiny_batch())
    assert not any(torch.equal(models[task].classifier.weight, before[task]) for task in "ab")
