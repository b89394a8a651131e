"""ONNX exports against the shrunk model, at other sizes than the traced ones."""

import copy

import pytest
import torch

import ticketops
from models.conftest import tiny_batch
from models.test_apply import masked
from models.test_shrink import TICKETS

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", TICKETS)
def test_onnx_equals_masked(name, model, tmp_path):
    from ticketops.models.onnx import run_onnx

    folder = ticketops.export(model, tmp_path / "out", "onnx", ticket=TICKETS[name])
    stock = masked(copy.deepcopy(model), TICKETS[name])
    for rows, width in ((5, 17), (1, 30), (2, 16)):
        batch = tiny_batch(rows, width)
        batch.pop("labels")
        got = run_onnx(folder, batch)["logits"]
        torch.testing.assert_close(got, stock(**batch).logits, rtol=1e-4, atol=1e-4)
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "model.onnx",
        "ticket.safetensors",
        "ticketops.json",
    ]
