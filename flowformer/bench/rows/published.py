"""Flow-Attention by the published formulas, operation by operation, with cumulative sums where it is causal.

What a user of the original code runs (thuml/Flowformer, Flow_Attention.py: the order of operations and what exists in
memory are those of that file; the code is not). The causal form holds sum K^T C v after every token, a tensor
(batch, heads, length, K, V).
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6  # added to every element of both factors of a flow
CLAMP = 1.0  # bound of the conserved outgoing flow


def flow_attention(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """Flow-Attention of q, k (batch, length, heads, K) and v (batch, length, heads, V): (batch, length, heads, V)."""
    Q, K, V = q.transpose(1, 2).sigmoid(), k.transpose(1, 2).sigmoid(), v.transpose(1, 2)
    return (_causal if causal else _bidirectional)(Q, K, V).transpose(1, 2)


def _flow(tokens: Tensor, total: Tensor) -> Tensor:
    """Flow of each token against a sum over the others, (batch, heads, length)."""
    return torch.einsum("bhlk,bhk->bhl", tokens + EPS, total + EPS)


def _bidirectional(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    L, S = Q.shape[2], K.shape[2]
    sink = 1 / _flow(Q, K.sum(2))
    source = 1 / _flow(K, Q.sum(2))
    conserved_sink = _flow(Q, (K * source[..., None]).sum(2))
    conserved_source = _flow(K, (Q * sink[..., None]).sum(2)).clamp(-CLAMP, CLAMP)
    allocation = (conserved_sink * (L / S)).sigmoid()
    competition = conserved_source.softmax(-1) * S
    context = torch.einsum("bhsk,bhsv->bhkv", K, V * competition[..., None])
    return torch.einsum("bhlk,bhkv->bhlv", Q * sink[..., None], context) * allocation[..., None]


def _running_flow(tokens: Tensor, others: Tensor) -> Tensor:
    """Flow of each token against the sum of the others up to its own time, (batch, heads, length)."""
    return torch.einsum("bhlk,bhlk->bhl", tokens + EPS, others.cumsum(2) + EPS)


def _causal(Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    n = torch.arange(1, Q.shape[2] + 1, dtype=Q.dtype, device=Q.device)
    sink = 1 / _running_flow(Q, K)
    source = 1 / _running_flow(K, Q)
    conserved_sink = _running_flow(Q, K * (source * n)[..., None]) / n
    conserved_source = (_running_flow(K, Q * (sink * n)[..., None]) / n).clamp(-CLAMP, CLAMP)
    allocation = conserved_sink.sigmoid()
    strength = conserved_source.exp()
    competition = strength / strength.cumsum(-1) * n
    context = torch.einsum("bhlk,bhlv->bhlkv", K, V * competition[..., None]).cumsum(2)
    return torch.einsum("bhlk,bhlkv->bhlv", Q * sink[..., None], context) * allocation[..., None]
