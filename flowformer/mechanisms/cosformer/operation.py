r"""cosFormer (Qin et al., 2022): linear attention by relu, with weights that fall with distance as a cosine.

    A_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j) / m)        out_i = sum_j A_ij v_j / max(sum_j A_ij, 1e-6)

A cosine of a difference is a sum of two products, so A is a product of features of twice the width:

    phi(x_i) = [relu(x_i) cos(pi/2 i / m), relu(x_i) sin(pi/2 i / m)]

m is the number of tokens, or that of keys if there are more. In decoding it must be known beforehand: with m = t each
step would change all weights. Beyond a distance of m weights are negative, so that longer sequences are refused.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import (
    check_fresh_state,
    check_number,
    check_optional_sizes,
    check_state,
    check_step,
)
from flowformer.core.chunks import CHUNK, pad_to_chunks
from flowformer.core.feature_products import Products, fresh_past, products_in_chunks, token_products
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Checked, Dense, Given, Walk, run, run_dense, scanned
from flowformer.core.tracing import cut, may_look
from flowformer.mechanisms.weights import Rows, lower

TINY = 1e-30  # the least denominator, where eps is 0


class CosformerState(NamedTuple):
    """State of causal cosFormer attention.

    Attributes:
        key_sum: Sum of features, (batch, heads, 2 K).
        memory: Sum of features times values, (batch, heads, 2 K, V).
        length: Tokens so far, (batch,), int64.
    """

    key_sum: Tensor
    memory: Tensor
    length: Tensor


def init_cosformer_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> CosformerState:
    """Return the state before the first token, with sums in float64 for inputs of any ``dtype``."""
    sizes = {"heads": heads, "key_channels": key_channels, "value_channels": value_channels}
    check_fresh_state("init_cosformer_state", batch, dtype, **sizes)
    device = torch.device("cpu") if device is None else torch.device(device)
    past = fresh_past(batch, heads, 2 * key_channels, value_channels, dtype=state_dtype(device), device=device)
    return CosformerState(*past, torch.zeros(batch, dtype=torch.int64, device=device))


def cosformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: CosformerState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    eps: float = 1e-6,
    max_length: int | None = None,
) -> Tensor | tuple[Tensor, CosformerState]:
    """Attention of cosFormer (Qin et al., 2022); the module docstring has the equations.

    Positions count real tokens, so that padding changes nothing.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch. Requires ``max_length``.
        return_state: Return the state after the last token as well (causal only). Requires ``max_length``.
        backend: ``"auto"``, ``"torch"``, ``"native"`` on a CPU, or ``"triton"`` on a GPU.
        eps: The least denominator.
        max_length: m. The real tokens of each sequence, or of its context if those are more, if absent. On CPUs a
            longer sequence is refused; on GPUs, where to count costs time, weights are negative beyond m.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "cosformer_attention"
    check_options(op, eps, max_length)
    if causal and max_length is None and (initial_state is not None or return_state):
        raise ValueError(f"{op}: a state requires max_length, since all weights depend on it")

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    products = functools.partial(products_in_chunks, chunk=CHUNK)
    return run(
        op, given, _dense(products, scanned, causal, eps, max_length, CHUNK),
        init_state=lambda batch: _fresh(batch, q, v), options=(eps, max_length),
    )  # fmt: skip


def attend_by(
    products: Products, walk: Walk, given: Checked, eps: float, max_length: int | None
) -> tuple[Tensor, CosformerState | None]:
    """Either form, with sums over keys by a backend: the output, and the state after it."""
    if given.causal and given.state is None:
        given = given._replace(state=_fresh(given.sequences, given.q, given.v))
    return run_dense(_dense(products, walk, given.causal, eps, max_length), given)


def _dense(products: Products, walk: Walk, causal: bool, eps: float, max_length: int | None, chunk: int = 1) -> Dense:
    """Both forms; ``chunk`` is what divides the tokens that ``products`` take."""

    def block(tokens: Sequence[Any], state: CosformerState, longest: Tensor) -> tuple[Tensor, CosformerState]:
        *tokens, mask = tokens
        padded, mask = pad_to_chunks(tokens, mask, chunk)
        out, state = _causal(padded, mask, state, longest, eps, products)
        return cut(out, tokens[0].shape[1]), state

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        longest = _longest("cosformer_attention", q, k, query, key, max_length, state)

        def whole(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None) -> Tensor:
            return _bidirectional(q, k, v, key, query, longest, eps, products)

        return walk(block, whole, causal, (longest,))(q, k, v, key, query, state)

    return dense


def _fresh(batch: int, q: Tensor, v: Tensor) -> CosformerState:
    return init_cosformer_state(batch, q.shape[-2], q.shape[-1], v.shape[-1], device=q.device)


def check_options(op: str, eps: Any, max_length: Any) -> None:
    """Raise for options that do not fit."""
    check_number(f"{op}: eps", eps, 0)
    check_optional_sizes(max_length=max_length)


def _longest(
    op: str,
    q: Tensor,
    k: Tensor,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
    max_length: int | None,
    state: CosformerState | None,
) -> Tensor:
    """Return m of each sequence, (batch, 1), in the dtype of states; raise where a sequence is longer."""
    counts = [
        torch.full((len(x),), x.shape[1], device=x.device) if mask is None else mask.sum(1)
        for x, mask in ((q, query_mask), (k, key_mask))
    ]
    count = torch.maximum(*counts)
    wide = state_dtype(q.device)
    if max_length is None:
        return count.clamp(min=1).to(wide).unsqueeze(1)
    _refuse_longer(op, count if state is None else count + state.length, max_length)
    return torch.full((len(q), 1), max_length, dtype=wide, device=q.device)


def _refuse_longer(op: str, count: Tensor, max_length: int) -> None:
    if may_look(count) and count.numel() and int(count.max()) > max_length:
        raise ValueError(
            f"{op}: weights are negative beyond a distance of max_length {max_length}, got {int(count.max())} tokens"
        )


def _features(x: Tensor, mask: Tensor | None, positions: Tensor, longest: Tensor) -> Tensor:
    """Features (..., heads, 2 K) of x (..., heads, K) at positions (...), zeros at padding."""
    x = fill(x, mask).to(sum_dtype(x.dtype)).relu()
    angles = (math.pi / 2 * positions.to(longest.dtype) / longest)[..., None, None]
    return torch.cat([x * angles.cos().to(x.dtype), x * angles.sin().to(x.dtype)], -1)


def _places(x: Tensor, mask: Tensor | None) -> Tensor:
    """Positions of tokens among the real ones, (batch or 1, length)."""
    return torch.arange(x.shape[1], device=x.device).unsqueeze(0) if mask is None else mask.cumsum(1) - 1


def _bidirectional(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    longest: Tensor,
    eps: float,
    products: Products,
) -> Tensor:
    with no_autocast(q.device):
        Q, K = (_features(x, m, _places(x, m), longest) for x, m in ((q, query_mask), (k, key_mask)))
        total, product, _ = products(Q, K, fill(v, key_mask).to(Q.dtype))
        return (product / total.clamp(min=max(eps, TINY))).to(q.dtype).contiguous()


def _causal(
    tokens: Sequence[Tensor],
    mask: Tensor | None,
    state: CosformerState,
    longest: Tensor,
    eps: float,
    products: Products,
) -> tuple[Tensor, CosformerState]:
    q, k, v = tokens
    with no_autocast(q.device):
        places = _places(q, mask) + state.length.unsqueeze(1)
        Q, K = (_features(x, mask, places, longest) for x in (q, k))
        total, product, past = products(Q, K, fill(v, mask).to(Q.dtype), state[:2])
        assert past is not None
        out = product / total.clamp(min=max(eps, TINY))
        return out.to(v.dtype), CosformerState(*past, places[:, -1] + 1)


def cosformer_attention_step(
    q: Tensor, k: Tensor, v: Tensor, state: CosformerState, *, eps: float = 1e-6, max_length: int | None = None
) -> tuple[Tensor, CosformerState]:
    """Compute one token of causal cosFormer attention.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        eps: The least denominator.
        max_length: m; required.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "cosformer_attention_step"
    check_options(op, eps, max_length)
    check_step(op, q, k, v, state, CosformerState)
    check_state(op, state, _fresh(len(q), q, v))
    if max_length is None:
        raise ValueError(f"{op}: a state requires max_length, since all weights depend on it")
    _refuse_longer(op, state.length + 1, max_length)
    with no_autocast(q.device):
        compute = state.memory.dtype
        longest = torch.full_like(state.length, max_length, dtype=compute)
        Q, K = (_features(x.to(compute), None, state.length, longest) for x in (q, k))
        total, product, past = token_products(Q, K, v.to(compute), state[:2])
        out = product / total.clamp(min=max(eps, TINY))
        return out.to(v.dtype), CosformerState(*past, state.length + 1)


def cosformer_weights(
    q: Tensor, k: Tensor, *, causal: bool = False, eps: float = 1e-6, max_length: int | None = None
) -> Rows:
    """Return rows A_ij / max(sum_j A_ij, eps), A_ij = relu(q_i) . relu(k_j) cos(pi/2 (i - j) / m), of one sequence."""
    longest = max(len(q), len(k)) if max_length is None else max_length
    sources = torch.arange(len(k), device=k.device)

    def rows(places: Tensor) -> Tensor:
        apart = (places.unsqueeze(1) - sources).to(q.dtype)
        scores = torch.einsum("ihk,jhk->hij", q[places].relu(), k.relu()) * (math.pi / 2 * apart / longest).cos()
        scores = lower(scores, places) if causal else scores
        return scores / scores.sum(-1, keepdim=True).clamp(min=max(eps, TINY))

    return rows
