"""The loop over jobs: order, failures, retries, and several processes on one folder."""

import itertools
import threading
from pathlib import Path
from typing import Any

import pytest

from ticketops.errors import InputError, StoreError, TrialError
from ticketops.searching import Listener, Store
from ticketops.searching.engine import Barrier, Call, Job, run_jobs

from .test_store import NOTES, identity, record


class Seen(Listener):
    """Writes down every event."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str]] = []

    def started(self, trial: Any) -> None:
        self.events.append(("started", trial.id))

    def finished(self, trial: Any, record: Any) -> None:
        self.events.append(("finished", trial.id))

    def failed(self, trial: Any, reason: str) -> None:
        self.events.append(("failed", trial.id))


def jobs_of(store: Store, work: Any, needs: Any = lambda trial: ()) -> list[Job]:
    return [
        Job(
            trial,
            store,
            trial,
            lambda trial=trial: Call(work, None, (trial,)),
            lambda trial: record(trial),
            needs=needs(trial),
            is_finished=lambda trial=trial: store.record(trial) is not None,
        )
        for trial in store.plan
    ]


def trained(inputs: Any, trial: Any, listener: Any) -> Any:
    return trial


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.create(tmp_path / "run", identity(), NOTES)


def test_a_job_starts_when_what_it_needs_has_ended(store: Store):
    full, winning = store.plan
    seen, made = Seen(), []
    jobs = jobs_of(store, trained, lambda trial: ["between"] if trial == winning else ())
    barrier = Job(
        Barrier("between"), store, Barrier("between"), lambda: made.append(store.record(full)), needs=[full.id]
    )
    run_jobs([jobs[1], barrier, jobs[0]], seen)
    assert seen.events == [(what, trial.id) for trial in (full, winning) for what in ("started", "finished")]
    assert made[0]["id"] == full.id
    assert list((store.folder / "claims").iterdir()) == []


def test_one_bad_trial_is_kept_with_its_error_and_does_not_end_the_run(store: Store):
    full, winning = store.plan

    def work(inputs: Any, trial: Any, listener: Any) -> Any:
        if trial == full:
            raise ZeroDivisionError("by\nzero")
        return trial

    seen = Seen()
    run_jobs(jobs_of(store, work), seen)
    assert ("finished", winning.id) in seen.events
    (failure,) = store.failures()
    assert failure["error"] == "ZeroDivisionError: by zero"
    assert "in work" in failure["trace"]
    with pytest.raises(TrialError, match="all 1 trials failed; full-seed-0: ZeroDivisionError: by zero"):
        run_jobs(jobs_of(store, work)[:1], seen)


def test_a_failed_trial_is_tried_again(store: Store):
    numbers = itertools.count()

    def work(inputs: Any, trial: Any, listener: Any) -> Any:
        if next(numbers) < 2:
            raise RuntimeError("not yet")
        return trial

    seen = Seen()
    run_jobs(jobs_of(store, work)[:1], seen, retries=2)
    assert [what for what, _ in seen.events] == ["started"] * 3 + ["finished"]
    assert store.failures() == []


@pytest.mark.parametrize("error", [InputError("a wrong option"), StoreError("the disk is full")])
def test_what_every_trial_would_end_with_ends_the_run(error: Exception, store: Store):
    def work(inputs: Any, trial: Any, listener: Any) -> Any:
        raise error

    seen = Seen()
    with pytest.raises(type(error), match=str(error)):
        run_jobs(jobs_of(store, work), seen)
    assert [what for what, _ in seen.events] == ["started"]
    assert store.running() == {}
    assert store.failures() == []


def test_two_processes_share_the_trials_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("ticketops.searching.engine._POLL", 0.01)
    from .test_progress import CONFIG

    stores = [Store.create(tmp_path / "run", identity(CONFIG), NOTES) for _ in range(2)]
    both, seen = threading.Barrier(2, timeout=60), [Seen(), Seen()]

    def work(inputs: Any, trial: Any, listener: Any) -> Any:
        # Each has a trial at the same time as the other, twice.
        both.wait()
        return trial

    threads = [
        threading.Thread(target=run_jobs, args=(jobs_of(store, work), own))
        for store, own in zip(stores, seen, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    started = [name for own in seen for what, name in own.events if what == "started"]
    names = [trial.id for trial in stores[0].plan]
    assert sorted(started) == sorted(names)
    # Both hear of all that is finished.
    assert all(sorted(name for what, name in own.events if what == "finished") == sorted(names) for own in seen)
    assert len(stores[0].records()) == len(names)
