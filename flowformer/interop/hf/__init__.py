"""Flowformer in Hugging Face transformers: configuration, models, cache, and conversion.

Importing this module registers the models with the Auto classes. Sources: transformers 5.24, models/gpt2 and
models/falcon_mamba, for what it asks of a model.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flowformer.interop.hf.cache import FlowformerCacheLayer
from flowformer.interop.hf.configuration import FlowformerConfig
from flowformer.interop.hf.conversion import from_hf, to_hf
from flowformer.interop.hf.modeling import (
    FlowformerForCausalLM,
    FlowformerForSequenceClassification,
    FlowformerModel,
    FlowformerPreTrainedModel,
)

__all__ = [
    "FlowformerCacheLayer",
    "FlowformerConfig",
    "FlowformerForCausalLM",
    "FlowformerForSequenceClassification",
    "FlowformerModel",
    "FlowformerPreTrainedModel",
    "from_hf",
    "to_hf",
]

# Trainer's label smoothing shifts the labels of models named here only.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(FlowformerConfig.model_type, FlowformerForCausalLM.__name__)
AutoConfig.register(FlowformerConfig.model_type, FlowformerConfig, exist_ok=True)
AutoModel.register(FlowformerConfig, FlowformerModel, exist_ok=True)
AutoModelForCausalLM.register(FlowformerConfig, FlowformerForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(FlowformerConfig, FlowformerForSequenceClassification, exist_ok=True)
