"""Weights put back, into whole models and into what is left of them."""

import copy

import pytest
import torch
from ops.cases import launches
from transformers import BertModel

import ticketops
from models.conftest import HEADS, LAYERS, tiny_config
from models.test_apply import draw_ticket
from ticketops import Ticket
from ticketops.errors import InputError


def trained(model, batch):
    """The model after a step that moves every weight."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


@pytest.mark.parametrize("neurons", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_shrunk_model_rewinds_to_the_shrunk_pretrained_one(model, batch, seed, neurons):
    pretrained = copy.deepcopy(model.state_dict())
    ticket = draw_ticket(seed, neurons=neurons)
    expected = ticketops.shrink(copy.deepcopy(model), ticket).state_dict()
    small = trained(ticketops.shrink(trained(model, batch), ticket), batch)
    objects = list(map(id, small.parameters()))

    assert ticketops.rewind(small, pretrained) is small

    assert list(map(id, small.parameters())) == objects
    found = small.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_patched_model_keeps_its_ticket_and_its_head(model, batch):
    pretrained = {name: value.bfloat16() for name, value in model.bert.state_dict().items()}
    stock = copy.deepcopy(model)
    with ticketops.patch(model).apply(draw_ticket(1)) as handle:
        trained(model, batch)
        head = model.classifier.weight.clone()
        ticketops.rewind(model, pretrained)
        assert handle.ticket == draw_ticket(1)
        assert torch.equal(model.classifier.weight, head)
    for name, value in model.bert.state_dict().items():
        assert torch.equal(value, stock.bert.state_dict()[name].bfloat16().to(value.dtype))


def test_a_training_graph_hears_of_it(model, batch):
    loss = model(**batch).loss
    ticketops.rewind(model, copy.deepcopy(model.state_dict()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("patched", [False, True])
def test_weights_that_were_not_copied_are_named(model, batch, patched):
    given = [model.state_dict(), model.bert.state_dict()]
    if patched:
        ticketops.patch(model)
    trained(model, batch)
    for weights in given:
        with pytest.raises(InputError, match=r"copy\.deepcopy\(model\.state_dict\(\)\)"):
            ticketops.rewind(model, weights)


def test_what_does_not_fit_is_refused_before_anything_is_touched(model):
    before = copy.deepcopy(model.state_dict())
    changed = {name: value + 1 for name, value in before.items() if value.is_floating_point()}
    weight = "bert.encoder.layer.0.attention.self.query.weight"
    for wrong, message in (
        ({"bert.decoder.weight": torch.ones(2)}, "has no such weights"),
        ({weight: torch.ones(48, 47)}, r"\[48, 48\] of it"),
        ({weight: torch.ones(())}, r"to \[\]"),
    ):
        with pytest.raises(InputError, match=message):
            ticketops.rewind(model, {**changed, **wrong})
    small = ticketops.shrink(model, Ticket(torch.eye(LAYERS, HEADS).bool(), torch.ones(LAYERS).bool()))
    with pytest.raises(InputError, match="state_dict of the whole model"):
        ticketops.rewind(small, {weight: torch.ones(12, 47)})
    whole = before[weight]
    assert torch.equal(small.state_dict()[weight], whole[:12])


def test_all_layers_rewind_in_one_launch(cuda_device):
    model = BertModel(tiny_config()).to(cuda_device)
    pretrained = {name: value + 1 for name, value in model.state_dict().items()}
    ticketops.shrink(model, draw_ticket(0))
    with launches() as names:
        ticketops.rewind(model, pretrained)
    assert names == ["copy_table"]
    again = BertModel(tiny_config()).to(cuda_device)
    again.load_state_dict(pretrained)
    ticketops.shrink(again, draw_ticket(0))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
