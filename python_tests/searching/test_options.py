"""Options of training: as the Trainer names them, handed on to it, and part of what a run is."""

import copy
import dataclasses
import glob
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from transformers import Trainer

from ticketops.errors import InputError
from ticketops.searching import SearchConfig, Setting, ShareConfig, TransferConfig
from ticketops.searching.plan import Trial
from ticketops.searching.recipes import FORMAT_1_TRAINING, RECIPES, training, without_options
from ticketops.searching.run_config import SCHEDULES
from ticketops.searching.trial import run_trial, trainer_options
from ticketops.tickets import Ticket

from .tiny import FIELDS

FULL = Trial("full", 0.0, 0, 0, 0)


def changed(setting: Setting, **fields: object) -> Setting:
    return dataclasses.replace(setting, config=dataclasses.replace(setting.config, **fields))


def test_options_reach_the_trainer_under_its_own_names(setting: Setting):
    options = {
        "warmup_steps": 3,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.1,
        "max_grad_norm": 0.5,
        "gradient_accumulation_steps": 2,
    }
    arguments = trainer_options(changed(setting, **options), seed=0)["args"]
    assert {name: getattr(arguments, name) for name in options} == options
    plain = trainer_options(setting, seed=0)["args"]
    recipe = RECIPES["default"]
    assert (plain.warmup_steps, plain.weight_decay, plain.max_grad_norm) == (
        recipe.warmup,
        recipe.weight_decay,
        recipe.clip,
    )


def test_every_schedule_needs_nothing_but_its_name():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    for name in SCHEDULES:
        transformers.get_scheduler(name, optimizer, num_warmup_steps=1, num_training_steps=4)


def test_a_recipe_decides_what_is_left_out_and_runs_of_several_tasks_inherit_it():
    demo = SearchConfig(task="demo")
    assert (demo.warmup_steps, demo.weight_decay, demo.max_grad_norm) == (0.1, 0.01, 1.0)
    assert "weight-decay" not in demo.command()
    fields = {"weight_decay": 0.2, "warmup_steps": "5", "lr_scheduler_type": "constant_with_warmup"}
    for config in (ShareConfig(tasks="rte,sst2", **fields), TransferConfig(source="rte", target="sst2", **fields)):
        search = config.search("rte")
        assert (search.weight_decay, search.warmup_steps, search.lr_scheduler_type) == (0.2, 5, "constant_with_warmup")
        assert "--weight-decay 0.2" in config.command()
    transfer = TransferConfig(source="rte", target="sst2", early_stopping_patience=2, gradient_accumulation_steps=4)
    assert transfer.search("rte").early_stopping_patience == 2
    assert transfer.search("rte").gradient_accumulation_steps == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup_steps": -1}, "warmup_steps -1 is out of range"),
        ({"warmup_steps": 1.5}, "warmup_steps 1.5 is neither a whole number of steps nor a share"),
        ({"weight_decay": "nan"}, "weight_decay nan is out of range"),
        ({"max_grad_norm": "x"}, "max_grad_norm 'x' is not a number"),
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps 0 is out of range"),
        ({"lr_scheduler_type": "step"}, "lr_scheduler_type 'step' is unknown: choose from linear, cosine"),
        ({"dtype": "fp8"}, "dtype 'fp8' is unknown: choose from fp32, bf16, fp16"),
        ({"early_stopping_patience": 0}, "early_stopping_patience 0 is out of range"),
        (
            {"early_stopping_patience": 1, "importance": "both"},
            "importance both records the last epoch, and early_stopping_patience keeps the best one",
        ),
    ],
)
def test_values_without_a_meaning_are_refused(fields: dict, message: str):
    with pytest.raises(InputError, match=message):
        SearchConfig(**fields)


@pytest.mark.parametrize(
    ("name", "field"), [("warmup_ratio", "warmup_steps"), ("patience", "early_stopping_patience"), ("fp16", "dtype")]
)
def test_names_of_other_tools_lead_to_ours(name: str, field: str):
    with pytest.raises(InputError, match=f"did you mean '{field}'"):
        SearchConfig.from_dict({name: 1})


@pytest.mark.skipif(torch.accelerator.is_available(), reason="accelerators train in float16")
def test_fp16_without_a_device_for_it_is_refused_before_anything_is_loaded(inputs: dict[str, str]):
    with pytest.raises(
        InputError,
        match=r"dtype='fp16' does not run here \(the Trainer takes it on accelerators alone\): choose another one",
    ):
        Setting.load(SearchConfig(**{**inputs, "task": "nowhere"}, dtype="fp16"))
    # What was tried leaves nothing behind.
    Setting.load(SearchConfig(**inputs, **FIELDS, dtype="bf16"))
    Setting.load(SearchConfig(**inputs, **FIELDS))


def test_constants_that_became_options_move_out_of_what_a_recipe_keeps():
    kept, moved = without_options(FORMAT_1_TRAINING["default"])
    assert moved == {"warmup_steps": 0.1, "weight_decay": 0.01, "max_grad_norm": 1.0}
    assert kept.keys() < training("default").keys()
    assert not kept.keys() & {"warmup", "weight_decay", "clip"}


def test_accumulated_batches_train_as_one_large_batch(setting: Setting):
    model_config = copy.deepcopy(setting.model_config)
    model_config.hidden_dropout_prob = model_config.attention_probs_dropout_prob = 0.0
    setting = dataclasses.replace(changed(setting, epochs=1, max_grad_norm=0.1), model_config=model_config)
    whole = run_trial(setting, FULL)
    parts = run_trial(changed(setting, batch_size=8, gradient_accumulation_steps=2), FULL)
    assert parts.record["steps"] == whole.record["steps"] == 3
    assert parts.record["train_loss"] == pytest.approx(whole.record["train_loss"], rel=1e-4)
    for split, logits in whole.predictions.items():
        np.testing.assert_allclose(parts.predictions[split], logits, atol=1e-3)


def test_early_stopping_keeps_the_best_epoch_and_stops(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    # The third epoch is the best one, and two more are no better.
    wanted = iter([0.5, 0.6, 0.9, 0.7, 0.8, 1.0])
    weights = []
    task = setting.task
    metric = task.metric

    class Scripted(type(task)):
        def score(self, logits, inputs, rows):
            return {**super().score(logits, inputs, rows), metric: next(wanted, 0.0)}

    fields = {field.name: getattr(task, field.name) for field in dataclasses.fields(task)}
    scripted = dataclasses.replace(changed(setting, epochs=6, early_stopping_patience=2), task=Scripted(**fields))
    evaluate = Trainer.predict

    def predict(trainer, rows, **options):
        weights.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return evaluate(trainer, rows, **options)

    monkeypatch.setattr(Trainer, "predict", predict)
    before = set(glob.glob(f"{tempfile.gettempdir()}/ticketops-*"))
    outcome = run_trial(scripted, FULL)
    assert outcome.record["steps"] == 5 * 3
    assert outcome.record["best_step"] == 3 * 3
    # Behind the five epochs the best one's weights are scored.
    assert len(weights) == 6
    for name, value in weights[5].items():
        assert torch.equal(value, weights[2][name])
    assert any(not torch.equal(value, weights[4][name]) for name, value in weights[5].items())
    assert set(glob.glob(f"{tempfile.gettempdir()}/ticketops-*")) == before
    assert not list(Path(tempfile.gettempdir()).glob("checkpoint-*"))


def test_early_stopping_keeps_the_best_epoch_of_a_ticket(setting: Setting, pruned):
    ticket, trial = pruned
    outcome = run_trial(changed(setting, epochs=2, early_stopping_patience=1), trial, ticket)
    assert outcome.record["best_step"] in (3, 6)
    assert outcome.record["heads_pruned"] == ticket.heads_pruned


@pytest.fixture
def pruned():
    head_mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    return Ticket(head_mask, torch.tensor([True, False])), Trial("winning", 0.25, 0, 2, 1)
