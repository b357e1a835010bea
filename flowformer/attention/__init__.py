"""Attention mechanisms as modules, (batch, length, dim) to (batch, length, dim)."""

from flowformer.attention.base import Attention
from flowformer.attention.flow import FlowAttention
from flowformer.attention.linear import LinearAttention
from flowformer.attention.registry import Mechanism, create_attention, find_attention, list_attentions
from flowformer.attention.softmax import SoftmaxAttention

__all__ = [
    "Attention",
    "FlowAttention",
    "LinearAttention",
    "Mechanism",
    "SoftmaxAttention",
    "create_attention",
    "find_attention",
    "list_attentions",
]
