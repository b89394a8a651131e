"""Autograd ops of a masked transformer encoder: attention and FFN, whose backward passes also compute the pruning
importance |dL/d mask|; the projections of selected heads; dropout + residual + LayerNorm; and a whole layer."""

from ticketops.ops.attention import attention
from ticketops.ops.attention.buckets import bucketed_bias, position_vectors
from ticketops.ops.ffn import ffn
from ticketops.ops.layer import Layer, Weights, encoder_layer, encoder_layers, serves_layer
from ticketops.ops.packing import Packing, Sequences
from ticketops.ops.projection import project_columns, project_rows
from ticketops.ops.residual import residual_norm

__all__ = [
    "Layer",
    "Packing",
    "Sequences",
    "Weights",
    "attention",
    "bucketed_bias",
    "encoder_layer",
    "encoder_layers",
    "ffn",
    "position_vectors",
    "project_columns",
    "project_rows",
    "residual_norm",
    "serves_layer",
]
