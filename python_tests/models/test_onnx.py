"""ONNX exports against the shrunk model, at other sizes than the traced ones."""

import copy

import pytest
import torch
import transformers
from bounds import roundings

import ticketops
from models.conftest import tiny_batch
from models.test_apply import masked
from models.test_shrink import TICKETS
from ticketops.errors import InputError

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
        torch.testing.assert_close(got, stock(**batch).logits, **roundings(1000))
    assert sorted(path.name for path in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.onnx",
        "ticket.safetensors",
        "ticketops.json",
    ]


def test_onnx_says_its_labels_and_calls_its_axes_by_name(model, tmp_path):
    import onnxruntime

    names = dict(enumerate(("bad", "good", "odd")))
    model.config.id2label, model.config.label2id = names, {name: number for number, name in names.items()}
    folder = ticketops.export(model, tmp_path / "out", "onnx", ticket=TICKETS["uneven"])
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert {tuple(node.shape) for node in session.get_inputs()} == {("batch", "sequence")}
    assert [node.shape for node in session.get_outputs()] == [["batch", 3]]
    assert transformers.AutoConfig.from_pretrained(folder).id2label == names
    with pytest.raises(InputError, match=r"has no weights|model.safetensors"):
        ticketops.load(folder)


@pytest.mark.parametrize(
    ("kind", "inputs", "outputs"),
    [
        ("MultipleChoice", ("batch", "choice", "sequence"), [["batch", "choice"]]),
        ("TokenClassification", ("batch", "sequence"), [["batch", "sequence", 2]]),
        ("QuestionAnswering", ("batch", "sequence"), [["batch", "sequence"]] * 2),
    ],
)
def test_axes_of_other_heads(kind, inputs, outputs, model, tmp_path):
    import onnxruntime

    config = copy.deepcopy(model.config)
    config.num_labels = 2
    other = getattr(transformers, f"BertFor{kind}")(config).eval()
    folder = ticketops.export(other, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    assert {tuple(node.shape) for node in session.get_inputs()} == {inputs}
    assert [node.shape for node in session.get_outputs()] == outputs
