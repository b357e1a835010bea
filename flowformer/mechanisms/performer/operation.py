r"""Performer: softmax attention by positive random features, FAVOR+ (Choromanski et al., 2021).

With a random matrix W (m, K) whose rows are orthogonal in blocks, and x' = s x with s = K^-1/4,

    softmax kernel:  phi(x) = m^-1/2 (exp(W x' - |x'|^2 / 2 - M) + eps)        relu kernel:  phi(x) = relu(W x') + eps

    out_i = sum_j phi(q_i) . phi(k_j) v_j / sum_j phi(q_i) . phi(k_j)

M keeps exponentials in range. For a query it is the largest element of W q', for keys that of all W k'. It would cancel
if eps were 0: it decides how much eps weighs. The published causal form takes it over the whole sequence, so that later
keys change earlier outputs. Here it is taken over the keys up to the query: causal output t is exactly the last one of
the bidirectional form on the sequence cut after t.

For that, sums over keys are kept relative to exp(s_t), where s_t is the running maximum M_t rounded up. A key enters as
exp(W k'_j - |k'_j|^2 / 2 - s_j), and what is there shrinks by exp(s_{t-1} - s_t): a decay, of which
:mod:`flowformer.core.feature_products` knows. None of these numbers exceeds 1 or depends on a later token. The part of
eps has no scale: a count of keys, and a sum of values. What is rounded has no derivative, and none is missing: the
ratio does not depend on s.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_fresh_state, check_state, check_step
from flowformer.core.chunks import CHUNK, pad_to_chunks
from flowformer.core.decay import rising_scale
from flowformer.core.feature_products import (
    Past,
    Products,
    block_products,
    fresh_past,
    products_in_chunks,
    token_products,
)
from flowformer.core.masks import fill
from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype
from flowformer.core.run import Checked, Dense, Given, Walk, check_inputs, run, run_dense, scanned
from flowformer.core.sums import running_sums
from flowformer.core.tracing import cut
from flowformer.mechanisms.performer.options import PerformerOptions, check_projection, performer_options

TINY = 1e-30  # of denominators, where eps is 0 and all features are next to nothing


# --------------------------------------------------------------------------------------------------------------- state


class PerformerState(NamedTuple):
    """State of causal Performer attention. Sums are in float64, relative to exp(ceil(maximum)) with the softmax kernel.

    Attributes:
        key_sum: Sum of features without eps, (batch, heads, m).
        memory: Sum of features without eps times values, (batch, heads, m, V).
        value_sum: Sum of values, (batch, heads, V).
        maximum: M, (batch, heads); 0 with the relu kernel.
        length: Tokens so far, (batch,), int64.
    """

    key_sum: Tensor
    memory: Tensor
    value_sum: Tensor
    maximum: Tensor
    length: Tensor


def init_performer_state(
    batch: int,
    heads: int,
    features: int,
    value_channels: int,
    *,
    kernel: Literal["softmax", "relu"] = "softmax",
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> PerformerState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``."""
    sizes = {"heads": heads, "features": features, "value_channels": value_channels}
    check_fresh_state("init_performer_state", batch, dtype, **sizes)
    performer_options(kernel=kernel)
    device = torch.device("cpu") if device is None else torch.device(device)
    past = fresh_past(batch, heads, features, value_channels, dtype=state_dtype(device), device=device)
    values = past[1].new_zeros(batch, heads, value_channels)
    maximum = values.new_full((batch, heads), LOG_ZERO if kernel == "softmax" else 0.0)
    return PerformerState(*past, values, maximum, torch.zeros(batch, dtype=torch.int64, device=device))


def state_of(*sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> Any:
    """Return :func:`init_performer_state` for the registry."""
    batch, heads, channels, value_channels, *learned = sizes_and_learned
    features = channels if not learned or learned[0] is None else learned[0].shape[0]
    kernel = options.get("kernel", "softmax")
    return init_performer_state(batch, heads, features, value_channels, kernel=kernel, dtype=dtype, device=device)


# ------------------------------------------------------------------------------------------------------ the operations


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: PerformerState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    **overrides: Any,
) -> Tensor | tuple[Tensor, PerformerState]:
    """Performer attention, FAVOR+ (Choromanski et al., 2021); the module docstring has the equations.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        projection: W, (m, K), the same for all heads; absent with ``projected=False``.
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"``, ``"torch"``, ``"native"`` on a CPU, or ``"triton"`` on a GPU.
        **overrides: Options of :class:`PerformerOptions`.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op, options = "performer_attention", performer_options(**overrides)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    check_inputs(op, given)
    check_projection(op, options, projection, q)
    over_all = causal and options.exponential and options.maximum == "all"
    if over_all and (initial_state is not None or return_state):
        raise ValueError(f"{op}: maximum='all' has no state, since the maximum is over later keys too")

    products = functools.partial(products_in_chunks, chunk=CHUNK)
    return run(
        op, given, _dense(products, _in_chunks, scanned, causal, projection, options, CHUNK),
        init_state=lambda batch: _fresh(batch, q, v, projection, options), options=(projection, options),
    )  # fmt: skip


def attend_by(
    products: Products, walk: Walk, given: Checked, projection: Tensor | None, options: PerformerOptions,
    ratio: Ratio | None = None,
) -> tuple[Tensor, PerformerState | None]:  # fmt: skip
    """Either form, with sums over keys by a backend, or their ratio: the output, and the state after it."""

    def scaled(Q: Tensor, K: Tensor, V: Tensor, past: Past, scale: tuple[Tensor, Tensor] | None) -> Any:
        if scale is None:
            return products(Q, K, V, past)
        scales, before = scale
        return products(Q, K, V, past, torch.cat([before.unsqueeze(1), scales[:, :-1]], 1) - scales)

    if given.causal and given.state is None:
        given = given._replace(state=_fresh(given.sequences, given.q, given.v, projection, options))
    return run_dense(_dense(products, scaled, walk, given.causal, projection, options, ratio=ratio), given)


# product / (total + least) of :data:`Products` over all keys, ``ratio(Q, K, V, least)``.
Ratio = Callable[[Tensor, Tensor, Tensor, float], Tensor]
# On Q, K, V, the past, and scales: that of each token, (batch, tokens, heads), and that of the past, (batch, heads).
# K, and what is summed, is relative to them. The same results as of Products.
ScaledProducts = Callable[..., tuple[Tensor, Tensor, Past]]


def _in_chunks(
    Q: Tensor, K: Tensor, V: Tensor, past: Past, scale: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Past]:
    """:data:`ScaledProducts` in plain PyTorch."""
    decay = None
    if scale is not None:
        decay = rising_scale(scale[0].transpose(1, 2), scale[1], Q.shape[1] // CHUNK)
    return block_products(Q, K, V, past, CHUNK, decay)


def _dense(
    products: Products,
    scaled: ScaledProducts,
    walk: Walk,
    causal: bool,
    projection: Tensor | None,
    options: PerformerOptions,
    chunk: int = 1,
    ratio: Ratio | None = None,
) -> Dense:
    """Both forms; ``chunk`` is what divides the tokens that ``scaled`` takes."""

    def block(tokens: Sequence[Any], state: PerformerState, projection: Any, largest: Any) -> Any:
        *tokens, mask = tokens
        padded, mask = pad_to_chunks(tokens, mask, chunk)
        out, state = _causal(padded, mask, state, projection, largest, options, scaled)
        return cut(out, tokens[0].shape[1]), state

    def whole(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None) -> Tensor:
        return _bidirectional(q, k, v, key, query, projection, options, products, ratio)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        over_all = causal and options.exponential and options.maximum == "all"
        largest = options.exponents(k, projection, key).largest.amax(1, keepdim=True) if over_all else None
        return walk(block, whole, causal, (projection, largest))(q, k, v, key, query, state)

    return dense


def _fresh(batch: int, q: Tensor, v: Tensor, projection: Tensor | None, options: PerformerOptions) -> PerformerState:
    features = q.shape[-1] if projection is None else projection.shape[0]
    return init_performer_state(batch, q.shape[-2], features, v.shape[-1], kernel=options.kernel, device=q.device)


def _queries(
    q: Tensor, mask: Tensor | None, projection: Tensor | None, options: PerformerOptions
) -> tuple[Tensor, Tensor | None]:
    """Features of queries (..., m) times a number for each query; and m^-1/2 over that number, (..., 1), or None for 1.

    Zeros at padding.
    """
    exponents = options.exponents(q, projection, mask)
    scale, excess = _scale(exponents.largest)
    Q = exponents.features(scale) + fill(options.offset * excess.exp(), mask)
    return Q, (-excess).exp() * Q.shape[-1] ** -0.5 if options.exponential else None


def _divide(
    product: Tensor, total: Tensor, Q: Tensor, unit: Tensor | None, excess: Tensor | None, options: PerformerOptions
) -> Tensor:
    """The ratio of sums without the part of eps, which is in them already.

    Args:
        product: (..., V).
        total: (..., 1).
        Q: Features of queries, times a number.
        unit: That number's inverse, times m^-1/2; None for 1.
        excess: M less the scale of keys, (..., 1).
        options: Of the operation.
    """
    if options.absolute:  # as large as published
        if unit is not None and excess is not None:
            of_keys = unit * (-excess).exp() * Q.shape[-1] ** -0.5
            product, total, Q = product * of_keys, total * of_keys, Q * unit
        total = total + options.sum_eps * Q.sum(-1, keepdim=True)
        total = torch.where(total <= options.least, total + 2 * options.least, total)
    return product / total.clamp(min=TINY)


def _bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    projection: Tensor | None,
    options: PerformerOptions,
    products: Products,
    ratio: Ratio | None,
) -> Tensor:
    with no_autocast(q.device):
        Q, unit = _queries(q, query_mask, projection, options)
        exponents = options.exponents(k, projection, key_mask)
        scale, excess = _scale(exponents.largest.amax(1, keepdim=True))
        K, V = exponents.features(scale), fill(v, key_mask).to(Q.dtype)
        least = options.offset * excess.exp()  # (batch, 1, heads, 1)
        # As a part of features its gradient is a sum over keys of what is rounded alike, too coarse where it is wanted.
        if ratio is not None and not options.absolute and not least.requires_grad:
            if key_mask is not None:
                least = fill(least.expand(-1, k.shape[1], -1, -1), key_mask)
            out = ratio(Q, K + least, V, TINY)
        else:
            total, product, _ = products(Q, K, V)
            real = v.shape[1] if key_mask is None else key_mask.sum(1).view(-1, 1, 1, 1)
            weight = least * Q.sum(-1, keepdim=True)
            product = torch.addcmul(product, weight, V.sum(1, keepdim=True))
            out = _divide(product, total + weight * real, Q, unit, excess, options)
        return out.to(q.dtype).contiguous()


def _scale(largest: Tensor) -> tuple[Tensor, Tensor]:
    """The scale of keys (...), which has no gradient, and M less the scale (..., 1)."""
    scale = largest.detach().ceil()
    return scale, (largest - scale).unsqueeze(-1)


def _causal(
    tokens: Sequence[Tensor],
    mask: Tensor | None,
    state: PerformerState,
    projection: Tensor | None,
    of_all: Tensor | None,
    options: PerformerOptions,
    products: ScaledProducts,
) -> tuple[Tensor, PerformerState]:
    """Outputs of tokens, and the state after them."""
    q, k, v = tokens
    with no_autocast(q.device):
        Q, unit = _queries(q, mask, projection, options)
        exponents = options.exponents(k, projection, mask)
        largest, scales = exponents.largest, None
        if of_all is not None:
            largest = of_all.expand_as(largest)
        elif options.exponential:
            past = state.maximum.to(largest.dtype)
            largest = torch.maximum(largest.cummax(1).values, past.unsqueeze(1))
            scales = largest.detach().ceil(), past.detach().ceil()
        scale, excess = _scale(largest)
        K, V = exponents.features(scale), fill(v, mask).to(Q.dtype)
        total, product, past = products(Q, K, V, state[:2], scales)
        seen = _counted(mask, V, state)
        so_far, values = running_sums(V, state.value_sum)
        weight = options.offset * excess.exp() * Q.sum(-1, keepdim=True)
        total = total + weight * seen.to(Q.dtype)[..., None, None]
        out = _divide(torch.addcmul(product, weight, so_far), total, Q, unit, excess, options)
        maximum = largest[:, -1].to(values.dtype) if options.exponential else state.maximum
        # Copies, since a view would keep the numbers of all tokens in memory.
        return out.to(v.dtype), PerformerState(*past, values.clone(), maximum.clone(), seen[:, -1].clone())


def _counted(mask: Tensor | None, V: Tensor, state: PerformerState) -> Tensor:
    """How many keys there are up to each token, (batch, tokens)."""
    ones = torch.ones(V.shape[:2], dtype=torch.int64, device=V.device) if mask is None else mask.long()
    return ones.cumsum(1) + state.length.unsqueeze(1)


def performer_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: PerformerState,
    projection: Tensor | None = None,
    **overrides: Any,
) -> tuple[Tensor, PerformerState]:
    """Compute one token of causal Performer attention.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        projection: As in :func:`performer_attention`.
        **overrides: Options of :class:`PerformerOptions`.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op, options = "performer_attention_step", performer_options(**overrides)
    check_step(op, q, k, v, state, PerformerState)
    check_projection(op, options, projection, q)
    if options.exponential and options.maximum == "all":
        raise ValueError(f"{op}: maximum='all' has no step, since the maximum is over later keys too")
    check_state(op, state, _fresh(q.shape[0], q, v, projection, options))
    with no_autocast(q.device):
        compute = state.memory.dtype
        Q, unit = _queries(q.to(compute), None, projection, options)
        exponents = options.exponents(k.to(compute), projection)
        largest, factor, maximum = exponents.largest, None, state.maximum
        if options.exponential:
            largest = maximum = torch.maximum(largest, maximum)
            factor = (state.maximum.detach().ceil() - largest.detach().ceil()).exp().unsqueeze(-1)
        scale, excess = _scale(largest)
        K, V = exponents.features(scale), v.to(compute)
        total, product, past = token_products(Q, K, V, state[:2], factor)
        values, length = state.value_sum + V, state.length + 1
        weight = options.offset * excess.exp() * Q.sum(-1, keepdim=True)
        total = total + weight * length.view(-1, 1, 1)
        out = _divide(product + weight * values, total, Q, unit, excess, options)
        return out.to(v.dtype), PerformerState(*past, values, maximum, length)
