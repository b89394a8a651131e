"""Killed runs and power cuts: every file of the run equals an undisturbed run's in the end."""

import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ticketops.searching import SearchConfig, run_search

from .interrupted import content
from .tiny import FIELDS

SHORT = {
    **{name: value for name, value in FIELDS.items() if name != "kinds"},
    "sparsities": "0.5",
    "epochs": 1,
    "train_rows": 32,
    "validation_rows": 20,
    "save_models": True,
}
#: Hours are no failure on a busy machine; a hang is.
LONG = [pytest.mark.long, pytest.mark.timeout(7200)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "kills"),
    [
        ("search", 4),
        pytest.param("search", 100, marks=LONG),
        pytest.param("share", 50, marks=LONG),
        pytest.param("transfer", 50, marks=LONG),
    ],
)
def test_what_killed_runs_leave_equals_an_undisturbed_run(
    kind: str,
    kills: int,
    inputs: dict[str, str],
    pairs: str,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
):
    tasks = {
        "search": {"task": inputs["task"], "kinds": "winning"},
        "share": {"tasks": f"{inputs['task']},{pairs}", "arms": "tickets"},
        "transfer": {"source": inputs["task"], "target": inputs["task"], "fractions": "0.5"},
    }
    fields = json.dumps({**SHORT, "model": inputs["model"], **tasks[kind]})
    script = Path(__file__).with_name("interrupted.py")
    done = subprocess.run(
        [sys.executable, str(script), kind, fields, str(tmp_path), str(kills), "0"],
        # Children are forked, and OpenMP's threads do not survive that.
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    record_property("said", f"{kind}: {done.stdout.strip()}")
    assert found["kills"] >= kills
    assert found["power cuts"] > 0
    assert found["moments"] > 50


@pytest.mark.long
def test_a_clock_that_goes_back_and_a_slow_folder_change_nothing(
    inputs: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    fields = {**inputs, **SHORT, "kinds": "winning"}
    run_search(SearchConfig(**fields, output=str(tmp_path / "undisturbed")))
    clock, wait = itertools.count(2_000_000_000, -3600), time.sleep
    sync, replace = os.fsync, os.replace

    def slow(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            wait(0.02)
            return function(*arguments, **options)

        return call

    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(os, "fsync", slow(sync))
    monkeypatch.setattr(os, "replace", slow(replace))
    run_search(SearchConfig(**fields, output=str(tmp_path / "disturbed")))
    assert content(tmp_path / "disturbed") == content(tmp_path / "undisturbed")
