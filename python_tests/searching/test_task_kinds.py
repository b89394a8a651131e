"""Whole runs of every kind of task beside classification and regression."""

import json
import random

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

import ticketops
from ticketops.errors import InputError, UnsupportedError
from ticketops.searching import SearchConfig, Setting
from ticketops.searching.release import release
from ticketops.searching.resampling import resampled
from ticketops.searching.setting import _load_tokenizer
from ticketops.searching.store import Store
from ticketops.searching.transfer import subset
from ticketops.tasks import load_task

from .tiny import FIELDS, FILLERS

OPTIONS = FIELDS | {"kinds": "winning", "sparsities": "0.25", "epochs": 1, "train_rows": None}
HEADS = {
    "entities": "BertForTokenClassification",
    "questions": "BertForQuestionAnswering",
    "choices": "BertForMultipleChoice",
    "labels": "BertForSequenceClassification",
}


def make_rows(kind, number, seed):
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        words = [draw.choice([*FILLERS, "good", "bad"]) for _ in range(draw.randrange(3, 24))] + ["good"]
        draw.shuffle(words)
        text = " ".join(words)
        if kind == "entities":
            rows.append({"tokens": words, "ner_tags": ["B-X" if word in ("good", "bad") else "O" for word in words]})
        elif kind == "questions":
            answers = {"text": ["good"], "answer_start": [f" {text} ".index(" good ")]}
            rows.append({"question": "is it", "context": text, "answers": answers})
        elif kind == "choices":
            right = draw.randrange(3)
            rows.append(
                {"premise": text, "choices": ["bad"] * right + ["good"] + ["bad"] * (2 - right), "label": right}
            )
        else:
            rows.append({"text": text, "labels": [word for word in ("good", "bad", "film") if word in words]})
    return rows


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("kinds")
    for kind in HEADS:
        (root / kind).mkdir()
        for split, number in (("train", 24), ("validation", 12), ("test", 8)):
            rows = make_rows(kind, number, seed=split)
            (root / kind / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {kind: root / kind for kind in HEADS}


@pytest.fixture(scope="module", params=HEADS)
def search(request, folders, inputs, tmp_path_factory):
    options = OPTIONS | {"model": inputs["model"], "task": str(folders[request.param]), "save_models": True}
    output = tmp_path_factory.mktemp("search") / request.param
    return request.param, ticketops.search(output=str(output), importance="both", **options)


def test_a_search_runs_whole(search, tmp_path):
    kind, result = search
    assert [record["kind"] for record in result.records] == ["full", "winning"]
    for record in result.records:
        assert record["rows"] == {"validation": 12, "report": 8}
        assert 0 <= record["report_score"] <= 1
        assert set(record["scores"]["validation"]) == set(record["scores"]["report"])
    assert result.super_ticket is not None
    assert f"reaches {result.records[0]['metric']} " in result.report_path.read_text()
    # What is exported has the task's head.
    folder = release(result.folder, tmp_path / "small")
    config = transformers.AutoConfig.from_pretrained(folder)
    assert config.architectures == [HEADS[kind]]
    if kind == "entities":
        assert config.id2label == {0: "O", 1: "B-X"}


def test_the_kept_predictions_have_the_recorded_scores(search, folders, inputs):
    kind, result = search
    setting = Setting.load(SearchConfig(**OPTIONS, model=inputs["model"], task=str(folders[kind])))
    store = Store.read(result.folder)
    for trial, record in zip(store.plan, result.records, strict=True):
        predictions = store.predictions(trial)
        for split, scores in record["scores"].items():
            rows = getattr(setting.task, split)
            assert setting.task.score(predictions[split], setting.splits[split], rows) == scores
            # What each row contributes gives the metric of all of them.
            results = predictions[split + "-rows"]
            (found,) = resampled(record["metric"], [results], np.ones((1, len(rows))))[0]
            assert found == pytest.approx(scores[record["metric"]], abs=1e-5)


@pytest.mark.parametrize("kind", HEADS)
def test_importance_is_that_of_the_stock_model(kind, folders, inputs):
    """|dL/d mask| of a head, by differences of the loss over single inputs."""
    setting = Setting.load(SearchConfig(**OPTIONS, model=inputs["model"], task=str(folders[kind])))
    model = setting.fresh_model(0).double().eval()
    collate = setting.task.collator(setting.tokenizer)
    # The loss of questions reads padding, too, where patched models have zeros.
    rows = 1 if kind == "questions" else 4
    batch = collate([setting.splits["train"][row] for row in range(rows)])
    batch = {name: value.double() if value.is_floating_point() else value for name, value in batch.items()}
    handle = ticketops.patch(model)
    with handle.record_importance("batch", setting.task.sequences_per_example) as importance:
        model(**batch).loss.backward()
    handle.revert()
    layer, head, step = 1, 2, 1e-5
    width = model.config.hidden_size // model.config.num_attention_heads

    def scaled(factor):
        scale = torch.ones(model.config.hidden_size, dtype=torch.double)
        scale[head * width : (head + 1) * width] = factor
        attention = model.base_model.encoder.layer[layer].attention.self
        hook = attention.register_forward_hook(lambda module, inputs, output: (output[0] * scale, *output[1:]))
        with torch.no_grad():
            loss = model(**batch).loss.item()
        hook.remove()
        return loss

    wanted = abs(scaled(1 + step) - scaled(1 - step)) / (2 * step)
    assert importance.head[layer, head].item() == pytest.approx(wanted, rel=1e-4, abs=1e-8)


def test_a_share_of_a_task_with_windows_has_their_rows(folders, inputs):
    setting = Setting.load(SearchConfig(**OPTIONS, model=inputs["model"], task=str(folders["questions"])))
    assert len(setting.splits["train"]) > len(setting.task.train)
    part = subset(setting, 0.5, seed=0)
    assert len(part.task.train) == 12
    rows = {row["context"] for row in part.task.train}
    assert rows < {row["context"] for row in setting.task.train}
    assert 12 <= len(part.splits["train"]) < len(setting.splits["train"])


def test_a_ticket_of_entities_transfers_to_questions(folders, inputs, tmp_path):
    result = ticketops.transfer(
        model=inputs["model"],
        source=str(folders["entities"]),
        target=str(folders["questions"]),
        output=str(tmp_path),
        head="fresh",
        fractions="0.5,1",
        sparsities="0.25",
        max_length=16,
        batch_size=16,
        epochs=1,
        source_ladder=False,
    )
    assert result == ticketops.read(tmp_path)
    assert [record["metric"] for record in result.records] == ["f1"] * 4
    assert {record["train_rows"] for record in result.records} == {12, 24}
    with pytest.raises(
        InputError, match=r"entities \(O, B-X\) are not those of target questions \(a part of the context"
    ):
        ticketops.transfer(
            source=str(folders["entities"]), target=str(folders["questions"]), output=str(tmp_path / "b")
        )


@pytest.mark.slow
def test_mixed_kinds_share_one_encoder(folders, inputs, pairs, tmp_path):
    """A head without a pooler, one with, and a regression."""
    result = ticketops.share(
        model=inputs["model"],
        tasks=[str(folders["entities"]), inputs["task"], pairs, str(folders["questions"])],
        output=str(tmp_path / "share"),
        sparsities="0.25",
        max_length=16,
        batch_size=16,
        epochs=1,
        train_rows=24,
        validation_rows=12,
        arms="tickets,plain",
        save_models=True,
    )
    assert result == ticketops.read(result.folder)
    assert {record["kind"] for record in result.records} == {"tickets", "plain"}
    for record in result.records:
        assert {task["metric"] for task in record["tasks"].values()} == {"entity_f1", "accuracy", "pearson", "f1"}
    store = Store.read(result.folder)
    shared = ticketops.SharedModel.load(store.model(next(trial for trial in store.plan if trial.kind == "tickets")))
    for task, kind in (("entities", "BertForTokenClassification"), ("task", "BertForSequenceClassification")):
        single = shared.single(task)
        assert type(single).__name__ == kind
        exported = ticketops.export(single, tmp_path / task, ticket=shared.tickets[task])
        again = ticketops.load(exported)
        ids = {"input_ids": torch.tensor([[2, 5, 6, 3]])}
        with torch.no_grad():
            wanted = shared.eval()(task, **ids).logits
            np.testing.assert_allclose(again(**ids).logits, wanted, rtol=0, atol=1e-5)


def test_a_model_without_the_head_is_refused(folders):
    task = load_task(folders["choices"])
    task.check_model(transformers.BertConfig())
    with pytest.raises(UnsupportedError, match=r"no MultipleChoice head for vit, which task choices"):
        task.check_model(transformers.ViTConfig())


def test_words_of_byte_level_tokenizers_begin_with_a_space(folders, tmp_path):
    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=["<pad>"], vocab_size=300, initial_alphabet=alphabet)
    bare.train_from_iterator([" Ada met Bob in Rome"] * 9, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bare, pad_token="<pad>").save_pretrained(tmp_path)
    tokenizer = _load_tokenizer(tmp_path, load_task(folders["entities"]))
    tokens = tokenizer(["Ada", "met"], is_split_into_words=True)
    assert tokenizer.convert_ids_to_tokens(tokens["input_ids"]) == ["ĠAda", "Ġmet"]
    tokenizer.save_pretrained(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again(["Ada", "met"], is_split_into_words=True)["input_ids"] == tokens["input_ids"]
