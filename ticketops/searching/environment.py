"""Versions of packages and facts about the machine, for records, reports and `ticketops doctor`."""

import importlib.metadata
import os
import platform
from typing import Any

import torch

from ticketops.launch import processes
from ticketops.ops.backends import explain

PACKAGES = ("ticketops", "torch", "triton", "transformers", "datasets", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on; packages that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    # torch's own version names the build (+cpu, +cu128), which the distribution's may lack.
    return {**found, "torch": torch.__version__}


def machine() -> dict[str, Any]:
    """Facts about the device that trials run on and about the processor."""
    cuda = torch.cuda.is_available()
    return {
        "platform": platform.platform(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "processes": processes(),
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "device_capability": "sm_{}{}".format(*torch.cuda.get_device_capability()) if cuda else None,
    }


def backends() -> dict[str, str]:
    """Which backend runs each op in float32, on the device that a trial runs on; "none" where it would be refused."""
    return {row["op"]: row["backend"] for row in explain() if row["dtype"] in ("any", "float32")}


def circumstances() -> dict[str, Any]:
    """Versions, machine and backends together, as records and runs hold them."""
    return {"versions": versions(), "machine": machine(), "backends": backends()}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, platform.machine())
    except OSError:
        return platform.processor() or platform.machine()
