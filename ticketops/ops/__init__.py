"""Masked attention and masked FFN as autograd ops whose backward passes leave the pruning importance |dL/d mask|
behind."""

from ticketops.ops.attention import attention
from ticketops.ops.ffn import ffn
from ticketops.ops.packing import Packing, Sequences

__all__ = ["Packing", "Sequences", "attention", "ffn"]
