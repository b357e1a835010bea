r"""Linear attention: the Linear Transformer (Katharopoulos et al., 2020, "Transformers are RNNs").

exp(q . k) is replaced by phi(q) . phi(k) with phi(x) = elu(x) + 1, so that a sum over keys becomes a K x V matrix:

    out_i = phi(q_i) . sum_j phi(k_j) v_j^T / (phi(q_i) . sum_j phi(k_j) + eps)

Causal attention restricts j to j <= i; :mod:`flowformer.core.scan` has how it is computed in chunks. With a decay, each
term of both sums is multiplied by gamma(i, j), which shrinks with distance: :mod:`flowformer.core.decay`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.backends import TORCH, choose, implementation
from flowformer.core.both_ways import Block, both_ways
from flowformer.core.checks import HEADS, check_fresh_state, check_number, check_state, check_step
from flowformer.core.chunks import CHUNK, pad_to_chunks
from flowformer.core.decay import block_decay, clip_log_decay
from flowformer.core.feature_products import block_products, fresh_past, token_products, whole_products
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Dense, Given, run, scanned
from flowformer.core.tracing import cut
from flowformer.mechanisms.decay import (
    DECAYING,
    DecayedAttention,
    check_given,
    default_decay,
    log_gammas,
    of_sequence,
    resolve_decay,
)
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of


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
    wide = state_dtype(device)
    return LinearState(*fresh_past(batch, heads, key_channels, value_channels, dtype=wide, device=device))


def elu_plus_one(x: Tensor) -> Tensor:
    """phi(x) = elu(x) + 1, written as exp(min(x, 0)) + max(x, 0) so that small values keep their digits."""
    return x.clamp(max=0).exp() + x.relu()


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    eps: float = 1e-6,
    decay: str | None = None,
) -> Tensor | tuple[Tensor, LinearState]:
    """Linear attention (Katharopoulos et al., 2020) with feature map elu + 1.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        log_decay: Logarithm of gamma, the factor by which weights shrink at each token of distance: (heads,), or
            (batch, L, heads) where it depends on the token. Values above 0 count as 0, and padding does not decay.
            Absent for no decay. Not in cross-attention.
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"``, ``"torch"``, ``"native"`` on a CPU, or ``"triton"`` on a GPU.
        eps: Added to the denominator.
        decay: Where ``log_decay`` is absent: ``"fixed"`` for :func:`flowformer.core.decay.default_log_decay`.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "linear_attention"
    check_number(f"{op}: eps", eps, 0)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    if log_decay is not None or decay is not None:
        log_decay = resolve_decay(op, log_decay, decay, given)
    of_tokens = (log_decay,) if log_decay is not None and log_decay.ndim == 3 else ()
    return run(
        op, given, _dense(causal, log_decay, bool(of_tokens), eps), layout=HEADS if log_decay is None else DECAYING,
        init_state=lambda batch: init_linear_state(batch, k.shape[2], k.shape[3], v.shape[3], device=q.device),
        of_tokens=of_tokens, options=(log_decay, eps),
    )  # fmt: skip


def _dense(causal: bool, log_decay: Tensor | None, by_token: bool, eps: float) -> Dense:
    """Both forms in plain PyTorch."""

    def block(tokens: Sequence[Any], state: LinearState, constant: Tensor | None) -> tuple[Tensor, LinearState]:
        *tokens, of_tokens = tokens if by_token else (*tokens, constant)
        return _causal_block(tokens, state, of_tokens, eps, CHUNK)

    def whole(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, *of_tokens: Tensor) -> Tensor:
        given = of_tokens[0] if by_token else log_decay
        if given is None:
            return _bidirectional(q, k, v, key, query, eps)
        return _bidirectional_decayed(q, k, v, key, given, eps)

    return scanned(block, whole, causal, (None if by_token else log_decay,))


def _features(x: Tensor, mask: Tensor | None) -> Tensor:
    return fill(elu_plus_one(fill(x, mask).to(sum_dtype(x.dtype))), mask)


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, query_mask: Tensor | None, eps: float
) -> Tensor:
    with no_autocast(q.device):
        Q, K = _features(q, query_mask), _features(k, key_mask)
        total, product = whole_products(Q, K, fill(v, key_mask).to(Q.dtype))
        return (product / (total + eps)).to(q.dtype).contiguous()


def _bidirectional_decayed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, log_decay: Tensor, eps: float
) -> Tensor:
    """The bidirectional form with decay, by two scans."""
    with no_autocast(q.device):
        batch, _, heads, channels = q.shape
        dtype = q.dtype
        q, k, v, log_decay = (x.to(sum_dtype(dtype)) for x in (q, k, v, log_decay))  # both gradients are added in it
        state = init_linear_state(batch, heads, channels, v.shape[-1], device=q.device)
        both = torch.add(*both_ways(log_decay, mask)(_sums, (q, k, v), state))
        total, product = both.split([1, v.shape[-1]], -1)
        return fill(product / (total + eps), mask).to(dtype)


def _sums(block: Block, tensors: Sequence[Tensor], state: LinearState) -> tuple[Tensor, LinearState]:
    """The denominator and the sum over values of each token of a block, (batch, length, heads, 1 + V)."""
    length = tensors[0].shape[1]
    (q, k, v), mask, decay = block.prepare(tensors, CHUNK, state.memory.dtype)
    Q, K = _features(q, mask), _features(k, mask)
    total, product, past = block_products(Q, K, fill(v, mask).to(Q.dtype), state, CHUNK, decay, reverse=block.reverse)
    return cut(torch.cat([total, product], -1), length), LinearState(*past)


def _causal_block(
    tokens: Sequence[Any], state: LinearState, log_decay: Tensor | None, eps: float, chunk: int
) -> tuple[Tensor, LinearState]:
    q, k, v, mask = tokens
    length = q.shape[1]
    with no_autocast(q.device):
        (q, k, v), mask = pad_to_chunks((q, k, v), mask, chunk)
        Q, K = _features(q, mask), _features(k, mask)
        decay = None
        if log_decay is not None:
            shape = (q.shape[1] // chunk, chunk)
            decay = block_decay(log_decay, mask, length, shape, Q.dtype, state.memory.dtype)
        total, product, past = block_products(Q, K, fill(v, mask).to(Q.dtype), state, chunk, decay)
        return cut(product / (total + eps), length).to(v.dtype), LinearState(*past)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LinearState,
    log_decay: Tensor | None = None,
    *,
    backend: str = "auto",
    eps: float = 1e-6,
    decay: str | None = None,
) -> tuple[Tensor, LinearState]:
    """Compute one token of causal linear attention.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        log_decay: (heads,), or (batch, heads) where it depends on the token; absent for no decay.
        backend: As in :func:`linear_attention`.
        eps: Added to the denominator.
        decay: As in :func:`linear_attention`.

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
    if log_decay is not None or decay is not None:
        log_decay = check_given(op, log_decay, decay, q, step=True)
    chosen = choose(op, backend, q)
    compute = step_in_torch if chosen == TORCH.name else implementation(op, chosen)
    return compute(q, k, v, state, log_decay, eps)


def step_in_torch(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, log_decay: Tensor | None, eps: float
) -> tuple[Tensor, LinearState]:
    """:func:`linear_attention_step` in plain PyTorch, on checked arguments."""
    with no_autocast(q.device):
        compute = state.memory.dtype
        factor = None
        if log_decay is not None:
            factor = clip_log_decay(log_decay.to(compute)).exp().expand(q.shape[:2]).unsqueeze(-1)
        Q, K = (elu_plus_one(x.to(compute)) for x in (q, k))
        total, product, past = token_products(Q, K, v.to(compute), state, factor)
        return (product / (total + eps)).to(v.dtype), LinearState(*past)


def linear_weights(
    q: Tensor,
    k: Tensor,
    log_decay: Tensor | None = None,
    *,
    causal: bool = False,
    eps: float = 1e-6,
    decay: str | None = None,
) -> Rows:
    """Return rows phi(q_i) . phi(k_j) gamma(i, j) / (phi(q_i) . sum_j phi(k_j) gamma(i, j) + eps) of one sequence."""
    Q, K = (torch.where(x > 0, x + 1, x.clamp(max=0).exp()) for x in (q, k))
    log_decay = default_decay(log_decay, decay, q)

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", Q[places], K)
        if log_decay is not None:
            scores = scores * log_gammas(log_decay, len(K), places).exp()
        scores = lower(scores, places) if causal else scores
        return scores / (scores.sum(-1, keepdim=True) + eps)

    return rows


@register(
    "linear",
    operation=linear_attention,
    truth=truth_of(linear_weights, of_sequence=of_sequence),
    rows=rows_of("linear_attention", linear_weights, of_sequence=of_sequence),
    step=linear_attention_step,
    init_state=by_sizes(init_linear_state),
    source="Katharopoulos et al., Transformers are RNNs, ICML 2020",
    cost="L K V",
)
class LinearAttention(DecayedAttention):
    """Linear attention of the Linear Transformer (Katharopoulos et al., 2020), in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        eps: Added to the denominator.
        **options: As :class:`flowformer.mechanisms.decay.DecayedAttention` takes them.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(self, dim: int, num_heads: int, *, eps: float = 1e-6, **options: Any) -> None:
        super().__init__(dim, num_heads, **options)
        check_number("eps", eps, 0, 1)
        self.eps = eps

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"eps": self.eps, **super().arguments()}
