"""What was built of csrc/cuda, read from the machine code: no GPU is needed to build or to import it."""

import os
import shutil
import subprocess

import pytest

from ticketops.errors import UnsupportedError
from ticketops.inspection.cuda_report import _cuobjdump, cuda_table
from ticketops.ops import cuda_extension

SWITCHED_OFF = "0" in (os.environ.get("TICKETOPS_NATIVE"), os.environ.get("TICKETOPS_CUDA"))
NVCC = shutil.which("nvcc") or os.access("/usr/local/cuda/bin/nvcc", os.X_OK)


@pytest.fixture(scope="module")
def table() -> list[dict]:
    if cuda_extension.kernels is None:
        # Where it could have been built, its absence is a failure and not a skip.
        assert SWITCHED_OFF or not NVCC, cuda_extension.status
        pytest.skip(cuda_extension.status)
    try:
        return cuda_table()
    except UnsupportedError as error:
        pytest.skip(str(error))


def test_every_kernel_is_there_for_every_target_and_spills_nothing(table):
    for target in ("sm_80", "sm_90"):
        rows = [row for row in table if row["target"] == target]
        assert {row["kernel"] for row in rows} == {
            "rows.count",
            "rows.number",
            "rows.move_rows",
            "importance.importance",
            "copies.copy_table",
        }
        for row in rows:
            assert row["spill_bytes"] == 0, row
            # A full SM of 2048 threads has 64 registers for each of half of them.
            assert 0 < row["registers"] <= 64, row
    assert {row["case"] for row in table if row["kernel"] == "rows.move_rows"} == {
        "1 byte",
        "2 bytes",
        "4 bytes",
        "16 bytes",
    }


@pytest.mark.usefixtures("table")
def test_later_chips_find_ptx():
    command = [_cuobjdump(), "--list-ptx", cuda_extension.kernels.__file__]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "sm_90.ptx" in listed
    assert "PTX of sm_90" in cuda_extension.status


@pytest.mark.usefixtures("table")
@pytest.mark.skipif(shutil.which("ldd") is None, reason="needs ldd")
def test_the_extension_needs_neither_cuda_nor_torch_libraries():
    for module in (cuda_extension.kernels, pytest.importorskip("ticketops._native")):
        needed = subprocess.run(["ldd", module.__file__], capture_output=True, text=True, check=True).stdout
        assert "libc.so" in needed
        for library in ("cudart", "libcuda", "libtorch", "libc10"):
            assert library not in needed, needed
