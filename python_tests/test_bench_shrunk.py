import json
import subprocess
import sys
from pathlib import Path

import pytest
from searching.tiny import make_model

from bench import shrunk
from bench.step import exit_code

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
    assert all(len(row["times_as_fast_interval"]) == 2 for row in record["rows"] if row["contender"] != "whole")
    assert all(row["times_as_fast"] == 1 for row in record["rows"] if row["contender"] == "whole")
    stored = {row["contender"]: row["bytes"] for row in record["sizes"]}
    assert stored["75% pruned"] < stored["50% pruned"] < stored["25% pruned"] < stored["whole"]
    assert all(row["training_mib"] >= 0 for row in record["sizes"])
    assert {path.suffix for path in (tmp_path / "results").iterdir()} == {".json", ".md", ".png"}
    assert "| 2 x 16 |" in Path(done.stdout.strip()).with_suffix(".md").read_text()


def test_a_ratio_stands_only_where_its_interval_excludes_1():
    row = {"contender": "25% pruned", "times_as_fast": 1.1}
    assert shrunk.speed({**row, "times_as_fast_interval": [1.05, 1.15]}) == "1.10x, 1.05x to 1.15x"
    assert shrunk.speed({**row, "times_as_fast_interval": [0.95, 1.25]}) == "no difference shown, 0.95x to 1.25x"
    assert shrunk.speed(row) == "1.10x \\*"


def test_a_model_that_is_not_there_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    command = ["bench.shrunk", "--model", str(tmp_path / "none"), "--output", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    assert exit_code(shrunk.main) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: model ")
    assert str(tmp_path / "none") in line
