"""Costs against counting, and their table."""

import json

import pytest
import torch
from typer.testing import CliRunner

import ticketops
from models.test_shrink import TICKETS
from ticketops.cli import app
from ticketops.models import Cost, costs
from ticketops.models.record import kept_neurons


@pytest.mark.parametrize("name", TICKETS)
def test_costs_are_what_counting_gives(name, model):
    whole = sum(parameter.numel() for parameter in model.parameters())
    head, ffn = 4 * 48 * 12 + 2 * 12 * 17, 2 * 48 * 64
    assert costs(model, 17) == (Cost(whole, 3 * (4 * head + ffn), 4 * whole),) * 2
    before = costs(model)[0]
    ticketops.shrink(model, TICKETS[name])
    left = sum(parameter.numel() for parameter in model.parameters())
    macs = int(TICKETS[name].head_mask.sum()) * head + int(kept_neurons(TICKETS[name], 64).sum()) * 2 * 48
    assert costs(model, 17)[1] == Cost(left, macs, 4 * left)
    assert costs(model)[0] == before


def test_show_prints_a_models_costs(model, tmp_path):
    folder = ticketops.export(model, tmp_path / "out", ticket=TICKETS["neither"])
    whole, left = costs(ticketops.load(folder))
    text = CliRunner().invoke(app, ["show", str(folder)]).stdout
    assert f"{whole.parameters:,}" in text
    assert f"{left.macs_per_token:,}" in text
    found = json.loads(CliRunner().invoke(app, ["show", str(folder), "--json"]).stdout)
    assert found["costs"]["bytes"] == [whole.bytes, left.bytes]
    assert torch.equal(torch.tensor(found["head_mask"]), TICKETS["neither"].head_mask)
