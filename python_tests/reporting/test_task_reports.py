"""Reports of shares and transfers, from stores that no training has filled."""

import csv
from pathlib import Path

import pytest

from ticketops.errors import StoreError
from ticketops.reporting import read, report
from ticketops.searching.sharing_plan import SINGLE, TaskTicket
from ticketops.searching.transfer_plan import SCORES
from ticketops.tickets import chance_jaccard

from .made_up import TASKS, make_share, make_transfer
from .test_report import png_size


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_a_share_is_reported_by_arm_and_task_with_paired_differences(tmp_path: Path, real_figures: None):
    store = make_share(tmp_path / "run")
    text = report(store.folder).read_text()
    assert (
        "Ticket sharing averages 83.0 ± 1.0 over the tasks: it beats plain multi-task training, +2.0 ± 0.0 points over "
        "3 seeds (95 % interval +2.0 to +2.0 on these rows, corrected for 2 arms); it beats random tickets of the same "
    ) in text
    assert "Scored on 10,000 rows of validation of rte, 10,000 rows of validation of stsb." in text
    assert "Warning" not in text
    assert "| shared, each task its ticket | 83.0 ± 1.0 | 83.0 ± 1.0 | 83.0 ± 1.0 | 3 |" in text
    assert "| one model a task, full | 71.0 ± 1.0 | 71.0 ± 1.0 | 71.0 ± 1.0 | 3 |" in text
    assert "| shared, random tickets | -1.0 ± 0.0 | -1.0 ± 0.0 | -1.0 ± 0.0 |" in text
    assert "(rte: accuracy, stsb: pearson)" in text
    assert f"ticketops share --model m --tasks rte,stsb --output {store.folder} --seeds 3" in text
    assert "rte feed, stsb feed" in text
    assert "time: 22 s in 9 trials" in text
    for name in ("sharing.png", "overlap.png", "layers.png"):
        assert min(png_size(store.folder / name)) > 300
        assert f"]({name})" in text
    table = rows(store.folder / "results.csv")
    assert len(table) == 9 * 2
    assert [row["id"] for row in table[::2]] == [trial.id for trial in store.plan]
    assert {row["metric"] for row in table} == set(TASKS.values())
    assert {row["task"]: row["validation_pearson"] for row in table}["rte"] == ""


def test_overlap_and_agreement_stand_beside_chance(tmp_path: Path):
    store = make_share(tmp_path / "run")
    text = report(store.folder).read_text()
    pairs = rows(store.folder / "overlap.csv")
    # Six tickets of two tasks: 15 pairs, 9 of them of two tasks.
    assert len(pairs) == 15
    between = [row for row in pairs if row["task"] != row["other_task"]]
    assert len(between) == 9
    one, other = store.ticket(TaskTicket("rte", 0)), store.ticket(TaskTicket("stsb", 2))
    assert one is not None
    assert other is not None
    row = next(row for row in between if (row["seed"], row["other_seed"]) == ("0", "2"))
    assert float(row["jaccard"]) == pytest.approx(one.jaccard(other))
    assert (float(row["chance"]), float(row["chance_std"])) == pytest.approx(chance_jaccard(one, other))
    mean = sum(float(row["jaccard"]) for row in between) / 9
    assert f"Tickets of two tasks share {100 * mean:.1f} % of what either keeps (mean of 9 pairs)" in text
    assert "Tickets of two seeds of one task share" in text
    layers = rows(store.folder / "layers.csv")
    assert len(layers) == 2 * 3 * 3
    kept = [int(row["heads_kept"]) for row in layers if (row["task"], row["seed"]) == ("stsb", "2")]
    assert kept == other.head_mask.sum(1).tolist()


def test_noise_is_no_finding_of_a_share_and_a_report_split_reports(tmp_path: Path):
    store = make_share(tmp_path / "none", gain=0.0)
    assert "no difference is shown to plain multi-task training, +0.0 ± 0.0" in report(store.folder).read_text()
    for trial in store.plan:
        record = store.record(trial)
        assert record is not None
        noise = {"tickets": (0.05, 0.01, 0.02), "random": (0.9, 0.8, 0.7)}.get(trial.kind, (0.0,) * 3)[trial.seed]
        for task in record["tasks"].values():
            task["score"] = 0.42 - noise if trial.kind == "random" else 0.4 + noise
        store.write_record(trial, record)
    text = report(store.folder).read_text()
    # Its mean is larger than its standard deviation, which shows nothing.
    assert "no difference is shown to plain multi-task training, +2.7 ± 2.1 points over 3 seeds" in text
    assert 'On rte, "shared, no tickets" has not been shown to learn more than a constant answer' in text
    text = report(make_share(tmp_path / "held", report_fraction=0.5).folder).read_text()
    assert "| shared, each task its ticket | 73.0 ± 1.0 |" in text
    assert "| one model a task, full | 60.0 ± 0.0 |" in text
    assert "the split `report`, held out of it or the data's own test split, reports" in text


def test_a_task_called_average_is_told_from_the_average_of_all(tmp_path: Path):
    store = make_share(tmp_path / "run", metrics={"average": "accuracy", "stsb": "pearson"})
    for trial in store.plan:
        record = store.record(trial)
        assert record is not None
        record["tasks"]["average"]["score"] -= 0.2
        store.write_record(trial, record)
    header, *body = read(store.folder).table
    assert header == ["arm", "average", "stsb", "task average", "seeds"]
    assert body[2] == ["shared, each task its ticket", "63.0 ± 1.0", "83.0 ± 1.0", "73.0 ± 1.0", "3"]
    text = report(store.folder).read_text()
    assert "| arm | average | stsb | task average |" in text
    assert "Ticket sharing averages 73.0 ± 1.0 over the tasks" in text


def test_an_unfinished_share_is_reported_with_what_is_missing(tmp_path: Path):
    store = make_share(tmp_path / "run", leave_out=("tickets-seed-0", "plain-seed-1", "random-seed-2"))
    text = report(store.folder).read_text()
    assert "3 of 9 trials are missing (tickets-seed-0, plain-seed-1, random-seed-2)" in text
    # Seed 2 alone has both.
    assert (
        "one seed gives no verdict (--seeds 5 allows one) against plain multi-task training, +2.0 points with one seed"
    ) in text
    bare = make_share(tmp_path / "bare", leave_out=tuple(trial.id for trial in store.plan))
    assert "9 of 9 trials are missing" in report(bare.folder).read_text()
    one = make_share(tmp_path / "one", seeds=1, arms="tickets")
    text = report(one.folder).read_text()
    assert "Ticket sharing averages 82.0 over the tasks. Scored on" in text


def test_a_transfer_is_reported_rung_by_rung(tmp_path: Path, real_figures: None):
    store = make_transfer(tmp_path / "run")
    text = report(store.folder).read_text()
    assert "The super ticket against the full model on the target film: with 0.1 % (1 row) it beats the full " in text
    assert "model, +2.0 ± 0.0 points over 2 seeds (95 % interval +1." in text
    assert "corrected for 4 comparisons); with 1 % (10 rows) it beats" in text
    assert "; with 100 % (1,000 rows) it is worse than the full model, -1.0 ± 0.0 points over 2 seeds" in text
    assert "Scored on 10,000 rows of the split validation." in text
    # Four rungs, at each of which the better of two levels is taken.
    assert "corrected for 8 comparisons" in text
    one = report(make_transfer(tmp_path / "one", seeds=1).folder).read_text()
    assert "with 1 % (10 rows) no verdict from one seed (--seeds 5 allows one), +2.0 points with one seed" in one
    target = one.partition("on the source sst2")[0]
    assert "beats" not in target
    assert "worse" not in target
    assert "| target | 10 | 100 | 2 | 61.5 ± 0.7 | 63.5 ± 0.7 | +2.0 ± 0.0 | 0.25 |" in text
    assert "| source | 10 | 100 | 2 | 61.5 ± 0.7 | 63.5 ± 0.7 | +2.0 ± 0.0 | 0.25 |" in text
    # The search itself is the last rung of the source's ladder.
    assert "| source | 100 | 1000 | 2 | 80.0 ± 0.0 | 81.0 ± 0.0 | +1.0 ± 0.0 | 0.25 |" in text
    assert "source food, target feed" in text
    assert min(png_size(store.folder / "ladder.png")) > 300
    table = rows(store.folder / "results.csv")
    assert len(table) == 2 * (4 * 2 + 3 * 3)
    assert [row["id"] for row in table] == [trial.id for trial in store.plan]
    assert {row["ladder"] for row in table} == {"target", "source"}
    assert read(store.folder).table[0][0] == "ladder"


def test_damage_is_an_error_of_these_reports_too(tmp_path: Path):
    for store, scores in ((make_share(tmp_path / "share"), SINGLE), (make_transfer(tmp_path / "transfer"), SCORES)):
        for path in (store.folder / scores, store.record_path(store.plan[1])):
            path.write_text(path.read_text()[:100])
            with pytest.raises(StoreError, match=f"{path}.*delete it"):
                report(store.folder)
            path.unlink()
