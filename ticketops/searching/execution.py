"""Where the trials of a run are trained: in this process, or on Ray's workers."""

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch

from ticketops.errors import InputError, spelled
from ticketops.launch import processes
from ticketops.searching.engine import Barrier, Job, LocalExecutor, run_jobs
from ticketops.searching.processes import LeadingExecutor
from ticketops.searching.trial import Listener


@dataclass(frozen=True)
class Execution:
    """Where trials run, and how often a failed one is tried. It changes no result.

    Attributes:
        executor: "local" for one trial after the other in this process, "ray" for as many at a time as fit on Ray.
        address: of a Ray cluster; None for one on this machine.
        cpus_per_trial: CPU cores and threads of a trial; None for all of torch's threads, with Ray for 1.
        gpus_per_trial: share of a GPU, or number of GPUs; None for one GPU where Ray has any.
        retries: how often a trial that failed is tried again at once.
    """

    executor: str = "local"
    address: str | None = None
    cpus_per_trial: int | None = None
    gpus_per_trial: float | None = None
    retries: int = 0

    @classmethod
    def of(cls, config: Any) -> Self:
        """Where the trials of a configuration run.

        Args:
            config: configuration of any run.
        """
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    def check(self) -> None:
        """Makes sure, before anything is loaded, that trials can run.

        Raises:
            InputError: Ray is not installed, or an option has no meaning without it.
        """
        if self.executor == "ray":
            from ticketops.searching.ray_executor import require_ray

            require_ray()
            return
        for name in ("address", "gpus_per_trial"):
            if (value := getattr(self, name)) is not None:
                raise InputError(
                    f"{spelled(name, value)} is for Ray: add {spelled('executor', 'ray')}, or leave it out"
                )

    def run(self, jobs: Sequence[Job], listener: Listener) -> None:
        """Announces the jobs, and runs those that are not finished.

        Args:
            jobs: of the run.
            listener: callbacks on the progress of trials and steps.

        Raises:
            InputError, UnsupportedError, StoreError, TrialError: as `run_jobs` does.
        """
        trials = [job for job in jobs if not isinstance(job.trial, Barrier)]
        listener.planned([job.trial for job in trials], [job.trial for job in trials if job.finished])
        if self.executor == "ray" and not all(job.finished for job in trials):
            from ticketops.searching.ray_executor import RayExecutor

            with RayExecutor(listener, self.address, self.cpus_per_trial or 1, self.gpus_per_trial) as executor:
                run_jobs(jobs, listener, executor, self.retries)
            return
        # As many threads as Ray's workers have, also where only a lost ticket is to be restored.
        with threads(self.cpus_per_trial or (1 if self.executor == "ray" else None)):
            local = LeadingExecutor if processes() > 1 else LocalExecutor
            run_jobs(jobs, listener, local(listener), self.retries)


@contextlib.contextmanager
def threads(number: int | None) -> Iterator[None]:
    """Sets the number of torch's threads for a `with` block.

    Args:
        number: number of threads; None for as many as there are.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
