"""Reformer attention: the operation, its float64 reference, its module, and its row of the registry."""

from flowformer.mechanisms.reformer.module import ReformerAttention
from flowformer.mechanisms.reformer.operation import reformer_attention

__all__ = ["ReformerAttention", "reformer_attention"]
