r"""Longformer: softmax over a sliding window, and a few global tokens that see all and are seen by all.

With a window of w tokens and a set G of global tokens (Beltagy et al., 2020, section 3.1):

    out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j       over j with |i - j| <= w / 2 or j in G, for i not in G
    out_i = sum_j softmax_j(q'_i . k'_j / sqrt(K)) v'_j    over all j, for i in G

q', k' and v' have projections of their own. Causal attention restricts j to j <= i.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowformer.core.banded import BLOCK, Further, attend_all, banded_attention, count_tokens
from flowformer.core.checks import (
    HEADS,
    check_dense,
    check_fresh_state,
    check_integer,
    check_mask,
    check_sizes,
    check_state,
    check_step,
    describe,
)
from flowformer.core.chunks import CHUNK
from flowformer.core.masks import close_up, fill, spread
from flowformer.core.run import Given, check_inputs, run
from flowformer.core.tracing import is_exporting, is_traced, is_transformed
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.local import empty_window, last_tokens, sliding_band, step_window
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = [
    "LongformerAttention", "LongformerState", "init_longformer_state", "longformer_attention",
    "longformer_attention_step",
]  # fmt: skip

WINDOW = 512  # of the published models
LAYOUT = HEADS._replace(self_only="a window requires queries and keys at the same positions")


class LongformerOptions(NamedTuple):
    """Options of Longformer's attention; see :func:`longformer_attention`."""

    window: int = WINDOW
    global_tokens: int = 0
    released: str | None = None

    def check(self, op: str) -> None:
        """Raise for values of another type or out of range."""
        check_sizes(**{f"{op}: window": self.window})
        check_integer(f"{op}: global_tokens", self.global_tokens)
        if self.global_tokens < 0:
            raise ValueError(f"{op}: global_tokens must be at least 0, got {self.global_tokens}")
        if self.released not in (None, "lra"):
            raise ValueError(f"{op}: released must be None or 'lra', got {self.released!r}")

    def sides(self, causal: bool) -> tuple[int, int]:
        """How many tokens are seen before a token, and behind it."""
        half = self.window // 2
        before = self.window - half - 1 if self.released else half
        return before, 0 if causal else half


class LongformerState(NamedTuple):
    """State of the causal form without global tokens, in float64.

    Attributes:
        length: Tokens so far, (batch,), int64.
        key: The last ``window // 2`` keys, (batch, window // 2, heads, K); zeros before the first.
        value: Their values, (batch, window // 2, heads, V).
    """

    length: Tensor
    key: Tensor
    value: Tensor


def init_longformer_state(
    batch: int, heads: int, key_channels: int, value_channels: int, *, dtype: torch.dtype = torch.float32,
    device: Any = None, **options: Any,
) -> LongformerState:  # fmt: skip
    """Return the state before the first token, in float64 for inputs of any ``dtype``; options as of the operation."""
    op = "init_longformer_state"
    check_fresh_state(op, batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels)
    chosen = LongformerOptions(**options)
    chosen.check(op)
    _check_state_use(op, chosen.global_tokens > 0)
    return LongformerState(*empty_window(batch, chosen.sides(True)[0], heads, key_channels, value_channels, device))


def _check_state_use(op: str, has_global: bool) -> None:
    if has_global:
        raise ValueError(f"{op}: there is no state with global tokens: later tokens would change what they have seen")


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LongformerState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    window: int = WINDOW,
    global_tokens: int = 0,
    released: str | None = None,
) -> Tensor | tuple[Tensor, LongformerState]:
    """Softmax attention over a sliding window and global tokens (Beltagy et al., 2020).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, L, heads, K).
        v: Values (batch, L, heads, V).
        q_global: Queries of global tokens, as q; those of other tokens are not used. Absent for q.
        k_global: The keys that global tokens see, as k. Absent for k.
        v_global: Their values, as v. Absent for v.
        global_mask: Which tokens are global, (batch, L) boolean. Absent for ``global_tokens``.
        causal: Output t sees positions up to t only. Not in the published model; as in its authors' and Long Range
            Arena's code.
        mask: (batch, L) boolean, True = real token. Positions count real tokens only.
        context_mask: Refused: this is self-attention only. Here so that mechanisms are exchangeable.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal, without global tokens); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal, without global tokens).
        backend: ``"auto"`` or ``"torch"``.
        window: w; each token sees ``window // 2`` tokens before it and as many behind it.
        global_tokens: Number of the first tokens of each sequence that are global.
        released: ``"lra"`` for the window of Long Range Arena: ``window - window // 2 - 1`` tokens before a token and
            ``window // 2`` behind it, one less before it where the window is even.

    Returns:
        Output (batch, L, heads, V), zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "longformer_attention"
    options = LongformerOptions(window, global_tokens, released)
    options.check(op)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    own = _check_global(op, given, q_global, k_global, v_global, global_mask)
    has_global = global_mask is not None or global_tokens > 0
    if causal and (return_state or initial_state is not None):
        _check_state_use(op, has_global)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Any, state: Any, *of_tokens: Tensor) -> Any:
        before = None if initial_state is None else state
        return _longformer((q, k, v, *of_tokens), key, causal, before, state if return_state else None, options)

    def fresh(batch: int) -> LongformerState | None:
        if has_global:
            return None
        sizes = batch, q.shape[2], q.shape[3], v.shape[3]
        return init_longformer_state(*sizes, device=q.device, **options._asdict())

    # A state is as long as the window, however short the sequence: there is none where it is not asked for.
    has_state = initial_state is not None or return_state is not False
    return run(op, given, dense, layout=LAYOUT, init_state=fresh if has_state else None, of_tokens=own)


def _check_global(op: str, given: Given, *own: Tensor | None) -> tuple[Tensor, ...]:
    """What else there is of tokens: queries, keys and values of global tokens, and which they are."""
    if all(part is None for part in own):
        return ()
    check_inputs(op, given, LAYOUT)
    names = ("q_global", "k_global", "v_global")
    for name, part, like in zip(names, own, given[:3], strict=False):
        wanted = describe(like)
        check_dense(f"{op}: {name}", part)
        if part is not None and (not isinstance(part, Tensor) or describe(part) != wanted):
            raise (ValueError if isinstance(part, Tensor) else TypeError)(
                f"{op}: {name} must be {wanted} like {name[0]}, got {describe(part)}"
            )
    if own[3] is not None:
        check_mask(f"{op}: global_mask", own[3], given.q.shape[:2], given.q.device)
    parts = [like if part is None else part for part, like in zip(own, given[:3], strict=False)]
    return tuple(parts) if own[3] is None else (*parts, own[3])


def _longformer(
    tensors: tuple[Tensor, ...],
    mask: Tensor | None,
    causal: bool,
    before: LongformerState | None,
    start: LongformerState | None,
    options: LongformerOptions,
) -> tuple[Tensor, LongformerState | None]:
    """The output, and where there is a ``start`` the state after it; ``before`` is what is looked back at."""
    length, dtype, places = tensors[0].shape[1], tensors[0].dtype, None
    if mask is not None:
        tensors = tuple(fill(x, mask) for x in tensors)
        closed, mask, places = close_up(tensors, mask)
        tensors = tuple(closed)
    q, k, v, *own = tensors
    width = q.shape[1]
    ends = count_tokens(q, mask)
    after = None if start is None else last_tokens(start, k, v, ends)
    members = _members(own[3] if len(own) > 3 else None, options.global_tokens, ends, width)
    (back, ahead), most = options.sides(causal), ends.view(-1, 1, 1, 1, 1)
    first: Any = 0
    reach = (back, ahead) if is_exporting() or before is not None else (min(back, width), min(ahead, width))
    band = sliding_band(width, *reach, CHUNK)
    if before is not None:
        keys, values = (torch.cat([old.to(new.dtype), new], 1) for old, new in ((before.key, k), (before.value, v)))
        first, band = before.length.view(-1, 1, 1, 1, 1), band._replace(past=back)
    else:
        keys, values = k, v

    def near(i: Tensor, j: Tensor) -> Tensor:
        return (i - j <= back) & (j - i <= ahead) & (j >= -first) & (j < most)

    def far(i: Tensor, j: Tensor) -> Tensor:
        seen = (i - j > back) | (j - i > ahead)
        return seen & (j <= i) if causal else seen

    further = None if members is None else Further(members[:, None, None], far)
    out = banded_attention(q, keys, values, band._replace(seen=near), further, size=BLOCK).out
    if members is not None:
        out = _replace_global(out, own[:3] or (q, k, v), members, ends, causal)
    out = fill(out, mask).to(dtype)
    return (out if places is None else spread(out, places, length)), after


def _members(chosen: Tensor | None, count: int, ends: Tensor, width: int) -> Tensor | None:
    """Places of global tokens, (batch, n) with -1 for none; ``None`` where there are none at all."""
    place = torch.arange(width, device=ends.device)
    if chosen is None:
        if not count:
            return None
        place = place[:count].expand(ends.shape[0], -1)
        return place.masked_fill(place >= ends.unsqueeze(1), -1)
    chosen = chosen & (place < ends.unsqueeze(1))
    order = torch.where(chosen, place, width).sort(1).values
    if not (is_traced() or is_transformed()):
        order = order[:, : int(chosen.sum(1).max()) if len(chosen) else 0]
    return order.masked_fill(order == width, -1) if order.shape[1] else None


def _replace_global(out: Tensor, own: Any, members: Tensor, ends: Tensor, causal: bool) -> Tensor:
    """Outputs (batch, L, heads, V), with those of global tokens over all keys."""
    q, k, v = own
    rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1)
    place = torch.arange(q.shape[1], device=q.device)
    seen = (place < ends.view(-1, 1, 1, 1)).expand(-1, 1, members.shape[1], -1)
    if causal:
        seen = seen & (place <= members[:, None, :, None])
    found = attend_all(q[rows, members.clamp(min=0)], k, v, seen)
    # A row more takes what is of no token.
    goals = torch.where(members < 0, q.shape[1], members)[..., None, None].expand_as(found)
    return torch.cat([out, torch.zeros_like(out[:, :1])], 1).scatter(1, goals, found)[:, :-1]


def longformer_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: LongformerState,
    *,
    window: int = WINDOW,
    global_tokens: int = 0,
    released: str | None = None,
) -> tuple[Tensor, LongformerState]:
    """Compute one token of the causal form, in time and memory proportional to the window.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        window: As in :func:`longformer_attention`, like all that follow.
        global_tokens: Likewise; must be 0.
        released: Likewise.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "longformer_attention_step"
    options = LongformerOptions(window, global_tokens, released)
    options.check(op)
    _check_state_use(op, global_tokens > 0)
    check_step(op, q, k, v, state, LongformerState)
    sizes = (q.shape[0], q.shape[1], q.shape[2], v.shape[2])
    check_state(op, state, init_longformer_state(*sizes, device=q.device, **options._asdict()))
    return step_window(q, k, v, state, lambda i, j: j <= i)


# ------------------------------------------------------------------------------------------------------- the reference


def longformer_weights(
    q: Tensor,
    k: Tensor,
    q_global: Tensor | None = None,
    k_global: Tensor | None = None,
    v_global: Tensor | None = None,
    global_mask: Tensor | None = None,
    *,
    causal: bool = False,
    window: int = WINDOW,
    global_tokens: int = 0,
    released: str | None = None,
) -> Rows:
    """Return rows of softmax over what each token of one sequence sees, in float64."""
    place = torch.arange(len(k), device=k.device)
    is_global = place < global_tokens if global_mask is None else global_mask > 0
    before = window - window // 2 - 1 if released else window // 2
    of_global = (q if q_global is None else q_global), (k if k_global is None else k_global)

    def rows(places: Tensor) -> Tensor:
        i = places.unsqueeze(1)
        near = (place >= i - before) & (place <= i + window // 2)
        chosen = is_global[places].unsqueeze(1)
        scores, others = (
            torch.einsum("ihk,jhk->hij", x[places], y) / q.shape[-1] ** 0.5 for x, y in ((q, k), of_global)
        )
        scores = torch.where(chosen, others, scores.masked_fill(~(near | is_global), -torch.inf))
        return (lower(scores, places, -torch.inf) if causal else scores).softmax(-1)

    return rows


def _of_sequence(learned: tuple[Any, ...], row: int, places: Tensor) -> tuple[Any, ...]:
    return tuple(None if part is None else part[row, places] for part in learned)


_plain_truth = truth_of(longformer_weights, of_sequence=_of_sequence)


def longformer_truth(q: Tensor, k: Tensor, v: Tensor, *own: Tensor | None, **options: Any) -> Tensor:
    """Return the float64 reference: rows of weights times values, or times ``v_global`` for global tokens."""
    out = _plain_truth(q, k, v, *own, **options)
    if len(own) < 3 or own[2] is None:
        return out
    chosen = own[3] if len(own) > 3 else None
    if chosen is None:
        chosen = _ranks(q, options.get("mask"), options.get("cu_seqlens")) < options.get("global_tokens", 0)
    return torch.where(chosen[..., None, None], _plain_truth(q, k, own[2], *own, **options), out)


def _ranks(q: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """Position of each token among the real ones of its sequence."""
    place = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
    if cu_seqlens is not None:
        starts = cu_seqlens.long()
        return place - starts[torch.searchsorted(starts, place.contiguous(), right=True) - 1]
    return place if mask is None else mask.cumsum(1) - 1


def _state_of(*sizes: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> LongformerState:
    return init_longformer_state(*sizes[:4], dtype=dtype, device=device, **options)


@register(
    "longformer",
    operation=longformer_attention,
    truth=longformer_truth,
    rows=rows_of("longformer_attention", longformer_weights, LAYOUT, of_sequence=_of_sequence),
    step=longformer_attention_step,
    init_state=_state_of,
    source="Beltagy et al., Longformer: the long-document transformer, 2020",
    cost="L w (K + V)",
    layout=LAYOUT,
    cannot={"permutation": "tokens see their neighbours"},
)
class LongformerAttention(Attention):
    """Longformer's attention (Beltagy et al., 2020): a sliding window and global tokens, in linear time.

    With global tokens, they have projections of their own: ``q_global_proj``, ``k_global_proj``, ``v_global_proj``.
    :func:`flowformer.mechanisms.maps.attention_rows` of a global token are weights of the values of the last.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        window: Tokens of the window, half of them on either side.
        global_tokens: Number of the first tokens of each sequence that are global; a causal module with them has no
            state.
        released: As in :func:`longformer_attention`.
        **options: As :class:`flowformer.mechanisms.Attention` takes them; ``conv`` without global tokens only.

    Raises:
        TypeError, ValueError: for invalid options.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        window: int = WINDOW,
        global_tokens: int = 0,
        released: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.options = LongformerOptions(window, global_tokens, released)
        self.options.check("Longformer attention")
        if global_tokens and self.conv:
            raise ValueError(f"Longformer attention: conv must be 0 with global tokens, got {self.conv}")
        if global_tokens:
            like = self.q_proj.weight
            sizes = {"bias": self.q_proj.bias is not None, "device": like.device, "dtype": like.dtype}
            for name in GLOBAL_PROJECTIONS:
                self.add_module(name, nn.Linear(dim, self.num_heads * self.head_dim, **sizes))

    def reset_parameters(self) -> None:
        """Re-initialize all parameters."""
        super().reset_parameters()
        for name in GLOBAL_PROJECTIONS if self.options.global_tokens else ():
            self.get_submodule(name).reset_parameters()  # pyright: ignore[reportCallIssue] - it is a Linear

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Queries, keys and values of global tokens, for the inputs x."""
        if x is None or not self.options.global_tokens:
            return ()
        return tuple(self.split(self.get_submodule(name)(x)) for name in GLOBAL_PROJECTIONS)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()


GLOBAL_PROJECTIONS = ("q_global_proj", "k_global_proj", "v_global_proj")
