import json
import shlex
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ticketops.errors import InputError
from ticketops.searching import SearchConfig, ShareConfig, TransferConfig, make_plan

configs = st.builds(
    SearchConfig,
    task=st.sampled_from(["demo", "rte", "mnli", "./a folder/it's"]),
    sparsities=st.one_of(st.just("paper"), st.lists(st.floats(0, 0.99), min_size=1, max_size=3)),
    kinds=st.lists(st.sampled_from(["winning", "random", "losing", "random@0.3", "losing@0.5"]), min_size=1),
    seeds=st.one_of(st.integers(1, 5), st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=3)),
    recipe=st.sampled_from([None, "default", "paper", "demo"]),
    epochs=st.one_of(st.none(), st.integers(1, 9)),
    save_models=st.booleans(),
    report_fraction=st.floats(0, 0.99),
    train_rows=st.one_of(st.none(), st.integers(1, 10**6)),
)


@given(configs)
def test_json_and_yaml_give_the_configuration_back(config: SearchConfig):
    assert SearchConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert SearchConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.to_dict()))) == config


@given(configs)
def test_the_command_makes_the_same_search(config: SearchConfig):
    words = shlex.split(config.command())
    assert words[:2] == ["ticketops", "search"]
    flags = {}
    for position, word in enumerate(words):
        if word.startswith("--"):
            value = words[position + 1] if position + 1 < len(words) else "--"
            flags[word[2:]] = True if value.startswith("--") else value
    assert SearchConfig.from_dict(flags) == config


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sparsities": "0.1,1.0"}, ["1", "[0, 1)"]),
        ({"sparsities": "-0.1"}, ["-0.1", "[0, 1)"]),
        ({"sparsities": "nan"}, ["nan", "[0, 1)"]),
        ({"sparsities": "a third"}, ["a third", "number"]),
        ({"sparsities": ""}, ["sparsities", "at least one"]),
        ({"kinds": "wining"}, ["wining", "winning, random, losing"]),
        ({"kinds": "random@1.5"}, ["1.5", "[0, 1)"]),
        ({"kinds": "random@"}, ["random@0.3"]),
        ({"seeds": "0"}, ["seeds", "from 1"]),
        ({"seeds": "1,-2"}, ["-2"]),
        ({"seeds": "20260101"}, ["20260101", "1,000 are the most", "'20260101,'"]),
        ({"train-rows": 5, "train_rows": 7}, ["'train_rows' twice"]),
        ({"epochs": 1.5}, ["epochs", "1.5", "whole"]),
        ({"epochs": True}, ["epochs", "True"]),
        ({"batch_size": 0}, ["batch_size 0"]),
        ({"learning_rate": float("nan")}, ["learning_rate nan", "number"]),
        ({"learning_rate": "fast"}, ["fast"]),
        ({"report_fraction": 1}, ["report_fraction 1", "0.5"]),
        ({"recipe": "papr"}, ["papr", "default, paper, demo"]),
        ({"dtype": "fp8"}, ["fp8", "fp32, bf16"]),
        ({"importance": "twice"}, ["twice", "on_the_fly"]),
        ({"granularity": "word"}, ["word", "example, token, batch"]),
        ({"task_kind": "ranking"}, ["ranking", "regression"]),
        ({"model": " "}, ["model"]),
        ({"label_column": 5}, ["label_column 5", "name"]),
        ({"label_column": ["label"]}, ["label_column ['label']"]),
        ({"save_models": "yes"}, ["save_models", "yes"]),
        ({"sparsity": 0.1}, ["'sparsity'", "did you mean 'sparsities'"]),
    ],
)
def test_bad_values_are_named_with_their_remedy(fields: dict, words: list[str]):
    with pytest.raises(InputError) as caught:
        SearchConfig.from_dict(fields)
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)


def test_recipe_fills_in_what_is_not_given_and_flags_win_over_it():
    assert SearchConfig().recipe == "demo"
    assert SearchConfig(task="rte").epochs == 3
    paper = SearchConfig(task="rte", recipe="paper")
    assert (paper.epochs, paper.batch_size, paper.learning_rate) == (6, 32, 5e-5)
    for task in ("mnli", "QNLI", "q-nli", "path/to/qnli"):
        assert SearchConfig(task=task, recipe="paper").epochs == 3
    assert SearchConfig(task="rte", recipe="paper", epochs=2).epochs == 2


def test_yaml_file_equals_the_flags_and_flags_win(tmp_path: Path):
    path = tmp_path / "search.yaml"
    path.write_text("task: rte\nlearning-rate: 5e-4\nseeds: 2\nsparsities: [0.1, 0.3]\nkinds: winning,losing\n")
    flags = {"task": "rte", "learning_rate": "5e-4", "seeds": "2", "sparsities": "0.1,0.3", "kinds": "winning,losing"}
    assert SearchConfig.from_yaml(path) == SearchConfig.from_dict(flags)
    assert SearchConfig.from_yaml(path, learning_rate=1e-5).learning_rate == 1e-5
    for text, word in (
        ("train_rows: 7\ntrain-rows: 5", "twice, with dashes and without: keep one"),
        ("taks: rte", "'task'"),
        ("- task", "mapping"),
        ("a: [", "YAML"),
        ("epochs: x", "'x'"),
    ):
        path.write_text(text)
        with pytest.raises(InputError, match=word):
            SearchConfig.from_yaml(path)
    with pytest.raises(InputError, match="cannot read"):
        SearchConfig.from_yaml(tmp_path / "missing.yaml")


def test_plan_has_each_seeds_full_model_before_its_tickets():
    plan = make_plan(SearchConfig(sparsities="0.3,0.1", kinds="random@0.2,winning", seeds=2), 6, 12)
    assert [trial.id for trial in plan[:4]] == [
        "full-seed-0",
        "winning-0.1-seed-0",
        "winning-0.3-seed-0",
        "random-0.2-seed-0",
    ]
    assert [trial.seed for trial in plan] == [0] * 4 + [1] * 4
    assert [(trial.heads_pruned, trial.ffns_pruned) for trial in plan[:4]] == [(0, 0), (7, 0), (21, 1), (14, 1)]
    assert len({trial.id for trial in plan}) == len(plan)


def test_sparsity_zero_is_the_full_model():
    assert [t.kind for t in make_plan(SearchConfig(sparsities="0,0.5", kinds="winning"), 6, 12)] == ["full", "winning"]


def test_paper_levels_are_the_papers_counts_and_for_its_shape_only():
    config = SearchConfig(sparsities="paper", kinds="winning,random@0.7")
    plan = make_plan(config, 12, 12)
    assert [(t.heads_pruned, t.ffns_pruned) for t in plan if t.kind == "winning"] == [
        (14, 1), (28, 2), (43, 3), (57, 4), (72, 5), (86, 6), (100, 7), (115, 8),
    ]  # fmt: skip
    assert [(t.heads_pruned, t.ffns_pruned) for t in plan if t.kind == "random"] == [(100, 7)]
    with pytest.raises(InputError, match="12 layers x 12 heads"):
        make_plan(config, 6, 12)
    with pytest.raises(InputError, match="none of the paper's"):
        make_plan(SearchConfig(sparsities="paper", kinds="winning,random@0.15"), 12, 12)


def test_impossible_and_empty_levels_are_refused_before_training():
    with pytest.raises(InputError, match="prunes 64 heads, and min_heads 2 leaves at most 60"):
        make_plan(SearchConfig(sparsities="0.9", min_heads=2), 6, 12)
    with pytest.raises(InputError, match=r"prunes nothing of .*: give at least 0\.0139$"):
        make_plan(SearchConfig(sparsities="0.01"), 6, 12)
    assert make_plan(SearchConfig(sparsities="0.0139", kinds="winning"), 6, 12)[1].heads_pruned == 1


@pytest.mark.parametrize(("layers", "heads"), [(2, 4), (3, 1), (6, 12), (12, 12), (24, 16), (7, 11)])
def test_the_least_level_that_is_named_is_one(layers: int, heads: int):
    with pytest.raises(InputError, match="give at least") as caught:
        make_plan(SearchConfig(sparsities=1e-5, kinds="winning", min_heads=0), layers, heads)
    least = str(caught.value).rpartition(" ")[2]
    assert make_plan(SearchConfig(sparsities=least, kinds="winning", min_heads=0), layers, heads)[1].heads_pruned == 1


def test_neurons_in_place_of_ffns() -> None:
    config = SearchConfig(sparsities="0.3,0.5", kinds="winning", prune_neurons=True)
    plan = make_plan(config, 6, 12, 100)
    assert [(t.heads_pruned, t.ffns_pruned, t.neurons_pruned) for t in plan] == [(0, 0, 0), (21, 0, 180), (36, 0, 300)]
    assert "--prune-neurons" in config.command().split()
    with pytest.raises(InputError, match="prune whole FFNs"):
        SearchConfig(sparsities="paper", prune_neurons=True)
    with pytest.raises(InputError, match="neither true nor false"):
        SearchConfig(prune_neurons="yes")


@pytest.mark.parametrize("epochs", [None, 4])
def test_a_task_trains_as_long_in_a_share_or_transfer_as_in_its_own_search(epochs: int | None):
    alone = {task: SearchConfig(task=task, recipe="paper", epochs=epochs).epochs for task in ("rte", "MNLI", "qnli")}
    assert alone == (dict.fromkeys(alone, 4) if epochs else {"rte": 6, "MNLI": 3, "qnli": 3})
    share = ShareConfig(tasks=list(alone), recipe="paper", epochs=epochs)
    transfer = TransferConfig(source="MNLI", target="rte", recipe="paper", epochs=epochs)
    for config, tasks in ((share, alone), (transfer, ("MNLI", "rte"))):
        again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
        assert again == config
        assert ("--epochs" in config.command()) == (epochs is not None)
        for task in tasks:
            assert config.search(task).epochs == again.search(task).epochs == alone[task]
    assert share.joint_epochs == (epochs or 6)
    # One number where all tasks agree, the demo's own recipe not among them.
    assert ShareConfig(tasks="mnli,qnli", recipe="paper").epochs == 3
    assert (ShareConfig(tasks="demo,rte").recipe, ShareConfig(tasks="demo,rte").epochs) == ("default", 3)
