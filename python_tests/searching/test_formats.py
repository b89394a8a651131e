"""Folders that earlier versions of ticketops wrote: they are read, resumed and extended."""

import base64
import json
from pathlib import Path

import pytest

from ticketops.errors import StoreError
from ticketops.reporting import read, report
from ticketops.searching import (
    SearchConfig,
    Setting,
    ShareConfig,
    Store,
    TransferConfig,
    run_search,
    run_share,
)

from .test_run import Heard
from .tiny import FIELDS

#: A search, a share and a transfer as the version of November 2026 left them (without the models).
FORMAT_1 = json.loads(Path(__file__).with_name("format_1.json").read_text())
SHORT = {**FIELDS, "sparsities": "0.5", "epochs": 1}


@pytest.fixture
def old(inputs: dict[str, str], pairs: str, setting: Setting, tmp_path: Path) -> Path:
    """The folders, for this machine's model: its random weights differ between processors in the last digit."""
    for name, content in FORMAT_1.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if content.startswith("base64:"):
            path.write_bytes(base64.b64decode(content.removeprefix("base64:")))
            continue
        if path.name == "config.json":
            for place, here in (("model", inputs["model"]), ("task", inputs["task"]), ("pairs", pairs)):
                content = content.replace(f"ROOT/{place}", here)
            description = json.loads(content)
            description["identity"]["model_fingerprint"] = setting.identity()["model_fingerprint"]
            content = json.dumps(description)
        path.write_text(content)
    return tmp_path


def search(inputs: dict[str, str], old: Path, **fields: object) -> SearchConfig:
    return SearchConfig(**{**inputs, **FIELDS, "output": str(old / "search"), **fields})


def test_a_finished_search_stays_finished_and_gains_a_level(inputs: dict[str, str], old: Path):
    heard = Heard()
    found = read(run_search(search(inputs, old), heard))
    assert heard.ran == []
    assert len(found.records) == 4
    found = read(run_search(search(inputs, old, sparsities="0.75", kinds="winning"), heard))
    assert heard.ran == ["winning-0.75-seed-0"]
    assert len(found.records) == 5
    assert json.loads((old / "search" / "config.json").read_text())["format"] == 2
    assert "| winning | 0.75 |" in report(old / "search").read_text().replace(" ★", "")


def test_what_would_change_a_finished_result_is_refused(inputs: dict[str, str], old: Path):
    with pytest.raises(StoreError, match=r"epochs is 2 there and 3 here; max_length is 16 there and 12 here\)"):
        run_search(search(inputs, old, epochs=3, max_length=12))
    path = old / "search" / "config.json"
    path.write_text(path.read_text().replace('"recipe": "default"', '"recipe": "paper"'))
    with pytest.raises(StoreError, match=r"training optimizer is 'torch.optim.Adamax' there and 'adamax' here"):
        run_search(search(inputs, old, recipe="paper"))


def test_a_finished_share_stays_finished(inputs: dict[str, str], pairs: str, old: Path):
    fields = {name: value for name, value in SHORT.items() if name not in ("kinds", "train_rows")}
    heard = Heard()
    found = read(
        run_share(
            ShareConfig(model=inputs["model"], tasks=(inputs["task"], pairs), output=str(old / "share"), **fields),
            heard,
        )
    )
    assert heard.ran == []
    assert len(found.records) == 3


def test_a_finished_transfer_is_read(old: Path):
    store = Store.read(old / "transfer", "transfer")
    assert isinstance(store.config, TransferConfig)
    # A field that came later has its default.
    assert store.config.encoding is None
    assert len(store.records()) == len(store.plan) == 6
    assert "## How to reproduce" in report(old / "transfer").read_text()


def test_a_folder_of_a_later_version_is_refused_by_its_unknown_flag(old: Path):
    path = old / "search" / "config.json"
    description = json.loads(path.read_text())
    description["identity"]["config"]["temperature"] = 1
    path.write_text(json.dumps(description))
    with pytest.raises(
        StoreError, match=r"config.json is .* of a later version of ticketops .*'temperature'.*: restore"
    ):
        Store.read(old / "search")
