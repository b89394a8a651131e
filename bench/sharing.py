"""Compares training steps of several tasks on one encoder with a ticket per task and with one ticket for all tasks.

    python -m bench.sharing --data DIR --tasks sst2,mrpc,rte,stsb --json

Both take turns on every batch in one process. All tickets keep equally many heads and FFNs, so that the difference is
the cost of switching alone: look-ups, slices that the optimizer must not change, and cold caches of weights.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from bench import step
from ticketops import SharedModel, Ticket
from ticketops.errors import InputError, TicketopsError

Step = Callable[[str, step.Batch], None]
#: The contenders: a different ticket at each step, or always the same one.
CONTENDERS = ("switching", "fixed")


def contender(models: dict[str, PreTrainedModel], name: str, dtype: torch.dtype) -> Step:
    """Makes a step function of one contender, with its own optimizer.

    Args:
        models: models of this contender by task; they are made to share the first one's encoder.
        name: one of `CONTENDERS`.
        dtype: dtype of autocast; float32 turns it off.
    """
    config: Any = next(iter(models.values())).config
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    # Half of each layer's heads and every other FFN.
    half = Ticket(torch.arange(heads).expand(layers, heads) < heads // 2, torch.arange(layers) % 2 == 0)
    tickets = step.turned(half, len(models))
    chosen = tickets if name == "switching" else tickets[:1] * len(models)
    shared = SharedModel(models, dict(zip(models, chosen, strict=True))).train()
    device = next(shared.parameters()).device.type
    optimizer = torch.optim.AdamW(shared.parameters(), lr=1e-5, fused=True)

    def run(task: str, batch: step.Batch) -> None:
        optimizer.zero_grad()
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            loss = shared(task, **batch).loss
        loss.backward()
        clip_grad_norm_(shared.parameters(), 1.0)
        optimizer.step()

    return run


def alternating(batches: dict[str, list[step.Batch]]) -> list[tuple[str, step.Batch]]:
    """Interleaves the batches of all tasks, equally many of each, as training does."""
    return [pair for turn in zip(*batches.values(), strict=True) for pair in zip(batches, turn, strict=True)]


def measure(setups: dict[str, step.Setup], rounds: int) -> dict[str, Any]:
    """Times both contenders in turns on every batch.

    Args:
        setups: batches by task.
        rounds: number of times that each contender runs each batch.

    Returns:
        The overhead of switching (median and quartiles of the paired ratios minus 1), and the machine and versions.
    """
    first = next(iter(setups.values()))
    dtype = torch.bfloat16 if first.dtype == "bf16" else torch.float32

    def models() -> dict[str, PreTrainedModel]:
        torch.manual_seed(0)
        return {
            task: AutoModelForSequenceClassification.from_pretrained(
                setup.model, num_labels=setup.config.num_labels
            ).to(setup.device)
            for task, setup in setups.items()
        }

    steps = {name: contender(models(), name, dtype) for name in CONTENDERS}
    for run in steps.values():
        for task, batch in alternating({task: setup.earlier for task, setup in setups.items()}):
            run(task, batch)
    turns = alternating({task: setup.batches for task, setup in setups.items()})
    times: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
        for place, (task, batch) in enumerate(turns):
            # Alternate the order: the second contender finds the batch in the caches.
            for name in CONTENDERS if (turn + place) % 2 else CONTENDERS[::-1]:
                call = steps[name]
                times[name].append(step.seconds(lambda call=call, t=task, b=batch: call(t, b), first.device))
    ratios = [a / b for a, b in zip(times["switching"], times["fixed"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "tasks": list(setups),
        "dtype": first.dtype,
        "switching_overhead": statistics.median(ratios) - 1,
        "quartiles": [low - 1, high - 1],
        "total_overhead": sum(times["switching"]) / sum(times["fixed"]) - 1,
        "seconds": {name: statistics.median(found) for name, found in times.items()},
        "steps_timed": len(ratios),
        "command": "python -m bench.sharing " + " ".join(step.public(sys.argv[1:])),
        **step.circumstances(first.device),
    }


def main() -> int:
    """Runs the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.sharing", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the tasks' folders in it (default: known tasks)")
    parser.add_argument("--tasks", default="sst2,mrpc,rte,stsb", help="two or more (default: %(default)s)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast")
    parser.add_argument("--model", default="demo", help="encoder, a folder or name (default: the demo's MiniLM)")
    parser.add_argument(
        "--batches",
        type=int,
        default=12,
        help="batches per task to time, after as many others to warm up (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=2, help="steps timed on each batch (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows per batch (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="maximum tokens per row (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        if options.batches < 1 or options.rounds < 1:
            raise InputError("--batches and --rounds must be at least 1")
        sizes = {"batches": options.batches, "batch_size": options.batch_size, "max_length": options.max_length}
        setups = {
            task: step.load(options.data, task, dtype=options.dtype, model=options.model, **sizes)
            for task in options.tasks.split(",")
        }
        result = measure(setups, options.rounds)
    except TicketopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
        return 0
    low, high = result["quartiles"]
    for name, median in result["seconds"].items():
        print(f"{name:10s} {1e3 * median:9.1f} ms")
    print(f"switching costs {result['switching_overhead']:+.1%} (quartiles {low:+.1%} to {high:+.1%})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
