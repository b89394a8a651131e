"""Costs against counting, and their table."""

import copy
import json
from dataclasses import asdict

import numpy as np
import pytest
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
    assert costs(model, 17) == (Cost(whole, 3 * (4 * head + ffn), 4 * whole, 17),) * 2
    before = costs(model)[0]
    ticketops.shrink(model, TICKETS[name])
    left = sum(parameter.numel() for parameter in model.parameters())
    macs = int(TICKETS[name].head_mask.sum()) * head + int(kept_neurons(TICKETS[name], 64).sum()) * 2 * 48
    assert costs(model, 17)[1] == Cost(left, macs, 4 * left, 17)
    assert costs(model)[0] == before


def test_a_tickets_costs_are_those_of_what_it_leaves(model):
    want = costs(ticketops.shrink(copy.deepcopy(model), TICKETS["neurons"]))
    assert costs(model, ticket=TICKETS["neurons"]) == want
    ticketops.shrink(model, TICKETS["uneven"])
    want = costs(ticketops.shrink(copy.deepcopy(model), TICKETS["neurons"]))
    assert costs(model, ticket=TICKETS["neurons"]) == want


def test_show_prints_a_models_costs(model, tmp_path):
    ticket = TICKETS["neurons"]
    folder = ticketops.export(model, tmp_path / "out", ticket=ticket)
    whole, left = costs(ticketops.load(folder))
    text = CliRunner().invoke(app, ["show", str(folder), "--latency"]).stdout
    assert f"{whole.parameters:,}" in text
    assert f"{left.macs_per_token:,}" in text
    assert "ms for a batch of 32 x 32 tokens" in text
    found = json.loads(CliRunner().invoke(app, ["show", str(folder), "--latency", "--json"]).stdout)
    assert found["costs"] == {"whole": asdict(whole), "left": asdict(left)}
    # 40 positions: 128 tokens do not fit.
    assert [(row["batch"], row["length"]) for row in found["latencies"]] == [(1, 32), (8, 32), (32, 32)]
    for row in found["latencies"]:
        times = np.array(row["turns"])
        assert times.shape[1] == 2
        for place, name in enumerate(("whole", "left")):
            quartiles = row[f"{name}_quartiles_ms"]
            assert 0 < quartiles[0] <= row[f"{name}_ms"] <= quartiles[1]
            assert row[f"{name}_ms"] == pytest.approx(np.median(times[:, place]), abs=1e-3)
    for name in ("head_mask", "ffn_mask", "neuron_mask"):
        assert found[name] == getattr(ticket, name).tolist()
    refused = CliRunner().invoke(app, ["show", str(folder / "ticket.safetensors"), "--latency"])
    assert (refused.exit_code, "give a model's folder" in refused.output) == (2, True)
