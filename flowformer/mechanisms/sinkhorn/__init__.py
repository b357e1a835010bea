"""Sinkhorn attention: the operation, its float64 reference, its module, and its row of the registry."""

from flowformer.mechanisms.sinkhorn.module import SinkhornAttention
from flowformer.mechanisms.sinkhorn.operation import sinkhorn_attention

__all__ = ["SinkhornAttention", "sinkhorn_attention"]
