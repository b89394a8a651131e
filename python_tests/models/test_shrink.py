"""A shrunk model against the masked one: outputs, gradients, training, importance, and from_pretrained elsewhere."""

import copy
import json
import random
import subprocess
import sys

import pytest
import torch
from bounds import roundings
from safetensors.torch import load_file
from transformers import BertForSequenceClassification, BertModel

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from models.test_apply import draw_ticket, masked
from ticketops import Ticket
from ticketops.errors import InputError, UnsupportedError
from ticketops.models import weight_counts
from ticketops.models.record import held_ticket, kept_neurons
from ticketops.optim import Adamax

# Uneven heads; a layer without heads; one without FFN; one without either.
TICKETS = {
    "uneven": Ticket(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]]).bool(), torch.ones(3).bool()),
    "no heads": Ticket(torch.tensor([[0, 0, 0, 0], [1, 1, 0, 1], [1, 1, 1, 1]]).bool(), torch.ones(3).bool()),
    "no FFN": Ticket(torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]).bool(), torch.tensor([1, 0, 1]).bool()),
    "neither": Ticket(torch.tensor([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool(), torch.tensor([1, 0, 0]).bool()),
    "neurons": Ticket(
        torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0], [1, 0, 1, 1]]).bool(),
        torch.tensor([1, 1, 0]).bool(),
        neuron_mask=torch.stack([torch.arange(64) % 3 == 0, torch.arange(64) > 0, torch.arange(64) > 9]),
    ),
    "nothing left": Ticket(torch.zeros(3, 4).bool(), torch.zeros(3).bool()),
    "full": Ticket.full(LAYERS, HEADS),
}
close = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=TICKETS)
def ticket(request):
    return TICKETS[request.param]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_shrunk_equals_masked_in_stock_code_and_patched(attention, ticket, batch):
    torch.manual_seed(0)
    model = BertForSequenceClassification._from_config(tiny_config(), attn_implementation=attention).eval()
    want = masked(copy.deepcopy(model), ticket)(**batch)
    want.loss.backward()
    assert ticketops.shrink(model, ticket) is model
    got = model(**batch, output_hidden_states=True)
    torch.testing.assert_close(got.logits, want.logits, **close)
    got.loss.backward()
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with ticketops.patch(model):
        got = model(**batch)
        torch.testing.assert_close(got.logits, want.logits, **close)
        got.loss.backward()
    for gradient, parameter in zip(gradients, model.parameters(), strict=True):
        if parameter.numel():
            torch.testing.assert_close(parameter.grad, gradient, **roundings(1000, 100))


def test_weights_attributes_and_configuration_agree(model, ticket):
    before = weight_counts(model)
    ticketops.shrink(model, ticket)
    counts = weight_counts(model)
    assert (counts.head, counts.total / before.total) == (before.head, ticket.weights_remaining(before))
    neurons = kept_neurons(ticket, 64)
    for layer, heads, width in zip(model.bert.encoder.layer, ticket.head_mask, neurons.sum(1).tolist(), strict=True):
        attention, kept = layer.attention.self, int(heads.sum())
        assert (attention.num_attention_heads, attention.all_head_size) == (kept, 12 * kept)
        for linear in (attention.query, attention.key, attention.value):
            assert linear.out_features == 12 * kept
            assert _shapes(linear) == ([(12 * kept, 48), (12 * kept,)] if kept else [])
        assert layer.attention.output.dense.in_features == 12 * kept
        assert _shapes(layer.attention.output.dense) == [(48, 12 * kept), (48,)][not kept :]
        # Fused attention need not know what no head is.
        own = attention.config._attn_implementation
        assert own == (model.config._attn_implementation if kept else "ticketops_no_heads")
        assert layer.intermediate.dense.out_features == layer.output.dense.in_features == width
        assert _shapes(layer.intermediate.dense) == ([(width, 48), (width,)] if width else [])
        assert _shapes(layer.output.dense) == ([(48, width), (48,)] if width else [])
    record = (
        None
        if ticket.is_full
        else {
            "heads": [row.nonzero().flatten().tolist() for row in ticket.head_mask],
            "ffns": ticket.ffn_mask.nonzero().flatten().tolist(),
        }
    )
    if ticket.neuron_mask is not None:
        record["neurons"] = ["9249249249249249", "7fffffffffffffff", "0" * 16]
    assert getattr(model.config, "ticketops", None) == record
    assert held_ticket(model.config) == ticket
    others = [m for m in model.modules() if hasattr(m, "config") and m.config is not model.config]
    assert others == [
        layer.attention.self for layer in model.bert.encoder.layer if not layer.attention.self.all_head_size
    ]


def _shapes(linear):
    return [tuple(parameter.shape) for parameter in linear.parameters()]


def test_a_configuration_shared_with_another_model_is_left_alone():
    config = tiny_config()
    one, other = BertModel(config), BertModel(config)
    ticketops.shrink(one, TICKETS["uneven"])
    assert not hasattr(other.config, "ticketops")
    ticketops.patch(other)


@pytest.mark.parametrize("neurons", [(False, False), (False, True), (True, False), (True, True)])
def test_shrinking_twice_keeps_the_intersection(neurons, model, batch):
    first, second = draw_ticket(1, 0.3, neurons[0]), draw_ticket(2, 0.3, neurons[1])
    want = masked(copy.deepcopy(model), first & second)(**batch).logits
    ticketops.shrink(ticketops.shrink(model, first), second)
    torch.testing.assert_close(model(**batch).logits, want, **close)


def test_a_patched_model_stays_patched_with_its_ticket(model, batch):
    applied, cut = draw_ticket(3, 0.3, neurons=True), draw_ticket(4, 0.3, neurons=True)
    stock = copy.deepcopy(model)
    handle = ticketops.patch(model).apply(applied)
    ticketops.shrink(model, cut)
    assert handle.ticket == applied
    for ticket in (applied, None, draw_ticket(5), applied):
        handle.apply(ticket)
        left = cut if ticket is None else cut & ticket
        want = masked(copy.deepcopy(stock), left)(**batch)
        got = model(**batch)
        torch.testing.assert_close(got.logits, want.logits, **close)
    got.loss.backward()
    handle.revert()
    torch.testing.assert_close(model(**batch).logits, masked(copy.deepcopy(stock), cut)(**batch).logits, **close)


@pytest.mark.parametrize("granularity", ["example", "token", "batch"])
def test_importance_of_a_shrunk_model_keeps_the_architectures_shape(granularity, model, batch):
    cut, applied = TICKETS["neurons"], draw_ticket(3, 0.2, neurons=True)
    other = copy.deepcopy(model)
    ticketops.shrink(model, cut)
    found = []
    for each, ticket in ((model, applied), (other, applied & cut)):
        with (
            ticketops.patch(each).apply(ticket) as handle,
            handle.record_importance(granularity, neurons=True) as importance,
        ):
            each(**batch).loss.backward()
        found.append(importance)
    torch.testing.assert_close(found[0].head, found[1].head, **roundings(1000, 10))
    torch.testing.assert_close(found[0].ffn, found[1].ffn, **roundings(1000, 10))
    torch.testing.assert_close(found[0].neuron, found[1].neuron, **roundings(1000, 10))
    assert torch.equal(found[0].neuron > 0, kept_neurons(applied & cut, 64))


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "authors' adamax": lambda p: Adamax(p, lr=1e-2, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_training_goes_on_with_the_optimizers_state(make, model, ticket):
    """One step whole, then three with the ticket: masked and shrunk give the same weights."""
    twin = copy.deepcopy(model)
    for each in (model, twin):
        handle, optimizer = ticketops.patch(each), make(each.parameters())
        for step in range(4):
            if step == 1:
                handle.apply(ticket) if each is twin else ticketops.shrink(each, ticket, optimizer=optimizer)
            optimizer.zero_grad()
            each(**tiny_batch(seed=step)).loss.backward()
            optimizer.step()
        handle.revert()
    ticketops.shrink(twin, ticket)
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        # A key bias has no gradient but rounding noise, which most of the optimizers make a whole step of.
        if not name.endswith("key.bias"):
            torch.testing.assert_close(a, b, **roundings(10000, 200), msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_the_optimizers_state_is_cut_exactly(make, model, batch):
    """The state of what is left is bit for bit what it was; that of what is gone is gone."""
    ticket, optimizer = TICKETS["neurons"], make(model.parameters())
    model(**batch).loss.backward()
    optimizer.step()
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    old = {name: copy.deepcopy(optimizer.state[parameter]) for name, parameter in model.named_parameters()}
    ticketops.shrink(model, ticket, optimizer=optimizer)
    neurons, layer = kept_neurons(ticket, 64), "bert.encoder.layer.{}.".format
    rows = {f"{layer(0)}intermediate.dense.{name}": neurons[0] for name in ("weight", "bias")}
    rows |= {
        f"{layer(2)}attention.self.{name}.weight": ticket.head_mask[2].repeat_interleave(12)
        for name in ["query", "key"]
    }
    columns = {f"{layer(0)}output.dense.weight": neurons[0]}
    columns[f"{layer(2)}attention.output.dense.weight"] = ticket.head_mask[2].repeat_interleave(12)
    left = {names[id(parameter)]: state for parameter, state in optimizer.state.items()}
    assert left.keys() == {name for name, _ in model.named_parameters()}
    gone = {f"{layer(2)}{part}.dense.{name}" for part in ("intermediate", "output") for name in ("weight", "bias")}
    gone |= {f"{layer(1)}attention.self.{p}.{name}" for p in ("query", "key", "value") for name in ("weight", "bias")}
    assert set(old) - set(left) == gone | {f"{layer(1)}attention.output.dense.weight"}
    for name, state in left.items():
        for key, value in state.items():
            want = old[name][key]
            if isinstance(value, torch.Tensor) and want.ndim and name in rows:
                want = want[rows[name]]
            elif isinstance(value, torch.Tensor) and want.ndim and name in columns:
                want = want[:, columns[name]]
            elif isinstance(value, torch.Tensor) and value.shape != want.shape:
                assert name.startswith((layer(1), layer(2))), name
                continue
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(want)), (name, key)


def test_gradients_are_cut_along(model, batch):
    ticket = TICKETS["uneven"]
    model(**batch).loss.backward()
    want = model.bert.encoder.layer[0].attention.output.dense.weight.grad.view(48, HEADS, 12)[:, [0, 2]].flatten(1)
    ticketops.shrink(model, ticket)
    assert torch.equal(model.bert.encoder.layer[0].attention.output.dense.weight.grad, want)


def test_an_optimizer_that_cannot_be_cut_is_refused_and_nothing_changes(model, batch):
    optimizer = torch.optim.Adafactor(model.parameters())
    model(**batch).loss.backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UnsupportedError, match="Adafactor keeps"):
        ticketops.shrink(model, TICKETS["uneven"], optimizer=optimizer)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(model.config, "ticketops")


def test_a_ticket_of_another_shape_is_refused(model):
    with pytest.raises(InputError, match="12 layers"):
        ticketops.shrink(model, Ticket.full(12, 12))


def test_weights_cut_by_somebody_else_are_named(model):
    attention = model.bert.encoder.layer[1].attention.self
    attention.query = torch.nn.Linear(48, 24)
    with pytest.raises(UnsupportedError, match="layer 1 has weights for 2 heads where its configuration says 4"):
        ticketops.patch(model)


LOADER = """
import json, sys
{imports}
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert type(model).__name__ == "BertForSequenceClassification", type(model)
assert type(model.bert.encoder).__module__.startswith("transformers."), type(model.bert.encoder)
batch = {{name: torch.tensor(value) for name, value in json.load(open(sys.argv[2])).items()}}
with torch.no_grad():
    output = model(**batch, output_hidden_states=True)
assert len(output.hidden_states) == 4
save_file({{"logits": output.logits}}, sys.argv[3])
"""


@pytest.mark.parametrize("imports", ["import ticketops", "import transformers.models.bert.modeling_bert, ticketops"])
def test_a_process_that_never_saw_the_original_loads_it(imports, model, batch, tmp_path):
    ticket = TICKETS["neither"]
    batch.pop("labels")
    want = masked(copy.deepcopy(model), ticket)(**batch).logits
    ticketops.shrink(model, ticket).save_pretrained(tmp_path / "small")
    (tmp_path / "batch.json").write_text(json.dumps({name: value.tolist() for name, value in batch.items()}))
    arguments = [tmp_path / "small", tmp_path / "batch.json", tmp_path / "logits.safetensors"]
    subprocess.run([sys.executable, "-c", LOADER.format(imports=imports), *map(str, arguments)], check=True)
    torch.testing.assert_close(load_file(arguments[2])["logits"], want, **close)


def test_importing_ticketops_imports_neither_torch_nor_transformers():
    code = "import ticketops, sys; sys.exit(len({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_class_of_the_same_name_is_left_alone():
    from transformers import BertGenerationConfig, BertGenerationEncoder

    config = BertGenerationConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=3, num_attention_heads=4, intermediate_size=8
    )
    config.ticketops = {"heads": [[0]] * 3, "ffns": []}
    assert BertGenerationEncoder(config).encoder.layer[0].attention.self.query.out_features == 8


def test_hostile_records_are_refused_in_one_line():
    """4000 damaged records, and none of them is an endless loop, another exception or a ticket."""
    draw, good, refused = random.Random(0), {"heads": [[0, 2], [], [1]], "ffns": [0, 2]}, 0
    good["neurons"] = ["9249249249249249", "0" * 16, "7fffffffffffffff"]
    junk = [
        None,
        -1,
        4,
        10**30,
        1.0,
        True,
        "0",
        [0, 0],
        [2, 1],
        {},
        [[]],
        float("nan"),
        "G" * 16,
        "٣" * 16,
        "f" * 10**6,
    ]
    config = tiny_config()
    while refused < 4000:
        record = copy.deepcopy(good)
        row = draw.choice([record, record["heads"], record["heads"][0], record["ffns"], record["neurons"]])
        row[draw.choice(list(row)) if isinstance(row, dict) else draw.randrange(len(row))] = draw.choice(junk)
        if record.get("neurons") is None:
            continue
        config.ticketops = record
        with pytest.raises(InputError, match=r'^config.json\'s "ticketops" [^\n]*$'):
            held_ticket(config)
        refused += 1
    config.ticketops, config.num_hidden_layers = good, 10**9
    with pytest.raises(InputError, match="claims 1000000000 layers"):
        held_ticket(config)
