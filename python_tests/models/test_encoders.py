"""Every encoder that an adapter serves: stock equality, tickets, importance, shrinking, exports."""

import copy

import pytest
import torch
import transformers

import ticketops
from models.conftest import HEADS, LAYERS
from models.test_shrink import TICKETS, close
from ticketops.models.patch import ADAPTERS, find_adapter
from ticketops.tickets import Ticket

NAMES = ["Roberta", "XLMRoberta", "Electra", "Camembert", "DistilBert"]


@pytest.fixture(params=NAMES)
def encoder(request):
    sizes = {"vocab_size": 100, "num_labels": 3, "initializer_range": 0.2, "max_position_embeddings": 40}
    if request.param == "DistilBert":
        sizes |= {"dim": 48, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64}
        sizes |= {"dropout": 0.0, "attention_dropout": 0.0}
    else:
        sizes |= {"hidden_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": 64}
        sizes |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "type_vocab_size": 2}
        sizes |= {"embedding_size": 24} if request.param == "Electra" else {}
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**sizes)
    return getattr(transformers, f"{request.param}ForSequenceClassification")(config).eval()


@pytest.fixture
def inputs(encoder, batch):
    # Ids above every special one: RoBERTa counts positions by them.
    batch["input_ids"] = (
        batch["input_ids"].clamp(min=5).where(batch["attention_mask"].bool(), encoder.config.pad_token_id)
    )
    if encoder.config.model_type == "distilbert":
        batch.pop("token_type_ids")
    return batch


def masked(stock, ticket):
    """The stock model with the ticket's masks multiplied in, at the linear layers that every encoder has."""
    adapter, base = find_adapter(stock)
    for layer, heads, ffn in zip(adapter.layers(base), ticket.head_mask, ticket.ffn_mask, strict=True):
        parts, mask = adapter.parts(layer), heads.repeat_interleave(12)
        parts.output.register_forward_pre_hook(lambda module, args, mask=mask: (args[0] * mask,))
        parts.fc2.register_forward_hook(lambda module, args, output, ffn=ffn: output * ffn)
    return stock


def test_every_adapter_is_tested():
    assert {adapter.base.__name__ for adapter in ADAPTERS} == {f"{name}Model" for name in ["Bert", *NAMES]}


@pytest.mark.parametrize("name", ["full", "neither"])
def test_patched_equals_stock_under_tickets(name, encoder, inputs):
    want = masked(copy.deepcopy(encoder), TICKETS[name])
    classes = [type(module) for module in encoder.modules()]
    handle = ticketops.patch(encoder).apply(TICKETS[name])
    outputs = [each(**inputs, output_hidden_states=True) for each in (encoder, want)]
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, **close)
    assert len(outputs[0].hidden_states) == len(outputs[1].hidden_states) == LAYERS + 1
    for output in outputs:
        output.loss.backward()
    for (key, a), b in zip(encoder.named_parameters(), want.parameters(), strict=True):
        gradient = torch.zeros_like(a) if a.grad is None else a.grad
        other = torch.zeros_like(b) if b.grad is None else b.grad
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
    handle.revert()
    assert [type(module) for module in encoder.modules()] == classes


def test_importance_equals_the_weight_gradient_identity(encoder, inputs):
    with ticketops.patch(encoder) as handle, handle.record_importance("batch") as importance:
        encoder(**inputs).loss.backward()
    adapter, base = find_adapter(encoder)
    for index, layer in enumerate(adapter.layers(base)):
        parts = adapter.parts(layer)
        weight = parts.output.weight
        products = (weight * weight.grad).detach().double().unflatten(1, (HEADS, -1)).sum((0, 2))
        torch.testing.assert_close(importance.head[index], products.abs(), rtol=1e-4, atol=1e-6)
        product = sum((p * p.grad).detach().double().sum() for p in (parts.fc2.weight, parts.fc2.bias))
        torch.testing.assert_close(importance.ffn[index], product.abs(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("format", ["compact", "dense"])
def test_exports_equal_masked(format, encoder, inputs, tmp_path):
    want = masked(copy.deepcopy(encoder), TICKETS["neither"])(**inputs).logits
    folder = ticketops.export(encoder, tmp_path / "out", format, ticket=TICKETS["neither"])
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    torch.testing.assert_close(loaded(**inputs).logits, want, **close)
    with ticketops.patch(loaded).apply(Ticket.full(LAYERS, HEADS)):
        torch.testing.assert_close(loaded(**inputs).logits, want, **close)


def test_dropout_is_where_stock_has_it(encoder):
    adapter, base = find_adapter(encoder)
    parts = adapter.parts(adapter.layers(base)[0])
    inside = [module for module in adapter.layers(base)[0].modules() if isinstance(module, torch.nn.Dropout)]
    assert {id(module) for module in parts.dropouts} == {id(module) for module in inside}


def test_an_encoder_is_shared_saved_and_loaded(encoder, inputs, tmp_path):
    del inputs["labels"]
    config = copy.deepcopy(encoder.config)
    config.num_labels = 1
    other = type(encoder)(config)
    shared = ticketops.SharedModel({"a": encoder, "b": other}, {"b": TICKETS["neither"]}).eval()
    again = ticketops.SharedModel.load(shared.save(tmp_path / "shared"))
    with torch.no_grad():
        for task, labels in (("a", 3), ("b", 1)):
            got = again(task, **inputs).logits
            assert got.shape[1] == labels
            assert torch.equal(got, shared(task, **inputs).logits)
