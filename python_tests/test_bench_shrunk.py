import json
import subprocess
import sys
from pathlib import Path

import pytest
from searching.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.long
def test_a_table_of_times_sizes_and_memory(tmp_path):
    make_model(tmp_path / "model")
    command = [sys.executable, "-m", "bench.shrunk", "--model", str(tmp_path / "model"), "--seconds", "0"]
    command += ["--batches", "1,2", "--output", str(tmp_path / "results")]
    for lengths, more in (("16", ["--passes", "inference", "--no-sizes"]), ("8", [])):
        done = subprocess.run([*command, "--lengths", lengths, *more], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    record = json.loads(Path(done.stdout.strip()).read_text())
    assert record["gate"] == "green"
    cells = {(row["pass"], row["batch"], row["length"]) for row in record["rows"]}
    inference = {("inference", batch, length) for batch in (1, 2) for length in (8, 16)}
    assert cells == inference | {("training", 1, 8), ("training", 2, 8)}
    assert len(record["rows"]) == 5 * len(cells)
    assert all(row["ms"] > 0 and row["times_as_fast"] > 0 for row in record["rows"])
    assert all(row["times_as_fast"] == 1 for row in record["rows"] if row["contender"] == "whole")
    stored = {row["contender"]: row["bytes"] for row in record["sizes"]}
    assert stored["75% pruned"] < stored["50% pruned"] < stored["25% pruned"] < stored["whole"]
    assert all(row["training_mib"] >= 0 for row in record["sizes"])
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".png"}
    assert "| 2 x 16 |" in Path(done.stdout.strip()).with_suffix(".md").read_text()
