import json
import subprocess
import sys
from pathlib import Path

import pytest
from searching.tiny import make_model, make_task

from bench import step

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "bench.step", "--no-compile", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@pytest.mark.long
def test_one_json_object_with_medians_and_ratios(tmp_path):
    model, _ = make_model(tmp_path / "model"), make_task(tmp_path / "data" / "words")
    small = ("--batch-size", 8, "--batches", 2, "--rounds", 2, "--max-length", 16)
    done = run("--data", tmp_path / "data", "--task", "words", "--model", model, *small, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["full_vs_compile"] is None
    seconds = result["seconds"]
    inference = {f"inference_{name}" for name in ("sdpa", "full", "ticket50", "matmul_floor")}
    steps = {"sdpa", "full", "importance", "packed", "ticket50", "applied50", "switching"}
    steps |= {prefix + part for prefix in ("", "ticket50_") for part in ("matmul_floor", "optimizer")}
    assert set(seconds) == steps | inference
    assert all(0 < each["q20"] <= each["median"] <= each["q80"] for each in seconds.values())
    for ratio in (
        "full_vs_sdpa",
        "packed_vs_full",
        "ticket50_vs_full",
        "ticket50_vs_full_of_floors",
        "inference_vs_sdpa",
        "ticket50_inference_vs_sdpa",
    ):
        assert result[ratio] > 0
    assert result["importance_overhead"] > -1
    assert result["switching_overhead"] > -1
    assert result["steps_timed"] == 4
    assert result["real_tokens"] < result["padded_tokens"]
    assert str(tmp_path) not in done.stdout


@pytest.mark.parametrize(
    ("size", "rows", "remedy"),
    [(32, 768, "--batches to 1"), (16, 384, "--batches to 2"), (64, 1536, "--batch-size to 32")],
)
def test_too_few_rows_is_one_line(tmp_path, size, rows, remedy, monkeypatch, capsys):
    make_task(tmp_path / "words")
    words = ["--data", str(tmp_path), "--task", "words", "--batch-size", str(size)]
    monkeypatch.setattr(sys, "argv", ["bench.step", "--no-compile", *words])
    assert step.main() == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: words has 64 training rows of {rows}: lower {remedy}"
