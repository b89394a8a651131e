"""What `ticketops doctor` prints: versions, machine, how the extensions are built, which backend would run each op, and
what the kernels need of a GPU (`kernel_report`, `cuda_report`)."""

from ticketops.inspection.installation import Installation, installation

__all__ = ["Installation", "installation"]
