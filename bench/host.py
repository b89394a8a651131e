"""Counts what the encoder layers of BERT-base ask of torch and Triton on their way to a GPU, forward and backward, and
times the host alone beside stock transformers layers; counts launches and waits of a whole step (bench/host_step.py).
Needs no GPU.

    python -m bench.host --dtype bf16 --json

Tensors are on the CPU, and the layers run the code of the GPU path, but for the last step of each Triton launch: the
call into the driver is recorded instead of made. All 12 layers run one after the other, as in a step; figures are of
one of them, a twelfth. Counts are of BERT-base's shapes, with dropout. Times are of one thread's processor time, in
turns, on shapes so small that kernels take next to none of it (the counts must be the same there), and without dropout:
on a CPU torch makes several calls of what is one on a GPU.

Left out is what only a GPU has: Triton's and the driver's part of a launch (some 4 us each), the choice of cuBLAS's
kernels, the caching allocator in place of malloc. Stock attention is the CPU's fused kernel, as many calls as a GPU's.
The meta device would not do: torch computes its shapes of LayerNorm, GELU and even additions in Python, which takes 0.1
to 1 ms each.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.profiler import profile
from transformers import BertConfig, BertModel

from bench.step import circumstances, exit_code, public, quantiles
from ticketops import patch
from ticketops.errors import InputError, TicketopsError, UnsupportedError
from ticketops.models import graphs
from ticketops.models.encoder import EncoderPass
from ticketops.ops.graphs import Graphed

#: Hidden size, heads and FFN neurons of BERT-base, and of the layers that are timed.
BERT_BASE, SMALL = (768, 12, 3072), (16, 1, 32)
#: Tokens of each row of the batch; padded for the stock layer.
LENGTHS = (4, 3, 2, 1)
DROPOUT = 0.1
#: Layers of an encoder.
LAYERS = 12


@dataclass(frozen=True)
class Count:
    """What one call asks for.

    Attributes:
        triton: launches of Triton kernels, by op and kernel.
        launches: calls of torch that launch a kernel on a GPU, by name.
        calls: all calls of torch by name, those of views and allocations too.
    """

    triton: Counter[str]
    launches: Counter[str]
    calls: Counter[str]

    @property
    def record(self) -> dict[str, Any]:
        """The counts for a file of results, totals of one layer of an encoder's, and by name of all."""
        return {
            "triton_launches": self.triton.total() / LAYERS,
            "torch_launches": self.launches.total() / LAYERS,
            "calls": self.calls.total() / LAYERS,
            "triton_by_name": dict(self.triton.most_common()),
            "torch_launches_by_name": dict(self.launches.most_common()),
            "calls_by_name": dict(self.calls.most_common()),
        }


@contextlib.contextmanager
def recorded(target: tuple[int, int] = (9, 0)) -> Iterator[Counter[str]]:
    """Sends encoder layers on the CPU through the Triton backend, with launches recorded instead of made. Their results
    are whatever the memory held.

    Args:
        target: compute capability to choose tiles for.

    Yields:
        The number of launches so far, by op and kernel, e.g. "attention.forward_kernel".

    Raises:
        UnsupportedError: Triton is missing or in its interpreter, which has launches of its own.
    """
    try:
        from triton.runtime.jit import JITFunction
    except ModuleNotFoundError:
        raise UnsupportedError("bench.host follows launches through Triton, which is not installed") from None
    from ticketops.ops import private, triton_common
    from ticketops.ops.layer import triton as gpu_layer

    if triton_common.INTERPRETED:
        raise UnsupportedError("TRITON_INTERPRET=1 replaces the launches that bench.host counts: unset it")
    launched: Counter[str] = Counter()

    def compiled(kernel: Any, *args: Any, **options: Any) -> Any:
        name = f"{kernel.fn.__module__.split('.')[-2]}.{kernel.fn.__name__}"

        def run(*arguments: Any) -> None:
            launched[name] += 1

        run()
        return SimpleNamespace(run=run, function=None, packed_metadata=None)

    # A CPU has no products of half precision with results in float32: these are as many calls.
    stand_ins: dict[Any, Tensor] = {}

    def wide(x: Tensor) -> Tensor:
        key = x.shape, x.stride()
        if key not in stand_ins:
            stand_ins[key] = torch.zeros_like(x, dtype=torch.float32)
        return stand_ins[key]

    def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
        return torch.mm(a, b) if a.dtype == dtype else torch.mm(wide(a), wide(b))

    def add_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return total.addmm_(a, b) if a.dtype == total.dtype else total.addmm_(wide(a), wide(b))

    replaced = (
        (JITFunction, "run", compiled),
        (gpu_layer, "_product", product),
        (gpu_layer, "_add_product", add_product),
        (triton_common, "_device_capability", lambda device: target),
        (triton_common, "_launched", {}),
        (triton_common, "_compiled", {}),
        (torch.cuda, "current_device", lambda: None),
        (private, "raw_stream", lambda device: 0),
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict("os.environ", TICKETOPS_BACKEND="triton"))
        for owner, name, value in replaced:
            stack.enter_context(mock.patch.object(owner, name, value))
        yield launched


def count(run: Callable[[], object], launched: Counter[str] | None = None) -> Count:
    """Counts what one call of a function asks of torch on a GPU.

    Args:
        run: the function; its tensors are on the CPU.
        launched: the result of `recorded`, if the function launches Triton kernels.
    """
    before = Counter(launched)
    with profile() as profiler:
        run()
    found = Count(Counter(launched) - before, Counter(), Counter())
    for event in profiler.function_events:
        if event.cpu_parent is None:
            _walk(event, found)
    return found


def _walk(event: Any, found: Count) -> bool:
    """Adds an event of the profiler and those inside it to a count. Returns True if any of them launches a kernel."""
    name = event.name.removeprefix("aten::")
    called = name != event.name
    if called:
        found.calls[name] += 1
    # What a kernel calls inside is the device's affair: on a CPU _foreach_copy_ is a copy after the other.
    whole = called and (name.startswith("_foreach_") or _has_kernel(name))
    inside = [] if whole else event.cpu_children
    launches = sum(_walk(child, found) for child in inside) > 0
    if called and not launches and _computes(name):
        found.launches[name] += 1
        return True
    return launches


@cache
def _overloads() -> dict[str, list[str]]:
    """The overloads of each op of torch, by the op's name."""
    found: dict[str, list[str]] = {}
    for name in torch._C._dispatch_get_all_op_names():
        if name.startswith("aten::"):
            found.setdefault(name.removeprefix("aten::").partition(".")[0], []).append(name)
    return found


def _has_kernel(name: str, key: str = "CPU") -> bool:
    """True if any overload of an op of torch has a kernel for a dispatch key."""
    return any(torch._C._dispatch_has_kernel_for_dispatch_key(each, key) for each in _overloads()[name])


def _computes(name: str) -> bool:
    """True if an op of torch writes values: it is no view, no allocation and not made of other ops."""
    if name.startswith(("empty", "new_empty", "set_", "detach_")) or _has_kernel(name, "CompositeImplicitAutograd"):
        return False
    packet = getattr(torch.ops.aten, name)
    schemas = (getattr(packet, each.partition(".")[2] or "default")._schema for each in _overloads()[name])
    aliases = [result.alias_info for schema in schemas for result in schema.returns]
    return all(alias is None or alias.is_write for alias in aliases)


def encoder(sizes: tuple[int, int, int], kind: str, dtype: str, dropout: float) -> Callable[[], Callable[[], None]]:
    """Makes the layers of an encoder with their arguments, as they reach them in a training step of its model.

    Args:
        sizes: hidden size, heads and FFN neurons.
        kind: "stock"; "patched"; or "recording", patched and recording importance.
        dtype: "fp32" or "bf16" (autocast).
        dropout: probability of all three dropouts.

    Returns:
        A function that clears all gradients and returns a function to run: forward and backward pass.
    """
    torch.manual_seed(0)
    model = bert(sizes, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    handle = None if kind == "stock" else patch(model)
    layers = model.encoder.layer
    args, kwargs = _arguments(model, layers[0])
    tokens = args[0].detach().requires_grad_()
    leaves = [tokens, *layers.parameters()]
    if handle is not None:
        call = replace(kwargs["ticketops"], whole=True)
        if kind == "recording":
            shapes = ((len(LENGTHS), sizes[1]), (len(LENGTHS),))
            sinks = [{i: torch.zeros(shape, requires_grad=True) for i in range(LAYERS)} for shape in shapes]
            call = replace(call, head_importance=sinks[0], ffn_importance=sinks[1])
            leaves += [sink for each in sinks for sink in each.values()]
        kwargs["ticketops"] = call
    gradient = torch.randn_like(tokens)

    def run() -> None:
        out = tokens
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            for layer in layers:
                out = layer(out, *args[1:], **kwargs)
        out.backward(gradient)

    def prepared() -> Callable[[], None]:
        for leaf in leaves:
            leaf.grad = None
        return run

    return prepared


def bert(sizes: tuple[int, int, int], **options: Any) -> BertModel:
    """Makes a BERT of 12 layers for training.

    Args:
        sizes: hidden size, heads and FFN neurons.
        options: of its configuration.
    """
    channels, heads, neurons = sizes
    config = BertConfig(
        hidden_size=channels,
        num_attention_heads=heads,
        intermediate_size=neurons,
        num_hidden_layers=LAYERS,
        vocab_size=8,
        max_position_embeddings=8,
        attn_implementation="sdpa",
        **options,
    )
    return BertModel(config).train()


def _arguments(model: nn.Module, module: nn.Module) -> tuple[Any, dict[str, Any]]:
    """Returns the arguments with which a model calls one of its modules."""
    real = torch.tensor(LENGTHS)[:, None] > torch.arange(max(LENGTHS))
    seen: list[Any] = []
    forward = type(module).forward

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append((args, kwargs))
        return forward(self, *args, **kwargs)

    with mock.patch.object(type(module), "forward", noted):
        model(input_ids=real.long(), attention_mask=real.long())
    return seen[0]


def replay(turns: int) -> tuple[list[float], list[float]]:
    """Times what the host does for a step of BERT-base's 12 layers in CUDA graphs, forward and backward, recording
    importance, beside launching the graphs.

    Args:
        turns: number of steps.

    Returns:
        Seconds of processor time that each step takes: of finding the graph and of copies in and out; and with torch's
        part, which calls modules and accumulates gradients.
    """
    own: list[float] = []

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            start = time.thread_time()
            result = function(*arguments)
            own[-1] += time.thread_time() - start
            return result

        return run

    def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        return [x.clone() for x in function()], lambda: None

    model = bert(SMALL)
    times = []
    with (
        mock.patch.object(graphs, "DEVICES", ("cpu",)),
        mock.patch.object(graphs.Graphs, "run", timed(graphs.Graphs.run)),
        mock.patch.object(Graphed, "backward", timed(Graphed.backward)),
    ):
        handle = patch(model, graphs="auto")
        handle.graphs = graphs.Graphs(lambda: capture)
        with handle.record_importance():
            own.append(0.0)
            args, kwargs = _arguments(model, model.encoder)
            tokens = args[0].detach().requires_grad_()
            gradient = torch.randn(len(LENGTHS), max(LENGTHS), SMALL[0])
            for _ in range(20 + turns):
                model.zero_grad()
                one = EncoderPass(handle, model, None)
                kwargs["ticketops"] = replace(kwargs["ticketops"], encoder=one)
                own.append(0.0)
                start = time.thread_time()
                model.encoder(tokens, *args[1:], **kwargs).last_hidden_state.backward(gradient)
                times.append(time.thread_time() - start)
        if handle.graphs.replays < turns:
            raise TicketopsError(f"graphs computed {handle.graphs.replays} of {turns} steps: {handle.graphs}")
    return own[-turns:], times[-turns:]


def measure(dtype: str, turns: int) -> dict[str, Any]:
    """Counts and times the layers of an encoder.

    Args:
        dtype: "fp32" or "bf16" (autocast).
        turns: number of turns of each contender.

    Returns:
        Counts and seconds of each contender for one layer, the median ratio of ours to stock, machine and versions.

    Raises:
        TicketopsError: the layers that are timed ask for something else than those of BERT-base's shapes.
    """
    kinds = ("stock", "patched", "recording")
    counted = {
        (kind, sizes): encoder(sizes, kind, dtype, DROPOUT) for kind in kinds[1:] for sizes in (BERT_BASE, SMALL)
    }
    timed = {kind: encoder(SMALL, kind, dtype, dropout=0.0) for kind in kinds}
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    with recorded() as launched:
        for prepared in counted.values():
            # What the first call of a shape makes and keeps is not made again.
            prepared()()
        counts = {key: count(prepared(), launched) for key, prepared in counted.items()}
        for kind in kinds[1:]:
            if counts[kind, BERT_BASE] != counts[kind, SMALL]:
                raise TicketopsError(f"layers of {SMALL} ask for other calls than those of {BERT_BASE}: change SMALL")
        for turn in range(-20, turns):
            place = turn % len(kinds)
            for kind in kinds[place:] + kinds[:place]:
                run = timed[kind]()
                start = time.thread_time()
                run()
                taken = time.thread_time() - start
                if turn >= 0:
                    times[kind].append(taken / LAYERS)
        plain = {kind: count(prepared(), launched) for kind, prepared in timed.items()}
    # It counts by what is here.
    from bench.host_step import count_step

    launches, waits = count_step(autocast=dtype == "bf16")
    found, (own, steps) = counts["patched", BERT_BASE], replay(turns)
    times |= {"replay": own, "replay_with_torch": steps}
    return {
        "dtype": dtype,
        "launches_a_layer": (found.triton.total() + found.launches.total()) / LAYERS,
        "calls_a_layer": found.calls.total() / LAYERS,
        "layer_vs_stock_host": _ratio(times["patched"], times["stock"]),
        "recording_vs_stock_host": _ratio(times["recording"], times["stock"]),
        "launches_a_step": launches.total(),
        "waits_a_step": waits.total(),
        "replay_ms": 1e3 * statistics.median(own),
        "replay_with_torch_ms": 1e3 * statistics.median(steps),
        "counts": {kind: counts[kind, BERT_BASE].record for kind in kinds[1:]},
        "counts_of_a_step": {"launches": dict(launches.most_common()), "waits": dict(waits)},
        "counts_without_dropout": {kind: each.record for kind, each in plain.items()},
        "seconds": {kind: quantiles(values) for kind, values in times.items()},
        "turns": turns,
        "command": " ".join(["python -m bench.host", *public(sys.argv[1:])]),
        **circumstances(torch.device("cpu")),
    }


def _ratio(ours: list[float], stock: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, stock, strict=True))


def main() -> int:
    """Runs the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m bench.host", description=__doc__.partition("\n\n")[0])
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="bf16 is autocast (default)")
    parser.add_argument("--turns", type=int, default=400, help="turns of each contender (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of lines")
    options = parser.parse_args()
    if options.turns < 1:
        raise InputError(f"--turns is {options.turns}: it must be at least 1")
    torch.set_num_threads(1)
    result = measure(options.dtype, options.turns)
    if options.json:
        print(json.dumps(result))
        return 0
    for kind, counted in result["counts"].items():
        print(
            f"{kind:17} {counted['triton_launches']:5.1f} Triton launches {counted['torch_launches']:5.1f} of torch "
            f"{counted['calls']:5.1f} calls of torch"
        )
    for kind, seconds in result["seconds"].items():
        low, median, high = (seconds[key] * 1e6 for key in ("q20", "median", "q80"))
        print(f"{kind:17} {median:8.0f} us  ({low:.0f} to {high:.0f})")
    for name in ("layer_vs_stock_host", "recording_vs_stock_host", "replay_ms", "replay_with_torch_ms"):
        print(f"{name:24} {result[name]:.2f}")
    for name in ("launches_a_step", "waits_a_step"):
        print(f"{name:24} {result[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
