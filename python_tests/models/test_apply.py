"""A ticket applied against its masks multiplied in, and what it must not cost or move."""

import copy

import pytest
import torch
from bounds import roundings
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from ticketops import Ticket
from ticketops.errors import InputError, UnsupportedError
from ticketops.models.record import kept_neurons
from ticketops.ops.products import granule
from ticketops.optim import Adamax

FULL = torch.ones(LAYERS, HEADS).bool(), torch.ones(LAYERS).bool()


def draw_ticket(seed, share=0.5, neurons=False):
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.rand(*shape, generator=generator) > share for shape in ((LAYERS, HEADS), (LAYERS,), (LAYERS, 64))]
    return Ticket(*masks[:2], neuron_mask=masks[2] if neurons else None)


def masked(stock, ticket):
    """The stock model with the ticket's masks multiplied in, by hooks."""
    masks = (ticket.head_mask, ticket.ffn_mask, kept_neurons(ticket, 64))
    for layer, heads, ffn, neurons in zip(stock.bert.encoder.layer, *masks, strict=True):

        def scale_neurons(module, args, neurons=neurons):
            return (args[0] * neurons,)

        def scale_heads(module, args, output, heads=heads):
            return (output[0].unflatten(-1, (HEADS, -1)) * heads[:, None]).flatten(2), output[1]

        def scale_ffn(module, args, output, ffn=ffn):
            return output * ffn

        layer.attention.self.register_forward_hook(scale_heads)
        layer.output.dense.register_forward_pre_hook(scale_neurons)
        layer.output.dropout.register_forward_hook(scale_ffn)
    return stock


@settings(max_examples=12)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 0.5, 0.9, 1.1]), st.booleans(), st.booleans())
def test_applying_a_ticket_equals_multiplying_by_its_masks(seed, share, unpad, neurons):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config()).eval()
    ticket = draw_ticket(seed, share, neurons)
    stock = masked(copy.deepcopy(model), ticket)
    batch = tiny_batch()
    with ticketops.patch(model, unpad=unpad).apply(ticket):
        got, want = model(**batch), stock(**batch)
        torch.testing.assert_close(got.logits, want.logits, **roundings(100))
        got.loss.backward()
        want.loss.backward()
    for a, b in zip(model.parameters(), stock.parameters(), strict=True):
        gradient = torch.zeros_like(a) if a.grad is None else a.grad
        torch.testing.assert_close(gradient, b.grad, **roundings(1000, 100))


def pruned_parts(model, ticket):
    """Every pruned slice of every parameter, as views."""
    masks = (ticket.head_mask, ticket.ffn_mask, kept_neurons(ticket, 64))
    for layer, heads, ffn, neurons in zip(model.bert.encoder.layer, *masks, strict=True):
        attention, gone = layer.attention.self, ~heads
        for linear in (attention.query, attention.key, attention.value):
            yield linear.weight.detach().view(HEADS, -1)[gone]
            yield linear.bias.detach().view(HEADS, -1)[gone]
        yield layer.attention.output.dense.weight.detach().view(48, HEADS, -1)[:, gone]
        yield from (parameter.detach()[~neurons] for parameter in layer.intermediate.dense.parameters())
        yield layer.output.dense.weight.detach()[:, ~neurons]
        if not ffn:
            yield layer.output.dense.bias.detach()


def test_hooks_on_parameters_are_called_where_there_is_a_gradient(model, batch):
    ticket = Ticket(torch.tensor([[0] * 4, [1, 0, 1, 1], [1] * 4]).bool(), torch.tensor([1, 1, 0]).bool())
    called = set()
    with ticketops.patch(model).apply(ticket):
        for name, parameter in model.named_parameters():
            parameter.register_hook(lambda gradient, name=name: called.add((name, "gradient")))
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: called.add((name, "accumulated")))
        model(**batch).loss.backward()
        missing = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        query = model.bert.encoder.layer[1].attention.self.query.weight.grad.unflatten(0, (4, -1))
    assert {name for name, _ in called} == {name for name, _ in model.named_parameters()} - missing
    assert len(called) == 2 * len({name for name, _ in called})
    assert {name.removeprefix("bert.encoder.layer.") for name in missing} == {
        *(f"0.attention.self.{linear}.{kind}" for linear in ("query", "key", "value") for kind in ("weight", "bias")),
        *("0.attention.output.dense.weight", "2.intermediate.dense.weight", "2.intermediate.dense.bias"),
        *("2.output.dense.weight", "2.output.dense.bias"),
    }
    assert query[[0, 2, 3]].any()
    assert not query[1].any()


def test_a_step_that_is_cut_short_moves_nothing_that_is_pruned(model, batch):
    class Interrupted(torch.optim.SGD):
        interrupted = False

        def step(self, closure=None):
            if not self.interrupted:
                self.interrupted = True
                raise KeyboardInterrupt
            return super().step(closure)

    ticket = Ticket(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool(), torch.ones(3, dtype=torch.bool))
    ticketops.patch(model).apply(ticket)
    before = [part.clone() for part in pruned_parts(model, ticket)]
    optimizer = Interrupted(model.parameters(), lr=0.1, weight_decay=0.5)
    model(**batch).loss.backward()
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    optimizer.step()
    for part, old in zip(pruned_parts(model, ticket), before, strict=True):
        assert torch.equal(part, old)


def test_lbfgs_moves_nothing_that_is_pruned_along_its_history(model, batch):
    handle, optimizer = ticketops.patch(model), torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)

    def closure():
        optimizer.zero_grad()
        loss = model(**batch).loss
        loss.backward()
        return loss

    optimizer.step(closure)
    ticket = Ticket(torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool(), torch.tensor([1, 0, 1]).bool())
    handle.apply(ticket)
    before = [part.clone() for part in pruned_parts(model, ticket)]
    optimizer.step(closure)
    assert all(map(torch.equal, pruned_parts(model, ticket), before))


@pytest.fixture
def mesh(process_group):
    """One process of its own."""
    return torch.distributed.device_mesh.init_device_mesh("cpu", (1,))


@pytest.mark.parametrize("by_layer", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_a_ticket_on_sharded_weights_is_refused(model, batch, mesh, by_layer, first):
    handle = ticketops.patch(model)
    ticket = Ticket(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool(), torch.ones(3, dtype=torch.bool))
    if first:
        handle.apply(ticket)
    for layer in model.bert.encoder.layer if by_layer else ():
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    run = lambda: model(**batch) if first else handle.apply(ticket)  # noqa: E731
    with pytest.raises(UnsupportedError, match="shrink the model to the ticket before it is sharded"):
        run()


def test_what_distributes_a_model_may_copy_what_goes_to_its_layers(model, stock, batch, mesh):
    ticketops.patch(model)
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float32)
    for layer in model.bert.encoder.layer:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    torch.testing.assert_close(model(**batch).logits, stock(**batch).logits)


@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
        lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
    ],
    ids=["AdamW", "SGD", "LBFGS"],
)
def test_a_step_with_a_closure_moves_nothing_that_is_pruned(model, batch, make, by_name):
    ticket = Ticket(torch.tensor([[1, 0, 1, 0], [1, 1, 1, 1], [1, 1, 1, 1]]).bool(), torch.tensor([1, 0, 1]).bool())
    ticketops.patch(model).apply(ticket)
    before = [part.clone() for part in pruned_parts(model, ticket)]
    optimizer, calls = make(model.parameters()), []

    def closure():
        optimizer.zero_grad(set_to_none=bool(calls))
        loss = model(**batch).loss
        loss.backward()
        calls.append(loss.detach())
        return loss

    for _ in range(3):
        loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
        assert loss in calls
        assert all(map(torch.equal, pruned_parts(model, ticket), before))
    assert calls[-1] < calls[0]


def test_what_rests_is_copied_into_the_same_memory_at_every_step_until_the_ticket_changes(model, batch):
    handle = ticketops.patch(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    tickets = [
        Ticket(torch.tensor([heads, [1, 1, 1, 1], [1, 1, 1, 1]]).bool(), torch.ones(3, dtype=torch.bool))
        for heads in ([1, 0, 1, 0], [0, 1, 1, 1])
    ]
    kept = []
    for turn in (0, 0, 0, 1, 1):
        handle.apply(tickets[turn])
        before = [part.clone() for part in pruned_parts(model, tickets[turn])]
        for _ in range(3):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
            kept.append(optimizer._ticketops_frozen_slices)
        assert all(map(torch.equal, pruned_parts(model, tickets[turn]), before))
    # The first step makes the state.
    assert kept[1] is kept[2]
    assert kept[10] is kept[11] is not kept[2]
    # Weights that are moved elsewhere, or written past autograd, are held where and as they are then.
    for parameter in model.parameters():
        parameter.data = parameter.data * 2
    before = [part.clone() for part in pruned_parts(model, tickets[1])]
    optimizer.step()
    assert all(map(torch.equal, pruned_parts(model, tickets[1]), before))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, fused=True),
        lambda p: torch.optim.Adamax(p, lr=0.1, weight_decay=0.5),
        lambda p: Adamax(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
)
@pytest.mark.parametrize("order", ["ticket first", "optimizer first", "with history"])
def test_no_optimizer_moves_what_is_pruned(model, batch, make, order):
    ticket = Ticket(
        torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).bool(),
        torch.tensor([True, False, True]),
        neuron_mask=torch.arange(64).expand(LAYERS, -1) % 3 != torch.tensor([[0], [1], [9]]),
    )
    handle = ticketops.patch(model)
    if order == "ticket first":
        handle.apply(ticket)
    optimizer = make(model.parameters())
    if order == "with history":
        # Momentum and gradients of an earlier step must not leak into the pruned parts.
        model(**batch).loss.backward()
        optimizer.step()
    handle.apply(ticket)
    before = [part.clone() for part in pruned_parts(model, ticket)]
    kept_before = model.bert.encoder.layer[0].attention.self.query.weight.detach().clone()
    for _ in range(3):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for part, old in zip(pruned_parts(model, ticket), before, strict=True):
        assert torch.equal(part, old)
    kept = ticket.head_mask[0]
    now = model.bert.encoder.layer[0].attention.self.query.weight.detach().view(HEADS, -1)
    assert not torch.equal(now[kept], kept_before.view(HEADS, -1)[kept])
    handle.apply(None)
    model(**batch).loss.backward()
    optimizer.step()
    moved = [
        not torch.equal(part, old) for part, old in zip(pruned_parts(model, ticket), before, strict=True) if old.numel()
    ]
    assert all(moved)


class Work(TorchDispatchMode):
    """Notes the heads of every attention and the number of FFNs that run, forward and backward."""

    def __init__(self):
        super().__init__()
        self.heads, self.neurons, self.ffns = [], [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name.startswith("attention"):
            self.heads.append(args[0].shape[1])
        self.ffns += name.startswith("ffn")
        if name == "ffn":
            self.neurons.append(len(args[1]))
        return func(*args, **(kwargs or {}))


def test_pruned_structures_cost_no_compute(model, batch, monkeypatch):
    # Here a layer is several ops, whose work can be watched; as one op: python_tests/ops/test_layer.py.
    monkeypatch.setenv("TICKETOPS_BACKEND", "reference")
    half = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    half[:, ::2] = False
    ffns = torch.tensor([True, False, True])
    tokens = int(batch["attention_mask"].sum())
    # On some processors the number of rows is rounded up.
    step = granule(tokens, torch.float32, torch.device("cpu"))
    rows = -(-tokens // step) * step
    # Forward, input gradient and weight gradient: three products of 2 operations a weight and row, for q, k, v and o.
    per_head = 3 * 2 * rows * 4 * 48 * 12
    flops = {}
    with ticketops.patch(model, graphs=False) as handle:
        for kept, head_mask in ((4, torch.ones_like(half)), (2, half), (0, torch.zeros_like(half))):
            handle.apply(Ticket(head_mask, ffns))
            with FlopCounterMode(display=False) as counter, Work() as work:
                model(**batch).loss.backward()
            assert work.heads == [kept] * (2 * LAYERS if kept else 0)
            assert work.ffns == 2 * 2
            # The counter sees the projections; attention and FFN are ops of their own, counted above.
            flops[kept] = counter.get_total_flops()
    assert flops[4] - flops[2] == flops[2] - flops[0] == LAYERS * 2 * per_head


def test_pruned_neurons_cost_no_compute(model, batch, monkeypatch):
    monkeypatch.setenv("TICKETOPS_BACKEND", "reference")
    ticket = Ticket(*FULL, neuron_mask=torch.arange(64) < torch.tensor([[64], [10], [0]]))
    with ticketops.patch(model).apply(ticket), Work() as work:
        model(**batch).loss.backward()
    assert work.neurons == [64, 10]


def test_a_ticket_can_be_changed_and_taken_off(model, stock, batch):
    with ticketops.patch(model) as handle, torch.no_grad():
        for seed in (1, 2, 1):
            handle.apply(draw_ticket(seed))
            assert handle.ticket == draw_ticket(seed)
            want = masked(copy.deepcopy(stock), draw_ticket(seed))(**batch).logits
            torch.testing.assert_close(model(**batch).logits, want, **roundings(100))
        handle.apply(None)
        assert handle.ticket is None
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, **roundings(100))


class NewTensors(TorchDispatchMode):
    """Notes the operations that make tensors."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.names.append(func.overloadpacket.__name__)
        return result


def test_applying_a_known_ticket_makes_no_tensor(model):
    with ticketops.patch(model) as handle:
        for seed in (1, 2):
            handle.apply(draw_ticket(seed))
        handle.apply(None)
        new = draw_ticket(3)
        with NewTensors() as made:
            handle.apply(new)
        assert "clone" in made.names
        # Tickets that are equal, not the same: what is known of one holds for the other.
        again = [draw_ticket(1), draw_ticket(2), None]
        with NewTensors() as made:
            for ticket in again:
                handle.apply(ticket)
                assert handle.ticket is ticket
        # A ticket's hash looks at its masks through views of them.
        assert set(made.names) <= {"detach"}


def test_steps_on_known_tickets_bring_nothing_to_the_device(model, batch, monkeypatch):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with ticketops.patch(model) as handle, handle.record_importance():

        def step(seed):
            handle.apply(draw_ticket(seed))
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        for seed in (1, 2):
            step(seed)

        def refuse(*args, **kwargs):
            raise AssertionError("made from numbers on the host")

        monkeypatch.setattr(torch, "tensor", refuse)
        for seed in (1, 2):
            step(seed)
        with pytest.raises(AssertionError, match="on the host"):
            step(3)


def test_a_ticket_for_another_architecture_is_refused_and_changes_nothing(model):
    with ticketops.patch(model) as handle:
        handle.apply(draw_ticket(1))
        with pytest.raises(InputError, match="12"):
            handle.apply(Ticket.full(12, 12))
        with pytest.raises(InputError, match="FFNs of 32 neurons does not fit FFNs of 64"):
            handle.apply(Ticket(*FULL, neuron_mask=torch.arange(32).expand(LAYERS, -1) > 3))
        assert handle.ticket == draw_ticket(1)


def test_a_reverted_handle_says_so(model):
    handle = ticketops.patch(model)
    handle.revert()
    with pytest.raises(InputError, match="reverted"):
        handle.apply(None)
