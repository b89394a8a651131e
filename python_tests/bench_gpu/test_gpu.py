import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench.gpu", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_tiny_run_goes_all_the_way_and_claims_nothing(tmp_path):
    done = run("--tiny", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("*.json")
    record = json.loads(results.read_text())
    assert record["machine"]["device"] == "Triton interpreter on the CPU"
    assert record["tests"]["passed"]
    assert "ratios" not in record
    assert {row["bench"] for row in record["rows"]} == {"attention", "ffn", "projection", "step", "shrunk"}
    for row in record["rows"]:
        assert row["gate"] == "green"
        assert row["ms"] > 0, row
    assert len(list(tmp_path.glob("*.png"))) == 7


def test_tiny_results_stay_out_of_the_repository():
    done = run("--tiny")
    assert done.returncode == 2
    assert "--tiny needs --output" in done.stderr


def test_ratios_only_where_the_gate_is_green(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.__main__ import _ratios

    place = {"bench": "ffn", "workload": "w", "tokens": 1, "pass": "p"}
    ours = {**place, "contender": "ticketops", "ms": 2.0, "gate": "green"}
    others = [{**place, "contender": "a", "ms": 3.0, "gate": "green"}, {**place, "contender": "b", "ms": None}]
    assert [ratio["ratio"] for ratio in _ratios([ours, *others])] == [1.5]
    assert not _ratios([{**ours, "gate": "red: wrong"}, *others])
    assert not _ratios([{**ours, "ms": None}, *others])


def test_gate_turns_red(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench.gpu.measure import gate

    exact = torch.ones(3, dtype=torch.float64)
    plain = exact.float() * (1 + 1e-5)
    assert gate([plain], [plain], [exact]) == "green"
    assert gate([exact.float() * (1 + 4e-5)], [plain], [exact]).startswith("red")
    assert gate([plain * float("nan")], [plain], [exact]).startswith("red")
