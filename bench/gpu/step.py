"""Measures a fine-tuning step of BERT-base against transformers, with random weights and sequence lengths as in real
tasks.

All contenders get the same batch, padded to its longest row. "ticketops, graphs" is patch(model, graphs=True), and
"ticketops, reduce-overhead" the patched model with the number of tokens padded to a multiple of BUCKET, compiled and
captured in CUDA graphs by torch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedModel

from bench.gpu.measure import Row, Setting, Work, gate, measured
from bench.gpu.workloads import Workload, task_lengths, tasks
from bench.step import BASE_SIZED
from ticketops import PatchHandle, patch

Batch = dict[str, torch.Tensor]
BUCKET = 256


def make_model(setting: Setting, name: str = "bert-base", kind: type | None = None) -> PreTrainedModel:
    """Makes a classifier with random weights.

    Args:
        setting: its device and scale.
        name: key of bench.step.BASE_SIZED.
        kind: its class; None for that of transformers.
    """
    model_type, sizes = BASE_SIZED[name]
    config = AutoConfig.for_model(model_type, **sizes)
    if setting.tiny:
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        sizes |= {"head_dim": 16} if hasattr(config, "head_dim") else {}
        config = AutoConfig.for_model(model_type, **{**BASE_SIZED[name][1], **sizes, "vocab_size": 99})
    config.pad_token_id = 0
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForSequenceClassification.from_config(config) if kind is None else kind(config)
    return model.to(setting.device)


def make_batch(work: Workload, setting: Setting) -> Batch:
    """Draws tokens of these lengths, padded to the longest row."""
    real = work.real(setting.device)
    return {
        "input_ids": torch.randint(1, 99, real.shape, device=setting.device) * real,
        "attention_mask": real.long(),
        "labels": torch.arange(len(real), device=setting.device) % 2,
    }


@contextlib.contextmanager
def _autocast(setting: Setting) -> Iterator[None]:
    with torch.autocast(setting.device, setting.dtype, enabled=setting.dtype != torch.float32):
        yield


def make_step(model: torch.nn.Module, call: Callable, batch: Batch, setting: Setting) -> Callable[[], object]:
    """Returns a training step: forward, backward and AdamW.

    Args:
        model: to train.
        call: the model, compiled or not.
        batch: to train it on.
        setting: device and dtype of autocast.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=setting.device == "cuda")

    def step() -> None:
        with _autocast(setting):
            loss = call(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def recorded(handle: PatchHandle, step: Callable[[], object]) -> Callable[[], None]:
    """Returns a step that records importance."""

    def run() -> None:
        with handle.record_importance("example"):
            step()

    return run


def check(batch: Batch, setting: Setting, name: str = "bert-base") -> str:
    """Returns the correctness gate: logits without dropout, against the stock model in float64."""
    model = make_model(setting, name).eval()
    with torch.no_grad(), _autocast(setting):
        same = model(**batch).logits
        with patch(model):
            actual = model(**batch).logits
    with torch.no_grad():
        exact = model.double()(**batch).logits
    return gate([actual], [same.to(setting.dtype)], [exact])


def _need(work: Workload, model: PreTrainedModel) -> Work:
    """Returns the least work of a step. Operations: the layers' matrix products on real tokens, one forward and two
    backward. Bytes: AdamW reads parameters, gradients and both moments, and writes all but the gradients, in
    float32."""
    config = model.config
    channels, layers = config.hidden_size, config.num_hidden_layers
    dense = 2 * work.tokens * (4 * channels**2 + 2 * channels * config.intermediate_size)
    attention = 4 * channels * sum(n * n for n in work.lengths)
    return Work(3 * layers * (dense + attention), 28 * sum(p.numel() for p in model.parameters()))


def rows(setting: Setting) -> list[Row]:
    """Measures batches of each task with every contender; ticketops records importance while it trains.

    Returns:
        The rows.
    """
    table = []
    for task in tasks(setting):
        for size in (2,) if setting.tiny else (32, 128):
            work = Workload(f"{task}, batch {size}", (5, 2) if setting.tiny else task_lengths(task, size))
            batch = make_batch(work, setting)
            verdict = check(batch, setting)
            need = _need(work, make_model(setting))

            def ours(
                batch: Batch = batch, recording: bool = True, graphs: bool = False, compiled: bool = False
            ) -> Callable[[], object]:
                model = make_model(setting).train()
                # Without a GPU there are none.
                graphed: bool | Literal["auto"] = "auto" if graphs and setting.tiny else graphs
                handle = patch(model, bucket=BUCKET if compiled else None, graphs=graphed)
                call = setting.compile(model, mode="reduce-overhead") if compiled else model
                step = make_step(model, call, batch, setting)
                return recorded(handle, step) if recording else step

            def stock(batch: Batch = batch, compiled: bool = False, mode: str | None = None) -> Callable[[], object]:
                model = make_model(setting).train()
                return make_step(model, setting.compile(model, mode) if compiled else model, batch, setting)

            contenders: dict[str, Callable[[], Callable[[], object]]] = {
                "ticketops": ours,
                "ticketops without importance": lambda ours=ours: ours(recording=False),
                "ticketops, graphs": lambda ours=ours: ours(graphs=True),
                "ticketops, reduce-overhead": lambda ours=ours: ours(compiled=True),
                "transformers": stock,
                "transformers, torch.compile": lambda stock=stock: stock(compiled=True),
                "transformers, reduce-overhead": lambda stock=stock: stock(compiled=True, mode="reduce-overhead"),
            }
            for name, build in contenders.items():
                row = {
                    "bench": "step",
                    "workload": work.name,
                    "tokens": work.tokens,
                    "pass": "step",
                    "contender": name,
                    "gate": verdict,
                }
                table.append(measured(row, build, need, setting))
    return table
