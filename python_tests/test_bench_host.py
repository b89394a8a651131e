"""What bench.host counts, against calls whose counts are known."""

import importlib.util
import json
import sys
from collections import Counter

import pytest
import torch

from bench import host
from bench.step import exit_code

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from ticketops.ops import triton_common
from ticketops.ops.residual import triton as residual

pytestmark = pytest.mark.skipif(triton_common.INTERPRETED, reason="Triton's interpreter has launches of its own")


def test_views_and_allocations_are_calls_and_no_launches():
    x, y = torch.ones(2, 3), torch.ones(4, 3)
    found = host.count(lambda: torch.mm(x, y.t()).add_(1))
    assert found.calls == Counter(t=1, transpose=1, as_strided=1, mm=1, add_=1)
    assert found.launches == Counter(mm=1, add_=1)
    assert not found.triton
    # Of a cast, it is the copy that launches; of copies of many tensors, the call for all of them.
    found = host.count(lambda: x.to(torch.bfloat16))
    assert found.calls == Counter(to=1, _to_copy=1, empty_strided=1, copy_=1)
    assert found.launches == Counter(copy_=1)
    found = host.count(lambda: torch._foreach_copy_([x, y], [x, y]))
    assert found.calls == found.launches == Counter(_foreach_copy_=1)


def test_each_launch_of_triton_is_recorded_and_none_is_made():
    x = torch.ones(5, 16)
    with host.recorded() as launched:
        for times in (1, 2, 3):
            # The first goes through Triton's lookup, the others past it.
            residual.forward(x, x, None, x[0], x[0], None, 0.0, 1e-5)
            assert launched == Counter({"residual.forward_kernel": times})
        found = host.count(lambda: residual.forward(x, x, None, x[0], x[0], None, 0.0, 1e-5), launched)
    assert found.triton == Counter({"residual.forward_kernel": 1})
    assert not found.launches
    assert found.calls["empty"] == 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_one_json_object(dtype, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.host", "--dtype", dtype, "--turns", "2", "--json"])
    threads = torch.get_num_threads()
    try:
        assert host.main() == 0
    finally:
        torch.set_num_threads(threads)
    result = json.loads(capsys.readouterr().out)
    counts, plain = result["counts"]["patched"], result["counts_without_dropout"]
    assert result["launches_a_layer"] == pytest.approx(counts["triton_launches"] + counts["torch_launches"])
    assert result["calls_a_layer"] == counts["calls"] == sum(counts["calls_by_name"].values()) / host.LAYERS
    assert result["calls_a_layer"] < 100
    assert counts["triton_by_name"]["attention.forward_kernel"] == host.LAYERS
    # All layers' seeds are one draw.
    assert counts["torch_launches_by_name"]["random_"] == 1
    assert "random_" not in plain["patched"]["torch_launches_by_name"]
    # The weights of all layers are cast at once, those of a stock layer one by one.
    assert counts["torch_launches_by_name"]["_foreach_copy_"] == 1
    casts = plain["stock"]["torch_launches_by_name"].get("copy_", 0)
    assert casts > 12 * host.LAYERS if dtype == "bf16" else casts == 0
    # As on a GPU, stock attention is one call.
    assert sum("attention" in name for name in plain["stock"]["torch_launches_by_name"]) == 2
    assert not plain["stock"]["triton_by_name"]
    for name in ("layer_vs_stock_host", "recording_vs_stock_host"):
        assert result[name] > 0
    assert all(0 < each["q20"] <= each["median"] <= each["q80"] for each in result["seconds"].values())
    assert result["replay_ms"] > 0


def test_the_interpreter_is_refused_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(triton_common, "INTERPRETED", True)
    monkeypatch.setattr(sys, "argv", ["bench.host", "--turns", "1"])
    assert exit_code(host.main) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: TRITON_INTERPRET=1 replaces")
