"""Random feature attention: Noahs-ARK/RFA, and own computations of the gate."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import logsigmoid

from flowformer import ops

from .files import Golden, Pairs, compared, reads

BOUNDS = {"max(phi_q.z, 1)": "positive", "max(|phi_q.z|, 1)": "absolute", "phi_q.z, not clamped": "none"}


@reads("rfa_causal", "rfa_cross", "rfa_gate_causal", "rfa_gate_causal_paper")
def rfa(golden: Golden) -> Pairs:
    given = golden.options
    scale = given["feature_scale"]
    options: dict[str, Any] = {
        "causal": given["causal"],
        "bound": BOUNDS[given["denominator"]],
        "feature_scale": None if scale == "proj_dim^-1/2" else scale,
        "norm_eps": given["norm_eps"],
    }

    def attend(q: Tensor, k: Tensor, v: Tensor, sigma: Tensor, logits: Tensor | None = None) -> Tensor:
        projection = golden.tensors["random.projection"] * sigma / given["tau"]
        log_gate = None if logits is None else logsigmoid(logits)
        return ops.rfa_attention(q, k, v, log_gate, projection, **options)

    gates = ["gate_logits"] if given.get("gate") else []
    return compared(golden, attend, "q", "k", "v", "param.sigma", *gates)
