"""Results as a user reads them from a folder, from stores that no training has filled."""

from pathlib import Path

import pytest

import ticketops
from ticketops.errors import InputError, StoreError

from .test_report import make_store
from .test_task_reports import make_share, make_transfer


def test_a_search_is_read_from_its_folder(tmp_path: Path):
    store = make_store(tmp_path / "run", leave_out=("losing-0.5-seed-2", "losing-0.25-seed-2"))
    store.write_failure(store.plan[-1], "too hot")
    found = ticketops.read(store.folder)
    assert isinstance(found, ticketops.SearchResult)
    assert (found.folder, found.report_path, found.config) == (store.folder, None, store.config)
    assert found.records == store.records()
    assert found.failures == [{"id": "losing-0.5-seed-2", "error": "too hot"}]
    assert found.unfinished == ["losing-0.25-seed-2"]
    assert found.super_level is not None
    assert (found.super_level.sparsity, found.super_level.best_seed) == (0.25, 2)
    assert found.super_ticket == found.tickets[2] == store.tickets("winning", 0.25)[2]
    assert found.gain.mean == pytest.approx(0.02)
    assert found.comparison is not None
    assert found.comparison.outcome == "better"
    assert found.findings[0].startswith("The super ticket beats the full model")
    path = ticketops.report(store.folder)
    assert ticketops.read(store.folder).report_path == path
    assert found.table[2][:2] == ["winning ★", "0.25"]


def test_a_share_and_a_transfer_are_read_from_their_folders(tmp_path: Path):
    store = make_share(tmp_path / "share")
    shared = ticketops.read(store.folder)
    assert isinstance(shared, ticketops.ShareResult)
    assert {task: set(by_seed) for task, by_seed in shared.tickets.items()} == {"rte": {0, 1, 2}, "stsb": {0, 1, 2}}
    assert shared.comparisons["plain"].outcome == "better"
    assert shared.scores["tickets"]["rte"][1] == pytest.approx(0.83)
    assert shared.unfinished[0].startswith("rte ")
    moved = ticketops.read(make_transfer(tmp_path / "transfer").folder)
    assert isinstance(moved, ticketops.TransferResult)
    assert moved.sparsity == 0.25
    assert moved.comparisons["target"][0.1].difference.mean == pytest.approx(0.02)
    assert {rung.ladder for rung in moved.ladders} == {"target", "source"}


def test_an_unfinished_run_and_a_damaged_one(tmp_path: Path):
    everything = tuple(trial.id for trial in make_store(tmp_path / "whole").plan)
    found = ticketops.read(make_store(tmp_path / "run", leave_out=everything).folder)
    assert (found.records, found.unfinished) == ([], list(everything))
    assert found.super_ticket is None
    assert found.findings[0].startswith("No super ticket yet")
    path = tmp_path / "whole" / "trials" / f"{everything[0]}.json"
    path.write_text(path.read_text()[:50])
    with pytest.raises(StoreError, match="delete it"):
        ticketops.read(tmp_path / "whole")
    with pytest.raises(InputError, match="no ticketops folder"):
        ticketops.read(tmp_path)
