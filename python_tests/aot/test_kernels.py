"""Kernels compiled for GPUs that are not there. `ticketops doctor --kernels` compiles every shipped configuration; here
the ones that BERT-base meets first."""

import importlib.util
import json

import pytest
import torch
from typer.testing import CliRunner

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from ticketops import cli
from ticketops.ops import kernel_report, triton_configs
from ticketops.ops.triton_common import INTERPRETED

if INTERPRETED:
    pytest.skip("nothing is compiled under TRITON_INTERPRET=1", allow_module_level=True)

MATRIX_UNIT = {8: "mma", 9: "wgmma", 10: "tcgen05"}
# Blocks of fewer than 64 rows cannot feed the warp-group instructions.
LEAST_ROWS = 64


def bert_launches(target: tuple[int, int]) -> list[kernel_report.Launch]:
    return [
        *kernel_report.attention_launches(target, torch.bfloat16, 64, 128),
        *kernel_report.attention_launches(target, torch.bfloat16, 64, 512),
        *kernel_report.ffn_launches(target, torch.bfloat16),
        *kernel_report.projection_launches(target, torch.bfloat16),
        *kernel_report.residual_launches(target, torch.bfloat16),
    ]


@pytest.mark.parametrize("target", kernel_report.TARGETS, ids="sm_{0[0]}{0[1]}".format)
def test_bert_base_kernels_fit(target):
    compiled = {}
    for launch in bert_launches(target):
        name = launch.kernel.__module__.split(".")[-2] + "." + launch.kernel.__name__
        result = compiled[name, launch.case["case"]] = kernel_report.compile_launch(launch)
        assert result.spills == 0, (name, launch.case, launch.tile, result)
        assert result.shared <= kernel_report.SHARED_LIMIT[target[0]], (name, launch.case, launch.tile, result)
        if name.startswith(("attention", "projection")) and launch.tile.rows >= LEAST_ROWS:
            assert result.matrix_unit == MATRIX_UNIT[target[0]], (name, launch.case, result)
    kernels = {name for name, _ in compiled}
    assert {"attention.forward_kernel", "attention.dq_kernel", "attention.dkdv_kernel"} <= kernels
    assert ("attention.row_backward_kernel" in kernels) == (target >= (9, 0))


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


def test_ffn_of_selected_blocks_multiplies_through_the_index():
    launches = kernel_report.ffn_launches((9, 0), torch.bfloat16, blocks=True)
    # Two products forward and two backward, and two weight gradients of two stages.
    assert [launch.kernel.__name__ for launch in launches] == [
        "into_kernel",
        "forward_kernel",
        "out_of_kernel",
        "into_kernel",
        "backward_kernel",
        "finish_kernel",
        "out_of_kernel",
        *["gradient_kernel", "finish_kernel"] * 2,
    ]
    result = kernel_report.compile_launch(launches[2])
    assert result.spills == 0
    assert result.matrix_unit == "wgmma"


def test_kernels_compile_without_dropout_masks_and_bias():
    for launch in (
        *kernel_report.attention_launches((9, 0), torch.bfloat16, 64, 64, options=False),
        *kernel_report.attention_launches((9, 0), torch.bfloat16, 64, 512, options=False),
        *kernel_report.residual_launches((9, 0), torch.bfloat16, options=False),
    ):
        assert kernel_report.compile_launch(launch).spills == 0


def test_projections_compile_with_weights_in_float32():
    """As under autocast."""
    for launch in kernel_report.projection_launches((9, 0), torch.bfloat16, weight_dtype=torch.float32):
        result = kernel_report.compile_launch(launch)
        assert result.spills == 0
        assert (result.matrix_unit == "wgmma") == (launch.kernel.__name__ != "finish_kernel")


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


def test_doctor_prints_the_table(monkeypatch):
    def shipped():
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


def test_the_table_is_kept_as_json_and_text(tmp_path):
    row = {"kernel": "a.b", "target": "sm_90", "registers": 1}
    text = kernel_report.write_table([row], tmp_path).read_text()
    assert "| a.b | sm_90 | 1 |" in text
    (kept,) = tmp_path.glob("*.json")
    assert json.loads(kept.read_text())["rows"] == [row]
