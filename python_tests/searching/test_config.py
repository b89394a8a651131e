import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import ticketops
from ticketops.errors import InputError, as_flag, spelled, spelling
from ticketops.searching import SearchConfig, ShareConfig
from ticketops.searching.config import nearest
from ticketops.searching.keywords import SearchFields, ShareFields, TransferFields
from ticketops.tasks import load_task

NAMES = tuple(SearchConfig.__dataclass_fields__)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("lr", "learning_rate"),
        ("learning-rate", "learning_rate"),
        ("Epoch", "epochs"),
        ("seed", "seeds"),
        ("num_train_epochs", "epochs"),
        ("model_name_or_path", "model"),
        ("per-device-train-batch-size", "batch_size"),
        ("output_dir", "output"),
        ("text_column", "text_columns"),
        ("max_seq_length", "max_length"),
        ("sparsity", "sparsities"),
        ("dataset", "task"),
        ("zzz", None),
        ("verbose", None),
        ("gpu", None),
        ("", None),
    ],
)
def test_an_unknown_name_suggests_what_it_means_or_nothing(name: str, meant: str | None):
    assert nearest(name, NAMES) == meant
    with pytest.raises(InputError) as caught:
        SearchConfig.from_dict({name: 1})
    remedy = f"did you mean {meant!r}" if meant else "its keys are model,"
    if name != "learning-rate":
        assert remedy in str(caught.value)


def test_an_alias_means_what_the_configuration_has():
    assert nearest("dataset", ShareConfig.__dataclass_fields__) == "tasks"


def test_errors_name_options_as_they_are_given(tmp_path: Path):
    def message(**fields: Any) -> str:
        with pytest.raises(InputError) as caught:
            SearchConfig(**fields)
        return str(caught.value)

    # One kind of check each.
    wrong = {"max_length": "x", "learning_rate": 7, "train_rows": 0, "save_models": 3, "report_fraction": 2}
    for name, value in wrong.items():
        assert message(**{name: value}).startswith(f"{name} ")
        with spelling(as_flag):
            assert message(**{name: value}).startswith(f"--{name.replace('_', '-')} ")
    assert message(prune_neurons=True, sparsities="paper").endswith("prune_neurons=True, such as 0.1,0.3")
    with spelling(as_flag):
        assert "--prune-neurons, such" in message(prune_neurons=True, sparsities="paper")
        assert (spelled("head", "fresh"), spelled("seeds")) == ("--head fresh", "--seeds")
    # On the command line with a file: the key where the file has it, the flag where that wins over it.
    path = tmp_path / "search.yaml"
    path.write_text("max-length: -3\n")
    with spelling(as_flag):
        with pytest.raises(InputError, match=rf"^max_length \(in {path}\) -3 is out of range"):
            SearchConfig.from_yaml(path)
        with pytest.raises(InputError, match=r"^--max-length -4 is out of range"):
            SearchConfig.from_yaml(path, max_length=-4)
        assert message(max_length=-5).startswith("--max-length -5")
    assert message(max_length=-5).startswith("max_length -5")


def test_a_module_or_a_name_in_the_wrong_place_is_one_short_line():
    module = nn.Sequential(*(nn.Linear(2, 2) for _ in range(9)))
    for act in (lambda: ticketops.search(model=module), lambda: ticketops.share(tasks=[module, "rte"])):
        with pytest.raises(InputError, match=r"of type (Sequential|list)|is not a name or a path") as caught:
            act()
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 200
    for config in ("demo", module, {"model": "demo"}):
        with pytest.raises(InputError, match="takes a SearchConfig, or its fields as keywords") as caught:
            ticketops.search(config)
        assert "\n" not in str(caught.value)


def test_a_mapping_or_a_module_is_no_list_of_values():
    for fields in (
        {"kinds": {"winning": 0.3}},
        {"seeds": {1: 2}},
        {"text_columns": [nn.Linear(2, 2)]},
        {"text_columns": [None]},
        {"text_columns": [True]},
    ):
        with pytest.raises(InputError, match=r"is a mapping: give a list|is not a name or a path"):
            SearchConfig(**fields)
    assert SearchConfig(text_columns=["1", 2]).text_columns == ("1", "2")


@pytest.mark.parametrize("act", [ticketops.report, ticketops.load, load_task, ticketops.SharedModel.load])
def test_what_is_no_path_is_said(act: Any):
    for value in (5, nn.Linear(2, 2), None):
        with pytest.raises(InputError, match=r"(5|of type Linear|None) is not a path"):
            act(value)


def test_paths_of_the_home_folder_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert SearchConfig(output="~/run").output == str(tmp_path / "run")
    assert ShareConfig(tasks="a,b", output="~/run").output == str(tmp_path / "run")
    for path in ("~no-such-user-here/run", "x" * 300, "a\0b"):
        with pytest.raises(InputError, match=r"^output ") as caught:
            SearchConfig(output=path)
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)


@pytest.mark.parametrize("columns", [{"document": "a", "summary": "b"}, {"text": "a", "label": {"a": 1}}])
def test_a_task_that_no_run_serves_is_sent_to_a_loop_of_ones_own(columns: dict[str, Any], tmp_path: Path):
    with pytest.raises(
        InputError, match=r"task_kind 'ner' is unknown: choose from .*ticketops.patch in a training loop"
    ):
        SearchConfig(task_kind="ner")
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(columns)}\n" * 9)
    with pytest.raises(InputError, match=r"ticketops.patch in a training loop of your own"):
        load_task(tmp_path)


@pytest.mark.parametrize(
    ("call", "kind", "keywords"),
    [
        (ticketops.search, ticketops.SearchConfig, SearchFields),
        (ticketops.share, ticketops.ShareConfig, ShareFields),
        (ticketops.transfer, ticketops.TransferConfig, TransferFields),
    ],
)
def test_calls_list_the_fields_for_people_and_for_type_checkers(call: Any, kind: Any, keywords: Any):
    fields = {field.name: field for field in dataclasses.fields(kind)}
    found = inspect.signature(call).parameters
    own = ("config", "listener", "trainer_factory")
    assert {name: each.default for name, each in found.items() if name not in own} == {
        name: field.default for name, field in fields.items()
    }
    assert found["listener"].kind is inspect.Parameter.KEYWORD_ONLY
    assert set(keywords.__annotations__) == set(fields)
    text = " ".join(kind.__doc__.split())
    for name, field in fields.items():
        assert f"{name}: {field.metadata['help']} Default: {field.metadata['shown']}." in text
    assert text.endswith("Raises: InputError: a value is out of range, of the wrong type, or unknown.")
