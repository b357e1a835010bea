"""Weights published for the original code, and those of GPT-2, loaded into our models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowformer.models.language import LanguageModel
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel

Names = Sequence[tuple[str, str]]
M = TypeVar("M", bound=nn.Module)

# thuml/Flowformer, Flowformer_TimeSeries -> ours, as patterns.
_TIMESERIES_NAMES = (
    (r"project_inp\.(\w+)", r"embed.\1"),
    (r"pos_enc\.pe", "position"),
    (r"encoder\.attn_layers\.(\d+)\.attention\.query_projection\.(\w+)", r"encoder.blocks.\1.attention.q_proj.\2"),
    (r"encoder\.attn_layers\.(\d+)\.attention\.key_projection\.(\w+)", r"encoder.blocks.\1.attention.k_proj.\2"),
    (r"encoder\.attn_layers\.(\d+)\.attention\.value_projection\.(\w+)", r"encoder.blocks.\1.attention.v_proj.\2"),
    (r"encoder\.attn_layers\.(\d+)\.attention\.out_projection\.(\w+)", r"encoder.blocks.\1.attention.out_proj.\2"),
    (r"encoder\.attn_layers\.(\d+)\.conv1\.(\w+)", r"encoder.blocks.\1.linear1.\2"),
    (r"encoder\.attn_layers\.(\d+)\.conv2\.(\w+)", r"encoder.blocks.\1.linear2.\2"),
    (r"encoder\.attn_layers\.(\d+)\.(norm[12])\.(\w+)", r"encoder.blocks.\1.\2.\3"),
    (r"encoder\.norm\.(\w+)", r"encoder.norm.\1"),
    (r"output_layer\.(\w+)", r"head.\1"),
)

# thuml/Flowformer, Flowformer_CV -> ours; query, key and value are one layer there.
_VISION_NAMES = (
    (r"pos_embed", "position"),
    (r"patch_embed\.(\d+)\.proj\.(\w+)", r"stages.\1.embed.\2"),
    (r"blocks\.(\d+)\.(\d+)\.(norm[12])\.(\w+)", r"stages.\1.blocks.\2.\3.\4"),
    (r"blocks\.(\d+)\.(\d+)\.attn\.qkv\.(\w+)", r"stages.\1.blocks.\2.attention.qkv.\3"),
    (r"blocks\.(\d+)\.(\d+)\.attn\.proj\.(\w+)", r"stages.\1.blocks.\2.attention.out_proj.\3"),
    (r"blocks\.(\d+)\.(\d+)\.mlp\.fc1\.(\w+)", r"stages.\1.blocks.\2.linear1.\3"),
    (r"blocks\.(\d+)\.(\d+)\.mlp\.fc2\.(\w+)", r"stages.\1.blocks.\2.linear2.\3"),
    (r"blocks\.(\d+)\.(\d+)\.gamma", r"stages.\1.blocks.\2.gamma"),
    (r"(norm|head)\.(\w+)", r"\1.\2"),
)

# What the GPT-style module of thuml/Flowformer and transformers' GPT-2 have in common -> ours.
_GPT_NAMES = (
    (r"transformer\.wte\.weight", "embed.weight"),
    (r"transformer\.wpe\.weight", "position.weight"),
    (r"transformer\.h\.(\d+)\.ln_([12])\.(\w+)", r"decoder.blocks.\1.norm\2.\3"),
    (r"transformer\.h\.(\d+)\.mlp\.c_fc\.(\w+)", r"decoder.blocks.\1.linear1.\2"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.(\w+)", r"decoder.blocks.\1.linear2.\2"),
    (r"transformer\.ln_f\.(\w+)", r"decoder.norm.\1"),
    (r"lm_head\.weight", "head.weight"),
)
_FLOW_GPT_NAMES = (
    *_GPT_NAMES,
    (r"transformer\.h\.(\d+)\.attn\.query_projection\.(\w+)", r"decoder.blocks.\1.attention.q_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.key_projection\.(\w+)", r"decoder.blocks.\1.attention.k_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.value_projection\.(\w+)", r"decoder.blocks.\1.attention.v_proj.\2"),
    (r"transformer\.h\.(\d+)\.attn\.out_projection\.(\w+)", r"decoder.blocks.\1.attention.out_proj.\2"),
)
_GPT2_NAMES = (
    *_GPT_NAMES,
    (r"transformer\.h\.(\d+)\.attn\.c_attn\.(\w+)", r"decoder.blocks.\1.attention.qkv.\2"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.(\w+)", r"decoder.blocks.\1.attention.out_proj.\2"),
)
# Tables of ones that older versions of transformers saved beside the weights.
_GPT2_BUFFERS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
_GPT2_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
# Settings of GPT-2 that change what it computes, and the one value of each that our model honours.
_GPT2_FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def timeseries_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a published time-series classifier's state dict to our names and shapes.

    Args:
        published: Names and tensors as in thuml/Flowformer, Flowformer_TimeSeries.

    Returns:
        A state dict for :class:`flowformer.models.timeseries.SeriesClassifier`.

    Raises:
        ValueError: for a name that such a checkpoint does not have.
    """
    ours = {}
    for name, tensor in published.items():
        new = _rename(name, _TIMESERIES_NAMES, "the published time-series classifier")
        if new == "position":
            tensor = tensor.squeeze(1)  # (length, 1, dim)
        elif re.search(r"linear[12]\.weight", new):
            tensor = tensor.squeeze(-1)  # a convolution of width 1
        ours[new] = tensor
    return ours


def load_timeseries(published: Mapping[str, Tensor], *, num_heads: int = 8, **options: Any) -> SeriesClassifier:
    """Build our classifier from a published state dict, sizes read from its tensors.

    Args:
        published: As in :func:`timeseries_state_dict`.
        num_heads: Heads, which the tensors do not tell.
        **options: Other options of :class:`flowformer.models.timeseries.SeriesClassifier`;
            ``mask_padding=False`` gives the published numbers where there is padding.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: for a name that such a checkpoint does not have, one that is missing, or a tensor of another shape.
    """
    state = timeseries_state_dict(published)
    _require(state, "position", "embed.weight", "head.bias", "encoder.blocks.0.linear1.weight")
    max_length, dim = state["position"].shape
    model = SeriesClassifier(
        state["embed.weight"].shape[1],
        state["head.bias"].shape[0],
        max_length,
        dim=dim,
        num_heads=num_heads,
        num_layers=sum(name.endswith("q_proj.weight") for name in state),
        ffn_dim=state["encoder.blocks.0.linear1.weight"].shape[0],
        **options,
    )
    return _fill(model, state)


def vision_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate a published hierarchical Flowformer's state dict to our names and shapes.

    Args:
        published: Names and tensors as in thuml/Flowformer, Flowformer_CV.

    Returns:
        A state dict for :class:`flowformer.models.vision.VisionModel`.

    Raises:
        ValueError: for a name that such a checkpoint does not have.
    """
    ours = {}
    for name, tensor in published.items():
        new = _rename(name, _VISION_NAMES, "the published hierarchical Flowformer")
        if ".qkv." in new:
            for projection, part in zip(("q_proj", "k_proj", "v_proj"), tensor.chunk(3), strict=True):
                ours[new.replace("qkv", projection)] = part
        else:
            ours[new] = tensor.squeeze(0) if new == "position" else tensor  # (1, patches, dim)
    return ours


def load_vision(published: Mapping[str, Tensor], *, num_heads: int = 12, **options: Any) -> VisionModel:
    """Build our hierarchical Flowformer from a published state dict, sizes read from its tensors.

    Args:
        published: As in :func:`vision_state_dict`.
        num_heads: Heads of every stage, which the tensors do not tell.
        **options: Other options of :class:`flowformer.models.vision.VisionModel`; ``img_size``, in pixels, where
            positions are not those of squares.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: for a name that such a checkpoint does not have, one that is missing, or a tensor of another shape.
    """
    state = vision_state_dict(published)
    _require(state, "position", "head.bias", "stages.0.embed.weight", "stages.0.blocks.0.linear1.weight")
    stages = sum(name.endswith("embed.weight") for name in state)
    embed_dims = [len(state[f"stages.{stage}.embed.bias"]) for stage in range(stages)]
    depths = [
        sum(bool(re.fullmatch(rf"stages\.{s}\..*\.linear1\.weight", name)) for name in state) for s in range(stages)
    ]
    _, in_chans, patch_size, _ = state["stages.0.embed.weight"].shape
    sizes: dict[str, Any] = {
        "in_chans": in_chans,
        "img_size": math.isqrt(len(state["position"])) * patch_size,
        "patch_size": patch_size,
        "embed_dims": embed_dims,
        "depths": depths,
        "num_heads": num_heads,
        "mlp_ratio": len(state["stages.0.blocks.0.linear1.weight"]) / embed_dims[0],
        "layer_scale": 1e-5,  # of the fresh model, to be overwritten
    }
    return _fill(VisionModel(len(state["head.bias"]), **{**sizes, **options}), state)


def load_gpt(published: Mapping[str, Tensor], *, num_heads: int, **options: Any) -> LanguageModel:
    """Build our language model from a state dict of the published GPT-style module, sizes read from its tensors.

    Args:
        published: Names and tensors as in thuml/Flowformer, Flowformer_TorchModule.
        num_heads: Heads, which the tensors do not tell.
        **options: Other options of :class:`flowformer.models.language.LanguageModel`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: for a name that such a checkpoint does not have, one that is missing, or a tensor of another shape.
    """
    state = {_rename(name, _FLOW_GPT_NAMES, "the published GPT-style module"): t for name, t in published.items()}
    sizes = _decoder_sizes(state, tied=False)
    return _fill(LanguageModel(**{**sizes, "num_heads": num_heads, "activation": "gelu_tanh", **options}), state)


def gpt2_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translate the weights of transformers' GPT-2 to our names and shapes.

    Its linear layers are stored transposed, and its queries, keys and values as one.

    Args:
        weights: Names and tensors as in ``transformers.GPT2LMHeadModel`` or ``GPT2Model``.

    Returns:
        A state dict for :class:`flowformer.models.language.LanguageModel`.

    Raises:
        ValueError: for a name that GPT-2 does not have.
    """
    ours: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if _GPT2_BUFFERS.fullmatch(name):
            continue
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        new = _rename(full, _GPT2_NAMES, "GPT-2")
        if new.endswith("weight") and re.search(r"qkv|out_proj|linear[12]", new):
            tensor = tensor.T
        if ".qkv." in new:
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                ours[new.replace("qkv", f"{part}_proj")] = rows
        else:
            ours[new] = tensor
    return ours


def load_gpt2(source: Any, *, attention: str = "flow", **options: Any) -> LanguageModel:
    """Build our language model from a GPT-2 of transformers, of any size, with another attention.

    Embeddings, feed-forward networks, norms and the head are GPT-2's. So are the projections of the attention, where
    the mechanism has ones of the same shape (flow, softmax, linear, mobile and all of AFT but the keys of aft_conv);
    what GPT-2 has no counterpart of starts afresh. ``attention="softmax"`` is GPT-2 itself, but for dropout on the
    attention's weights, which we do not have.

    Args:
        source: A ``transformers.GPT2LMHeadModel``, or a folder that ``save_pretrained`` wrote (transformers is not
            needed to read it).
        attention: Name of a causal mechanism: :func:`flowformer.list_attentions`.
        **options: Other options of :class:`flowformer.models.language.LanguageModel`.

    Returns:
        The model in evaluation mode, with the dtype of the weights.

    Raises:
        FileNotFoundError: for a folder without ``config.json`` or weights.
        ValueError: for settings of GPT-2 that our model does not have, and for weights that are missing, unexpected, or
            of another shape.
    """
    config, weights = _read_folder(Path(source)) if isinstance(source, (str, Path)) else _read_model(source)
    _check_gpt2(config)
    state = gpt2_state_dict(weights)
    tied = bool(config.get("tie_word_embeddings", True)) or "head.weight" not in state
    if tied:
        state.pop("head.weight", None)
    own = {
        "num_heads": config["n_head"],
        "activation": _GPT2_ACTIVATIONS[config.get("activation_function", "gelu_new")],
        "dropout": config.get("resid_pdrop", 0.1),
    }
    model = LanguageModel(**{**_decoder_sizes(state, tied=tied), **own, "attention": attention, **options})
    fresh = _keep_fresh_attention(model, state)
    return _fill(model.to(state["embed.weight"].dtype), {**fresh, **state})


def _keep_fresh_attention(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters of another attention that GPT-2 has no counterpart of; a counterpart of another shape is dropped.

    Softmax attention has no such parameters, and what is missing or misshapen there is an error, as elsewhere.
    """
    ours = model.state_dict()
    projections = re.compile(r".*\.attention\.(q|k|v|out)_proj\.\w+")
    fresh = {n: t for n, t in ours.items() if ".attention." in n and not projections.fullmatch(n)}
    dim = state["embed.weight"].shape[1]
    for name, tensor in ours.items():
        own_shape = projections.fullmatch(name) and set(tensor.shape) != {dim}
        if own_shape and name in state and state[name].shape != tensor.shape:
            state.pop(name)
            fresh[name] = tensor
    return fresh


def _check_gpt2(config: Mapping[str, Any]) -> None:
    if config.get("model_type") != "gpt2":
        raise ValueError(f"the model must be a GPT-2, got model_type {config.get('model_type')!r}")
    for name, wanted in _GPT2_FIXED.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name} = {config[name]} is not supported: only {wanted} is")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function must be one of {', '.join(_GPT2_ACTIVATIONS)}, got {activation!r}")


def _read_model(model: Any) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"source must be a folder or a GPT2LMHeadModel, got {type(model).__name__}")
    return model.config.to_dict(), model.state_dict()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - a transformers model has it


def _read_folder(folder: Path) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    """Settings and weights as ``save_pretrained`` writes them: in one file or in parts, as safetensors or by torch."""
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder}/config.json: there is no such file; the folder of a GPT-2 has one")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            parts = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            return config, {key: tensor for part in parts for key, tensor in _read_weights(folder / part).items()}
        if (folder / name).is_file():
            return config, _read_weights(folder / name)
    raise FileNotFoundError(f"{folder} has neither model.safetensors nor pytorch_model.bin, whole or in parts")


def _read_weights(file: Path) -> Mapping[str, Tensor]:
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    return torch.load(file, map_location="cpu", weights_only=True)


def _decoder_sizes(state: Mapping[str, Tensor], *, tied: bool) -> dict[str, Any]:
    """Options of a language model that the shapes of its weights tell."""
    _require(state, "embed.weight", "position.weight", "decoder.blocks.0.linear1.weight")
    vocab_size, dim = state["embed.weight"].shape
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "max_length": state["position.weight"].shape[0],
        "num_layers": sum(name.endswith("linear1.weight") for name in state),
        "ffn_dim": state["decoder.blocks.0.linear1.weight"].shape[0],
        "tied": tied,
    }


def _rename(name: str, names: Names, what: str) -> str:
    for pattern, replacement in names:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{name!r} is no parameter of {what}")


def _require(state: Mapping[str, Tensor], *names: str) -> None:
    missing = [name for name in names if name not in state]
    if missing:
        raise ValueError(f"the weights do not fit the model: missing {', '.join(missing)} (in our names)")


def _fill(model: M, state: Mapping[str, Tensor]) -> M:
    """Load weights, all of which must fit, and return the model in evaluation mode."""
    wanted = model.state_dict()
    shared = sorted(set(wanted) & set(state))
    wrong = [
        f"{name} is {tuple(state[name].shape)} and must be {tuple(wanted[name].shape)}"
        for name in shared
        if state[name].shape != wanted[name].shape
    ]
    troubles = {
        "missing": sorted(set(wanted) - set(state)),
        "unexpected": sorted(set(state) - set(wanted)),
        "of another shape": wrong,
    }
    said = "; ".join(f"{what}: {', '.join(names)}" for what, names in troubles.items() if names)
    if said:
        raise ValueError(f"the weights do not fit the model: {said} (in our names)")
    model.load_state_dict(state)
    return model.eval()
