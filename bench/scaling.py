"""Compares the work a second of a search on N of Ray's workers with that of one worker, one thread each.

    python -m bench.scaling --task path/to/sst2 --workers 2

Each search begins in a new folder. Work is measured in the seconds that each trial takes a single worker. What starts
once (loading, Ray, its workers) and the end, where workers have nothing left to do, are left out: rates are from the
moment when each worker has ended a trial to the moment when one finds no other. A single worker runs before and after,
because a machine's speed drifts. The records of all searches are compared, and no rate is printed where they differ.
Beside it stands what a trial takes beside training, evaluation and scoring. Needs the extra `ticketops[ray]`.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

from bench.step import circumstances, exit_code, public
from ticketops.errors import TicketopsError
from ticketops.searching import Listener, SearchConfig, Store, run_search


class Ends(Listener):
    """Notes when trials end."""

    def __init__(self) -> None:
        self.times: list[tuple[str, float]] = []

    def finished(self, trial: Any, record: Any) -> None:
        self.times.append((trial.id, time.perf_counter()))


@dataclass(frozen=True)
class Run:
    """A search that has run.

    Attributes:
        ends: name of each trial and the time when it ended, in seconds.
        timed: name -> seconds of its training, evaluation and scoring.
        digests: name -> digest of its predictions.
    """

    ends: list[tuple[str, float]]
    timed: dict[str, float]
    digests: dict[str, str]

    @property
    def between(self) -> dict[str, float]:
        """Name -> seconds since the trial before it has ended, in a run with one worker."""
        return {name: end - before for (_, before), (name, end) in itertools.pairwise(self.ends)}


def search(fields: dict[str, Any], workers: int) -> Run:
    """Runs a search on a Ray of its own.

    Args:
        fields: of its configuration.
        workers: number of workers.
    """
    ends = Ends()
    ray.init(num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = str(Path(folder) / "run")
            run_search(SearchConfig(**fields, executor="ray", cpus_per_trial=1, output=output), ends)
            records = Store.read(output).records()
    finally:
        ray.shutdown()
    timed = {record["id"]: sum(record["timing"].values()) for record in records}
    return Run(ends.times, timed, {record["id"]: record["predictions_sha256"] for record in records})


def main() -> int:
    """Runs the measurement and prints JSON.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--task", default="demo", help="task folder or name")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--seeds", type=int, default=6, help="of two trials each")
    parser.add_argument("--train-rows", type=int, default=400)
    options = parser.parse_args()
    fields = {
        "task": options.task,
        "train_rows": options.train_rows,
        "validation_rows": 200,
        "epochs": 1,
        "kinds": "winning",
        "sparsities": "0.3",
        "seeds": options.seeds,
    }
    before, several, after = (search(fields, workers) for workers in (1, options.workers, 1))
    if not before.digests == several.digests == after.digests:
        raise TicketopsError("the searches have different predictions: no rate is reported")
    one = {name: (before.between[name] + after.between[name]) / 2 for name in before.between}
    first, last = options.workers - 1, len(several.ends) - options.workers
    seconds = several.ends[last][1] - several.ends[first][1]
    work = sum(one[name] for name, _ in several.ends[first + 1 : last + 1] if name in one)
    hidden = [run.between[name] - run.timed[name] for run in (before, after) for name in run.between]
    result = {
        "workers": options.workers,
        "trials": len(several.ends),
        "seconds_of_a_trial": round(statistics.fmean(one.values()), 3),
        "seconds_of_which_hidden": round(statistics.fmean(hidden), 3),
        "drift_of_one_worker": round(sum(after.between.values()) / sum(before.between.values()), 3),
        "times_one_worker": round(work / seconds, 3),
        "share_of_workers": round(work / seconds / options.workers, 3),
    }
    command = " ".join(["python -m bench.scaling", *public(sys.argv[1:])])
    machine = circumstances(torch.device("cpu")) | {"ray": ray.__version__}
    print(json.dumps({"command": command, "machine": machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
