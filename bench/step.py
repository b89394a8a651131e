"""Compares a patched model with stock transformers: a fine-tuning step (forward, backward, AdamW) on the same batches,
and inference of one sequence of 32 tokens.

    python -m bench.step --data DIR --task rte --dtype fp32 --json

All contenders run in one process and take turns on every batch, because a machine's speed drifts more than they differ.
They warm up on as many other batches; the timed batches are new to them, as in training. Nearly every packed batch has
a different number of tokens, so the times include the cost of libraries that compile for each size.
"""

import argparse
import contextlib
import copy
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PretrainedConfig,
)

from ticketops import PackingCollator, Ticket, patch, prune, shrink
from ticketops.errors import InputError, TicketopsError
from ticketops.models.registry import find_adapter
from ticketops.ops import backends, products
from ticketops.tasks import DEMO_MODELS, demo_model, load_task, tokenize

Batch = dict[str, Tensor]

#: Published encoders of base size for --random-weights: model type and what differs from its configuration's defaults.
BASE_SIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base": ("bert", {}),
    "deberta-v3-base": (
        "deberta-v2",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_attention_heads": 12,
            "num_hidden_layers": 12,
            "norm_rel_ebd": "layer_norm",
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "position_buckets": 256,
            "relative_attention": True,
            "share_att_key": True,
        },
    ),
    "modernbert-base": ("modernbert", {}),
    "mpnet-base": ("mpnet", {}),
    "nomic-bert-base": ("nomic_bert", {}),
}


@dataclass(frozen=True)
class Setup:
    """Task, batches and dtype that all contenders share.

    Attributes:
        task: name of the task.
        model: folder or name of the pre-trained encoder.
        config: its configuration, with as many labels as the task has.
        batches: batches to time, padded to their longest row, on the device.
        dtype: "fp32" or "bf16" (autocast).
        earlier: equally many other batches, to warm up on.
        random_weights: True draws the weights.
    """

    task: str
    model: str
    config: PretrainedConfig
    batches: list[Batch]
    dtype: str
    earlier: list[Batch]
    random_weights: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the batches."""
        return self.batches[0]["input_ids"].device


@dataclass(frozen=True)
class Contender:
    """A model that can take a training step on a batch.

    Attributes:
        name: see `contender`.
        model: patched or stock.
        forward: the model, compiled for the contender "compile".
        optimizer: optimizer of the model.
        step: function that runs forward, backward and the optimizer's step on a batch.
    """

    name: str
    model: torch.nn.Module
    forward: Callable[..., Any]
    optimizer: torch.optim.Optimizer
    step: Callable[[Batch], None]


#: All contenders, see `contender`.
CONTENDERS = ("sdpa", "compile", "full", "importance", "packed", "ticket50", "applied50", "switching")
#: Those under torch.compile -> its mode. On a CPU "reduce-overhead" is the same as "compile".
COMPILED = {"compile": None, "reduce-overhead": "reduce-overhead"}
FLASH_DEBERTA = "flash-deberta"


def load(
    data: Path | None,
    task: str,
    *,
    dtype: str,
    batches: int,
    batch_size: int = 32,
    max_length: int = 128,
    model: str = "demo",
    random_weights: bool = False,
) -> Setup:
    """Reads a task's first training rows and makes batches as a Trainer would.

    Args:
        data: folder that holds the task's folder, directly or in `glue/`; None for tasks known by name.
        task: name of the folder, or of a task that ticketops knows.
        dtype: "fp32" or "bf16".
        batches: number of batches to time, and also to warm up on.
        batch_size: rows per batch.
        max_length: maximum number of tokens per row.
        model: folder or hub name of the encoder; "demo" for the MiniLM weights, "demo-base" for MPNet-base's. With
            random weights also a name in BASE_SIZED, which goes with MiniLM's tokenizer.
        random_weights: True draws the weights, and reads only the encoder's configuration and tokenizer.
    """
    spec: str | Path = task
    if data is not None:
        spec = next((folder for folder in (data / task, data / "glue" / task) if folder.is_dir()), data / task)
    loaded = load_task(spec)
    rows = 2 * batches * batch_size
    if len(loaded.train) < rows:
        most = len(loaded.train) // (2 * batch_size)
        remedy = f"--batches to {most}" if most else f"--batch-size to {len(loaded.train) // 2}"
        raise InputError(f"{task} has {len(loaded.train)} training rows of {rows}: lower {remedy}")
    path = str(demo_model(model)) if model in DEMO_MODELS else model
    if random_weights and model in BASE_SIZED:
        kind, sizes = BASE_SIZED[model]
        config = AutoConfig.for_model(kind, num_labels=loaded.num_labels, **sizes)
        tokenizer = AutoTokenizer.from_pretrained(demo_model("demo"), model_input_names=["input_ids", "attention_mask"])
        config.pad_token_id = tokenizer.pad_token_id
    else:
        config = AutoConfig.from_pretrained(path, num_labels=loaded.num_labels)
        tokenizer = AutoTokenizer.from_pretrained(path)
    tokens = tokenize(loaded.train.select(range(rows)), loaded, tokenizer, max_length)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    loader = DataLoader(tokens, batch_size, collate_fn=DataCollatorWithPadding(tokenizer))
    drawn = [{k: v.to(device) for k, v in batch.items()} for batch in loader]
    return Setup(task, path, config, drawn[batches:], dtype, drawn[:batches], random_weights)


def contender(setup: Setup, name: str) -> Contender:
    """Makes one contender, with its own copy of the weights and its own optimizer.

    Args:
        setup: what all contenders share.
        name: "sdpa", "compile" and "reduce-overhead" (compiled, with CUDA graphs) are stock transformers, with the
            attention that it takes by itself: sdpa, or eager for an architecture without. "full" is patched;
            "importance" also records importance; "ticket50" is shrunk to half of all heads and FFNs, as in a search;
            "applied50" is whole, with that half applied as a ticket; "switching" applies a different half at every
            step; "packed" is "full" on the same batches without padding. On a GPU "graphs" is "importance" in CUDA
            graphs, and "bucket" under torch.compile, with tokens padded to a multiple of 256; "flash-deberta" is stock
            DeBERTa with that package's attention.
    """
    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification
    config = copy.deepcopy(setup.config)
    if name == FLASH_DEBERTA:
        from flashdeberta import FlashDebertaV2ForSequenceClassification as kind
    draw = kind.from_config if hasattr(kind, "from_config") else kind
    drawn = draw(config) if setup.random_weights else kind.from_pretrained(setup.model, config=config)
    model = drawn.to(setup.device)
    options: dict[str, Any] = {"bucket": {"bucket": 256}}.get(name, {})
    if name == "graphs":
        # Without a GPU there are none.
        options = {"graphs": True if setup.device.type == "cuda" else "auto"}
    handle = None if name in ("sdpa", FLASH_DEBERTA, *COMPILED) else patch(model, **options)
    modes = {**COMPILED, "bucket": "reduce-overhead"}
    forward = torch.compile(model, mode=modes[name]) if name in modes else model
    autocast = torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.dtype == "bf16")
    recording: Callable[[], Any] = (
        handle.record_importance if handle and name in ("importance", "graphs", "bucket") else contextlib.nullcontext
    )
    tickets: list[Ticket] = []
    if handle and name in ("ticket50", "applied50", "switching"):
        model.eval()
        with handle.record_importance() as importance, autocast:
            model(**setup.earlier[0]).loss.backward()
        tickets = turned(prune(importance, 0.5))
        model.zero_grad()
        if name == "ticket50":
            shrink(model, tickets[0])
        else:
            handle.apply(tickets[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    turns = itertools.cycle(tickets)
    # As a DataLoader would have made them, outside of the time that a step takes.
    packed = {id(batch): pack(batch) for batch in setup.earlier + setup.batches} if name == "packed" else {}

    def step(batch: Batch) -> None:
        batch = packed.get(id(batch), batch)
        if handle and name == "switching":
            handle.apply(next(turns))
        optimizer.zero_grad()
        with recording():
            with autocast:
                loss = forward(**batch).loss
            loss.backward()
        optimizer.step()

    model.train()
    return Contender(name, model, forward, optimizer, step)


def pack(batch: Batch) -> Batch:
    """Returns a padded batch without its padding."""
    device = batch["input_ids"].device
    rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    return {name: value.to(device) for name, value in PackingCollator()(rows).items()}


def turned(ticket: Ticket, number: int = 4) -> list[Ticket]:
    """Makes tickets of exactly the same cost. Heads are rotated within each layer. FFNs are rotated among all layers
    but the last, whose FFN costs less in a classification, because only first tokens need it.

    Args:
        ticket: the first ticket.
        number: number of tickets.
    """
    ffns, last = ticket.ffn_mask[:-1], ticket.ffn_mask[-1:]
    return [Ticket(ticket.head_mask.roll(turn, 1), torch.cat([ffns.roll(turn), last])) for turn in range(number)]


def check_equal(setup: Setup, stock: Contender, patched: Contender) -> float:
    """Compares the logits of both models, so that no speed is reported for wrong results.

    Returns:
        The largest absolute difference of the logits on the first batch, without dropout.

    Raises:
        TicketopsError: the difference is larger than rounding explains.
    """
    logits = []
    for each in (stock, patched):
        each.model.eval()
        with torch.no_grad(), torch.autocast(setup.device.type, torch.bfloat16, enabled=setup.dtype == "bf16"):
            logits.append(each.model(**setup.earlier[0]).logits.float())
        each.model.train()
    difference = (logits[0] - logits[1]).abs().max().item()
    bound = 0.05 if setup.dtype == "bf16" else 1e-4
    if not difference <= bound:
        raise TicketopsError(
            f"patched and stock logits differ by {difference:.2g} (bound {bound}): no timing is reported"
        )
    return difference


def _product(device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """Returns the fastest matrix product for a device."""
    return products.product if device.type == "cpu" else torch.mm


def matmul_floor(setup: Setup, contender: Contender, batch: Batch) -> Iterator[Callable[[], None]]:
    """Yields functions that run only the matrix products of a step: forward, input gradient and weight gradient of each
    linear layer, on real tokens. After the last attention, a classification needs one token per row."""
    dtype, product = torch.bfloat16 if setup.dtype == "bf16" else torch.float32, _product(setup.device)
    adapter, base = find_adapter(contender.model)
    last = adapter.parts(adapter.layers(base)[-1])
    after_last_attention = {last.output, *last.first, last.fc2}
    real, rows = int(batch["attention_mask"].sum()), len(batch["attention_mask"])
    for module in adapter.encoder(base).modules():
        if isinstance(module, torch.nn.Linear) and module.weight.numel():
            tokens = rows if module in after_last_attention else real
            x = torch.randn(tokens, module.in_features, device=setup.device, dtype=dtype)
            gradient = torch.randn(tokens, module.out_features, device=setup.device, dtype=dtype)
            weight = module.weight.detach().to(dtype)

            def run(x=x, gradient=gradient, weight=weight) -> None:
                product(x, weight.t())
                product(gradient, weight)
                product(gradient.t(), x)

            yield run


def measure_inference(setup: Setup, contenders: dict[str, Contender], turns: int) -> dict[str, list[float]]:
    """Times the contenders in turns on one sequence of 32 tokens, without gradients.

    Args:
        setup: the shared task and dtype.
        contenders: contenders of the training step, by name.
        turns: number of turns of each.

    Returns:
        Seconds of each turn by contender, and of the matrix products of the forward pass alone.
    """
    batch = setup.batches[0]
    ids = batch["input_ids"][batch["attention_mask"].bool()][:32][None]
    # As a tokenizer encodes one sentence.
    one = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids)}
    dtype, product = torch.bfloat16 if setup.dtype == "bf16" else torch.float32, _product(setup.device)
    adapter, base = find_adapter(contenders["full"].model)
    linears = [module for module in adapter.encoder(base).modules() if isinstance(module, torch.nn.Linear)]
    weights = [linear.weight.detach().to(dtype).t() for linear in linears]
    tokens = [torch.randn(ids.shape[1], weight.shape[0], device=setup.device, dtype=dtype) for weight in weights]

    def forward_products() -> None:
        for x, weight in zip(tokens, weights, strict=True):
            product(x, weight)

    def run(each: Contender) -> Callable[[], object]:
        def forward() -> object:
            with (
                torch.inference_mode(),
                torch.autocast(setup.device.type, torch.bfloat16, enabled=dtype != torch.float32),
            ):
                return each.forward(**one)

        return forward

    # These infer like "full": one sequence has no padding, and outside training nothing is recorded or switched.
    skipped = ("importance", "packed", "applied50", "switching")
    runs = {name: run(each) for name, each in contenders.items() if name not in skipped}
    for each in contenders.values():
        each.model.eval()
    runs["matmul_floor"] = forward_products
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-3, turns):
        for name, forward in runs.items():
            taken = seconds(forward, setup.device)
            if turn >= 0:
                times[name].append(taken)
    return times


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """Returns the wall-clock seconds of one call, including the GPU's work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(setup: Setup, names: list[str], rounds: int, inferences: int = 150) -> dict[str, Any]:
    """Times the contenders in turns on every batch.

    Args:
        setup: the shared task and batches.
        names: names of the contenders.
        rounds: number of times that each contender runs each batch.
        inferences: number of times that each contender infers one sequence.

    Returns:
        Median seconds with 20 % and 80 % quantiles, medians of the paired ratios, and the machine and versions.
    """
    contenders = {name: contender(setup, name) for name in names}
    difference = check_equal(setup, contenders["sdpa"], contenders["full"])
    failures = {}
    for name, each in list(contenders.items()):
        print(f"warming up {name}", file=sys.stderr)
        try:
            # Compile the compiled model, and warm up allocators and thread pools.
            for batch in setup.earlier:
                each.step(batch)
        # Inductor needs a C++ compiler and fails with many exceptions; the other contenders run without it.
        except Exception as error:
            if name not in COMPILED:
                raise
            failures[name] = (str(error).splitlines() or [type(error).__name__])[0]
            del contenders[name]
    # Lower bounds of a step's time, for the whole model and for its ticket.
    floor_prefixes = {name: prefix for name, prefix in (("full", ""), ("ticket50", "ticket50_")) if name in contenders}
    floors = [prefix + part for prefix in floor_prefixes.values() for part in ("matmul_floor", "optimizer")]
    times: dict[str, list[float]] = {name: [] for name in [*contenders, *floors]}
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}", file=sys.stderr)
        for place, batch in enumerate(setup.batches):
            # Rotate the order: the first contender runs with cold caches and compiles kernels that others share.
            turns = list(contenders.items())
            for name, each in turns[place % len(turns) :] + turns[: place % len(turns)]:
                times[name].append(seconds(lambda each=each, batch=batch: each.step(batch), setup.device))
            for name, prefix in floor_prefixes.items():
                floor = 0.0
                for run in matmul_floor(setup, contenders[name], batch):
                    # Warm up: libraries may compile for these shapes.
                    run()
                    floor += seconds(run, setup.device)
                times[f"{prefix}matmul_floor"].append(floor)
                times[f"{prefix}optimizer"].append(seconds(contenders[name].optimizer.step, setup.device))

    inference = measure_inference(setup, contenders, inferences)
    times |= {f"inference_{name}": values for name, values in inference.items()}

    def ratio(slow: str, fast: str) -> float | None:
        if slow not in times or fast not in times:
            return None
        return statistics.median(a / b for a, b in zip(times[slow], times[fast], strict=True))

    recorded, switched = ratio("importance", "full"), ratio("switching", "applied50")
    # The speed-up of the ticket if everything but matrix products and the optimizer took no time.
    parts_of = zip(*(times[name] for name in floors), strict=True)
    bounds = [sum(parts[:2]) / sum(parts[2:]) for parts in parts_of if "ticket50" in contenders]
    real = sum(int(batch["attention_mask"].sum()) for batch in setup.batches)
    return {
        "task": setup.task,
        "dtype": setup.dtype,
        "full_vs_sdpa": ratio("sdpa", "full"),
        "full_vs_compile": ratio("compile", "full"),
        "packed_vs_full": ratio("full", "packed"),
        "ticket50_vs_full": ratio("full", "ticket50"),
        "ticket50_vs_full_of_floors": statistics.median(bounds) if bounds else None,
        "applied50_vs_full": ratio("full", "applied50"),
        "importance_overhead": None if recorded is None else recorded - 1,
        "switching_overhead": None if switched is None else switched - 1,
        "inference_vs_sdpa": ratio("inference_sdpa", "inference_full"),
        "inference_vs_compile": ratio("inference_compile", "inference_full"),
        "ticket50_inference_vs_sdpa": ratio("inference_sdpa", "inference_ticket50"),
        "seconds": {name: quantiles(values) for name, values in times.items()},
        "failures": failures,
        "logit_difference": difference,
        "steps_timed": rounds * len(setup.batches),
        "real_tokens": real,
        "padded_tokens": sum(batch["attention_mask"].numel() for batch in setup.batches),
        "command": "python -m bench.step " + " ".join(public(sys.argv[1:])),
        **circumstances(setup.device),
    }


def quantiles(values: list[float]) -> dict[str, float]:
    """Returns the median and the 20 % and 80 % quantile of times in seconds."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else values * 4
    return {"q20": round(cuts[0], 7), "median": round(statistics.median(values), 7), "q80": round(cuts[3], 7)}


def exit_code(main: Callable[[], int]) -> int:
    """Runs a benchmark's main function and returns its exit code; for an error of ticketops one line and 2."""
    try:
        return main()
    except TicketopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def public(arguments: list[str]) -> list[str]:
    """Removes this machine's paths from the command line, for publication."""
    return ["DIR" if os.sep in argument else argument for argument in arguments]


def circumstances(device: torch.device) -> dict[str, Any]:
    """Describes the machine, versions and backends, for the record of every measurement."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as lines:
        processor = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else processor,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "backends": {op: backends.choose(op, device, torch.float32)[0] for op in backends.OPS},
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def main() -> int:
    """Runs the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder with the task's folder in it (default: known tasks)")
    parser.add_argument("--task", default="demo", help="task folder or name (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="bf16 is autocast (default: %(default)s)"
    )
    parser.add_argument("--model", default="demo", help="encoder, a folder or name (default: the demo's MiniLM)")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help=f"draw the weights instead of loading them; --model may also be {', '.join(BASE_SIZED)} then",
    )
    parser.add_argument(
        "--contenders",
        default=",".join(CONTENDERS),
        help="which to time, of a large model as many as memory holds; sdpa and full are needed (default: %(default)s)",
    )
    parser.add_argument(
        "--batches",
        type=int,
        default=12,
        help="batches to time, after as many others to warm up (default: %(default)s)",
    )
    parser.add_argument("--rounds", type=int, default=1, help="steps timed on each batch (default: %(default)s)")
    parser.add_argument(
        "--inferences", type=int, default=150, help="turns of inferring one sequence (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="rows per batch (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=128, help="maximum tokens per row (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out; full_vs_compile is null")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = [name for name in options.contenders.split(",") if name != "compile" or not options.no_compile]
    try:
        if not {"sdpa", "full"} <= set(names) <= {*CONTENDERS, *COMPILED}:
            known = ", ".join(dict.fromkeys([*CONTENDERS, *COMPILED]))
            raise InputError(f"--contenders {options.contenders}: need sdpa and full, and any of {known}")
        if min(options.batches, options.rounds, options.inferences) < 1:
            raise InputError("--batches, --rounds and --inferences must be at least 1")
        setup = load(
            options.data,
            options.task,
            dtype=options.dtype,
            batches=options.batches,
            batch_size=options.batch_size,
            max_length=options.max_length,
            model=options.model,
            random_weights=options.random_weights,
        )
        result = measure(setup, names, options.rounds, options.inferences)
    except TicketopsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(result))
        return 0
    for name, quantiles in result["seconds"].items():
        low, median, high = (quantiles[key] * 1e3 for key in ("q20", "median", "q80"))
        print(f"{name:24s} {median:9.2f} ms  ({low:.2f} to {high:.2f})")
    for name in (
        *("full_vs_sdpa", "full_vs_compile", "packed_vs_full"),
        *("ticket50_vs_full", "ticket50_vs_full_of_floors", "applied50_vs_full"),
        *("inference_vs_sdpa", "inference_vs_compile", "ticket50_inference_vs_sdpa"),
    ):
        print(f"{name:28s}" + ("not measured" if result[name] is None else f"{result[name]:.2f}x"))
    for name in ("importance_overhead", "switching_overhead"):
        print(f"{name:28s}" + ("not measured" if result[name] is None else f"{result[name]:+.1%}"))
    for name, reason in result["failures"].items():
        print(f"{name} failed: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
