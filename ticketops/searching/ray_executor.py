"""Trains several trials at a time on Ray: on the cores or GPUs of one machine, or on a cluster."""

import contextlib
import importlib.util
import os
import time
import uuid
from types import TracebackType
from typing import Any, Self

import torch

from ticketops.errors import InputError, spelled
from ticketops.searching.engine import Call, Failure
from ticketops.searching.store import Named
from ticketops.searching.trial import Listener
from ticketops.searching.worker import Inputs, portable

#: Seconds between two looks at what workers have done.
_POLL = 0.2
#: Seconds between two reports of a training's steps.
_REPORT = 0.5
#: How often a trial is started again whose worker or machine has died.
_RESTARTS = 3
#: The inputs that this worker has loaded.
_LOADED = Inputs()


def require_ray() -> Any:
    """Imports Ray.

    Raises:
        InputError: it is not installed.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError(
            f"{spelled('executor', 'ray')} needs Ray, which is not installed: pip install 'ticketops[ray]'"
        )
    # Nothing of a run leaves the machine.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray


class RayExecutor:
    """Runs trainings as tasks of Ray, as many at a time as there are CPU cores and GPUs for.

    A worker process keeps the inputs that it has loaded, and trains one trial after the other. Where a worker or its
    machine dies, Ray starts its trial again on another one.

    Args:
        listener: callbacks on the progress of steps.
        address: of a cluster, "auto" for the one that this machine belongs to; None for one on this machine, or the
            one that this process is connected to already.
        cpus: CPU cores and threads of a trial.
        gpus: share of a GPU, or number of GPUs, of a trial; None for one where there are any.

    Raises:
        InputError: Ray cannot be reached, or has too little for one trial.
    """

    def __init__(self, listener: Listener, address: str | None, cpus: int, gpus: float | None):
        self._ray = require_ray()
        self._listener, self._cpus = listener, cpus
        # Not shut down at the end, if it is somebody else's.
        self._connected = not self._ray.is_initialized()
        if self._connected:
            self._connect(address)
        found = self._ray.cluster_resources()
        self._gpus = gpus if gpus is not None else float(found.get("GPU", 0) > 0)
        for name, wanted, there in (
            ("cpus_per_trial", cpus, found.get("CPU", 0)),
            ("gpus_per_trial", self._gpus, found.get("GPU", 0)),
        ):
            if wanted > there:
                self.__exit__(None, None, None)
                raise InputError(f"{spelled(name, wanted)} is more than the {there:g} that Ray has: lower it")
        self._put: dict[int, tuple[Any, str, Any]] = {}
        self._running: dict[Any, Named] = {}
        self._events = self._event_queue()
        self._train = self._ray.remote(
            num_cpus=cpus, num_gpus=self._gpus, max_retries=_RESTARTS, retry_exceptions=False
        )(_train)

    def _connect(self, address: str | None) -> None:
        try:
            self._ray.init(
                address=address,
                include_dashboard=None if address else False,
                log_to_driver=False,
                logging_level="error",
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{spelled('address', address) if address else 'Ray'} cannot be reached or started ({reason}): see "
                "ray status"
            ) from error

    def _event_queue(self) -> Any:
        """A queue for the steps of all trainings, on this machine: it must not die with another one."""
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(self._ray.get_runtime_context().get_node_id(), soft=False)
        return Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def free(self) -> int:
        """Number of trainings for which the cluster has room; machines may come and go."""
        found = self._ray.cluster_resources()
        rooms = [found.get("CPU", 0) / self._cpus]
        if self._gpus:
            rooms.append(found.get("GPU", 0) / self._gpus)
        return int(min(rooms)) - len(self._running)

    def start(self, trial: Named, call: Call) -> None:
        """Starts a training on a worker."""
        if id(call.inputs) not in self._put:
            # The object itself is kept too, so that no other one gets its id.
            self._put[id(call.inputs)] = call.inputs, uuid.uuid4().hex, self._ray.put(portable(call.inputs))
        _, name, reference = self._put[id(call.inputs)]
        # In a list, so that Ray does not load the inputs for every task.
        arguments = (call.function, name, [reference], call.arguments, self._cpus, trial.id, self._events)
        self._running[self._train.remote(*arguments)] = trial

    def ended(self, wait: bool) -> list[tuple[str, Any]]:
        """Returns what workers have finished, waiting a moment if there is nothing."""
        if not self._running:
            return []
        references = [*self._running]
        if wait:
            self._ray.wait(references, timeout=_POLL)
        done, _ = self._ray.wait(references, num_returns=len(references), timeout=0)
        self._tell_steps()
        found: list[tuple[str, Any]] = []
        for reference in done:
            trial = self._running.pop(reference)
            try:
                found.append((trial.id, self._ray.get(reference)))
            except Exception as error:
                reason = str(error).strip().splitlines() or [type(error).__name__]
                found.append((trial.id, Failure(f"its worker died: {reason[0][:300]}")))
        return found

    def _tell_steps(self) -> None:
        trials = {trial.id: trial for trial in self._running.values()}
        # Without a step to show a run goes on.
        with contextlib.suppress(Exception):
            for name, step, steps in self._events.get_nowait_batch(min(self._events.qsize(), 1_000)):
                if name in trials:
                    self._listener.stepped(trials[name], step, steps)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._connected:
            self._ray.shutdown()
        else:
            for reference in self._running:
                self._ray.cancel(reference, force=True)


class _Report(Listener):
    """Puts a training's steps into the queue, a few times a second.

    Args:
        name: name of the trial.
        events: the queue.
    """

    def __init__(self, name: str, events: Any):
        self._name, self._events, self._next = name, events, 0.0

    def stepped(self, trial: Named, step: int, steps: int) -> None:
        """The training has done `step` of its `steps` optimizer steps."""
        if time.monotonic() >= self._next or step == steps:
            self._next = time.monotonic() + _REPORT
            with contextlib.suppress(Exception):
                # Not waited for.
                self._events.actor.put_nowait.remote((self._name, step, steps))


def _train(
    function: Any, name: str, reference: list[Any], arguments: tuple[Any, ...], cpus: int, trial: str, events: Any
) -> Any:
    """Runs a training in a worker; errors are values, since not all of them can be sent as exceptions."""
    try:
        torch.set_num_threads(cpus)
        import ray

        inputs = _LOADED.get(name, lambda: ray.get(reference[0]))
        return function(inputs, *arguments, listener=_Report(trial, events))
    except Exception as error:
        return Failure.of(error)
