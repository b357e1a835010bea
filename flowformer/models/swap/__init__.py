"""Other attention in a model that exists: timm's ViT, DeiT and PVT-v2, and ``torch.nn.MultiheadAttention`` anywhere."""

from flowformer.models.swap.attention import SwappedAttention, SwappedSpatialAttention, SwapReport, swap_attention
from flowformer.models.swap.multihead import DropInMultiheadAttention

__all__ = [
    "DropInMultiheadAttention",
    "SwapReport",
    "SwappedAttention",
    "SwappedSpatialAttention",
    "swap_attention",
]
