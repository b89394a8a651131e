"""Compares the trials a second of a search on N of Ray's workers with those of one process, one thread each.

    python -m bench.scaling --task path/to/sst2 --workers 2

Each search begins in a new folder. What starts once (loading, Ray, its workers) is left out: rates are from the end of
the first trials to the end of the last one. One process runs before and after, because a machine's speed drifts. The
records of all searches are compared, and no rate is printed where they differ. Needs the extra `ticketops[ray]`.
"""

import argparse
import json
import os
import sys
import tempfile
import time
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
        self.times: list[float] = []

    def finished(self, trial: Any, record: Any) -> None:
        self.times.append(time.perf_counter())


def search(fields: dict[str, Any], workers: int) -> dict[str, Any]:
    """Runs a search.

    Args:
        fields: of its configuration.
        workers: number of Ray's workers; 0 for this process alone.

    Returns:
        Trials a second, seconds in all, and the digests of all trials' predictions.
    """
    ends, start = Ends(), time.perf_counter()
    extra = {"executor": "ray", "address": "local"} if workers else {}
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "run")
        run_search(SearchConfig(**fields, **extra, cpus_per_trial=1, output=output), ends)
        records = Store.read(output).records()
    first = max(workers, 1)
    rate = (len(ends.times) - first) / (ends.times[-1] - ends.times[first - 1])
    digests = [record["predictions_sha256"] for record in records]
    return {"trials_per_second": rate, "seconds": time.perf_counter() - start, "digests": digests}


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
    before, several, after = (search(fields, workers) for workers in (0, options.workers, 0))
    if not before["digests"] == several["digests"] == after["digests"]:
        raise TicketopsError("the searches have different predictions: no rate is reported")
    one = (before["trials_per_second"] + after["trials_per_second"]) / 2
    result = {
        "workers": options.workers,
        "trials_per_second": {"one process, before": before, "workers": several, "one process, after": after},
        "times_one_process": several["trials_per_second"] / one,
        "share_of_workers": several["trials_per_second"] / one / options.workers,
    }
    for found in result["trials_per_second"].values():
        del found["digests"]
    command = " ".join(["python -m bench.scaling", *public(sys.argv[1:])])
    machine = circumstances(torch.device("cpu")) | {"ray": ray.__version__}
    print(json.dumps({"command": command, "machine": machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
