"""Counts what a training step of BERT-base asks of a GPU outside its CUDA graphs, and where the host would wait for the
device. Needs no GPU.

Everything runs on a CPU and on the code of the GPU path, from the embeddings to AdamW, with importance recorded: with
emulated graphs, whose replays do nothing; with a stand-in for the CUDA extension, which records its launches; and with
tensors on the CPU taken for ones that the host cannot read. Layers are narrow, as in bench.host: how many calls a step
makes depends on the number of layers alone. Calls of torch that are several launches count as such, with BERT-base's
sizes.
"""

import contextlib
import ctypes
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.autograd.profiler import profile
from transformers import BertConfig, BertForSequenceClassification

from bench.host import LAYERS, LENGTHS, SMALL, Count, _has_kernel, _walk
from ticketops import CountingCollator, Ticket, patch
from ticketops.errors import TicketopsError
from ticketops.models import boundary, graphs, handle
from ticketops.models import embeddings as embedding_modules
from ticketops.ops import backends, cuda_extension, packing

#: Calls of torch for which the host waits for a GPU: it reads values, or needs a size that depends on values.
READS = ("item", "_local_scalar_dense", "is_nonzero")
SIZES = (
    *("nonzero", "nonzero_numpy", "argwhere", "masked_select", "equal", "repeat_interleave", "bincount"),
    *("_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive"),
)
#: Methods of a tensor that do so without a call of torch that a profiler sees; functions that copy to a device what the
#: host has made.
METHODS = ("tolist", "numpy", "cpu", "__array__")
FUNCTIONS = ("tensor", "as_tensor", "asarray")

#: Most launches of what is one call, by what the sources of csrc/cuda and of torch 2.11 say. torch copies tensors of
#: different dtypes one by one, and joins at most 128 at a time.
_LAUNCHES = {"number_tokens": 2, "native_layer_norm_backward": 2, "_foreach_copy_": 3, "cat": 2, "masked_scatter_": 5}
#: Tensors that one launch of a call for many takes at most, by the number of its lists, and pieces of them; see
#: ATen/native/cuda/MultiTensorApply.cuh (these are for small kernel arguments, others take more).
_LISTS = {"_fused_adamw_": 4, "_foreach_mul_": 1, "_foreach_norm": 1, "_foreach_add_": 1}
_MOST_TENSORS, _MOST_PIECES, _PIECE = {1: 110, 4: 36}, 320, 65536
#: The gradient of an embedding table for more tokens than this sorts them, in at most so many launches.
_FEW_TOKENS, _SORTED = 3072, 20


class _Kernels:
    """Stands in for ticketops._cuda. Launches are recorded instead of made, but for those that number tokens, since
    others rely on the numbers.

    Args:
        launched: what is launched, by kernel.
    """

    device, built_for = "cpu", "no GPU"
    # See csrc/cuda/kernels.h.
    max_layers, max_structures, block_vectors = 64, 4096, 1024

    def __init__(self, launched: Counter[str]) -> None:
        self._launched = launched

    def problem(self) -> None:
        """There is none."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: self._launched.update([name])

    def number_tokens(self, mask: int, size: int, stride: int, rows: int, width: int, *places: int) -> None:
        """See ticketops.ops.rows.number_tokens."""
        self._launched.update(["number_tokens"])
        real = _at(mask, f"i{size}", (rows - 1) * stride + width)
        real = np.lib.stride_tricks.as_strided(real, (rows, width), (stride * size, size)) != 0
        starts, lengths = (_at(place, "i4", rows) for place in places[:2])
        indices, numbers = (_at(place, "i8", rows * width) for place in places[2:4])
        lengths[:] = real.sum(1)
        starts[:] = lengths.cumsum() - lengths
        found = np.flatnonzero(real)
        indices[:], numbers[:] = -1, -1
        indices[: len(found)] = found
        numbers[found] = np.arange(len(found))


def _at(address: int, kind: str, size: int) -> np.ndarray:
    """Numbers at an address."""
    kind = np.dtype(kind)
    return np.frombuffer((ctypes.c_byte * (size * kind.itemsize)).from_address(address), kind)


@contextlib.contextmanager
def gpu_path() -> Iterator[Counter[str]]:
    """Sends patched models on the CPU along the path of a GPU, outside of their graphs.

    Yields:
        The number of launches so far of graphs and of the CUDA extension, by name.
    """
    launched: Counter[str] = Counter()

    def capture(function: Callable[[], list[Tensor]]) -> tuple[list[Tensor], Callable[[], None]]:
        return [x.clone() for x in function()], lambda: launched.update(["graph"])

    examine, name = boundary.examine, backends._name

    def gpu_name(op: str, backend: str, device: str) -> str:
        return name(op, backend, "cuda" if op in backends.ANY_DTYPE else device)

    replaced = (
        (graphs, "DEVICES", ("cpu",)),
        (handle, "DEVICES", ("cpu",)),
        (graphs.Graphs.__init__, "__defaults__", (lambda: capture,)),
        (cuda_extension, "kernels", _Kernels(launched)),
        (packing, "on_host", lambda x: False),
        (boundary, "on_host", lambda x: False),
        # The fused embeddings are a CPU's, and so is packing in front of them.
        (embedding_modules, "serves_embedding", lambda x: False),
        (boundary, "examine", lambda *of: examine(*of)._replace(front_packs=False)),
        (backends, "_name", gpu_name),
    )
    caches = backends._module, backends._has_kernels
    with contextlib.ExitStack() as stack:
        for owner, attribute, value in replaced:
            stack.enter_context(mock.patch.object(owner, attribute, value))
        for cached in caches:
            cached.cache_clear()
        try:
            yield launched
        finally:
            for cached in caches:
                cached.cache_clear()


def followed(run: Callable[[], object]) -> tuple[Counter[str], Counter[str]]:
    """Follows the calls of torch that a function makes.

    Args:
        run: the function; its tensors are on the CPU and stand for ones on a GPU.

    Returns:
        Calls that launch something on a GPU, and calls for which the host would wait for it: both by name. What copies
        a tensor of the host's to a GPU cannot be told from what copies on one.
    """
    found, waits = Count(Counter(), Counter(), Counter()), Counter[str]()

    def noted(owner: Any, name: str, waiting: Callable[[tuple[Any, ...], dict[str, Any]], bool]) -> Any:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            waits[name] += waiting(args, kwargs)
            return original(*args, **kwargs)

        return mock.patch.object(owner, name, call)

    with contextlib.ExitStack() as stack:
        for name in METHODS:
            stack.enter_context(noted(Tensor, name, lambda args, kwargs: True))
        stack.enter_context(noted(Tensor, "to", lambda args, kwargs: "cpu" in (*args[1:2], kwargs.get("device"))))
        for name in FUNCTIONS:
            stack.enter_context(noted(torch, name, lambda args, kwargs: kwargs.get("device") is not None))
        profiler = stack.enter_context(profile())
        run()
    for event in profiler.function_events:
        if event.cpu_parent is None:
            _walk(event, found)
            _waits_in(event, waits)
    return found.launches, +waits


def _waits_in(event: Any, waits: Counter[str], inside: bool = False) -> None:
    """Adds what an event of the profiler and those inside it wait for.

    Args:
        event: of the profiler.
        waits: the count.
        inside: whether it is inside a kernel, which on a CPU may read values.
    """
    name = event.name.removeprefix("aten::")
    called = name != event.name
    if called and (name in SIZES or (name in READS and not inside)):
        waits[name] += 1
        return
    for child in event.cpu_children:
        _waits_in(child, waits, inside or (called and _has_kernel(name)))


def launches_for(sizes: Sequence[int], lists: int) -> int:
    """The number of launches of a call of torch for many tensors.

    Args:
        sizes: number of elements of each tensor.
        lists: number of lists of such tensors.
    """
    launches = tensors = pieces = 0
    for size in sizes:
        tensors += 1
        for left in reversed(range(-(-size // _PIECE))):
            pieces += 1
            if pieces == _MOST_PIECES or (tensors == _MOST_TENSORS[lists] and not left):
                launches, pieces, tensors = launches + 1, 0, int(left > 0)
    return launches + (pieces > 0)


def _expanded(calls: Counter[str], tokens: int) -> Counter[str]:
    """The launches of calls, with BERT-base's sizes."""
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in BertForSequenceClassification(BertConfig()).parameters()]
    of = dict(_LAUNCHES)
    for name, lists in _LISTS.items():
        of[name] = launches_for(sizes, lists)
    # A second kernel adds the parts of each norm up. The optimizer adds to the numbers of its steps alone.
    of["_foreach_norm"] += 1
    of["_foreach_add_"] = launches_for([1] * len(sizes), 1)
    found = Counter({name: number * of.get(name, 1) for name, number in calls.items()})
    if tokens > _FEW_TOKENS:
        # Positions are looked up for one row, which stands for all.
        found["embedding_dense_backward"] += 2 * (_SORTED - 1)
    return found


def count_step(
    *,
    tokens: int = 32 * 128,
    autocast: bool = False,
    collator: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ticket: Ticket | None = None,
    after: Callable[[torch.nn.Module], object] = lambda model: None,
) -> tuple[Counter[str], Counter[str]]:
    """Counts a training step of a patched BERT of 12 layers that classifies sequences: forward and backward pass with
    importance recorded, clipping of the gradients' norm as a Trainer does, fused AdamW.

    Args:
        tokens: places of a batch of BERT-base, padding included.
        autocast: True to run under bfloat16 autocast.
        collator: takes a padded batch and returns the one that the model gets; None for CountingCollator's.
        ticket: applied to the model; None for none.
        after: called with the model at the end of the step.

    Returns:
        Launches outside of graphs, a graph being one; and waits of the host for the device: both by name.

    Raises:
        TicketopsError: the step ran without graphs.
    """
    channels, heads, neurons = SMALL
    sizes = {"hidden_size": channels, "num_attention_heads": heads, "intermediate_size": neurons}
    config = BertConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=8, max_position_embeddings=8)
    real = (torch.tensor(LENGTHS)[:, None] > torch.arange(max(LENGTHS))).long()
    batch = {"input_ids": real, "token_type_ids": torch.zeros_like(real), "attention_mask": real.clone()}
    batch["labels"] = torch.zeros(len(LENGTHS), dtype=torch.int64)
    with gpu_path() as launched:
        model = BertForSequenceClassification(config).train()
        patched = patch(model, graphs="auto").apply(ticket)
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)

        def step(inputs: dict[str, Any]) -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            after(model)

        with patched.record_importance():
            # The last of these captures.
            for _ in range(graphs.SIGHTINGS + 1):
                step((collator or CountingCollator(dict))(batch))
            inputs = (collator or CountingCollator(dict))(batch)
            before, replays = Counter(launched), patched.graphs.replays
            calls, waits = followed(lambda: step(inputs))
            calls += launched - before
        if patched.graphs.replays == replays:
            raise TicketopsError(f"no graph computed the step: {patched.graphs}")
    return _expanded(calls, tokens), waits
