"""Weights published for the original code, loaded into our models."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from flowformer.models.timeseries import SeriesClassifier

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
        new = _rename(name)
        if new == "position":
            tensor = tensor.squeeze(1)  # (length, 1, dim)
        elif re.search(r"linear[12]\.weight", new):
            tensor = tensor.squeeze(-1)  # a convolution of width 1
        ours[new] = tensor
    return ours


def _rename(name: str) -> str:
    for pattern, replacement in _TIMESERIES_NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise ValueError(f"{name!r} is no parameter of the published time-series classifier")


def load_timeseries(published: Mapping[str, Tensor], *, num_heads: int = 8, **options: Any) -> SeriesClassifier:
    """Build our classifier from a published state dict, sizes read from its tensors.

    Args:
        published: As in :func:`timeseries_state_dict`.
        num_heads: Heads, which the tensors do not tell.
        **options: Other options of :class:`flowformer.models.timeseries.SeriesClassifier`;
            ``mask_padding=False`` gives the published numbers where there is padding.

    Returns:
        The model, in evaluation mode.
    """
    state = timeseries_state_dict(published)
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
    model.load_state_dict(state)
    return model.eval()
