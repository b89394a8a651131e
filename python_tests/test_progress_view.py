"""What a run shows of its progress, from made-up events."""

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from ticketops import progress_view
from ticketops.progress_view import Bars, Lines, new_console
from ticketops.searching import Trial


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def trials(seeds: int) -> list[Trial]:
    levels = (("full", 0.0), ("winning", 0.5))
    return [Trial(kind, level, seed, 0, 0) for seed in range(seeds) for kind, level in levels]


def record(seconds: float) -> dict[str, Any]:
    return {"metric": "accuracy", "score": 0.8, "timing": {"train_seconds": seconds}}


def test_lines_count_the_trials_and_estimate_what_is_left_from_those_of_the_same_kind():
    clock, plan = Clock(), trials(3)
    lines = Lines(new_console(file=io.StringIO()), clock)
    lines.planned(plan, plan[:1])
    assert lines.seconds_left() is None
    for trial, seconds in ((plan[1], 100.0), (plan[2], 10.0)):
        lines.started(trial)
        clock.now += seconds
        lines.finished(trial, record(seconds))
    # The winning ones of two seeds, and the full model of one.
    assert lines.seconds_left() == 100 + 10 + 100
    lines.started(plan[3])
    lines.failed(plan[3], "the loss is nan")
    assert lines.console.file.getvalue().splitlines() == [
        "6 trials, 1 finished before",
        # Nothing is known of the other kind yet.
        "[2/6] winning-0.5-seed-0: accuracy 80.0 (100 s), about 7 min left",
        "[3/6] full-seed-1: accuracy 80.0 (10 s), about 4 min left",
        "winning-0.5-seed-1 failed: the loss is nan",
    ]


def test_bars_follow_several_trials_at_the_same_time():
    clock, plan = Clock(), trials(2)
    with progress_view.progress(new_console(file=io.StringIO(), force_terminal=True)) as bars:
        assert isinstance(bars, Bars)
        bars.clock = clock

        def shown() -> list[tuple[str, float, float | None, str]]:
            return [(t.description, t.completed, t.total, t.fields["note"]) for t in bars.progress.tasks]

        bars.planned(plan, [])
        first, second = plan[:2]
        bars.started(first)
        bars.started(second)
        for step in range(1, 4):
            clock.now += 1
            bars.stepped(first, step, 10)
            clock.now += 1
            bars.stepped(second, 2 * step, 20)
        assert shown() == [
            ("trials", 0, 4, ""),
            ("full-seed-0", 3, 10, "2.00 s/step"),
            ("winning-0.5-seed-0", 6, 20, "1.00 s/step"),
        ]
        bars.finished(first, record(40.0))
        # Two trials of 40 s each and the rest of one that has run for 6, one at a time.
        assert shown() == [("trials", 1, 4, "about 2 min left"), ("winning-0.5-seed-0", 6, 20, "1.00 s/step")]
        bars.failed(second, "the loss is nan")
        assert shown() == [("trials", 2, 4, "1 failed, about 1 min left")]


def test_progress_is_shown_in_interactive_sessions_alone(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(sys, "ps1", raising=False)
    mine = object()
    with progress_view.watched(None) as listener:
        assert listener is None
    monkeypatch.setattr(progress_view, "new_console", lambda **_: new_console(file=io.StringIO()))
    for name, value in (("ps1", ">>> "), ("modules", {**sys.modules, "IPython": SimpleNamespace(get_ipython=object)})):
        with monkeypatch.context() as patch:
            patch.setattr(sys, name, value, raising=False)
            with progress_view.watched(None) as listener:
                assert isinstance(listener, Lines)
            with progress_view.watched(mine) as listener:
                assert listener is mine
