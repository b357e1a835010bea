r"""Local attention: softmax over the keys of a token's own block and of its neighbours, in linear time.

The sequence is cut into blocks of w tokens, and token i sees the keys of its block b(i) = floor(i / w) and of the
blocks around it:

    out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j    over b(i) - look_backward <= b(j) <= b(i) + look_forward

With ``exact_window``, each token has a window of its own instead, i - j <= w look_backward and j - i <= w look_forward.
Causal attention restricts j to j <= i. Source: Parmar et al., "Image Transformer", 2018; options and their defaults are
those of the package local-attention (1.11), without rotary positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowformer.core.banded import BLOCK, Band, attend_all, banded_attention, count_tokens
from flowformer.core.checks import (
    HEADS,
    LARGEST_SIZE,
    check_flag,
    check_fresh_state,
    check_integer,
    check_sizes,
    check_state,
    check_step,
)
from flowformer.core.chunks import CHUNK
from flowformer.core.masks import close_up, fill, spread
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, run
from flowformer.core.tracing import is_exporting
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = ["LocalAttention", "LocalState", "init_local_state", "local_attention", "local_attention_step"]

WINDOW = 64
SMALLEST = 16  # queries of a block, where windows are smaller
LAYOUT = HEADS._replace(self_only="a window requires queries and keys at the same positions")
RELEASED = ("local-attention", "lra")


class LocalOptions(NamedTuple):
    """Options of local attention; see :func:`local_attention`."""

    window: int = WINDOW
    look_backward: int = 1
    look_forward: int | None = None
    exact_window: bool = False
    released: str | None = None

    def check(self, op: str, causal: bool) -> None:
        """Raise for values of another type or out of range."""
        check_sizes(**{f"{op}: window": self.window})
        ahead = 0 if self.look_forward is None else self.look_forward
        for name, value in (("look_backward", self.look_backward), ("look_forward", ahead)):
            check_integer(f"{op}: {name}", value)
            if not 0 <= value <= LARGEST_SIZE:
                raise ValueError(f"{op}: {name} must be at least 0 and at most {LARGEST_SIZE}, got {value}")
        if causal and self.look_forward:
            raise ValueError(f"{op}: look_forward must be 0 or None in the causal form, got {self.look_forward}")
        check_flag(f"{op}: exact_window", self.exact_window)
        if self.released not in (None, *RELEASED):
            raise ValueError(f"{op}: released must be None or one of {', '.join(RELEASED)}, got {self.released!r}")
        if self.released == "lra" and causal:
            raise ValueError(f"{op}: released='lra' has no causal form, got causal=True")

    def forward(self, causal: bool) -> int:
        """Blocks that are seen ahead."""
        if self.look_forward is None:
            return 0 if causal else 1
        return self.look_forward

    @property
    def reach(self) -> int:
        """How far back a token may see."""
        return self.look_backward * self.window + (0 if self.exact_window else self.window - 1)

    def sees(self, i: Tensor, j: Tensor, causal: bool) -> Tensor:
        """Which queries at positions i see which keys at positions j."""
        ahead = self.forward(causal)
        apart = i - j if self.exact_window else _block(i, self.window) - _block(j, self.window)
        step = self.window if self.exact_window else 1
        seen = (apart <= self.look_backward * step) & (apart >= -ahead * step)
        return seen & (j <= i) if causal else seen


def _block(i: Tensor, window: int) -> Tensor:
    return i.div(window, rounding_mode="floor")


class LocalState(NamedTuple):
    """State of causal local attention, in float64.

    Attributes:
        length: Tokens so far, (batch,), int64.
        key: The last keys that a later token can see, (batch, reach, heads, K) with reach = (look_backward + 1) window
            - 1, or look_backward window with ``exact_window``; zeros before the first.
        value: Their values, (batch, reach, heads, V).
    """

    length: Tensor
    key: Tensor
    value: Tensor


def init_local_state(
    batch: int, heads: int, key_channels: int, value_channels: int, *, dtype: torch.dtype = torch.float32,
    device: Any = None, **options: Any,
) -> LocalState:  # fmt: skip
    """Return the state before the first token, in float64 for inputs of any ``dtype``; options as of the operation."""
    op = "init_local_state"
    check_fresh_state(op, batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels)
    chosen = LocalOptions(**options)
    chosen.check(op, True)
    return LocalState(*empty_window(batch, chosen.reach, heads, key_channels, value_channels, device))


def empty_window(
    batch: int, reach: int, heads: int, key_channels: int, value_channels: int, device: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a count of tokens, 0, and the last ``reach`` keys and values before the first token: zeros in float64."""
    device = torch.device("cpu") if device is None else torch.device(device)
    key = torch.zeros(batch, reach, heads, key_channels, dtype=state_dtype(device), device=device)
    length = torch.zeros(batch, dtype=torch.int64, device=device)
    return length, key, key.new_zeros(*key.shape[:3], value_channels)


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LocalState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    window: int = WINDOW,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    released: str | None = None,
) -> Tensor | tuple[Tensor, LocalState]:
    """Softmax attention within a block of tokens and the blocks around it.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, L, heads, K).
        v: Values (batch, L, heads, V).
        causal: Output t sees positions up to t only.
        mask: (batch, L) boolean, True = real token. Positions, and so blocks, count real tokens only.
        context_mask: Refused: this is self-attention only. Here so that mechanisms are exchangeable.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        window: w, tokens of a block.
        look_backward: Blocks before a token's own that it sees.
        look_forward: Blocks after it; ``None`` for 1, and 0 where causal.
        exact_window: Each token sees ``look_backward * window`` tokens before it and ``look_forward * window`` after
            it, instead of whole blocks.
        released: Reproduce released code, for comparisons with published numbers: ``"local-attention"``, where zeros
            up to the next multiple of the window count as keys (its ``autopad`` without a mask; refused with one), or
            ``"lra"``, which ignores the three options before, see :func:`_released_in_lra`.

    Returns:
        Output (batch, L, heads, V), zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "local_attention"
    options = LocalOptions(window, look_backward, look_forward, exact_window, released)
    options.check(op, causal is True)  # what it is else is refused with the tensors
    if released == "local-attention" and (mask is not None or cu_seqlens is not None):
        raise ValueError(
            f"{op}: released='local-attention' takes neither mask nor cu_seqlens: with a mask, that package hides the "
            "zeros too, as released=None does"
        )
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        if released == "lra":
            return _released_in_lra(q, k, v, key, window), None
        before = None if initial_state is None else state
        return _local(q, k, v, key, causal, before, state if return_state else None, options)

    def fresh(batch: int) -> LocalState:
        return init_local_state(batch, q.shape[2], q.shape[3], v.shape[3], device=q.device, **options._asdict())

    # A state is as long as the window, however short the sequence: there is none where it is not asked for.
    has_state = initial_state is not None or return_state is not False
    return run(op, given, dense, layout=LAYOUT, apart=released is not None, init_state=fresh if has_state else None)


def _local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    before: LocalState | None,
    start: LocalState | None,
    options: LocalOptions,
) -> tuple[Tensor, LocalState | None]:
    """The output, and where there is a ``start`` the state after it; ``before`` is what is looked back at."""
    length, dtype, places = q.shape[1], q.dtype, None
    q, k, v = (fill(x, mask) for x in (q, k, v))
    if mask is not None:
        (q, k, v), mask, places = close_up((q, k, v), mask)
    width = q.shape[1]
    ends = count_tokens(q, mask)
    after = None if start is None else last_tokens(start, k, v, ends)
    most = _at_most(width, options.window) if options.released else ends.view(-1, 1, 1, 1, 1)
    first: Any = 0
    band = _blocks(width, causal, options)
    if before is not None:
        k, v = (torch.cat([old.to(new.dtype), new], 1) for old, new in ((before.key, k), (before.value, v)))
        first = before.length.view(-1, 1, 1, 1, 1)
        band = sliding_band(width, options.reach, 0, CHUNK)._replace(past=options.reach)

    def seen(i: Tensor, j: Tensor) -> Tensor:
        return options.sees(i + first, j + first, causal) & (j >= -first) & (j < most)

    out = banded_attention(q, k, v, band._replace(seen=seen), size=BLOCK).out
    out = fill(out, mask).to(dtype)
    return (out if places is None else spread(out, places, length)), after


def _at_most(length: int, window: int) -> int:
    return -(-length // window) * window


def _blocks(length: int, causal: bool, options: LocalOptions) -> Band:
    """The windows of a sequence from its first token on."""
    window, back, ahead = options.window, options.look_backward, options.forward(causal)
    if not is_exporting():  # no further than there are tokens
        back, ahead = (min(blocks, -(-length // window)) for blocks in (back, ahead))
    if options.exact_window:
        reach = (blocks * window if is_exporting() else min(blocks * window, length) for blocks in (back, ahead))
        return sliding_band(length, *reach, CHUNK)
    # Windows of few tokens are put together: small matrices are slow.
    count = max(1, min(SMALLEST, CHUNK) // window)
    if not is_exporting() and length <= count * window and not options.released:
        return Band(length, 0, 0, None)
    return Band(count * window, -(-back // count), -(-ahead // count), None)


def sliding_band(length: int, back: int, ahead: int, chunk: int) -> Band:
    """Return windows of the keys from ``back`` tokens before each query to ``ahead`` behind; chunk: queries at most."""
    block = min(chunk, max(SMALLEST, back, ahead))
    block = block if is_exporting() else min(block, length)
    return Band(block, -(-back // block), -(-ahead // block), None)


def last_tokens(state: Any, k: Tensor, v: Tensor, ends: Tensor) -> Any:
    """Return the state (length, key, value) after the first ``ends`` (batch,) of the keys and values."""
    length, *recent = state
    places = ends.unsqueeze(1) + torch.arange(recent[0].shape[1], device=k.device)
    rows = torch.arange(k.shape[0], device=k.device).unsqueeze(1)
    key, value = (torch.cat([old, new.to(old.dtype)], 1)[rows, places] for old, new in zip(recent, (k, v), strict=True))
    return type(state)(length + ends, key, value)


def step_window(q: Tensor, k: Tensor, v: Tensor, state: Any, sees: Callable[..., Tensor]) -> tuple[Tensor, Any]:
    """Return the output of one token, which sees the last tokens of a state and itself, and the state after it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State (length, key, value) before the token.
        sees: Which keys at positions j (batch, n) a query at position i (batch, 1) sees.
    """
    length, *recent = state
    key, value = (torch.cat([old, new.to(old.dtype).unsqueeze(1)], 1) for old, new in zip(recent, (k, v), strict=True))
    i, reach = length.unsqueeze(1), recent[0].shape[1]
    j = i - reach + torch.arange(reach + 1, device=q.device)
    seen = sees(i, j) & (j >= 0)
    out = attend_all(q.to(key.dtype).unsqueeze(1), key, value, seen[:, None, None])
    return out.squeeze(1).to(v.dtype), type(state)(length + 1, key[:, 1:], value[:, 1:])


def _released_in_lra(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, window: int) -> Tensor:
    """What Long Range Arena's "local attention" computes, google-research/long-range-arena cd31e5c.

    Zeros are appended up to the next multiple of the window, a whole window where the length is one, and count as
    keys. Of the n windows of the sequence, token i sees the tokens i mod n, one of each n: a stride and no
    neighbourhood. The mask is cut into windows, and so belongs to other tokens; a query that it hides sees all tokens
    of its stride, and its output is not zero.
    """
    length = q.shape[1]
    blocks = length // window + 1
    added = blocks * window - length
    compute = sum_dtype(q.dtype)
    with no_autocast(q.device):
        # (batch, blocks, heads, window, channels): token a n + b at [b, :, a].
        Q, K, V = (
            pad(x.to(compute), (0, 0, 0, 0, 0, added)).unflatten(1, (window, blocks)).permute(0, 2, 3, 1, 4)
            for x in (q, k, v)
        )
        scores = Q @ K.mT / q.shape[-1] ** 0.5
        if mask is not None:
            real = pad(mask, (0, added), value=True).view(-1, blocks, 1, window)
            both = real.unsqueeze(-1) & real.unsqueeze(-2)
            scores = scores + torch.zeros_like(both, dtype=compute).masked_fill(~both, -1e10)  # as released
        out = scores.softmax(-1) @ V
        return out.permute(0, 3, 1, 2, 4).flatten(1, 2)[:, :length].to(q.dtype)


def local_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LocalState,
    *,
    window: int = WINDOW,
    look_backward: int = 1,
    look_forward: int | None = None,
    exact_window: bool = False,
    released: str | None = None,
) -> tuple[Tensor, LocalState]:
    """Compute one token of causal local attention, in time and memory proportional to the window.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        window: As in :func:`local_attention`, like all that follow.
        look_backward: Likewise.
        look_forward: Likewise.
        exact_window: Likewise.
        released: Likewise.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "local_attention_step"
    options = LocalOptions(window, look_backward, look_forward, exact_window, released)
    options.check(op, True)
    check_step(op, q, k, v, state, LocalState)
    sizes = (q.shape[0], q.shape[1], q.shape[2], v.shape[2])
    check_state(op, state, init_local_state(*sizes, device=q.device, **options._asdict()))
    return step_window(q, k, v, state, lambda i, j: options.sees(i, j, True))


def local_weights(q: Tensor, k: Tensor, *, causal: bool = False, **options: Any) -> Rows:
    """Return rows softmax_j(q_i . k_j / sqrt(K)) over the tokens j that token i of one sequence sees, in float64."""
    chosen = LocalOptions(**options)
    length, window = len(k), chosen.window
    back, ahead = chosen.look_backward * window, chosen.forward(causal) * window
    blocks = 1
    if chosen.released:
        blocks = length // window + 1 if chosen.released == "lra" else -(-length // window)
        k = torch.cat([k, k.new_zeros(blocks * window - length, *k.shape[1:])])

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], k) / q.shape[-1] ** 0.5
        i, j = places.unsqueeze(1), torch.arange(len(k), device=k.device)
        if chosen.released == "lra":
            hidden = (i - j) % blocks != 0
        else:
            first = i if chosen.exact_window else i - i % window
            last = i if chosen.exact_window else first + window - 1
            hidden = (j < first - back) | (j > last + ahead)
        scores = scores.masked_fill(hidden, -torch.inf)
        scores = lower(scores, places, -torch.inf) if causal else scores
        return scores.softmax(-1)[..., :length]

    return rows


def _state_of(*sizes: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> LocalState:
    return init_local_state(*sizes, dtype=dtype, device=device, **options)


@register(
    "local",
    operation=local_attention,
    truth=truth_of(local_weights),
    rows=rows_of("local_attention", local_weights, LAYOUT),
    step=local_attention_step,
    init_state=_state_of,
    source="Parmar et al., Image Transformer, ICML 2018",
    cost="L w (K + V)",
    layout=LAYOUT,
    cannot={"permutation": "tokens see their neighbours"},
)
class LocalAttention(Attention):
    """Softmax attention within blocks of tokens and their neighbours (Parmar et al., 2018), in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        window: Tokens of a block.
        look_backward: Blocks before a token's own that it sees.
        look_forward: Blocks after it; 1 if absent, and 0 where causal.
        exact_window: A window around each token instead of blocks, see :func:`local_attention`.
        released: Reproduce released code, see :func:`local_attention`.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Raises:
        TypeError, ValueError: for invalid options.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = WINDOW,
        look_backward: int = 1,
        look_forward: int | None = None,
        exact_window: bool = False,
        released: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.options = LocalOptions(window, look_backward, look_forward, exact_window, released)
        self.options.check("local attention", self.causal)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()
