import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
BENCHES = ("step", "attention", "ffn", "residual", "encoders", "sharing", "shrunk")
STAGES = ("smoke", "step", "graphs", "tests", "sanitizer", *BENCHES[1:], "tiles")


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
    for name in BENCHES:
        stage = json.loads((tmp_path / f"{stem}-{name}.json").read_text())
        assert {row["bench"] for row in stage["rows"]} == {name}
        for row in stage["rows"]:
            assert row["gate"] == "green"
            assert row["ms"] > 0, row
    assert len(list(tmp_path.glob("*.png"))) == 9


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_a_stage_keeps_each_row_as_it_comes_and_runs_alone(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu import __main__ as gpu
    from bench.gpu import residual

    def rows(setting):
        setting.keep({"bench": "residual", "workload": "w", "gate": "green", "ms": 1.0})
        (path,) = tmp_path.glob("*-residual.json")
        assert len(json.loads(path.read_text())["rows"]) == 1
        assert json.loads(path.read_text())["passed"] is None
        setting.keep({"bench": "residual", "workload": "v", "gate": "red: wrong", "ms": 1.0})

    monkeypatch.setattr(residual, "rows", rows)
    record = gpu.measure_stage("residual", True, tmp_path)
    assert (record["passed"], record["summary"]) == (False, "v: red: wrong")
    monkeypatch.setattr(sys, "argv", ["bench.gpu", "atention"])
    with pytest.raises(SystemExit):
        gpu.main()


def test_ratios_need_every_check_of_the_same_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu import __main__ as gpu
    from bench.gpu import measure, plots

    machine = {"device": "A GPU", "commit": "c0ffee"}
    monkeypatch.setattr(measure, "machine", lambda setting: machine)
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


def test_ratios_only_where_the_gate_is_green(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import _ratios

    place = {"bench": "ffn", "workload": "w", "tokens": 1, "pass": "p"}
    ours = {**place, "contender": "ticketops", "ms": 2.0, "gate": "green"}
    others = [{**place, "contender": "a", "ms": 3.0, "gate": "green"}, {**place, "contender": "b", "ms": None}]
    assert [ratio["ratio"] for ratio in _ratios([ours, *others])] == [1.5]
    assert not _ratios([{**ours, "gate": "red: wrong"}, *others])
    assert not _ratios([{**ours, "ms": None}, *others])


def test_targets_are_held_against_the_fastest_rival(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import TARGETS, _verdicts

    place = {"bench": "attention", "workload": "lengths of rte, batch 3", "tokens": 1, "pass": "forward+backward"}

    def row(contender, ms, gate="green"):
        return {**place, "contender": contender, "ms": ms, "gate": gate}

    rows = [row("ticketops", 2.0), row("flex", 4.0), row("sdpa math", 2.5), row("sdpa flash", None)]
    verdicts = {verdict["target"]: verdict for verdict in _verdicts(rows)}
    assert len(verdicts) == len(TARGETS)
    padded = verdicts["attention, real lengths: the best on padded"]
    assert padded["ratios"] == {"lengths of rte, batch 3, 1 tokens": 1.25}
    assert padded["reached"] is False
    # Nothing measured, nothing claimed.
    assert verdicts["FFN: torch.compile"]["reached"] is None
    red = [row(contender, 1.0, "red: wrong") for contender in ("ticketops", "flex")]
    assert all(verdict["reached"] is None for verdict in _verdicts(red))


def test_gate_turns_red(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.measure import gate

    exact = torch.ones(3, dtype=torch.float64)
    plain = exact.float() * (1 + 1e-5)
    assert gate([plain], [plain], [exact]) == "green"
    assert gate([exact.float() * (1 + 4e-5)], [plain], [exact]).startswith("red")
    assert gate([plain * float("nan")], [plain], [exact]).startswith("red")


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
