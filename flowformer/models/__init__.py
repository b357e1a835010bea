"""The models the mechanisms were published in, and their attention in models of others."""

from flowformer.models.registry import create_model, list_models
from flowformer.models.swap import SwapReport, swap_attention

__all__ = ["SwapReport", "create_model", "list_models", "swap_attention"]
