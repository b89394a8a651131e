"""Tickets that are drawn while a Trainer trains, or a loop of the user's own."""

import copy
import warnings

import pytest
import torch
from torch.utils.data import IterableDataset, SequentialSampler
from transformers import (
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

import ticketops
from models.conftest import HEADS, LAYERS, tiny_batch, tiny_config
from ticketops import InputError, TicketCallback
from ticketops.tickets import Importance

# Two batches of 4 an epoch.
ROWS, BATCH = 8, 4


def make_rows(rows=ROWS):
    columns = tiny_batch(rows, 17)
    return [{name: value[index] for name, value in columns.items()} for index in range(rows)]


class InOrder(Trainer):
    """Does not shuffle, so that a loop by hand can do the same."""

    def _get_train_sampler(self, *args):
        return SequentialSampler(self.train_dataset)


@pytest.fixture
def pretrained(model):
    return copy.deepcopy(model.state_dict())


@pytest.fixture
def make_trainer(model, tmp_path):
    def make(callbacks=(), trained=model, rows=None, **changes):
        options = {
            "output_dir": tmp_path,
            "num_train_epochs": 3,
            "per_device_train_batch_size": BATCH,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 0.0,
            "save_strategy": "no",
            "logging_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
        }
        data = make_rows() if rows is None else rows
        return InOrder(
            trained,
            TrainingArguments(**{**options, **changes}),
            train_dataset=data,
            eval_dataset=make_rows(),
            callbacks=list(callbacks),
            data_collator=default_data_collator,
        )

    return make


class At(TrainerCallback):
    """Calls a function at an event of training."""

    def __init__(self, event, function):
        setattr(self, event, lambda args, state, control, **kwargs: function(state, control, kwargs))


def run_epoch(model, optimizer):
    rows = make_rows()
    for start in range(0, ROWS, BATCH):
        model(**default_data_collator(rows[start : start + BATCH])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def new_optimizer(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)


def test_one_run_draws_a_ticket_rewinds_and_trains_it_as_a_loop_by_hand_does(model, stock, pretrained, make_trainer):
    logged = []
    callback = TicketCallback(ticketops.patch(model), 0.5, epoch=1, rewind=pretrained, log=logged.append)
    make_trainer([callback]).train()

    hand = stock.train()
    handle = ticketops.patch(hand)
    with ticketops.draw(handle, 0.5, rewind=pretrained) as drawing:
        run_epoch(hand, new_optimizer(hand))
    rewound = copy.deepcopy(hand.state_dict())
    optimizer = new_optimizer(hand)
    for _ in range(2):
        run_epoch(hand, optimizer)
    assert all(torch.equal(rewound[name], pretrained[name]) for name in pretrained)
    assert callback.importance == drawing.importance
    assert callback.ticket == drawing.ticket == handle.ticket
    assert callback.ticket.metadata == drawing.ticket.metadata
    found, want = model.state_dict(), hand.state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert [row["ticket_heads_pruned"] for row in logged] == [LAYERS * HEADS // 2]


def test_an_optimizer_that_is_made_with_a_state_starts_over_with_it(model, pretrained, make_trainer):
    trainer = make_trainer([TicketCallback(ticketops.patch(model), 0.5, epoch=1, rewind=pretrained)])
    optimizer = torch.optim.Adagrad(model.parameters(), lr=1e-2, initial_accumulator_value=0.5)
    trainer.optimizer = optimizer
    seen = []

    def look(*event):
        seen.append({sums["sum"].min().item() for sums in optimizer.state.values()})

    trainer.add_callback(At("on_step_begin", look))
    trainer.train()
    # At the first step, and at the first one of the rewound training.
    assert [step for step, sums in enumerate(seen) if sums == {0.5}] == [0, len(seen) // 3]


def test_all_loggers_of_the_trainer_get_the_tickets_numbers(model, make_trainer):
    logged = []
    listener = At("on_log", lambda state, control, kwargs: logged.append(kwargs["logs"]))
    trainer = make_trainer([listener], num_train_epochs=2)
    trainer.add_callback(TicketCallback(ticketops.patch(model), counts=(2, 1), epoch=1, log=trainer.log))
    trainer.train()
    for rows in (logged, trainer.state.log_history):
        (row,) = [each for each in rows if "ticket_heads_pruned" in each]
        assert (row["ticket_heads_pruned"], row["ticket_ffns_pruned"], row["epoch"]) == (2, 1, 1)


def test_draw_is_the_four_calls_one_after_the_other(model, stock, pretrained):
    options = {"counts": (2, 20), "kind": "losing", "min_heads": 0, "neurons": True}
    with ticketops.draw(ticketops.patch(model), granularity="batch", rewind=pretrained, **options) as drawing:
        run_epoch(model, torch.optim.SGD(model.parameters(), lr=0.1))
    handle = ticketops.patch(stock)
    with handle.record_importance("batch", neurons=True) as importance:
        run_epoch(stock, torch.optim.SGD(stock.parameters(), lr=0.1))
    ticket = ticketops.prune(importance, **options)
    ticketops.rewind(stock, pretrained)
    assert drawing.importance == importance
    assert drawing.ticket == ticket
    found, want = model.state_dict(), stock.state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)


def test_an_error_in_the_loop_draws_nothing_and_stops_the_recording(model, batch):
    handle = ticketops.patch(model)
    drawings = []

    def loop():
        with ticketops.draw(handle, 0.5) as drawing:
            drawings.append(drawing)
            model(**batch).loss.backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loop()
    assert drawings[0].ticket is handle.ticket is None
    with handle.record_importance():
        pass
    with pytest.raises(InputError, match="no head importance was recorded"), ticketops.draw(handle, 0.5):
        pass


@pytest.mark.parametrize("changes", [{}, {"max_steps": 5}])
def test_without_an_epoch_the_last_is_recorded_and_a_second_trainer_trains_the_ticket(
    model, stock, make_trainer, changes
):
    callback = TicketCallback(model, sparsity=0.25)
    handle = ticketops.patch(model)
    trainer = make_trainer([callback], **changes)
    trainer.train()
    batches = 2 if not changes else 1
    assert callback.importance._heads.counts == [batches * BATCH] * LAYERS
    assert handle.ticket == callback.ticket
    assert callback.ticket.heads_pruned == 3
    history = trainer.state.log_history
    (logged,) = [row for row in history if "ticket_heads_pruned" in row]
    assert logged["ticket_ffns_pruned"] == 0
    assert 0.8 < logged["ticket_weights_remaining"] < 1
    assert logged["step"] == trainer.state.global_step
    # Recording disturbs no step.
    ticketops.patch(stock)
    make_trainer(trained=stock, **changes).train()
    found, want = model.state_dict(), stock.state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)
    small = ticketops.shrink(model, callback.ticket)
    before = small.bert.encoder.layer[0].output.dense.weight.clone()
    make_trainer(trained=small, num_train_epochs=1).train()
    assert not torch.equal(before, small.bert.encoder.layer[0].output.dense.weight)


def test_evaluation_accumulation_and_bf16_within_the_epoch_are_recorded_right(model, stock, make_trainer):
    settings = {"num_train_epochs": 1, "learning_rate": 0.0, "bf16": True}
    plain = TicketCallback(ticketops.patch(model))
    make_trainer([plain], **settings).train()
    other = TicketCallback(ticketops.patch(stock))
    settings |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    make_trainer([other], stock, **settings, eval_strategy="steps", eval_steps=1).train()
    assert other.importance._heads.counts == plain.importance._heads.counts == [ROWS] * LAYERS
    # A mean of two means, of which each has half the rows.
    scale = plain.importance.head.sum() / other.importance.head.sum()
    torch.testing.assert_close(scale * other.importance.head, plain.importance.head, rtol=0.05, atol=0.02)
    with pytest.raises(InputError, match="no ticket was drawn: neither sparsity nor counts"):
        plain.ticket  # noqa: B018


def test_the_recorded_epoch_is_evaluated_without_the_ticket_and_the_best_is_one_with_it(model, make_trainer):
    handle = ticketops.patch(model)
    tickets = []

    def score(prediction):
        tickets.append(handle.ticket)
        # The dense model is best by far.
        return {"score": 1.0 if handle.ticket is None else 0.1 * len(tickets)}

    callback = TicketCallback(handle, 0.5, epoch=1)
    patience = EarlyStoppingCallback(early_stopping_patience=1)
    strategy = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    trainer = make_trainer([callback, patience], **strategy, metric_for_best_model="score")
    trainer.compute_metrics = score
    trainer.train()
    assert tickets == [None, callback.ticket, callback.ticket]
    assert trainer.state.best_global_step == 6
    assert handle.ticket == callback.ticket


@pytest.mark.parametrize("step", [2, 3, 4])
def test_a_resumed_training_ends_as_one_that_went_through(model, stock, pretrained, make_trainer, step):
    """From the end of the recorded epoch, whose ticket waits; and from the middle and the end of the next one."""
    settings = {"save_strategy": "epoch" if step != 3 else "steps", "save_steps": 3}
    make_trainer([TicketCallback(ticketops.patch(model), 0.5, epoch=1, rewind=pretrained)], **settings).train()
    handle = ticketops.patch(stock)
    callback = TicketCallback(handle, 0.5, epoch=1, rewind=pretrained)
    trainer = make_trainer([callback], stock)
    trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{step}")
    found, want = stock.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert callback.ticket == handle.ticket
    assert callback.ticket.metadata["sparsity"] == 0.5
    with pytest.raises(InputError, match="no importance was recorded: training was resumed after it"):
        callback.importance  # noqa: B018


def test_a_training_cannot_resume_within_the_recorded_epoch(model, make_trainer):
    handle = ticketops.patch(model)
    make_trainer([], save_strategy="steps", save_steps=3).train()
    folder = f"{make_trainer().args.output_dir}/checkpoint-3"
    with pytest.raises(InputError, match=r"resumes after 1\.5 epochs, and importance was to be recorded"):
        make_trainer([TicketCallback(handle, 0.5, epoch=2)]).train(resume_from_checkpoint=folder)
    later = TicketCallback(handle, 0.5)
    make_trainer([later]).train(resume_from_checkpoint=folder)
    assert later.importance._heads.counts == [ROWS] * LAYERS


def test_a_training_that_ends_too_early_says_so(model, make_trainer):
    def stop(state, control, kwargs):
        control.should_training_stop = state.global_step == 2

    callback = TicketCallback(ticketops.patch(model), 0.5)
    with pytest.warns(UserWarning, match="ended in epoch 1, before epoch 3"):
        make_trainer([callback, At("on_step_end", stop)]).train()
    with pytest.raises(InputError, match="no ticket was drawn: training has not come to the end of epoch 3"):
        callback.ticket  # noqa: B018


class Stream(IterableDataset):
    """Rows of which nobody knows how many there are."""

    def __iter__(self):
        return iter(make_rows())


def test_data_without_a_length_needs_an_epoch(model, make_trainer):
    handle = ticketops.patch(model)
    with pytest.raises(InputError, match="which epoch is the last is not known"):
        make_trainer([TicketCallback(handle, 0.5)], rows=Stream(), max_steps=3).train()
    callback = TicketCallback(handle, 0.5, epoch=1)
    make_trainer([callback], rows=Stream(), max_steps=3).train()
    assert handle.ticket == callback.ticket
    assert callback.importance._heads.counts == [ROWS] * LAYERS


def reverted(model):
    handle = ticketops.patch(model)
    handle.revert()
    return handle


REFUSED = [
    (lambda model: model, {}, "the BertForSequenceClassification of TicketCallback is not patched"),
    (lambda model: torch.nn.Linear(2, 2), {}, "takes the handle of a patched model, or .* not of type Linear"),
    (reverted, {}, "this model was reverted"),
    (lambda model: ticketops.patch(copy.deepcopy(model)), {}, "trains another model"),
    (ticketops.patch, {"epoch": 4}, "in epoch 4, and training has 3"),
    (ticketops.patch, {"sparsity": 1.5}, "sparsity 1.5 is outside"),
    (ticketops.patch, {"sparsity": None, "counts": (99, 0)}, "cannot prune 99 heads"),
    (ticketops.patch, {"kind": "lucky"}, "kind 'lucky' is unknown"),
    (ticketops.patch, {"granularity": "row"}, "granularity 'row' is unknown"),
    (ticketops.patch, {"rewind": {"nothing": torch.zeros(1)}}, "cannot rewind 'nothing'"),
    (ticketops.patch, {"sparsity": None, "rewind": {}}, "neither sparsity nor counts"),
]


@pytest.mark.parametrize(("make", "options", "problem"), REFUSED)
def test_what_cannot_be_drawn_is_refused_before_the_first_step(model, make_trainer, make, options, problem):
    callback = TicketCallback(make(model), **{"sparsity": 0.5, **options})
    steps = []
    trainer = make_trainer([callback, At("on_step_begin", lambda *_: steps.append(1))])
    with pytest.raises(InputError, match=problem) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert not steps


def test_bad_arguments_are_refused_at_once(model):
    handle = ticketops.patch(model)
    for epoch in (0, 1.5, True):
        with pytest.raises(InputError, match="is no epoch"):
            TicketCallback(handle, 0.5, epoch=epoch)
    with pytest.raises(TypeError, match="spasity"):
        TicketCallback(handle, spasity=0.5)
    with pytest.raises(InputError, match="the model's own"), ticketops.draw(handle, 0.5, rewind=model.state_dict()):
        pass
    with pytest.raises(InputError, match="draw takes a sparsity or counts"), ticketops.draw(handle):
        pass


def test_a_recording_that_an_error_has_ended_does_not_stop_the_next(model, make_trainer):
    def fail(state, control, kwargs):
        if len(failures) < 1:
            failures.append(1)
            raise ZeroDivisionError

    failures = []
    callback = TicketCallback(ticketops.patch(model), 0.5, epoch=1)
    trainer = make_trainer([callback, At("on_step_end", fail)])
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert callback.ticket.heads_pruned == LAYERS * HEADS // 2


def test_processes_draw_one_ticket_of_all_their_batches(model, batch, process_group, monkeypatch):
    """As two processes would that both had these batches."""
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(parts, mine):
        parts[:] = [copy.deepcopy(mine), copy.deepcopy(mine)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with ticketops.draw(ticketops.patch(model), 0.5) as drawing:
        model(**batch).loss.backward()
    assert isinstance(drawing.importance, Importance)
    assert drawing.importance._heads.counts == [2 * len(batch["labels"])] * LAYERS


def test_a_trainer_of_another_module_finds_the_patched_model_inside(make_trainer, pretrained, model):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, input_ids, attention_mask, token_type_ids, labels):
            return {"loss": self.inner(input_ids, attention_mask, token_type_ids, labels=labels).loss}

    callback = TicketCallback(ticketops.patch(model), 0.5, rewind=pretrained)
    make_trainer([callback], Wrapped(), num_train_epochs=1).train()
    assert torch.equal(model.state_dict()["classifier.weight"], pretrained["classifier.weight"])
    assert isinstance(model, BertForSequenceClassification)
    assert model.config.num_labels == tiny_config().num_labels
