"""Sums over keys of products of features: what linear attention and its relatives divide.

Where exp(q . k) is replaced by phi(q) . phi(k), attention is a ratio of two sums over keys,

    total_i = sum_j gamma(i, j) phi(q_i) . phi(k_j)        product_i = sum_j gamma(i, j) (phi(q_i) . phi(k_j)) v_j

and each of them is phi(q_i) times a sum that queries share. gamma is a decay, or 1. The past of a causal form is
the pair sum_j phi(k_j), (batch, heads, F), and sum_j phi(k_j) v_j^T, (batch, heads, F, V), in the dtype of states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowformer.core.chunks import split_chunks
from flowformer.core.decay import Decay, block_decay
from flowformer.core.scan import carry, causal_product
from flowformer.core.sums import sum_over_tokens, times_sum

Past = tuple[Tensor, Tensor]
# Both sums as a backend computes them, ``products(Q, K, V, past=None, log_decay=None)``: over all keys, or with a past
# over those up to each query. Totals (batch, L, heads, 1), products (batch, L, heads, V), and the past after all.
Products = Callable[..., tuple[Tensor, Tensor, "Past | None"]]


def whole_products(Q: Tensor, K: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """Return both sums over all keys.

    Args:
        Q: Features of queries (batch, L, heads, F).
        K: Features of keys (batch, S, heads, F), zeros at padding.
        V: Values (batch, S, heads, V), zeros at padding.

    Returns:
        Totals (batch, L, heads, 1) and products (batch, L, heads, V).
    """
    Q, K, V = (x.transpose(1, 2) for x in (Q, K, V))
    total = times_sum(Q, K.sum(-2).unsqueeze(-1))
    product = times_sum(Q, sum_over_tokens(K, V))
    return total.transpose(1, 2), product.transpose(1, 2)


def block_products(
    Q: Tensor, K: Tensor, V: Tensor, past: Past, chunk: int, decay: Decay | None = None, *, reverse: bool = False
) -> tuple[Tensor, Tensor, Past]:
    """Return both sums over the keys up to each query, of a block of tokens; and the past after it.

    Args:
        Q: Features of queries (batch, tokens, heads, F); ``chunk`` divides the tokens.
        K: Features of keys, likewise, zeros at padding.
        V: Values (batch, tokens, heads, V), zeros at padding.
        past: Of the tokens before the block.
        chunk: Tokens of a chunk.
        decay: Of the block; absent for none.
        reverse: Leave out the key of the query's own token.

    Returns:
        Totals (batch, tokens, heads, 1), products (batch, tokens, heads, V), and the past after the block.
    """
    Q, K, V = (split_chunks(x, chunk) for x in (Q, K, V))
    scores = Q @ K.transpose(-1, -2)
    if decay is None:
        scores = scores.tril()
        key_before, key_sum = carry(K.sum(-2), past[0])
        earlier = Q @ key_before.unsqueeze(-1)
    else:
        scores = scores * decay.within
        scores = scores.tril(-1) if reverse else scores
        key_before, key_sum = carry((K * decay.leaving.unsqueeze(-1)).sum(-2), past[0], decay)
        earlier = (Q @ key_before.unsqueeze(-1)) * decay.arriving.unsqueeze(-1)
    product, memory = causal_product(scores, Q, K, V, past[1], decay)
    total = scores.sum(-1, keepdim=True) + earlier
    return _join(total), _join(product), (key_sum, memory)


def _join(x: Tensor) -> Tensor:
    """(batch, heads, chunks, chunk, channels) to (batch, tokens, heads, channels)."""
    return x.permute(0, 2, 3, 1, 4).flatten(1, 2)


def products_in_chunks(
    Q: Tensor, K: Tensor, V: Tensor, past: Past | None = None, log_decay: Tensor | None = None, *, chunk: int
) -> tuple[Tensor, Tensor, Past | None]:
    """Return both sums in plain PyTorch: :data:`Products`, of a block of tokens where there is a past.

    Args:
        Q: As above.
        K: Likewise.
        V: Likewise.
        past: Of the tokens before; absent for sums over all keys.
        log_decay: (batch, tokens, heads), zeros at padding; absent for none.
        chunk: Tokens of a chunk, where there is a past.
    """
    if past is None:
        return *whole_products(Q, K, V), None
    decay = None
    if log_decay is not None:
        shape = (Q.shape[1] // chunk, chunk)
        decay = block_decay(log_decay, None, Q.shape[1], shape, Q.dtype, past[1].dtype)
    return block_products(Q, K, V, past, chunk, decay)


def token_products(
    Q: Tensor, K: Tensor, V: Tensor, past: Past, factor: Tensor | None = None
) -> tuple[Tensor, Tensor, Past]:
    """Return both sums over the keys up to one query; and the past after it.

    Args:
        Q: Features of the query (batch, heads, F), in the dtype of states like all others.
        K: Features of the key, likewise.
        V: Value (batch, heads, V).
        past: Of the tokens before; not changed.
        factor: By which the past shrinks before, (batch, heads, 1); absent for 1.

    Returns:
        Total (batch, heads, 1), product (batch, heads, V), and the past after the token.
    """
    key_sum, memory = past if factor is None else (past[0] * factor, past[1] * factor.unsqueeze(-1))
    key_sum = key_sum + K
    memory = memory + K.unsqueeze(-1) * V.unsqueeze(-2)
    total = (Q * key_sum).sum(-1, keepdim=True)
    return total, (Q.unsqueeze(-2) @ memory).squeeze(-2), (key_sum, memory)


def fresh_past(
    batch: int, heads: int, features: int, value_channels: int, *, dtype: torch.dtype, device: torch.device
) -> Past:
    """Return the past before the first token, zeros."""
    zeros = torch.zeros(batch, heads, features, value_channels, dtype=dtype, device=device)
    return zeros[..., 0].clone(), zeros
