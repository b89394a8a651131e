"""The examples, and the documentation's code that needs no network, run."""

import copy
import re
import runpy
from pathlib import Path

import pytest
import torch
from searching.tiny import make_model
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

import ticketops

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = {path.stem: path for path in (ROOT / "examples").glob("*.py") if path.stem != "made_up"}
#: Optional packages, of an environment of their own: make test-extras.
NEEDS = {"lightning_module": "lightning", "sentence_transformers_embedder": "sentence_transformers"}


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A folder to leave files in; on a machine with a GPU, too, a CPU is enough."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(EXAMPLES))
def test_an_example_runs(name, capsys):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason="in an environment of its own: make test-extras")
    found = runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
    if name == "packing":
        assert found["accuracy"] > 0.6
        return
    ticket = (found.get("drawing") or found["callback"]).ticket
    assert ticket.heads_pruned == 4
    assert ticket.ffns_pruned == 1
    assert str(ticket) in capsys.readouterr().out


def code(document, heading):
    """The first block of Python behind a heading."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text[text.index(heading) :], re.DOTALL).group(1)


def test_the_readmes_ten_lines_run(tmp_path):
    import made_up

    folder = make_model(tmp_path / "tiny")
    rows = [{"input_ids": [2, 5 + n % 2, 7, 3], "labels": n % 2} for n in range(8)]
    batches = list(DataLoader(rows, 4, collate_fn=made_up.pad))
    names = {"batches": batches, "train": lambda model: model.train()}
    block = code("README.md", "## The Python API")
    assert '"bert-base-uncased"' in block
    exec(block.replace('"bert-base-uncased"', repr(str(folder))), names)
    small = torch.nn.Module.state_dict(names["model"])
    again = ticketops.load(tmp_path / "small").state_dict()
    assert all(torch.equal(small[name], again[name]) for name in small)


def test_the_guides_trainer_runs(tmp_path):
    import made_up

    model = made_up.make_model()
    arguments = TrainingArguments(str(tmp_path), num_train_epochs=2, save_strategy="no", report_to="none", use_cpu=True)
    names = {
        "ticketops": ticketops,
        "model": model,
        "pretrained": copy.deepcopy(model.state_dict()),
        "args": arguments,
        "rows": made_up.make_rows(16),
        "Trainer": lambda *given, **options: Trainer(*given, data_collator=made_up.pad, **options),
    }
    exec(code("docs/guide.md", "## Your own Trainer or loop"), names)
    assert names["handle"].ticket == names["callback"].ticket
