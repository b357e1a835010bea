r"""BigBird: softmax over neighbouring blocks, the first and the last block, and a few random ones.

Of the n blocks of a sequence, the tokens of block i see all tokens of (Zaheer et al., 2020, section 2 and appendix D)

    blocks i - 1, i and i + 1, blocks 0 and n - 1, and r further blocks drawn at random for each head and i;

the tokens of blocks 0 and n - 1 see all. A block counts once: out_i = sum_j softmax_j(q_i . k_j / sqrt(K)) v_j.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from flowformer.core.banded import BLOCK, Band, Further, attend_all, banded_attention, count_tokens
from flowformer.core.checks import HEADS, check_dense, check_integer, check_sizes, describe
from flowformer.core.masks import close_up, fill, spread
from flowformer.core.run import Given, run
from flowformer.core.tracing import count_chunks, is_exporting
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, rows_of, truth_of

__all__ = ["BigBirdAttention", "bigbird_attention"]

SIZE = 64  # tokens of a block, in the published models
RANDOM = 3  # random blocks, likewise
ROWS_DRAWN = 1024  # blocks with random numbers of their own
LAYOUT = HEADS._replace(self_only="blocks require queries and keys at the same positions")
RELEASED = ("huggingface", "huggingface-eval", "lra")
NO_CAUSAL_FORM = "the last block is seen by all tokens"


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    random_blocks: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: None = None,
    return_state: bool = False,
    backend: str = "auto",
    block: int = SIZE,
    released: str | None = None,
) -> Tensor:
    """Softmax attention over neighbouring, global and random blocks (Zaheer et al., 2020).

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, L, heads, K).
        v: Values (batch, L, heads, V).
        random_blocks: Random integers, (heads, rows, r). Block i of a head has row (i - 1) mod rows, and
            each number d picks block d mod m of the m blocks, in their order, that block i does not see yet. A sequence
            of any length finds its random blocks by them, and padding does not change them.
        causal: Refused: the last block is seen by all tokens. Here so that mechanisms are exchangeable.
        mask: (batch, L) boolean, True = real token. Positions, and so blocks, count real tokens only.
        context_mask: Refused: this is self-attention only, like the next three of states.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: Refused.
        return_state: Refused.
        backend: ``"auto"`` or ``"torch"``.
        block: Tokens of a block.
        released: Reproduce released code, for comparisons with published numbers. ``"huggingface"``: blocks are of
            positions, padding included, and padding is hidden. ``"huggingface-eval"``: likewise, and block 0 stands for
            each random block, so that it counts 1 + r times, as in evaluation since transformers 4.28. ``"lra"``: zeros
            up to the next multiple of the block, a whole block where the length is one, count as keys.

    Returns:
        Output (batch, L, heads, V), zeros at padding.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "bigbird_attention"
    _check_options(op, block, released)
    if causal:
        raise ValueError(f"{op}: there is no causal form, since {NO_CAUSAL_FORM}, got causal={causal!r}")
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: None) -> Any:
        _check_random(op, random_blocks, q)
        length, dtype, places, shown = q.shape[1], q.dtype, None, None
        q, k, v = (fill(x, key) for x in (q, k, v))
        if released is None and key is not None:
            (q, k, v), key, places = close_up((q, k, v), key)
            ends = key.sum(1)
        else:
            added = block - length % block if released == "lra" else 0
            q, k, v = (pad(x, (0, 0, 0, 0, 0, added)) for x in (q, k, v))
            shown = None if key is None else pad(key, (0, added), value=True)
            ends = count_tokens(q, None)
        size = block if is_exporting() else min(block, q.shape[1])  # a larger block holds no more
        out = _bigbird(q, k, v, _Blocks(random_blocks, ends, size, released, shown))[:, : q.shape[1]]
        if places is not None:
            return spread(fill(out, key).to(dtype), places, length), None
        return fill(out[:, :length], key).to(dtype), None

    return run(op, given, dense, layout=LAYOUT, apart=released is not None)


def _check_options(op: str, block: Any, released: Any) -> None:
    check_sizes(**{f"{op}: block": block})
    if released not in (None, *RELEASED):
        raise ValueError(f"{op}: released must be None or one of {', '.join(RELEASED)}, got {released!r}")


def _check_random(op: str, random_blocks: Any, q: Tensor) -> None:
    wanted = f"{op}: random_blocks must be a tensor (heads, rows, random blocks) of integers, {q.shape[2]} heads"
    check_dense(f"{op}: random_blocks", random_blocks)
    if not isinstance(random_blocks, Tensor) or random_blocks.is_floating_point() or random_blocks.is_complex():
        raise TypeError(f"{wanted}, got {describe(random_blocks)}")
    sizes = random_blocks.shape
    if len(sizes) != 3 or sizes[0] != q.shape[2] or not sizes[1] or random_blocks.device != q.device:
        raise ValueError(f"{wanted} on {q.device}, got {describe(random_blocks)}")


class _Blocks(NamedTuple):
    """Which blocks see which.

    Attributes:
        random: As ``random_blocks`` of :func:`bigbird_attention`.
        ends: Tokens of each sequence, (batch or 1,).
        size: Tokens of a block.
        released: As in :func:`bigbird_attention`.
        shown: Which tokens are real besides those in front, (batch, L); ``None`` for all.
    """

    random: Tensor
    ends: Tensor
    size: int
    released: str | None
    shown: Tensor | None

    @property
    def counts(self) -> Tensor:
        """Blocks of each sequence, (batch or 1, 1, 1)."""
        return ((self.ends + self.size - 1) // self.size).view(-1, 1, 1)

    def real(self, j: Tensor) -> Tensor:
        """Which keys at places j are real; j (batch or 1, heads or 1, blocks or 1, 1, keys)."""
        inside = (j >= 0) & (j < self.ends.view(-1, 1, 1, 1, 1))
        if self.shown is None:
            return inside
        at = j.clamp(0, self.shown.shape[1] - 1).expand(len(self.shown), *j.shape[1:])
        return inside & self.shown.gather(1, at.flatten(1)).view(at.shape)

    def drawn(self, blocks: int) -> list[Tensor]:
        """Random blocks of each block, r tensors (batch or 1, heads, blocks); negative for none."""
        i = torch.arange(blocks, device=self.ends.device)
        draws = self.random[:, (i - 1) % self.random.shape[1]].long()
        if self.released == "huggingface-eval":
            return [torch.zeros_like(draws[None, ..., 0])] * draws.shape[2]
        # Not seen yet are blocks 1 to i - 2, and i + 2 to n - 2.
        before, after = (i - 2).clamp(min=0), (self.counts - 3 - i).clamp(min=0)
        chosen: list[Tensor] = []
        for number, draw in enumerate(draws.unbind(2)):
            left = before + after - number
            rank = draw % left.clamp(min=1)
            if chosen:  # the ranks of those that are chosen already are left out
                for other in torch.stack(chosen).sort(0).values:
                    rank = rank + (rank >= other)
            chosen.append(torch.where(left > 0, rank, NONE))
        found = (torch.where(rank < before, rank + 1, rank - before + i + 2) for rank in chosen)
        return [torch.where(rank == NONE, -1, block) for rank, block in zip(chosen, found, strict=True)]

    def further(self, blocks: int) -> Further:
        """The first and the last block, and random ones."""
        i = torch.arange(blocks, device=self.ends.device)
        first, last = torch.zeros_like(i), self.counts - 1
        known = [torch.where((i - x).abs() > 1, x, -1) for x in (first, last)]  # else they are neighbours
        heads, batch = self.random.shape[0], self.ends.shape[0]
        listed = torch.stack([x.expand(batch, heads, blocks) for x in (*known, *self.drawn(blocks))], -1).unsqueeze(-1)
        tokens = listed * self.size + torch.arange(self.size, device=i.device)
        return Further(torch.where(listed < 0, -1, tokens).flatten(-2), lambda i, j: self.real(j))

    def near(self, i: Tensor, j: Tensor) -> Tensor:
        """Neighbouring blocks: all of a window."""
        return self.real(j)

    def global_tokens(self) -> Tensor:
        """Places of the tokens of the first and the last block, (batch or 1, n), -1 for none."""
        inside, last = torch.arange(self.size, device=self.ends.device), self.counts.view(-1, 1) - 1
        places = torch.cat([inside.expand(last.shape[0], -1), last * self.size + inside], 1)
        once = torch.cat([torch.ones_like(last, dtype=torch.bool), last > 0], 1).repeat_interleave(self.size, 1)
        return places.masked_fill((places >= self.ends.unsqueeze(1)) | ~once, -1)


NONE = 2**40  # a rank that no block has


def _bigbird(q: Tensor, k: Tensor, v: Tensor, blocks: _Blocks) -> Tensor:
    """The output (batch, L, heads, V) of a batch whose padding is behind the tokens."""
    count = count_chunks(q.shape[1], blocks.size)
    band = Band(blocks.size, 1, 1, blocks.near)
    out = banded_attention(q, k, v, band, blocks.further(count), size=BLOCK).out
    members = blocks.global_tokens()
    rows = torch.arange(q.shape[0], device=q.device).unsqueeze(1)
    seen = blocks.real(torch.arange(q.shape[1], device=q.device).view(1, 1, 1, 1, -1)).squeeze(2)
    found = attend_all(q[rows, members.clamp(min=0)], k, v, seen)
    # A row more takes what is of no token.
    goals = torch.where(members < 0, q.shape[1], members)[..., None, None].expand_as(found)
    return torch.cat([out, torch.zeros_like(out[:, :1])], 1).scatter(1, goals, found)[:, :-1]


def bigbird_weights(
    q: Tensor,
    k: Tensor,
    random_blocks: Tensor,
    *,
    causal: bool = False,
    block: int = SIZE,
    released: str | None = None,
) -> Rows:
    """Return rows of softmax over the tokens of the blocks that each token of one sequence sees, in float64."""
    length = len(k)
    if released == "lra":
        k = torch.cat([k, k.new_zeros(block - length % block, *k.shape[1:])])
    draws, blocks = random_blocks.long().tolist(), -(-len(k) // block)

    def times(i: int, draws: list[int]) -> Tensor:
        """How often block i sees each block."""
        if i in (0, blocks - 1):
            return q.new_ones(blocks)
        seen, found = {0, i - 1, i, i + 1, blocks - 1}, q.new_zeros(blocks)
        for draw in draws if released != "huggingface-eval" else ():
            others = [other for other in range(blocks) if other not in seen]
            seen |= {others[draw % len(others)]} if others else set()
        found[sorted(seen)] = 1
        found[0] += len(draws) if released == "huggingface-eval" else 0
        return found

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,jhk->hij", q[places], k) / q.shape[-1] ** 0.5
        own, at = (places // block).unique(return_inverse=True)
        counts = torch.stack(
            [torch.stack([times(i, of_head[(i - 1) % len(of_head)]) for i in own.tolist()]) for of_head in draws]
        )
        of_keys = torch.arange(len(k), device=k.device) // block
        return (scores + counts.log()[:, at][..., of_keys]).softmax(-1)[..., :length]

    return rows


@register(
    "bigbird",
    operation=bigbird_attention,
    truth=truth_of(bigbird_weights),
    rows=rows_of("bigbird_attention", bigbird_weights, LAYOUT),
    source="Zaheer et al., Big Bird: Transformers for longer sequences, NeurIPS 2020",
    cost="L b (5 + r) (K + V)",
    layout=LAYOUT,
    cannot={"causal": NO_CAUSAL_FORM, "permutation": "blocks are of positions"},
)
class BigBirdAttention(DrawnAttention):
    """BigBird's attention (Zaheer et al., 2020): neighbouring, global and random blocks, in linear time.

    The random numbers by which random blocks are found are the buffer ``random_blocks``.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        block: Tokens of a block.
        num_random: Random blocks of each block and head; 0 for none.
        released: As in :func:`bigbird_attention`.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        TypeError, ValueError: for invalid options.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        block: int = SIZE,
        num_random: int = RANDOM,
        released: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        _check_options("BigBird attention", block, released)
        check_integer("num_random", num_random)
        if num_random < 0:
            raise ValueError(f"num_random must be at least 0, got {num_random}")
        self.block, self.num_random, self.released = block, num_random, released
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Random integers below 2^24, which float32 has too, (heads, rows, random blocks)."""
        shape = (self.num_heads, ROWS_DRAWN, self.num_random)
        return {"random_blocks": torch.randint(2**24, shape, generator=generator, dtype=torch.int32)}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """The random numbers."""
        return (self.get_buffer("random_blocks"),)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"block": self.block, "released": self.released}
