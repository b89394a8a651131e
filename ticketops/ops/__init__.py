"""Masked attention and masked FFN as autograd ops whose backward passes leave the pruning importance |dL/d mask|
behind, and the dropout, residual and LayerNorm after either."""

from ticketops.ops.attention import attention
from ticketops.ops.ffn import ffn
from ticketops.ops.packing import Packing, Sequences
from ticketops.ops.residual import residual_norm

__all__ = ["Packing", "Sequences", "attention", "ffn", "residual_norm"]
