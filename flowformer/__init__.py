"""Attention in linear time: Flow-Attention, the mechanisms it is compared with, and their published experiments."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowformer._version import __version__ as __version__

# Where each public name lives; imported on first use, so that `import flowformer` costs what `import torch` costs.
_HOME = {
    "AFTConv": "attention",
    "AFTFull": "attention",
    "AFTLocal": "attention",
    "AFTSimple": "attention",
    "FlowAttention": "attention",
    "LinearAttention": "attention",
    "MobileAttention": "attention",
    "SoftmaxAttention": "attention",
    "create_attention": "attention",
    "list_attentions": "attention",
    "create_model": "models",
    "list_models": "models",
    "swap_attention": "models",
    "FlowformerClassifier": "interop.estimator",
    "FlowformerConfig": "interop.hf",
    "FlowformerForCausalLM": "interop.hf",
    "FlowformerForSequenceClassification": "interop.hf",
    "FlowformerModel": "interop.hf",
}

__all__ = [
    "AFTConv",
    "AFTFull",
    "AFTLocal",
    "AFTSimple",
    "FlowAttention",
    "FlowformerClassifier",
    "FlowformerConfig",
    "FlowformerForCausalLM",
    "FlowformerForSequenceClassification",
    "FlowformerModel",
    "LinearAttention",
    "MobileAttention",
    "SoftmaxAttention",
    "create_attention",
    "create_model",
    "list_attentions",
    "list_models",
    "ops",
    "swap_attention",
]

if TYPE_CHECKING:
    from flowformer import ops
    from flowformer.attention import (
        AFTConv,
        AFTFull,
        AFTLocal,
        AFTSimple,
        FlowAttention,
        LinearAttention,
        MobileAttention,
        SoftmaxAttention,
        create_attention,
        list_attentions,
    )
    from flowformer.interop.estimator import FlowformerClassifier
    from flowformer.interop.hf import (
        FlowformerConfig,
        FlowformerForCausalLM,
        FlowformerForSequenceClassification,
        FlowformerModel,
    )
    from flowformer.models import create_model, list_models, swap_attention


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("flowformer.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'flowformer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flowformer.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
