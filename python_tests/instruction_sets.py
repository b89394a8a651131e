"""Prints the settings under which the tests run on instruction sets other than the best that this processor has, one a
line: TICKETOPS_ISA for the package's kernels, ATEN_CPU_CAPABILITY for torch's."""

import torch

from ticketops.ops.extension import native

#: torch's, the lowest first.
CAPABILITIES = ("default", "avx2", "avx512")


def settings() -> list[str]:
    """The settings, as NAME=value."""
    found = [f"TICKETOPS_ISA={isa}" for isa in ([] if native is None else native.isas()[:-1])]
    best = torch.backends.cpu.get_cpu_capability().lower()
    if best in CAPABILITIES:
        found += [f"ATEN_CPU_CAPABILITY={name}" for name in CAPABILITIES[: CAPABILITIES.index(best)]]
    return found


if __name__ == "__main__":
    print("\n".join(settings()))
