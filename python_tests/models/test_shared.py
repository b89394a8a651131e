"""Several tasks on one encoder: what a step of one task moves, bit for bit, and what it leaves alone."""

import copy
import json
import math

import pytest
import torch
from bounds import roundings
from torch.nn.utils import clip_grad_norm_
from transformers import (
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
)

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from models.test_apply import NewTensors, masked
from ticketops import SharedModel, Ticket
from ticketops.errors import InputError
from ticketops.files import write_manifest
from ticketops.optim import Adamax

# Heads and FFNs of every sort: kept by both tasks, by one of them, by none; a layer without heads for one task.
HEAD_MASKS = {
    "pairs": [[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]],
    "score": [[1, 0, 1, 0], [1, 1, 0, 1], [0, 1, 1, 1]],
}
FFN_MASKS = {"pairs": [1, 0, 0], "score": [1, 1, 0]}
TICKETS = {
    task: Ticket(torch.tensor(HEAD_MASKS[task]).bool(), torch.tensor(FFN_MASKS[task]).bool()) for task in HEAD_MASKS
}


def models(dtype=torch.float64, **changes):
    """A classification of three labels and a regression, on the same pre-trained weights."""
    torch.manual_seed(0)
    pairs = BertForSequenceClassification(tiny_config(**changes))
    score = BertForSequenceClassification(tiny_config(num_labels=1, problem_type="regression", **changes))
    score.bert.load_state_dict(pairs.bert.state_dict())
    return {"pairs": pairs.to(dtype).eval(), "score": score.to(dtype).eval()}


def batch(task, seed=0):
    batch = tiny_batch(seed=seed)
    if task == "score":
        batch["labels"] = batch["labels"].double() / 2
    return batch


def structures(model, tensors):
    """Every head's and FFN's slice of the tensors of `model`'s encoder, by ("head" | "ffn", layer, place, name)."""
    for name, parameter in model.named_parameters():
        if ".encoder.layer." not in name or parameter not in tensors:
            continue
        layer, inner = int(name.split(".layer.")[1].split(".")[0]), name.split(".layer.")[1].split(".", 1)[1]
        for tensor in tensors[parameter]:
            if inner.startswith("attention.self."):
                for head, part in enumerate(tensor.unflatten(0, (HEADS, -1))):
                    yield ("head", layer, head, inner), part
            elif inner == "attention.output.dense.weight":
                for head in range(HEADS):
                    yield ("head", layer, head, inner), tensor.unflatten(1, (HEADS, -1))[:, head]
            elif inner.startswith(("intermediate.dense.", "output.dense.")):
                yield ("ffn", layer, 0, inner), tensor


def keeps(task, key):
    kind, layer, place, _ = key
    return bool(HEAD_MASKS[task][layer][place] if kind == "head" else FFN_MASKS[task][layer])


def snapshot(model, optimizer):
    """All of an encoder's prunable structures, values and moment estimates, copied; and their heads' parameters."""
    tensors = {
        parameter: [parameter.detach(), *(v for v in optimizer.state.get(parameter, {}).values() if v.ndim)]
        for parameter in model.parameters()
    }
    found = {}
    for key, part in structures(model, tensors):
        found.setdefault(key, []).append(part.clone())
    return found


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3),
    "adamw, fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.3, fused=True),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2, weight_decay=0.3),
    "authors' adamax": lambda p: Adamax(p, lr=1e-2, eps=1e-8, weight_decay=0.3, max_grad_norm=0),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_a_step_of_one_task_leaves_what_its_ticket_lacks_bit_identical_and_moves_what_it_keeps(name, set_to_none):
    shared = SharedModel(models(), TICKETS)
    optimizer = OPTIMIZERS[name](shared.parameters())
    encoder = shared.select("pairs")
    heads = {task: list(shared.select(task).classifier.parameters()) for task in shared.tasks}
    moved = {task: set() for task in shared.tasks}
    # The repeated tasks meet the momentum that both have left behind.
    for step, task in enumerate(["pairs", "score", "score", "pairs", "score", "pairs"]):
        shared(task, **batch(task, step)).loss.backward()
        clip_grad_norm_(shared.parameters(), 1.0)
        before = snapshot(encoder, optimizer)
        own, others = ([p.detach().clone() for t in heads for p in heads[t] if (t == task) is mine] for mine in (1, 0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)
        for key, parts in snapshot(encoder, optimizer).items():
            old = before[key]
            if not keeps(task, key):
                assert all(torch.equal(a, b) for a, b in zip(parts, old, strict=False)), (step, key)
                # Moment estimates that an optimizer has just made with the kept part of a weight are those of no
                # gradient and no decay: zeros, and Adamax's eps.
                assert all(part.abs().max() <= 1e-8 for part in parts[len(old) :]), (step, key)
            elif not torch.equal(parts[0], old[0]):
                moved[task].add(key)
        now_own, now_others = ([p for t in heads for p in heads[t] if (t == task) is mine] for mine in (1, 0))
        assert all(torch.equal(a, b) for a, b in zip(now_others, others, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(now_own, own, strict=True))
    for task in shared.tasks:
        assert moved[task] == {key for key in before if keeps(task, key)}
    assert moved["pairs"] & moved["score"]
    assert moved["pairs"] - moved["score"]
    assert set(before) - moved["pairs"] - moved["score"]


# Large, since keys' biases have no gradient but rounding, which a small eps would blow up.
EPS = 1e-3


def adamw(value, gradient, state, step, lr=1e-2, decay=0.3):
    mean, square = state
    value = value * (1 - lr * decay)
    mean = 0.9 * mean + 0.1 * gradient
    square = 0.999 * square + 0.001 * gradient**2
    corrected = square.sqrt() / math.sqrt(1 - 0.999**step) + EPS
    return value - lr / (1 - 0.9**step) * mean / corrected, (mean, square)


def adamax(value, gradient, state, step, lr=1e-2, decay=0.3):
    mean, largest = state
    gradient = gradient + decay * value
    mean = 0.9 * mean + 0.1 * gradient
    largest = torch.maximum(0.999 * largest, gradient.abs() + EPS)
    return value - lr / (1 - 0.9**step) * mean / largest, (mean, largest)


def authors_adamax(value, gradient, state, step, lr=1e-2, decay=0.3):
    mean, largest = state
    mean = 0.9 * mean + 0.1 * gradient
    largest = torch.maximum(0.999 * largest, gradient.abs() + EPS)
    return value - lr * (mean / (largest + EPS) + decay * value), (mean, largest)


@pytest.mark.parametrize(("name", "rule"), [("adamw", adamw), ("adamax", adamax), ("authors' adamax", authors_adamax)])
def test_shared_structures_receive_the_updates_of_both_tasks_as_computed_by_hand(name, rule):
    shared = SharedModel(models(), TICKETS)
    optimizer = OPTIMIZERS[name](shared.parameters())
    for group in optimizer.param_groups:
        group["eps"] = EPS
    encoder = shared.select("pairs")
    # By hand: a stock model a task with masks multiplied in gives the gradient; each structure has moments of its own.
    stock = {task: masked(model, TICKETS[task]) for task, model in models().items()}
    values = {key: parts[0] for key, parts in snapshot(encoder, optimizer).items()}
    states = {key: (torch.zeros_like(value), torch.zeros_like(value)) for key, value in values.items()}
    for turn, task in enumerate(["pairs", "score", "pairs", "score"]):
        shared(task, **batch(task, turn)).loss.backward()
        stock[task].bert.load_state_dict(encoder.bert.state_dict())
        stock[task].classifier.load_state_dict(shared.select(task).classifier.state_dict())
        stock[task].zero_grad()
        stock[task](**batch(task, turn)).loss.backward()
        gradients = dict(structures(stock[task], {p: [p.grad] for p in stock[task].parameters() if p.grad is not None}))
        optimizer.step()
        optimizer.zero_grad()
        for key in values:
            if keeps(task, key):
                values[key], states[key] = rule(values[key], gradients[key], states[key], optimizer_step(key, turn))
    for key, parts in snapshot(encoder, optimizer).items():
        torch.testing.assert_close(parts[0], values[key], rtol=0, atol=1e-10, msg=lambda text, key=key: f"{key} {text}")


def optimizer_step(key, turn):
    """What bias correction counts: the steps in which any of the structure's weight was trained."""
    kind, layer, _, _ = key
    masks = HEAD_MASKS if kind == "head" else FFN_MASKS
    rows = [masks[task][layer] for task in ["pairs", "score", "pairs", "score"][: turn + 1]]
    return sum(any(row) if kind == "head" else row for row in rows)


def test_outputs_are_those_of_each_tasks_own_model_with_its_masks_multiplied_in():
    stock = {task: masked(copy.deepcopy(model), TICKETS[task]) for task, model in models().items()}
    shared = SharedModel(models(), TICKETS)
    with torch.no_grad():
        for task in ["score", "pairs", "score"]:
            got, want = shared(task, **batch(task)), stock[task](**batch(task))
            torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-10)
            torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=1e-10)


def test_clipping_measures_the_current_task_alone():
    shared = SharedModel(models(), TICKETS)
    for task in ["pairs", "score"]:
        shared.zero_grad()
        shared(task, **batch(task)).loss.backward()
        stock = masked(models()[task], TICKETS[task])
        stock(**batch(task)).loss.backward()
        norm = clip_grad_norm_(shared.parameters(), 1.0)
        torch.testing.assert_close(norm, clip_grad_norm_(stock.parameters(), 1.0), rtol=1e-9, atol=0)


def test_switching_makes_no_tensor_and_copies_no_weight():
    shared = SharedModel(models(), TICKETS)
    for task in shared.tasks:
        shared.select(task)
    weights = {name: parameter.data_ptr() for name, parameter in shared.named_parameters()}
    with NewTensors() as made:
        for task in [*shared.tasks, *shared.tasks]:
            shared.select(task)
    assert set(made.names) <= {"detach"}
    assert weights == {name: parameter.data_ptr() for name, parameter in shared.named_parameters()}
    assert len({id(shared.select(task).bert) for task in shared.tasks}) == 1


def test_a_shared_model_is_saved_and_loaded_with_all_its_tickets(tmp_path):
    shared = SharedModel(models(torch.float32), TICKETS)
    folder = shared.save(tmp_path / "shared")
    again = SharedModel.load(folder)
    assert (again.tasks, again.tickets) == (shared.tasks, TICKETS)
    saved, loaded = shared.state_dict(), again.state_dict()
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(value, loaded[name]) for name, value in saved.items())
    with torch.no_grad():
        for task in shared.tasks:
            batch_ = {key: value for key, value in batch(task).items() if key != "labels"}
            # MKL's product for the task head's single output depends on where in memory the weights begin.
            expected = shared(task, **batch_).logits
            torch.testing.assert_close(again(task, **batch_).logits, expected, **roundings(10))
    # The encoder is there once.
    assert (folder / "task-1" / "head.safetensors").stat().st_size < 10_000
    assert not list(tmp_path.glob(".*.part"))
    with pytest.raises(ticketops.errors.StoreError, match="there already"):
        shared.save(folder)


@pytest.mark.parametrize("task", ["pairs", "score"])
def test_any_one_task_leaves_as_a_compact_checkpoint(task, tmp_path):
    shared = SharedModel(models(torch.float32), TICKETS)
    single = shared.single(task)
    before = {name: value.clone() for name, value in shared.state_dict().items()}
    ticketops.export(single, tmp_path / task, ticket=shared.tickets[task])
    small = ticketops.load(tmp_path / task)
    rows = {key: value for key, value in batch(task).items() if key != "labels"}
    with torch.no_grad():
        torch.testing.assert_close(small(**rows).logits, shared(task, **rows).logits, **roundings(0, 100))
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in single.parameters())
    ticketops.shrink(single, shared.tickets[task])
    assert all(torch.equal(value, before[name]) for name, value in shared.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_labels": 10**6}, "labels"),
        ({"num_hidden_layers": 10**7}, "layers"),
        ({"num_hidden_layers": 4}, "task-1 is not of this encoder"),
        ({"auto_map": {"AutoConfig": "evil.Config"}, "model_type": "evil"}, "auto_map"),
        ({"architectures": ["Trainer"]}, "no model class"),
        ({"vocab_size": "many"}, ""),
    ],
)
def test_a_hostile_task_is_refused(changes, words, tmp_path):
    path = SharedModel(models(torch.float32), TICKETS).save(tmp_path / "shared") / "task-1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(InputError, match=r"task-1/config.json was changed .*save it again"):
        SharedModel.load(path.parents[1])
    reseal(path.parents[1])
    with pytest.raises(InputError, match=f"cannot load the shared model .*{words}"):
        SharedModel.load(path.parents[1])


def reseal(folder):
    """Writes the checksums of what is in a shared model's folder now."""
    note = json.loads((folder / "shared.json").read_text())
    write_manifest(folder, "shared.json", {name: note[name] for name in ("format", "version", "tasks")})


def test_no_task_gets_anothers_head(tmp_path):
    folder = SharedModel(models(torch.float32), TICKETS).save(tmp_path / "shared")
    note = json.loads((folder / "shared.json").read_text())
    (folder / "shared.json").write_text(json.dumps({**note, "tasks": note["tasks"][::-1]}))
    with pytest.raises(InputError, match=r"shared.json was changed .*save it again"):
        SharedModel.load(folder)
    (folder / "shared.json").write_text(json.dumps(note))
    one, other = (folder / f"task-{place}" / "ticket.safetensors" for place in (0, 1))
    one.rename(folder / "kept")
    other.rename(one)
    (folder / "kept").rename(other)
    with pytest.raises(InputError, match=r"task-0/ticket.safetensors was changed"):
        SharedModel.load(folder)


def test_a_shared_model_of_format_1_is_read(tmp_path):
    folder = SharedModel(models(torch.float32), TICKETS).save(tmp_path / "shared")
    note = {"format": "ticketops.shared", "version": 1, "tasks": ["pairs", "score"]}
    (folder / "shared.json").write_text(json.dumps(note))
    assert SharedModel.load(folder).tasks == ["pairs", "score"]


def test_what_does_not_fit_is_refused_and_nothing_is_touched(tmp_path):
    with pytest.raises(InputError, match="task score: a ticket for 12 layers x 12 heads does not fit 3 layers x 4"):
        SharedModel(made := models(), {"score": Ticket.full(12, 12)})
    assert type(made["pairs"].bert.encoder).__module__.startswith("transformers")
    assert made["pairs"].bert is not made["score"].bert
    with pytest.raises(InputError, match="'sst2', and no such task: the tasks are pairs, score"):
        SharedModel(models(), {"sst2": TICKETS["pairs"]})
    with pytest.raises(InputError, match="needs a task"):
        SharedModel({})
    with pytest.raises(InputError, match=r"task score: a ticket for FFNs of 64 neurons does not fit FFNs of 32"):
        SharedModel(
            {"score": BertForSequenceClassification(tiny_config(intermediate_size=32))},
            {"score": Ticket(torch.ones(LAYERS, HEADS) > 0, torch.ones(LAYERS) > 0, {}, torch.rand(LAYERS, 64) > 0.5)},
        )
    with pytest.raises(InputError, match=r"task b has another encoder .*hidden size 24"):
        SharedModel(
            {"a": models()["pairs"], "b": BertForSequenceClassification(tiny_config(hidden_size=24))},
        )
    other = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=99, dim=48, n_layers=LAYERS, n_heads=HEADS, hidden_dim=64)
    )
    with pytest.raises(InputError, match=r"task b has another encoder .DistilBertModel"):
        SharedModel({"a": models()["pairs"], "b": other})
    shared = SharedModel(models(torch.float32), TICKETS)
    with pytest.raises(InputError, match="no task 'rte'"):
        shared("rte", **batch("pairs"))
    folder = shared.save(tmp_path / "shared")
    head = folder / "task-1" / "head.safetensors"
    whole = head.read_bytes()
    head.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"cannot load the shared model .*head.safetensors was .*damaged"):
        SharedModel.load(folder)
    reseal(folder)
    with pytest.raises(InputError, match=r"cannot load the shared model .*damaged"):
        SharedModel.load(folder)
    head.write_bytes(whole)
    config = folder / "task-1" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 48', '"hidden_size": 96'))
    reseal(folder)
    with pytest.raises(InputError, match="task-1 is not of this encoder"):
        SharedModel.load(folder)
    with pytest.raises(InputError, match=r"no shared\.json"):
        SharedModel.load(tmp_path)


def test_revert_gives_the_stock_classes_back_and_lifts_every_restriction():
    made = models()
    kinds = [type(module) for module in made["pairs"].modules()]
    with SharedModel(made, TICKETS) as shared:
        optimizer = torch.optim.AdamW(shared.parameters(), lr=0.1)
        shared.select("score")
    assert [type(module) for module in made["pairs"].modules()] == kinds
    before = made["pairs"].classifier.weight.detach().clone()
    made["pairs"](**batch("pairs")).loss.backward()
    optimizer.step()
    assert not torch.equal(made["pairs"].classifier.weight, before)


def test_a_shared_model_shows_its_tasks_and_their_tickets():
    shared = SharedModel(models(), TICKETS)
    assert repr(shared).splitlines() == [
        "<SharedModel: BertModel for 2 tasks",
        f"  pairs: {TICKETS['pairs']!r}",
        f"  score: {TICKETS['score']!r}>",
    ]
    assert shared._repr_html_().count("<table") == 2
    shared.select("score")
    assert TICKETS["score"]._repr_html_() in shared.handle._repr_html_()
