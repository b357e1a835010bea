r"""Synthesizer: attention whose scores are learned tables, or computed from each query alone.

Source: Tay et al., "Synthesizer: Rethinking Self-Attention for Transformer Models", ICML 2021.
out = softmax(B) V without a scale, where B is one of

    random               B_ij = R_ij, a table for each head
    factorized_random    B = R_1 R_2, of r columns and rows
    dense                B_i = relu(q_i) W_2, where q_i = W_1 x_i + b_1 is the projected query
    factorized_dense     B_i,(p b + s) = (relu(q_i) W_A)_p (relu(q_i) W_B)_s, for p below a and s below b

and with ``dot_product`` q_i . k_j / sqrt(K) is added to it: with random tables that is what Long Range Arena has. The
causal form hides later keys. Positions are counted over real tokens, so that padding does not change a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.core.checks import (
    apply,
    check_choice,
    check_dense,
    check_flag,
    check_fresh_state,
    check_sizes,
    check_state,
    check_step,
    describe,
)
from flowformer.core.masks import attending, close_up_if, fill, spread
from flowformer.core.precision import no_autocast, sum_dtype
from flowformer.core.run import Given, run
from flowformer.core.tracing import is_traced
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.short_conv import ShortConv
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = [
    "SynthesizerAttention",
    "SynthesizerState",
    "init_synthesizer_state",
    "synthesizer_attention",
    "synthesizer_attention_step",
]

KINDS = ("random", "factorized_random", "dense", "factorized_dense")
ACTIVATIONS, TILINGS = ("relu", "identity"), ("outer", "both")

Synthetic = Tensor | Sequence[Tensor]


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


class Options(NamedTuple):
    """What scores are made of; see :func:`synthesizer_attention`."""

    kind: str = "random"
    dot_product: bool = True
    activation: str = "relu"
    tiling: str = "outer"
    lra_reshape: bool = False

    def check(self, of: str = "") -> None:
        """Raise for a wrong value."""
        check_choice(f"{of}kind", self.kind, KINDS)
        check_flag(f"{of}dot_product", self.dot_product)
        check_choice(f"{of}activation", self.activation, ACTIVATIONS)
        check_choice(f"{of}tiling", self.tiling, TILINGS)
        check_flag(f"{of}lra_reshape", self.lra_reshape)
        if self.lra_reshape and self.kind != "dense":
            raise ValueError(f"{of}lra_reshape is of kind='dense', got kind={self.kind!r}")


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


def _state_of(
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
            tables = _check_synthetic(op, synthetic, options, q)
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


def _check_synthetic(op: str, synthetic: Any, options: Options, q: Tensor) -> tuple[Tensor, ...]:
    """Return the learned tensors in the dtype of sums.

    Raises:
        TypeError, ValueError: for others than ``kind`` takes, for queries (..., heads, K).
    """
    parts = tuple(synthetic) if isinstance(synthetic, (tuple, list)) else (synthetic,)
    heads, width = q.shape[-2:]
    shapes = {
        "random": f"R ({heads}, T, T)",
        "factorized_random": f"R_1 ({heads}, T, r) and R_2 ({heads}, r, T)",
        "dense": f"W_2 ({width}, T) or ({heads}, {width}, T), and with a bias (T,) or ({heads}, T)",
        "factorized_dense": f"W_A ({heads}, {width}, a) and W_B ({heads}, {width}, b)",
    }
    wanted = f"{op}: synthetic must be {shapes[options.kind]}"
    shown = f"got {', '.join(describe(part) for part in parts)}"
    for part in parts:
        check_dense(f"{op}: synthetic", part)
    if not parts or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise TypeError(f"{wanted}, of floating-point dtype, {shown}")
    if not _fits(options.kind, [part.shape for part in parts], heads, width):
        raise ValueError(f"{wanted}, {shown}")
    if any(part.device != q.device for part in parts):
        raise ValueError(f"{op}: synthetic must be on {q.device} like q, {shown}")
    return tuple(part.to(sum_dtype(q.dtype)) for part in parts)


def _fits(kind: str, shapes: Sequence[torch.Size], heads: int, width: int) -> bool:
    first, last, count = shapes[0], shapes[-1], len(shapes)
    if not all(shape.numel() for shape in shapes):
        return False
    if kind == "random":
        return count == 1 and first == (heads, last[-1], last[-1])
    if kind == "factorized_random":
        return count == 2 and len(last) == 3 and first == (heads, last[2], last[1]) and last[0] == heads
    if kind == "dense":
        biases = ((first[-1],), (heads, first[-1]))
        return first in ((width, first[-1]), (heads, width, first[-1])) and (
            count == 1 or (count == 2 and tuple(last) in biases)
        )
    return count == 2 and all(shape == (heads, width, shape[-1]) for shape in shapes)


def _positions(tables: Sequence[Tensor], kind: str) -> int:
    """How many positions there are learned tensors for (T)."""
    return tables[0].shape[-1] * tables[1].shape[-1] if kind == "factorized_dense" else _last(tables, kind).shape[-1]


def _last(tables: Sequence[Tensor], kind: str) -> Tensor:
    return tables[0] if kind == "dense" else tables[-1]


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
    _check_length(_positions(tables, options.kind), max(q.shape[1], k.shape[1]))
    place = torch.arange(q.shape[1], device=q.device)
    place = place if fresh else counts.unsqueeze(1) + place
    scores = _synthesize(q.transpose(1, 2), tables, place, k.shape[1], options)
    if options.dot_product:
        scores = scores + q.transpose(1, 2) @ k.permute(0, 2, 3, 1) / q.shape[-1] ** 0.5
    hidden = torch.zeros((), dtype=torch.bool, device=q.device) if real is None else ~real[:, None, None, :]
    if causal:
        later = torch.arange(k.shape[1], device=q.device) > place.unsqueeze(-1)
        hidden = hidden | (later if fresh else later.unsqueeze(1))
    weights = scores.masked_fill(hidden, -torch.finfo(compute).max).softmax(-1)
    out = (weights @ v.transpose(1, 2)).transpose(1, 2)
    return out if places is None else spread(out, places, length)


def _check_length(positions: int, tokens: int) -> None:
    """Raise ValueError for sequences that reach beyond the learned positions; causal queries are among the keys."""
    if not is_traced() and tokens > positions:
        raise ValueError(f"synthesizer_attention: synthetic has {positions} positions, got {tokens} tokens")


def _synthesize(q: Tensor, tables: Sequence[Tensor], place: Tensor, keys: int, options: Options) -> Tensor:
    """Synthetic scores (batch or 1, heads, L, S) of queries (batch, heads, L, K) at positions (L,) or (batch, L)."""
    if options.kind in ("random", "factorized_random"):
        rows = tables[0][:, place.clamp(max=tables[0].shape[1] - 1)]  # in a traced graph padding may lie beyond
        rows = rows.transpose(0, 1) if rows.ndim == 4 else rows.unsqueeze(0)
        return rows[..., :keys] if len(tables) == 1 else rows @ tables[1][..., :keys]
    active = q.relu() if options.activation == "relu" else q
    if options.kind == "dense":
        scores = active @ tables[0]
        if len(tables) > 1:
            scores = scores + (tables[1].unsqueeze(1) if tables[1].ndim == 2 else tables[1])
        if options.lra_reshape:
            scores = scores.transpose(1, 2).reshape(scores.shape)
        return scores[..., :keys]
    A, B = (active @ table for table in tables)
    if options.tiling == "outer":
        return (A.unsqueeze(-1) * B.unsqueeze(-2)).flatten(-2)[..., :keys]
    j = torch.arange(keys, device=q.device)
    return A[..., j % A.shape[-1]] * B[..., j % B.shape[-1]]


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
    tables = _check_synthetic("synthesizer_attention", synthetic, options, q)
    keys = len(k)
    active = q.clamp(min=0) if activation == "relu" else q

    def of_dense() -> Tensor:
        weight = tables[0].expand(q.shape[1], -1, -1)
        scores = torch.einsum("ihk,hkj->ihj", active, weight) + (0 if len(tables) == 1 else tables[1])
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


@register(
    "synthesizer",
    operation=synthesizer_attention,
    truth=truth_of(synthesizer_weights),
    rows=rows_of("synthesizer_attention", synthesizer_weights),
    step=synthesizer_attention_step,
    init_state=_state_of,
    source="Tay et al., Synthesizer: Rethinking Self-Attention for Transformer Models, ICML 2021",
    cost="L^2 (K + V)",
    cannot={
        "linear time": "every pair of positions has a score of its own",
        "linear memory": "it builds the matrix of scores",
        "fixed state": "it remembers every key and value",
        "permutation": "it learns scores for each position",
    },
)
class SynthesizerAttention(Attention):
    """Synthesizer (Tay et al., 2021): attention with learned scores, in quadratic time.

    Projections that scores do not depend on are left out: without ``dot_product`` those of keys, and in random kinds
    those of queries.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        max_length: Longest sequence (T); must be given. Shorter ones use the first positions.
        kind: ``"random"``, ``"factorized_random"``, ``"dense"`` or ``"factorized_dense"``, as
            :func:`synthesizer_attention` takes it.
        dot_product: Add the scores of softmax attention. With random tables that is what Long Range Arena's runs have,
            and the default here.
        rank: Columns of the factors of random tables (r); Long Range Arena's code has 32.
        factors: Sizes a and b of the factors of dense scores, with a b at least ``max_length``; near its square root if
            absent.
        activation: As :func:`synthesizer_attention` takes it.
        tiling: Likewise.
        lra_reshape: Likewise.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Attributes:
        tables: The learned tensors, as :func:`synthesizer_attention` takes them.

    Raises:
        ValueError: for sizes that do not fit; when called, for a sequence longer than ``max_length``.

    Example:
        >>> import torch
        >>> from flowformer import SynthesizerAttention
        >>> attention = SynthesizerAttention(dim=64, num_heads=4, max_length=200, kind="dense", dot_product=False)
        >>> attention(torch.randn(2, 150, 64)).shape
        torch.Size([2, 150, 64])
    """

    learns_positions = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int | None = None,
        kind: str = "random",
        dot_product: bool = True,
        rank: int = 32,
        factors: tuple[int, int] | None = None,
        activation: str = "relu",
        tiling: str = "outer",
        lra_reshape: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.options = Options(kind, dot_product, activation, tiling, lra_reshape)
        self.options.check()
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        if max_length is None:
            raise ValueError(
                "SynthesizerAttention: max_length is required, the length of the longest sequence: there are learned "
                "scores for each position"
            )
        check_sizes(max_length=max_length, rank=rank)
        self.max_length, self.rank = max_length, rank
        if lra_reshape and self.causal:
            raise ValueError("SynthesizerAttention: lra_reshape has no causal form: build it with causal=False")
        self.factors = _check_factors(factors, max_length)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self._shapes()
        )
        self._reset_tables()

    def _shapes(self) -> list[tuple[int, ...]]:
        heads, T, width = self.num_heads, self.max_length, self.head_dim
        if self.options.kind == "random":
            return [(heads, T, T)]
        if self.options.kind == "factorized_random":
            return [(heads, T, self.rank), (heads, self.rank, T)]
        if self.options.kind == "dense":
            return [(heads, width, T)]
        return [(heads, width, size) for size in self.factors]

    @property
    def projections(self) -> tuple[str, ...]:
        """Those that scores depend on."""
        if self.options.dot_product:
            return ("q", "k")
        return ("q",) if "dense" in self.options.kind else ()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as a new module has them."""
        super().reset_parameters()
        self._reset_tables()

    def _reset_tables(self) -> None:
        # Deviation 1 / sqrt(rows of a matrix), as Long Range Arena's code draws kernels.
        for table in self.tables:
            nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def learned(self, x: Tensor | None = None) -> tuple[Synthetic]:
        """The table, or the pair of factors."""
        tables = tuple(self.tables)
        return (tables if len(tables) > 1 else tables[0],)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; zeros for those that scores do not depend on."""
        name = f"{type(self).__name__}: inputs"
        v = apply(name, self.v_proj, source)
        q = apply(name, self.q_proj, x) if "q" in self.projections else v.new_zeros(*x.shape[:-1], v.shape[-1])
        k = apply(name, self.k_proj, source) if "k" in self.projections else torch.zeros_like(v)
        return q, k, v

    @property
    def _convs(self) -> tuple[ShortConv, ShortConv, ShortConv]:
        """Those of values stand in for those that there are not: what they would convolve is of no consequence."""
        q, k = (getattr(self, f"{name}_conv" if name in self.projections else "v_conv") for name in "qk")
        return q, k, self.v_conv

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, max_length={self.max_length}, kind={self.options.kind}"


def _check_factors(factors: Any, positions: int) -> tuple[int, int]:
    """Return sizes whose product is at least ``positions``, and raise for others."""
    if factors is None:
        first = math.isqrt(positions - 1) + 1
        return first, -(-positions // first)
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise ValueError(f"factors must be two sizes, got {factors!r}")
    first, second = factors
    check_sizes(**{"factors[0]": first, "factors[1]": second})
    if first * second < positions:
        raise ValueError(f"the product of factors must be at least max_length, {positions}, got {first} x {second}")
    return first, second
