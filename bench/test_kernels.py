"""pytest bench: the ops and a whole training step beside what stock transformers computes in their place.

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare --lengths sst2 --dtype bf16 -k "attention or step"

Each result is checked against plain PyTorch in float64 before its times are reported. The contenders of a group ran in
turns. `extra_info` has the floor that the group's operations and bytes set at the rates that a product and a copy reach
on this machine in the same run, and the medians of the ratios to other contenders. Without a GPU the CPU's kernels are
measured, else Triton's, with the host's time. `--compile` adds rivals under torch.compile, `--large` a step of
BERT-large; a GPU has both by itself. `python -m bench.step` times steps on batches of real tasks.
"""

import pytest

from bench.conftest import replayed
from bench.contenders import OURS, PASSES
from bench.step import COMPILED

pytestmark = pytest.mark.benchmark(timer=replayed)
passes = pytest.mark.parametrize("kind", PASSES)


@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa", "eager", "flex", "varlen", "flash-attn"])
def test_attention(report, dtype, kind, contender):
    report("attention", dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "eager", *COMPILED])
def test_ffn(report, dtype, kind, contender):
    report("ffn", dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "eager", *COMPILED])
def test_residual(report, dtype, kind, contender):
    report("residual", dtype, kind, contender)


@pytest.mark.skipif(OURS == "reference", reason="whole layers are one op with native or Triton kernels only")
@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa", "eager", *COMPILED])
def test_encoder(report, dtype, kind, contender):
    report("encoder", dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa", *COMPILED])
def test_step(report, dtype, kind, contender):
    report("step", dtype, kind, contender)


def test_step_that_records_importance(report, dtype):
    report("step", dtype, PASSES[1], f"{OURS}-importance")


@pytest.mark.parametrize("contender", [OURS, "sdpa", *COMPILED])
def test_step_of_bert_large(report, dtype, contender):
    report("bert-large", dtype, PASSES[1], contender)
