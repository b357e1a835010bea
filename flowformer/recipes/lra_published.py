"""Published configurations of Long Range Arena: sizes, options of the mechanisms, and faults of the released code.

Source: Flowformer_LRA of thuml/Flowformer; for the baselines google-research/long-range-arena (cd31e5c).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Sizes with which the mechanisms ran, by the released code; not given for the others, which have their own defaults.
OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "local": {"window": 50},
    "sparse": {"pattern": "fixed", "stride": 50, "columns": 10},
    "longformer": {"window": 512},
    "bigbird": {"block": 64, "num_random": 3},
    "reformer": {"num_hashes": 1, "num_buckets": 10, "chunk_length": 10},
    "linformer": {"rank": 16, "share_values": True},
    "performer": {"kernel": "relu", "projected": False, "scale": 1.0},
    "sinkhorn": {"bucket_length": 50},
    "synthesizer": {"kind": "random", "dot_product": True},
    "nystromformer": {"num_landmarks": 128, "value_conv": 35},  # mlpen/Nystromformer
}
# What the released code computes in place of the mechanism of that name.
RELEASED: Mapping[str, Mapping[str, Any]] = {
    "local": {"released": "lra"},
    "sparse": {"released": "lra-cls"},
    "longformer": {"released": "lra"},
    "bigbird": {"released": "lra"},
    "reformer": {"form": "lra"},
}
# Its sum of all blocks needs a length that they divide: without a class token, then.
RELEASED_PATHFINDER: Mapping[str, Mapping[str, Any]] = {**RELEASED, "sinkhorn": {"sort": "lra_softmax"}}
# Image and Pathfinder have blocks of 64 of their 1,024 tokens.
PICTURES: Mapping[str, Mapping[str, Any]] = {"local": {"window": 64}, "sinkhorn": {"bucket_length": 64}}
# Rows of the published table that are not the mechanism of that name with the options above.
ABLATIONS: Mapping[str, Mapping[str, Any]] = {
    "flow-no-competition": {"competition": None},
    "flow-no-allocation": {"allocation": False},
}
MODEL_FIELDS = ("num_layers", "num_heads", "dim", "head_dim", "ffn_dim", "dropout", "positions", "pool")


def sizes(layers: int, heads: int, dim: int, inner: int, ffn_dim: int, **more: Any) -> dict[str, Any]:
    """Sizes as the released configurations write them; ``inner`` is the width of queries, keys and values."""
    return {
        "num_layers": layers, "num_heads": heads, "dim": dim, "head_dim": inner // heads, "ffn_dim": ffn_dim, **more,
    }  # fmt: skip


# Where baselines have configurations of their own: long-range-arena, lra_benchmarks/image/configs.
_TYPICAL = sizes(1, 8, 128, 64, 128)
IMAGE: Mapping[str, Mapping[str, Any]] = {
    **dict.fromkeys(("softmax", "linear", "linformer", "performer", "sparse", "synthesizer"), _TYPICAL),
    "local": sizes(1, 2, 128, 64, 128, pool="mean"),
    "longformer": sizes(4, 4, 128, 64, 128, pool="mean"),
    "reformer": sizes(4, 8, 64, 32, 64),
    "sinkhorn": sizes(1, 1, 32, 32, 64, weight_decay=0.7, dropout=0.1),
    "bigbird": sizes(1, 1, 128, 64, 128),  # num_head = 4 there, which nothing reads
}
_PATHFINDER: Mapping[str, Mapping[str, Any]] = {
    "softmax": sizes(4, 4, 32, 16, 32),
    "linear": sizes(1, 2, 128, 64, 128),
    # The released one, 4 layers of 32 channels, is not what ran: issue 37 of that repository.
    "performer": sizes(1, 8, 128, 64, 128),
    "linformer": sizes(1, 2, 32, 16, 32),
    "reformer": sizes(2, 8, 64, 32, 64),
    "sinkhorn": sizes(2, 4, 32, 16, 64),
    "sparse": sizes(1, 8, 32, 16, 32),
    "synthesizer": sizes(2, 4, 64, 32, 64),
    "local": sizes(2, 4, 64, 32, 64, dropout=0.1),
    "longformer": sizes(2, 2, 32, 16, 32, dropout=0.1),
    "bigbird": sizes(4, 2, 64, 32, 64),
}
PATHFINDER: Mapping[str, Mapping[str, Any]] = {
    name: {"dropout": 0.2, **own, "learning_rate": 1e-3} for name, own in _PATHFINDER.items()
}


def merge_published(
    name: str, published: Mapping[str, Any], own: Mapping[str, Mapping[str, Any]], fields: Mapping[str, Any],
    options: Mapping[str, Mapping[str, Any]] = OPTIONS, faults: Mapping[str, Mapping[str, Any]] = RELEASED,
) -> dict[str, Any]:  # fmt: skip
    """Merge the fields of a recipe: published ones, those of the mechanism's own configuration, and those given."""
    attention = fields.get("attention", "flow")
    chosen = dict(options.get(attention, {})) if isinstance(attention, str) else {}
    if isinstance(attention, str) and fields.get("released") is True:
        chosen |= faults.get(attention, {})
    mine = own.get(attention, {}) if isinstance(attention, str) else {}
    return {"name": name, **_SHARED, **published, **mine, "attention_options": chosen, **fields}


# flax.optim.Adam with weight decay of all parameters; no gradients are clipped.
_SHARED: Mapping[str, Any] = {
    "optimizer": "adamw", "beta1": 0.9, "beta2": 0.98, "optimizer_eps": 1e-9, "clip_grad_norm": None,
}  # fmt: skip
TEXTS: Mapping[str, Any] = {"schedule": "inverse-sqrt", "weight_decay": 0.1, "batch_size": 32, "pool": "class"}


def inverse_root(base: float, warmup: int) -> dict[str, Any]:
    """Learning rates base / sqrt(step) after warm-up, as ``constant * linear_warmup * rsqrt_decay`` there."""
    return {"learning_rate": base / warmup**0.5, "warmup_steps": warmup}
