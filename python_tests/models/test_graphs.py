"""Patched models under torch.compile: one graph where shapes are static, few graphs where they come in buckets."""

import copy

import pytest
import torch
from bounds import roundings
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import tiny_batch, tiny_config
from models.test_encoders import draw, make
from ticketops.errors import InputError


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()


def step(model, batch):
    """A training step's loss and gradients."""
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(got, want):
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, **roundings(1000, 100))


def compiled_step(model, batch, compiled):
    model.zero_grad()
    loss = compiled(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("architecture", ["bert", "deberta", "distilbert", "mpnet", "nomic_bert"])
def test_a_model_with_static_shapes_is_one_graph(architecture, batch):
    torch.manual_seed(0)
    if architecture == "bert":
        model = BertForSequenceClassification(tiny_config()).eval()
    else:
        names = {"deberta": "DebertaV2", "distilbert": "DistilBert", "mpnet": "MPNet", "nomic_bert": "NomicBert"}
        # Where it is not given, DeBERTa's head looks at the labels.
        kind = {"problem_type": "single_label_classification"} if architecture == "deberta" else {}
        model = make(f"{names[architecture]}ForSequenceClassification", **kind)
        if architecture != "nomic_bert":
            batch.pop("token_type_ids")
    want = step(model, batch)
    with ticketops.patch(model, unpad=False):
        # An error where the host would have to know a value, or where the graph breaks.
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(compiled_step(model, batch, compiled), want)


def test_a_ticket_is_one_graph_too(model, batch):
    masks = torch.ones(3, 4, dtype=torch.bool), torch.tensor([True, False, True])
    masks[0][1, 2:] = False
    with ticketops.patch(model, unpad=False) as handle:
        handle.apply(ticketops.Ticket(*masks))
        want = step(model, batch)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        assert_same(compiled_step(model, batch, compiled), want)


@pytest.mark.parametrize("name", ["BertForSequenceClassification", "ViTForImageClassification"])
def test_hooks_are_seen_where_shapes_are_static(name):
    def double(module, args, output):
        return output * 2 if isinstance(output, torch.Tensor) else (output[0] * 2, *output[1:])

    model = make(name)
    stock = copy.deepcopy(model)
    inputs = draw(stock)
    for each in (model, stock):
        layer = next(m for n, m in each.named_modules() if n.endswith(("layer.1", "layers.1")))
        layer.register_forward_hook(double)
    with ticketops.patch(model, unpad=False), torch.no_grad():
        got = torch.compile(model, backend="eager")(**inputs).logits
        torch.testing.assert_close(got, stock(**inputs).logits, **roundings(1000, 100))


def test_importance_is_recorded_beside_a_static_graph(model, batch):
    with ticketops.patch(model, unpad=False) as handle:
        with handle.record_importance() as eager:
            want = step(model, batch)
        compiled = torch.compile(model, backend="aot_eager")
        with handle.record_importance() as recorded:
            assert_same(compiled_step(model, batch, compiled), want)
    torch.testing.assert_close(recorded.head, eager.head, **roundings(10))
    torch.testing.assert_close(recorded.ffn, eager.ffn, **roundings(10))


def test_a_bucket_changes_no_result(model, stock, batch):
    want = step(stock, batch)
    with ticketops.patch(copy.deepcopy(model)) as handle, handle.record_importance("token") as exact:
        step(handle.model, batch)
    with ticketops.patch(model, bucket=32) as handle, handle.record_importance("token") as importance:
        assert_same(step(model, batch), want)
        hidden = model(**batch, output_hidden_states=True).hidden_states
    padding = batch["attention_mask"] == 0
    assert not any(state[padding].any() for state in hidden[1:])
    torch.testing.assert_close(importance.head, exact.head, **roundings(10))
    torch.testing.assert_close(importance.ffn, exact.ffn, **roundings(10))


def test_states_of_one_sequence_in_a_bucket_as_long_as_its_row_are_padded(model, stock):
    batch = {name: value[:1] for name, value in tiny_batch().items() if name != "labels"}
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, [3, 5]] = 0
    want = stock.bert(**batch, output_hidden_states=True).hidden_states
    with ticketops.patch(model, bucket=256):
        got = model.bert(**batch, output_hidden_states=True).hidden_states
    real = batch["attention_mask"] == 1
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours[real], theirs[real], **roundings(1000, 100))
        assert not ours[~real].any()


def test_what_is_compiled_for_one_batch_of_a_bucket_serves_the_others(model, stock):
    counter = CompileCounterWithBackend("aot_eager")
    graphs = []
    # Else the stock model's first call sets it, and the second is compiled anew.
    model.config.problem_type = "single_label_classification"
    with ticketops.patch(model, bucket=64):
        compiled = torch.compile(model, backend=counter, dynamic=False)
        # 34 to 41 tokens in all.
        for longest in (10, 12, 16, 9):
            batch = tiny_batch()
            batch["attention_mask"][0, longest:] = 0
            assert_same(compiled_step(model, batch, compiled), step(stock, batch))
            graphs.append(counter.frame_count)
    assert graphs == [graphs[0]] * 4


@pytest.mark.parametrize("arguments", [{"bucket": 0}, {"bucket": 1.5}, {"bucket": 8, "unpad": False}])
def test_what_is_no_bucket_is_refused(model, arguments):
    with pytest.raises(InputError, match="a bucket is a number of tokens of at least 1"):
        ticketops.patch(model, **arguments)
