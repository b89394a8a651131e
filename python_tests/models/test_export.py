"""Exports: the same outputs in a process that never saw the original, all or nothing on disk, and on the hub."""

import copy
import errno
import json
import re
import resource
import signal
import subprocess
import sys

import pytest
import torch
import transformers
from bounds import roundings
from huggingface_hub import CommitInfo, RepoUrl
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM

import ticketops
from models.conftest import tiny_config
from models.test_apply import masked
from models.test_shrink import TICKETS, close
from ticketops import Ticket
from ticketops.errors import InputError, StoreError, TicketopsError
from ticketops.models import expand, load
from ticketops.models.onnx import run_onnx

READER = """
import json, sys
{imports}
import torch, transformers
from safetensors.torch import save_file
batch = {{name: torch.tensor(value) for name, value in json.load(open(sys.argv[1])).items()}}
found = {{}}
for folder in sys.argv[3:]:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        found[folder] = model(**batch).logits
save_file(found, sys.argv[2])
assert ("ticketops" in sys.modules) == bool({imports!r})
"""


@pytest.mark.parametrize(("format", "imports"), [("compact", "import ticketops"), ("dense", "")])
def test_another_process_computes_the_same(format, imports, model, batch, tmp_path):
    batch.pop("labels")
    (tmp_path / "batch.json").write_text(json.dumps({key: value.tolist() for key, value in batch.items()}))
    wanted = {}
    for name in ("neither", "nothing left"):
        want = masked(copy.deepcopy(model), TICKETS[name])(**batch).logits
        folder = ticketops.export(copy.deepcopy(model), tmp_path / name, format, ticket=TICKETS[name])
        torch.testing.assert_close(ticketops.load(folder)(**batch).logits, want, **close)
        wanted[str(folder)] = want
    arguments = [str(tmp_path / "batch.json"), str(tmp_path / "logits.safetensors"), *wanted]
    subprocess.run([sys.executable, "-c", READER.format(imports=imports), *arguments], check=True)
    torch.testing.assert_close(load_file(arguments[1]), wanted, **close)


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
    assert note["largest_difference"] < roundings(100)["atol"]
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


# The package has the function of this name in front of the module.
MODULE = sys.modules["ticketops.models.export"]


@pytest.mark.parametrize("format", ["compact", "dense", "onnx"])
@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_mismatch_leaves_nothing(change, format, model, tmp_path, monkeypatch):
    def wrong(folder):
        loaded = load(folder)
        loaded.classifier.bias.data += change
        return loaded

    def wrong_onnx(folder, batch):
        return {name: value + change for name, value in run_onnx(folder, batch).items()}

    monkeypatch.setattr(MODULE, "load", wrong)
    monkeypatch.setattr("ticketops.models.onnx.run_onnx", wrong_onnx)
    with pytest.raises(TicketopsError, match="logits differs by"):
        ticketops.export(model, tmp_path / "out", format, ticket=TICKETS["uneven"])
    assert list(tmp_path.iterdir()) == []


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "format"),
    [
        ("transformers.PreTrainedModel.save_pretrained", "compact"),
        ("transformers.PreTrainedModel.from_pretrained", "dense"),
        ("ticketops.models.onnx.save_onnx", "onnx"),
        ("ticketops.models.onnx.run_onnx", "onnx"),
        ("ticketops.tickets.Ticket.save", "compact"),
        ("pathlib.Path.write_text", "dense"),
        ("os.replace", "compact"),
    ],
)
@pytest.mark.parametrize(("fault", "error"), [(full_disk, TicketopsError), (interrupt, KeyboardInterrupt)])
def test_a_failure_at_any_point_leaves_nothing(fault, error, place, format, model, tmp_path, monkeypatch):
    monkeypatch.setattr(place, fault)
    with pytest.raises(error):
        ticketops.export(model, tmp_path / "out", format, ticket=TICKETS["uneven"])
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_takes_no_more_is_one_error(model, tmp_path):
    # A file may be no longer than 10 kB, less than the weights need: the operating system itself refuses to write.
    limits, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**4, limits[1]))
    try:
        with pytest.raises(StoreError, match=f"^cannot write {re.escape(str(tmp_path / 'out'))}: "):
            ticketops.export(model, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, heard)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_files_is_not_touched(model, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(StoreError, match="is there already"):
        ticketops.export(model, tmp_path)
    with pytest.raises(InputError, match="format 'zip' is unknown"):
        ticketops.export(model, tmp_path / "out", "zip")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


class Hub:
    """The part of the hub that an upload needs, kept in a folder."""

    def __init__(self, folder, monkeypatch):
        self.folder, self.commits = folder, []
        monkeypatch.setattr("huggingface_hub.HfApi.create_repo", self.create_repo)
        monkeypatch.setattr("huggingface_hub.HfApi.create_commit", self.create_commit)

        def no_card(*args, **kwargs):
            raise EntryNotFoundError("no card yet")

        monkeypatch.setattr("huggingface_hub.ModelCard.load", no_card)

    def create_repo(self, repo_id, **kwargs):
        return RepoUrl(f"https://huggingface.co/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        self.commits.append(repo_id)
        for operation in operations:
            path = self.folder / operation.path_in_repo
            path.parent.mkdir(parents=True, exist_ok=True)
            with operation.as_file() as content:
                path.write_bytes(content.read())
        return CommitInfo(
            commit_url=f"https://huggingface.co/{repo_id}/commit/0",
            commit_message="m",
            commit_description="",
            oid="0" * 40,
        )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    return Hub(tmp_path / "hub", monkeypatch)


def test_the_whole_folder_goes_to_the_hub(hub, model, batch, tmp_path):
    want = masked(copy.deepcopy(model), TICKETS["neither"])(**batch).logits
    run = {"task": "demo", "config": {"seeds": [0]}, "command": "ticketops search --seeds 1"}
    folder = ticketops.export(model, tmp_path / "out", ticket=TICKETS["neither"], run=run, push_to_hub="me/small")
    assert hub.commits == ["me/small"]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {path.name: path.read_bytes() for path in hub.folder.iterdir()} == files
    assert {"config.json", "model.safetensors", "ticket.safetensors", "ticketops.json", "README.md"} <= set(files)
    card = (hub.folder / "README.md").read_text()
    assert "ticketops search --seeds 1" in card
    assert f"| parameters | {sum(p.numel() for p in model.parameters()):,} |" in card
    assert Ticket.load(hub.folder / "ticket.safetensors") == TICKETS["neither"]
    assert json.loads((hub.folder / "ticketops.json").read_text())["run"] == run
    for load_model in (ticketops.load, AutoModelForSequenceClassification.from_pretrained):
        torch.testing.assert_close(load_model(hub.folder)(**batch).logits, want, **close)


@pytest.mark.parametrize("state", ["shrunk", "patched", "loaded"])
def test_push_to_hub_of_transformers_works(state, hub, model, batch, tmp_path):
    ticket = TICKETS["neurons"]
    want = masked(copy.deepcopy(model), ticket)(**batch).logits
    ticketops.shrink(model, ticket)
    if state == "patched":
        ticketops.patch(model)
    if state == "loaded":
        model = ticketops.load(ticketops.export(model, tmp_path / "out"))
    model.push_to_hub("me/small")
    assert hub.commits == ["me/small"]
    for load_model in (ticketops.load, AutoModelForSequenceClassification.from_pretrained):
        torch.testing.assert_close(load_model(hub.folder)(**batch).logits, want, **close)


def test_a_hub_that_refuses_is_one_error_and_the_folder_stays(hub, model, tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no network\nhere")

    monkeypatch.setattr("huggingface_hub.HfApi.create_commit", refuse)
    with pytest.raises(
        TicketopsError, match=r"^[^\n]*the hub did not take it as 'me/small' \(no network here\)[^\n]*$"
    ):
        ticketops.export(model, tmp_path / "out", push_to_hub="me/small")
    ticketops.load(tmp_path / "out")


def test_the_expanded_model_is_stock(model):
    twin = expand(ticketops.shrink(model, TICKETS["neither"]))
    assert not hasattr(twin.config, "ticketops")
    assert twin.bert.encoder.layer[1].intermediate.dense.weight.shape == (64, 48)
    assert not twin.bert.encoder.layer[1].intermediate.dense.weight.any()
    assert transformers.BertForSequenceClassification is type(twin)
