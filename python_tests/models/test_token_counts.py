"""Batches that say how many tokens they have: patched models take the counts out, use them, and trust no wrong one."""

import copy
import itertools
import pickle

import pytest
import torch
from bounds import roundings
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import (
    BatchEncoding,
    BertForMultipleChoice,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

import ticketops
from models.conftest import tiny_batch, tiny_config
from models.test_encoders import MODELS, TEXT, draw, make
from ticketops import CountingCollator, InputError, PackingCollator
from ticketops.models import boundary
from ticketops.ops import Packing, packing
from ticketops.ops.packing import TokenCounts

#: Takes a batch in place of rows.
COUNTED = CountingCollator(dict)
TEXT_MODELS = [name for name in MODELS if any(name.startswith(encoder) for encoder in TEXT)]


@pytest.fixture
def packed(monkeypatch):
    """The counts of each packing, as they come."""
    found, from_mask = [], Packing.from_mask

    def noted(*args):
        found.append(args[-1])
        return from_mask(*args)

    monkeypatch.setattr(Packing, "from_mask", noted)
    return found


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU, the host reads no tensor, and assertions are the device's."""
    monkeypatch.setattr(packing, "on_host", lambda x: False)
    monkeypatch.setattr(boundary, "on_host", lambda x: False)


def outputs(model, batch):
    """All outputs and gradients of a pass."""
    model.zero_grad()
    found = [value for value in model(**batch).to_tuple() if isinstance(value, torch.Tensor)]
    sum(value.sum() for value in found).backward()
    return found + [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        # MPNet's norms of padding, which is zeros, have gradients that overflow.
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_every_model_takes_the_counts_out_and_uses_them(name, packed, monkeypatch):
    model = make(name)
    batch = draw(model)
    counted = COUNTED(batch)
    with ticketops.patch(model):
        want = outputs(model, batch)
        found = outputs(model, counted)
        assert packed == [None, counted["token_counts"]]
        assert_same(found, want)
        # The batch is as it was, for another pass.
        assert_same(outputs(model, counted), want)
        model(**counted, output_hidden_states=True)
        with monkeypatch.context() as patch:
            # The stock code computes it.
            patch.setattr(boundary, "transform", lambda: "a test")
            packed.clear()
            assert_same(outputs(model, counted), outputs(model, batch))
            assert not packed
        with torch.no_grad(), torch.inference_mode():
            model(**counted)
    assert not hasattr(batch["attention_mask"], "_ticketops_counts")
    with ticketops.patch(model, unpad=False):
        assert_same(outputs(model, counted), outputs(model, batch))


class Strict(BertForSequenceClassification):
    """A model of the user's own, which takes no argument that it does not know."""

    def forward(self, input_ids, attention_mask, token_type_ids, labels):
        return super().forward(input_ids, attention_mask, token_type_ids, labels=labels)


def test_a_model_that_takes_no_other_arguments_gets_none(batch, packed):
    model = Strict(tiny_config()).eval()
    ticketops.patch(model)
    want = outputs(model, batch)
    assert_same(outputs(model, COUNTED(batch)), want)
    assert packed == [None, TokenCounts.of(batch["attention_mask"])]


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "MPNetModel", "ModernBertModel", "DebertaV2Model"])
@pytest.mark.parametrize("holes", [False, True])
def test_masks_of_any_kind_are_packed_by_their_counts(name, holes, packed, unread):
    model = make(name)
    batch = draw(model, padding="left")
    if holes:
        batch["attention_mask"][:, 5:15:3] = 0
    model.register_module("pooler", None)
    ticketops.patch(model, unpad=True)
    want = outputs(model, batch)
    counted = COUNTED(batch)
    assert_same(outputs(model, counted), want)
    assert packed == [None, counted["token_counts"]]
    assert counted["token_counts"].holes > 0 or not holes


def test_counts_of_masks():
    masks = torch.tensor([[[1, 1, 0, 0], [0, 0, 0, 0]], [[3, 0, 1, 0], [1, 1, 1, 1]]])
    assert TokenCounts.of(masks) == TokenCounts(4, 4, 8, 1, 4, False)
    assert TokenCounts.of(masks[:1].flip(-1).bool()) == TokenCounts(2, 4, 2, 0, 2, True)
    assert TokenCounts.of(masks[0, 1:]) == TokenCounts(1, 4, 0, 0, 0, False)
    assert TokenCounts.of(masks[0, :0]) == TokenCounts(0, 4, 0, 0, 0, False)
    assert TokenCounts.of(masks[0, :, :0]) == TokenCounts(2, 0, 0, 0, 0, False)


WRONG = [
    ("BertForSequenceClassification", {"tokens": 29}),
    ("BertForSequenceClassification", {"tokens": 31}),
    ("BertForSequenceClassification", {"longest": 16}),
    ("MPNetModel", {"holes": 1}),
    ("MPNetModel", {"holes": 1, "tokens": 29}),
]


@pytest.mark.parametrize(("name", "wrong"), WRONG)
def test_counts_of_another_mask_are_refused(name, wrong, monkeypatch):
    model = make(name)
    ticketops.patch(model)
    batch = draw(model)
    counts = TokenCounts.of(batch["attention_mask"])
    assert (counts.tokens, counts.longest, counts.holes) == (30, 17, 0)
    for key, value in wrong.items():
        setattr(counts, key, value)
    problem = "the number of tokens that came with the attention mask is that of another mask"
    with pytest.raises(InputError, match=problem):
        model(**batch, token_counts=counts)
    # As on a GPU.
    monkeypatch.setattr(packing, "on_host", lambda x: False)
    with pytest.raises(RuntimeError, match=problem):
        model(**batch, token_counts=counts)


def test_padding_in_front_that_the_counts_deny_is_refused(model, batch, monkeypatch):
    ticketops.patch(model)
    counted = COUNTED(batch)
    counted["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(InputError, match="row 1 of the attention mask begins with padding, where its first token"):
        model(**counted)
    monkeypatch.setattr(packing, "on_host", lambda x: False)
    with pytest.raises(RuntimeError, match="a row of the attention mask begins with padding"):
        model(**counted)


def test_padding_in_front_is_known_without_looking(model, stock, batch, packed, unread):
    handle = ticketops.patch(model)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    counted = COUNTED(batch)
    # The stock code computes it.
    torch.testing.assert_close(model(**counted).logits, stock(**batch).logits, **roundings(1000, 100))
    assert not packed
    with handle.record_importance(), pytest.raises(ticketops.UnsupportedError, match="padding in front of a row"):
        model(**counted)


def test_hooks_see_padded_batches_by_the_counts_of_holes(model, batch, packed, unread):
    handle = ticketops.patch(model)
    seen = []
    model.bert.encoder.layer[1].register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with handle.record_importance():
        model(**COUNTED(batch)).loss.backward()
        assert seen == [(5, 17, 48)]
        batch["attention_mask"][0, 3] = 0
        with pytest.raises(ticketops.UnsupportedError, match="with holes in the attention mask"):
            model(**COUNTED(batch))


def test_counts_of_a_batch_that_somebody_divides_are_left_aside(model, batch, packed):
    """As DataParallel does."""
    ticketops.patch(model)
    counted = COUNTED(batch)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 5))]
    want = torch.cat([model(**half).logits for half in halves])
    replicas = [model(**half, token_counts=counted["token_counts"]) for half in halves]
    assert torch.equal(torch.cat([each.logits for each in replicas]), want)
    assert packed == [None] * 4


def test_counts_that_a_failed_pass_left_behind_are_not_those_of_a_changed_mask(model, batch, packed):
    batch.pop("labels")
    with ticketops.patch(model):
        counted = COUNTED(batch)
        hook = model.bert.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**counted)
        hook.remove()
        batch["attention_mask"][0, -2:] = 0
        packed.clear()
        model(**batch)
        with torch.inference_mode():
            model(**COUNTED({name: value.clone() for name, value in batch.items()}))
    assert [counts is None for counts in packed] == [True, False]


def test_a_mask_on_the_host_is_counted_before_it_travels(monkeypatch):
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0]])
    counts = TokenCounts.of(mask)
    monkeypatch.setattr(TokenCounts, "of", lambda mask: counts)
    monkeypatch.setattr(packing, "_send", lambda x, device: x)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("the host reads a tensor on the device"))
    for closes, indices in ((True, [0, 1, 4, 6]), (False, [0, 1, 4, -1, 6])):
        found = Packing.from_mask(mask, 2, 4, torch.device("cuda"), close_holes=closes)
        assert torch.equal(found.indices, torch.tensor(indices))
        assert found.sequences.max_length == 3


def test_a_packed_batch_tells_its_counts_by_its_shapes(model, packed):
    ticketops.patch(model)
    rows = [{"input_ids": [5, 6, 7], "labels": 0}, {"input_ids": [8], "labels": 1}]
    model(**PackingCollator()(rows))
    assert packed == [TokenCounts(2, 3, 4, 0, 3, False)]
    # Counting adds nothing.
    assert CountingCollator(PackingCollator())(rows).keys() == PackingCollator()(rows).keys()


def test_batches_of_other_kinds_stay_as_they_are():
    for batch in ({"labels": torch.ones(2)}, {"attention_mask": torch.ones(3)}, [torch.ones(2, 2)]):
        assert CountingCollator(lambda rows, batch=batch: batch)([]) is batch
    assert "token_counts" not in batch
    encoding = CountingCollator(BatchEncoding)({"attention_mask": torch.ones(2, 3)})
    assert encoding.to("cpu")["token_counts"] == TokenCounts(2, 3, 6, 0, 3, False)


def test_a_counting_collator_has_the_attributes_of_its_own_one():
    class Collator:
        tokenizer = "tokenizer"

    collator = CountingCollator(Collator())
    assert collator.tokenizer == "tokenizer"
    assert not hasattr(collator, "processor")
    assert pickle.loads(pickle.dumps(COUNTED)).collator is dict
    assert copy.deepcopy(COUNTED).collator is dict


def test_a_compiled_model_is_not_compiled_again_for_other_counts(packed):
    for kind in (BertForSequenceClassification, BertModel):
        torch.compiler.reset()
        model = kind(tiny_config(num_hidden_layers=1)).eval()
        ticketops.patch(model, bucket=512)
        compiled = torch.compile(model, backend="eager")
        batches = [tiny_batch(seed=seed) for seed in range(4)]
        for number, batch in enumerate(batches):
            batch["attention_mask"][0, 16 - number :] = 0
            batch = {name: value for name, value in batch.items() if name != "labels"}
            want = model(**batch)[0]
            packed.clear()
            with torch.compiler.set_stance("default" if number < 1 else "fail_on_recompile"):
                assert torch.equal(compiled(**COUNTED(batch))[0], want)
            assert packed == [TokenCounts.of(batch["attention_mask"])]
    model = BertForSequenceClassification(tiny_config(num_hidden_layers=1)).eval()
    ticketops.patch(model, unpad=False)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for batch in batches:
        assert torch.equal(compiled(**COUNTED(batch)).logits, model(**batch).logits)


def test_a_shared_encoder_takes_counts_for_each_head(packed):
    heads = {name: kind(tiny_config()) for name, kind in (("one", BertForSequenceClassification), ("two", BertModel))}
    heads["three"] = BertForMultipleChoice(tiny_config())
    shared = ticketops.SharedModel({name: heads[name] for name in ("one", "three")}).eval()
    one = tiny_batch(4)
    three = {name: value.view(2, 2, -1) for name, value in one.items() if name != "labels"}
    for name, batch in (("one", one), ("three", three)):
        assert torch.equal(shared(name, **COUNTED(batch)).logits, shared(name, **batch).logits)
    assert packed == [TokenCounts.of(one["attention_mask"]), None] * 2


def test_distributed_models_hand_the_counts_on(model, batch, packed, process_group):
    ticketops.patch(model)
    want = outputs(model, batch)
    for distribute in (DistributedDataParallel, fully_shard):
        packed.clear()
        distributed = distribute(copy.deepcopy(model))
        assert torch.equal(distributed(**COUNTED(batch)).logits, want[1])
        assert packed == [TokenCounts.of(batch["attention_mask"])]


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        self.rows = [
            {name: value[row] for name, value in tiny_batch(8, seed=seed).items()}
            for seed, row in itertools.product(range(4), range(5))
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def stack(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("workers", [0, 1])
def test_a_trainer_trains_to_the_bit_as_without(model, tmp_path, packed, workers):
    results = []
    for collator in (stack, CountingCollator(stack)):
        trained = copy.deepcopy(model)
        ticketops.patch(trained)
        arguments = TrainingArguments(
            str(tmp_path),
            num_train_epochs=2,
            per_device_train_batch_size=4,
            dataloader_num_workers=workers,
            report_to="none",
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
        )
        trainer = Trainer(trained, arguments, train_dataset=Rows(), eval_dataset=Rows(), data_collator=collator)
        packed.clear()
        trainer.train()
        assert len(packed) == 10
        assert all((counts is not None) == (collator is not stack) for counts in packed)
        results.append([torch.tensor(trainer.predict(Rows()).predictions), *trained.state_dict().values()])
    assert_same(*results)


def test_counts_cross_pinned_memory_and_loops_that_move_every_value(model):
    loader = DataLoader(Rows(), 5, collate_fn=CountingCollator(stack))
    ticketops.patch(model)
    for batch in loader:
        moved = {name: value.to("cpu", non_blocking=True) for name, value in batch.items()}
        assert moved["token_counts"] is batch["token_counts"]
        assert model(**moved).logits.shape == (5, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("where", ["counted", "packed", "mask on the host"])
@pytest.mark.parametrize("graphs", [False, "auto"])
def test_a_training_step_never_waits_for_the_gpu(where, graphs):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(hidden_size=64, problem_type="single_label_classification"))
    handle = ticketops.patch(model.cuda().train(), graphs=graphs)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    if where == "packed":
        batch = PackingCollator()([{"input_ids": [5] * n, "labels": n % 3} for n in (17, 3, 9)])
    else:
        batch = COUNTED(tiny_batch())
    kept = batch["attention_mask"] if where == "mask on the host" else None
    batch = {name: value.to("cuda") for name, value in batch.items() if where != name}
    if kept is not None:
        batch["attention_mask"] = kept
        del batch["token_counts"]

    def step():
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    with handle.record_importance():
        for _ in range(4):
            step()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
