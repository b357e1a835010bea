r"""Random feature attention, RFA (Peng et al., 2021): softmax attention by sines and cosines of random projections.

With x^ = x / (|x| + 1e-3), a random matrix W (D, K) of each head, and a scale c,

    phi(x) = c [sin W x^, cos W x^]        phi(x) . phi(y) ~ c^2 D exp(-|x^ - y^|^2 / 2)

    out_i = sum_j phi(q_i) . phi(k_j) v_j / d(sum_j phi(q_i) . phi(k_j))

For x^ of length 1 the exponential is that of x^ . y^, up to a factor. Products of features may be negative, and so may
denominators: d bounds them from below. With a gate 0 < g_t < 1 the causal form forgets:

    S_t = g_t S_{t-1} + (1 - g_t) phi(k_t) v_t^T        z_t = g_t z_{t-1} + (1 - g_t) phi(k_t)

which is a decay, and a factor of each key. arccos features are relu(W x^) + 1e-5, those of an arc-cosine kernel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import (
    check_dense,
    check_fresh_state,
    check_number,
    check_state,
    check_step,
    check_table,
    describe,
)
from flowformer.core.chunks import CHUNK, pad_to_chunks
from flowformer.core.decay import clip_log_decay
from flowformer.core.feature_products import Products, fresh_past, products_in_chunks, token_products
from flowformer.core.masks import fill
from flowformer.core.precision import FLOAT_DTYPES, no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Checked, Dense, Given, Walk, check_inputs, run, run_dense, scanned
from flowformer.core.tracing import cut
from flowformer.mechanisms.decay import log_gammas
from flowformer.mechanisms.weights import Rows, lower

TINY = 1e-30  # of norms
OFFSET = 1e-5  # of arccos features, Noahs-ARK/RFA
LEAST, LEAST_GATED = 1.0, 1e-2  # of denominators: Noahs-ARK/RFA; and ours, for a gate's weights add up to less than 1

Kind = Literal["gaussian", "arccos"]
Bound = Literal["positive", "absolute", "none"]


class RFAOptions(NamedTuple):
    """Options of the operation, see there."""

    kind: Kind = "gaussian"
    feature_scale: float | None = 0.1
    norm_eps: float = 1e-3
    bound: Bound | None = None
    least: float | None = None

    def features(self, x: Tensor, projection: Tensor) -> Tensor:
        """Return phi of x (..., heads, K), (..., heads, F), in the dtype of sums."""
        x = x.to(sum_dtype(x.dtype))
        unit = x / (torch.linalg.vector_norm(x, dim=-1, keepdim=True) + self.norm_eps).clamp(min=TINY)
        projected = torch.einsum("...hk,hfk->...hf", unit, projection.to(x.dtype))
        scale = projected.shape[-1] ** -0.5 if self.feature_scale is None else self.feature_scale
        if self.kind == "arccos":
            return scale * projected.relu() + OFFSET
        return scale * torch.cat([projected.sin(), projected.cos()], -1)

    def bounded(self, total: Tensor, causal: bool, gated: bool) -> Tensor:
        """Return denominators for sums."""
        least = (LEAST_GATED if gated else LEAST) if self.least is None else self.least
        bound = ("positive" if causal else "absolute") if self.bound is None else self.bound
        if bound == "none":
            return total.masked_fill(total == 0, 1)
        return (total if bound == "positive" else total.abs()).clamp(min=least)


def rfa_options(op: str, **given: Any) -> RFAOptions:
    """Check options.

    Raises:
        TypeError, ValueError: for what does not fit.
    """
    options = RFAOptions(**given)
    if options.kind not in ("gaussian", "arccos"):
        raise ValueError(f"{op}: kind must be one of gaussian, arccos, got {options.kind!r}")
    if options.bound not in ("positive", "absolute", "none", None):
        raise ValueError(f"{op}: bound must be one of positive, absolute, none or None, got {options.bound!r}")
    check_number(f"{op}: norm_eps", options.norm_eps, 0)
    for name in ("feature_scale", "least"):
        value = getattr(options, name)
        if value is not None:
            check_number(f"{op}: {name}", value)
            if value <= 0:
                raise ValueError(f"{op}: {name} must be above 0 or None, got {value!r}")
    return options


def _check_projection(op: str, projection: Any, q: Tensor) -> None:
    """Raise unless a projection fits queries (..., heads, K)."""
    sizes = (q.shape[-2], None, q.shape[-1])
    check_table(f"{op}: projection", projection, "heads, features, channels", sizes, q.device)


def _check_gate(op: str, log_gate: Any, q: Tensor) -> None:
    """Raise unless gates fit queries (..., heads, K), or are absent."""
    if log_gate is None:
        return
    check_dense(f"{op}: log_gate", log_gate)
    if not isinstance(log_gate, Tensor) or log_gate.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{op}: log_gate must be a floating-point tensor or None, got {describe(log_gate)}")
    if log_gate.shape != q.shape[:-1] or log_gate.device != q.device:
        raise ValueError(f"{op}: log_gate must be {tuple(q.shape[:-1])} on {q.device} like q, got {describe(log_gate)}")


# --------------------------------------------------------------------------------------------------------------- state


class RFAState(NamedTuple):
    """State of causal random feature attention.

    Attributes:
        key_sum: z, (batch, heads, F), where F is twice the rows of W with sines and cosines.
        memory: S, (batch, heads, F, V).
    """

    key_sum: Tensor
    memory: Tensor


def init_rfa_state(
    batch: int,
    heads: int,
    features: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> RFAState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``."""
    sizes = {"heads": heads, "features": features, "value_channels": value_channels}
    check_fresh_state("init_rfa_state", batch, dtype, **sizes)
    device = torch.device("cpu") if device is None else torch.device(device)
    return RFAState(*fresh_past(batch, heads, features, value_channels, dtype=state_dtype(device), device=device))


def state_of(*sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> RFAState:
    """Return :func:`init_rfa_state` for the registry."""
    batch, heads, _, value_channels, _, projection = sizes_and_learned
    width = _width(projection, options.get("kind", "gaussian"))
    return init_rfa_state(batch, heads, width, value_channels, dtype=dtype, device=device)


def _width(projection: Tensor, kind: str) -> int:
    return projection.shape[1] * (1 if kind == "arccos" else 2)


# ------------------------------------------------------------------------------------------------------ the operations


def rfa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_gate: Tensor | None,
    projection: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: RFAState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    kind: Kind = "gaussian",
    feature_scale: float | None = 0.1,
    norm_eps: float = 1e-3,
    bound: Bound | None = None,
    least: float | None = None,
) -> Tensor | tuple[Tensor, RFAState]:
    """Random feature attention (Peng et al., 2021); the module docstring has the equations.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        log_gate: Logarithm of the gate g, (batch, L, heads); values above 0 count as 0. None for no gate. Causal only.
        projection: W, (heads, D, K), learned scales and temperature included.
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``. Padding does not close the gate.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"``, ``"torch"``, ``"native"`` on a CPU, or ``"triton"`` on a GPU.
        kind: ``"gaussian"`` for sines and cosines, ``"arccos"`` for relu(W x^) + 1e-5.
        feature_scale: c; None for D^-1/2, as in the paper. The published code has 0.1.
        norm_eps: Added to norms; the paper has 0.
        bound: How d bounds sums s. ``"positive"``: max(s, least). ``"absolute"``: max(|s|, least), without the sign.
            ``"none"``: s itself. As in the published code if absent: positive in the causal form, else absolute.
        least: The bound; 1 if absent, as published, or 0.01 with a gate.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "rfa_attention"
    options = rfa_options(op, kind=kind, feature_scale=feature_scale, norm_eps=norm_eps, bound=bound, least=least)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    check_inputs(op, given)
    _check_projection(op, projection, q)
    _check_gate(op, log_gate, q)
    if log_gate is not None and not causal:
        raise ValueError(f"{op}: a gate requires causal=True, since it forgets what came before")

    products = functools.partial(products_in_chunks, chunk=CHUNK)
    return run(
        op, given, _dense(products, scanned, causal, projection, options, CHUNK),
        init_state=lambda batch: _fresh(batch, v, projection, kind),
        of_tokens=() if log_gate is None else (log_gate,), options=(log_gate, projection, options),
    )  # fmt: skip


def attend_by(
    products: Products, walk: Walk, given: Checked, log_gate: Tensor | None, projection: Tensor, options: RFAOptions
) -> tuple[Tensor, RFAState | None]:
    """Either form, with sums over keys by a backend: the output, and the state after it."""
    if given.causal and given.state is None:
        given = given._replace(state=_fresh(given.sequences, given.v, projection, options.kind))
    dense = _dense(products, walk, given.causal, projection, options)
    return run_dense(dense, given, () if log_gate is None else (log_gate,))


def _dense(
    products: Products, walk: Walk, causal: bool, projection: Tensor, options: RFAOptions, chunk: int = 1
) -> Dense:
    """Both forms; ``chunk`` is what divides the tokens that ``products`` take."""

    def block(tokens: Sequence[Any], state: RFAState, projection: Tensor) -> tuple[Tensor, RFAState]:
        q, k, v, mask, *gates = tokens
        padded, mask = pad_to_chunks((q, k, v, *gates), mask, chunk)
        out, state = _causal(padded, mask, state, projection, options, products)
        return cut(out, q.shape[1]), state

    def whole(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any) -> Tensor:
        return _bidirectional(q, k, v, key, query, projection, options, products)

    return walk(block, whole, causal, (projection,))


def _fresh(batch: int, v: Tensor, projection: Tensor, kind: str) -> RFAState:
    return init_rfa_state(batch, v.shape[-2], _width(projection, kind), v.shape[-1], device=v.device)


def _bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    projection: Tensor,
    options: RFAOptions,
    products: Products,
) -> Tensor:
    with no_autocast(q.device):
        Q, K = (fill(options.features(fill(x, m), projection), m) for x, m in ((q, query_mask), (k, key_mask)))
        total, product, _ = products(Q, K, fill(v, key_mask).to(Q.dtype))
        return (product / options.bounded(total, False, False)).to(q.dtype).contiguous()


def _causal(
    tokens: Sequence[Tensor],
    mask: Tensor | None,
    state: RFAState,
    projection: Tensor,
    options: RFAOptions,
    products: Products,
) -> tuple[Tensor, RFAState]:
    q, k, v, *gates = tokens
    with no_autocast(q.device):
        Q, K = (fill(options.features(fill(x, mask), projection), mask) for x in (q, k))
        log_gate = None
        if gates:
            log_gate = clip_log_decay(fill(gates[0], mask).to(Q.dtype))
            K = K * -log_gate.expm1().unsqueeze(-1)
        total, product, past = products(Q, K, fill(v, mask).to(Q.dtype), tuple(state), log_gate)
        assert past is not None
        return (product / options.bounded(total, True, bool(gates))).to(v.dtype), RFAState(*past)


def rfa_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: RFAState,
    log_gate: Tensor | None,
    projection: Tensor,
    *,
    kind: Kind = "gaussian",
    feature_scale: float | None = 0.1,
    norm_eps: float = 1e-3,
    bound: Bound | None = None,
    least: float | None = None,
) -> tuple[Tensor, RFAState]:
    """Compute one token of causal random feature attention.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        log_gate: (batch, heads), or None for no gate.
        projection: As in :func:`rfa_attention`.
        kind: Likewise.
        feature_scale: Likewise.
        norm_eps: Likewise.
        bound: Likewise.
        least: Likewise.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "rfa_attention_step"
    options = rfa_options(op, kind=kind, feature_scale=feature_scale, norm_eps=norm_eps, bound=bound, least=least)
    check_step(op, q, k, v, state, RFAState)
    _check_projection(op, projection, q)
    check_state(op, state, _fresh(q.shape[0], v, projection, kind))
    _check_gate(op, log_gate, q)
    with no_autocast(q.device):
        compute = state.memory.dtype
        Q, K = (options.features(x.to(compute), projection) for x in (q, k))
        factor = None
        if log_gate is not None:
            log_gate = clip_log_decay(log_gate.to(compute)).unsqueeze(-1)
            factor, K = log_gate.exp(), K * -log_gate.expm1()
        total, product, past = token_products(Q, K, v.to(compute), state, factor)
        return (product / options.bounded(total, True, factor is not None)).to(v.dtype), RFAState(*past)


def rfa_weights(
    q: Tensor, k: Tensor, log_gate: Tensor | None, projection: Tensor, *, causal: bool = False, **given: Any
) -> Rows:
    """Return rows s_ij / d(sum_j s_ij), s_ij = phi(q_i) . phi(k_j) (1 - g_j) g_{j+1} ... g_i, of one sequence."""
    options = RFAOptions(**given)
    Q, K = (options.features(x, projection) for x in (q, k))

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihf,jhf->hij", Q[places], K)
        scores = lower(scores, places) if causal else scores
        if log_gate is not None:
            scores = scores * log_gammas(log_gate, len(K), places).exp()
            scores = scores * (1 - clip_log_decay(log_gate).exp()).T.unsqueeze(1)
        return scores / options.bounded(scores.sum(-1, keepdim=True), causal, log_gate is not None)

    return rows
