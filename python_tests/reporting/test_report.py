import csv
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from test_text import HOSTILE

from ticketops.errors import InputError, StoreError
from ticketops.reporting import report
from ticketops.searching import Store, Trial

from .made_up import make_store


def png_size(path: Path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", content[16:24])


def test_report_names_the_finding_its_spread_and_how_to_reproduce_it(tmp_path: Path, real_figures: None):
    store = make_store(tmp_path / "run")
    path = report(store.folder)
    text = path.read_text()
    assert path == store.folder / "report.md"
    assert "beats the full model: sparsity 0.25 (3 heads and 0 FFNs pruned, 97.0 % of the weights left)" in text
    assert "accuracy 83.0 ± 1.0 against 81.0 ± 1.0, +2.0 ± 0.0 points over 3 seeds (95 % interval +1.8 to +2.2 " in text
    assert "on these rows, corrected for 2 levels). Of the same size, random ones 61.0 ± 1.0 and losing ones" in text
    assert "Scored on 1,000 rows of the split validation, which selected too." in text
    assert "Warning" not in text
    assert "| winning ★ | 0.25 | 3 | 0 | 97.0 | 95.0 | 3 | 83.0 ± 1.0 |" in text
    assert "same split, `validation` (dev), both selects" in text
    assert "one constant answer scores 50.0" in text
    assert "tickets/winning-0.25-seed-2.safetensors" in text
    assert store.config.command() in text
    for words in ("python 3", "device cpu", "feed", "beef", "42 s in 21 trials", "sparsities: [0.25, 0.5]"):
        assert words in text
    assert "Unfinished" not in text
    for name in ("phase_transition.png", "importance.png"):
        assert f"({name})" in text
        assert min(png_size(store.folder / name)) > 300


def test_what_keeps_models_is_part_of_how_to_reproduce_it(tmp_path: Path):
    store = make_store(tmp_path / "run")
    assert "--save-models" not in report(store.folder).read_text()
    store.model_path(store.plan[0]).mkdir(parents=True)
    text = report(store.folder).read_text()
    assert " --save-models\n" in text
    assert "save_models: true" in text


def test_results_have_one_row_a_trial(tmp_path: Path):
    store = make_store(tmp_path / "run")
    report(store.folder)
    with open(store.folder / "results.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(store.plan) == 21
    wanted = "task kind sparsity seed heads_pruned ffns_pruned weights_remaining split metric score"
    assert set(wanted.split()) <= rows[0].keys()
    assert (rows[0]["kind"], float(rows[0]["sparsity"]), float(rows[0]["weights_remaining"])) == ("full", 0.0, 1.0)
    assert [row["id"] for row in rows] == [trial.id for trial in store.plan]
    assert [float(row["score"]) for row in rows] == [record["score"] for record in store.records()]
    assert rows[0]["validation_f1"] == rows[0]["score"]


def rescored(store: Store, score: Callable[[Trial], float]) -> str:
    """The report after every trial's score was replaced."""
    for trial in store.plan:
        record = store.record(trial)
        if record is not None:
            store.write_record(trial, {**record, "score": score(trial)})
    return report(store.folder).read_text()


def test_a_loss_is_reported_as_a_loss_where_the_interval_excludes_0(tmp_path: Path):
    store = make_store(tmp_path / "run", gain=-0.03)
    text = report(store.folder).read_text()
    assert "The super ticket is worse than the full model: " in text
    assert "-3.0 ± 0.0 points over 3 seeds (95 % interval -3." in text
    noise = {"full": (0.0, 0.05, 0.0), "winning": (0.0, 0.0, 0.02)}
    text = rescored(store, lambda trial: 0.8 + noise.get(trial.kind, (0,) * 3)[trial.seed])
    assert "No difference shown between the super ticket and the full model" in text
    assert "worse" not in text


def test_noise_is_no_win(tmp_path: Path):
    store = make_store(tmp_path / "run")
    noise = {"full": (0.0, 0.05, 0.0), "winning": (0.03, 0.02, 0.05)}
    text = rescored(store, lambda trial: 0.8 + noise.get(trial.kind, (0,) * 3)[trial.seed])
    assert "No difference shown between the super ticket and the full model" in text
    assert "beats" not in text
    # One row of a thousand, in each seed alike.
    text = rescored(store, lambda trial: 0.8 + 0.001 * (trial.kind == "winning"))
    assert "No difference shown" in text


def test_one_seed_and_records_that_do_not_say_their_rows_give_no_verdict(tmp_path: Path):
    text = report(make_store(tmp_path / "one", seeds=1).folder).read_text()
    assert "No verdict from one seed (--seeds 5 allows one): sparsity 0.25 " in text
    assert "reaches accuracy 82.0 against 80.0, +2.0 points with one seed." in text
    assert "beats" not in text
    store = make_store(tmp_path / "old")
    for trial in store.plan:
        record = store.record(trial)
        assert record is not None
        store.write_record(trial, {name: record[name] for name in record if name not in ("rows", "constant_scores")})
    text = report(store.folder).read_text()
    assert "+2.0 ± 0.0 points over 3 seeds, without a spread to judge it by." in text
    assert "How many rows were scored is not in the records." in text
    assert "one constant answer scores 50.0 on `validation`" in text


def test_a_model_that_learned_nothing_is_named(tmp_path: Path):
    store = make_store(tmp_path / "run")
    text = rescored(store, lambda trial: {"full": 0.51, "winning": 0.6}.get(trial.kind, 0.5))
    assert "The full model has not been shown to learn more than a constant answer: its accuracy of 51.0 ± 0.0" in text
    assert "The super ticket has not" not in text


# No run has a name that is no text: its path is refused.
@pytest.mark.parametrize("name", [name for name in HOSTILE if "\udcff" not in name])
def test_names_from_files_are_text_in_the_report_and_its_table(name: str, tmp_path: Path):
    store = make_store(tmp_path / "run", model=name, task=name, notes={"validation": name})
    page = report(store.folder).read_text()
    page.encode()
    for block in re.findall(r"^(`{3,})\w*\n.*?\n\1$", page, re.DOTALL | re.MULTILINE):
        assert block
    prose = re.sub(r"^(`{3,})\w*\n.*?\n\1$", "", page, flags=re.DOTALL | re.MULTILINE)
    assert "<" not in prose
    assert "\x1b" not in page
    assert re.findall(r"\]\((.*?)\)", prose.replace("\\]", "")) == ["phase_transition.png", "importance.png"]
    assert prose.count("\n# ") == 0
    with open(store.folder / "results.csv", newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not any(cell.startswith(("=", "@")) or not cell.isprintable() for cell in cells)


def test_without_a_common_seed_there_is_no_finding(tmp_path: Path):
    left_out = ("full-seed-0", "full-seed-1", *(f"winning-{level}-seed-2" for level in (0.25, 0.5)))
    text = report(make_store(tmp_path / "run", leave_out=left_out).folder).read_text()
    assert "No super ticket yet: that takes the full model and a winning ticket of the same seed." in text
    assert "equals" not in text


def test_a_report_split_reports_and_both_splits_are_named(tmp_path: Path):
    text = report(make_store(tmp_path / "run", report_fraction=0.5).folder).read_text()
    assert "The split `validation` (dev) selects; the split `report`, 50 % of the validation rows" in text
    assert "reaches accuracy 78.0 ± 1.0 against 76.0 ± 1.0" in text
    assert "| 83.0 ± 1.0 | 78.0 ± 1.0 |" in text


def test_an_unfinished_search_is_reported_with_what_is_missing(tmp_path: Path):
    left_out = ("full-seed-1", "winning-0.25-seed-1", "losing-0.5-seed-2", *(f"winning-0.5-seed-{n}" for n in range(3)))
    text = report(make_store(tmp_path / "run", leave_out=left_out).folder).read_text()
    assert "6 of 21 trials are missing (winning-0.5-seed-0, full-seed-1, winning-0.25-seed-1" in text
    assert "provisional" in text
    assert "over 2 seeds" in text


def test_a_search_without_any_record_is_reported(tmp_path: Path):
    everything = tuple(trial.id for trial in make_store(tmp_path / "whole").plan)
    text = report(make_store(tmp_path / "run", leave_out=everything).folder).read_text()
    assert "21 of 21 trials are missing" in text


def test_rank_correlation_is_given_when_both_ways_were_taken(tmp_path: Path):
    text = report(make_store(tmp_path / "run", importance="both").folder).read_text()
    assert "Rank correlation of the clean pass with on-the-fly scores, heads: 0.900 ± 0.000." in text
    assert "FFNs: " not in text


def test_reporting_changes_nothing_else_and_can_be_repeated(tmp_path: Path):
    store = make_store(tmp_path / "run")
    first = report(store.folder).read_bytes()
    names = {path.name for path in store.folder.iterdir()}
    assert report(store.folder).read_bytes() == first
    assert {path.name for path in store.folder.iterdir()} == names


def test_damage_and_strange_folders_are_errors(tmp_path: Path):
    store = make_store(tmp_path / "run")
    path = store.record_path(store.plan[3])
    path.write_text(path.read_text()[:100])
    with pytest.raises(StoreError, match=f"{path}.*delete it"):
        report(store.folder)
    with pytest.raises(InputError, match="no ticketops folder"):
        report(tmp_path)


def test_report_says_what_the_super_ticket_costs(tmp_path: Path):
    store = make_store(tmp_path / "run")
    text = report(store.folder).read_text()
    assert "| parameters | 1,000 | 970 | 97.0 % |" in text
    assert "| MACs a token of 128 | 800 | 600 | 75.0 % |" in text
    assert "Times are medians" not in text
    rows = [{"batch": 32, "length": 128, "whole_ms": 30.0, "left_ms": 20.0}]
    store.write_latencies({"machine": {"processor": "some chip", "device_capability": None}, "rows": rows})
    text = report(store.folder).read_text()
    # A file of a version that kept medians alone.
    assert "| ms for a batch of 32 x 128 tokens | 30.0 | 20.0 | not judged: the turns were not kept |" in text
    assert "On processor some chip." in text
    turns = [[30 + 0.1 * n, 20 - 0.1 * n] for n in range(9)]
    rows = [{**rows[0], "whole_quartiles_ms": [30.2, 30.6], "left_quartiles_ms": [19.4, 19.8], "turns": turns}]
    rows.append({**rows[0], "batch": 1, "turns": [[20, 30], [30, 20], [21, 29], [28, 21], [20, 28]]})
    store.write_latencies({"machine": {"processor": "some chip"}, "rows": rows})
    text = report(store.folder).read_text()
    assert "| 30.0 (30.2 to 30.6) | 20.0 (19.4 to 19.8) | 1.55x as fast (" in text
    assert re.search(r"batch of 1 x 128 tokens \|.*\| no difference shown \(0\.\d\dx to \d\.\d\dx\) \|", text)
    for damaged in ({"rows": rows}, {"machine": {}, "rows": [{"batch": 32}]}, {"machine": {}, "rows": [3]}):
        store.write_latencies(damaged)
        with pytest.raises(StoreError, match=r"latency.json is damaged .*: delete it"):
            report(store.folder)
