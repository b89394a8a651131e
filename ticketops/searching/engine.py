"""The loop that runs the trials of a search, share or transfer: jobs that name what they need."""

import dataclasses
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from ticketops.errors import InputError, StoreError, TrialError, UnsupportedError
from ticketops.searching.store import Claim, Named, Record, Store
from ticketops.searching.trial import Listener

#: Seconds between two looks at the trials that other processes are running.
_POLL = 1.0
#: Errors of the run rather than of a trial: every trial would end with them.
_ENDS_THE_RUN = (InputError, UnsupportedError, StoreError)


@dataclass(frozen=True, eq=False)
class Call:
    """The training of a trial, in a form that can be sent to another process.

    Attributes:
        function: function of a module, called with `inputs`, `arguments` and `listener=`; its result can be pickled.
        inputs: what many calls share: loaded models, tokenized rows. It is sent to a process once.
        arguments: the other arguments, small ones.
    """

    function: Callable[..., Any]
    inputs: Any
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Job:
    """A trial of a run, or a barrier between trials, which trains nothing.

    Attributes:
        trial: as the listener knows it; its name is unique in the run.
        store: where the trial's files are.
        own: the trial in its store.
        needs: names of the jobs that must have ended before, finished or failed.
        prepare: reads what the trial needs and writes its ticket; returns the training, or None if the trial is
            finished after that or need not be trained. It raises TrialError where something it needs is missing.
        keep: writes the files of a trained trial and returns its record.
        files: files of the run, beside ticket and model, whose checksums belong into the record.
        is_finished: looks whether the trial is finished, by an earlier run or by another process.
        finished: True if an earlier run has finished the trial, and `prepare` only restores what was lost.
    """

    trial: Named
    store: Store
    own: Named
    prepare: Callable[[], Call | None]
    keep: Callable[[Any], Record] = dict
    needs: Sequence[str] = ()
    files: Callable[[], Iterable[Path]] = tuple
    is_finished: Callable[[], bool] = bool
    finished: bool = False


@dataclass(frozen=True)
class Barrier:
    """Names a job that trains nothing: it waits for trials, and makes something of what they have left.

    Attributes:
        id: its name in the run.
        seed: no seed, but every job has one.
    """

    id: str
    seed: int = 0


@dataclass(frozen=True)
class Failure:
    """Why a training ended without a result.

    Attributes:
        reason: one line.
        trace: where it happened; empty where the reason says all.
        error: the error, if it ends the whole run.
    """

    reason: str
    trace: str = ""
    error: Exception | None = None

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What an exception says."""
        message = " ".join(str(error).split())[:500]
        if isinstance(error, _ENDS_THE_RUN):
            return cls(message, error=error)
        if isinstance(error, TrialError | torch.OutOfMemoryError):
            return cls(message)
        where = "".join(traceback.format_exception(error))[-4000:]
        return cls(f"{type(error).__name__}: {message}".rstrip(": "), where)


class Executor(Protocol):
    """Runs trainings, some of them at the same time."""

    def free(self) -> int:
        """Number of trainings that can start now."""

    def start(self, trial: Named, call: Call) -> None:
        """Starts a training."""

    def ended(self, wait: bool) -> list[tuple[str, Any]]:
        """Returns the name and the result, or a `Failure`, of trainings that have ended, and tells the listener about
        steps; waits a moment for one if `wait` is true."""


class LocalExecutor:
    """Runs one training after the other in this process.

    Args:
        listener: callbacks on the progress of steps.
    """

    def __init__(self, listener: Listener):
        self._listener = listener
        self._waiting: list[tuple[Named, Call]] = []

    def free(self) -> int:
        """One, unless a training is waiting to run."""
        return 1 - len(self._waiting)

    def start(self, trial: Named, call: Call) -> None:
        """Remembers the training, which `ended` runs."""
        self._waiting.append((trial, call))

    def ended(self, wait: bool) -> list[tuple[str, Any]]:
        """Runs the training."""
        found: list[tuple[str, Any]] = []
        while self._waiting:
            trial, call = self._waiting.pop(0)
            try:
                listener = StepsOf(trial, self._listener)
                found.append((trial.id, self.run(call, listener)))
            except Exception as error:
                found.append((trial.id, Failure.of(error)))
        return found

    def run(self, call: Call, listener: Listener) -> Any:
        """Runs one training.

        Args:
            call: the training.
            listener: callbacks on the progress of its steps.
        """
        return call.function(call.inputs, *call.arguments, listener=listener)


class StepsOf(Listener):
    """Passes the steps of a training on under the name that its trial has in the run.

    Args:
        trial: the trial in the run.
        outer: the run's listener.
    """

    def __init__(self, trial: Named, outer: Listener):
        self._trial, self._outer = trial, outer

    def stepped(self, trial: Named, step: int, steps: int) -> None:
        """The training has done `step` of its `steps` optimizer steps."""
        self._outer.stepped(self._trial, step, steps)


@dataclass(eq=False)
class _Progress:
    """State of a run's jobs.

    Attributes:
        waiting: jobs that have not started, in the order of the plan.
        running: name -> job and the claim on it.
        settled: names of the jobs that have ended.
        failed: name -> reason.
        attempts: name -> how often the trial has failed.
    """

    waiting: list[Job]
    running: dict[str, tuple[Job, Claim]] = field(default_factory=dict)
    settled: set[str] = field(default_factory=set)
    failed: dict[str, str] = field(default_factory=dict)
    attempts: dict[str, int] = field(default_factory=dict)


def run_jobs(jobs: Sequence[Job], listener: Listener, executor: Executor | None = None, retries: int = 0) -> None:
    """Runs the jobs that are not finished, each as soon as what it needs has ended and the executor is free.

    Several processes, on one machine or on several that share the folder, may run the same jobs: each trial is claimed
    before it starts, and what others finish is taken as finished. A trial that fails is kept with its error, and the
    others go on.

    Args:
        jobs: of the run, in the order in which they should start.
        listener: callbacks on the progress of trials.
        executor: who runs the trainings; by default this process, one after the other.
        retries: how often a trial that failed is tried again at once.

    Raises:
        InputError, UnsupportedError: every trial would end with this error.
        StoreError: a file is damaged, or cannot be written.
        TrialError: all trials failed.
    """
    executor = executor or LocalExecutor(listener)
    assert {need for job in jobs for need in job.needs} <= {job.trial.id for job in jobs}
    state = _Progress(list(jobs))
    try:
        while state.waiting or state.running:
            started = _start(state, executor, listener)
            ended = executor.ended(wait=bool(state.running) and not started)
            for name, result in ended:
                job, claim = state.running.pop(name)
                with claim:
                    _end(state, job, result, listener, retries)
            if state.waiting and not (started or ended or state.running):
                # All that could start is being run by other processes.
                time.sleep(_POLL)
    finally:
        for _, claim in state.running.values():
            claim.release()
    trials = [job for job in jobs if not isinstance(job.trial, Barrier)]
    if state.failed and len(state.failed) >= len(trials):
        first = next(iter(state.failed))
        raise TrialError(f"all {len(trials)} trials failed; {first}: {state.failed[first]}")


def _start(state: _Progress, executor: Executor, listener: Listener) -> bool:
    """Starts the jobs that can start, and settles those that need no training; True if there was any."""
    progressed = False
    for job in list(state.waiting):
        trains = not (job.finished or isinstance(job.trial, Barrier))
        if not state.settled.issuperset(job.needs) or (trains and executor.free() <= 0):
            continue
        claim = None if job.finished else job.store.claim(job.own)
        if claim is None and not job.finished:
            continue
        progressed = True
        state.waiting.remove(job)
        try:
            if _train(state, job, claim, executor, listener):
                claim = None
        finally:
            if claim is not None:
                claim.release()
    return progressed


def _train(state: _Progress, job: Job, claim: Claim | None, executor: Executor, listener: Listener) -> bool:
    """Starts a job's training and holds its claim; False if there is nothing to train."""
    name = job.trial.id
    try:
        if claim is not None and job.is_finished():
            # By another process, since this run began.
            listener.finished(job.trial, job.store.record(job.own) or {})
            call = None
        else:
            call = job.prepare()
            if call is None and claim is not None and not isinstance(job.trial, Barrier):
                listener.dropped(job.trial)
    except Exception as error:
        if isinstance(job.trial, Barrier):
            raise
        _end(state, job, Failure.of(error), listener, 0)
        return False
    if call is None:
        state.settled.add(name)
        return False
    if claim is None:
        # What a finished trial was trained with is lost: it is one that has to train.
        state.waiting.insert(0, dataclasses.replace(job, finished=False))
        return False
    state.running[name] = job, claim
    listener.started(job.trial)
    executor.start(job.trial, call)
    return True


def _end(state: _Progress, job: Job, result: Any, listener: Listener, retries: int) -> None:
    """Keeps what a training has left, or why it failed."""
    name = job.trial.id
    if not isinstance(result, Failure):
        try:
            record = job.keep(result)
            job.store.write_record(job.own, record, job.files())
        except TrialError as error:
            result = Failure.of(error)
        else:
            state.settled.add(name)
            listener.finished(job.trial, record)
            return
    if result.error is not None:
        raise result.error
    state.attempts[name] = state.attempts.get(name, 0) + 1
    if state.attempts[name] <= retries:
        state.waiting.insert(0, job)
        return
    state.settled.add(name)
    state.failed[name] = result.reason
    job.store.write_failure(job.own, result.reason, result.trace)
    listener.failed(job.trial, result.reason)
