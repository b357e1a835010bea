"""cosFormer attention: the operation, its float64 reference, its module, and its row of the registry."""

from flowformer.mechanisms.cosformer.module import CosformerAttention
from flowformer.mechanisms.cosformer.operation import (
    CosformerState,
    cosformer_attention,
    cosformer_attention_step,
    init_cosformer_state,
)

__all__ = [
    "CosformerAttention",
    "CosformerState",
    "cosformer_attention",
    "cosformer_attention_step",
    "init_cosformer_state",
]
