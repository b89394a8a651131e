"""Compares `encode` of sentence-transformers: stock, patched, and with half of the heads and FFNs pruned.

    python -m bench.embed --data DIR --task stsb

All contenders run in one process and take turns, because a machine's speed drifts more than they differ. Weights are
MiniLM's, the ticket is random, which does not affect the times. `encode` sorts texts by length, so its batches have
little padding. Needs the extra `ticketops[sentence-transformers]`.
"""

import argparse
import copy
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import sentence_transformers
import transformers
from sentence_transformers import SentenceTransformer

from bench.shrunk import random_ticket
from bench.step import circumstances, exit_code, public, seconds
from ticketops import patch, shrink
from ticketops.errors import TicketopsError
from ticketops.tasks import demo_model, load_task


def contenders(path: str) -> dict[str, SentenceTransformer]:
    """Makes the contenders: stock and patched, with a 50 % ticket applied, and shrunk to it, patched and stock.

    Args:
        path: folder or name of the model.
    """
    stock = SentenceTransformer(path)
    ticket = random_ticket(stock[0].model, 0.5)
    names = ("stock", "patched", "applied50", "shrunk50", "shrunk50-stock")
    found = {name: copy.deepcopy(stock) for name in names}
    for name in ("shrunk50", "shrunk50-stock"):
        shrink(found[name], ticket)
    patch(found["patched"])
    patch(found["applied50"]).apply(ticket)
    patch(found["shrunk50"])
    return found


def measure(models: dict[str, SentenceTransformer], texts: list[str], batch_size: int, turns: int) -> dict[str, Any]:
    """Times `encode` of all texts.

    Args:
        models: contenders by name.
        texts: texts to encode.
        batch_size: texts per batch.
        turns: number of turns of each contender.

    Returns:
        Median sentences a second by contender, and medians of the turns' ratios to "stock", with 20 % and 80 %
        quantiles.

    Raises:
        TicketopsError: embeddings differ by more than rounding explains.
    """
    runs: dict[str, Callable[[], Any]] = {
        name: lambda model=model: model.encode(texts, batch_size=batch_size) for name, model in models.items()
    }
    # The first time warms up.
    found = {name: run() for name, run in runs.items()}
    for name, other in (("patched", "stock"), ("applied50", "shrunk50-stock"), ("shrunk50", "shrunk50-stock")):
        difference = float(np.abs(found[name] - found[other]).max())
        if not difference <= 1e-5:
            raise TicketopsError(f"embeddings of {name} and {other} differ by {difference:.2g}: no timing is reported")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns):
        order = list(runs.items())
        for name, run in order[turn % len(order) :] + order[: turn % len(order)]:
            times[name].append(seconds(run, models[name].device))
    ratios = {
        name: [stock / own for stock, own in zip(times["stock"], taken, strict=True)] for name, taken in times.items()
    }
    return {
        "sentences_per_second": {name: len(texts) / statistics.median(taken) for name, taken in times.items()},
        "times_as_fast_as_stock": {name: statistics.median(each) for name, each in ratios.items()},
        "quantiles_20_80": {name: np.quantile(each, (0.2, 0.8)).tolist() for name, each in ratios.items()},
    }


def main() -> int:
    """Runs the measurement and prints JSON.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.embed", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--data", type=Path, help="folder with task folders; default: tasks known by name")
    parser.add_argument("--task", default="demo", help="task folder or name")
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--turns", type=int, default=9)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    task = load_task(options.task if options.data is None else options.data / options.task)
    columns = [task.train[name][: options.texts] for name in task.columns]
    texts = [text for row in zip(*columns, strict=True) for text in row][: options.texts]
    models = contenders(str(demo_model()))
    result = measure(models, texts, options.batch_size, options.turns)
    command = " ".join(["python -m bench.embed", *public(sys.argv[1:])])
    machine = circumstances(models["stock"].device) | {"sentence_transformers": sentence_transformers.__version__}
    print(json.dumps({"command": command, "machine": machine, **result}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
