"""pytest bench: the ops and a whole training step beside what stock transformers computes in their place.

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare --lengths sst2,128 --dtype bf16 -k "attention or step"

Each result is checked against plain PyTorch in float64 before its times are reported. The contenders of a group ran in
turns. `extra_info` has the floor that the group's operations and bytes set at the rates that a product and a copy reach
on this machine in the same run, and the medians of the ratios to other contenders. Without a GPU the CPU's kernels are
measured. On a GPU an op's time is that of its kernels with cold caches; a step's is the wall clock of some in a row,
with the kernels' own beside it. `--compile` adds rivals under torch.compile; a GPU has them by itself. `pytest
bench/models.py` measures more models, and `python -m bench.step` steps on batches of real tasks.
"""

import pytest

from bench.conftest import replayed
from bench.contenders import BACKEND, BUCKET, GRAPHS, HALF_KEPT, HALF_MASKED, IMPORTANCE, OURS, PASSES, SDPA
from bench.step import COMPILED

pytestmark = pytest.mark.benchmark(timer=replayed)
passes = pytest.mark.parametrize("kind", PASSES)
STEPS = [OURS, IMPORTANCE, GRAPHS, BUCKET, "sdpa", *COMPILED]


@passes
@pytest.mark.parametrize(
    "contender", [OURS, IMPORTANCE, HALF_MASKED, HALF_KEPT, "sdpa", "eager", *SDPA, "flex", "varlen", "flash-attn"]
)
def test_attention(report, workload, dtype, kind, contender):
    report("attention", workload, dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, IMPORTANCE, "eager", *COMPILED])
def test_ffn(report, workload, dtype, kind, contender):
    report("ffn", workload, dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "eager", *COMPILED])
def test_residual(report, workload, dtype, kind, contender):
    report("residual", workload, dtype, kind, contender)


@pytest.mark.skipif(BACKEND == "reference", reason="whole layers are one op with native or Triton kernels only")
@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa", "eager", *COMPILED])
def test_encoder(report, workload, dtype, kind, contender):
    report("encoder", workload, dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", STEPS)
def test_step(report, workload, dtype, kind, contender):
    report("step", workload, dtype, kind, contender)
