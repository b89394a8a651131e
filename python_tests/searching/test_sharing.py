import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from bounds import roundings

from ticketops.errors import InputError, StoreError
from ticketops.models import SharedModel, load
from ticketops.ops import Packing
from ticketops.reporting import ShareResult, read
from ticketops.searching import SearchConfig, ShareConfig, ShareTrial, Store, run_search, run_share
from ticketops.searching.release import release
from ticketops.searching.sharing import load_settings, prepare_share, run_share_trial
from ticketops.searching.task_tickets import arm_tickets
from ticketops.tickets import Ticket

from .test_run import Heard
from .test_trial import reproducible
from .tiny import HEADS, LAYERS, make_model, make_pairs, make_task

#: Two single-task searches of 2 trials, 5 multi-task trials of 4 steps.
FIELDS: dict[str, Any] = {
    "sparsities": "0.5",
    "epochs": 1,
    "batch_size": 16,
    "learning_rate": 1e-2,
    "max_length": 16,
    "train_rows": 32,
    "validation_rows": 20,
}
ARMS = ("tickets", "plain", "random", "union", "intersection")
KEPT = Ticket(torch.tensor([[1, 0, 1, 0], [0, 1, 1, 0]]).bool(), torch.tensor([True, False]), {"task": "some/task"})


@pytest.fixture(scope="module")
def tasks(inputs: dict[str, str], pairs: str) -> dict[str, str]:
    return {"model": inputs["model"], "tasks": f"{inputs['task']},{pairs}"}


@pytest.fixture(scope="module")
def shared(tasks: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> ShareResult:
    folder = tmp_path_factory.mktemp("share") / "run"
    return read(run_share(ShareConfig(**tasks, **FIELDS, arms=ARMS, save_models=True, output=str(folder))))


def test_each_arm_is_one_record_with_every_tasks_own_metric(shared: ShareResult):
    assert [record["id"] for record in shared.records] == [f"{arm}-seed-0" for arm in ARMS]
    for record in shared.records:
        scores = record["tasks"]
        assert {name: one["metric"] for name, one in scores.items()} == {"task": "accuracy", "pairs": "pearson"}
        assert record["score"] == pytest.approx(sum(one["score"] for one in scores.values()) / 2)
        assert [one["steps"] for one in scores.values()] == [2, 2]
        assert record["steps"] == 4
    pruned = {
        record["kind"]: [(one["heads_pruned"], one["ffns_pruned"]) for one in record["tasks"].values()]
        for record in shared.records
    }
    assert pruned["tickets"] == pruned["random"] == [(4, 1), (4, 1)]
    assert pruned["plain"] == [(0, 0), (0, 0)]
    tickets = [by_seed[0] for by_seed in shared.tickets.values()]
    union, both = tickets[0] | tickets[1], tickets[0] & tickets[1]
    assert pruned["union"] == [(union.heads_pruned, union.ffns_pruned)] * 2
    assert pruned["intersection"] == [(both.heads_pruned, both.ffns_pruned)] * 2


def test_tickets_are_those_of_searches_that_stand_in_the_folder(shared: ShareResult):
    for task, by_seed in shared.tickets.items():
        store = Store.read(shared.folder / "single" / task, "search")
        assert len(store.records()) == 2
        assert store.tickets("winning", 0.5) == by_seed
    single = json.loads((shared.folder / "single.json").read_text())
    assert single["pairs"]["metric"] == "pearson"
    assert single["task"]["scores"].keys() == {"full", "winning"}


def test_a_finished_share_runs_nothing_again_and_what_is_deleted_is_made_alike(shared: ShareResult):
    heard = Heard()
    assert read(run_share(shared.config, heard)).records == shared.records
    assert heard.ran == []
    store = Store.read(shared.folder, "share")
    store.record_path(ShareTrial("random", 0)).unlink()
    shutil.rmtree(store.model_path(ShareTrial("plain", 0)))
    (shared.folder / "single" / "pairs" / "trials" / "winning-0.5-seed-0.json").unlink()
    again = read(run_share(shared.config, heard))
    assert heard.ran == ["pairs winning-0.5-seed-0", "plain-seed-0", "random-seed-0"]
    assert list(map(reproducible, again.records)) == list(map(reproducible, shared.records))


def test_tickets_of_an_earlier_run_give_the_same_training(shared: ShareResult, tasks: dict[str, str], tmp_path: Path):
    single = shared.folder / "single"
    heard = Heard()
    for name, entries in {
        "share": str(shared.folder),
        "searches": f"{single / 'task'},pairs={single / 'pairs'}",
    }.items():
        config = ShareConfig(**tasks, **FIELDS, arms="tickets", tickets=entries, output=str(tmp_path / name))
        (record,) = read(run_share(config, heard)).records
        assert reproducible(record) == reproducible(shared.records[0])
    assert heard.ran == ["tickets-seed-0"] * 2
    # Other tickets are another run.
    path = tmp_path / "ticket.safetensors"
    KEPT.save(path)
    other = dataclasses.replace(config, tickets=(f"task={path}", f"pairs={path}"))
    with pytest.raises(StoreError, match=r"holds another share .*tickets task is"):
        run_share(other)


def test_an_earlier_share_gives_the_tickets_of_some_of_its_tasks(shared: ShareResult, pairs: str, tmp_path: Path):
    other, ticket = make_task(tmp_path / "other"), tmp_path / "ticket.safetensors"
    KEPT.save(ticket)
    fields = {"model": shared.config.model, **FIELDS, "tasks": f"{other},{pairs}"}
    given = prepare_share(ShareConfig(**fields, tickets=f"{shared.folder},other={ticket}")).tickets
    assert given is not None
    assert given.tickets == {"pairs": shared.tickets["pairs"], "other": {0: KEPT}}
    with pytest.raises(InputError, match="there is no ticket for task other in tickets: add other=PATH"):
        prepare_share(ShareConfig(**fields, tickets=str(shared.folder)))


def test_pruned_by_every_task_stays_pretrained_through_a_whole_training(tasks: dict[str, str]):
    for recipe in ("default", "paper"):
        config = ShareConfig(**tasks, **{**FIELDS, "epochs": 2}, recipe=recipe)
        settings = load_settings(config)
        tickets = {"task": KEPT, "pairs": Ticket(KEPT.head_mask.flip(1), KEPT.ffn_mask)}
        _, model, _ = run_share_trial(config, settings, ShareTrial("tickets", 0), tickets)
        trained, start = model.select("task").base_model.state_dict(), settings["task"].pretrained
        for layer, (one, other) in enumerate(zip(KEPT.head_mask, KEPT.head_mask.flip(1), strict=True)):
            name = f"encoder.layer.{layer}.attention.self.query.weight"
            pairs = zip(trained[name].chunk(HEADS), start[name].chunk(HEADS), strict=True)
            assert [not torch.equal(a, b) for a, b in pairs] == (one | other).tolist()
        names = [f"encoder.layer.{layer}.intermediate.dense.weight" for layer in range(LAYERS)]
        assert [torch.equal(trained[name], start[name]) for name in names] == [False, True]


def test_a_trial_is_a_pure_function_and_the_seed_moves_it(tasks: dict[str, str]):
    config = ShareConfig(**tasks, **FIELDS, mixing="uniform")
    settings = load_settings(config)

    def run(seed: int) -> dict[str, Any]:
        return reproducible(
            run_share_trial(config, settings, ShareTrial("plain", seed), {"task": None, "pairs": KEPT})[0]
        )

    first, other = run(1), run(2)
    torch.manual_seed(99)
    assert run(1) == first
    assert other["tasks"]["task"]["predictions_sha256"] != first["tasks"]["task"]["predictions_sha256"]


def test_batches_of_every_task_are_counted_before_they_travel(tasks: dict[str, str], monkeypatch):
    counted, from_mask = [], Packing.from_mask

    def noted(*args: Any) -> Packing:
        counted.append(args[-1] is not None)
        return from_mask(*args)

    monkeypatch.setattr(Packing, "from_mask", noted)
    config = ShareConfig(**tasks, **FIELDS)
    run_share_trial(config, load_settings(config), ShareTrial("plain", 0, 0), {"task": None, "pairs": None})
    # Training and evaluation.
    assert len(counted) == 4 + 2
    assert all(counted)


def test_random_tickets_of_two_tasks_and_of_two_seeds_are_drawn_apart():
    tickets = {"a": KEPT, "b": KEPT}
    one, two = (arm_tickets(ShareTrial("random", seed), tickets) for seed in (0, 1))
    assert len({one["a"], one["b"], two["a"], two["b"]}) > 1
    assert arm_tickets(ShareTrial("random", 0), tickets) == one
    for ticket in one.values():
        assert ticket is not None
        assert (ticket.heads_pruned, ticket.ffns_pruned) == (KEPT.heads_pruned, KEPT.ffns_pruned)
    # A ticket that leaves a layer without heads has random ones of the same counts, too.
    empty = Ticket(torch.tensor([[0, 0, 0, 0], [0, 0, 1, 0]]).bool(), torch.tensor([True, False]))
    (drawn,) = arm_tickets(ShareTrial("random", 0), {"a": empty}).values()
    assert drawn is not None
    assert drawn.heads_pruned == 7
    neurons = Ticket(KEPT.head_mask, KEPT.ffn_mask, None, torch.arange(16).reshape(2, 8) % 3 > 0)
    (drawn,) = arm_tickets(ShareTrial("random", 0), {"a": neurons}).values()
    assert drawn is not None
    assert drawn.neuron_mask is not None
    assert drawn.neuron_mask.sum() == neurons.neuron_mask.sum()


def test_a_shared_model_is_kept_and_any_task_leaves_it(shared: ShareResult, tmp_path: Path):
    folder = shared.folder / "models" / "tickets-seed-0"
    model = SharedModel.load(folder)
    assert model.tickets == {task: by_seed[0] for task, by_seed in shared.tickets.items()}
    ids = {"input_ids": torch.arange(4, 14)[None]}
    for task in model.tasks:
        small = load(release(shared.folder, tmp_path / task, task=task))
        with torch.no_grad():
            torch.testing.assert_close(small(**ids).logits, model(task, **ids).logits, **roundings(0, 100))
        assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in model.single(task).parameters())
    note = json.loads((tmp_path / "pairs" / "ticketops.json").read_text())
    assert (note["run"]["task"], note["run"]["kind"]) == ("pairs", "tickets")
    assert (tmp_path / "pairs" / "tokenizer.json").is_file()
    release(folder, tmp_path / "dense", "dense", task="pairs")
    with pytest.raises(InputError, match=r"is a shared model: name one of its tasks, task='task'"):
        release(shared.folder, tmp_path / "none")
    with pytest.raises(InputError, match="no task 'rte'"):
        release(folder, tmp_path / "none", task="rte")
    with pytest.raises(InputError, match="no shared model"):
        release(tmp_path / "pairs", tmp_path / "none", task="pairs")


def test_bad_values_are_refused_by_name():
    for words, fields in (
        ("'rte' alone: use ticketops search", {"tasks": "rte"}),
        ("tasks is empty", {}),
        ("mixing 'random' is unknown: choose from proportional, annealed, uniform", {"mixing": "random"}),
        ("arms 'lucky' is unknown: choose from tickets, plain, random, union", {"arms": "lucky"}),
        (r"sparsities 1.5 is outside \[0, 1\)", {"sparsities": "1.5"}),
        ("epochs 0 is out of range", {"epochs": 0}),
    ):
        with pytest.raises(InputError, match=words):
            ShareConfig(**{"tasks": "rte,mrpc" if fields else None, **fields})
    with pytest.raises(InputError, match="did you mean 'mixing'"):
        ShareConfig.from_dict({"tasks": "a,b", "mixin": "uniform"})


def test_a_configuration_survives_yaml_and_names_its_command(tmp_path: Path):
    config = ShareConfig(tasks="rte,mrpc", mixing="annealed", seeds=3, arms="tickets,union", tickets="a=x,b=y")
    assert ShareConfig.from_dict(config.to_dict()) == config
    assert config.command() == (
        "ticketops share --tasks rte,mrpc --tickets a=x,b=y --seeds 3 --arms tickets,union --mixing annealed"
    )
    search = config.search("rte")
    assert (search.task, search.kinds, search.seeds, search.epochs) == ("rte", ("winning",), (0, 1, 2), config.epochs)


@pytest.fixture
def refused(tasks: dict[str, str], tmp_path: Path) -> Any:
    """Checks that a share is refused before anything is trained or written."""

    def check(words: str, **fields: Any) -> None:
        heard = Heard()
        with pytest.raises(InputError, match=words):
            run_share(ShareConfig(**{**tasks, **FIELDS, **fields}, output=str(tmp_path / "out")), heard)
        assert heard.ran == []
        assert not (tmp_path / "out").exists()

    return check


def test_tasks_that_clash_are_refused(refused: Any, inputs: dict[str, str], tmp_path: Path):
    make_task(tmp_path / "copy" / "task")
    refused("are both called task: rename one", tasks=f"{inputs['task']},{tmp_path / 'copy' / 'task'}")
    make_pairs(tmp_path / "other" / "task")
    refused(
        "both called task, with the labels 0, 1 and numbers: rename one",
        tasks=f"{inputs['task']},{tmp_path / 'other' / 'task'}",
    )


def test_tickets_that_do_not_fit_are_refused(refused: Any, shared: ShareResult, inputs: dict[str, str], tmp_path: Path):
    wide, fits = tmp_path / "wide.safetensors", tmp_path / "fits.safetensors"
    Ticket.full(12, 12).save(wide)
    KEPT.save(fits)
    both = f"task={wide},pairs={fits}"
    refused(
        r"task task, .*wide.safetensors: a ticket for 12 layers x 12 heads does not fit 2 layers x 4 heads",
        tickets=both,
    )
    refused("there is no ticket for task pairs in tickets: add pairs=PATH", tickets=f"task={fits}")
    refused("there are two tickets for task task", tickets=f"{fits},task={fits},pairs={fits}")
    refused("there is no .*nowhere; give a search's output folder", tickets=str(tmp_path / "nowhere"))
    KEPT.described({"task": "some/where"}).save(fits)
    refused("holds a ticket of 'where', none of the tasks task, pairs: say whose it is with TASK=", tickets=str(fits))
    refused("holds the results of ticketops share", tickets=f"task={shared.folder},pairs={fits}")
    refused("has no super ticket of seed 1, only of 0", tickets=str(shared.folder), seeds=2)
    folder = tmp_path / "model"
    make_model(folder)
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused("searched other pre-trained weights", tickets=str(shared.folder), model=str(folder))


def test_runs_of_another_kind_are_told_apart(shared: ShareResult, inputs: dict[str, str]):
    with pytest.raises(StoreError, match="holds the results of ticketops share: choose another output folder"):
        run_search(SearchConfig(**inputs, **FIELDS, output=str(shared.folder)))
    with pytest.raises(InputError, match="holds the results of ticketops share, and a search is needed here"):
        Store.read(shared.folder, "search")


@pytest.mark.data
def test_real_tasks_of_different_sizes_and_metrics_train_one_model(glue_folder: Path, minilm: Path, tmp_path: Path):
    path = tmp_path / "ticket.safetensors"
    Ticket.full(6, 12).save(path)
    tasks = ("sst2", "wnli", "stsb", "cola")
    config = ShareConfig(
        model=str(minilm),
        tasks=[str(glue_folder / task) for task in tasks],
        tickets=[f"{task}={path}" for task in tasks],
        arms="tickets",
        epochs=1,
        batch_size=16,
        max_length=24,
        train_rows=48,
        validation_rows=16,
        output=str(tmp_path / "run"),
    )
    (record,) = read(run_share(config)).records
    metrics = {name: one["metric"] for name, one in record["tasks"].items()}
    assert metrics == {"sst2": "accuracy", "wnli": "accuracy", "stsb": "pearson", "cola": "matthews_correlation"}
    assert record["steps"] == 12
