"""Encoders computed by CUDA graphs, which are emulated where there is no GPU: nothing may differ from a run without."""

import copy
import gc
import itertools
import pickle
import threading

import pytest
import torch
from bounds import roundings
from transformers import BertForSequenceClassification

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from models.emulated_graphs import emulated
from ticketops import Ticket
from ticketops.errors import InputError, UnsupportedError
from ticketops.models.graphs import Graphs


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")],
        ),
    ]
)
def device(request):
    if request.param == "cuda":
        yield "cuda"
        return
    with emulated(sightings=1):
        yield "cpu"


@pytest.fixture
def pair(device):
    """A model with graphs and its copy without, both with rows rounded alike."""
    torch.manual_seed(0)
    config = tiny_config(hidden_size=64, hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.1)
    model = BertForSequenceClassification(config).to(device).train()
    other = copy.deepcopy(model)
    return ticketops.patch(model, graphs="auto"), ticketops.patch(other, bucket=64, graphs=False)


def batch(handle, seed, rows=5, width=17):
    return {name: value.to(handle.model.device) for name, value in tiny_batch(rows, width, seed).items()}


def losses(handle, seeds, **sizes):
    """The loss of a pass for each seed, with the same dropout every time."""
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        found.append(handle.model(**batch(handle, seed, **sizes)).loss)
    return found


def gradients(handle):
    return {name: p.grad.clone() for name, p in handle.model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs):
    """On a CPU the same to the bit: the same ops run."""
    ours, theirs = (list(x.values()) if isinstance(x, dict) else list(x) for x in (ours, theirs))
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, **(roundings(100, 10) if one.is_cuda else {"rtol": 0, "atol": 0}))


def both(pair, run):
    """What `run` returns of both models, which has to be the same."""
    ours, theirs = map(run, pair)
    assert_same(ours, theirs)
    return ours


def train(handle, seeds=(0, 1, 2, 3, 4, 5), between=lambda handle, seed: None, **sizes):
    """Trains on several batches; returns losses and the trained weights."""
    optimizer = torch.optim.AdamW(handle.model.parameters(), lr=1e-3)
    found = []
    for seed in seeds:
        between(handle, seed)
        (loss,) = losses(handle, [seed], **sizes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return found + [p.detach() for p in handle.model.parameters()]


def test_training_and_importance_are_those_without_graphs(pair):
    def run(handle):
        with handle.record_importance(neurons=True) as importance:
            trained = train(handle)
        return [*trained, importance.head, importance.ffn, importance.neuron]

    both(pair, run)
    graphs = pair[0].graphs
    assert graphs.replays == 5
    assert dict(graphs.eager) == {"a shape seen at most 1 time before": 1}
    assert "1 shape" in repr(graphs)
    assert pair[1].graphs is None


@pytest.mark.parametrize("granularity", ["example", "token", "batch"])
def test_frozen_weights_leave_importance_behind_alone(pair, granularity):
    def run(handle):
        handle.model.requires_grad_(False)
        with handle.record_importance(granularity) as importance:
            for seed in range(3):
                losses(handle, [seed])[0].backward()
        return [importance.head, importance.ffn]

    both(pair, run)
    assert pair[0].graphs.replays == 2


def test_shapes_have_graphs_of_their_own_and_the_least_recently_used_leave(pair, monkeypatch):
    sizes = [(5, 17), (4, 17), (5, 17), (4, 17), (5, 30)]

    def run(handle):
        return [x for turn in range(3) for rows, width in sizes for x in train(handle, [turn], rows=rows, width=width)]

    both(pair, run)
    graphs = pair[0].graphs
    assert len(graphs) == graphs.captures == 3
    # Each has its size; room is for two of them.
    graphs._entries = type(graphs._entries)((key, (entry, 10)) for key, (entry, _) in graphs._entries.items())
    graphs.budget = 25
    reserved = itertools.count(0, 10)
    monkeypatch.setattr("ticketops.models.graphs._reserved", lambda x: next(reserved))
    both(pair, lambda handle: [x for width in (40, 40) for x in train(handle, [7], rows=3, width=width)])
    assert (len(graphs), graphs.reserved) == (2, 20)
    both(pair, run)
    graphs.budget = 5
    before = graphs.captures
    both(pair, lambda handle: train(handle, [8] * 4, rows=2))
    assert graphs.eager["a graph larger than handle.graphs.budget"] == 3
    assert graphs.captures == before + 1


def test_tickets_are_switched_between_steps(pair):
    some = torch.ones(LAYERS, HEADS, dtype=torch.bool)
    some[1, :2] = False
    tickets = [None, Ticket(some, torch.tensor([True, False, True])), None]

    def run(handle):
        with handle.record_importance() as importance:
            trained = train(handle, range(12), lambda handle, seed: handle.apply(tickets[seed % 3]))
        return [*trained, importance.head, importance.ffn]

    both(pair, run)
    assert pair[0].graphs.replays == 12 - 2


def test_gradients_add_up_over_batches_of_unequal_shapes(pair):
    def run(handle):
        for _ in range(2):
            handle.model.zero_grad()
            for rows in (5, 5, 3, 5, 3, 3):
                for loss in losses(handle, [rows], rows=rows):
                    (loss / 6).backward()
        return gradients(handle)

    both(pair, run)
    assert pair[0].graphs.replays == 10


def test_gradients_that_somebody_holds_stay_as_they_are(pair):
    def run(handle):
        held = []
        for seed in range(3):
            handle.model.zero_grad()
            losses(handle, [seed])[0].backward()
            held += [p.grad for p in handle.model.parameters()]
        outputs = [handle.model.bert(**{k: v for k, v in batch(handle, 0).items() if k != "labels"})[0] for _ in "ab"]
        kept = [x.detach() for x in outputs]
        losses(handle, [5])[0].backward()
        return held + kept

    both(pair, run)
    # Nothing copies them a second time.
    weights = [layer.output.dense.weight for layer in pair[0].model.bert.encoder.layer]
    assert len({weight.grad.untyped_storage().data_ptr() for weight in weights}) == 1


def test_two_passes_before_one_backward_pass(pair):
    """As in R-Drop and siamese models: the second one runs without a graph."""

    def run(handle):
        losses(handle, [0])[0].backward()
        with handle.record_importance() as importance:
            for seed in range(3):
                first, second = losses(handle, [seed, seed + 1])
                (first + second).backward()
        return [*gradients(handle).values(), importance.head, importance.ffn]

    both(pair, run)
    assert pair[0].graphs.eager["an earlier pass whose backward pass is to come"] == 2


def test_a_pass_whose_backward_pass_never_comes_is_over_when_it_is_gone(pair):
    def run(handle):
        losses(handle, [0])
        lost = losses(handle, [1])
        between = losses(handle, [2])
        del lost
        gc.collect()
        return [*between, *losses(handle, [3])]

    both(pair, run)
    assert pair[0].graphs.replays == 2


def test_a_graph_is_kept_for_a_second_backward_pass(pair):
    def run(handle):
        losses(handle, [0])[0].backward()
        (loss,) = losses(handle, [1])
        loss.backward(retain_graph=True)
        (other,) = losses(handle, [2])
        other.backward()
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()
        return gradients(handle)

    both(pair, run)


def test_an_error_in_the_middle_of_a_step_disturbs_no_later_one(pair):
    def run(handle):
        losses(handle, [0])
        for seed in range(1, 3):
            embeddings = handle.model.bert.embeddings.word_embeddings.weight
            hook = embeddings.register_hook(lambda gradient: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                losses(handle, [seed])[0].backward()
            hook.remove()
            with pytest.raises(IndexError):
                handle.model(input_ids=torch.full((5, 17), 1000, device=handle.model.device))
            handle.model.zero_grad()
        return train(handle, range(3))

    both(pair, run)
    assert pair[0].graphs.replays >= 3


def test_a_weight_changed_before_the_backward_pass_is_an_error_as_without(pair):
    def run(handle):
        losses(handle, [0])[0].backward()
        (loss,) = losses(handle, [1])
        with torch.no_grad():
            handle.model.bert.encoder.layer[1].output.dense.weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        return []

    both(pair, run)


@pytest.mark.parametrize("move", ["data", "parameter", "dtype", "state_dict", "eval", "dropout", "freeze", "eps"])
def test_what_changes_a_model_between_steps_changes_what_graphs_compute(pair, move):
    def run(handle):
        first = train(handle, range(3))
        layer = handle.model.bert.encoder.layer[1]
        if move == "data":
            layer.output.dense.weight.data = layer.output.dense.weight.data * 1.5
        elif move == "parameter":
            layer.output.dense.weight = torch.nn.Parameter(layer.output.dense.weight.detach() * 1.5)
        elif move == "dtype":
            handle.model.bfloat16()
        elif move == "state_dict":
            handle.model.load_state_dict({name: 0.5 * x for name, x in handle.model.state_dict().items()})
        elif move == "eval":
            handle.model.eval()
        elif move == "dropout":
            layer.output.dropout.p = 0.5
        elif move == "freeze":
            layer.requires_grad_(False)
        else:
            layer.output.LayerNorm.eps = 0.1
        return first + train(handle, range(3, 6))

    both(pair, run)
    assert pair[0].graphs.replays >= 4


def test_passes_that_graphs_cannot_serve_run_without_and_say_why(pair):
    ours = pair[0]

    def run(handle):
        model, found = handle.model, []
        inputs = batch(handle, 0)
        losses(handle, [0])[0].backward()
        for change in (
            {"output_hidden_states": True},
            {"anomaly": True},
            {"hook": True},
            {"checkpointing": True},
        ):
            torch.manual_seed(1)
            hook = model.bert.encoder.layer[0].register_forward_hook(lambda *_: None) if change.get("hook") else None
            model.gradient_checkpointing_enable() if change.get("checkpointing") else None
            # Where nothing is recorded, stock code computes a pass that somebody watches.
            with torch.autograd.set_detect_anomaly(change.get("anomaly", False)), handle.record_importance():
                output = model(**inputs, output_hidden_states=change.get("output_hidden_states", False))
                output.loss.backward()
            found += [output.loss, *(output.hidden_states or ())]
            hook.remove() if hook else None
        model.gradient_checkpointing_disable()
        return [*found, *gradients(handle).values()]

    both(pair, run)
    assert ours.graphs.replays == 0
    reasons = " ".join(ours.graphs.eager)
    for reason in ("hooks inside", "output_hidden_states", "anomaly", "checkpointing"):
        assert reason in reasons


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_between_steps(pair, mode):
    def run(handle):
        found = []
        for seed in range(4):
            found += train(handle, [seed])
            handle.model.eval()
            with mode():
                found += [handle.model(**batch(handle, other)).logits.clone() for other in range(3)]
            handle.model.train()
        return found

    both(pair, run)
    assert pair[0].graphs.replays == 3 + 11


def test_autocast_has_graphs_of_its_own(pair):
    def run(handle):
        found = []
        for seed in range(6):
            torch.manual_seed(seed)
            with torch.autocast(handle.model.device.type, torch.bfloat16, enabled=seed % 2 == 0):
                loss = handle.model(**batch(handle, seed)).loss
            handle.model.zero_grad()
            loss.backward()
            found += [loss, *gradients(handle).values()]
        return found

    both(pair, run)
    assert pair[0].graphs.replays == 4
    assert len(pair[0].graphs) == 2


def test_another_thread_runs_without(pair):
    ours = pair[0]
    ours.model.eval()
    with torch.no_grad():
        want = [ours.model(**batch(ours, 0)).logits for _ in range(3)][-1]
        found = []

        def work():
            with torch.no_grad():
                found.append(ours.model(**batch(ours, 0)).logits)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert_same(found, [want])
    assert ours.graphs.eager["another thread or stream than the first"] == 1


def test_second_derivatives_and_batched_gradients_are_refused(pair):
    ours = pair[0]
    losses(ours, [0])[0].backward()
    (loss,) = losses(ours, [1])
    weight = ours.model.bert.encoder.layer[0].output.dense.weight
    (gradient,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()
    del loss, gradient
    output = ours.model(**batch(ours, 2)).logits
    with pytest.raises(UnsupportedError, match="several gradients at once"):
        torch.autograd.grad(output, weight, torch.ones(2, *output.shape, device=output.device), is_grads_batched=True)


def test_some_gradients_alone(pair):
    def run(handle):
        losses(handle, [0])[0].backward()
        weight = handle.model.bert.encoder.layer[0].output.dense.weight
        found = list(torch.autograd.grad(losses(handle, [1])[0], weight))
        with handle.record_importance() as importance:
            found += torch.autograd.grad(losses(handle, [2])[0], weight)
            found += torch.autograd.grad(losses(handle, [3])[0], weight)
        with pytest.raises(InputError, match="no head importance was recorded"):
            importance.head  # noqa: B018
        return found

    both(pair, run)


def test_copies_and_pickles_have_no_graphs_yet(pair):
    ours = pair[0]
    train(ours, range(3))
    for other in (copy.deepcopy(ours.model), pickle.loads(pickle.dumps(ours.model))):
        graphs = other.bert._ticketops.graphs
        assert isinstance(graphs, Graphs)
        assert (len(graphs), graphs.replays) == (0, 0)
        assert other(**batch(ours, 0)).loss.isfinite()


def test_what_has_no_graphs_is_refused(model):
    with pytest.raises(InputError, match="graphs=True for a model on cpu: CUDA graphs need a GPU"):
        ticketops.patch(model, graphs=True)
    with pytest.raises(InputError, match="graphs='yes' is not served"):
        ticketops.patch(model, graphs="yes")
    with ticketops.patch(model, graphs="auto") as handle:
        model(**tiny_batch())
        assert dict(handle.graphs.eager) == {"tensors on a device of type 'cpu'": 1}
