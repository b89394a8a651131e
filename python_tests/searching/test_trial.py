import contextlib
import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModel, Trainer

from ticketops.errors import InputError, TicketopsError, UnsupportedError
from ticketops.models import patch, shrink
from ticketops.ops import Packing
from ticketops.optim import Adamax
from ticketops.searching import SearchConfig, Setting, Trial, run_trial
from ticketops.searching.recipes import RECIPES
from ticketops.searching.release import release
from ticketops.searching.scoring import score_pass
from ticketops.searching.trial import trainer_options
from ticketops.tickets import Ticket

from .tiny import FIELDS, HEADS, LAYERS

FULL = Trial("full", 0.0, 3, 0, 0)
PRUNED = Trial("winning", 0.5, 3, 4, 1)
TICKET = Ticket(torch.tensor([[True, False, True, False], [False, True, True, False]]), torch.tensor([True, False]))


def reproducible(record: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in ("timing", "environment", "files", "run")}


def with_fields(setting: Setting, **fields: Any) -> Setting:
    return Setting.load(dataclasses.replace(setting.config, **fields))


def test_a_trial_is_a_pure_function_of_its_arguments(setting: Setting):
    first = run_trial(setting, PRUNED, TICKET).record
    # Whatever another trial or the user did to the global generators must not matter.
    other = run_trial(setting, dataclasses.replace(PRUNED, seed=4), TICKET).record
    transformers.set_seed(99)
    assert reproducible(run_trial(setting, PRUNED, TICKET).record) == reproducible(first)
    assert other["predictions_sha256"] != first["predictions_sha256"]


def test_every_trial_of_a_seed_starts_from_the_checkpoint_and_the_same_head(setting: Setting):
    pretrained = AutoModel.from_pretrained(setting.config.model).state_dict()
    first, again, other = (setting.fresh_model(seed) for seed in (3, 3, 4))
    for name, weight in first.base_model.state_dict().items():
        assert torch.equal(weight, pretrained[name]), name
    assert torch.equal(first.classifier.weight, again.classifier.weight)
    assert not torch.equal(first.classifier.weight, other.classifier.weight)
    assert first.training


def test_the_full_model_learns_and_pruned_weights_stay_pretrained(setting: Setting):
    full = run_trial(with_fields(setting, epochs=6, train_rows=64), FULL).record
    assert full["score"] > full["majority"] + 0.2
    assert (full["weights_remaining"], full["heads_pruned"], full["report_score"]) == (1.0, 0, None)
    outcome = run_trial(setting, PRUNED, TICKET)
    assert (outcome.record["heads_pruned"], outcome.record["ffns_pruned"]) == (4, 1)
    assert 0 < outcome.record["weights_remaining_encoder"] < outcome.record["weights_remaining"] < 1
    trained, start = outcome.model.base_model.state_dict(), setting.pretrained
    name = "encoder.layer.1.intermediate.dense.weight"
    assert torch.equal(trained[name], start[name])
    name = "encoder.layer.0.attention.self.query.weight"
    heads = [torch.equal(a, b) for a, b in zip(trained[name].chunk(HEADS), start[name].chunk(HEADS), strict=True)]
    assert heads == [False, True, False, True]


def test_batches_are_counted_before_they_travel_and_nothing_else_changes(setting: Setting, monkeypatch):
    counted, from_mask = [], Packing.from_mask

    def noted(*args: Any) -> Packing:
        counted.append(args[-1] is not None)
        return from_mask(*args)

    monkeypatch.setattr(Packing, "from_mask", noted)
    found = run_trial(setting, FULL, ways=("pass", "on_the_fly"))
    assert counted
    assert all(counted)
    monkeypatch.setattr(Setting, "collator", property(lambda self: self.task.collator(self.tokenizer)))
    counted.clear()
    assert reproducible(run_trial(setting, FULL, ways=("pass", "on_the_fly")).record) == reproducible(found.record)
    assert not any(counted)


def test_where_there_is_a_gpu_batches_are_sent_without_waiting(setting: Setting, monkeypatch):
    # Where there is none, the Trainer's own takes pinned memory back.
    monkeypatch.setattr(
        "ticketops.searching.trial.TrainingArguments", lambda **given: SimpleNamespace(n_gpu=1, **given)
    )
    for there in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        arguments = trainer_options(setting, 0)["args"]
        assert arguments.dataloader_pin_memory == arguments.accelerator_config["non_blocking"] == there


def test_both_ways_of_scoring_see_every_row_once(setting: Setting):
    outcome = run_trial(setting, FULL, ways=("pass", "on_the_fly"))
    assert outcome.record["rank_correlation"].keys() == {"head", "ffn"}
    assert all(-1 <= value <= 1 for value in outcome.record["rank_correlation"].values())
    for way in ("pass", "on_the_fly"):
        importance = outcome.importance[way]
        assert (importance.num_layers, importance.num_heads) == (LAYERS, HEADS)
        # The last epoch alone, not both.
        assert importance._heads.counts == [setting.config.train_rows] * LAYERS
    assert outcome.importance["pass"] != outcome.importance["on_the_fly"]
    # Recording changes nothing in the training.
    plain = run_trial(setting, FULL).record
    assert plain["predictions_sha256"] == outcome.record["predictions_sha256"]


def test_the_clean_pass_has_no_dropout_and_no_weight_gradient(setting: Setting):
    model = setting.fresh_model(0)
    rows = setting.splits["train"].select(range(8))
    batch = dict(setting.tokenizer.pad(rows.to_dict(), return_tensors="pt"))
    with patch(model) as handle:
        scores = [score_pass(handle, [batch], False, lambda model, batch: model(**batch).loss) for _ in range(2)]
    assert scores[0] == scores[1]
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_the_paper_recipe_reaches_the_optimizer(setting: Setting, monkeypatch: pytest.MonkeyPatch):
    seen: dict[str, Any] = {}
    train = Trainer.train

    def spy(trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        result = train(trainer, *args, **kwargs)
        optimizer = trainer.optimizer.optimizer
        seen.update(optimizer=optimizer, args=trainer.args, model=trainer.model, scheduler=trainer.lr_scheduler)
        return result

    monkeypatch.setattr(Trainer, "train", spy)
    fields = {name: value for name, value in FIELDS.items() if name not in ("epochs", "batch_size", "learning_rate")}
    config = SearchConfig(model=setting.config.model, task=setting.config.task, recipe="paper", **fields)
    run_trial(Setting.load(config), FULL)
    optimizer, args, model = seen["optimizer"], seen["args"], seen["model"]
    assert type(optimizer) is Adamax
    decayed, plain = optimizer.param_groups
    assert decayed["max_grad_norm"] == plain["max_grad_norm"] == 1.0
    assert (decayed["betas"], decayed["eps"], decayed["weight_decay"]) == ((0.9, 0.999), 1e-6, 0.01)
    assert plain["weight_decay"] == 0
    bare = {id(parameter) for parameter in plain["params"]}
    names = [name for name, parameter in model.named_parameters() if id(parameter) in bare]
    assert names
    assert all("bias" in name or "LayerNorm" in name for name in names)
    assert (args.max_grad_norm, args.lr_scheduler_type.value, args.learning_rate) == (1.0, "linear", 5e-5)
    steps = args.num_train_epochs * 2
    assert (steps, args.get_warmup_steps(steps)) == (12, 2)
    assert model.config.hidden_dropout_prob == model.config.attention_probs_dropout_prob == 0.1


def test_a_report_split_is_scored_apart(setting: Setting):
    held = with_fields(setting, report_fraction=0.25, epochs=1)
    record = run_trial(held, FULL).record
    assert (len(held.splits["validation"]), len(held.splits["report"])) == (30, 10)
    assert record["report_score"] == record["scores"]["report"][record["metric"]]
    assert record["score"] == record["scores"]["validation"][record["metric"]]


def test_bf16_trains(setting: Setting):
    record = run_trial(with_fields(setting, dtype="bf16", epochs=1), FULL, ways=("pass",)).record
    assert record["predictions_sha256"] != run_trial(with_fields(setting, epochs=1), FULL).record["predictions_sha256"]


def test_divergence_is_an_error_with_a_remedy(setting: Setting):
    broken = dataclasses.replace(setting, pretrained={k: v * float("nan") for k, v in setting.pretrained.items()})
    with pytest.raises(TicketopsError, match=r"diverged in trial full-seed-3 .*lower learning_rate"):
        run_trial(broken, FULL)


def test_a_ticket_for_another_architecture_is_refused(setting: Setting):
    with pytest.raises(InputError, match="3 layers x 4 heads does not fit 2 layers x 4 heads"):
        run_trial(setting, PRUNED, Ticket.full(3, 4))


def test_models_that_cannot_be_used_are_refused(setting: Setting, tmp_path: Any, monkeypatch: pytest.MonkeyPatch):
    def load(model: str, **fields: Any) -> None:
        with_fields(setting, model=model, **fields)

    with pytest.raises(InputError, match=r"is not a folder: give a local folder.*model='demo'"):
        load("/no/such/folder")
    with pytest.raises(InputError, match=r"no config.json"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        load(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_layer": 1, "n_embd": 8, "n_head": 2}')
    with pytest.raises((UnsupportedError, InputError)):
        load(str(tmp_path))
    with pytest.raises(InputError, match=r"max_length 64 .*give at most 32"):
        load(setting.config.model, max_length=64)

    def unreachable(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    with pytest.raises(InputError, match=r"'someone/bert-nowhere' .*cannot be reached .*give a local folder"):
        load("someone/bert-nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "lacks 16 pre-trained weights .*layer.2.*give a complete checkpoint"),
        ({"vocab_size": 9}, "do not fit its own config.json"),
        ({"num_hidden_layers": 1}, r"weights of layers that its config.json does not name \(encoder.layer.1"),
        ({"num_labels": 10**6}, "config.json has 1000000 labels"),
        ({"tokenizer": None}, "has no vocabulary: save its tokenizer"),
    ],
)
def test_models_whose_files_contradict_each_other_are_refused(
    setting: Setting, tmp_path: Path, changes: dict[str, Any], words: str
):
    folder = shutil.copytree(setting.config.model, tmp_path / "model")
    if "tokenizer" in changes:
        (folder / "tokenizer.json").unlink()
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(InputError, match=words):
        with_fields(setting, model=str(folder))


def test_weights_that_are_no_numbers_are_refused(setting: Setting, tmp_path: Path):
    model = AutoModel.from_pretrained(setting.config.model)
    with torch.no_grad():
        model.pooler.dense.weight[3, 3] = torch.nan
    folder = shutil.copytree(setting.config.model, tmp_path / "model")
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"weights that are NaN or infinite \(pooler.dense.weight\)"):
        with_fields(setting, model=str(folder))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("tokenizer_config.json", {"pad_token": None}, "has no padding token"),
        ("tokenizer_config.json", {"model_max_length": "long"}, "takes at most 'long' tokens"),
        ("tokenizer_config.json", {"model_max_length": -5}, "takes at most -5 tokens"),
        ("tokenizer_config.json", {"tokenizer_class": [1]}, "cannot be loaded"),
        ("tokenizer.json", None, "cannot be loaded"),
        ("tokenizer.json", {"model": "story"}, "makes the token 9999, and the model has 22"),
    ],
)
def test_a_tokenizer_that_does_not_fit_its_model_is_refused(
    setting: Setting, tmp_path: Path, file: str, changes: dict[str, Any] | None, words: str
):
    folder = shutil.copytree(setting.config.model, tmp_path / "model")
    content = json.loads((folder / file).read_text())
    if changes is None:
        (folder / file).write_text("[" * 100_000)
    elif word := changes.get("model"):
        content["model"]["vocab"][word] = 9999
        (folder / file).write_text(json.dumps(content))
    else:
        (folder / file).write_text(json.dumps({**content, **changes}))
    with pytest.raises(InputError, match=words) as caught:
        with_fields(setting, model=str(folder))
    assert "\n" not in str(caught.value)
    # An export says so too, or does without what it does not need.
    with contextlib.suppress(InputError):
        release(folder, tmp_path / "small")


@pytest.mark.parametrize(
    ("ticket", "words"),
    [
        (
            Ticket(torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool(), torch.tensor([True, False])),
            "1 head, 1 FFN and 0 neurons are gone",
        ),
        (
            Ticket(torch.ones(2, 4).bool(), torch.tensor([True, True]), None, torch.arange(128).reshape(2, 64) % 4 > 0),
            "0 heads, 0 FFNs and 32 neurons are gone",
        ),
    ],
)
def test_a_pruned_model_is_refused(setting: Setting, tmp_path: Path, ticket: Ticket, words: str):
    model = AutoModel.from_pretrained(setting.config.model)
    shrink(model, ticket).save_pretrained(tmp_path)
    setting.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=rf"is pruned already \({words}.*: give the whole model"):
        with_fields(setting, model=str(tmp_path))


def test_the_rows_of_a_recipe_are_an_upper_bound(setting: Setting, tmp_path: Path):
    fields = {"recipe": "demo", "train_rows": None, "output": str(tmp_path)}
    found = with_fields(setting, **fields)
    assert (found.config.train_rows, len(found.splits["train"])) == (64, 64)
    # What is asked for in numbers is not.
    with pytest.raises(InputError, match="train_rows 3001 of 64 training rows"):
        with_fields(setting, **{**fields, "train_rows": 3001})


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"sparsities": (0.3, 0.3000001)}, "winning-0.3-seed-0"),
        ({"sparsities": (0.3000001,), "kinds": ("random", "random@0.3")}, "random-0.3-seed-0"),
    ],
)
def test_levels_too_close_to_be_named_apart_are_refused(setting: Setting, fields: dict[str, Any], name: str):
    config = dataclasses.replace(setting.config, **fields)
    with pytest.raises(InputError, match=f"two trials would be called {name}, .*: leave one of them out"):
        dataclasses.replace(setting, config=config).plan()


def test_recipes_are_complete():
    assert RECIPES["paper"].betas == (0.9, 0.999)
    assert {"default", "paper", "demo"} == RECIPES.keys()
