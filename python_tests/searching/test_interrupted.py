"""Killed runs and power cuts: every file of the run equals an undisturbed run's in the end."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

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
