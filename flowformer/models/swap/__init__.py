"""Replace the attention of a model: timm's ViT, DeiT and PVT-v2, and ``torch.nn.MultiheadAttention``."""

from flowformer.models.swap.attention import SwappedAttention, SwappedSpatialAttention, SwapReport, swap_attention
from flowformer.models.swap.multihead import DropInMultiheadAttention

__all__ = [
    "DropInMultiheadAttention",
    "SwapReport",
    "SwappedAttention",
    "SwappedSpatialAttention",
    "swap_attention",
]
