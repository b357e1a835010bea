r"""Linear attention: the Linear Transformer (Katharopoulos et al., 2020, "Transformers are RNNs").

exp(q . k) is replaced by phi(q) . phi(k) with phi(x) = elu(x) + 1, so that a sum over keys becomes a K x V matrix:

    out_i = phi(q_i) . sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps)

Causal attention restricts j to j <= i; :mod:`flowformer.core.scan` has how it is computed in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_fresh_state, check_number, check_state, check_step
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, run, scanned
from flowformer.core.scan import CHUNK, carry, causal_product, join_chunks, pad_to_chunks, split_chunks
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = ["LinearAttention", "LinearState", "init_linear_state", "linear_attention", "linear_attention_step"]


class LinearState(NamedTuple):
    """State of causal linear attention.

    Attributes:
        key_sum: sum phi(k), (batch, heads, K).
        memory: sum phi(k) v^T, (batch, heads, K, V).
    """

    key_sum: Tensor
    memory: Tensor


def init_linear_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> LinearState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``."""
    check_fresh_state(
        "init_linear_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    device = torch.device("cpu") if device is None else torch.device(device)
    zeros = {"dtype": state_dtype(device), "device": device}
    return LinearState(
        torch.zeros(batch, heads, key_channels, **zeros),
        torch.zeros(batch, heads, key_channels, value_channels, **zeros),
    )


def elu_plus_one(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, written as exp(min(x, 0)) + max(x, 0) so that small values keep their digits."""
    return x.clamp(max=0).exp() + x.relu()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention (Katharopoulos et al., 2020) with feature map elu + 1.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        eps: Added to the denominator.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    check_number("linear_attention: eps", eps, 0)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    dense = scanned(
        lambda tokens, state: _causal_block(tokens, state, eps, CHUNK),
        lambda q, k, v, key, query: _bidirectional(q, k, v, key, query, eps),
        causal,
    )
    return run(
        "linear_attention", given, dense, options=(eps,),
        init_state=lambda batch: init_linear_state(batch, k.shape[2], k.shape[3], v.shape[3], device=q.device),
    )  # fmt: skip


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, eps: float
) -> Tensor:
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        Q = fill(elu_plus_one(fill(q, query_mask).to(compute)), query_mask).transpose(1, 2)
        K = fill(elu_plus_one(fill(k, key_mask).to(compute)), key_mask).transpose(1, 2)
        V = fill(v, key_mask).to(compute).transpose(1, 2)
        total = times_sum(Q, K.sum(-2).unsqueeze(-1)) + eps
        out = times_sum(Q, sum_over_tokens(K, V)) / total
        return out.transpose(1, 2).to(q.dtype).contiguous()


def _causal_block(tokens: Sequence[Any], state: LinearState, eps: float, chunk: int) -> tuple[Tensor, Any]:
    q, k, v, mask = tokens
    compute, length = sum_dtype(q.dtype), q.shape[1]
    with no_autocast(q.device):
        (q, k, v), mask = pad_to_chunks((q, k, v), mask, chunk)
        Q = split_chunks(fill(elu_plus_one(fill(q, mask).to(compute)), mask), chunk)
        K = split_chunks(fill(elu_plus_one(fill(k, mask).to(compute)), mask), chunk)
        V = split_chunks(fill(v, mask).to(compute), chunk)
        scores = (Q @ K.transpose(-1, -2)).tril()
        key_before, key_sum = carry(K.sum(-2), state.key_sum)
        total = scores.sum(-1, keepdim=True) + Q @ key_before.unsqueeze(-1) + eps
        product, memory = causal_product(scores, Q, K, V, state.memory)
        return join_chunks(product / total, length).to(v.dtype), LinearState(key_sum, memory)


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, *, eps: float = 1e-6
) -> tuple[Tensor, LinearState]:
    """Compute one token of causal linear attention.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        eps: Added to the denominator.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid input.
    """
    op = "linear_attention_step"
    check_step(op, q, k, v, state, LinearState)
    check_number(f"{op}: eps", eps, 0)
    batch, heads, channels = q.shape
    check_state(op, state, init_linear_state(batch, heads, channels, v.shape[-1], device=q.device))
    with no_autocast(q.device):
        compute = state.memory.dtype
        Q, K, V = elu_plus_one(q.to(compute)), elu_plus_one(k.to(compute)), v.to(compute)
        key_sum = state.key_sum + K
        memory = state.memory + K.unsqueeze(-1) * V.unsqueeze(-2)
        total = (Q * key_sum).sum(-1, keepdim=True) + eps
        out = (Q.unsqueeze(-2) @ memory).squeeze(-2) / total
        return out.to(v.dtype), LinearState(key_sum, memory)


def linear_weights(q: Tensor, k: Tensor, *, causal: bool = False, eps: float = 1e-6) -> Rows:
    """Return rows phi(q_i) . phi(k_j) / (phi(q_i) . sum_j phi(k_j) + eps) of one sequence, in float64."""
    Q, K = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", Q[places], K)
        scores = lower(scores, places) if causal else scores
        return scores / (scores.sum(-1, keepdim=True) + eps)

    return rows


@register(
    "linear",
    operation=linear_attention,
    truth=truth_of(linear_weights),
    rows=rows_of("linear_attention", linear_weights),
    step=linear_attention_step,
    init_state=by_sizes(init_linear_state),
    source="Katharopoulos et al., Transformers are RNNs, ICML 2020",
    cost="L K V",
)
class LinearAttention(Attention):
    """Linear attention of the Linear Transformer (Katharopoulos et al., 2020), in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        eps: Added to the denominator.
        **options: As :class:`flowformer.mechanisms.Attention` takes them: ``causal``, ``bias``, ``dropout``,
            ``head_dim``, ``conv``, ``output_norm``, ``output_gate``, ``device``, ``dtype``.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(self, dim: int, num_heads: int, *, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        check_number("eps", eps, 0, 1)
        self.eps = eps

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"eps": self.eps}
