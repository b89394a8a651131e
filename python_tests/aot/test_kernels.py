"""Kernels compiled for GPUs that are not there: every shipped configuration, and calls that leave something out."""

import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton

from ticketops import cli
from ticketops.inspection import kernel_report
from ticketops.ops import triton_configs
from ticketops.ops.triton_common import INTERPRETED

if INTERPRETED:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

MATRIX_UNIT = {8: "mma", 9: "wgmma", 10: "tcgen05"}
# Blocks of fewer than 64 rows and columns, those of the shortest sequences, cannot feed the warp-group instructions.
LEAST = 64
PRODUCTS = {f"attention.{name}" for name in ("forward", "row_backward", "dq", "dkdv", "positions")}
OTHERS = {"ffn": ("forward", "backward", "finish"), "residual": ("forward", "backward", "finish"), "rotary": ("turn",)}
KERNELS = PRODUCTS | {"layer.slices"} | {f"{op}.{name}" for op, names in OTHERS.items() for name in names}
RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The table of the installed Triton that a folder keeps."""
    path = folder / f"kernels-{triton.__version__}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


@pytest.fixture(scope="module")
def table() -> list[dict[str, Any]]:
    """Every shipped configuration, compiled for each GPU in a process of its own.

    Compiling all takes minutes. So what the kept table has of the same sources, types and options is taken from there,
    but for one configuration of each kernel and GPU, which shows that compiling gives what is kept.
    """
    kept = rows_of(RESULTS)
    again = {(row["kernel"], row["target"]): row["digest"] for row in kept}.values()
    kept = [row for row in kept if row["digest"] not in again]
    workers = min(len(kernel_report.TARGETS), os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        targets = [(target,) for target in kernel_report.TARGETS]
        tables = pool.map(kernel_report.kernel_table, itertools.repeat(None), targets, itertools.repeat(kept))
        return list(itertools.chain.from_iterable(tables))


@pytest.mark.timeout(1800)
def test_every_shipped_configuration_fits_and_uses_the_matrix_units(table):
    used = {}
    for row in table:
        major = int(row["target"].removeprefix("sm_")) // 10
        assert row["spill_bytes"] == 0, row
        assert row["shared_bytes"] <= kernel_report.SHARED_LIMIT[major], row
        assert row["per_multiprocessor"] > 0, row
        # float32 is multiplied in float32, on the plain cores.
        if row["kernel"] in PRODUCTS and row["dtype"] != "float32" and max(map(int, row["tile"].split("x"))) >= LEAST:
            assert row["matrix_unit"] == MATRIX_UNIT[major], row
        used.setdefault(row["target"], set()).add(row["kernel"])
    assert used == dict.fromkeys(("sm_80", "sm_90", "sm_100"), KERNELS)


def test_the_kept_table_is_of_these_configurations(table):
    kept = rows_of(RESULTS)
    if not kept:
        pytest.skip(f"no table of Triton {triton.__version__} is kept")
    assert kept == table, "write it anew: ticketops doctor --kernels --output bench/results"


def test_whatever_changes_what_is_compiled_changes_the_digest():
    first, second = kernel_report.residual_launches((9, 0), torch.bfloat16)[:2]
    others = [
        second,
        dataclasses.replace(first, target=(8, 0)),
        dataclasses.replace(first, tile=dataclasses.replace(first.tile, stages=first.tile.stages + 1)),
        kernel_report.residual_launches((9, 0), torch.float16)[0],
        kernel_report.residual_launches((9, 0), torch.bfloat16, options=False)[0],
    ]
    digests = [kernel_report.digest(launch) for launch in (first, *others)]
    assert len({*digests}) == len(digests)
    assert digests[0] == kernel_report.digest(kernel_report.residual_launches((9, 0), torch.bfloat16)[0])


def test_heads_of_odd_width_fit_on_hopper():
    for launch in kernel_report.attention_launches((9, 0), torch.float16, 72, 64):
        assert kernel_report.compile_launch(launch).spills == 0, launch.case


@pytest.mark.parametrize(
    ("weight_gradients", "token_sums", "neuron_sums"),
    [(True, True, False), (True, False, False), (False, True, False), (False, False, True), (False, False, False)],
)
def test_ffn_compiles_whatever_is_wanted_of_it(weight_gradients, token_sums, neuron_sums):
    launches = kernel_report.ffn_launches(
        (9, 0),
        torch.bfloat16,
        masks=False,
        weight_gradients=weight_gradients,
        token_sums=token_sums,
        neuron_sums=neuron_sums,
    )
    assert len(launches) == 2 + (weight_gradients or token_sums)
    for launch in launches:
        assert kernel_report.compile_launch(launch).spills == 0


def test_kernels_compile_without_dropout_masks_and_bias():
    for launch in (
        *kernel_report.attention_launches((9, 0), torch.bfloat16, 64, 64, options=False),
        *kernel_report.attention_launches((9, 0), torch.bfloat16, 64, 512, options=False),
        *kernel_report.attention_launches((9, 0), torch.bfloat16, 64, 512, options=False, positioned=True),
        *kernel_report.residual_launches((9, 0), torch.bfloat16, options=False),
    ):
        assert kernel_report.compile_launch(launch).spills == 0


def test_unknown_gpus_get_the_smallest_tiles():
    assert triton_configs.family((12, 0)) == triton_configs.family((8, 9)) == triton_configs.family((7, 5)) == 8
    for key, tiles in triton_configs.ATTENTION.items():
        assert list(tiles.forward) == sorted(tiles.forward), key
        assert max(tiles.forward) == triton_configs.LONGER, key
        assert [tile.rows for tile in tiles.row_backward] == sorted({tile.rows for tile in tiles.row_backward}), key


def test_float32_products_follow_the_switch_of_torch():
    def precision() -> str:
        return kernel_report.attention_launches((9, 0), torch.float32, 64, 32)[0].arguments["PRECISION"]

    assert precision() == "ieee"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert precision() == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"


def test_doctor_prints_the_table(monkeypatch, tmp_path):
    def shipped(targets):
        return iter(kernel_report.residual_launches((9, 0), torch.float32, 64)[:1])

    monkeypatch.setattr(kernel_report, "shipped_launches", shipped)
    result = CliRunner().invoke(cli.app, ["doctor", "--kernels"])
    assert result.exit_code == 0, result.output
    assert "residual.forward" in result.stdout
    assert "compiling residual.forward for sm_90" in result.stderr
    (row,) = json.loads(CliRunner().invoke(cli.app, ["doctor", "--kernels", "--json"]).stdout)["kernels"]
    assert row["spill_bytes"] == 0
    assert 0 < row["registers"] <= 255
    assert 0 < row["per_multiprocessor"] <= 32
    assert "no number of this comes from a run on a GPU" in result.stdout
    result = CliRunner().invoke(cli.app, ["doctor", "--kernels", "--output", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert rows_of(tmp_path) == [row]
    result = CliRunner().invoke(cli.app, ["doctor", "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "add --kernels" in result.stderr


def test_the_table_is_kept_as_json_and_text(tmp_path):
    row = {"kernel": "a.b", "target": "sm_90", "registers": 1}
    text = kernel_report.write_table([row], tmp_path).read_text()
    assert "| a.b | sm_90 | 1 |" in text
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["rows"] == [row]
