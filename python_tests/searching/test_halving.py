import dataclasses
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ticketops.errors import InputError, TrialError
from ticketops.reporting import read, report
from ticketops.searching import Listener, SearchConfig, Store, run_search
from ticketops.searching import run as running
from ticketops.searching.halving import dropped, judges
from ticketops.searching.plan import Trial
from ticketops.searching.progress import status

from .test_trial import reproducible
from .tiny import FIELDS


def plan_of(levels: int, seeds: int, kinds: tuple[str, ...] = ("winning", "random")) -> list[Trial]:
    plan = []
    for seed in range(seeds):
        plan.append(Trial("full", 0.0, seed, 0, 0))
        plan += [Trial(kind, (1 + level) / 100, seed, 1, 0) for kind in kinds for level in range(levels)]
    return plan


def run(plan: list[Trial], score: Any) -> dict[str, float | None]:
    """Trains trials in the order of the plan, as soon as their judges have ended and if they are not dropped."""
    ended: dict[str, float | None] = {}
    for trial in plan:
        assert {*judges(trial, plan)} <= {*ended} | {gone.id for gone in dropped(plan, ended)}
        if trial not in dropped(plan, ended):
            ended[trial.id] = score(trial)
    return ended


def test_half_of_the_levels_drop_out_each_time_the_seeds_double():
    plan = plan_of(levels=8, seeds=8)
    ended = run(plan, lambda trial: trial.sparsity)
    seeds = {
        (trial.kind, trial.sparsity): sum(
            each.id in ended for each in plan if (each.kind, each.sparsity) == (trial.kind, trial.sparsity)
        )
        for trial in plan
    }
    for kind in ("winning", "random"):
        assert [seeds[kind, (1 + level) / 100] for level in range(8)] == [1, 1, 1, 1, 2, 2, 4, 8]
    assert seeds["full", 0.0] == 8


@given(st.integers(1, 7), st.integers(1, 9), st.data())
def test_the_best_mean_stays_and_later_scores_change_no_decision(levels: int, seeds: int, data: st.DataObject):
    plan = plan_of(levels, seeds, ("winning",))
    scores = {trial.id: data.draw(st.sampled_from((0.1, 0.5, 0.9, None))) for trial in plan}
    ended = run(plan, lambda trial: scores[trial.id])
    gone = dropped(plan, ended)
    # Whatever is trained was decided when it started.
    assert {trial.id for trial in plan if trial not in gone} == {*ended}
    # All of it being known, as when a run goes on, the decisions are the same.
    assert dropped(plan, ended) == gone
    left = {trial.sparsity for trial in plan if trial.kind == "winning" and trial.seed == seeds - 1} - {
        trial.sparsity for trial in gone
    }
    assert left or levels == 0


def test_of_equal_levels_the_sparser_stays_and_failures_are_no_scores():
    plan = plan_of(levels=2, seeds=2, kinds=("winning",))
    assert {trial.sparsity for trial in dropped(plan, run(plan, lambda trial: 0.5))} == {0.01}
    failing = run(plan, lambda trial: None if trial.sparsity == 0.02 else 0.0)
    assert {trial.sparsity for trial in dropped(plan, failing)} == {0.02}


def test_nothing_is_dropped_before_all_its_judges_have_ended():
    plan = plan_of(levels=2, seeds=2)
    assert dropped(plan, {}) == set()
    assert dropped(plan, {"winning-0.01-seed-0": 0.5}) == set()
    last = plan[-1]
    assert judges(last, plan) == ["winning-0.01-seed-0", "winning-0.02-seed-0"]
    assert judges(plan[1], plan) == []


class Heard(Listener):
    def __init__(self) -> None:
        self.ran: list[str] = []
        self.gone: list[str] = []

    def finished(self, trial: Any, record: Any) -> None:
        self.ran.append(trial.id)

    def dropped(self, trial: Any) -> None:
        self.gone.append(trial.id)


@pytest.fixture
def config(inputs: dict[str, str], tmp_path: Path) -> SearchConfig:
    fields = {**FIELDS, "sparsities": "0.25,0.5,0.75", "kinds": "winning,random", "epochs": 1}
    return SearchConfig(**inputs, **fields, seeds=3, report_fraction=0.5, halving=True, output=str(tmp_path / "run"))


def test_a_search_trains_fewer_trials_says_so_and_can_be_completed(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
):
    heard = Heard()
    folder = run_search(config, heard)
    # One level drops out after one seed, another one after two.
    assert len(heard.ran) == 3 + 2 * (1 + 2 + 3)
    assert len(heard.gone) == 2 * (2 + 1)
    assert {*heard.ran} & {*heard.gone} == set()
    found = status(folder)
    assert (len(found.finished), found.left, found.failed) == (15, [], {})
    result = read(folder)
    assert result.unfinished == []
    assert result.selection.complete
    assert len(result.super_level.scores) == 3
    text = report(folder).read_text()
    assert "Successive halving" in text
    assert "Unfinished" not in text
    by_validation = {level.sparsity: level.scores[0] for level in result.selection.levels if level.kind == "winning"}
    first_out = min(by_validation, key=lambda sparsity: (by_validation[sparsity], sparsity))
    assert f"{first_out:g} after 1 seed" in text
    # It runs no trial again, and without halving the others are trained as they would have been.
    again = Heard()
    run_search(config, again)
    assert again.ran == []
    whole = Heard()
    run_search(dataclasses.replace(config, halving=False), whole)
    assert {*whole.ran} == {*heard.gone}
    assert "Successive halving" not in report(folder).read_text()
    alone = dataclasses.replace(config, halving=False, output=config.output + "-alone")
    records = {record["id"]: reproducible(record) for record in Store.read(run_search(alone)).records()}
    assert {record["id"]: reproducible(record) for record in Store.read(folder).records()} == records


def test_a_failed_trial_drops_its_level_and_the_others_go_on(config: SearchConfig, monkeypatch: pytest.MonkeyPatch):
    whole = running.run_trial

    def failing(setting: Any, trial: Trial, *arguments: Any, **keywords: Any) -> Any:
        if trial.id == "winning-0.5-seed-0":
            raise TrialError("no")
        return whole(setting, trial, *arguments, **keywords)

    monkeypatch.setattr(running, "run_trial", failing)
    heard = Heard()
    folder = run_search(config, heard)
    assert "winning-0.5-seed-1" in heard.gone
    assert [*status(folder).failed] == ["winning-0.5-seed-0"]
    assert read(folder).selection.complete


def test_what_cannot_be_halved_is_refused(inputs: dict[str, str], tmp_path: Path):
    with pytest.raises(InputError, match=r"halving=True keeps the sparsities .* kinds random has none .*: add winning"):
        SearchConfig(kinds="random", halving=True)
    with pytest.raises(InputError, match="halving 'yes' is neither true nor false"):
        SearchConfig(halving="yes")
    with pytest.raises(InputError, match=r"drops sparsities by the validation rows.*report_fraction=0.5"):
        run_search(SearchConfig(**inputs, **FIELDS, halving=True, output=str(tmp_path / "run")))
    assert not (tmp_path / "run").exists()
