"""What `pytest bench` measures and reports, and that it reports nothing of what is wrong."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bench import conftest, contenders, lengths
from bench.conftest import in_turns
from bench.contenders import BACKEND, HALF_KEPT, HALF_MASKED, IMPORTANCE, OURS, Shape

ROOT = Path(__file__).resolve().parents[1]
SHAPE = Shape(lengths=(5, 1, 3), channels=24, heads=2, neurons=40, layers=2)


def test_contenders_take_turns_and_each_comes_first_equally_often():
    called: list[str] = []
    runs, machine = ({name: lambda name=name: called.append(name) for name in names} for names in ("abc", "x"))
    times = in_turns(runs, machine, least=3, seconds=0.0)
    # One turn to warm up.
    assert "".join(called) == "cabx" + "abcx" + "bcax" + "cabx"
    assert {name: len(each) for name, each in times.items()} == dict.fromkeys("abcx", 3)


def verdicts(problem):
    return {name: problem.verdict(name) for name in problem.names(contenders.PASSES[1])}


def wrong(problem):
    def bind(leaves, p):
        call = problem.ours(leaves, p)
        return lambda: call() * 1.1

    return bind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", contenders.OPS)
def test_all_contenders_compute_the_same(op, dtype):
    if op == "encoder" and BACKEND == "reference":
        pytest.skip("whole layers are one op with native or Triton kernels only")
    problem = contenders.make(op, SHAPE, dtype, compiles=False)
    assert set(verdicts(problem).values()) == {"green"}

    found = verdicts(replace(problem, ours=wrong(problem)))
    assert found.pop(OURS).startswith("red: result 0")
    assert set(found.values()) == {"green"}
    for name, variant in problem.variants.items():
        changed = replace(problem, variants={**problem.variants, name: replace(variant, ours=wrong(variant))})
        assert changed.verdict(name).startswith("red: result 0")
    for kind in contenders.PASSES:
        for name in problem.names(kind):
            problem.run(name, kind)()


@pytest.mark.parametrize("name", [HALF_MASKED, HALF_KEPT, IMPORTANCE])
def test_what_is_masked_kept_or_recorded_is_checked(name):
    shape = replace(SHAPE, heads=4)
    variant = contenders.attention(shape).variants[name]
    assert (name == HALF_KEPT) == (variant.shape.heads == 2)
    leaves = [x.requires_grad_() for x in [*variant.tokens, *variant.sinks]]
    out = variant.ours(leaves, 0.0)()
    if name == HALF_MASKED:
        assert not out[:, :2].any()
        assert out[:, 2:].all()
    if name == IMPORTANCE:
        *_, importance = torch.autograd.grad(out.square().sum() / 2, leaves)
        rows = out.detach().square().split(list(SHAPE.lengths))
        torch.testing.assert_close(importance, torch.stack([row.sum((0, 2)) for row in rows]))
        other = replace(variant, ours=lambda leaves, p: variant.ours([*leaves[:3], 2 * leaves[3]], p))
        # The last result is the importance.
        assert other.verdict(OURS).startswith("red: result 4 ")


@pytest.mark.skipif(BACKEND == "reference", reason="whole layers are one op with native or Triton kernels only")
def test_sums_of_terms_of_both_signs_may_err_as_their_terms_do():
    """Gradients of the queries are differences that cancel: 0.2 of terms of some hundreds."""
    shape = Shape(lengths.draw("rte", 32), 24, 12, 96, 1)
    problem = contenders.make("encoder", shape, torch.bfloat16, compiles=False)
    assert verdicts(problem) == dict.fromkeys((OURS, "sdpa", "eager"), "green")


def test_rounded_arithmetic_errs_by_the_size_of_terms():
    x = torch.tensor([1e4, 1.0, -1e4], dtype=torch.float64)
    eps = torch.finfo(torch.float32).eps
    with contenders.Rounded(torch.float32):
        total, product, same = x.sum(), x * 3, x.view(3, 1)
    assert 0 < abs(total - 1) <= eps * (x.abs().sum() + 2)
    assert ((product / x / 3 - 1).abs() <= eps * 1.001).all()
    assert same.data_ptr() == x.data_ptr()
    with contenders.Rounded(torch.bfloat16):
        # Products of half precision sum in float32.
        total, halves = x.sum(), x * 3
    assert abs(total - 1) < 0.02
    assert (halves / x / 3 - 1).abs().max() > eps


def test_gate_turns_red():
    exact = torch.ones(3, dtype=torch.float64)
    plain = exact.float() * (1 + 1e-5)
    assert contenders.gate([plain], [exact], [plain]) == "green"
    assert contenders.gate([exact.float() * (1 + 4e-5)], [exact], [plain]).startswith("red")
    assert contenders.gate([exact.float() * (1 + 4e-5)], [exact], [plain], [exact * (1 + 3e-5)]) == "green"
    assert contenders.gate([plain * float("nan")], [exact], [plain]).startswith("red")


def config(**options):
    defaults = {"lengths": "rte", "rows": "16", "max_length": 128, "tokens": None, "tiny": False, "rounds": 1}
    defaults |= {"benchmark_disable": True, "compile": False, "channels": 24, "heads": 2, "layers": 1, "dropout": 0.1}
    found = {**defaults, **options}
    return SimpleNamespace(getoption=lambda name: found[name.removeprefix("--").replace("-", "_")])


def test_workloads_are_rows_of_tasks_or_of_even_lengths():
    some = conftest._workloads(config(lengths="rte,64", rows="2,3"))
    assert [each.name for each in some] == [
        *("lengths of rte, batch 2", "2 x 64"),
        *("lengths of rte, batch 3", "3 x 64"),
    ]
    assert some[1].draw() == (64, 64)
    assert max(some[0].draw(seed=1)) <= 128
    by_tokens = conftest._workloads(config(lengths="sst2,512", tokens="4096"))
    assert by_tokens[1].rows == 8
    assert sum(by_tokens[0].draw()) == pytest.approx(4096, rel=0.1)
    for wrong in ({"lengths": "rt"}, {"lengths": "0"}, {"rows": "0"}, {"rows": "1,"}, {"tokens": "-4"}):
        with pytest.raises(pytest.UsageError, match=str(*wrong.values()).strip(",")):
            conftest._workloads(config(**wrong))


def test_a_contender_that_fails_stops_no_other(monkeypatch):
    class Made:
        steps, warmups, kernels, element_size, shape, work = 2, 1, False, 4, SHAPE, {"forward": [contenders.Work(8, 1)]}

        def names(self, kind):
            return [OURS, "broken", "wrong"]

        def verdict(self, name):
            return "red: wrong" if name == "wrong" else "green"

        def run(self, name, kind):
            if name == "broken":
                raise ValueError("refuses\nthis")
            return lambda: None

    monkeypatch.setattr(contenders, "make", lambda *_: Made())
    groups = conftest.Groups(config())
    workload = conftest.Workload("rte", 2)
    found = groups("ffn", workload, "fp32", "forward")
    assert set(found["times"]) == {OURS, "wrong"}
    assert found["failures"] == {"broken": "ValueError: refuses"}
    assert found["verdicts"] == {OURS: "green", "broken": "green", "wrong": "red: wrong"}
    rates = found["info"]["operations_per_second"], found["info"]["bytes_per_second"]
    assert found["info"]["floor_ms"] == pytest.approx(1e3 * max(8 / rates[0], 4 / rates[1]))
    assert groups("ffn", workload, "fp32", "forward") is found


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
    assert contenders.attention(SHAPE).work["forward"] == [(2 * 2 * 35 * 24, 4 * 9 * 24)]
    assert contenders.ffn(SHAPE).work["forward"] == [(2 * 2 * 9 * 24 * 40, 2 * 9 * 24 + 2 * 24 * 40)]
    made = contenders.Step(SHAPE.config(), [SHAPE.lengths], "fp32", shape=SHAPE)
    _, optimizer = made.work["forward+backward"]
    # AdamW, for which a step waits until it has all gradients.
    assert optimizer == (0, 7 * sum(p.numel() for p in made._contender(OURS).model.parameters()))


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
    kinds = [f"residual, lengths of rte, batch 2, {kind}, fp32" for kind in contenders.PASSES]
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
    assert f"{kinds[1]:50} {OURS}" in done.stdout
