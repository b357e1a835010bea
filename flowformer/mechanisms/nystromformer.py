r"""Nystromformer: softmax attention by way of landmarks, by the method of Nystrom.

Source: Xiong et al., "Nystromformer: A Nystrom-Based Algorithm for Approximating Self-Attention", AAAI 2021. Landmarks
Q~ and K~ are means of m segments of the queries and keys. With s = 1 / sqrt(K),

    out = softmax(s Q K~^T) Z softmax(s Q~ K^T) V,    Z ~ pinv(A),    A = softmax(s Q~ K~^T)
    Z <- Z (13 I - A Z (15 I - A Z (7 I - A Z))) / 4,                 six times, from A^T / (largest column sum of A)

where each softmax is over keys. A sequence of m tokens or fewer is its own landmarks, and gets softmax attention.
A depthwise convolution of the values may be added: :mod:`flowformer.mechanisms.value_conv`.

Here segments are of the real tokens, of nearly equal length, and Z starts anew for each sequence and head, so that
padding and other sequences do not change a result. The published code is met by options: ``segments="positions"`` and
``start="batch"`` for that of the authors, ``segments="front"`` and ``start="batch"`` for nystrom-attention on PyPI.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.core.checks import Layout, check_bidirectional, check_choice, check_sizes
from flowformer.core.masks import close_up_if, fill, spread
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, run
from flowformer.core.segments import segment_means, with_means
from flowformer.core.sums import CHANNELS_FIRST, TOKENS_FIRST, sum_over_tokens, times_sum
from flowformer.core.tracing import frame, is_traced
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.inverses import pseudo_inverse
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.value_conv import check_filters, check_value_conv, convolve_values, filter_rows
from flowformer.mechanisms.weights import Rows, rows_of, truth_of

__all__ = ["NystromformerAttention", "nystromformer_attention"]

NO_CAUSAL_FORM = "its landmarks are means of tokens of the whole sequence"
LAYOUT = Layout(self_only="the landmarks of queries and keys are of the same segments")
SEGMENTS, STARTS = ("tokens", "positions", "front"), ("matrix", "batch")
COUNT_EPS = 1e-8  # added to the tokens of a segment by nystrom-attention


class Landmarks(NamedTuple):
    """Landmarks of queries and keys.

    Attributes:
        q: Means of queries (batch, heads, m, K).
        k: Means of keys (batch, heads, m, K).
        used: Which landmarks there are, (batch, m); ``None`` for all.
        exact: In which rows they are the tokens themselves, (batch, 1, 1, 1); ``None`` for none. There, attention to
            landmarks is attention itself.
    """

    q: Tensor
    k: Tensor
    used: Tensor | None
    exact: Tensor | None


def nystromformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    filters: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: None = None,
    return_state: bool = False,
    backend: str = "auto",
    num_landmarks: int = 64,
    iterations: int = 6,
    value_conv: int = 0,
    segments: str = "tokens",
    start: str = "matrix",
) -> Tensor:
    """Nystromformer (Xiong et al., 2021), in time and memory linear in length.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, L, heads, K).
        v: Values (batch, L, heads, V).
        filters: Of the convolution of values, (heads, value_conv); absent without one.
        causal: There is no causal form.
        mask: (batch, L) boolean, True = real token.
        context_mask: Not taken: this is self-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: There is no state.
        return_state: Likewise.
        backend: ``"auto"`` or ``"torch"``.
        num_landmarks: m.
        iterations: Steps towards the pseudo-inverse.
        value_conv: Width of the convolution of values, odd; 0 for none.
        segments: ``"tokens"``: landmarks are means of segments of the real tokens, of nearly equal length. As released
            by the authors, ``"positions"``: segments of L / m positions, where padding counts as zeros; m must divide
            L, and outputs at padding are not set to zero. As in nystrom-attention, ``"front"``: zeros before the first
            token fill up the length to a multiple of m, means are of the real tokens of L / m positions, and outputs
            at padding are not set to zero.
        start: ``"matrix"``: the pseudo-inverse of each sequence and head starts by its own largest column sum. As
            released, ``"batch"``: by the largest of the whole batch, so that a result depends on other sequences.

    Returns:
        Output (batch, L, heads, V).

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "nystromformer_attention"
    check_bidirectional(op, causal, NO_CAUSAL_FORM)
    _check_options(f"{op}: ", num_landmarks, iterations, segments, start)
    attend = {"tokens": _by_tokens, "positions": _by_positions, "front": _from_the_front}[segments]

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: None) -> Any:
        with no_autocast(q.device):
            Q, K, V = (fill(x, query).to(sum_dtype(x.dtype)) for x in (q, k, v))
            taps = check_filters(op, filters, value_conv, v.shape[2], V)
            out = attend(Q, K, V, query, taps, num_landmarks, iterations, start == "batch")
            return out.to(v.dtype).contiguous(), None

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run(op, given, dense, layout=LAYOUT, apart=segments != "tokens" or start == "batch")


def _check_options(of: str, num_landmarks: int, iterations: int, segments: str, start: str) -> None:
    check_sizes(**{f"{of}num_landmarks": num_landmarks, f"{of}iterations": iterations})
    check_choice(f"{of}segments", segments, SEGMENTS)
    check_choice(f"{of}start", start, STARTS)


# --------------------------------------------------------------------------------------------- what landmarks are of


def _by_tokens(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, taps: Tensor | None, m: int, *how: Any) -> Tensor:
    """Segments of the real tokens."""
    length = q.shape[1]
    (q, k, v), real, places = close_up_if((q, k, v), mask)
    m = min(m, q.shape[1])
    (q, of_queries, used), (k, of_keys, _) = (_with_means(x, m, real) for x in (q, k))
    counts = q.new_full((len(q),), q.shape[1]) if real is None else real.sum(1)
    exact = None if real is None and m < q.shape[1] else (counts <= m).view(-1, 1, 1, 1)
    landmarks = Landmarks(of_queries.transpose(1, 2), of_keys.transpose(1, 2), used, exact)
    out = fill(_attend(q, k, v, real, landmarks, taps, *how), real)
    return out if places is None else spread(out, places, length)


def _with_means(x: Tensor, m: int, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Tokens, the means of their segments, and which of these there are."""
    if real is None and not is_traced() and x.shape[1] % m == 0:
        return *with_means(x, m), None
    return x, *segment_means(x, m, real)


def _by_positions(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, taps: Tensor | None, m: int, *how: Any
) -> Tensor:
    """Segments of equally many positions, where padding counts as zeros."""
    if q.shape[1] % m:
        raise ValueError(
            "nystromformer_attention: num_landmarks must divide the length where segments are of positions, got "
            f"{m} and {q.shape[1]}"
        )
    exact = q.new_ones(len(q), 1, 1, 1, dtype=torch.bool) if q.shape[1] == m else None
    return _of_equal(q, k, v, mask, taps, m, exact, *how)


def _of_equal(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, taps: Tensor | None, m: int, exact: Tensor | None, *how: Any
) -> Tensor:
    """Outputs by landmarks that are means of equally many positions, each of which counts."""
    (q, of_queries), (k, of_keys) = (with_means(x, m) for x in (q, k))
    landmarks = Landmarks(of_queries.transpose(1, 2), of_keys.transpose(1, 2), None, exact)
    return _attend(q, k, v, mask, landmarks, taps, *how)


def _from_the_front(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, taps: Tensor | None, m: int, *how: Any
) -> Tensor:
    """Segments of equally many positions after zeros at the front, of the real tokens of each."""
    length, total = q.shape[1], -(-q.shape[1] // m) * m
    if mask is None and total == length and not is_traced():
        return _of_equal(q, k, v, None, taps, m, None, *how)
    if mask is None:
        mask = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device)
    q, k, v, mask = (frame(x, total - length, total) for x in (q, k, v, mask))
    tokens = mask.unflatten(1, (m, -1)).sum(2)
    counts = tokens + COUNT_EPS * (~mask.all()).to(q.dtype)
    of_queries, of_keys = ((x.unflatten(1, (m, -1)).sum(2) / counts[:, :, None, None]).transpose(1, 2) for x in (q, k))
    out = _attend(q, k, v, mask, Landmarks(of_queries, of_keys, tokens > 0, None), taps, *how)
    # Padded queries of other rows have outputs, as released.
    return out[:, total - length :].masked_fill(~mask.any(1).view(-1, 1, 1, 1), 0)


# --------------------------------------------------------------------------------------------------------- attention


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    real: Tensor | None,
    landmarks: Landmarks,
    taps: Tensor | None,
    iterations: int,
    couple: bool,
) -> Tensor:
    """Outputs (batch, L, heads, V).

    Args:
        q: Queries (batch, L, heads, K); zeros at padding.
        k: Keys.
        v: Values.
        real: Which tokens are real, (batch, L).
        landmarks: The landmarks.
        taps: Filters of the convolution of values.
        iterations: Steps towards the pseudo-inverse.
        couple: Whether it starts by the largest column sum of the whole batch.
    """
    Q, K, V = (x.transpose(1, 2) for x in (q, k, v))
    hidden = None if landmarks.used is None else ~landmarks.used[:, None, None, :]

    def of_landmarks(scores: Tensor) -> Tensor:
        return (scores if hidden is None else scores.masked_fill(hidden, -torch.finfo(scores.dtype).max)).softmax(-1)

    # Queries and keys are not scaled, landmarks are.
    scale = q.shape[-1] ** -0.5
    of_queries, of_keys = (x * scale for x in (landmarks.q, landmarks.k))
    # In float64, since the pseudo-inverse is more sensitive than the rest, and autocast leaves its gradients alone.
    wide = state_dtype(q.device)
    A = of_landmarks(of_queries.to(wide) @ landmarks.k.to(wide).mT)
    scores = times_sum(K, of_queries.mT, CHANNELS_FIRST).mT  # (batch, heads, m, L)
    if real is not None:
        scores = scores.masked_fill(~real[:, None, None, :], -torch.finfo(scores.dtype).max)
    of_tokens = sum_over_tokens(scores.softmax(-1).mT, V)
    mixed = (pseudo_inverse(A, landmarks.used, iterations, couple) @ of_tokens.to(wide)).to(q.dtype)
    if landmarks.exact is not None:
        mixed = torch.where(landmarks.exact, V[:, :, : mixed.shape[2]], mixed)
    out = times_sum(of_landmarks(times_sum(Q, of_keys.mT)), mixed, TOKENS_FIRST)
    return (out if taps is None else out + convolve_values(V, taps)).transpose(1, 2)


# --------------------------------------------------------------------------------------------------------- the truth


def nystromformer_weights(
    q: Tensor,
    k: Tensor,
    filters: Tensor | None = None,
    *,
    causal: bool = False,
    num_landmarks: int = 64,
    iterations: int = 6,
    value_conv: int = 0,
    segments: str = "tokens",
    start: str = "matrix",
) -> Rows:
    """Return rows of the product of the three matrices, and of the convolution, of one sequence."""
    check_bidirectional("nystromformer_attention", causal, NO_CAUSAL_FORM)
    if (segments, start) != ("tokens", "matrix"):
        raise ValueError(
            "nystromformer_attention: weights are of segments='tokens' and start='matrix', since those of the released "
            f"code depend on padding and on other sequences, got {segments!r} and {start!r}"
        )
    length, scale = len(k), q.shape[-1] ** -0.5
    m = min(num_landmarks, length)
    cuts = [number * length // m for number in range(m + 1)]
    of_queries, of_keys = (torch.stack([x[a:b].mean(0) for a, b in pairwise(cuts)]) for x in (q, k))

    def attention(to: Tensor, of: Tensor) -> Tensor:
        return (scale * torch.einsum("ihk,jhk->hij", to, of)).softmax(-1)

    A = attention(of_queries, of_keys)
    Z = A.mT / A.sum(1).amax(-1)[:, None, None]
    one = torch.eye(m, dtype=A.dtype, device=A.device)
    for _ in range(iterations):
        Z = Z @ (13 * one - A @ Z @ (15 * one - A @ Z @ (7 * one - A @ Z))) / 4
    taps = check_filters("nystromformer_attention", filters, value_conv, k.shape[1], k)

    def rows(places: Tensor) -> Tensor:
        found = attention(q[places], of_keys)  # where each token is a landmark, attention itself
        found = found if m == length else found @ Z @ attention(of_queries, k)
        return found if taps is None else found + filter_rows(taps, places, length)

    return rows


@register(
    "nystromformer",
    operation=nystromformer_attention,
    truth=truth_of(nystromformer_weights),
    rows=rows_of("nystromformer_attention", nystromformer_weights, LAYOUT),
    source="Xiong et al., Nystromformer, AAAI 2021",
    cost="L landmarks (K + V)",
    layout=LAYOUT,
    cannot={
        "causal": NO_CAUSAL_FORM,
        "permutation": "its landmarks are means of neighbouring tokens",
    },
)
class NystromformerAttention(Attention):
    """Nystromformer (Xiong et al., 2021): softmax attention by way of landmarks, in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        num_landmarks: Landmarks (m). Hugging Face's models have 64; Long Range Arena's runs by the authors 128.
        iterations: Steps towards the pseudo-inverse.
        value_conv: Width of a depthwise convolution of the values that is added, odd; 0 for none. The authors have 35
            on Long Range Arena, Hugging Face's models 65, nystrom-attention 33.
        segments: As :func:`nystromformer_attention` takes it.
        start: Likewise.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Attributes:
        value_filters: (num_heads, value_conv), where there is a convolution.

    Raises:
        ValueError: for sizes that do not fit.

    Example:
        >>> import torch
        >>> from flowformer import NystromformerAttention
        >>> attention = NystromformerAttention(dim=64, num_heads=4, num_landmarks=32)
        >>> attention(torch.randn(2, 1000, 64)).shape
        torch.Size([2, 1000, 64])
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_landmarks: int = 64,
        iterations: int = 6,
        value_conv: int = 0,
        segments: str = "tokens",
        start: str = "matrix",
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        _check_options("", num_landmarks, iterations, segments, start)
        check_value_conv("value_conv", value_conv)
        self.num_landmarks, self.iterations, self.value_conv = num_landmarks, iterations, value_conv
        self.segments, self.start = segments, start
        if value_conv:
            self.value_filters = nn.Parameter(torch.empty(num_heads, value_conv, device=device, dtype=dtype))
            self._reset_filters()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as a new module has them."""
        super().reset_parameters()
        if self.value_conv:
            self._reset_filters()

    def _reset_filters(self) -> None:
        bound = self.value_conv**-0.5  # as torch.nn.Conv2d has it
        nn.init.uniform_(self.value_filters, -bound, bound)

    def learned(self, x: Tensor | None = None) -> tuple[Tensor, ...]:
        """The filters of the convolution, where there is one."""
        return (self.value_filters,) if self.value_conv else ()

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {
            "num_landmarks": self.num_landmarks,
            "iterations": self.iterations,
            "value_conv": self.value_conv,
            "segments": self.segments,
            "start": self.start,
        }
