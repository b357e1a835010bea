"""Routing Transformer: routing-transformer, without the learned keys and values of clusters."""

from __future__ import annotations

import torch
from torch import Tensor

from flowformer import ops
from flowformer.mechanisms.routing.clusters import distortion

from .files import Golden, Pairs, compared, reads


@reads("routing", "routing_causal")
def routing_transformer(golden: Golden) -> Pairs:
    options, centroids = golden.options, golden.tensors["random.means"]
    causal, shared = options["causal"], options["shared_qk"]
    # Its causal form sees the future.
    given = {"window": options["window_size"], "shared_qk": shared, "causal": causal, "sees_future": causal}

    def attend(q: Tensor, *kv: Tensor) -> Tensor:
        k, v = (q, *kv) if shared else kv
        return ops.routing_attention(q, k, v, centroids, **given)

    names = ("q", "v") if shared else ("q", "k", "v")
    tokens = torch.cat([golden.tensors[name] for name in names[:-1]], 1).transpose(1, 2)
    loss = options["commitment"] * distortion(tokens, centroids, None)
    return {**compared(golden, attend, *names), "aux_loss": (loss, golden.tensors["aux_loss"])}
