"""Data for `ticketops doctor`: versions, machine, extensions, the backend of each op (`installation`), and the
resources that kernels use on a GPU (`kernel_report`, `cuda_report`)."""

from ticketops.inspection.installation import Installation, installation

__all__ = ["Installation", "installation"]
