"""The description of a GPU and of the commit, for every file of results."""

import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
Row = dict[str, Any]


def stem(device: str) -> str:
    """Converts a device's name, as torch gives it, to the form in names of result files: "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def machine(dtype: str) -> Row:
    """Describes device, versions and commit.

    Args:
        dtype: of what is measured, such as "bf16".
    """
    import triton

    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    record = {
        "device": "Triton interpreter on the CPU",
        "dtype": dtype,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or None,
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        record |= {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
        }
    return record
