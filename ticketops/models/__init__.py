"""Where ticketops meets Hugging Face: patching models and counting their weights."""

from ticketops.models.export import Format, expand, export, load
from ticketops.models.patch import PatchHandle, check_supported, patch, weight_counts
from ticketops.models.shrink import shrink

__all__ = ["Format", "PatchHandle", "check_supported", "expand", "export", "load", "patch", "shrink", "weight_counts"]
