"""A ticket that is applied and not shrunk goes along with whatever saves the model, and comes back."""

import copy
import json
import pickle
import warnings

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification, Trainer, TrainingArguments

import ticketops
from models.conftest import tiny_batch, tiny_config
from models.test_encoders import CLASSIFIERS, draw, make
from models.test_shrink import TICKETS, close
from ticketops.errors import InputError
from ticketops.models.record import APPLIED, applied_ticket

TICKET, OTHER = TICKETS["neurons"], TICKETS["uneven"]
SAVED = "saved with a ticket applied"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_save_pretrained_keeps_it_and_patch_restores_it(name, tmp_path):
    model = make(name)
    ticketops.patch(model).apply(TICKET)
    want = model(**draw(model)).logits
    model.save_pretrained(tmp_path)
    for load in (ticketops.load, type(model).from_pretrained):
        with pytest.warns(UserWarning, match=rf"{SAVED}.*ticketops.patch"):
            loaded = load(tmp_path)
        handle = ticketops.patch(loaded)
        assert handle.ticket == TICKET
        torch.testing.assert_close(loaded(**draw(model)).logits, want, **close)


def _leave(handle):
    handle.apply(None)


def _shrink(handle):
    ticketops.shrink(handle.model, TICKET)


@pytest.mark.parametrize("end", [_leave, ticketops.PatchHandle.revert, _shrink])
def test_what_ends_it_removes_it(end, model, tmp_path):
    handle = ticketops.patch(model).apply(TICKET)
    end(handle)
    model.save_pretrained(tmp_path)
    assert APPLIED not in json.loads((tmp_path / "config.json").read_text())
    assert APPLIED not in model.state_dict()._metadata["bert"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ticketops.load(tmp_path)


def test_shrinking_a_loaded_model_to_it_removes_it_too(model, batch, tmp_path):
    want = ticketops.patch(model).apply(TICKET).model(**batch).logits
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=SAVED):
        loaded = ticketops.load(tmp_path)
    ticketops.shrink(loaded, OTHER)
    assert applied_ticket(loaded.config) == TICKET
    ticketops.shrink(loaded, TICKET)
    assert applied_ticket(loaded.config) is None
    with pytest.warns(UserWarning, match=SAVED):
        loaded = ticketops.load(tmp_path)
    # Without a ticket named, the one that was applied is exported.
    before = loaded.config
    ticketops.export(loaded, tmp_path / "out")
    assert loaded.config is before
    assert applied_ticket(before) == TICKET
    torch.testing.assert_close(ticketops.load(tmp_path / "out")(**batch).logits, want, **close)


def test_other_models_of_its_configuration_know_nothing_of_it():
    config = tiny_config()
    one, other = BertForSequenceClassification(config), BertForSequenceClassification(config)
    handle = ticketops.patch(one)
    handle.apply(TICKET)
    assert not hasattr(config, APPLIED)
    assert other.config is config
    own = one.config
    assert {id(m.config) for m in one.modules() if hasattr(m, "config")} == {id(own)}
    for ticket in (OTHER, None, TICKET):
        handle.apply(ticket)
        assert one.config is own
        assert applied_ticket(own) == ticket


class Module(nn.Module):
    """As of Lightning: the model within another module."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.model = BertForSequenceClassification(tiny_config()).eval()
        self.handle = ticketops.patch(self.model)


@pytest.fixture
def checkpoint(tmp_path):
    """The path of a state_dict, and the module that it is of."""
    module = Module()
    module.handle.apply(TICKET)
    torch.save({"state_dict": module.state_dict()}, tmp_path / "last.ckpt")
    return tmp_path / "last.ckpt", module


def test_a_state_dict_brings_it_along(checkpoint, batch):
    path, module = checkpoint
    state = torch.load(path, weights_only=True)["state_dict"]
    fresh = Module()
    fresh.load_state_dict(state)
    assert fresh.handle.ticket == TICKET == applied_ticket(fresh.model.config)
    torch.testing.assert_close(fresh.model(**batch).logits, module.model(**batch).logits, **close)
    # Weights from before there was a ticket leave it.
    fresh.load_state_dict(copy.deepcopy(Module().state_dict()))
    assert fresh.handle.ticket == TICKET
    # A stock model takes the weights as they are, and says what it does not take.
    with pytest.warns(UserWarning, match="before load_state_dict"):
        BertForSequenceClassification(tiny_config()).load_state_dict(module.model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ticketops.export(module.model, path.parent / "out")
        module.model.load_state_dict(module.model.state_dict())


@pytest.mark.parametrize("chosen", [None, OTHER])
def test_a_choice_in_force_stays_and_both_are_named(chosen, checkpoint):
    fresh, state = Module(), torch.load(checkpoint[0])["state_dict"]
    fresh.handle.apply(chosen)
    stays = "no ticket" if chosen is None else repr(OTHER)
    with pytest.warns(UserWarning, match="were saved with") as said:
        fresh.load_state_dict(state)
    assert all(text in str(said[0].message) for text in (repr(TICKET), stays))
    assert fresh.handle.ticket == chosen
    fresh.handle.apply(TICKET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.load_state_dict(state)


def test_copies_and_pickles_go_on_with_it(model, batch, tmp_path):
    handle = ticketops.patch(model).apply(TICKET)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = ticketops.models.handle.find_handle(twin)
        assert applied_ticket(twin.config) == own.ticket == TICKET
        own.apply(OTHER)
        assert applied_ticket(twin.config) == OTHER
        assert applied_ticket(model.config) == handle.ticket == TICKET


def test_each_task_of_a_shared_model_is_saved_with_its_own(tmp_path):
    models = {task: BertForSequenceClassification(tiny_config(num_labels=n)).eval() for task, n in (("a", 2), ("b", 3))}
    shared = ticketops.SharedModel(models, {"a": TICKET, "b": OTHER})
    for task, ticket in shared.tickets.items():
        shared.select(task).save_pretrained(tmp_path / task)
        with pytest.warns(UserWarning, match=SAVED):
            loaded = ticketops.load(tmp_path / task)
        assert loaded.config.num_labels == models[task].config.num_labels
        assert ticketops.patch(loaded).ticket == ticket
    state = copy.deepcopy(shared.state_dict())
    shared.select("a")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shared.load_state_dict(state)
        shared.save(tmp_path / "shared")
        again = ticketops.SharedModel.load(tmp_path / "shared")
    assert again.tickets == shared.tickets
    shared.revert()
    assert not any(hasattr(model.config, APPLIED) for model in models.values())


def test_trainer_checkpoints_keep_it(tmp_path):
    rows = {name: value.tolist() for name, value in tiny_batch(8, seed=1).items()}
    options = {"per_device_train_batch_size": 4, "report_to": "none", "disable_tqdm": True, "use_cpu": True}
    options |= {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "seed": 1}

    def trainer(model, epochs):
        arguments = TrainingArguments(str(tmp_path / "out"), num_train_epochs=epochs, **options)
        return Trainer(model, arguments, train_dataset=Dataset.from_dict(rows), eval_dataset=Dataset.from_dict(rows))

    def fresh():
        torch.manual_seed(0)
        return BertForSequenceClassification(tiny_config())

    whole = fresh()
    handle = ticketops.patch(whole).apply(TICKET)
    trainer(whole, 2).train()
    assert handle.ticket == TICKET
    with pytest.warns(UserWarning, match=SAVED):
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "checkpoint-2")
    assert ticketops.patch(loaded).ticket == TICKET
    trainer(loaded, 2).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for a, b in zip(loaded.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("junk", [3, [], {"heads": [[0]], "ffns": [0]}, {"heads": [[9]] * 3, "ffns": []}])
def test_a_damaged_note_is_refused_in_one_line(junk, model, tmp_path):
    ticketops.patch(model).apply(TICKET)
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {APPLIED: junk}))
    with pytest.raises(InputError, match=f"cannot load the model.*{APPLIED}"):
        ticketops.load(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    with pytest.raises(InputError, match=APPLIED):
        ticketops.patch(loaded)
    assert ticketops.models.handle.find_handle(loaded) is None
    state = model.state_dict()
    state._metadata["bert"][APPLIED] = junk
    other = BertForSequenceClassification(tiny_config())
    ticketops.patch(other)
    with pytest.raises(RuntimeError, match=APPLIED):
        other.load_state_dict(state)
