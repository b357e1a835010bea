"""Load weights published for the original code, and GPT-2's, into the models of this library."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.interop.state_dicts import fill, rename, require, split_qkv
from flowformer.interop.weights import read_folder
from flowformer.models.language import LanguageModel
from flowformer.models.language_models import flowformer_wikitext
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel
from flowformer.models.vocabulary.adaptive import AdaptiveEmbedding, AdaptiveSoftmax

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
# fairseq's transformer_lm, whose attention thuml/Flowformer, Flowformer_NLP, replaces by Flow-Attention -> ours.
_FAIRSEQ_NAMES = (
    (r"decoder\.embed_tokens\.weight", "embed.weight"),
    (r"decoder\.embed_tokens\.embeddings\.(\d+)\.0\.weight", r"embed.tables.\1.weight"),
    (r"decoder\.embed_tokens\.embeddings\.(\d+)\.1\.weight", r"embed.projections.\1.weight"),
    (r"decoder\.layers\.(\d+)\.self_attn\.([qkv]|out)_proj\.(\w+)", r"decoder.blocks.\1.attention.\2_proj.\3"),
    (r"decoder\.layers\.(\d+)\.self_attn\.in_proj_(\w+)", r"decoder.blocks.\1.attention.qkv.\2"),  # of old versions
    (r"decoder\.layers\.(\d+)\.self_attn_layer_norm\.(\w+)", r"decoder.blocks.\1.norm1.\2"),
    (r"decoder\.layers\.(\d+)\.final_layer_norm\.(\w+)", r"decoder.blocks.\1.norm2.\2"),
    (r"decoder\.layers\.(\d+)\.fc([12])\.(\w+)", r"decoder.blocks.\1.linear\2.\3"),
    (r"decoder\.layer_norm\.(\w+)", r"decoder.norm.\1"),
    (r"decoder\.(output_projection\.weight|embed_out)", "head.weight"),
    (r"decoder\.adaptive_softmax\.head\.weight", "head.first"),
    (r"decoder\.adaptive_softmax\.head\.word_proj\.0\.weight", "head.projections.0.weight"),
    (r"decoder\.adaptive_softmax\.head\.word_proj\.(1\.)?weight", "head.tables.0.weight"),
    (r"decoder\.adaptive_softmax\.head\.class_proj\.weight", "head.classes.weight"),
    (r"decoder\.adaptive_softmax\.tail\.(\d+)\.0\.weight", r"head.tails.\1.0"),
    (r"decoder\.adaptive_softmax\.tail\.(\d+)\.2\.weight", r"head.tails.\1.1"),
)
# What fairseq saves beside the weights: versions of its formats, and tensors that keep a dtype or are tables of sines.
_FAIRSEQ_BUFFERS = re.compile(
    r"decoder\.(version|adaptive_softmax\.version|embed_positions\.weights|"
    r"(embed_positions|embed_tokens|adaptive_softmax\.head)\._float_tensor)"
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
    """Convert the state dict of a published time-series classifier to the names and shapes of this library.

    Args:
        published: Names and tensors as in thuml/Flowformer, Flowformer_TimeSeries.

    Returns:
        A state dict for :class:`flowformer.models.timeseries.SeriesClassifier`.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that such a checkpoint does not have.
    """
    ours = {}
    for new, tensor in rename(published, _TIMESERIES_NAMES, "the published time-series classifier").items():
        if new == "position":
            tensor = tensor.flatten(1) if tensor.ndim == 3 else tensor  # (length, 1, dim)
        elif re.search(r"linear[12]\.weight", new):
            tensor = tensor.squeeze(-1) if tensor.ndim == 3 else tensor  # a convolution of width 1
        ours[new] = tensor
    return ours


def load_timeseries(published: Mapping[str, Tensor], *, num_heads: int = 8, **options: Any) -> SeriesClassifier:
    """Build a time-series classifier from a published state dict; sizes are read from its tensors.

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
    require(state, {"position": 2, "embed.weight": 2, "head.bias": 1, "encoder.blocks.0.linear1.weight": 2})
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
    return fill(model, state)


def vision_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a published hierarchical Flowformer to the names and shapes of this library.

    Args:
        published: Names and tensors as in thuml/Flowformer, Flowformer_CV.

    Returns:
        A state dict for :class:`flowformer.models.vision.VisionModel`.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that such a checkpoint does not have.
    """
    ours: dict[str, Tensor] = {}
    for new, tensor in rename(published, _VISION_NAMES, "the published hierarchical Flowformer").items():
        if ".qkv." in new:
            split_qkv(ours, new, tensor)
        else:
            ours[new] = tensor.squeeze(0) if new == "position" else tensor  # (1, patches, dim)
    return ours


def load_vision(published: Mapping[str, Tensor], *, num_heads: int = 12, **options: Any) -> VisionModel:
    """Build a hierarchical Flowformer from a published state dict; sizes are read from its tensors.

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
    stages = sum(name.endswith("embed.weight") for name in state)
    biases = {f"stages.{stage}.embed.bias": 1 for stage in range(stages)}
    sizes_of = {"position": 2, "head.bias": 1, "stages.0.embed.weight": 4, "stages.0.blocks.0.linear1.weight": 2}
    require(state, {**sizes_of, **biases})
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
    return fill(VisionModel(len(state["head.bias"]), **{**sizes, **options}), state)


def load_gpt(published: Mapping[str, Tensor], *, num_heads: int, **options: Any) -> LanguageModel:
    """Build a language model from a state dict of the published GPT-style module; sizes are read from its tensors.

    Args:
        published: Names and tensors as in thuml/Flowformer, Flowformer_TorchModule.
        num_heads: Heads, which the tensors do not tell.
        **options: Other options of :class:`flowformer.models.language.LanguageModel`.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: for a name that such a checkpoint does not have, one that is missing, or a tensor of another shape.
    """
    state = rename(published, _FLOW_GPT_NAMES, "the published GPT-style module")
    sizes = _decoder_sizes(state, tied=False)
    return fill(LanguageModel(**{**sizes, "num_heads": num_heads, "activation": "gelu_tanh", **options}), state)


def wikitext_state_dict(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the state dict of a published WikiText-103 model to the names and shapes of this library.

    Args:
        published: Names and tensors as in fairseq's ``transformer_lm``: ``checkpoint["model"]`` of its files. The head
            is the embedding (as the published command has it), a matrix of its own, or an adaptive softmax, tied to
            adaptive embeddings or not.

    Returns:
        A state dict for :class:`flowformer.models.language.LanguageModel`, without a head that is the embedding; of an
        adaptive embedding or softmax, for that of :mod:`flowformer.models.vocabulary.adaptive`. What was tied there is
        a copy.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that such a checkpoint does not have.
    """
    if isinstance(published, Mapping):
        published = {name: tensor for name, tensor in published.items() if not _FAIRSEQ_BUFFERS.fullmatch(str(name))}
    state: dict[str, Tensor] = {}
    for name, tensor in rename(published, _FAIRSEQ_NAMES, "the published WikiText-103 model").items():
        if ".attention.qkv." in name:
            split_qkv(state, name, tensor)
        else:
            state[name] = tensor
    head, embedding = state.get("head.weight"), state.get("embed.weight")
    if head is not None and embedding is not None and torch.equal(head, embedding):
        del state["head.weight"]  # it is saved under both names
    _split_adaptive(state)
    return state


def load_wikitext(published: Mapping[str, Tensor], *, num_heads: int = 8, **options: Any) -> LanguageModel:
    """Build a language model from a published WikiText-103 state dict; sizes are read from its tensors.

    Token ids are those of fairseq's dictionary: 0 to 3 are ``<s>``, ``<pad>``, ``</s>`` and ``<unk>``, and the words of
    its ``dict.txt`` follow in order. A final norm is there if the weights have one.

    Args:
        published: As in :func:`wikitext_state_dict`.
        num_heads: Heads, which the tensors do not tell.
        **options: Other options of :class:`flowformer.models.language.LanguageModel`; ``attention="softmax"`` for a
            model that was trained with fairseq's own attention.

    Returns:
        The model, in evaluation mode, with the dtype of the weights. With an adaptive softmax its logits are
        log-probabilities.

    Raises:
        TypeError: for anything but tensors of floating point numbers.
        ValueError: for a name that such a checkpoint does not have, one that is missing, or a tensor of another shape.
    """
    state = wikitext_state_dict(published)
    first = "decoder.blocks.0.linear1.weight"
    require(state, {first: 2} if "embed.tables.0.weight" in state else {"embed.weight": 2, first: 2})
    adaptive = {part: _bands(state, part) for part in ("embed", "head")}
    ffn_dim, dim = state[first].shape
    own = {"dim": dim, "num_layers": _count_layers(state), "ffn_dim": ffn_dim, "tied": "head.weight" not in state}
    vocab_size = 1 if adaptive["embed"] else len(state["embed.weight"])  # an embedding that will be replaced
    model = flowformer_wikitext(vocab_size, **{**own, "num_heads": num_heads, **options})
    if adaptive["embed"]:
        model.embed = AdaptiveEmbedding(*adaptive["embed"], dim)  # pyright: ignore[reportAttributeAccessIssue] - called alike
        model.vocab_size = model.embed.num_embeddings
    if adaptive["head"]:
        model.head = AdaptiveSoftmax(*adaptive["head"], dim)  # pyright: ignore[reportAttributeAccessIssue] - likewise
    if not any(name.startswith("decoder.norm.") for name in state):
        model.decoder.norm = nn.Identity()
    return fill(model.to(state[first].dtype), state)


def _split_adaptive(state: dict[str, Tensor]) -> None:
    """Put the parts of an adaptive softmax under the names of ours."""
    tails = sorted(name for name in state if name.startswith("head.tails."))
    if "head.first" in state:  # the words of the first band, then a row for each other band
        first = state.pop("head.first")
        state["head.tables.0.weight"] = first[: len(first) - len(tails) // 2]
        state["head.classes.weight"] = first[len(first) - len(tails) // 2 :]
    for name in tails:
        _, _, band, part = name.split(".")
        number, tensor = int(band) + 1, state.pop(name)
        if part == "0":
            # Tied, it is the projection of the embedding, used in the other direction.
            given = state.get(f"embed.projections.{number}.weight")
            tied = given is not None and given.shape == tensor.shape and torch.equal(given, tensor)
            state[f"head.projections.{number}.weight"] = tensor.T if tied else tensor
        else:
            state[f"head.tables.{number}.weight"] = tensor


def _bands(state: Mapping[str, Tensor], part: str) -> tuple[list[int], list[int]] | None:
    """Words and channels of each band of an adaptive embedding or softmax; None where there is none."""
    count = sum(bool(re.fullmatch(rf"{part}\.tables\.\d+\.weight", name)) for name in state)
    if not count:
        return None
    names = [f"{part}.tables.{band}.weight" for band in range(count)]
    require(state, dict.fromkeys(names, 2))
    return [state[name].shape[0] for name in names], [state[name].shape[1] for name in names]


def gpt2_state_dict(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of a GPT-2 of transformers to the names and shapes of this library.

    Its linear layers are stored transposed, and its queries, keys and values as one.

    Args:
        weights: Names and tensors as in ``transformers.GPT2LMHeadModel`` or ``GPT2Model``.

    Returns:
        A state dict for :class:`flowformer.models.language.LanguageModel`.

    Raises:
        ValueError: for a name that GPT-2 does not have.
    """
    ours: dict[str, Tensor] = {}
    parameters = {
        name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}": tensor
        for name, tensor in weights.items()
        if not _GPT2_BUFFERS.fullmatch(name)
    }
    for new, tensor in rename(parameters, _GPT2_NAMES, "GPT-2").items():
        if tensor.ndim == 2 and new.endswith("weight") and re.search(r"qkv|out_proj|linear[12]", new):
            tensor = tensor.T
        if ".qkv." in new:
            split_qkv(ours, new, tensor)
        else:
            ours[new] = tensor
    return ours


def load_gpt2(source: Any, *, attention: str = "flow", **options: Any) -> LanguageModel:
    """Build a language model with any attention from a GPT-2 of transformers of any size.

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
        DataError: for a damaged file, or one that contains more than tensors; no code in it is run.
        ValueError: for settings of GPT-2 that our model does not have, and for weights that are missing, unexpected, or
            of another shape.
    """
    config, weights = read_folder(Path(source)) if isinstance(source, (str, Path)) else _read_model(source)
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
    return fill(model.to(state["embed.weight"].dtype), {**fresh, **state})


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
    if not isinstance(config.get("n_head"), int):
        raise ValueError(f"n_head must be an integer, got {config.get('n_head')!r}")
    for name, wanted in _GPT2_FIXED.items():
        if config.get(name, wanted) != wanted:
            raise ValueError(f"{name} = {config[name]} is not supported, only {wanted}")
    activation = config.get("activation_function", "gelu_new")
    if activation not in _GPT2_ACTIVATIONS:
        raise ValueError(f"activation_function must be one of {', '.join(_GPT2_ACTIVATIONS)}, got {activation!r}")


def _read_model(model: Any) -> tuple[Mapping[str, Any], Mapping[str, Tensor]]:
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"source must be a folder or a GPT2LMHeadModel, got {type(model).__name__}")
    return model.config.to_dict(), model.state_dict()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue] - a transformers model has it


def _decoder_sizes(state: Mapping[str, Tensor], *, tied: bool) -> dict[str, Any]:
    """Options of a language model that the shapes of its weights tell."""
    require(state, {"embed.weight": 2, "position.weight": 2, "decoder.blocks.0.linear1.weight": 2})
    vocab_size, dim = state["embed.weight"].shape
    return {
        "vocab_size": vocab_size,
        "dim": dim,
        "max_length": state["position.weight"].shape[0],
        "num_layers": _count_layers(state),
        "ffn_dim": state["decoder.blocks.0.linear1.weight"].shape[0],
        "tied": tied,
    }


def _count_layers(state: Mapping[str, Tensor]) -> int:
    return sum(name.endswith("linear1.weight") for name in state)
