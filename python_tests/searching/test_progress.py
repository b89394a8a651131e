import json
import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from ticketops import cli
from ticketops.errors import InputError
from ticketops.searching import SearchConfig, Store
from ticketops.searching.progress import status, verify
from ticketops.text import duration

from .test_store import NOTES, identity, importance, record

CONFIG = SearchConfig(sparsities="0.5", kinds="winning", seeds=2)


def invoke(*arguments: object) -> tuple[int, str]:
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return done.exit_code, done.output


@pytest.fixture
def store(tmp_path: Path):
    return Store.create(tmp_path / "run", identity(CONFIG), NOTES)


def test_a_run_says_what_is_finished_failed_and_left(store: Store):
    first, winning, second, last = store.plan
    found = status(store.folder)
    assert (found.kind, found.running, found.finished, found.failed) == ("search", {}, [], {})
    assert found.left == [trial.id for trial in store.plan]
    # From no finished trial nothing is known.
    assert (found.seconds, found.seconds_left) == (0, None)
    store.write_record(first, record(first, timing={"train_seconds": 80.0, "evaluate_seconds": 20.0}))
    # Neither is there a finished one of its kind, so all are taken.
    assert status(store.folder).seconds_left == 300
    store.write_record(winning, record(winning, timing={"train_seconds": 50.0}))
    store.write_failure(second, "the loss is nan")
    found = status(store.folder)
    assert found.finished == [first.id, winning.id]
    assert found.failed == {second.id: "the loss is nan"}
    assert found.left == [last.id]
    assert (found.seconds, found.seconds_left) == (150, 150)
    with store.claim(second):
        code, printed = invoke("status", store.folder)
    assert code == 0
    assert printed.splitlines() == [
        "search: 2 of 4 trials finished, in 2 min, about 2 min left; 1 trial running",
        f"running: {second.id}: process {os.getpid()} on {socket.gethostname()}",
        f"failed: {second.id}: the loss is nan",
        f"missing: {last.id}",
    ]
    assert json.loads(invoke("status", store.folder, "--json")[1])["running"] == {}


def test_verify_names_every_damaged_and_missing_file(store: Store):
    full, winning = store.plan[:2]
    store.write_importance(0, "pass", importance(0))
    store.write_record(full, record(full), [store.importance_path(0, "pass")])
    assert verify(store.folder) == []
    assert invoke("verify", store.folder) == (0, "the files of 1 finished trial are whole\n")
    path = store.importance_path(0, "pass")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    store.write_record(winning, record(winning))
    store.record_path(winning).write_text("{")
    damaged = verify(store.folder)
    assert len(damaged) == 2
    assert any(str(path) in line and "delete it" in line for line in damaged)
    assert any(str(store.record_path(winning)) in line for line in damaged)
    path.unlink()
    assert f"{path} is missing: run the same command again" in verify(store.folder)
    code, printed = invoke("verify", store.folder)
    assert (code, len(printed.splitlines())) == (1, 2)


@pytest.mark.parametrize("command", ["status", "verify"])
def test_what_is_no_run_is_one_line(command: str, tmp_path: Path):
    code, printed = invoke(command, tmp_path)
    assert code == 2
    assert "is no ticketops folder" in printed
    with pytest.raises(InputError, match="is no ticketops folder"):
        status(tmp_path)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (90, "2 min"),
        (3600, "1 h"),
        (11_100, "3 h 5 min"),
        (187_200, "2 d 4 h"),
        (86_460, "1 d 1 min"),
    ],
)
def test_durations_are_said_in_their_largest_units(seconds: float, text: str):
    assert duration(seconds) == text
