"""A mechanism in one file, as small as one can be: what adding a mechanism costs.

out_i = sigmoid(sum q_i) sum_j s_j v_j / sum_j s_j with s_j = sigmoid(sum k_j): a gated mean, in linear time.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype
from flowformer.core.run import Given, run
from flowformer.mechanisms import Attention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of


def toy_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = False, mask: Tensor | None = None,
    context_mask: Tensor | None = None, cu_seqlens: Tensor | None = None, initial_state: None = None,
    return_state: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The gated mean of values (batch, S, heads, V) for each query (batch, L, heads, K)."""

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: None) -> Any:
        with no_autocast(q.device):
            q, k = (x.to(state_dtype(x.device)) for x in (fill(q, query), fill(k, key)))
            gate, s = q.sum(-1, keepdim=True).sigmoid(), fill(k.sum(-1, keepdim=True).sigmoid(), key)
            above, below = (x.cumsum(1) if causal else x.sum(1, keepdim=True) for x in (s * fill(v, key), s))
            return fill((gate * above / below.clamp(min=1e-300)).to(v.dtype), query), None

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run("toy_attention", given, dense)


def toy_weights(q: Tensor, k: Tensor, *, causal: bool = False) -> Rows:
    """Rows of one sequence: every query has the same, through its own gate."""

    def rows(places: Tensor) -> Tensor:
        s = k.sum(-1).sigmoid().T.unsqueeze(1).expand(-1, len(places), -1)
        s = lower(s, places) if causal else s
        return q[places].sum(-1).sigmoid().T.unsqueeze(2) * s / s.sum(-1, keepdim=True)

    return rows


@register(
    "toy", operation=toy_attention, truth=truth_of(toy_weights), rows=rows_of("toy_attention", toy_weights),
    source="this test", cost="L (K + V)",
)  # fmt: skip
class ToyAttention(Attention):
    """A gated mean of all values."""
