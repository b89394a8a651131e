"""Searches on Ray: the same records as in one process, whatever happens to workers and machines."""

import importlib.util
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ticketops.errors import InputError, TrialError
from ticketops.searching import Listener, SearchConfig, Store, run_search
from ticketops.searching.objects import Objects

from .interrupted import content
from .test_interrupted import SHORT
from .tiny import FIELDS

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


@pytest.mark.skipif(importlib.util.find_spec("ray") is not None, reason="ray is installed")
def test_without_ray_the_message_says_what_to_install(inputs: dict[str, str], tmp_path: Path):
    with pytest.raises(
        InputError, match=r"executor='ray' needs Ray, which is not installed: pip install 'ticketops\[ray"
    ):
        run_search(SearchConfig(**inputs, executor="ray", output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("field", "value"), [("address", "auto"), ("gpus_per_trial", 0.5)])
def test_options_of_ray_are_refused_without_it(field: str, value: Any, inputs: dict[str, str], tmp_path: Path):
    with pytest.raises(InputError, match=f"{field}=.* is for Ray: add executor='ray', or leave it out"):
        run_search(SearchConfig(**inputs, **{field: value}, output=str(tmp_path / "run")))


class Seen(Listener):
    """Writes down what happened, and calls a function when trials start."""

    def __init__(self, on_start: Callable[[int], None] = lambda number: None) -> None:
        self.started_trials: list[str] = []
        self.steps: dict[str, int] = {}
        self.failures: dict[str, str] = {}
        self.on_start = on_start

    def started(self, trial: Any) -> None:
        self.started_trials.append(trial.id)
        self.on_start(len(self.started_trials))

    def stepped(self, trial: Any, step: int, steps: int) -> None:
        self.steps[trial.id] = step

    def failed(self, trial: Any, reason: str) -> None:
        self.failures[trial.id] = reason


@pytest.fixture(scope="module")
def undisturbed(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Content of a search's folder that one process made, with one thread."""
    folder = tmp_path_factory.mktemp("local") / "run"
    run_search(SearchConfig(**inputs, **FIELDS, seeds=2, cpus_per_trial=1, output=str(folder)))
    return content(folder)


@needs_ray
@pytest.mark.timeout(600)
def test_records_are_those_of_one_process(inputs: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path):
    import ray

    folder, seen = tmp_path / "run", Seen()
    run_search(SearchConfig(**inputs, **FIELDS, seeds=2, executor="ray", output=str(folder)), seen)
    assert content(folder) == undisturbed
    assert not ray.is_initialized()
    assert seen.steps
    # Nothing is left to do, and Ray does not start for nothing.
    again = Seen()
    run_search(SearchConfig(**inputs, **FIELDS, seeds=2, executor="ray", output=str(folder)), again)
    assert again.started_trials == []


@needs_ray
@pytest.mark.timeout(900)
def test_a_search_survives_its_second_machine(inputs: dict[str, str], undisturbed: dict[str, Any], tmp_path: Path):
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = cluster.add_node(num_cpus=1)
    killed = threading.Event()

    def kill(number: int) -> None:
        # Two trials are on the way: one on each machine.
        if number == 2:
            threading.Timer(1.0, lambda: (cluster.remove_node(second, allow_graceful=False), killed.set())).start()

    try:
        folder, seen = tmp_path / "run", Seen(kill)
        config = SearchConfig(**inputs, **FIELDS, seeds=2, executor="ray", address=cluster.address, output=str(folder))
        run_search(config, seen)
        assert killed.wait(60)
        assert content(folder) == undisturbed
        assert seen.failures == {}
    finally:
        ray.shutdown()
        cluster.shutdown()


@needs_ray
@pytest.mark.timeout(600)
def test_a_workers_error_is_one_line_with_its_trial(inputs: dict[str, str], tmp_path: Path):
    def broken(**options: Any) -> None:
        raise RuntimeError("the factory\nis closed")

    seen, config = Seen(), SearchConfig(**inputs, **FIELDS, executor="ray", retries=1, output=str(tmp_path / "run"))
    with pytest.raises(TrialError, match=r"^all 4 trials failed; full-seed-0: RuntimeError: the factory is closed$"):
        run_search(config, seen, Objects(trainer_factory=broken))
    store = Store.read(tmp_path / "run")
    assert seen.started_trials == ["full-seed-0"] * 2
    first, *others = store.failures()
    assert 'raise RuntimeError("the factory' in first["trace"]
    assert {failure["error"] for failure in others} == {
        "its ticket is drawn from the scores of full-seed-0, which failed"
    }
    assert set(seen.failures) == {trial.id for trial in store.plan}


@needs_ray
@pytest.mark.long
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("kills", [int(os.environ.get("TICKETOPS_TEST_KILLS", 20))])
def test_kills_of_workers_raylets_and_the_command_leave_no_trace(
    kills: int, inputs: dict[str, str], pairs: str, tmp_path: Path, record_property: Callable[[str, object], None]
):
    tasks = {
        "search": {"task": inputs["task"], "kinds": "winning", "seeds": 2},
        "share": {"tasks": f"{inputs['task']},{pairs}", "arms": "tickets"},
        "transfer": {"source": inputs["task"], "target": inputs["task"], "fractions": "0.5"},
    }
    runs = {kind: {**SHORT, "model": inputs["model"], **fields} for kind, fields in tasks.items()}
    script = Path(__file__).with_name("ray_kills.py")
    root = script.parents[2]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(runs), str(tmp_path), str(kills), "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'python_tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    record_property("said", "ray: " + done.stdout.splitlines()[-1])
    assert json.loads(done.stdout.splitlines()[-1])["kills"] >= kills
