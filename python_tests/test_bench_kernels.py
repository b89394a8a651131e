"""What `pytest bench` measures and reports, and that it reports nothing of what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import contenders
from bench.conftest import in_turns
from bench.contenders import OURS, Shape

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(lengths=(5, 1, 3), channels=24, heads=2, neurons=40, layers=2)


def test_contenders_take_turns_and_each_comes_first_equally_often():
    called: list[str] = []
    runs, machine = ({name: lambda name=name: called.append(name) for name in names} for names in ("abc", "x"))
    times = in_turns(runs, machine, least=3, seconds=0.0)
    # One turn to warm up.
    assert "".join(called) == "cabx" + "abcx" + "bcax" + "cabx"
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abcx", 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", contenders.OPS)
def test_all_contenders_compute_the_same(op, dtype):
    if op == "encoder" and OURS == "reference":
        pytest.skip("whole layers are one op with native or Triton kernels only")
    problem = contenders.OPS[op](SHAPE)
    assert set(problem.verdicts(dtype).values()) == {"green"}

    def wrong(leaves, p):
        call = problem.ours(leaves, p)
        return lambda: call() * 1.1

    verdicts = replace(problem, ours=wrong).verdicts(dtype)
    assert verdicts.pop(OURS).startswith("red: result 0")
    assert set(verdicts.values()) == {"green"}
    for run in (problem.runs(dtype, kind)[OURS] for kind in contenders.PASSES):
        run()


def test_flex_attention_gets_the_same_problem():
    problem = contenders.attention(SHAPE)
    # Compiled, and differentiated, it needs a GPU.
    leaves = [SHAPE.padded(x).float() for x in problem.tokens]
    found = contenders.flex(SHAPE, leaves, 0.0, compiled=False)()
    torch.testing.assert_close(found[SHAPE.real.flatten()], problem.ours(problem.tokens, 0.0)().float())


def test_the_least_work_is_that_of_real_tokens():
    assert (SHAPE.tokens, SHAPE.pairs, SHAPE.weights) == (9, 35, 4 * 24**2 + 2 * 24 * 40)
    assert SHAPE.real.tolist() == [[True] * 5, [True] + [False] * 4, [True] * 3 + [False] * 2]
    # Two products of each weight of attention, and two per token and neuron; q, k, v and the result once each.
    assert contenders.attention(SHAPE).work["forward"] == (2 * 2 * 35 * 24, 4 * 9 * 24)
    assert contenders.ffn(SHAPE).work["forward"] == (2 * 2 * 9 * 24 * 40, 2 * 9 * 24 + 2 * 24 * 40)


@pytest.mark.slow
def test_a_run_says_times_floor_and_ratios(tmp_path):
    out = tmp_path / "out.json"
    options = ["--dtype", "fp32", "--rows", "2", "--rounds", "3", "-k", "residual", f"--benchmark-json={out}"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "bench", *options],
        cwd=ROOT,
        # Of a worker of pytest-xdist, which would switch benchmarks off.
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["benchmarks"]
    kinds = [f"residual, {kind}, fp32" for kind in contenders.PASSES]
    assert sorted((row["group"], row["params"]["contender"]) for row in rows) == sorted(
        (kind, name) for kind in kinds for name in (OURS, "eager")
    )
    for row in rows:
        stats, info = row["stats"], row["extra_info"]
        assert stats["rounds"] >= 3
        assert 0 < stats["min"] <= stats["median"] <= stats["max"]
        assert info["share_of_floor"] == pytest.approx(info["floor_ms"] / stats["median"] / 1e3)
        assert info["floor_ms"] == pytest.approx(1e3 * info["bytes"] / info["bytes_per_second"])
        assert info[f"vs_{'eager' if row['params']['contender'] == OURS else OURS}"] > 0
    assert f"{kinds[1]:34} {OURS}" in done.stdout
