"""Objects of sentence-transformers: patched, trained, scored, shrunk, saved and loaded as the models inside them are.

They call `model.forward(...)` itself, and several times before one backward pass.
"""

import copy
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bounds import roundings
from datasets import Dataset
from ops.cases import need
from safetensors.torch import load_file
from transformers import (
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    modeling_flash_attention_utils,
)

import ticketops
from models.conftest import HEADS, LAYERS, tiny_config
from models.test_patch import calls
from ticketops.errors import InputError, TicketopsError, UnsupportedError
from ticketops.models.handle import find_handle
from ticketops.tickets import Ticket

pytest.importorskip("sentence_transformers", reason="needs the extra: make test-extras")

from sentence_transformers import (
    CrossEncoder,
    CrossEncoderTrainer,
    CrossEncoderTrainingArguments,
    MultiVectorEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
    SparseEncoderTrainer,
    SparseEncoderTrainingArguments,
)
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import (
    CNN,
    Normalize,
    Pooling,
    Router,
    StaticEmbedding,
    Transformer,
)
from sentence_transformers.sparse_encoder.losses import SparseMultipleNegativesRankingLoss, SpladeLoss

WORDS = [f"w{number}" for number in range(95)]
TEXTS = [" ".join(WORDS[start : start + length]) for start, length in ((0, 9), (11, 1), (23, 14), (40, 5), (50, 3))]
ROWS = {
    "anchor": TEXTS,
    "positive": [" ".join(WORDS[start : start + 4]) for start in range(5)],
    "negative": [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(60, 65)],
}
#: Half of the heads and one FFN.
TICKET = Ticket(torch.tensor([[1, 0, 1, 0], [0, 1, 0, 0], [1, 1, 0, 1]]).bool(), torch.tensor([True, False, True]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny BERT with its tokenizer, for each of the three objects."""
    root = tmp_path_factory.mktemp("tiny")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}, model_max_length=40)
    heads = {"bare": BertModel, "pairs": BertForSequenceClassification, "terms": BertForMaskedLM}
    for name, kind in heads.items():
        torch.manual_seed(0)
        kind(tiny_config(num_labels=1)).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return root


@pytest.fixture
def embedder(folder):
    return SentenceTransformer(str(folder / "bare"), device="cpu")


def pooled_by(mode):
    def make(folder):
        encoder = Transformer(str(folder / "bare"))
        pooling = Pooling(encoder.get_embedding_dimension(), pooling_mode=mode)
        return SentenceTransformer(modules=[encoder, pooling, Normalize()], device="cpu")

    return make


def cross_encoder(folder):
    return CrossEncoder(str(folder / "pairs"), device="cpu")


def sparse_encoder(folder):
    return SparseEncoder(str(folder / "terms"), device="cpu")


def many_vectors(folder):
    expansion = {"strategy": "fixed", "length": 12, "attend": True}
    encoder = Transformer(str(folder / "bare"), query_expansion=expansion)
    return MultiVectorEncoder(modules=[encoder, MultiVectorMask()], device="cpu")


def results(model):
    if isinstance(model, MultiVectorEncoder):
        return torch.cat([torch.as_tensor(each) for each in model.encode_query(TEXTS)])
    if isinstance(model, CrossEncoder):
        return torch.tensor(model.predict(list(zip(TEXTS, reversed(TEXTS), strict=True))))
    found = model.encode(TEXTS, convert_to_tensor=True)
    return found.to_dense() if found.is_sparse else found


@pytest.mark.parametrize(
    "make",
    [
        *map(pooled_by, ("mean", "cls", "max", "weightedmean", "lasttoken")),
        cross_encoder,
        sparse_encoder,
        many_vectors,
    ],
    ids=["mean", "cls", "max", "weightedmean", "lasttoken", "cross", "sparse", "many_vectors"],
)
def test_results_equal_stock_under_no_ticket_a_ticket_and_shrunk(make, folder, tmp_path):
    model = make(folder)
    want = results(model)
    handle = ticketops.patch(model)
    torch.testing.assert_close(results(model), want, **roundings(1000, 100))
    handle.apply(TICKET)
    small = results(model)
    torch.testing.assert_close(results(pickle.loads(pickle.dumps(model))), small)
    assert not torch.allclose(small, want, rtol=0.01)
    assert ticketops.shrink(model, TICKET) is model
    torch.testing.assert_close(results(model), small, **roundings(1000, 100))
    handle.revert()
    torch.testing.assert_close(results(model), small, **roundings(1000, 100))
    model.save_pretrained(str(tmp_path))
    torch.testing.assert_close(results(type(model)(str(tmp_path), device="cpu")), small, **roundings(1000, 100))


def test_a_cross_encoder_computes_nothing_but_first_tokens_in_the_last_layer(folder):
    for op in ("attention", "ffn", "residual"):
        need("native", op, torch.float32)
    model = cross_encoder(folder)
    with ticketops.patch(model) as handle:
        said = calls(handle)
        results(model)
        copied = copy.deepcopy(model)
        # Somebody who asks for hidden states gets those of all tokens.
        model[0].model.config.output_hidden_states = True
        results(model)
    results(model)
    assert [call.first_tokens for call in said] == [LAYERS - 1, None]
    said = calls(find_handle(copied[0].model))
    results(copied)
    assert [call.first_tokens for call in said] == [LAYERS - 1]


@pytest.mark.parametrize(("kind", "name"), [(SentenceTransformer, "bare"), (SparseEncoder, "terms")])
def test_inputs_that_the_library_packs_are_served_with_a_ticket_too(kind, name, folder, monkeypatch):
    model = kind(str(folder / name), device="cpu")
    handle = ticketops.patch(model).apply(TICKET)
    want, columns = results(model), ("anchor", "positive")
    # SpladePooling writes over what a backward pass reads, in evaluation and of packed inputs.
    trains = kind is SentenceTransformer
    with handle.record_importance() as padded:
        if trains:
            losses.MultipleNegativesRankingLoss(model)(tokenized(model, columns), None).backward()
    # The library packs where flash attention could be imported, which a patched model does not call.
    flash = (None, object()), None
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda _: flash)
    model[0].model.config._attn_implementation = "flash_attention_2"
    model[0].unpad_inputs = True
    assert "cu_seq_lens_q" in model.preprocess(TEXTS)
    torch.testing.assert_close(results(model), want, **roundings(1000, 100))
    if not trains:
        return
    with handle.record_importance() as packed:
        losses.MultipleNegativesRankingLoss(model)(tokenized(model, columns), None).backward()
    torch.testing.assert_close(packed.head, padded.head, rtol=1e-3, atol=1e-5 * padded.head.max().item())


LOADER = """
import sys, ticketops.models
assert "sentence_transformers" not in sys.modules
from safetensors.torch import save_file
from sentence_transformers import SentenceTransformer
model = SentenceTransformer(sys.argv[1], device="cpu")
assert model[0].model.encoder.layer[1].attention.self.query.out_features == 12
save_file({"embeddings": model.encode(sys.argv[3:], convert_to_tensor=True)}, sys.argv[2])
"""


def test_a_process_that_never_saw_the_original_loads_it(embedder, tmp_path):
    ticketops.shrink(embedder, TICKET).save(str(tmp_path / "small"))
    found = tmp_path / "embeddings.safetensors"
    subprocess.run([sys.executable, "-c", LOADER, tmp_path / "small", found, *TEXTS], check=True)
    torch.testing.assert_close(load_file(found)["embeddings"], results(embedder), **roundings(1000, 100))


def test_a_ticket_that_is_applied_is_saved_along(embedder, tmp_path):
    ticketops.patch(embedder).apply(TICKET)
    embedder.save(str(tmp_path))
    with pytest.warns(UserWarning, match="saved with a ticket applied"):
        loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert ticketops.patch(loaded).ticket == TICKET
    torch.testing.assert_close(results(loaded), results(embedder), **roundings(1000, 100))


# --- training


TRAINERS = {
    SentenceTransformer: (SentenceTransformerTrainer, SentenceTransformerTrainingArguments),
    CrossEncoder: (CrossEncoderTrainer, CrossEncoderTrainingArguments),
    SparseEncoder: (SparseEncoderTrainer, SparseEncoderTrainingArguments),
}


def trained(model, loss, columns, folder):
    """The losses of a few steps of the library's own trainer."""
    rows = {name: ROWS[name] * 2 for name in columns if name != "score"}
    if "score" in columns:
        rows["score"] = [0.1 * number for number in range(10)]
    trainer, arguments = TRAINERS[type(model)]
    settings = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=5,
        num_train_epochs=2,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = trainer(model, settings, Dataset.from_dict(rows), loss=loss(model))
    trainer.train()
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def splade(model):
    ranking = SparseMultipleNegativesRankingLoss(model)
    return SpladeLoss(model, ranking, document_regularizer_weight=3e-5, query_regularizer_weight=5e-5)


def on_layers(model):
    inner = losses.CoSENTLoss(model)
    return losses.Matryoshka2dLoss(model, inner, [48, 24], n_layers_per_step=-1, n_dims_per_step=-1)


@pytest.mark.parametrize(
    ("make", "loss", "columns"),
    [
        (pooled_by("mean"), losses.CosineSimilarityLoss, ("anchor", "positive", "score")),
        (pooled_by("mean"), losses.MultipleNegativesRankingLoss, ("anchor", "positive", "negative")),
        (pooled_by("mean"), losses.CachedMultipleNegativesRankingLoss, ("anchor", "positive")),
        (pooled_by("cls"), on_layers, ("anchor", "positive", "score")),
        (cross_encoder, BinaryCrossEntropyLoss, ("anchor", "positive", "score")),
        (sparse_encoder, splade, ("anchor", "positive", "negative")),
    ],
    ids=["cosine", "ranking", "cached", "layers", "cross", "sparse"],
)
def test_losses_equal_stock_step_by_step(make, loss, columns, folder, tmp_path):
    model = make(folder)
    stock = copy.deepcopy(model)
    ticketops.patch(model)
    got, want = (trained(each, loss, columns, tmp_path) for each in (model, stock))
    assert len(want) == 4
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_what_a_ticket_prunes_does_not_move_in_training(embedder, tmp_path):
    ticketops.patch(embedder).apply(TICKET)
    before = copy.deepcopy(embedder.state_dict())
    trained(embedder, losses.CosineSimilarityLoss, ("anchor", "positive", "score"), tmp_path)
    query, ffn = (f"0.model.encoder.layer.1.{name}.weight" for name in ("attention.self.query", "intermediate.dense"))
    after = embedder.state_dict()
    moved = (after[query] != before[query]).view(HEADS, -1).any(1)
    assert moved.tolist() == TICKET.head_mask[1].tolist()
    assert torch.equal(after[ffn], before[ffn])
    assert ticketops.rewind(embedder, before) is embedder
    assert all(torch.equal(value, before[name]) for name, value in embedder.state_dict().items())


def tokenized(model, columns):
    return [model.preprocess(ROWS[name]) for name in columns]


@pytest.mark.parametrize("columns", [("anchor", "positive"), ("anchor", "positive", "negative")])
def test_importance_equals_its_definition_over_all_passes_of_a_step(embedder, columns):
    stock = copy.deepcopy(embedder)
    handle = ticketops.patch(embedder)
    with handle.record_importance() as importance:
        losses.MultipleNegativesRankingLoss(embedder)(tokenized(embedder, columns), None).backward()
    # One mask for an example in all passes, the slow way; the stock model has several columns in one pass.
    masks = [(torch.ones(5, HEADS, requires_grad=True), torch.ones(5, requires_grad=True)) for _ in range(LAYERS)]
    for layer, (heads, ffn) in zip(stock[0].model.encoder.layer, masks, strict=True):

        def scale_heads(_, args, by=heads):
            by = by.repeat(len(args[0]) // 5, 1)[:, None, :, None]
            return (args[0].unflatten(-1, (HEADS, -1)) * by).flatten(2), args[1]

        def scale_ffn(_, args, output, by=ffn):
            return output * by.repeat(len(output) // 5)[:, None, None]

        layer.attention.output.register_forward_pre_hook(scale_heads)
        layer.output.dense.register_forward_hook(scale_ffn)
    losses.MultipleNegativesRankingLoss(stock)(tokenized(stock, columns), None).backward()
    for found, place in ((importance.head, 0), (importance.ffn, 1)):
        want = torch.stack([(5 * mask[place].grad).abs().mean(0) for mask in masks]).double()
        torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-5 * want.max().item())


@pytest.mark.parametrize("size", [2, 5])
def test_cached_losses_are_recorded_by_the_batch_and_never_by_the_example(embedder, size):
    handle = ticketops.patch(embedder)
    cached = losses.CachedMultipleNegativesRankingLoss(embedder, mini_batch_size=size)
    found = []
    for loss in (cached, losses.MultipleNegativesRankingLoss(embedder)):
        with handle.record_importance("batch") as importance:
            loss(tokenized(embedder, ROWS), None).backward()
        found.append([importance.head, importance.ffn])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5 * found[1][0].max().item())
    with handle.record_importance(), pytest.raises(UnsupportedError, match="take the loss that is not cached"):
        cached(tokenized(embedder, ROWS), None).backward()


# --- what is refused


def several(folder):
    encoders = [Transformer(str(folder / "bare")) for _ in range(2)]
    routes = {"query": [encoders[0]], "document": [encoders[1]]}
    router = Router.for_query_document(query_modules=routes["query"], document_modules=routes["document"])
    return SentenceTransformer(modules=[router, Pooling(48)], device="cpu")


def none(folder):
    tokenizer = BertTokenizerFast.from_pretrained(folder / "bare")
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")


def convolved(folder):
    encoder = Transformer(str(folder / "bare"))
    return SentenceTransformer(modules=[encoder, CNN(48, 12), Pooling(36)], device="cpu")


def expanded(folder):
    expansion = {"strategy": "fixed", "length": 12}
    encoder = Transformer(str(folder / "bare"), query_expansion=expansion)
    return MultiVectorEncoder(modules=[encoder, MultiVectorMask()], device="cpu")


def compiled(folder):
    model = SentenceTransformer(str(folder / "bare"), device="cpu")
    model[0].model = torch.compile(model[0].model)
    return model


def patched_already(folder):
    model = SentenceTransformer(str(folder / "bare"), device="cpu")
    ticketops.patch(model[0].model)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (several, "this SentenceTransformer has 2 transformers models inside.* give them one by one"),
        (none, "this SentenceTransformer has no transformers model inside: load one whose first module"),
        (convolved, "this SentenceTransformer has a CNN, which reads hidden states at padding"),
        (expanded, "this MultiVectorEncoder has a query_expansion without attention, which.* set its attend=True"),
        (compiled, "OptimizedModule is not a transformers model: patch before torch.compile"),
        (patched_already, "this BertModel is patched already"),
        (lambda folder: losses.CosineSimilarityLoss(pooled_by("mean")(folder)), "Loss is not a transformers model"),
    ],
)
def test_what_cannot_be_patched_is_refused_in_one_line(make, words, folder):
    with pytest.raises((UnsupportedError, InputError), match=words) as error:
        ticketops.patch(make(folder))
    assert "\n" not in str(error.value)


def test_what_takes_only_transformers_models_says_so(embedder, tmp_path):
    with pytest.raises(UnsupportedError, match="is not a transformers model: give the model inside, or shrink"):
        ticketops.SharedModel({"a": embedder})
    with pytest.raises(UnsupportedError, match=r"a SentenceTransformer has no export as onnx: .* compact or dense"):
        ticketops.export(embedder, tmp_path / "x", "onnx")


@pytest.mark.parametrize("make", [pooled_by("mean"), cross_encoder, sparse_encoder], ids=["mean", "cross", "sparse"])
@pytest.mark.parametrize("format", ["compact", "dense"])
def test_an_export_is_loaded_by_the_class_that_it_was_made_from(make, format, folder, tmp_path):
    model = make(folder)
    handle = ticketops.patch(model).apply(TICKET)
    want = results(model)
    ticketops.export(model, tmp_path / "small", format)
    assert handle.ticket == TICKET
    torch.testing.assert_close(
        results(type(model)(str(tmp_path / "small"), device="cpu")), want, **roundings(1000, 100)
    )


def test_encoders_of_a_router_are_patched_one_by_one(folder):
    model = several(folder)
    want = model.encode_query(TEXTS, convert_to_tensor=True)
    ticketops.patch(model[0].sub_modules["query"][0].model)
    torch.testing.assert_close(model.encode_query(TEXTS, convert_to_tensor=True), want, **roundings(1000, 100))


# --- what is written of them


def test_the_example_in_the_guide_runs(folder, tmp_path, monkeypatch):
    guide = Path(__file__).parents[2].joinpath("docs", "guide.md").read_text(encoding="utf-8")
    (code,) = re.findall("```python\n(import copy, ticketops\nfrom sentence_transformers .*?)```", guide, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    pairs = Dataset.from_dict({name: ROWS[name] for name in ("anchor", "positive")})
    exec(code.replace("sentence-transformers/all-MiniLM-L6-v2", str(folder / "bare")), {"pairs": pairs})
    heads = [layer.attention.self.num_attention_heads for layer in SentenceTransformer("small")[0].model.encoder.layer]
    assert sum(heads) == LAYERS * HEADS // 2


# --- SetFit


def test_setfit_trains_and_predicts_as_with_the_stock_model(folder, tmp_path):
    setfit = pytest.importorskip("setfit", reason="needs SetFit: make test-extras")
    labels = [0, 1, 0, 1, 1]
    arguments = setfit.TrainingArguments(
        output_dir=str(tmp_path), num_epochs=1, num_iterations=2, batch_size=5, report_to="none", save_strategy="no"
    )

    def trained(patched):
        model = setfit.SetFitModel.from_pretrained(str(folder / "bare"), device="cpu")
        if patched:
            ticketops.patch(model.model_body)
        rows = Dataset.from_dict({"text": TEXTS, "label": labels})
        setfit.Trainer(model, arguments, train_dataset=rows).train()
        return model

    model, stock = trained(True), trained(False)
    torch.testing.assert_close(model.predict_proba(TEXTS), stock.predict_proba(TEXTS), rtol=1e-3, atol=1e-3)
    ticketops.shrink(model.model_body, TICKET)
    model.save_pretrained(str(tmp_path / "small"))
    loaded = setfit.SetFitModel.from_pretrained(str(tmp_path / "small"), device="cpu")
    torch.testing.assert_close(loaded.predict_proba(TEXTS), model.predict_proba(TEXTS))
    with pytest.raises(UnsupportedError, match="SetFitModel is not a transformers model: give its model_body"):
        ticketops.patch(model)


def test_the_benchmark_compares_equal_embeddings(folder):
    from bench.embed import contenders, measure

    models = contenders(str(folder / "bare"))
    ratios = measure(models, TEXTS, batch_size=2, turns=2)["times_as_fast_as_stock"]
    assert ratios.keys() == models.keys()
    models["patched"] = models["applied50"]
    with pytest.raises(TicketopsError, match="embeddings of patched and stock differ"):
        measure(models, TEXTS, batch_size=2, turns=2)
