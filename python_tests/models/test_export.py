"""Exports: the same outputs in a process that never saw the original, all or nothing on disk, damaged files refused."""

import contextlib
import copy
import json
import random
import subprocess
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertForMaskedLM, BertForSequenceClassification

import ticketops
from models.conftest import tiny_config
from models.test_apply import masked
from models.test_shrink import TICKETS, close
from ticketops import Ticket
from ticketops.errors import InputError, StoreError, TicketopsError, UnsupportedError
from ticketops.models import expand

READER = """
import json, sys
{imports}
import torch, transformers
from safetensors.torch import save_file
model = getattr(transformers, sys.argv[4]).from_pretrained(sys.argv[1])
batch = {{name: torch.tensor(value) for name, value in json.load(open(sys.argv[2])).items()}}
with torch.no_grad():
    save_file({{"logits": model(**batch).logits}}, sys.argv[3])
assert "ticketops" in sys.modules or not {imports!r}
"""


@pytest.mark.parametrize("name", ["neither", "nothing left"])
@pytest.mark.parametrize(
    ("format", "imports", "reader"),
    [
        ("compact", "import ticketops", "AutoModelForSequenceClassification"),
        ("dense", "", "AutoModelForSequenceClassification"),
    ],
)
def test_another_process_computes_the_same(name, format, imports, reader, model, batch, tmp_path):
    batch.pop("labels")
    want = masked(copy.deepcopy(model), TICKETS[name])(**batch).logits
    folder = ticketops.export(model, tmp_path / "out", format, ticket=TICKETS[name])
    (tmp_path / "batch.json").write_text(json.dumps({key: value.tolist() for key, value in batch.items()}))
    arguments = [folder, tmp_path / "batch.json", tmp_path / "logits.safetensors", reader]
    subprocess.run([sys.executable, "-c", READER.format(imports=imports), *map(str, arguments)], check=True)
    torch.testing.assert_close(load_file(arguments[2])["logits"], want, **close)
    torch.testing.assert_close(ticketops.load(folder)(**batch).logits, want, **close)


@pytest.mark.parametrize("state", ["stock", "patched", "shrunk"])
def test_the_model_is_left_as_it_was(state, model, batch, tmp_path):
    ticket = TICKETS["neither"]
    want = masked(copy.deepcopy(model), ticket)(**batch).logits
    handle = ticketops.patch(model).apply(ticket) if state == "patched" else None
    if state == "shrunk":
        ticketops.shrink(model, ticket)
    model.train()
    before, given = copy.deepcopy(model.state_dict()), {"ticket": ticket} if state == "stock" else {}
    folder = ticketops.export(model, tmp_path / "out", **given, run={"task": "demo", "score": 0.5})
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    if handle is not None:
        assert handle.ticket == ticket
        handle.revert()
    torch.testing.assert_close(ticketops.load(folder)(**batch).logits, want, **close)
    assert Ticket.load(folder / "ticket.safetensors") == ticket
    note, card = json.loads((folder / "ticketops.json").read_text()), (folder / "README.md").read_text()
    assert note["largest_difference"] < 1e-5
    assert note["run"] == {"task": "demo", "score": 0.5}
    assert "6 of 12 attention heads and 2 of 3 FFNs were pruned" in card
    assert "| task | demo |" in card


@pytest.mark.parametrize("format", ["compact", "dense"])
def test_tied_weights_and_other_heads_survive(format, tmp_path):
    model = BertForMaskedLM(tiny_config()).eval()
    loaded = ticketops.load(ticketops.export(model, tmp_path / "out", format, ticket=TICKETS["uneven"]))
    assert type(loaded) is BertForMaskedLM
    assert loaded.cls.predictions.decoder.weight is loaded.bert.embeddings.word_embeddings.weight


def test_bfloat16_weights_keep_their_dtype(model, tmp_path):
    loaded = ticketops.load(ticketops.export(model.bfloat16(), tmp_path / "out", ticket=TICKETS["uneven"]))
    assert loaded.dtype == torch.bfloat16


def test_a_mismatch_leaves_nothing(model, tmp_path, monkeypatch):
    # The package has the function of this name in front of the module.
    module = sys.modules["ticketops.models.export"]

    def wrong(folder):
        loaded = module._load(folder)
        loaded.classifier.bias.data += 1e-3
        return loaded

    monkeypatch.setattr(module, "load", wrong)
    with pytest.raises(TicketopsError, match="logits differs by"):
        ticketops.export(model, tmp_path / "out", ticket=TICKETS["uneven"])
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_touched(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        ticketops.export(model, tmp_path)
    with pytest.raises(InputError, match="format 'zip' is unknown"):
        ticketops.export(model, tmp_path / "out", "zip")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    torch.manual_seed(0)
    model = BertForSequenceClassification(tiny_config(hidden_size=16, intermediate_size=16))
    return ticketops.export(model, tmp_path_factory.mktemp("good") / "out", ticket=TICKETS["neither"])


@pytest.fixture
def bad(good, tmp_path):
    for path in good.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refuse(folder):
    with pytest.raises((InputError, UnsupportedError)) as caught:
        ticketops.load(folder)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 800
    return str(caught.value)


def test_corrupt_weights_are_refused(bad, good):
    """60 files: cut short, with a byte flipped in the header or in the weights."""
    draw, data = random.Random(0), (good / "model.safetensors").read_bytes()
    for number in range(60):
        if number % 3 == 0:
            content = data[: draw.randrange(len(data))]
        else:
            place = draw.randrange(*((0, 200) if number % 3 == 1 else (len(data) // 2, len(data))))
            content = data[:place] + bytes([data[place] ^ 1 << draw.randrange(8)]) + data[place + 1 :]
        (bad / "model.safetensors").write_bytes(content)
        refuse(bad)


def test_hostile_configurations_are_refused(bad, good):
    """Every key of config.json with values from a list of junk; what is not refused is the same model."""
    content = json.loads((good / "config.json").read_text())
    structure = {"vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size", "ticketops", "architectures"}
    draw, junk = random.Random(0), [-1, 0, 10**18, "../../etc/passwd", [], {}, None, 1e308]
    for key in sorted(structure):
        for value in junk:
            (bad / "config.json").write_text(json.dumps(content | {key: value}))
            refuse(bad)
    for text in ("", "[" * 100_000, "null", '{"architectures": ["Trainer"]}', "\x00" * 9, "1" * 5000):
        (bad / "config.json").write_text(text)
        refuse(bad)
    for key in draw.sample(sorted(set(content) - structure), 12):
        (bad / "config.json").write_text(json.dumps(content | {key: draw.choice(junk)}))
        with contextlib.suppress(InputError, UnsupportedError):
            ticketops.load(bad)


def test_hostile_tensors_are_refused(bad, good):
    weights, name = load_file(good / "model.safetensors"), "bert.encoder.layer.0.attention.self.query.weight"
    for changed, words in (
        ({name: torch.zeros(2, 2)}, "which its configuration does not make"),
        ({name: weights[name].long()}, "I64"),
        ({"extra": torch.zeros(1)}, "'extra'"),
    ):
        save_file(weights | changed, bad / "model.safetensors", {"format": "pt"})
        assert words in refuse(bad)
    save_file({key: value for key, value in weights.items() if key != name}, bad / "model.safetensors")
    assert "lack" in refuse(bad)
    (bad / "model.safetensors").unlink()
    (bad / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    assert "only safetensors" in refuse(bad)
    for escape in ("../other.safetensors", "/etc/passwd", 5, "model-00001-of-00001.safetensors"):
        (bad / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {name: escape}}))
        refuse(bad)


def test_a_shape_bomb_allocates_nothing(bad, good):
    content = json.loads((good / "config.json").read_text())
    (bad / "config.json").write_text(json.dumps(content | {"vocab_size": 9_999_999, "hidden_size": 9_999_996}))
    assert "which its configuration does not make" in refuse(bad)


def test_the_expanded_model_is_stock(model):
    twin = expand(ticketops.shrink(model, TICKETS["neither"]))
    assert not hasattr(twin.config, "ticketops")
    assert twin.bert.encoder.layer[1].intermediate.dense.weight.shape == (64, 48)
    assert not twin.bert.encoder.layer[1].intermediate.dense.weight.any()
    assert transformers.BertForSequenceClassification is type(twin)
