"""pytest bench/bench_step.py --data DIR --task rte: the contenders of bench.step under pytest-benchmark.

Contenders run one after the other, so only compare numbers of one run on an idle machine. `python -m bench.step`
interleaves them.
"""

import itertools

import pytest
import torch

from bench import step


@pytest.mark.parametrize("name", ["sdpa", "full", "importance", "ticket50", "applied50", "switching"])
def test_training_step(benchmark, setup, name):
    contender = step.contender(setup, name)
    benchmark.group = f"training step, {setup.task}, {setup.dtype}"
    benchmark.extra_info.update(step.circumstances(setup.device))
    batches = itertools.cycle(setup.batches)
    benchmark.pedantic(lambda: contender.step(next(batches)), rounds=6, warmup_rounds=2)


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize("name", ["sdpa", "full", "ticket50"])
def test_inference(benchmark, setup, name, rows):
    contender = step.contender(setup, name)
    contender.model.eval()
    batch = {key: value[:rows] for key, value in setup.batches[0].items() if key != "labels"}
    width = int(batch["attention_mask"].sum(1).max())
    batch = {key: value[:, :width] for key, value in batch.items()}
    benchmark.group = f"inference, {rows} x {width}, {setup.task}"
    benchmark.extra_info.update(step.circumstances(setup.device))
    with torch.inference_mode():
        benchmark.pedantic(lambda: contender.model(**batch), rounds=20, warmup_rounds=3)
