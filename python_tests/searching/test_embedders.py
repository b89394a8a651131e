"""Searches whose models are SentenceTransformers: data, losses, metrics, importance, and what is saved of them."""

import copy
import json
import random
import subprocess
import sys

import pytest
import torch
from bounds import roundings
from safetensors.torch import load_file

import ticketops
from ticketops.errors import InputError, UnsupportedError
from ticketops.models.containers import separate_columns
from ticketops.reporting import read
from ticketops.searching import Listener, SearchConfig, Setting
from ticketops.searching.execution import Execution
from ticketops.searching.release import release
from ticketops.searching.run import search_jobs
from ticketops.searching.store import Store
from ticketops.tasks import load_task

from .tiny import FIELDS, FILLERS, HEADS, LAYERS, make_model

pytest.importorskip("sentence_transformers", reason="needs the extra: make test-extras")

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator, TripletEvaluator
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

KIND = {"task_kind": "sentence-similarity"}
OPTIONS = FIELDS | KIND | {"kinds": "winning", "sparsities": "0.5", "epochs": 1, "train_rows": None}


def make_rows(columns, number, seed):
    """Rows of texts that say "good" or "bad", the negative the other one; sentences have a score from 0 to 5."""
    draw = random.Random(seed)
    rows = []
    for _ in range(number):
        word = draw.choice(["good", "bad"])
        other = {"good": "bad", "bad": "good"}[word]
        row = {}
        for column in columns:
            texts = [draw.choice(FILLERS) for _ in range(draw.randrange(2, 9))]
            texts.insert(draw.randrange(len(texts)), other if column == "negative" else word)
            row[column] = " ".join(texts)
        if columns == ("sentence1", "sentence2"):
            row["score"] = round(5 * draw.random(), 2) if len(rows) > 1 else 5.0 * len(rows)
        rows.append(row)
    return rows


ROWS = {
    "scored": ("sentence1", "sentence2"),
    "triplets": ("anchor", "positive", "negative"),
    "pairs": ("anchor", "positive"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("similarity")
    for name, columns in ROWS.items():
        (root / name).mkdir()
        for split, number in (("train", 32), ("validation", 20)):
            rows = make_rows(columns, number, seed=f"{name} {split}")
            (root / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {name: str(root / name) for name in ROWS}


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    """A SentenceTransformer with modules of its own, a prompt and a limit."""
    root = tmp_path_factory.mktemp("embedder")
    encoder = Transformer(str(make_model(root / "bare")), max_seq_length=24)
    modules = [encoder, Pooling(32, pooling_mode="cls"), Dense(32, 8), Normalize()]
    model = SentenceTransformer(modules=modules, device="cpu", prompts={"all": "the "}, default_prompt_name="all")
    model.save_pretrained(str(root / "model"), create_model_card=False)
    return str(root / "model")


def load(model, folder, **changes):
    return Setting.load(SearchConfig(model=model, task=folder, **(OPTIONS | changes)))


def predicted(setting, split="validation"):
    """Embeddings of a split by a fresh model, and what the task makes of them."""
    model, collate = setting.fresh_model(0).eval(), setting.task.collator(setting.tokenizer)
    rows = setting.splits[split]
    with torch.no_grad():
        found = [model(**collate([row]), return_loss=False).embeddings for row in rows]
    return model.embedder, torch.cat(found), setting.task.logits(torch.cat(found).numpy())


@pytest.mark.parametrize("which", ["embedder", "bare"])
def test_embeddings_and_correlation_are_those_of_the_library(which, embedder, inputs, folders):
    setting = load(embedder if which == "embedder" else inputs["model"], folders["scored"])
    model, embeddings, logits = predicted(setting)
    rows = setting.task.validation
    assert len(model) == (4 if which == "embedder" else 2)
    stock = SentenceTransformer(setting.config.model, device="cpu")
    for place, column in enumerate(setting.task.columns):
        want = torch.tensor(stock.encode(rows[column][:]))
        torch.testing.assert_close(embeddings[:, place], want, **roundings(1000, 100))
    evaluate = EmbeddingSimilarityEvaluator(*(rows[name][:] for name in setting.task.columns), rows["label"][:])
    want = evaluate(stock)
    found = setting.task.score(logits, setting.splits["validation"], rows)
    assert found == pytest.approx({"spearman": want["spearman_cosine"], "pearson": want["pearson_cosine"]}, abs=1e-4)


def test_another_metric_selects(embedder, folders):
    task = load(embedder, folders["scored"], metric="pearson").task
    assert (task.metric, task.has_scores) == ("pearson", True)


def test_the_share_of_triplets_is_that_of_the_library(embedder, folders):
    setting = load(embedder, folders["triplets"])
    _, _, logits = predicted(setting)
    rows = setting.task.validation
    want = TripletEvaluator(*(rows[name][:] for name in setting.task.columns))(SentenceTransformer(embedder))
    assert setting.task.score(logits, setting.splits["validation"], rows) == pytest.approx(want)
    assert setting.task.majority() == 0.5


def test_pairs_without_a_score_are_found_among_all_rows(embedder, folders, monkeypatch):
    monkeypatch.setattr("ticketops.tasks.embedders._CHUNK", 7)
    setting = load(embedder, folders["pairs"])
    _, embeddings, logits = predicted(setting)
    cosines = torch.cosine_similarity(embeddings[:, None, 0], embeddings[None, :, 1], dim=-1)
    want = (cosines.argmax(1) == torch.arange(len(cosines))).float().mean().item()
    others = cosines.masked_fill(torch.eye(len(cosines)).bool(), -1).amax(1)
    torch.testing.assert_close(torch.tensor(logits).float(), torch.stack([cosines.diagonal(), others], 1))
    found = setting.task.score(logits, setting.splits["validation"], setting.task.validation)
    assert found == {"cosine_accuracy": pytest.approx(want)}
    assert setting.task.majority() == 1 / 20


@pytest.mark.parametrize(
    ("rows", "loss"),
    [
        ("scored", "CosineSimilarityLoss"),
        ("scored", "CoSENTLoss"),
        ("scored", "AnglELoss"),
        ("triplets", "MultipleNegativesRankingLoss"),
        ("triplets", "TripletLoss"),
        ("pairs", "MultipleNegativesRankingLoss"),
    ],
)
def test_loss_and_importance_are_those_of_the_library(rows, loss, embedder, folders):
    setting = load(embedder, folders[rows], loss=loss)
    assert f"loss {loss}" in setting.task.describe()
    model = setting.fresh_model(0).double().eval()
    stock = copy.deepcopy(model.embedder)
    batch = setting.task.collator(setting.tokenizer)([setting.splits["train"][row] for row in range(5)])
    with ticketops.patch(model) as handle, handle.record_importance() as importance:
        found = model(**batch).loss
        found.backward()
    masks = [(torch.ones(5, HEADS).requires_grad_(), torch.ones(5).requires_grad_()) for _ in range(LAYERS)]
    for layer, (heads, ffn) in zip(stock[0].model.encoder.layer, masks, strict=True):
        layer.attention.output.register_forward_pre_hook(
            lambda _, args, by=heads: ((args[0].unflatten(-1, (HEADS, -1)) * by[:, None, :, None]).flatten(2), args[1])
        )
        layer.output.dense.register_forward_hook(lambda _, args, output, by=ffn: output * by[:, None, None])
    prompted = [["the " + text for text in setting.task.train[name][:5]] for name in setting.task.columns]
    features = [stock.preprocess(texts) for texts in prompted]
    with separate_columns():
        want = getattr(losses, loss)(stock)(features, labels_of(setting, 5))
    want.backward()
    torch.testing.assert_close(found, want)
    for got, place in ((importance.head, 0), (importance.ffn, 1)):
        exact = torch.stack([(5 * mask[place].grad).abs().mean(0) for mask in masks]).double()
        torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5 * exact.max().item())


def labels_of(setting, number):
    """Scores on the library's scale, from 0 to 1."""
    if not setting.task.has_scores:
        return None
    return torch.tensor(setting.task.train["label"][:number]).double() / 5


# --- whole searches


@pytest.fixture(scope="module")
def search(embedder, folders, tmp_path_factory):
    output = tmp_path_factory.mktemp("search") / "run"
    options = OPTIONS | {"save_models": True, "epochs": 2, "early_stopping_patience": 1}
    return ticketops.search(model=embedder, task=folders["scored"], output=str(output), **options)


def test_a_search_runs_whole(search):
    assert [record["kind"] for record in search.records] == ["full", "winning"]
    assert all(record["metric"] == "spearman" for record in search.records)
    assert "reaches spearman" in search.report_path.read_text()
    assert search.super_ticket.heads_pruned == LAYERS * HEADS // 2


LOADER = """
import sys, ticketops
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
save_file({"embeddings": model.encode(sys.argv[3:], convert_to_tensor=True)}, sys.argv[2])
"""


def test_kept_and_exported_embedders_are_what_was_scored(search, folders, tmp_path):
    setting = load(search.config.model, folders["scored"])
    rows, store = setting.task.validation, Store.read(search.folder)
    logits = store.predictions(store.plan[1])["validation"]
    for format in ("kept", "compact", "dense"):
        if format == "kept":
            with pytest.warns(UserWarning, match="saved with a ticket applied"):
                model = SentenceTransformer(str(store.model(store.plan[1])), device="cpu")
            ticketops.patch(model)
        else:
            model = SentenceTransformer(str(release(search.folder, tmp_path / format, format)), device="cpu")
        assert (len(model), model.max_seq_length, model.default_prompt_name) == (4, 24, "all")
        found = [torch.tensor(model.encode(rows[name][:])) for name in setting.task.columns]
        want = torch.tensor(logits[:, 0]).float()
        torch.testing.assert_close(torch.cosine_similarity(*found), want, **roundings(1000, 1000))
    small = SentenceTransformer(str(tmp_path / "compact"), device="cpu")[0].model
    heads = [layer.attention.self.num_attention_heads for layer in small.encoder.layer]
    assert sum(heads) == LAYERS * HEADS // 2
    file, texts = tmp_path / "found.safetensors", rows["sentence1"][:]
    subprocess.run([sys.executable, "-c", LOADER, tmp_path / "compact", file, *texts], check=True)
    torch.testing.assert_close(load_file(file)["embeddings"], torch.tensor(model.encode(texts)), **roundings(1000, 100))


@pytest.mark.parametrize("rows", ["triplets", "pairs"])
def test_rows_without_a_score_train(rows, embedder, folders, tmp_path):
    setting = load(embedder, folders[rows], output=str(tmp_path / "run"), importance="both")
    Execution().run(search_jobs(setting), Listener())
    result = read(setting.config.output)
    assert [record["metric"] for record in result.records] == ["cosine_accuracy"] * 2
    assert result.records[0]["rank_correlation"].keys() == {"head", "ffn"}


# --- what is refused


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ("scored", {"loss": "TripletLoss"}, r"TripletLoss does not take pairs with a score: choose from CosineSimi"),
        ("pairs", {"loss": "TripletLoss"}, r"TripletLoss does not take pairs without a score: choose from MultipleNeg"),
        ("triplets", {"loss": "CoSENTLoss"}, r"CoSENTLoss does not take triplets: choose from MultipleNegativesRank"),
        ("pairs", {"loss": "CachedMultipleNegativesRankingLoss"}, r"loss 'Cached.* is unknown: choose from Cosine"),
        ("scored", {"loss": "CoSENTLoss", "task_kind": None}, r"goes with task_kind='sentence-similarity' alone"),
        (
            "scored",
            {"metric": "cosine_accuracy"},
            r"'cosine_accuracy' does not suit task scored .* choose from spearman",
        ),
        ("scored", {"granularity": "token"}, r"token has no meaning for sentence-similarity"),
        ("scored", {"text_columns": "sentence1"}, r"text columns sentence1 for sentence similarity: give"),
        ("triplets", {"text_columns": "anchor,anchor"}, r"text columns anchor, anchor for sentence similarity"),
        ("scored", {"max_length": 25}, r"max_length.* 25 does not suit the tokenizer"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(rows, changes, words, embedder, folders):
    with pytest.raises(InputError, match=words) as error:
        load(embedder, folders[rows], **changes)
    assert "\n" not in str(error.value)


def test_share_and_transfer_refuse_it(inputs, folders, tmp_path):
    options = {"model": inputs["model"], "output": str(tmp_path / "run"), "max_length": 16, **KIND}
    for run in (
        lambda: ticketops.share(tasks=[folders["scored"], folders["pairs"]], **options),
        lambda: ticketops.transfer(source=folders["scored"], target=folders["scored"], **options),
    ):
        with pytest.raises(UnsupportedError, match="does not take sentence-similarity, as of task scored: use"):
            run()
    assert not (tmp_path / "run").exists()


def test_without_the_library_it_says_what_to_install(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers.base.model", None)
    with pytest.raises(UnsupportedError, match="pip install 'sentence-transformers>=6'"):
        load_task(folders["scored"], kind="sentence-similarity")


def test_regression_stays_what_scored_pairs_are_by_themselves(folders):
    assert load_task(folders["scored"]).kind == "regression"
