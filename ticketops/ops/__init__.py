"""Masked attention and masked FFN as autograd ops whose backward passes leave the pruning importance |dL/d mask|
behind, the projections of selected heads, the dropout, residual and LayerNorm after either, and the whole layer."""

from ticketops.ops.attention import attention
from ticketops.ops.ffn import ffn
from ticketops.ops.layer import Weights, encoder_layer, serves_layer
from ticketops.ops.packing import Packing, Sequences
from ticketops.ops.projection import project_columns, project_rows
from ticketops.ops.residual import residual_norm

__all__ = [
    "Packing",
    "Sequences",
    "Weights",
    "attention",
    "encoder_layer",
    "ffn",
    "project_columns",
    "project_rows",
    "residual_norm",
    "serves_layer",
]
