"""Compares models shrunk to 25 %, 50 % and 75 % tickets with the whole model: time, memory and bytes on disk.

    python -m bench.shrunk --model demo --batches 1,8,32,128 --lengths 32,128,512 --output bench/results

All contenders run in one process and take turns on every batch, because a machine's speed drifts more than they differ.
Batches have no padding. Pruned structures are removed from the weights (`ticketops.shrink`), then the model is patched.
All results are in the table, slowdowns included; a speed-up has its 95 % interval over the turns. An existing file is
extended, so a measurement can be done in parts.
"""

import argparse
import copy
import gc
import json
import math
import multiprocessing
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from bench.step import circumstances, exit_code, public
from ticketops import Importance, Ticket, patch, prune, shrink
from ticketops.files import write_atomically
from ticketops.searching.setting import load_config
from ticketops.searching.statistics import compare

SHARES = (0.25, 0.5, 0.75)
WHOLE, STOCK = "whole", "whole, transformers"
PASSES = ("inference", "training")
#: (Batch size, length) for which peak memory is measured too.
MEMORY_CELL = (32, 128)
_MOST_STOCK_SCORES = 2**22
Row = dict[str, Any]


def make(name: str, device: str) -> PreTrainedModel:
    """Makes a model with random weights, which do not affect the times.

    Args:
        name: "demo" for MiniLM's sizes, "bert-base" for BERT-base's, or a folder with a config.
        device: device of the model.

    Raises:
        InputError: there is no such folder, or no config in it.
    """
    torch.manual_seed(0)
    if name == "bert-base":
        config: Any = transformers.BertConfig()
    else:
        config = load_config(name)
    return AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa").to(device)


def random_ticket(model: PreTrainedModel, share: float) -> Ticket:
    """Makes a random ticket that prunes a share of all heads and FFNs; layers differ, as in tickets that were found."""
    config = model.config
    return prune(Importance(config.num_hidden_layers, config.num_attention_heads), share, kind="random")


def contenders(model: PreTrainedModel) -> dict[str, PreTrainedModel]:
    """Makes the contenders: the whole model, stock and patched, and the model shrunk to each ticket, patched."""
    found = {STOCK: model, WHOLE: copy.deepcopy(model)}
    found |= {title(share): shrink(copy.deepcopy(model), random_ticket(model, share)) for share in SHARES}
    for name, each in found.items():
        if name != STOCK:
            patch(each)
    return found


def title(share: float) -> str:
    """Returns the name of the contender without a share of heads and FFNs."""
    return f"{share:.0%} pruned"


def check(model: PreTrainedModel, models: dict[str, PreTrainedModel]) -> str:
    """Checks the outputs of each contender against the whole model with the ticket's masks applied.

    Returns:
        "green", or a description of the error.
    """
    batch = make_batch(model, 4, 16)
    batch["attention_mask"][1:, 9:] = 0
    twin = copy.deepcopy(model).eval()
    handle = patch(twin)
    for name, each in models.items():
        share = next((share for share in SHARES if title(share) == name), None)
        handle.apply(None if share is None else random_ticket(model, share))
        with torch.no_grad():
            want, got = twin(**batch).logits, each.eval()(**batch).logits
        error = (want - got).abs().max().item()
        if not error <= 1e-4 * max(1.0, want.abs().max().item()):
            return f"red: {name} differs by {error:.1e}"
    return "green"


def make_batch(model: PreTrainedModel, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Makes a batch of random token ids without padding, and labels."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, model.config.vocab_size, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(batch) % 2}
    return {name: value.to(model.device) for name, value in inputs.items()}


def runner(model: PreTrainedModel, batch: dict[str, torch.Tensor], kind: str) -> Callable[[], object]:
    """Returns a function to time: "inference", or a step of "training" (forward, backward, AdamW; dropout on)."""
    autocast = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    if kind == "inference":
        inputs = {name: value for name, value in batch.items() if name != "labels"}

        def infer() -> object:
            with torch.inference_mode(), autocast:
                return model.eval()(**inputs)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)

    def train() -> None:
        with autocast:
            loss = model.train()(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def measure(
    models: dict[str, PreTrainedModel], batch: int, length: int, kind: str, seconds: float, least: int = 3
) -> list[Row]:
    """Times the contenders in turns on one batch.

    Args:
        models: contenders by name.
        batch, length: number of rows and tokens per row.
        kind: one of PASSES.
        seconds: time after which no further turn is begun.
        least: minimum number of turns.

    Returns:
        One row per contender: median milliseconds with 20 % and 80 % quantiles, and the speed-up over the whole model:
        the geometric mean of the turns' ratios, and its 95 % interval, corrected for the number of contenders.
    """
    inputs = make_batch(next(iter(models.values())), batch, length)
    # With dropout, stock attention keeps several tensors [batch, heads, length, length] per layer: too much memory.
    heavy = kind == "training" and batch * length**2 > _MOST_STOCK_SCORES
    chosen = {name: model for name, model in models.items() if not (heavy and name == STOCK)}
    calls = {name: runner(model, inputs, kind) for name, model in chosen.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    end = time.perf_counter() + seconds
    while len(times[WHOLE]) < least or (time.perf_counter() < end and len(times[WHOLE]) < 200):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(1e3 * (time.perf_counter() - start))
    logs = {
        name: [math.log(whole / own) for whole, own in zip(times[WHOLE], taken, strict=True)]
        for name, taken in times.items()
        if name != WHOLE
    }
    judged = compare(logs)
    rows = []
    for name, taken in times.items():
        low, *_, high = statistics.quantiles(taken, n=5, method="inclusive") if len(taken) > 1 else taken * 2
        row: Row = {
            "pass": kind, "batch": batch, "length": length, "contender": name, "turns": len(taken),
            "ms": statistics.median(taken), "ms_q20": low, "ms_q80": high, "times_as_fast": 1.0,
        }  # fmt: skip
        if name in judged:
            one = judged[name]
            row["times_as_fast"] = math.exp(one.difference.mean)
            if one.low is not None and one.high is not None:
                row["times_as_fast_interval"] = [math.exp(one.low), math.exp(one.high)]
        rows.append(row)
    return rows


def speed(row: Row) -> str:
    """Formats the speed-up of a row: a ratio only where its interval excludes 1."""
    if row["contender"] == WHOLE:
        return ""
    if "times_as_fast_interval" not in row:
        # Files of earlier versions have no interval; what one turn shows is not judged either.
        return f"{row['times_as_fast']:.2f}x \\*"
    low, high = row["times_as_fast_interval"]
    interval = f"{low:.2f}x to {high:.2f}x"
    return f"{row['times_as_fast']:.2f}x, {interval}" if low > 1 or high < 1 else f"no difference shown, {interval}"


def _peaks(name: str, contender: str) -> dict[str, float]:
    """Measures the peak memory in MiB that one call of each kind adds. Runs in a separate process."""
    model = contenders(make(name, "cpu"))[contender]
    batch, length = MEMORY_CELL
    inputs = make_batch(model, batch, min(length, model.config.max_position_embeddings))
    found = {}
    for kind in PASSES:
        call = runner(model, inputs, kind)
        gc.collect()
        # Reset Linux's peak value, so that the construction of the models does not count.
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident("VmRSS")
        call()
        found[f"{kind}_mib"] = round((_resident("VmHWM") - before) / 1024, 1)
    return found


def _resident(name: str) -> int:
    """Reads a field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def sizes(name: str, models: dict[str, PreTrainedModel]) -> list[Row]:
    """Returns the number of parameters, bytes of the saved weights, and peak memory of each contender."""
    rows = []
    # A fresh process for each, all forked from one that has nothing but the imports.
    fresh = multiprocessing.get_context("forkserver")
    fresh.set_forkserver_preload(["bench.shrunk"])
    for contender, model in models.items():
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            stored = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        row: Row = {"contender": contender, "bytes": stored, "parameters": sum(p.numel() for p in model.parameters())}
        with fresh.Pool(1) as pool:
            rows.append(row | pool.apply(_peaks, (name, contender)))
    return rows


def _measured(record: Row) -> list[str]:
    """Returns the passes that the record has rows for."""
    return [kind for kind in PASSES if any(row["pass"] == kind for row in record["rows"])]


def markdown(record: Row) -> str:
    """Writes the record as Markdown tables with a row per batch and a column per contender."""
    machine, names = record["machine"], [STOCK, WHOLE, *map(title, SHARES)]
    head = f"# Shrunk models: {record['model']} on {machine['device']}, {machine['threads']} threads"
    text = [head, "", *(f"* `{command}`" for command in record["commands"]), ""]
    text += [f"Gate {record['gate']}; torch {machine['torch']}, transformers {machine['transformers']}, float32.", ""]
    for kind in _measured(record):
        text += [
            f"## {kind.capitalize()}, milliseconds a batch (20 % to 80 % quantile), times as fast as whole, patched",
            "",
        ]
        text += ["| batch x length | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
        cells = {(row["batch"], row["length"]) for row in record["rows"] if row["pass"] == kind}
        for batch, length in sorted(cells, key=lambda cell: (cell[1], cell[0])):
            found = {
                row["contender"]: row
                for row in record["rows"]
                if (row["pass"], row["batch"], row["length"]) == (kind, batch, length)
            }
            values = [_cell(found[name]) if name in found else "not run" for name in names]
            text.append(f"| {batch} x {length} | " + " | ".join(values) + " |")
        text.append("")
    if record.get("sizes"):
        batch, length = MEMORY_CELL
        text += [f"## Sizes; peak memory beyond the model for a batch of {batch} x {length}", ""]
        text += ["| | parameters | bytes of weights | inference MiB | training MiB |", "| --- |" + " ---: |" * 4]
        text += [
            f"| {row['contender']} | {row['parameters']:,} | {row['bytes']:,} | {row['inference_mib']:.0f} | "
            f"{row['training_mib']:.0f} |"
            for row in record["sizes"]
        ]
        text.append("")
    if any("times_as_fast_interval" in row for row in record["rows"]):
        text += [
            "A ratio is the geometric mean over the turns, with its 95 % interval, corrected for the contenders of one "
            "batch; where the interval has 1 in it, no difference is shown.",
            "",
        ]
    if any("times_as_fast_interval" not in row for row in record["rows"] if row["contender"] != WHOLE):
        text += ["\\* Not judged: the median of turns that were not kept, or of one turn.", ""]
    tickets = [row for row in record["rows"] if row["contender"] not in (WHOLE, STOCK)]
    losing = [row for row in tickets if row.get("times_as_fast_interval", [0, row["times_as_fast"]])[1] < 1]
    text += [f"Tickets slower than the whole model: {len(losing)} of {len(tickets)} rows.", ""]
    text += [f"* {row['contender']}, {row['pass']}, {row['batch']} x {row['length']}" for row in losing]
    disturbed = sorted(
        {
            f"{row['pass']}, {row['batch']} x {row['length']}"
            for row in record["rows"]
            if row["ms_q80"] > 1.5 * row["ms_q20"]
        }
    )
    text += ["", "Disturbed, the 80 % quantile above 1.5 times the 20 % one: " + ("; ".join(disturbed) or "none") + "."]
    return "\n".join(text) + "\n"


def _cell(row: Row) -> str:
    digits = 1 if row["ms"] >= 10 else 2
    times = f"{row['ms']:.{digits}f} ({row['ms_q20']:.{digits}f} to {row['ms_q80']:.{digits}f})"
    return "; ".join(part for part in (times, speed(row)) if part)


def draw(record: Row, path: Path) -> None:
    """Plots the speed-up of each ticket over the number of tokens in a batch with its interval, and a line at 1."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), layout="constrained")
    kinds = _measured(record)
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for name in (STOCK, *map(title, SHARES)):
            for length, marker in zip(sorted({row["length"] for row in record["rows"]}), "osD^v", strict=False):
                chosen = [
                    row
                    for row in record["rows"]
                    if (row["pass"], row["contender"], row["length"]) == (kind, name, length)
                ]
                chosen.sort(key=lambda row: row["batch"])
                colour = f"C{(STOCK, *map(title, SHARES)).index(name)}"
                label = f"{name}, {length} tokens"
                values = [row["times_as_fast"] for row in chosen]
                axes.plot([row["batch"] for row in chosen], values, marker=marker, color=colour, label=label)
                for row in chosen:
                    if "times_as_fast_interval" in row:
                        axes.plot([row["batch"]] * 2, row["times_as_fast_interval"], color=colour, linewidth=1)
        axes.axhline(1.0, color="black", linewidth=1)
        axes.set_xscale("log", base=2)
        batches = sorted({row["batch"] for row in record["rows"]})
        axes.set_xticks(batches, map(str, batches))
        axes.set_xlabel("batch")
        axes.set_title(kind)
    panels[0].set_ylabel("times as fast as the whole model, patched")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="x-small")
    figure.suptitle(f"{record['model']} on {record['machine']['device']}", fontsize="medium")
    figure.savefig(path, dpi=150)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> int:
    """Runs the measurement, and writes shrunk-<model>-<device>.json, .md and .png.

    Returns:
        The exit code: 0, or 1 if the correctness check fails.
    """
    parser = argparse.ArgumentParser(prog="python -m bench.shrunk", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", default="demo", help="demo (MiniLM), bert-base, or a folder; weights are random")
    parser.add_argument("--batches", type=_numbers, default=[1, 8, 32, 128])
    parser.add_argument("--lengths", type=_numbers, default=[32, 128, 512])
    parser.add_argument("--passes", default=",".join(PASSES), help="inference, training or both")
    parser.add_argument(
        "--seconds", type=float, default=6, help="seconds per batch, beyond the minimum number of turns"
    )
    parser.add_argument(
        "--least-turns", type=int, default=3, help="minimum number of turns of each contender on each batch"
    )
    parser.add_argument("--most-tokens", type=int, default=2**16, help="skip batches with more tokens")
    parser.add_argument("--no-sizes", action="store_true", help="skip file sizes and peak memory")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    whole = make(options.model, "cpu")
    models = contenders(whole)
    machine = circumstances(torch.device("cpu"))
    name = re.sub(r"[^a-z0-9]+", "-", f"{Path(options.model).name} {machine['device']}".lower()).strip("-")
    path = options.output / f"shrunk-{name}.json"
    record: Row = json.loads(path.read_text()) if path.exists() else {"rows": []}
    record |= {
        "model": Path(options.model).name,
        "machine": machine,
        "commands": [*record.get("commands", []), " ".join(["python -m bench.shrunk", *public(sys.argv[1:])])],
        "gate": check(whole, models),
    }
    if record["gate"] != "green":
        print(record["gate"], file=sys.stderr)
        return 1
    for kind in options.passes.split(","):
        for length in options.lengths:
            for batch in options.batches:
                if batch * length > options.most_tokens:
                    continue
                print(f"{kind} {batch} x {length}", file=sys.stderr)
                record["rows"] = [
                    row for row in record["rows"] if (row["pass"], row["batch"], row["length"]) != (kind, batch, length)
                ] + measure(models, batch, length, kind, options.seconds, options.least_turns)
                # Written after each batch, so that an interrupted measurement keeps its finished parts.
                write_atomically(path, json.dumps(record, indent=1) + "\n")
    if not options.no_sizes:
        record["sizes"] = sizes(options.model, models)
    options.output.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(record, indent=1) + "\n")
    write_atomically(path.with_suffix(".md"), markdown(record))
    draw(record, path.with_suffix(".png"))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
