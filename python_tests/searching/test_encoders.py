"""Whole runs on encoders whose layers are built unlike BERT's: searches, a share and doctor."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bounds import roundings
from typer.testing import CliRunner

from ticketops import cli
from ticketops.models import SharedModel, load
from ticketops.reporting import read
from ticketops.searching import ShareConfig, Store, run_share
from ticketops.searching.release import release

from .test_sharing import FIELDS
from .tiny import DEBERTA_V3, HEADS, LAYERS, make_model

#: What the configuration of each says beside its sizes; the tokenizer pads with id 0.
ENCODERS: dict[str, dict[str, Any]] = {
    "DebertaV2": DEBERTA_V3,
    "DistilBert": {"dim": 32, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": 64},
    "EuroBert": {"pad_token_id": 0},
    "ModernBert": {"local_attention": 4, "pad_token_id": 0},
    "MPNet": {"pad_token_id": 0},
    "NomicBert": {"pad_token_id": 0},
}


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_share_of_every_encoder(encoder: str, inputs: Any, pairs: str, tmp_path: Path):
    """Two tasks: a search for each, then one model for both, its parts, and what doctor says of them."""
    if not hasattr(transformers, f"{encoder}Model"):
        pytest.skip(f"transformers {transformers.__version__} has no {encoder}")
    model, run = make_model(tmp_path / "model", encoder, **ENCODERS[encoder]), tmp_path / "run"
    fields = FIELDS | {"arms": ("tickets",), "save_models": True, "output": str(run)}
    shared = read(run_share(ShareConfig(model=str(model), tasks=f"{inputs['task']},{pairs}", **fields)))
    (record,) = shared.records
    assert [(one["heads_pruned"], one["ffns_pruned"]) for one in record["tasks"].values()] == [(4, 1), (4, 1)]
    both = SharedModel.load(run / "models" / "tickets-seed-0")
    ids = {"input_ids": torch.arange(4, 14)[None]}
    for task in record["tasks"]:
        store = Store.read(run / "single" / task, "search")
        assert {one["kind"] for one in store.records()} == {"full", "winning"}
        small = load(release(run, tmp_path / task, task=task))
        with torch.no_grad():
            torch.testing.assert_close(small(**ids).logits, both(task, **ids).logits, **roundings(0, 100))
        for folder, heads in ((model, 8), (tmp_path / task, 4)):
            result = CliRunner().invoke(cli.app, ["doctor", "--model", str(folder), "--json"])
            assert result.exit_code == 0, result.output
            facts = json.loads(result.stdout)
            assert (facts["supported"], facts["heads_left"], facts["layers"]) == (True, heads, LAYERS)
