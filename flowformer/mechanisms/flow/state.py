"""State of causal Flow-Attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_fresh_state
from flowformer.core.precision import LOG_ZERO, state_dtype
from flowformer.mechanisms.flow.options import flow_options


class FlowState(NamedTuple):
    """State of causal Flow-Attention. Sums are in float64: see ``core.precision.state_dtype``.

    Attributes:
        tokens: Number of tokens so far, (batch, heads); with a decay, the decayed sum of ones.
        sums: sum K, sum Q, sum K n / O and sum Q n / I, (batch, heads, 4, K).
        log_normaliser: log sum exp(O^), (batch, heads).
        memory: sum K^T C v, (batch, heads, K, V).
    """

    tokens: Tensor
    sums: Tensor
    log_normaliser: Tensor
    memory: Tensor


def init_flow_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    preset: str = "core",
    **overrides: Any,
) -> FlowState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``.

    Args:
        batch: Sequences.
        heads: Heads.
        key_channels: Channels of queries and keys, before the feature map.
        value_channels: Channels of values.
        dtype: Of the inputs.
        device: Of the state.
        preset: As in :func:`flowformer.ops.flow_attention`, for the feature map decides the number of features.
        **overrides: Likewise.
    """
    check_fresh_state(
        "init_flow_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    device = torch.device("cpu") if device is None else torch.device(device)
    features = flow_options(preset, **overrides).feature_channels(key_channels)
    like = torch.zeros(batch, heads, dtype=state_dtype(device), device=device)
    return FlowState(
        torch.zeros_like(like),
        like.new_zeros(batch, heads, 4, features),
        torch.full_like(like, LOG_ZERO),
        like.new_zeros(batch, heads, features, value_channels),
    )


def fresh_state(*sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> FlowState:
    """Return :func:`init_flow_state` for a row of the registry, which passes learned tensors too."""
    return init_flow_state(*sizes_and_learned[:4], dtype=dtype, device=device, **options)
