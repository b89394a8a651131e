"""What pruning removes leaves nothing of size 0 behind, on which quantizers, optimizers and norms fail."""

import copy
import pickle

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import ticketops
from models.conftest import tiny_batch
from models.test_encoders import CLASSIFIERS, draw, make
from models.test_shrink import TICKETS, close
from ticketops.models import put_back, rewind
from ticketops.models.export import expand

#: A layer without heads, one without its FFN, one with nothing, neurons pruned beside them, and nothing anywhere.
EMPTY = [name for name, ticket in TICKETS.items() if name not in ("uneven", "full")]
LABELS = {"labels": torch.tensor([0, 2, 1, 2])}


def check_sizes(model):
    assert all(value.numel() for value in model.state_dict().values())
    for name, module in model.named_modules():
        if getattr(module, "weight", None) is None and 0 in (
            getattr(module, "in_features", 1),
            getattr(module, "out_features", 1),
        ):
            # The bias behind attention is all that may be left of a linear layer.
            assert [key for key, _ in module.named_parameters()] == ["bias"], name
            assert not isinstance(module, nn.Linear)


@pytest.fixture(scope="module", params=CLASSIFIERS)
def whole(request):
    return make(request.param)


@pytest.mark.parametrize("name", EMPTY)
def test_optimizers_norms_and_quantizers_run(whole, name):
    model = ticketops.shrink(copy.deepcopy(whole), TICKETS[name])
    check_sizes(model)
    batch = draw(model)
    for run in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        run(**batch, **LABELS).loss.backward()
        assert nn.utils.clip_grad_norm_(run.parameters(), 1.0, float("inf")) > 0
        torch.optim.Adafactor(run.parameters()).step()
    # No worse than the twin with zeros in place of what is gone.
    dense = expand(ticketops.shrink(copy.deepcopy(whole), TICKETS[name]))
    small = ticketops.shrink(copy.deepcopy(whole), TICKETS[name])
    want = small(**batch).logits
    small, dense = (_quantized(each)(**batch).logits for each in (small, dense))
    assert (small - want).abs().max() <= 2 * (dense - want).abs().max() + 1e-3


def _quantized(model):
    return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)


@pytest.mark.parametrize("name", ["no heads", "neither", "nothing left"])
@pytest.mark.parametrize("patched", [False, True])
def test_every_parameter_gets_a_gradient(whole, name, patched):
    model = ticketops.shrink(copy.deepcopy(whole), TICKETS[name])
    if patched:
        ticketops.patch(model)
    model(**draw(model), **LABELS).loss.backward()
    # A pooler that no head reads.
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    full = copy.deepcopy(whole)
    full(**draw(model), **LABELS).loss.backward()
    assert missing == [name for name, parameter in full.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize("patched", [False, True])
def test_it_trains_where_gradients_of_all_parameters_are_awaited(patched, model, batch, process_group):
    ticketops.shrink(model, TICKETS["neither"])
    if patched:
        ticketops.patch(model)
    parallel = DistributedDataParallel(model)
    for _ in range(3):
        parallel(**batch).loss.backward()


def test_files_with_tensors_of_size_zero_load(whole, tmp_path):
    """As earlier versions wrote them."""
    model = ticketops.shrink(copy.deepcopy(whole), TICKETS["neither"])
    model.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    tensors, gone = load_file(file), dict(whole.state_dict())
    for name in gone.keys() - model.state_dict().keys():
        if name.endswith("weight") or "q" in name:
            tensors[name] = gone[name][:0].clone()
    save_file(tensors, file, {"format": "pt"})
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    for loaded in (ticketops.load(tmp_path), again):
        check_sizes(loaded)
        batch = draw(model)
        torch.testing.assert_close(loaded(**batch).logits, model(**batch).logits, **close)


def test_a_new_model_of_the_same_shape_has_initialised_weights(model):
    ticketops.shrink(model, TICKETS["nothing left"])
    new = transformers.BertForSequenceClassification(model.config)
    assert new.state_dict().keys() == model.state_dict().keys()
    assert not new.bert.encoder.layer[0].attention.output.dense.bias.any()


def test_earlier_weights_go_in_and_out(whole):
    model = ticketops.shrink(copy.deepcopy(whole), TICKETS["neurons"])
    state = copy.deepcopy(whole.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    rewind(model, state)
    want = ticketops.shrink(copy.deepcopy(whole), TICKETS["neurons"]).state_dict()
    assert model.state_dict().keys() == want.keys()
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())
    other = make(type(whole).__name__)
    put_back(model, other)
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())


def test_a_submodule_of_nothing_is_met_by_nobody(model):
    ticketops.shrink(model, TICKETS["nothing left"])
    names = {name.rpartition(".")[2] for name, _ in model.bert.encoder.named_modules()}
    assert not names & {"query", "key", "value"}
    layer = model.bert.encoder.layer[0]
    # Another module in its place is one of the model's again.
    layer.attention.self.query = nn.Linear(48, 12)
    assert "query" in dict(layer.attention.self.named_children())


@pytest.mark.parametrize("name", EMPTY)
def test_onnx_has_no_product_of_size_zero_and_quantizes(name, model, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    quantization = pytest.importorskip("onnxruntime.quantization")
    folder = ticketops.export(model, tmp_path / "out", "onnx", ticket=TICKETS[name])
    graph = onnx.load(str(folder / "model.onnx")).graph
    assert all(0 not in tensor.dims or "shape" in tensor.name for tensor in graph.initializer)
    quantization.quantize_dynamic(folder / "model.onnx", folder / "int8.onnx")
    inputs = {key: value.numpy() for key, value in tiny_batch().items() if key != "labels"}

    def run(path):
        session = runtime.InferenceSession(str(path))
        # A model with nothing left has no attention mask either.
        return session.run(None, {node.name: inputs[node.name] for node in session.get_inputs()})[0]

    want, got = run(folder / "model.onnx"), run(folder / "int8.onnx")
    dense = ticketops.export(expand(ticketops.shrink(model, TICKETS[name])), tmp_path / "dense", "onnx")
    quantization.quantize_dynamic(dense / "model.onnx", dense / "int8.onnx")
    assert abs(got - want).max() <= 2 * abs(run(dense / "int8.onnx") - want).max() + 1e-3
