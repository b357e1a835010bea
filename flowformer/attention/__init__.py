"""Attention mechanisms as modules, (batch, length, dim) to (batch, length, dim)."""

from flowformer.attention.aft import AFTFull, AFTLocal, AFTSimple
from flowformer.attention.aft_conv import AFTConv
from flowformer.attention.base import Attention
from flowformer.attention.flow import FlowAttention
from flowformer.attention.linear import LinearAttention
from flowformer.attention.mobile import MobileAttention
from flowformer.attention.registry import Mechanism, Variant, create_attention, find_attention, list_attentions
from flowformer.attention.softmax import SoftmaxAttention

__all__ = [
    "AFTConv",
    "AFTFull",
    "AFTLocal",
    "AFTSimple",
    "Attention",
    "FlowAttention",
    "LinearAttention",
    "Mechanism",
    "MobileAttention",
    "SoftmaxAttention",
    "Variant",
    "create_attention",
    "find_attention",
    "list_attentions",
]
