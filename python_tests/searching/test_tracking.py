"""Trackers, by a made-up one: what they are told, and that nothing else changes."""

from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import TrainerCallback

from ticketops.errors import InputError
from ticketops.searching import SearchConfig, Setting, ShareConfig, ShareTrial, TransferConfig, tracking
from ticketops.searching.plan import Trial
from ticketops.searching.sharing import load_settings, run_share_trial
from ticketops.searching.tracking import Run
from ticketops.searching.trial import run_trial

from .test_trial import reproducible


class Told(TrainerCallback):
    """Writes down what a tracker is told."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.logs: list[tuple[int, dict[str, float]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.names += [args.run_name, args.project]

    def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
        self.logs.append((state.global_step, dict(logs)))

    def of(self, name: str) -> dict[int, float]:
        return {step: logs[name] for step, logs in self.logs if name in logs}


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    callback = Told()
    monkeypatch.setattr(tracking, "_PACKAGES", {"wandb": ("json",), "trackio": ("no_such_package",)})
    monkeypatch.setattr(transformers.integrations, "get_reporting_integration_callbacks", lambda _: [lambda: callback])
    return callback


def test_a_trial_reports_its_losses_and_scores_and_its_record_stays_the_same(setting: Setting, told: Told):
    trial = Trial("full", 0.0, 0, 0, 0)
    record = run_trial(setting, trial, None, (), None, Run(("wandb",), Path("/runs/one"), trial.id)).record
    assert reproducible(record) == reproducible(run_trial(setting, trial).record)
    assert told.names == ["full-seed-0", "runs-one"]
    losses = told.of("loss")
    assert list(losses) == list(range(1, record["steps"] + 1))
    assert sum(losses.values()) / len(losses) == pytest.approx(record["train_loss"])
    assert set(told.of("learning_rate")) == set(losses)
    assert told.of("eval_accuracy") == {record["steps"]: record["score"]}
    assert told.of("train_loss") == {record["steps"]: record["train_loss"]}


def test_a_trial_of_a_share_reports_each_tasks_scores(inputs: dict[str, str], pairs: str, told: Told, tmp_path: Path):
    config = ShareConfig(
        model=inputs["model"],
        tasks=(inputs["task"], pairs),
        epochs=1,
        batch_size=16,
        max_length=16,
        report_to="wandb",
        output=str(tmp_path / "share"),
    )
    settings = load_settings(config)
    trial = ShareTrial("plain", 0)
    record, _, _ = run_share_trial(config, settings, trial, dict.fromkeys(settings), tracked=Run.of(config, trial.id))
    assert told.names[0] == trial.id
    assert len(told.of("loss")) == record["steps"]
    for name, task in record["tasks"].items():
        assert told.of(f"eval_{name}_{task['metric']}") == {record["steps"]: task["score"]}


def test_trackers_are_no_part_of_a_runs_identity_and_are_checked_before_anything_loads(
    inputs: dict[str, str], told: Told
):
    for config in (
        SearchConfig(report_to="wandb"),
        ShareConfig(tasks="a,b", report_to="wandb"),
        TransferConfig(source="a", target="b", report_to="wandb"),
    ):
        assert config.report_to == config.search("a").report_to if hasattr(config, "search") else ("wandb",)
        assert "report_to" not in config.decided()
        assert "--report-to wandb" in config.command()
    assert SearchConfig(report_to="none").report_to == ()
    with pytest.raises(InputError, match="report_to 'mlflow' is unknown: choose from tensorboard, wandb, trackio"):
        SearchConfig(report_to="wandb,mlflow")
    with pytest.raises(InputError, match=r"report_to trackio needs a package .*: pip install trackio, or leave"):
        Setting.load(SearchConfig(model="/nowhere", report_to="wandb,trackio"))
