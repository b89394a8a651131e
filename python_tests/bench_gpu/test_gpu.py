import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("step", "attention", "ffn", "residual", "encoders", "sharing", "shrunk")
STAGES = ("smoke", "step", "graphs", "tests", "sanitizer", *NAMES[1:], "tiles")


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.long
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures in earnest where there is a GPU")
def test_without_a_gpu_it_goes_all_the_way_on_tiny_shapes_and_claims_nothing(tmp_path):
    done = run("--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "no CUDA GPU was found" in done.stderr
    stem = "triton-interpreter-on-the-cpu"
    record = json.loads((tmp_path / f"{stem}.json").read_text())
    assert record["machine"]["device"] == "Triton interpreter on the CPU"
    passed = {name: stage["passed"] for name, stage in record["stages"].items()}
    assert passed == dict.fromkeys(STAGES, True) | dict.fromkeys(("smoke", "sanitizer", "tiles"))
    assert not {"ratios", "targets"} & set(record)
    for name in NAMES:
        stage = json.loads((tmp_path / f"{stem}-{name}.json").read_text())
        assert {row["bench"] for row in stage["rows"]} == {name} | ({"bert-large"} if name == "encoders" else set())
        assert {row["contender"] for row in stage["rows"]} > {"ticketops"}
        for row in stage["rows"]:
            assert row["gate"] == "green"
            assert row["ms"] > 0, row
    assert len(list(tmp_path.glob("*.png"))) == 12


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_stage_keeps_each_row_as_it_comes_and_runs_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu import __main__ as gpu

    def written():
        (path,) = tmp_path.glob("*-residual.json")
        return json.loads(path.read_text())

    def main(options, plugins):
        assert f"{ROOT}/bench/test_kernels.py::test_residual" in options
        row = {"bench": "residual", "workload": "w", "contender": "eager", "gate": "green", "ms": 1.0}
        for place, more in enumerate(({}, {"ms": None, "gate": None}, {"workload": "v", "gate": "red: wrong"})):
            assert len(written()["rows"]) == place
            assert written()["passed"] is None
            for when in ("setup", "call", "teardown"):
                report = SimpleNamespace(when=when, user_properties=[("row", {**row, **more})])
                plugins[0].pytest_runtest_logreport(report)
        return pytest.ExitCode.TESTS_FAILED

    monkeypatch.setattr(pytest, "main", main)
    record = gpu.measure_stage("residual", True, tmp_path)
    # That another's kernel refuses is no error.
    assert (record["passed"], record["summary"]) == (False, "v, eager: red: wrong")
    assert len(written()["rows"]) == 3
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "atention"])
    with pytest.raises(SystemExit):
        gpu.main()


def test_a_stage_that_takes_too_long_ends_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import _in_time

    assert _in_time([sys.executable, "-c", "raise SystemExit(3)"], 60) == 3
    note = tmp_path / "pid"
    start = f"sleep 600 & echo $! > {note}.part; mv {note}.part {note}; wait"
    assert _in_time(["sh", "-c", start], 1) is None
    for _ in range(100):
        stat = Path(f"/proc/{note.read_text().strip()}/stat")
        # Gone, or dead and not yet collected.
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("what the stage had started runs on")


@pytest.mark.long
def test_options_of_each_stage_select_tests(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import BENCHES

    assert tuple(BENCHES) == NAMES
    for options in BENCHES.values():
        command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
        assert "[" in done.stdout


def test_ratios_need_every_check_of_the_same_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu import __main__ as gpu
    from bench.gpu import machine as described
    from bench.gpu import plots

    machine = {"device": "A GPU", "commit": "c0ffee"}
    monkeypatch.setattr(described, "machine", lambda dtype: machine)
    monkeypatch.setattr(plots, "draw", lambda *_: [])

    def stage(name, passed=True, **others):
        found = {"stage": name, "passed": passed, "summary": "", "machine": machine} | others
        (tmp_path / f"a-gpu-{name}.json").write_text(json.dumps(found))

    for name in gpu.CHECKS:
        stage(name)
    assert gpu.merge(False, tmp_path)["ratios"] == []
    stage("tests", machine={**machine, "commit": "beef"})
    assert gpu.merge(False, tmp_path)["ratios_withheld"] == "not green at this commit: tests"
    stage("tests", passed=False)
    assert "ratios" not in gpu.merge(False, tmp_path)


def row(contender="ticketops", gate="green", ms=2.0, bench="attention", vs=None):
    place = {"bench": bench, "workload": "lengths of rte, batch 3", "tokens": 1, "pass": "forward+backward"}
    return {**place, "contender": contender, "gate": gate, "ms": ms, "vs": vs or {}}


def test_ratios_only_where_the_gate_is_green(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import _ratios

    others = [row("eager", vs={"ticketops": 0.7}), {"contender": "flex", "ms": None, "gate": None}]
    found = _ratios([row(vs={"eager": 1.5, "floor": 0.4}), *others])
    assert [(each["against"], each["ratio"]) for each in found] == [("eager", 1.5), ("floor", 0.4)]
    assert not _ratios([row(gate="red: wrong", vs={"eager": 1.5}), *others])
    assert not _ratios([row(ms=None), *others])


def test_targets_are_held_against_the_fastest_rival(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import TARGETS, _verdicts

    recorded = "ticketops, importance"
    rows = [row(recorded, vs={"flex": 2.0, "sdpa math": 1.25, "varlen": 1.1, "ticketops": 0.99})]
    rows += [
        row(recorded, bench=bench, vs={"sdpa": 3.1, "compile": 1.6, "reduce-overhead": 1.4, "floor": 0.34})
        for bench in ("step", "bert-large")
    ]
    verdicts = {verdict["target"]: verdict for verdict in _verdicts(rows)}
    assert len(verdicts) == len(TARGETS)
    padded = verdicts["attention, real lengths: the best on padded"]
    assert padded["ratios"] == {"lengths of rte, batch 3, 1 tokens": 1.25}
    assert padded["reached"] is False
    assert verdicts["attention, real lengths: the best on packed"]["reached"] is True
    assert verdicts["attention: importance costs at most 2 %"]["reached"] is True
    # A third of sdpa's wall clock, two thirds of the better torch.compile's, three times the floor.
    for name in ("step", "step of BERT-large"):
        reached = {
            rival: verdicts[f"{name}: {rival}"]["reached"]
            for rival in ("transformers + sdpa", "transformers + the better torch.compile", "at most 3 times the floor")
        }
        assert list(reached.values()) == [True, False, True]
        assert verdicts[f"{name}, in CUDA graphs: transformers + sdpa"]["reached"] is None
    # Nothing measured, nothing claimed.
    assert verdicts["FFN: torch.compile"]["reached"] is None
    red = [row(recorded, "red: wrong", vs={"flex": 2.0})]
    assert all(verdict["reached"] is None for verdict in _verdicts(red))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_kernels_are_timed_on_the_gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.conftest import gpu_facts, kernel_seconds

    x = torch.ones(1 << 20, device="cuda")
    assert kernel_seconds(lambda: x.mul_(2), x.device) > 0
    assert gpu_facts(lambda: x.mul_(2), 1)["gpu_ms"] > 0


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="measures in earnest where there is a GPU")
def test_tiles_are_timed_on_a_gpu_only(tmp_path):
    command = [sys.executable, "-m", "bench.gpu.tiles", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (2, "bench.gpu.tiles needs a CUDA GPU")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_timed_tiles_are_among_the_candidates_that_were_timed(monkeypatch):
    """What the table says that a timing has chosen, the file that it names has a timing of."""
    monkeypatch.syspath_prepend(ROOT)
    from ticketops.ops import triton_configs

    attention = triton_configs.ATTENTION[9, 2, 64]
    entries = {
        "forward_kernel": list(attention.forward.values()),
        "row_backward_kernel": list(attention.row_backward),
        "dq_kernel": [attention.dq, attention.short[0]],
        "dkdv_kernel": [attention.dkdv, attention.short[1]],
        "backward_kernel": [triton_configs.FFN, triton_configs.norm_backward(768)],
    }
    for kernel, tiles in entries.items():
        for tile in tiles:
            if tile.timed is not None:
                rows = json.loads((ROOT / "bench" / "results" / tile.timed).read_text())["rows"]
                numbers = ("rows", "columns", "warps", "stages", "registers")
                wanted = {name: getattr(tile, name) for name in numbers}
                assert any(
                    row["kernel"] == kernel
                    and row["ms"] is not None
                    and {name: row["tile"][name] for name in numbers} == wanted
                    for row in rows
                ), (kernel, tile)
