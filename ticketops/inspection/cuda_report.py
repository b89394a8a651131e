"""Registers, spills and shared memory of the CUDA extension's kernels, read from the built machine code. Needs no
GPU."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

from ticketops.errors import UnsupportedError
from ticketops.ops import cuda_extension

# Element types by their letter in mangled names, for the column `case`.
_TYPES = {"a": "1 byte", "h": "1 byte", "s": "2 bytes", "t": "2 bytes", "i": "4 bytes", "j": "4 bytes", "l": "8 bytes"}
_KERNEL = re.compile(r"_\d+_(?P<family>[a-z]+)_cu_[0-9a-f]{8}\d+(?P<kernel>[a-z_]+)_kernel(?:I(?P<type>\w+?)EE|E)")


def cuda_table() -> list[dict[str, Any]]:
    """Reads the resources of every kernel in the CUDA extension, for every GPU target that it was compiled for.

    Returns:
        One row per kernel and target, with keys kernel, target, case (size of the elements or vectors that it moves),
        registers (per thread), spill_bytes (local memory per thread, which holds spills) and shared_bytes (per block).

    Raises:
        UnsupportedError: the extension is not built, or cuobjdump is missing.
    """
    if cuda_extension.kernels is None:
        raise UnsupportedError(cuda_extension.status)
    report = subprocess.run(
        [_cuobjdump(), "-res-usage", cuda_extension.kernels.__file__], capture_output=True, text=True, check=True
    )
    rows, target = [], ""
    for line in report.stdout.splitlines():
        if found := re.match(r"arch = (\w+)", line):
            target = found[1]
        elif found := re.match(r"\s*Function (\S+):", line):
            name = found[1]
        elif numbers := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)):
            rows.append(
                {
                    **_kernel(name),
                    "target": target,
                    "registers": int(numbers["REG"]),
                    "spill_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
                    "shared_bytes": int(numbers["SHARED"]),
                }
            )
    return sorted(rows, key=lambda row: (row["target"], row["kernel"], row["case"]))


def _kernel(mangled: str) -> dict[str, str]:
    found = _KERNEL.search(mangled)
    if found is None:
        return {"kernel": mangled, "case": ""}
    kind = found["type"] or ""
    return {
        "kernel": f"{found['family']}.{found['kernel']}",
        "case": "16 bytes" if kind.endswith("uint4") else _TYPES.get(kind, kind),
    }


def _cuobjdump() -> str:
    program = shutil.which("cuobjdump")
    if program is None and (triton := importlib.util.find_spec("triton")) is not None:
        for folder in triton.submodule_search_locations or ():
            bundled = Path(folder) / "backends" / "nvidia" / "bin" / "cuobjdump"
            program = str(bundled) if bundled.is_file() else program
    if program is None:
        raise UnsupportedError("cuobjdump is needed to read the CUDA kernels: install the CUDA toolkit or triton")
    return program
