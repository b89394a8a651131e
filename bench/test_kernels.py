"""pytest bench: the ops and a whole training step beside what stock transformers computes in their place.

    pytest bench --benchmark-autosave
    pytest bench --benchmark-compare --lengths sst2 --dtype bf16 -k "attention or step"

Each result is checked against plain PyTorch in float64 before its times are reported. The contenders of a group ran in
turns. `extra_info` has the floor that the group's operations and bytes set at the rates that a product and a copy reach
on this machine in the same run, and the medians of the ratios to other contenders. Without a GPU the CPU's kernels are
measured, else Triton's, with the host's time. `python -m bench.step` times steps on batches of real tasks.
"""

import pytest

from bench.conftest import replayed
from bench.contenders import OURS, PASSES

pytestmark = pytest.mark.benchmark(timer=replayed)
passes = pytest.mark.parametrize("kind", PASSES)


@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa", "eager"])
def test_attention(report, dtype, kind, contender):
    report("attention", dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "eager"])
def test_ffn(report, dtype, kind, contender):
    report("ffn", dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "eager"])
def test_residual(report, dtype, kind, contender):
    report("residual", dtype, kind, contender)


@pytest.mark.skipif(OURS == "reference", reason="whole layers are one op with native or Triton kernels only")
@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa", "eager"])
def test_encoder(report, dtype, kind, contender):
    report("encoder", dtype, kind, contender)


@passes
@pytest.mark.parametrize("contender", [OURS, "sdpa"])
def test_step(report, dtype, kind, contender):
    report("step", dtype, kind, contender)


def test_step_that_records_importance(report, dtype):
    report("step", dtype, PASSES[1], f"{OURS}-importance")
