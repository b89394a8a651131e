"""Where ticketops meets Hugging Face: patching models and counting their weights."""

from ticketops.models.patch import PatchHandle, check_supported, patch, weight_counts
from ticketops.models.shrink import shrink

__all__ = ["PatchHandle", "check_supported", "patch", "shrink", "weight_counts"]
