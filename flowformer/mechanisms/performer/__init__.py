"""Performer: the operation, its float64 reference, its module, and its row of the registry."""

from flowformer.mechanisms.performer.module import PerformerAttention
from flowformer.mechanisms.performer.operation import (
    PerformerState,
    init_performer_state,
    performer_attention,
    performer_attention_step,
)
from flowformer.mechanisms.performer.options import PerformerOptions, performer_options

__all__ = [
    "PerformerAttention",
    "PerformerOptions",
    "PerformerState",
    "init_performer_state",
    "performer_attention",
    "performer_attention_step",
    "performer_options",
]
