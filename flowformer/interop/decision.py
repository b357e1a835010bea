"""Load weights of the original Decision Transformer, of its copy with Flow-Attention, and of transformers' port."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowformer.interop.state_dicts import fill, rename, require, split_qkv
from flowformer.models.decision import DecisionTransformer

# kzl/decision-transformer ("transformer"), thuml/Flowformer, Flowformer_RL (its attention is "att"), and transformers'
# DecisionTransformerModel ("encoder") -> ours.
_NAMES = (
    (r"embed_timestep\.weight", "embed_timestep.weight"),
    (r"embed_(return|action)\.(\w+)", r"embed_\1.\2"),
    (r"embed_state\.(\w+)", r"embed_observation.\1"),
    (r"embed_ln\.(\w+)", r"embed_norm.\1"),
    (r"(?:transformer|encoder)\.h\.(\d+)\.ln_([12])\.(\w+)", r"decoder.blocks.\1.norm\2.\3"),
    (r"(?:transformer|encoder)\.h\.(\d+)\.mlp\.c_fc\.(\w+)", r"decoder.blocks.\1.linear1.\2"),
    (r"(?:transformer|encoder)\.h\.(\d+)\.mlp\.c_proj\.(\w+)", r"decoder.blocks.\1.linear2.\2"),
    (r"(?:transformer|encoder)\.h\.(\d+)\.attn\.c_attn\.(\w+)", r"decoder.blocks.\1.attention.qkv.\2"),
    (r"(?:transformer|encoder)\.h\.(\d+)\.attn\.c_proj\.(\w+)", r"decoder.blocks.\1.attention.out_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.att\.query_projection\.(\w+)", r"decoder.blocks.\1.attention.q_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.att\.key_projection\.(\w+)", r"decoder.blocks.\1.attention.k_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.att\.value_projection\.(\w+)", r"decoder.blocks.\1.attention.v_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.att\.out_projection\.(\w+)", r"decoder.blocks.\1.attention.out_proj.\2"),
    (r"(?:transformer|encoder)\.ln_f\.(\w+)", r"decoder.norm.\1"),
    (r"encoder\.wpe\.weight", "positions"),
    (r"predict_action\.0\.(\w+)", r"head.\1"),
)
# What no action depends on: the token embedding, tables of ones, and heads that the published training does not use.
_UNUSED = re.compile(
    r"(transformer|encoder)\.wte\.weight|(transformer|encoder)\.h\.\d+\.attn\.(masked_)?bias"
    r"|predict_(state|return)\.(weight|bias)"
)
_CONV1D = re.compile(r"\.c_(attn|proj|fc)\.weight")  # GPT-2's linear layers, stored transposed


def decision_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a published Decision Transformer to the names and shapes of this library.

    Args:
        published: Names and tensors as in kzl/decision-transformer (gym), Flowformer_RL of thuml/Flowformer, or
            transformers' ``DecisionTransformerModel``, whose one position vector becomes part of a bias.

    Returns:
        A state dict for :class:`flowformer.models.decision.DecisionTransformer`.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that such a checkpoint does not have.
    """
    if isinstance(published, Mapping):
        published = {
            name: tensor.T if isinstance(tensor, Tensor) and _CONV1D.search(str(name)) else tensor
            for name, tensor in published.items()
            if not _UNUSED.fullmatch(str(name))
        }
    state: dict[str, Tensor] = {}
    for name, tensor in rename(published, _NAMES, "the published Decision Transformer").items():
        if ".qkv." in name:
            split_qkv(state, name, tensor)
        else:
            state[name] = tensor
    if "positions" in state:  # transformers adds the vector of position 0 to every token, after this norm
        require(state, {"positions": 2, "embed_norm.bias": 1})
        state["embed_norm.bias"] = state["embed_norm.bias"] + state.pop("positions")[0]
    return state


def load_decision(published: Mapping[str, Tensor], *, num_heads: int, **options: Any) -> DecisionTransformer:
    """Build a Decision Transformer from a published state dict; sizes are read from its tensors.

    Args:
        published: As in :func:`decision_state_dict`. With Flow-Attention for the weights of Flowformer_RL, with softmax
            attention for the others.
        num_heads: Heads, which the tensors do not tell: 4 in Flowformer_RL; 1 in kzl/decision-transformer and in
            transformers unless configured.
        **options: Other options of :class:`flowformer.models.decision.DecisionTransformer`: ``activation``, ``tanh``.

    Returns:
        The model, in evaluation mode, with the dtype of the weights. Actions are as published: observations must be
        standardised and returns scaled as in training.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that such a checkpoint does not have, one that is missing, or a tensor of another shape.
    """
    state = decision_state_dict(published)
    first = "decoder.blocks.0.linear1.weight"
    require(state, {"embed_observation.weight": 2, "embed_timestep.weight": 2, "head.bias": 1, first: 2})
    max_timestep, dim = state["embed_timestep.weight"].shape
    sizes = {
        "dim": dim,
        "num_heads": num_heads,
        "num_layers": sum(name.endswith("linear1.weight") for name in state),
        "ffn_dim": state[first].shape[0],
        "max_timestep": max_timestep,
        "attention": "flow" if any(".attn.att." in name for name in published) else "softmax",
        "dtype": state[first].dtype,
    }
    observation_dim, action_dim = state["embed_observation.weight"].shape[1], state["head.bias"].shape[0]
    return fill(DecisionTransformer(observation_dim, action_dim, **{**sizes, **options}), state)
