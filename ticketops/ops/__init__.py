"""Autograd ops of a masked transformer encoder: attention and FFN, whose backward passes also compute the pruning
importance |dL/d mask|; the projections of selected heads; dropout + residual + LayerNorm; and a whole layer."""

from ticketops.ops.attention import attention
from ticketops.ops.attention.buckets import bucketed_bias, position_vectors
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
    "bucketed_bias",
    "encoder_layer",
    "ffn",
    "position_vectors",
    "project_columns",
    "project_rows",
    "residual_norm",
    "serves_layer",
]
