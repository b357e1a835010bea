"""Attention in linear time: Flow-Attention, the mechanisms it is compared with, and their published experiments."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flowformer._version import __version__ as __version__

# Where each public name lives; imported on first use, so that `import flowformer` costs what `import torch` costs.
_HOME = {
    "AFTConv": "mechanisms",
    "AFTFull": "mechanisms",
    "AFTLocal": "mechanisms",
    "AFTSimple": "mechanisms",
    "FlowAttention": "mechanisms",
    "LinearAttention": "mechanisms",
    "MobileAttention": "mechanisms",
    "SoftmaxAttention": "mechanisms",
    "create_attention": "mechanisms",
    "list_attentions": "mechanisms",
    "create_model": "models",
    "list_models": "models",
    "swap_attention": "models",
    "FlowMultiheadAttention": "interop.torch",
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
    "FlowMultiheadAttention",
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
    from flowformer.interop.estimator import FlowformerClassifier
    from flowformer.interop.hf import (
        FlowformerConfig,
        FlowformerForCausalLM,
        FlowformerForSequenceClassification,
        FlowformerModel,
    )
    from flowformer.interop.torch import FlowMultiheadAttention
    from flowformer.mechanisms import create_attention, list_attentions
    from flowformer.mechanisms.aft import AFTConv, AFTFull, AFTLocal, AFTSimple
    from flowformer.mechanisms.flow import FlowAttention
    from flowformer.mechanisms.linear import LinearAttention
    from flowformer.mechanisms.mobile import MobileAttention
    from flowformer.mechanisms.softmax import SoftmaxAttention
    from flowformer.models import create_model, list_models, swap_attention


def __getattr__(name: str) -> Any:
    if name == "ops":
        return importlib.import_module("flowformer.ops")
    if name not in _HOME and not name.endswith("Attention"):  # further mechanisms name their modules so
        raise AttributeError(f"module 'flowformer' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"flowformer.{_HOME.get(name, 'mechanisms')}"), name)
    except AttributeError:
        raise AttributeError(f"module 'flowformer' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
