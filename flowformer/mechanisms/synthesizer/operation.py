"""The operation, its step and state, and its rows of weights. See :mod:`flowformer.mechanisms.synthesizer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_fresh_state, check_state, check_step
from flowformer.core.masks import attending, close_up_if, fill, spread
from flowformer.core.precision import no_autocast, sum_dtype
from flowformer.core.run import Given, run
from flowformer.mechanisms.synthesizer.scores import Options, Synthetic, check_length, check_synthetic, synthesize
from flowformer.mechanisms.weights import Rows, lower


class SynthesizerState(NamedTuple):
    """State of the causal Synthesizer: all keys and values so far, in the dtype of the inputs.

    Attributes:
        key: (batch, tokens, heads, K); (batch, tokens, heads, 0) without dot product.
        value: (batch, tokens, heads, V).
        mask: Which of them are real tokens, (batch, tokens), boolean.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


def init_synthesizer_state(
    batch: int,
    heads: int,
    key_channels: int,
    value_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: Any = None,
    dot_product: bool = True,
) -> SynthesizerState:
    """Return the state before the first token, for inputs of ``dtype``."""
    check_fresh_state(
        "init_synthesizer_state", batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels
    )
    key = torch.empty(batch, 0, heads, key_channels if dot_product else 0, dtype=dtype, device=device)
    return SynthesizerState(
        key, key.new_empty(batch, 0, heads, value_channels), key.new_empty(batch, 0, dtype=torch.bool)
    )


def state_of(
    *sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, dot_product: bool = True, **options: Any
) -> SynthesizerState:
    """Return :func:`init_synthesizer_state` for the registry, which passes learned tensors and options too."""
    return init_synthesizer_state(*sizes_and_learned[:4], dtype=dtype, device=device, dot_product=dot_product)


def synthesizer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    synthetic: Synthetic,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SynthesizerState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    kind: str = "random",
    dot_product: bool = True,
    activation: str = "relu",
    tiling: str = "outer",
    lra_reshape: bool = False,
) -> Tensor | tuple[Tensor, SynthesizerState]:
    """Synthesizer (Tay et al., 2021), quadratic in length.

    Args:
        q: Queries (batch, L, heads, K): where dense, before the activation; where random without dot product, of no
            consequence but for their shape.
        k: Keys (batch, S, heads, K), of no consequence without dot product.
        v: Values (batch, S, heads, V).
        synthetic: Learned tensors for T positions, T at least as large as any L and S. Random: R (heads, T, T), or R_1
            (heads, T, r) and R_2 (heads, r, T). Dense: W_2 (K, T) shared by all heads or (heads, K, T), or that and a
            bias, (T,) or (heads, T). Factorized dense: W_A (heads, K, a) and W_B (heads, K, b), with T = a b.
        causal: Output t sees positions up to t only. Requires L == S.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``. Positions count real tokens only.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only).
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        kind: ``"random"``, ``"factorized_random"``, ``"dense"`` or ``"factorized_dense"``.
        dot_product: Add the scores of softmax attention.
        activation: Of dense kinds: ``"relu"``, or ``"identity"`` for none.
        tiling: Of factorized dense scores: ``"outer"`` for all products of two factors; ``"both"``, as in a third
            party's code (leaderj1001), for the product of factors j mod a and j mod b.
        lra_reshape: As released in Long Range Arena, dense scores (batch, L, heads, T) are reshaped to (batch, heads,
            L, T) instead of transposed, which mixes up heads and positions. Without masks and packing, not causal.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "synthesizer_attention"
    options = Options(kind, dot_product, activation, tiling, lra_reshape)
    options.check(f"{op}: ")
    if lra_reshape and (causal is True or any(x is not None for x in (mask, context_mask, cu_seqlens))):
        raise ValueError(f"{op}: lra_reshape mixes up positions: pass no masks, no cu_seqlens and causal=False")
    if return_state and cu_seqlens is not None:
        raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        with no_autocast(q.device):
            tables = check_synthetic(op, synthetic, options, q)
            fresh, counts = initial_state is None, torch.zeros(len(q), dtype=torch.int64, device=q.device)
            if not dot_product:
                k = k[..., :0]
            if causal and not fresh:
                counts = state.mask.sum(1)
            alive = query if causal else attending(key, query)
            if causal and (return_state or not fresh):
                state = _extend(state, fill(k, key), fill(v, key), key)
                k, v, key = (x.to(v.dtype) if x.is_floating_point() else x for x in state)
            out = _attend(q, k, v, key, query, tables, counts, causal, fresh, options)
            return fill(out.to(q.dtype), alive), state if return_state else None

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run(op, given, dense, init_state=lambda batch: _fresh(q, v, batch, dot_product))


def _fresh(q: Tensor, v: Tensor, batch: int, dot_product: bool) -> SynthesizerState:
    return init_synthesizer_state(
        batch, q.shape[-2], q.shape[-1], v.shape[-1], dtype=q.dtype, device=q.device, dot_product=dot_product
    )


def _extend(state: SynthesizerState, k: Tensor, v: Tensor, mask: Tensor | None) -> SynthesizerState:
    """The state with further tokens, zeros where they are padding."""
    if mask is None:
        mask = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device)
    return SynthesizerState(*(torch.cat(pair, 1) for pair in zip(state, (k, v, mask), strict=True)))


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor | None,
    query: Tensor | None,
    tables: Sequence[Tensor],
    counts: Tensor,
    causal: bool,
    fresh: bool,
    options: Options,
) -> Tensor:
    """Outputs (batch, L, heads, V) in the dtype of sums; ``counts`` (batch,) real tokens lie before the queries."""
    length, compute = q.shape[1], sum_dtype(q.dtype)
    (k, v), real, _ = close_up_if([fill(x, key).to(compute) for x in (k, v)], key)
    (q,), _, places = close_up_if([fill(q, query).to(compute)], query)
    check_length(tables, options.kind, max(q.shape[1], k.shape[1]))
    place = torch.arange(q.shape[1], device=q.device)
    place = place if fresh else counts.unsqueeze(1) + place
    scores = synthesize(q.transpose(1, 2), tables, place, k.shape[1], options)
    if options.dot_product:
        scores = scores + q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / q.shape[-1] ** 0.5
    hidden = torch.zeros((), dtype=torch.bool, device=q.device) if real is None else ~real[:, None, None, :]
    if causal:
        later = torch.arange(k.shape[1], device=q.device) > place.unsqueeze(-1)
        hidden = hidden | (later if fresh else later.unsqueeze(1))
    weights = scores.masked_fill(hidden, -torch.finfo(compute).max).softmax(-1)
    out = (weights @ v.transpose(1, 2)).transpose(1, 2)
    return out if places is None else spread(out, places, length)


def synthesizer_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SynthesizerState,
    synthetic: Synthetic,
    *,
    kind: str = "random",
    dot_product: bool = True,
    activation: str = "relu",
    tiling: str = "outer",
    lra_reshape: bool = False,
) -> tuple[Tensor, SynthesizerState]:
    """Compute one token of the causal Synthesizer, in time and memory linear in the number of tokens before it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        synthetic: As :func:`synthesizer_attention` takes it.
        kind: Likewise, as all that follow.
        dot_product: Likewise.
        activation: Likewise.
        tiling: Likewise.
        lra_reshape: Likewise; it has no causal form.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "synthesizer_attention_step"
    check_step(op, q, k, v, state, SynthesizerState)
    check_state(op, state, _fresh(q, v, len(q), dot_product))
    out, after = synthesizer_attention(
        q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1), synthetic, causal=True, initial_state=state, return_state=True,
        kind=kind, dot_product=dot_product, activation=activation, tiling=tiling, lra_reshape=lra_reshape,
    )  # fmt: skip
    return out.squeeze(1), after  # pyright: ignore[reportReturnType]


def synthesizer_weights(
    q: Tensor,
    k: Tensor,
    synthetic: Synthetic,
    *,
    causal: bool = False,
    kind: str = "random",
    dot_product: bool = True,
    activation: str = "relu",
    tiling: str = "outer",
    lra_reshape: bool = False,
) -> Rows:
    """Return rows of softmax(B) of one sequence."""
    options = Options(kind, dot_product, activation, tiling, lra_reshape)
    tables = check_synthetic("synthesizer_attention", synthetic, options, q)
    keys = len(k)
    active = q.clamp(min=0) if activation == "relu" else q

    def of_dense() -> Tensor:
        weight, *bias = tables
        weight = weight.expand(q.shape[1], -1, -1)
        scores = torch.einsum("ihk,hkj->ihj", active, weight)
        scores = scores + bias[0] if bias else scores
        return scores.reshape(q.shape[1], len(q), -1) if lra_reshape else scores.movedim(1, 0)

    def of_factors(places: Tensor) -> Tensor:
        A, B = (torch.einsum("ihk,hka->hia", active[places], table) for table in tables)
        j = torch.arange(keys, device=q.device)
        first = j // B.shape[-1] if tiling == "outer" else j % A.shape[-1]
        return A[..., first] * B[..., j % B.shape[-1]]

    def rows(places: Tensor) -> Tensor:
        if kind == "random":
            scores = tables[0][:, places, :keys]
        elif kind == "factorized_random":
            scores = torch.einsum("hir,hrj->hij", tables[0][:, places], tables[1][..., :keys])
        else:
            scores = of_dense()[:, places, :keys] if kind == "dense" else of_factors(places)
        if dot_product:
            scores = scores + torch.einsum("ihk,jhk->hij", q[places], k) / q.shape[-1] ** 0.5
        return (lower(scores, places, -torch.inf) if causal else scores).softmax(-1)

    return rows
