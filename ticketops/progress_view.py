"""Shows the progress of a run: a live view in terminals and notebooks, plain lines in files and pipes. No torch."""

import contextlib
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from ticketops.launch import follows
from ticketops.text import count, duration, printable

if TYPE_CHECKING:
    from ticketops.searching.store import Named, Record


class Lines:
    """Writes a line for each trial that ends, for files and pipes.

    Args:
        console: where the lines go.
        clock: time in seconds, for tests.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic):
        self.console, self.clock = console, clock
        self.total = self.done = self.failures = 0
        # Trials that have not ended, by id.
        self._left: dict[str, Named] = {}
        # Id of a running trial -> time at which it started.
        self._running: dict[str, float] = {}
        # Name of a group of trials -> seconds of each finished one, as `_groups` names them.
        self._seconds: dict[str, list[float]] = {}

    def planned(self, trials: "Sequence[Named]", finished: "Collection[Named]") -> None:
        """The run starts. `finished` are those of its trials that an earlier run has finished."""
        self.total, self.done = len(trials), len(finished)
        before = {trial.id for trial in finished}
        self._left = {trial.id: trial for trial in trials if trial.id not in before}
        kept = f", {len(finished)} finished before" if finished else ""
        self.say(f"{count(len(trials), 'trial')}{kept}")

    def started(self, trial: "Named") -> None:
        """A trial starts to train."""
        self._running[trial.id] = self.clock()

    def stepped(self, trial: "Named", step: int, steps: int) -> None:
        """A trial has done `step` of its `steps` optimizer steps."""

    def finished(self, trial: "Named", record: "Record") -> None:
        """A trial's record is written."""
        seconds = sum(record["timing"].values())
        for group in _groups(trial):
            self._seconds.setdefault(group, []).append(seconds)
        self._end(trial)
        score = f"{record['metric']} {100 * record['score']:.1f}"
        self.say(f"[{self.done}/{self.total}] {trial.id}: {score} ({seconds:.0f} s){self._rest()}")

    def dropped(self, trial: "Named") -> None:
        """A trial need not be trained."""
        self.total -= 1
        self._left.pop(trial.id, None)

    def failed(self, trial: "Named", reason: str) -> None:
        """A trial failed."""
        self.failures += 1
        self._end(trial)
        self.say(f"{trial.id} failed: {reason}")

    def seconds_left(self) -> float | None:
        """Estimates the time until all trials have ended, from finished trials of the same kind where there are some.

        Trials that run at the same time are taken to go on doing so.

        Returns:
            Seconds; None if no trial has finished yet.
        """
        if not self._seconds:
            return None
        expected = 0.0
        for name, trial in self._left.items():
            known = next(found for group in _groups(trial) if (found := self._seconds.get(group)))
            passed = self.clock() - self._running[name] if name in self._running else 0.0
            expected += max(statistics.fmean(known) - passed, 0.0)
        return expected / max(len(self._running), 1)

    def say(self, line: str) -> None:
        """Prints a line; names in it do not control the terminal."""
        self.console.print(printable(line), soft_wrap=True)

    def _end(self, trial: "Named") -> None:
        self.done = min(self.done + 1, self.total)
        self._left.pop(trial.id, None)
        self._running.pop(trial.id, None)

    def _rest(self) -> str:
        seconds = self.seconds_left()
        return f", about {duration(seconds)} left" if self._left and seconds is not None else ""


class Bars(Lines):
    """Adds a bar over all trials, and one over the steps of each running trial, for terminals and notebooks.

    Args:
        progress: the live display, with the columns of `COLUMNS`.
        clock: time in seconds, for tests.
    """

    COLUMNS = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic):
        super().__init__(progress.console, clock)
        self.progress = progress
        self.trials = progress.add_task("loading model and data", total=None, note="")
        self._bars: dict[str, TaskID] = {}
        # Time and number of the first step that was seen of each running trial; before it the kernels are warmed up.
        self._first: dict[str, tuple[float, int]] = {}
        self._updated = self.clock()

    def planned(self, trials: "Sequence[Named]", finished: "Collection[Named]") -> None:
        """The run starts. `finished` are those of its trials that an earlier run has finished."""
        super().planned(trials, finished)
        self.progress.update(self.trials, description="trials", total=len(trials), completed=len(finished))

    def started(self, trial: "Named") -> None:
        """A trial starts to train."""
        super().started(trial)
        self._bar(trial)
        self._update()

    def dropped(self, trial: "Named") -> None:
        """A trial need not be trained."""
        super().dropped(trial)
        self.progress.update(self.trials, total=self.total)

    def stepped(self, trial: "Named", step: int, steps: int) -> None:
        """A trial has done `step` of its `steps` optimizer steps."""
        now = self.clock()
        start, first = self._first.setdefault(trial.id, (now, step))
        note = f"{(now - start) / (step - first):.2f} s/step" if step > first else ""
        self.progress.update(self._bar(trial), completed=step, total=steps, note=note)
        # Steps may be many, and so may the trials that the estimate looks at.
        if now - self._updated >= 1:
            self._update()

    def _bar(self, trial: "Named") -> TaskID:
        if trial.id not in self._bars:
            self._bars[trial.id] = self.progress.add_task(printable(trial.id), total=None, note="")
        return self._bars[trial.id]

    def _end(self, trial: "Named") -> None:
        super()._end(trial)
        self._first.pop(trial.id, None)
        if trial.id in self._bars:
            self.progress.remove_task(self._bars.pop(trial.id))
        self._update()

    def _update(self) -> None:
        self._updated = self.clock()
        failed = f"{self.failures} failed" if self.failures else ""
        note = ", ".join(filter(None, (failed, self._rest().removeprefix(", "))))
        self.progress.update(self.trials, completed=self.done, note=note)


def _groups(trial: "Named") -> tuple[str, str, str]:
    """Groups of trials that take about as long as this one, the most similar first: its level, its kind, all trials."""
    return trial.id.rpartition("-seed-")[0], f"kind {getattr(trial, 'kind', '')}", "all"


def new_console(**options: Any) -> Console:
    """Makes a console that prints text as it is: names and paths may hold brackets and colons, rich's markup.

    Of processes that train together the first one speaks.

    Args:
        options: keyword arguments of rich's Console.
    """
    return Console(highlight=False, markup=False, emoji=False, quiet=follows(), **options)


@contextlib.contextmanager
def progress(console: Console | None = None) -> Iterator[Any]:
    """Shows the progress of a run in a `with` block.

    Args:
        console: where to show it; by default standard error, in notebooks the cell's output.

    Yields:
        The run's listener.
    """
    console = console or new_console(stderr=True)
    # Without ipywidgets rich shows nothing in a notebook.
    live = console.is_terminal or (console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None)
    if not live:
        if console.is_jupyter:
            console = new_console(file=sys.stdout, force_jupyter=False)
        console.print("loading model and data")
        yield Lines(console)
        return
    with Progress(*Bars.COLUMNS, console=console, transient=True) as shown:
        yield Bars(shown)


def is_interactive() -> bool:
    """Returns True in a Jupyter kernel, in IPython and at Python's prompt, and False in scripts."""
    ipython = sys.modules.get("IPython")
    return hasattr(sys, "ps1") or (ipython is not None and ipython.get_ipython() is not None)


@contextlib.contextmanager
def watched(listener: Any) -> Iterator[Any]:
    """Chooses the listener of a run that is called in Python.

    Args:
        listener: the caller's; None to show the progress in an interactive session, and nothing in a script.

    Yields:
        The listener; None for none.
    """
    if listener is not None or not is_interactive():
        yield listener
        return
    with progress() as shown:
        yield shown
