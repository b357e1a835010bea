"""Sizes and probabilities of models and mechanisms that are out of range: each is refused by its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flowformer import create_attention, create_model, list_attentions

SIZES: dict[str, dict[str, Any]] = {
    "flowformer_timeseries": {
        "in_chans": 2, "num_classes": 2, "max_length": 8, "dim": 16, "num_heads": 2, "num_layers": 1, "ffn_dim": 8,
    },
    "flowformer_text": {"vocab_size": 9, "max_length": 8, "dim": 16, "num_heads": 2, "num_layers": 1, "ffn_dim": 8},
    "flowformer_vision_micro": {"in_chans": 3, "img_size": 32, "patch_size": 2, "num_heads": 4},
    "flowformer_sequence": {
        "vocab_size": 9, "num_classes": 2, "max_length": 8, "dim": 16, "num_heads": 2, "num_layers": 1, "ffn_dim": 8,
    },
    "flowformer_decision": {
        "observation_dim": 2, "action_dim": 2, "max_length": 8, "dim": 16, "num_heads": 2, "num_layers": 1,
        "ffn_dim": 8, "max_timestep": 9,
    },
    "behaviour_cloning": {"observation_dim": 2, "action_dim": 2, "context": 3, "dim": 16, "num_layers": 1},
}  # fmt: skip
PROBABILITIES = {
    "flowformer_timeseries": ("dropout",),
    "flowformer_text": ("dropout", "activation_dropout"),
    "flowformer_vision_micro": ("dropout", "drop_path_rate"),
    "flowformer_sequence": ("dropout",),
    "flowformer_decision": ("dropout",),
    "behaviour_cloning": ("dropout",),
}
NO_SIZE = (-1, 0, 1.5, math.nan, True, "3", 2**63, 10**20)
NO_PROBABILITY = (-0.1, 1, 1.0, 2, math.nan, math.inf, "0.1", True)
MODELS = [(name, option) for name, sizes in SIZES.items() for option in sizes]


def refuses(build: Any, option: str, value: Any) -> None:
    with torch.device("meta"), pytest.raises((ValueError, TypeError), match=rf"\b{option} must be"):
        build(**{option: value})


@pytest.mark.parametrize(("name", "option"), MODELS, ids=[f"{name}-{option}" for name, option in MODELS])
def test_a_size_of_a_model_is_positive(name, option):
    for value in NO_SIZE:
        refuses(lambda **changed: create_model(name, **{**SIZES[name], **changed}), option, value)


@pytest.mark.parametrize("name", SIZES)
def test_a_dropout_of_a_model_is_at_least_0_and_below_1(name):
    for option in PROBABILITIES[name]:
        for value in NO_PROBABILITY:
            refuses(lambda **changed: create_model(name, **{**SIZES[name], **changed}), option, value)


@pytest.mark.parametrize("name", list_attentions())
def test_sizes_and_dropout_of_every_mechanism(name):
    def build(**changed: Any) -> Any:
        return create_attention(name, **{"dim": 16, "num_heads": 2, "max_length": 8, **changed})

    for option in ("dim", "num_heads", "head_dim", "max_length"):
        for value in NO_SIZE:
            refuses(build, option, value)
    for value in NO_PROBABILITY:
        refuses(build, "dropout", value)


@pytest.mark.parametrize(
    ("name", "option", "values"),
    [
        ("aft_local", "window", (0, -1, 1.5, math.nan, 2**63)),
        ("aft_local", "position_dim", (0, -1, 1.5, 2**63)),
        ("aft_full", "position_std", (-1, math.nan, math.inf, 1e20)),
        ("aft_conv", "hard", (math.nan, 1, "yes")),
        ("flow", "eps", (-1, math.nan, 1e20)),
        ("flow", "clamp", (-1, 0, math.nan)),
        ("mobile", "eps", (-1, math.nan, 1e20)),
        ("linear", "eps", (-1, math.nan, 1e20)),
    ],
)
def test_options_of_mechanisms(name, option, values):
    for value in values:
        with torch.device("meta"), pytest.raises((ValueError, TypeError), match=rf"\b{option}\b.* must"):
            create_attention(name, 16, 2, max_length=8, **{option: value})


@pytest.mark.parametrize(
    ("option", "values"),
    [("mlp_ratio", (0, -1, math.nan, 1e20)), ("weight_std", (0, math.nan)), ("layer_scale", (-1, math.inf, 10**20))],
)
def test_numbers_of_image_models(option, values):
    for value in values:
        refuses(lambda **changed: create_model("flowformer_vision_small", **changed), option, value)
