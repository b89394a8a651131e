"""Searches of one and the same trial in two processes, started by torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoModel

from ticketops.errors import InputError, UnsupportedError
from ticketops.reporting import read
from ticketops.searching import SearchConfig, Store, run_search
from ticketops.searching.processes import check_processes
from ticketops.searching.sharing_plan import ShareConfig

from .tiny import FIELDS

#: Both processes see the rows of one batch of 16 together, and no dropout tells them apart.
TOGETHER = {**FIELDS, "importance": "both", "seeds": 1}


@pytest.fixture(scope="module")
def sober(inputs: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tiny inputs, with a model without dropout."""
    folder = tmp_path_factory.mktemp("sober") / "model"
    model = AutoModel.from_pretrained(inputs["model"], hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model.save_pretrained(folder)
    for file in Path(inputs["model"]).glob("*token*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return {**inputs, "model": str(folder)}


def launched(*words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def flags(fields: dict[str, Any]) -> list[str]:
    return [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def test_two_processes_train_what_one_trains(sober: dict[str, str], tmp_path: Path):
    alone = Store.read(run_search(SearchConfig(**sober, **TOGETHER, cpus_per_trial=1, output=str(tmp_path / "one"))))
    done = launched("-m", "ticketops", "search", *flags({**sober, **TOGETHER, "output": tmp_path / "two"}))
    assert done.returncode == 0, done.stderr
    # One of them speaks.
    assert done.stdout.count("Report:") == 1
    assert done.stderr.count("4 trials") == 1
    together = Store.read(tmp_path / "two")
    for one, two in zip(alone.records(), together.records(), strict=True):
        assert (one["id"], one["steps"], one["rows"]) == (two["id"], two["steps"], two["rows"])
        assert two["environment"]["machine"]["processes"] == 2
        assert one["score"] == two["score"]
        assert one["train_loss"] == pytest.approx(two["train_loss"], abs=0.3)
    for trial in alone.plan:
        ours, theirs = alone.predictions(trial), together.predictions(trial)
        np.testing.assert_allclose(ours["validation"], theirs["validation"], rtol=1e-3, atol=1e-3)
        if trial.kind != "full":
            assert alone.ticket(trial) == together.ticket(trial)
    for way in ("pass", "on_the_fly"):
        ours, theirs = alone.importance(0, way), together.importance(0, way)
        np.testing.assert_allclose(ours.head, theirs.head, rtol=2e-3)
        np.testing.assert_allclose(ours.ffn, theirs.ffn, rtol=2e-3)


def test_scripts_get_the_result_and_go_on_in_every_process(sober: dict[str, str], tmp_path: Path):
    fields = {**sober, **FIELDS, "kinds": "winning", "sparsities": "0.5", "early_stopping_patience": 2}
    script = tmp_path / "script.py"
    script.write_text(
        "import json, os, ticketops\n"
        f"fields = json.loads({json.dumps(json.dumps(fields))})\n"
        f"result = ticketops.search(**fields, output={str(tmp_path / 'run')!r})\n"
        # A second one on the same folder has nothing to train.
        f"again = ticketops.search(**fields, output={str(tmp_path / 'run')!r})\n"
        "try:\n"
        f"    ticketops.search(**(fields | {{'task': 'nope'}}), output={str(tmp_path / 'other')!r})\n"
        "except ticketops.TicketopsError as error:\n"
        "    said = str(error)\n"
        f"open({str(tmp_path)!r} + '/rank-' + os.environ['RANK'], 'w').write(\n"
        "    json.dumps([result.finished, result.super_level.sparsity, again == result, said]))\n"
    )
    done = launched(str(script))
    assert done.returncode == 0, done.stderr
    first, second = (json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in (0, 1))
    assert first == second
    assert first[:3] == [2, 0.5, True]
    assert "nope" in first[3]


def test_a_trial_that_diverges_fails_and_the_others_go_on(sober: dict[str, str], tmp_path: Path):
    fields = {**sober, **FIELDS, "learning_rate": 0.99, "max_grad_norm": 0, "weight_decay": 100, "warmup_steps": 0}
    done = launched("-m", "ticketops", "search", *flags({**fields, "output": tmp_path / "run"}))
    found = read(tmp_path / "run")
    assert len(found.failures) + found.finished == 4
    assert done.returncode == (1 if found.failures else 0)
    assert done.stderr.count("Error") <= 1


def test_what_processes_cannot_do_together_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    # No launcher's.
    check_processes(SearchConfig(batch_size=32))
    monkeypatch.setenv("LOCAL_RANK", "0")
    check_processes(SearchConfig(batch_size=33))
    with pytest.raises(InputError, match=r"batch_size 32 cannot be divided among 3 processes: give a multiple of 3"):
        check_processes(SearchConfig(batch_size=32))
    with pytest.raises(InputError, match=r"executor='ray' trains several trials at a time, and 3 processes"):
        check_processes(SearchConfig(batch_size=33, executor="ray"))
    with pytest.raises(UnsupportedError, match=r"share trains in one process, and 3 were started"):
        check_processes(ShareConfig(tasks="a,b", batch_size=33))
