"""Models and data sets by their names, against a hub on the loopback interface."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
from hub import Hub, Repository, connect, files, point_to
from safetensors.torch import load_file
from searching.tiny import FIELDS, make_model, make_task
from transformers import BertConfig, BertModel

from ticketops import hub as hub_module
from ticketops.errors import InputError
from ticketops.searching.plan import SearchConfig
from ticketops.searching.setting import Setting, find_model, load_config
from ticketops.tasks import load_task

NAME, GLUE = "some-org/tiny-bert", "nyu-mll/glue"
#: An address where nothing listens.
NOWHERE = "http://127.0.0.1:9"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as repositories hold them: other frameworks' weights, code and subfolders beside what is read."""
    root = make_model(tmp_path_factory.mktemp("repository") / "model")
    for name in ("README.md", "modeling.py", "tf_model.h5", "onnx/model.onnx", "onnx/config.json"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("{}")
    return root


@pytest.fixture(scope="module")
def glue(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """RTE as the hub has it: a configuration of the GLUE repository, its test labels hidden."""
    root = tmp_path_factory.mktemp("glue")
    labels = datasets.ClassLabel(names=["entailment", "not_entailment"])
    text = datasets.Value("string")
    types = datasets.Features({"sentence1": text, "sentence2": text, "label": labels, "idx": datasets.Value("int32")})
    (root / "rte").mkdir()
    for split, count in (("train", 20), ("validation", 10), ("test", 4)):
        rows = [
            {"sentence1": f"a {i}", "sentence2": f"b {i}", "label": -1 if split == "test" else i % 2, "idx": i}
            for i in range(count)
        ]
        path = root / "rte" / f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows, features=types).to_parquet(path)
    splits = "".join(f"  - split: {s}\n    path: rte/{s}-*\n" for s in ("train", "validation", "test"))
    (root / "README.md").write_text(f"---\nconfigs:\n- config_name: rte\n  data_files:\n{splits}---\n")
    return root


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub() as served:
        connect(monkeypatch, served.endpoint, tmp_path / "home")
        # The client sleeps before it tries a broken download again.
        monkeypatch.setattr(time, "sleep", lambda _: None)
        yield served


@pytest.fixture
def model(hub: Hub, folder: Path) -> Repository:
    return hub.add(NAME, folder)


def offline(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def unreachable(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    point_to(patch, NOWHERE)


def down(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    hub.down = 503


def back(hub: Hub, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    point_to(patch, hub.endpoint)
    hub.down = None


def refusal(act: Callable[[], Any]) -> str:
    with pytest.raises(InputError) as caught:
        act()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def downloads(hub: Hub) -> list[str]:
    """Names of the files that the hub has sent since the last call."""
    sent = [line.rsplit("/", 1)[1] for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    hub.requests.clear()
    return sent


@pytest.mark.usefixtures("model")
def test_a_first_look_fetches_the_configuration_and_the_first_use_all_the_rest(hub: Hub, folder: Path):
    config = load_config(NAME)
    assert (config.num_hidden_layers, config.name_or_path) == (2, NAME)
    assert downloads(hub) == ["config.json"]
    found = find_model(NAME)
    assert sorted(downloads(hub)) == ["model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for path in files(found):
        assert path.read_bytes() == (folder / path.name).read_bytes()
    assert not (found / "modeling.py").exists()
    setting = Setting.load(SearchConfig(model=NAME, task=str(make_task(found.parents[4] / "task")), **FIELDS))
    assert len(setting.tokenizer) == 22
    weights = load_file(folder / "model.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in setting.pretrained.items())
    # The second use.
    assert find_model(NAME) == found
    assert downloads(hub) == []


@pytest.mark.parametrize("gone", [offline, unreachable, down])
@pytest.mark.usefixtures("model")
def test_what_is_cached_serves_without_the_hub(hub: Hub, gone: Callable[..., None], monkeypatch: pytest.MonkeyPatch):
    found = find_model(NAME)
    hub.requests.clear()
    gone(hub, monkeypatch)
    assert find_model(NAME) == found
    assert load_config(NAME).num_hidden_layers == 2
    # Each asked once at most.
    assert len(hub.requests) == (2 if gone is down else 0)


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (offline, "HF_HUB_OFFLINE"),
        (unreachable, f"({NOWHERE}) cannot be reached"),
        (down, "answered 503: try again later"),
    ],
)
@pytest.mark.usefixtures("model")
def test_without_the_hub_a_cold_or_partial_cache_is_refused(
    hub: Hub, gone: Callable[..., None], words: str, monkeypatch: pytest.MonkeyPatch
):
    gone(hub, monkeypatch)
    assert words in refusal(lambda: find_model(NAME))
    assert words in refusal(lambda: load_config(NAME))
    # As `doctor --model` leaves the cache.
    back(hub, monkeypatch)
    load_config(NAME)
    gone(hub, monkeypatch)
    message = refusal(lambda: find_model(NAME))
    assert words in message
    assert "its copy in the cache lacks its weights" in message


def test_a_silent_network_is_asked_once(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    """Packets that vanish: connections are accepted, and nothing is ever answered."""
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        silent.settimeout(0.1)
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(hub_module, "_CONTACT_SECONDS", 0.2)
        assert "cannot be reached" in refusal(lambda: find_model(NAME))
        assert "cannot be reached" in refusal(lambda: load_task("rte"))
        for _ in range(2):
            silent.accept()[0].close()
        with pytest.raises(TimeoutError):
            silent.accept()


def test_repositories_that_are_not_given_say_why(hub: Hub, model: Repository, tmp_path: Path):
    message = refusal(lambda: find_model("some-org/missing"))
    assert "no such repository that this account can read" in message
    assert "'some-org/missing'" in message
    assert "local folder" in message
    assert "no name" in refusal(lambda: find_model("bad name!"))
    assert "no revision 'v9'" in refusal(lambda: find_model(NAME, "v9"))
    model.gated = True
    assert f"is gated on the Hugging Face hub: ask for access at {hub.endpoint}/{NAME}" in refusal(
        lambda: find_model(NAME)
    )
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "README.md").touch()
    hub.add("some-org/card", tmp_path / "other")
    assert "no config.json" in refusal(lambda: find_model("some-org/card"))
    (tmp_path / "other" / "config.json").write_text("{}")
    (tmp_path / "other" / "tf_model.h5").touch()
    assert "no weights that are read here" in refusal(lambda: find_model("some-org/card"))


def test_a_repository_that_was_closed_later_serves_from_the_cache(hub: Hub, model: Repository):
    found = find_model(NAME)
    model.gated = True
    assert find_model(NAME) == found
    hub.repositories.clear()
    assert find_model(NAME) == found


@pytest.mark.parametrize("fault", ["broken", "damaged"])
def test_a_download_that_fails_leaves_nothing_half(
    hub: Hub, model: Repository, folder: Path, fault: str, monkeypatch: pytest.MonkeyPatch
):
    getattr(model, fault).add("model.safetensors")
    words = {"broken": "its download broke off", "damaged": "does not have the checksum"}[fault]
    assert words in refusal(lambda: find_model(NAME))
    offline(hub, monkeypatch)
    assert "lacks its weights" in refusal(lambda: find_model(NAME))
    back(hub, monkeypatch)
    getattr(model, fault).clear()
    found = find_model(NAME)
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.usefixtures("model")
def test_cached_weights_that_were_damaged_are_fetched_again_or_refused(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
):
    path = find_model(NAME) / "model.safetensors"

    def flip() -> None:
        content = path.read_bytes()
        path.resolve().write_bytes(content[:-1] + bytes([content[-1] ^ 1]))

    flip()
    assert (find_model(NAME) / path.name).read_bytes() == (folder / path.name).read_bytes()
    flip()
    offline(hub, monkeypatch)
    assert "its copy in the cache lacks model.safetensors as it was downloaded" in refusal(lambda: find_model(NAME))


@pytest.mark.usefixtures("model")
def test_damage_to_the_caches_own_files_is_no_traceback(hub: Hub, monkeypatch: pytest.MonkeyPatch):
    found = find_model(NAME)
    offline(hub, monkeypatch)
    (found / "model.safetensors").unlink()
    index = found / "model.safetensors.index.json"
    for content in ("[" * 100_000, "{", "{}", '{"weight_map": {}}', '{"weight_map": {"a": 5}}'):
        index.write_text(content)
        assert str(index) in refusal(lambda: find_model(NAME))
    (found.parents[1] / "refs" / "main").write_bytes(b"\xff")
    assert "HF_HUB_OFFLINE" in refusal(lambda: find_model(NAME))


def test_a_shard_without_its_index_is_no_model(hub: Hub, folder: Path, tmp_path: Path):
    part = shutil.copytree(folder, tmp_path / "part")
    (part / "model.safetensors").rename(part / "model-00001-of-00002.safetensors")
    hub.add(NAME, part)
    assert "its repository lacks its weights" in refusal(lambda: find_model(NAME))


def test_a_revision_is_that_one_online_and_offline(
    hub: Hub, model: Repository, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    other = shutil.copytree(folder, tmp_path / "other")
    config = BertConfig.from_pretrained(folder)
    config.num_hidden_layers = 1
    BertModel(config).save_pretrained(other)
    model.revisions["v2"] = other
    layers = {revision: load_config(NAME, revision).num_hidden_layers for revision in (None, "v2")}
    assert layers == {None: 2, "v2": 1}
    places = {revision: find_model(NAME, revision) for revision in (None, "v2", model.commit("v2"))}
    assert [place.name for place in places.values()] == [model.commit(), model.commit("v2"), model.commit("v2")]
    hub.requests.clear()
    # A commit that is cached is asked of nobody.
    find_model(NAME, model.commit("v2"))
    assert hub.requests == []
    offline(hub, monkeypatch)
    assert {revision: find_model(NAME, revision) for revision in places} == places
    # A folder has none.
    assert "is a folder" in refusal(lambda: find_model(str(folder), "v2"))


def test_shards_are_all_fetched(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    many = shutil.copytree(folder, tmp_path / "many")
    (many / "model.safetensors").unlink()
    BertModel.from_pretrained(folder).save_pretrained(many, max_shard_size="20KB")
    names = {path.name for path in many.glob("model-*")}
    assert len(names) > 1
    repository = hub.add(NAME, many, broken={max(names)})
    assert "broke off" in refusal(lambda: find_model(NAME))
    offline(hub, monkeypatch)
    assert "lacks its weights" in refusal(lambda: find_model(NAME))
    back(hub, monkeypatch)
    repository.broken.clear()
    assert names <= {path.name for path in find_model(NAME).iterdir()}
    offline(hub, monkeypatch)
    assert BertModel.from_pretrained(find_model(NAME)).num_parameters() > 0


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_of_a_repository_is_refused(hub: Hub, folder: Path, tmp_path: Path, file: str):
    coded = shutil.copytree(folder, tmp_path / "coded")
    content = json.loads((coded / file).read_text())
    (coded / file).write_text(json.dumps({**content, "auto_map": {"AutoConfig": "modeling.Config"}}))
    hub.add(NAME, coded)
    assert f'{file} has "auto_map"' in refusal(lambda: find_model(NAME))


def test_data_sets_by_name_are_fetched_once_and_cached(hub: Hub, glue: Path, monkeypatch: pytest.MonkeyPatch):
    repository = hub.add(GLUE, glue, "dataset")
    assert len(load_task("rte").train) == 20
    assert sum(name.endswith(".parquet") for name in downloads(hub)) == 3
    assert len(load_task("rte").validation) == 10
    assert not any(name.endswith(".parquet") for name in downloads(hub))
    repository.gated = True
    assert len(load_task("rte").train) == 20
    hub.repositories.clear()
    assert len(load_task("rte").train) == 20
    for gone in (offline, down, unreachable):
        gone(hub, monkeypatch)
        assert len(load_task("rte").train) == 20


def test_data_sets_that_are_not_given_say_why(hub: Hub, glue: Path, monkeypatch: pytest.MonkeyPatch):
    load = lambda: load_task("rte")  # noqa: E731
    assert "no such repository" in refusal(load)
    repository = hub.add(GLUE, glue, "dataset", gated=True)
    assert "gated" in refusal(load)
    repository.gated = False
    repository.broken.add("rte/train-00000-of-00001.parquet")
    assert "broke off" in refusal(load)
    repository.broken.clear()
    for gone, words in ((down, "answered 503"), (unreachable, "cannot be reached"), (offline, "HF_HUB_OFFLINE")):
        gone(hub, monkeypatch)
        message = refusal(load)
        assert words in message
        assert "task='path/to/rte'" in message
    back(hub, monkeypatch)
    assert len(load().train) == 20


def test_a_data_set_that_was_damaged_on_its_way_is_fetched_again(hub: Hub, glue: Path):
    repository = hub.add(GLUE, glue, "dataset", damaged={"rte/train-00000-of-00001.parquet"})
    assert "GLUE task rte cannot be loaded" in refusal(lambda: load_task("rte"))
    repository.damaged.clear()
    assert len(load_task("rte").train) == 20
    path = next(Path(datasets.config.HF_DATASETS_CACHE).rglob("*train.arrow"))
    path.write_bytes(path.read_bytes()[:300])
    assert len(load_task("rte").train) == 20


def test_a_data_set_of_that_name_with_other_columns_or_labels_is_refused(hub: Hub, glue: Path, tmp_path: Path):
    other = shutil.copytree(glue, tmp_path / "other")
    path = other / "rte" / "train-00000-of-00001.parquet"
    rows = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
    changes = (
        (rows.rename_column("sentence2", "text"), "no split train of rte with the column sentence2"),
        (
            rows.cast_column("label", datasets.ClassLabel(names=["not_entailment", "entailment"])),
            "calls the labels of rte not_entailment, entailment, and GLUE entailment, not_entailment",
        ),
    )
    for number, (changed, words) in enumerate(changes):
        served = shutil.copytree(other, tmp_path / str(number))
        for split in ("train", "validation", "test"):
            changed.to_parquet(served / "rte" / f"{split}-00000-of-00001.parquet")
        hub.repositories.clear()
        hub.add(GLUE, served, "dataset")
        message = refusal(lambda: load_task("rte"))
        assert words in message
        assert "task='path/to/rte'" in message


def test_the_command_line_searches_a_model_and_a_task_of_the_hub(folder: Path, glue: Path, tmp_path: Path):
    """In processes of their own, as users have them: a first use, and again without the network."""
    fields = {**FIELDS, "train_rows": 20, "epochs": 1, "sparsities": "0.5", "kinds": "winning"}
    words = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    words = ["search", "--model", NAME, "--revision", "v1", "--task", "rte", *words, "--output", str(tmp_path / "run")]

    def command(*words: str, **environment: str) -> subprocess.CompletedProcess:
        base = {**os.environ, "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, "-m", "ticketops", *words],
            env=base | {"PYTHONPATH": str(Path(__file__).parents[1])} | environment,
            capture_output=True,
            text=True,
        )

    with Hub() as served:
        served.add(NAME, folder).revisions["v1"] = folder
        served.add(GLUE, glue, "dataset")
        done = command(*words, HF_ENDPOINT=served.endpoint)
        assert done.returncode == 0, done.stderr
        assert "[2/2] winning-0.5-seed-0" in done.stderr
    done = command(*words, HF_ENDPOINT=NOWHERE)
    assert done.returncode == 0, done.stderr
    assert "2 finished before" in done.stderr


def test_modules_of_sentence_transformers_come_along(hub: Hub, folder: Path, tmp_path: Path):
    embedder = tmp_path / "embedder"
    shutil.copytree(folder, embedder)
    (embedder / "modules.json").write_text("[]")
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors", "2_Dense/code.py", "onnx/model.safetensors"):
        (embedder / name).parent.mkdir(exist_ok=True)
        (embedder / name).write_text("{}")
    hub.add(NAME, embedder)
    found = find_model(NAME)
    modules = {str(path.relative_to(found)) for path in found.rglob("*") if path.is_file() and path.parent != found}
    assert modules == {"1_Pooling/config.json", "2_Dense/model.safetensors"}
