"""DeiT: built as ViT, with a token for distillation beside the class token."""

from transformers.models.deit import modeling_deit

from ticketops.models.vit import vit_like

DEIT = vit_like(modeling_deit, "DeiT", extra=2)
