"""The models of the published experiments, and the replacement of attention in other models."""

from flowformer.models.registry import create_model, list_models
from flowformer.models.swap import SwapReport, swap_attention

__all__ = ["SwapReport", "create_model", "list_models", "swap_attention"]
