"""The models the mechanisms were published in."""

from flowformer.models.registry import create_model, list_models

__all__ = ["create_model", "list_models"]
