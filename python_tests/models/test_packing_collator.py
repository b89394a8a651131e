"""Batches of sequences without padding are, to a patched model that classifies them, the padded ones."""

import copy

import pytest
import torch
from bounds import roundings
from torch.utils.data import DataLoader, IterableDataset
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    Trainer,
    TrainingArguments,
)

import ticketops
from models.conftest import LAYERS, tiny_batch, tiny_config
from models.test_encoders import TEXT, make
from models.test_shrink import TICKETS
from ticketops import InputError, PackingCollator

LENGTHS = [17, 3, 9, 1, 12]


def make_rows(labels=(0, 2, 1, 2, 0), types=False, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    rows = []
    for length, label in zip(lengths, labels, strict=True):
        row = {"input_ids": torch.randint(5, 100, (length,), generator=generator).tolist(), "labels": label}
        if types:
            row["token_type_ids"] = torch.randint(0, 2, (length,), generator=generator).tolist()
        rows.append(row)
    return rows


def padded(rows, padding=0):
    """What a tokenizer's padding makes of the rows."""
    width = max(len(row["input_ids"]) for row in rows)
    batch = {
        "attention_mask": torch.tensor([[1] * len(r["input_ids"]) + [0] * (width - len(r["input_ids"])) for r in rows])
    }
    for name, value in (("input_ids", padding), ("token_type_ids", 0)):
        if name in rows[0]:
            batch[name] = torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
    return batch | {"labels": torch.tensor([row["labels"] for row in rows])}


def step(model, batch, handle, granularity="example", autocast=False):
    """Loss, logits, all gradients and the importance of a step of two passes, as gradients are accumulated."""
    model.zero_grad()
    with handle.record_importance(granularity) as importance:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                output = model(**batch)
            output.loss.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    assert importance._heads.counts == [2 * (1 if granularity == "batch" else len(batch["labels"]))] * LAYERS
    return [output.loss.detach(), output.logits.detach(), importance.head, importance.ffn, *gradients]


def changes(name):
    return {"classifier_pooling": "mean"} if name.endswith("mean") else {}


@pytest.mark.parametrize("name", [*TEXT, "ModernBert with mean"])
def test_a_packed_batch_is_the_padded_one_of_every_encoder(name):
    model = make(f"{name.split()[0]}ForSequenceClassification", **changes(name))
    stock = copy.deepcopy(model)
    rows = make_rows(types=getattr(model.config, "type_vocab_size", 0) > 1)
    packed, wide = PackingCollator()(rows), padded(rows, model.config.pad_token_id)
    assert packed["packed_input_ids"].shape == (1, sum(LENGTHS))
    # Nobody who does not know such a batch takes it for another one.
    with pytest.raises((ValueError, TypeError), match=r"input_ids"):
        stock(**packed)
    want = stock(**wide)
    handle = ticketops.patch(model)
    found = model(**packed)
    assert found.logits.shape == (len(rows), 3)
    torch.testing.assert_close(found.logits, want.logits, **roundings(1000, 100))
    torch.testing.assert_close(found.loss, want.loss, **roundings(1000, 100))
    for granularity in ("example", "token", "batch"):
        for ticket in (None, TICKETS["neither"]):
            handle.apply(ticket)
            both = [
                step(model, batch, handle, granularity, autocast=granularity == "batch") for batch in (packed, wide)
            ]
            for got, other in zip(*both, strict=True):
                assert torch.equal(got, other)
    ticketops.shrink(model, TICKETS["neither"])
    assert torch.equal(model(**packed).logits, model(**wide).logits)
    # Evaluation has other paths.
    with torch.no_grad():
        assert torch.equal(model(**packed).logits, model(**wide).logits)
        # What only stock code computes.
        outputs = [model(**batch, output_hidden_states=True).hidden_states for batch in (packed, wide)]
        for got, other in zip(*outputs, strict=True):
            assert torch.equal(got, other)
    handle.revert()
    with pytest.raises((ValueError, TypeError), match=r"input_ids"):
        model(**packed)


@pytest.mark.parametrize(
    ("labels", "number", "problem"),
    [
        ([0.5, 2.0, -1.0, 0.0, 3.25], 1, "regression"),
        ([[0.5, 1.0]] * 5, 2, "multi_label_classification"),
        ([[0.5, 1.0]] * 5, 2, "regression"),
        (torch.tensor([0, 1, 1, 0, 1]), 2, "single_label_classification"),
    ],
)
def test_labels_of_every_kind(labels, number, problem):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(num_labels=number, problem_type=problem)).eval()
    stock = copy.deepcopy(model)
    rows = make_rows(labels)
    ticketops.patch(model)
    got = model(**PackingCollator()(rows))
    want = stock(**padded([row | {"labels": torch.as_tensor(row["labels"]).tolist()} for row in rows]))
    assert got.loss.dtype == want.loss.dtype
    torch.testing.assert_close(got.loss, want.loss, **roundings(1000, 100))


def test_rows_padded_before_and_tensors_are_taken_as_they_are_meant():
    rows = make_rows()
    want = PackingCollator()(rows)
    wide = padded(rows)
    again = [{name: value[index] for name, value in wide.items()} for index in range(len(rows))]
    for row in again:
        row["label"] = row.pop("labels")
    found = PackingCollator()(again)
    assert found.keys() == want.keys()
    assert all(torch.equal(found[name], want[name]) for name in want)
    assert "labels" not in PackingCollator()([{"input_ids": [1, 2]}, {"input_ids": [3]}])


REFUSED = [
    ([], "was given no rows"),
    ([{"input_ids": [1, 2]}, {"input_ids": []}], "row 1 of a batch has no tokens"),
    ([{"labels": 1}], "row 0 of a batch has no input_ids"),
    ([{"input_ids": [1], "labels": 1}, {"input_ids": [1]}], "row 1 of a batch has no labels, and others have"),
    ([{"input_ids": [1], "position_ids": [0]}], "row 0 of a batch has 'position_ids'"),
    ([{"input_ids": [1, 2], "attention_mask": [0, 1]}], "the attention_mask of row 0 of a batch masks more"),
    ([{"input_ids": [1, 2], "attention_mask": [1]}], "the attention_mask of row 0 of a batch masks more"),
    ([{"input_ids": [1, 2], "token_type_ids": [1]}], "row 0 of a batch has 2 input_ids and 1 token_type_ids"),
    ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1], "labels": [1, 2]}], "the labels of a batch make no tensor"),
]


@pytest.mark.parametrize(("rows", "problem"), REFUSED)
def test_rows_that_cannot_be_packed_are_named(rows, problem):
    with pytest.raises(InputError, match=problem) as error:
        PackingCollator()(rows)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["BertModel", "BertForTokenClassification", "ModernBertForMaskedLM"])
def test_other_heads_refuse_a_packed_batch(name):
    model = make(name)
    batch = PackingCollator()([{"input_ids": [7, 8]}, {"input_ids": [9]}])
    ticketops.patch(model)
    with pytest.raises(InputError, match=f"reached {name} otherwise than through"):
        model(**batch)


def test_a_batch_that_does_not_fit_its_mask_is_refused(model):
    ticketops.patch(model)
    batch = PackingCollator()(make_rows())
    with pytest.raises(InputError, match="has another number of tokens than its attention_mask"):
        model(**batch | {"packed_input_ids": batch["packed_input_ids"][:, :-1]})
    del batch["attention_mask"]
    with pytest.raises(InputError, match="without the attention_mask"):
        model(**batch)


def test_a_compiled_model_takes_packed_batches():
    model, rows = BertForSequenceClassification(tiny_config(num_hidden_layers=1)).eval(), make_rows()
    want = copy.deepcopy(model)(**padded(rows)).logits
    ticketops.patch(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**PackingCollator()(rows)).logits, want, **roundings(1000, 100))


def make_trainer(model, folder, collator, rows, **changes):
    settings = {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_steps": 1,
    }
    arguments = TrainingArguments(**{**settings, **changes})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)


def many_rows():
    draw = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 18, (20,), generator=draw).tolist()
    return make_rows(torch.randint(0, 3, (20,), generator=draw).tolist(), lengths=lengths)


def test_a_trainer_trains_and_predicts_as_with_padding(model, tmp_path):
    rows = many_rows()
    results = []
    for collator in (padded, PackingCollator()):
        trained = copy.deepcopy(model)
        callback = ticketops.TicketCallback(ticketops.patch(trained), 0.25)
        trainer = make_trainer(trained, tmp_path, collator, rows)
        trainer.add_callback(callback)
        trainer.train()
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        predicted = trainer.predict(rows)
        results.append([losses, predicted.predictions, predicted.label_ids, trainer.evaluate()["eval_loss"]])
        results[-1] += [callback.importance.head, *trained.state_dict().values()]
        # Rows are where they are in the data.
        alone = [trained(**PackingCollator()([row])).logits[0].detach() for row in rows]
        torch.testing.assert_close(torch.tensor(predicted.predictions), torch.stack(alone), **roundings(1000, 100))
        assert predicted.label_ids.tolist() == [row["labels"] for row in rows]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(torch.as_tensor(got), torch.as_tensor(want), rtol=0, atol=0)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(many_rows())


def test_streamed_rows_keep_their_order_too(model, tmp_path):
    ticketops.patch(model)
    trainer = make_trainer(model, tmp_path, PackingCollator(), Stream(), max_steps=2)
    trainer.train()
    rows = many_rows()
    alone = torch.stack([model(**PackingCollator()([row])).logits[0].detach() for row in rows])
    found = trainer.predict(Stream()).predictions
    torch.testing.assert_close(torch.tensor(found), alone, **roundings(1000, 100))


def test_worker_processes_can_pack(model):
    ticketops.patch(model)
    loader = DataLoader(many_rows(), 5, collate_fn=PackingCollator(), num_workers=1)
    assert [model(**batch).logits.shape for batch in loader] == [(5, 3)] * 4


def test_a_shared_encoder_takes_packed_batches_for_each_head():
    torch.manual_seed(0)
    heads = {name: BertForSequenceClassification(tiny_config()).eval() for name in ("one", "two")}
    shared = ticketops.SharedModel(heads)
    batch = tiny_batch(5)
    for name in heads:
        rows = make_rows()
        got = shared(name, **PackingCollator()(rows)).logits
        assert torch.equal(got, shared(name, **padded(rows)).logits)
    assert len(batch["labels"]) == 5


def test_a_reloaded_small_model_takes_packed_batches(model, tmp_path):
    ticketops.patch(model)
    rows = make_rows()
    ticketops.shrink(model, TICKETS["neither"]).save_pretrained(tmp_path)
    want = model(**PackingCollator()(rows)).logits
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    ticketops.patch(loaded)
    assert torch.equal(loaded(**PackingCollator()(rows)).logits, want)
