"""Writes a made-up search of many trials, and times how it is opened, listed, read and reported.

    python -m bench.records --seeds 1000

Ten trials a seed, with what 872 rows contribute to accuracy; nothing is trained. With --tickets there are each seed's
importance and the tickets of one level, too, for which the report takes torch.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import ticketops
from bench.step import exit_code
from ticketops.searching import SearchConfig, Store
from ticketops.searching.progress import status
from ticketops.searching.selection import read_selection

ROWS = 872
#: `ticketops report` as a process of its own, which says its peak: that of `getrusage` has the parent's in it.
COMMAND = """
import sys
from ticketops.cli import main
sys.argv[1:1] = ["report"]
try:
    main()
finally:
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")), file=sys.stderr)
"""


def make(folder: Path, seeds: int, tickets: bool = False) -> int:
    """Writes the search.

    Args:
        folder: output folder.
        seeds: number of seeds.
        tickets: True writes importances and tickets.

    Returns:
        The number of trials.
    """
    config = SearchConfig(
        model="m", task="t", sparsities="0.1,0.2,0.3", kinds="winning,random,losing", seeds=range(seeds)
    )
    identity = {"config": config.decided(), "task_fingerprint": "t", "model_fingerprint": "m", "layers": 6, "heads": 12}
    notes = {"versions": {"python": "3"}, "machine": {"device": "cpu"}, "validation": "dev"}
    store, generator = Store.create(folder, identity, notes), np.random.default_rng(0)
    labels = generator.integers(0, 2, ROWS, np.int8)
    for trial in store.plan:
        answers = np.where(generator.random(ROWS) < 0.8, labels, 1 - labels).astype(np.int8)
        accuracy, left = float((labels == answers).mean()), 1 - trial.sparsity
        record = {
            "id": trial.id, "kind": trial.kind, "seed": trial.seed, "sparsity": trial.sparsity, "task": "t",
            "model": "m", "metric": "accuracy", "score": accuracy, "report_score": None, "majority": 0.5,
            "scores": {"validation": {"accuracy": accuracy}}, "rows": {"validation": ROWS},
            "constant_scores": {"validation": 0.5}, "predictions_sha256": "0", "heads_pruned": trial.heads_pruned,
            "ffns_pruned": trial.ffns_pruned, "weights_remaining": left, "weights_remaining_encoder": left,
            "train_loss": 0.5, "steps": 3, "timing": {"train_seconds": 0.1},
        }  # fmt: skip
        results = np.stack([labels, answers], axis=1)
        kept = store.write_predictions(trial, {"validation-rows": results})
        store.write_record(trial, {**record, "predictions": kept})
    if tickets:
        write_tickets(store)
    return len(store.plan)


def write_tickets(store: Store) -> None:
    """Writes random importances, and the winning tickets of the level that the report reads."""
    import torch

    from ticketops.tickets import Importance, prune

    generator, importances = torch.Generator().manual_seed(0), {}
    for seed in store.config.seeds:
        importance = importances[seed] = Importance(6, 12)
        for layer in range(6):
            importance.add_head(layer, torch.randn(1, 12, generator=generator), None)
            importance.add_ffn(layer, torch.randn(1, generator=generator), None)
        store.write_importance(seed, "pass", importance)
    level = read_selection(store).super_level
    for trial in store.plan:
        if level is not None and (trial.kind, trial.sparsity) == (level.kind, level.sparsity):
            counts = trial.heads_pruned, trial.ffns_pruned
            store.keep_ticket(trial, prune(importances[trial.seed], counts=counts))


def main() -> int:
    """Runs the measurement and prints JSON.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.records", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=1_000)
    parser.add_argument("--tickets", action="store_true", help="write importances and tickets")
    options = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        found["trials"] = make(folder, options.seeds, options.tickets)
        works: dict[str, Callable[[Path], Any]] = {
            "open": Store.read,
            "records": lambda folder: Store.read(folder).records(),
            "status": status,
            "read": ticketops.read,
            "report": ticketops.report,
        }
        for name, work in works.items():
            start = time.perf_counter()
            work(folder)
            found[f"{name}_seconds"] = round(time.perf_counter() - start, 2)
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", COMMAND, str(folder)], check=True, capture_output=True, text=True)
        found["report_command_seconds"] = round(time.perf_counter() - start, 2)
        found["report_command_peak_mb"] = int(done.stderr.split()[-1]) // 1024
    found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
