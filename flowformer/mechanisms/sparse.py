r"""The Sparse Transformer: softmax over nearby tokens and over one token, or a few, of each stride.

Of strides of l tokens, token i sees (Child et al., 2019, section 4.3):

    strided: j with |i - j| < l, and j with (i - j) mod l = 0
    fixed:   j with floor(j / l) = floor(i / l), and j with j mod l >= l - c

and of these, in the causal form, those with j <= i. Both sets share one softmax, out_i = sum_j softmax_j(q_i . k_j /
sqrt(K)) v_j; with ``combine='alternate'``, every other head has one set (of the strided pattern). The time is linear in
L l + L^2 / l, and so L^1.5 with strides of sqrt(L); the memory is linear in L.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.banded import (
    BLOCK,
    Attended,
    Band,
    Further,
    attend_all,
    attend_at_once,
    banded_attention,
    count_tokens,
    join,
)
from flowformer.core.checks import HEADS, check_fresh_state, check_sizes, check_state, check_step
from flowformer.core.chunks import CHUNK
from flowformer.core.masks import close_up, fill, spread
from flowformer.core.precision import no_autocast
from flowformer.core.run import Given, run
from flowformer.core.tracing import count_chunks, cut, frame, is_exporting
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = ["SparseAttention", "SparseState", "init_sparse_state", "sparse_attention", "sparse_attention_step"]

STRIDE = 64
LAYOUT = HEADS._replace(self_only="strides require queries and keys at the same positions")
SMALLEST = 16  # queries of a block, where strides are smaller
CHOICES = {"pattern": ("strided", "fixed"), "combine": ("merged", "alternate"), "released": (None, "lra", "lra-cls")}


class SparseOptions(NamedTuple):
    """Options of sparse attention; see :func:`sparse_attention`."""

    pattern: str = "strided"
    stride: int = STRIDE
    columns: int = 1
    column_sets: int = 1
    combine: str = "merged"
    released: str | None = None

    def check(self, op: str, causal: bool) -> None:
        """Raise for values of another type or out of range."""
        sizes = {name: getattr(self, name) for name in ("stride", "columns", "column_sets")}
        check_sizes(**{f"{op}: {name}": size for name, size in sizes.items()})
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                listed = ", ".join(map(str, choices))
                raise ValueError(f"{op}: {name} must be one of {listed}, got {getattr(self, name)!r}")
        if self.columns * self.column_sets > self.stride:
            raise ValueError(
                f"{op}: columns times column_sets must be at most stride {self.stride}, got {self.columns} times "
                f"{self.column_sets}"
            )
        if self.pattern == "fixed" and self.combine == "alternate":
            raise ValueError(
                f"{op}: combine='alternate' requires pattern='strided': the first tokens see no fixed column"
            )
        if self.released and (self.combine == "alternate" or self.column_sets > 1):
            raise ValueError(
                f"{op}: released={self.released!r} takes combine='merged', column_sets=1, got {self.combine!r}, "
                f"{self.column_sets}"
            )
        if self.released == "lra-cls" and causal:
            raise ValueError(f"{op}: released='lra-cls' has no causal form, got causal=True")
        if self.pattern == "strided" and (self.columns, self.column_sets) != (1, 1):
            raise ValueError(
                f"{op}: columns and column_sets require pattern='fixed', got {self.columns} and {self.column_sets}"
            )

    def backward_only(self, causal: bool) -> bool:
        """Whether tokens see no later ones."""
        return causal or self.released is not None

    def near(self, i: Tensor, j: Tensor, earlier: bool) -> Tensor:
        """Which queries at positions i have keys at positions j nearby."""
        if self.pattern == "strided":
            seen = (i - j).abs() < self.stride
        else:
            seen = i.div(self.stride, rounding_mode="floor") == j.div(self.stride, rounding_mode="floor")
        return seen & (j <= i) if earlier else seen

    def offsets(self, heads: int, device: Any) -> Tensor:
        """Places of the fixed columns within a stride, (heads or 1, columns)."""
        sets = torch.arange(heads if self.column_sets > 1 else 1, device=device) % self.column_sets
        offsets = self.stride - self.columns * (sets.unsqueeze(1) + 1) + torch.arange(self.columns, device=device)
        if self.released and self.columns < self.stride:
            offsets = torch.cat([torch.zeros_like(offsets[:, :1]), offsets], 1)
        return offsets


class SparseState(NamedTuple):
    """State of causal sparse attention: all keys and values so far, one token more after each step.

    Attributes:
        key: (batch, tokens, heads, K).
        value: (batch, tokens, heads, V).
        mask: Which of them are real tokens, (batch, tokens), boolean.
    """

    key: Tensor
    value: Tensor
    mask: Tensor


def init_sparse_state(
    batch: int, heads: int, key_channels: int, value_channels: int, *, dtype: torch.dtype = torch.float32,
    device: Any = None,
) -> SparseState:  # fmt: skip
    """Return the state before the first token, for inputs of ``dtype``."""
    op = "init_sparse_state"
    check_fresh_state(op, batch, dtype, heads=heads, key_channels=key_channels, value_channels=value_channels)
    empty = torch.empty(batch, 0, heads, key_channels, dtype=dtype, device=device)
    value = empty.new_empty(batch, 0, heads, value_channels)
    return SparseState(empty, value, empty.new_empty(batch, 0, dtype=torch.bool))


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: SparseState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    pattern: str = "strided",
    stride: int = STRIDE,
    columns: int = 1,
    column_sets: int = 1,
    combine: str = "merged",
    released: str | None = None,
) -> Tensor | tuple[Tensor, SparseState]:
    """Softmax attention over nearby tokens and over a few tokens of each stride (Child et al., 2019).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, L, heads, K).
        v: Values (batch, L, heads, V).
        causal: Output t sees positions up to t only, as published. The bidirectional form is the same patterns without
            that limit.
        mask: (batch, L) boolean, True = real token. Positions count real tokens only.
        context_mask: Refused: this is self-attention only. Here so that mechanisms are exchangeable.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch. It costs as much as the whole
            sequence at once.
        return_state: Return the state after the last token as well (causal only; not of a packed batch).
        backend: ``"auto"`` or ``"torch"``.
        pattern: ``"strided"`` or ``"fixed"``.
        stride: l, tokens of a stride.
        columns: c, the last tokens of each stride that all others see (fixed pattern).
        column_sets: Number of sets of columns: head h has the last columns but ``columns * (h % column_sets)``, as
            ``num_verts`` in OpenAI's code (fixed pattern).
        combine: ``"merged"``: each head sees both sets of tokens. ``"alternate"``: even heads see nearby tokens, odd
            heads those at multiples of the stride (strided pattern), as in OpenAI's code.
        released: Reproduce what Long Range Arena released, for comparisons with published numbers. ``"lra"``: the first
            token of each stride is a fixed column too, and tokens see no later ones in the bidirectional form either;
            ``"lra-cls"``: likewise for the tokens behind the first one, which sees all and is seen by all.

    Returns:
        Output (batch, L, heads, V), zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "sparse_attention"
    options = SparseOptions(pattern, stride, columns, column_sets, combine, released)
    options.check(op, bool(causal))
    if return_state and cu_seqlens is not None:
        raise ValueError(f"{op}: the states of a packed batch differ in length: run its sequences one by one")
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        q, k, v = (fill(x, key) for x in (q, k, v))
        length, past, after = q.shape[1], 0, None
        if state is not None and (return_state or state.key.shape[1]):
            past = state.key.shape[1]
            real = torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if key is None else key
            after = SparseState(*(torch.cat(pair, 1) for pair in zip(state, (k, v, real), strict=True)))
            k, v, real = after
            key = real if past else key
            q = frame(q, past, past + length)
        out = _sparse(q, k, v, key, causal, options)[:, past:]
        return out, after if return_state else None

    return run(
        op, given, dense, layout=LAYOUT,
        init_state=lambda batch: init_sparse_state(
            batch, q.shape[2], q.shape[3], v.shape[3], dtype=q.dtype, device=q.device
        ),
    )  # fmt: skip


def _sparse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, options: SparseOptions) -> Tensor:
    length, dtype, places = q.shape[1], q.dtype, None
    if mask is not None:
        (q, k, v), mask, places = close_up((q, k, v), mask)
    ends = count_tokens(q, mask).view(-1, 1, 1, 1, 1)
    earlier = options.backward_only(causal)
    if options.released == "lra-cls":
        out = _with_first(q, k, v, ends, options)
    elif options.combine == "alternate":
        out = _alternate(q, k, v, ends, earlier, options)
    else:
        out = _merged(q, k, v, ends, earlier, options).out
    out = fill(out, mask).to(dtype)
    return out if places is None else spread(out, places, length)


def _merged(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, earlier: bool, options: SparseOptions) -> Attended:
    if options.pattern == "fixed":
        return _fixed(q, k, v, ends, earlier, options)
    return join(_nearby(q, k, v, ends, earlier, options), _strided(q, k, v, ends, earlier, options, itself=False))


def _with_first(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, options: SparseOptions) -> Tensor:
    """A first token that sees all and is seen by all; the pattern is of the tokens behind it, and causal."""
    seen = torch.arange(k.shape[1], device=k.device) < ends.squeeze(-1)
    first = attend_all(q[:, :1], k, v, seen)
    if q.shape[1] == 1:
        return first
    others = _merged(q[:, 1:], k[:, 1:], v[:, 1:], ends - 1, True, options)
    compute = first.dtype
    with no_autocast(q.device):
        scores = (q[:, 1:].to(compute) * k[:, :1].to(compute)).sum(-1) / q.shape[-1] ** 0.5
        of_first = Attended(v[:, :1].to(compute), scores.detach(), (scores - scores.detach()).exp())
        return torch.cat([first, join(others, of_first).out], 1)


def _block(stride: int, length: int) -> int:
    """Queries of a block, a multiple of the stride, since small matrices are slow."""
    block = max(1, min(SMALLEST, CHUNK) // stride) * stride
    return block if is_exporting() else min(block, length)


def _fixed(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, earlier: bool, options: SparseOptions) -> Attended:
    strides = count_chunks(q.shape[1], options.stride)
    starts = options.stride * torch.arange(strides, device=q.device)
    columns = (options.offsets(q.shape[2], q.device).unsqueeze(1) + starts.unsqueeze(1)).flatten(1)
    inside = columns < q.shape[1]

    def near(i: Tensor, j: Tensor) -> Tensor:
        return options.near(i, j, earlier) & (j < ends)

    def far(i: Tensor, j: Tensor) -> Tensor:
        seen = ~options.near(i, j, False) & (j < ends)
        return seen & (j <= i) if earlier else seen

    band = Band(_block(options.stride, q.shape[1]), 0, 0, near)
    places = columns.masked_fill(~inside, -1)[None, :, None]
    return banded_attention(q, k, v, band, Further(places, far), size=BLOCK)


def _nearby(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, earlier: bool, options: SparseOptions) -> Attended:
    """The tokens at less than a stride."""
    block = min(CHUNK, max(SMALLEST, options.stride))
    block = block if is_exporting() else min(block, q.shape[1])
    reach = options.stride - 1 if is_exporting() else min(options.stride - 1, q.shape[1])
    around = -(-reach // block)

    def near(i: Tensor, j: Tensor) -> Tensor:
        return options.near(i, j, earlier) & (j >= 0) & (j < ends)

    return banded_attention(q, k, v, Band(block, around, 0 if earlier else around, near), size=BLOCK)


def _strided(
    q: Tensor, k: Tensor, v: Tensor, ends: Tensor, earlier: bool, options: SparseOptions, *, itself: bool
) -> Attended:
    """The tokens at multiples of the stride, with the token itself or without it."""
    length, heads = q.shape[1], q.shape[2]
    stride = options.stride if is_exporting() else min(options.stride, length)  # no two tokens are further apart
    strides = count_chunks(length, stride)
    # Tokens with the same remainder meet: remainders become heads, (batch, strides, stride heads, channels).
    q, k, v = (frame(x, 0, strides * stride).unflatten(1, (strides, stride)).flatten(2, 3) for x in (q, k, v))
    remainder = torch.arange(stride, device=q.device).repeat_interleave(heads).view(1, -1, 1, 1, 1)

    def seen(i: Tensor, j: Tensor) -> Tensor:
        seen = j * stride + remainder < ends
        if not earlier:
            return seen if itself else seen & (i != j)
        return seen & (j <= i if itself else j < i)

    places = torch.arange(strides, device=q.device).view(1, 1, 1, -1)
    if is_exporting():  # blocks of strides are of a length that PyTorch's export cannot tell from others
        found = attend_at_once(q, k, v, seen(places.unsqueeze(-1), places.unsqueeze(-2)).squeeze(2))
    else:
        band = Band(min(CHUNK, strides), 0, 0, None)
        found = banded_attention(q, k, v, band, Further(places, seen), size=max(1, BLOCK // stride))
    return Attended(*(cut(x.unflatten(2, (stride, heads)).flatten(1, 2), length) for x in found))


def _alternate(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, earlier: bool, options: SparseOptions) -> Tensor:
    heads = q.shape[2]
    outs = [_nearby(q[:, :, ::2], k[:, :, ::2], v[:, :, ::2], ends, earlier, options).out]
    if heads > 1:
        outs.append(_strided(q[:, :, 1::2], k[:, :, 1::2], v[:, :, 1::2], ends, earlier, options, itself=True).out)
    order = torch.arange(heads, device=q.device)
    return torch.cat(outs, 2).index_select(2, torch.cat([order[::2], order[1::2]]).argsort())


def sparse_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    state: SparseState,
    *,
    pattern: str = "strided",
    stride: int = STRIDE,
    columns: int = 1,
    column_sets: int = 1,
    combine: str = "merged",
    released: str | None = None,
) -> tuple[Tensor, SparseState]:
    """Compute one token of causal sparse attention, in time and memory linear in the number of tokens before it.

    Args:
        q: Query (batch, heads, K).
        k: Key (batch, heads, K).
        v: Value (batch, heads, V).
        state: State before the token; not changed.
        pattern: As in :func:`sparse_attention`, like all that follow.
        stride: Likewise.
        columns: Likewise.
        column_sets: Likewise.
        combine: Likewise.
        released: Likewise.

    Returns:
        Output (batch, heads, V) and the state after the token.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "sparse_attention_step"
    options = SparseOptions(pattern, stride, columns, column_sets, combine, released)
    options.check(op, True)
    check_step(op, q, k, v, state, SparseState)
    sizes = (q.shape[0], q.shape[1], q.shape[2], v.shape[2])
    check_state(op, state, init_sparse_state(*sizes, dtype=q.dtype, device=q.device))
    real = torch.ones(len(q), 1, dtype=torch.bool, device=q.device)
    after = SparseState(
        *(torch.cat(pair, 1) for pair in zip(state, (k.unsqueeze(1), v.unsqueeze(1), real), strict=True))
    )
    key, value, mask = after
    j = mask.cumsum(1).unsqueeze(1) - 1
    seen = _pattern(j[..., -1:], j, q.shape[1], options) & mask.unsqueeze(1)
    return attend_all(q.unsqueeze(1), key, value, seen.unsqueeze(2)).squeeze(1).to(v.dtype), after


def _pattern(i: Tensor, j: Tensor, heads: int, options: SparseOptions) -> Tensor:
    """Which of the keys at positions j, none of them later, a query at i sees: (batch, heads or 1, keys)."""
    near = options.near(i, j, True)
    if options.pattern == "strided":
        far = (i - j) % options.stride == 0
        if options.combine == "merged":
            return near | far
        odd = torch.arange(heads, device=j.device).view(1, -1, 1) % 2 == 1
        return torch.where(odd, far, near)
    offsets = options.offsets(heads, j.device)
    return near | ((j % options.stride).unsqueeze(-1) == offsets.unsqueeze(1)).any(-1)


def sparse_weights(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool = False,
    pattern: str = "strided",
    stride: int = STRIDE,
    columns: int = 1,
    column_sets: int = 1,
    combine: str = "merged",
    released: str | None = None,
) -> Rows:
    """Return rows softmax_j(q_i . k_j / sqrt(K)) over the tokens j that token i of one sequence sees, in float64."""

    def visible(i: Tensor, j: Tensor, head: int) -> Tensor:
        remainder, last = j % stride, stride - columns * (head % column_sets)
        if pattern == "strided":
            near, far = (i - j).abs() < stride, (i - j) % stride == 0
        else:
            near, far = i // stride == j // stride, (remainder >= last - columns) & (remainder < last)
        if released:
            far = far | (remainder == 0) if pattern == "fixed" else far
        if combine == "alternate":
            return far if head % 2 else near.expand_as(far)
        return near | far

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], k) / q.shape[-1] ** 0.5
        i, j = places.unsqueeze(1), torch.arange(len(k), device=k.device)
        first = 1 if released == "lra-cls" else 0
        seen = torch.stack([visible(i - first, j - first, head) for head in range(q.shape[1])])
        seen = lower(seen, places, False) if causal or released else seen
        if released == "lra-cls":
            seen = seen | (i == 0) | (j == 0)
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)

    return rows


@register(
    "sparse",
    operation=sparse_attention,
    truth=truth_of(sparse_weights),
    rows=rows_of("sparse_attention", sparse_weights, LAYOUT),
    step=sparse_attention_step,
    init_state=by_sizes(init_sparse_state),
    source="Child et al., Generating long sequences with Sparse Transformers, 2019",
    cost="L (l + L / l) (K + V)",
    layout=LAYOUT,
    cannot={
        "permutation": "strides are of positions",
        "linear time": "a token of each stride is seen, however long the sequence",
        "fixed state": "it remembers every key and value: a token of each stride is seen, however long ago",
    },
)
class SparseAttention(Attention):
    """Softmax attention over nearby tokens and a few of each stride (Child et al., 2019), in linear memory.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        pattern: As in :func:`sparse_attention`, like the four that follow.
        stride: Likewise.
        columns: Likewise.
        column_sets: Likewise.
        combine: Likewise.
        released: Likewise.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Raises:
        TypeError, ValueError: for invalid options.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        pattern: str = "strided",
        stride: int = STRIDE,
        columns: int = 1,
        column_sets: int = 1,
        combine: str = "merged",
        released: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.options = SparseOptions(pattern, stride, columns, column_sets, combine, released)
        self.options.check("sparse attention", self.causal)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()
