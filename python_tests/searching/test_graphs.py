"""Runs whose encoders CUDA graphs compute, emulated: the same trials."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models.emulated_graphs import emulated

from ticketops.models.graphs import Graphs
from ticketops.ops import backends
from ticketops.searching import ShareConfig, Store, run_share

from .test_sharing import FIELDS


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sum of all graphs' replays."""
    found, run = [0], Graphs.run

    def counted(self: Graphs, *arguments: Any) -> Any:
        result = run(self, *arguments)
        found[0] += result is not None
        return result

    monkeypatch.setattr(Graphs, "run", counted)
    return found


def test_a_share_and_its_searches(inputs: Any, pairs: str, tmp_path: Path, replays: list[int]):
    if backends.choose("attention", torch.device("cpu"), torch.float32)[0] != "native":
        pytest.skip("whole layers are one op with native kernels only")
    fields = FIELDS | {"model": inputs["model"], "tasks": f"{inputs['task']},{pairs}", "arms": ("tickets",)}
    losses, computed = [], []
    for graphs in (False, True):
        run = tmp_path / str(graphs)
        with emulated():
            run_share(ShareConfig(**fields, graphs=graphs, output=str(run)))
        stores = [Store.read(folder, "search") for folder in sorted((run / "single").iterdir())]
        records = [record for store in (*stores, Store.read(run, "share")) for record in store.records()]
        losses.append([record["train_loss"] for record in records])
        computed.append(replays[0])
    assert computed[0] == 0
    assert computed[1] > 20
    # Rows that belong to no sequence make sums of other lengths.
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
