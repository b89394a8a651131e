"""Compares BERT-base shrunk by 25, 50 and 75 % of its heads and FFNs with the whole model: time of inference and
training at the sizes of `bench.shrunk`, peak memory, and bytes of the weights."""

import copy
from collections.abc import Callable

import torch
from transformers import BertConfig, BertForSequenceClassification

from bench import shrunk
from bench.gpu.measure import Row, Setting, measured
from ticketops import patch, shrink


def rows(setting: Setting) -> list[Row]:
    """Measures the model shrunk to each ticket ("ticketops") against the whole model, patched and stock.

    Returns:
        The rows, with the bytes of the weights and, on a GPU, the peak memory in MiB.
    """
    torch.manual_seed(0)
    sizes = (
        {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 99}
        if setting.tiny
        else {}
    )
    whole = BertForSequenceClassification(BertConfig(**sizes, attn_implementation="sdpa")).to(setting.device)
    patched = copy.deepcopy(whole)
    patch(patched)
    cells = [(2, 5)] if setting.tiny else [(batch, length) for batch in (1, 8, 32, 128) for length in (32, 128, 512)]
    table = []
    for share in (0.5,) if setting.tiny else shrunk.SHARES:
        small = shrink(copy.deepcopy(whole), shrunk.random_ticket(whole, share))
        patch(small)
        verdict = shrunk.check(whole, {shrunk.title(share): small})
        contenders = {"ticketops": small, "whole model, ticketops": patched, "whole model, transformers": whole}
        for batch, length in cells:
            for kind in shrunk.PASSES:
                for name, model in contenders.items():
                    row = {
                        "bench": "shrunk",
                        "workload": f"{shrunk.title(share)}, {batch} x {length}",
                        "tokens": batch * length,
                        "pass": kind,
                        "contender": name,
                        "gate": verdict,
                        "bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
                    }
                    inputs = shrunk.make_batch(model, batch, length)
                    if setting.device == "cuda":
                        torch.cuda.reset_peak_memory_stats()

                    def build(
                        model: torch.nn.Module = model, inputs: dict[str, torch.Tensor] = inputs, kind: str = kind
                    ) -> Callable[[], object]:
                        return shrunk.runner(model, inputs, kind)

                    row = measured(row, build, None, setting)
                    if setting.device == "cuda":
                        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
                    table.append(row)
    return table
