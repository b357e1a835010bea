"""Launch the kernels on tensors: grids, strides, working memory, and the configuration of each."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from flowformer.kernels.triton import device
from flowformer.kernels.triton import products as matrix_kernels
from flowformer.kernels.triton import vectors as vector_kernels

TF32X3, TF32, BF16, HALVES = (dot.value for dot in (device.TF32X3, device.TF32, device.BF16, device.HALVES))
SEGMENT = 512  # tokens to each stored matrix; twice as many for more than 128 channels, for the size of the matrix


class Dots(NamedTuple):
    """How products are computed (see device.py): those of flows, of values, and of gradients."""

    flows: int
    values: int
    gradients: int


def dots_of(dtype: torch.dtype, feature_map: str) -> Dots:
    """Return how to multiply inputs of a dtype.

    Flows have the digits of float32 for half precision too: the first token's flow is on the edge of a clamp of 1,
    where a rounded product would switch its gradient off or on.
    """
    if dtype == torch.float32:
        return Dots(TF32X3, TF32X3, TF32X3)
    flows = HALVES if feature_map == "sigmoid" else TF32X3  # features in (0, 1) fit two halves
    return Dots(flows, BF16, TF32) if dtype == torch.bfloat16 else Dots(flows, TF32, TF32X3)


class Tile(NamedTuple):
    """How a kernel is compiled: channels of output to a program, warps, and stages of the pipeline."""

    block: int
    warps: int
    stages: int


# By kernel and by how products are computed (see device.py), for up to 64, 128 and 256 channels. Chosen by registers
# (few spilled: tests/kernels/triton/compiled.py), and for half precision at 64 channels by times of an earlier
# prototype on an H200.
TILES: dict[str, dict[int, tuple[Tile, Tile, Tile]]] = {
    "memory": {
        TF32X3: (Tile(64, 4, 2), Tile(64, 4, 2), Tile(32, 4, 1)),
        TF32: (Tile(64, 4, 3), Tile(64, 4, 2), Tile(64, 4, 2)),
        BF16: (Tile(64, 4, 3), Tile(64, 4, 3), Tile(64, 4, 2)),
    },
    "attend": {
        TF32X3: (Tile(32, 4, 1), Tile(32, 4, 1), Tile(16, 4, 1)),
        TF32: (Tile(64, 8, 2), Tile(32, 4, 2), Tile(32, 4, 1)),
        BF16: (Tile(64, 4, 3), Tile(64, 4, 3), Tile(32, 4, 1)),
    },
    "gradient": {
        TF32X3: (Tile(32, 8, 1), Tile(32, 4, 1), Tile(16, 4, 1)),
        TF32: (Tile(64, 4, 1), Tile(64, 8, 1), Tile(32, 4, 1)),
    },
}
# Tokens to a chunk for up to 64, 128 and 256 channels: where some products are three in tf32, and where none are.
CHUNKS = {True: (32, 16, 16), False: (64, 32, 16)}


def _width(*channels: int) -> int:
    """Which of the three widths channels are of."""
    widest = max(channels)
    return 0 if widest <= 64 else 1 if widest <= 128 else 2


def chunk_of(dots: Dots, *channels: int, backward: bool = False) -> int:
    """Return the tokens to a chunk; fewer for gradients, which have more of each at a time."""
    used = dots if backward else dots[:2]
    chunk = CHUNKS[TF32X3 in used][_width(*channels)]
    return min(chunk, 32) if backward else chunk


def _tile(kernel: str, dot: int, *channels: int) -> tuple[int, dict[str, int]]:
    """Channels of output to a program, and options of the compiler."""
    block, warps, stages = TILES[kernel][dot][_width(*channels)]
    return block, {"num_warps": warps, "num_stages": stages}


def padded(channels: int) -> int:
    """Return the power of two that channels are padded to: products want 16 at least."""
    return max(16, triton.next_power_of_2(channels))


class Sequences:
    """Sequences of tokens that kernels run on: their shape, padding and decay.

    Args:
        like: A tensor (batch, length, heads, channels).
        mask: (batch, length), True = real token.
        total: Log-decays up to and with each token, (batch or 1, heads, length), float64; zero at padding.
        chunk: Tokens to a chunk.
        feature_map: Of queries and keys, by its number in device.py.
        relative: Whether log-decays are relative: what comes before the first token is at its log-decay.
    """

    def __init__(
        self,
        like: Tensor,
        mask: Tensor | None,
        total: Tensor | None,
        chunk: int,
        feature_map: int,
        *,
        relative: bool = False,
    ) -> None:
        self.batch, self.length, self.per_sequence = like.shape[:3]
        self.heads = self.batch * self.per_sequence
        self.mask = None if mask is None else mask.contiguous()
        self.total = None if total is None else total.contiguous()
        self.chunk, self.feature_map, self.relative = chunk, feature_map, relative
        self.chunks = triton.cdiv(self.length, chunk)
        self.per = max(1, SEGMENT * (2 if like.shape[3] > 128 else 1) // chunk)
        self.segments = triton.cdiv(self.chunks, self.per)
        self.dummy = like.new_empty(1, dtype=torch.float32)

    @functools.cached_property
    def ends(self) -> Tensor:
        """Log-decays up to the ends of chunks, (heads, chunks + 1), first 0."""
        if self.total is None:
            return self.dummy
        total = self.total.flatten(0, 1)
        at = torch.arange(self.chunk - 1, self.chunks * self.chunk, self.chunk, device=total.device)
        found = total.new_zeros(total.shape[0], self.chunks + 1)
        if self.relative:
            found[:, 0] = total[:, 0]
        found[:, 1:] = total[:, at.clamp(max=self.length - 1)]
        return found

    @property
    def decays(self) -> tuple[Any, ...]:
        """Pointers to log-decays."""
        return (self.dummy if self.total is None else self.total), self.ends

    @property
    def decay_heads(self) -> int:
        """Heads that have log-decays of their own."""
        return 1 if self.total is None else self.total.shape[0] * self.total.shape[1]

    def flags(self) -> dict[str, Any]:
        """What all kernels are compiled for."""
        return {"MASKED": self.mask is not None, "DECAY": self.total is not None, "C": self.chunk}

    def masks(self) -> Tensor:
        """Pointer to the mask."""
        return self.dummy if self.mask is None else self.mask

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Memory for (heads, ...)."""
        return self.dummy.new_empty(self.heads, *shape, dtype=dtype)


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Launch a kernel, unless there is nothing to do. The first axis of a grid, that of heads, has no limit."""
    if all(grid):
        kernel[grid](*arguments, **options)


def _given(of: Sequences, x: Tensor | None) -> Tensor:
    """Pointer to what kernels read without strides."""
    return of.dummy if x is None else x.contiguous()


def _strides(x: Tensor) -> tuple[int, int, int]:
    """Strides of batch, token and head."""
    return x.stride(0), x.stride(1), x.stride(2)


def sums(
    of: Sequences, x: Tensor, y: Tensor | None, weights_x: Tensor | None = None, weights_y: Tensor | None = None, *,
    shift: tuple[float, float] = (0.0, 0.0), reverse: bool = False, warps: int = 4,
) -> Tensor:  # fmt: skip
    """Sums of each chunk over weights of x and then of y, (heads, chunks, vectors, channels)."""
    count_x, count_y = (0 if w is None else w.shape[0] for w in (weights_x, weights_y))
    vectors = max(1, count_x) + (0 if y is None else max(1, count_y))
    D = x.shape[-1]
    out = of.numbers(of.chunks, vectors, D)
    other = x if y is None else y
    run(
        vector_kernels.sums, (of.heads, of.chunks),
        x, other, _given(of, weights_x), _given(of, weights_y),
        of.masks(), *of.decays, out, *_strides(x), *_strides(other), of.per_sequence, of.heads, of.length, of.chunks,
        of.decay_heads, *shift, D=D, BD=padded(D), MAP=of.feature_map, WEIGHTS_X=count_x, WEIGHTS_Y=count_y,
        BOTH=y is not None, REVERSE=reverse, num_warps=warps, **of.flags(),
    )  # fmt: skip
    return out


def carry(
    of: Sequences, states: Tensor, first: Tensor | None = None, *, step: int = 1, last: bool = False,
    reverse: bool = False,
) -> Tensor | None:  # fmt: skip
    """Replace the sums of chunks (heads, chunks, ...) by the states before them; return the state after all of them.

    Args:
        of: The sequences.
        states: In place.
        first: The state before all, (heads, ...), float64.
        step: How many chunks each of these is.
        last: Whether the state after all is wanted, float64.
        reverse: Direction.
    """
    size = math.prod(states.shape[2:])
    after = of.numbers(*states.shape[2:], dtype=torch.float64) if last else None
    block = min(256, triton.next_power_of_2(size))
    run(
        vector_kernels.carry, (of.heads, triton.cdiv(size, block)),
        states, of.ends, _given(of, first), _given(of, after), size,
        states.shape[1], step, of.decay_heads, of.chunks, BLOCK=block, FIRST=first is not None, LAST=last,
        DECAY=of.total is not None, REVERSE=reverse, num_warps=4 if block > 64 else 1,
    )  # fmt: skip
    return after


def flows(
    of: Sequences, q: Tensor, k: Tensor, states: Tensor, weights: Tensor | None = None, *, eps_sink: float = 0.0,
    eps_source: float = 0.0, constant: float = 0.0, dot: int, reverse: bool = False,
    strict: bool = False, warps: int = 4,
) -> Tensor:  # fmt: skip
    """Flows of queries and keys, (2, heads, length): see the kernel."""
    D = q.shape[-1]
    out = of.dummy.new_empty(2, of.heads, of.length)
    run(
        vector_kernels.flows, (of.heads, of.chunks),
        q, k, states, _given(of, weights), of.masks(), *of.decays, out, *_strides(q), *_strides(k),
        of.per_sequence, of.heads, of.length, of.chunks, of.decay_heads, eps_sink, eps_source, constant, D=D,
        BD=padded(D), MAP=of.feature_map, WEIGHTED=weights is not None, REVERSE=reverse, STRICT=strict, DOT=dot,
        num_warps=2 * warps if D > 128 else warps, num_stages=1, **of.flags(),
    )  # fmt: skip
    return out


def project(of: Sequences, x: Tensor, states: Tensor, *, shift: float = 0.0) -> Tensor:
    """Products of tokens with vectors (heads, count, channels): (count, heads, length)."""
    count, D = states.shape[1:]
    out = of.dummy.new_empty(count, of.heads, of.length)
    run(
        vector_kernels.project, (of.heads, of.chunks),
        x, states, of.masks(), out, *_strides(x), of.per_sequence, of.heads, of.length, shift, D=D, BD=padded(D),
        C=of.chunk, MAP=of.feature_map, COUNT=count, MASKED=of.mask is not None, num_warps=4,
    )  # fmt: skip
    return out


def dots(of: Sequences, x: Tensor, y: Tensor) -> Tensor:
    """Products of the same tokens, (heads, length)."""
    D = x.shape[-1]
    out = of.numbers(of.length)
    run(
        vector_kernels.dots, (of.heads, of.chunks),
        x, y, of.masks(), out, *_strides(x), *_strides(y), of.per_sequence, of.length, D=D, BD=padded(D), C=of.chunk,
        MASKED=of.mask is not None, num_warps=4,
    )  # fmt: skip
    return out


def scan_scalars(
    of: Sequences, x: Tensor, first: Tensor | None = None, *, reverse: bool = False, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """Decayed sums of numbers up to each token, (heads, length), and after the last, (heads,) in float64."""
    states, out = of.numbers(of.chunks, 1), of.numbers(of.length)
    given = x.contiguous(), states, *of.decays, out, of.length, of.chunks, of.decay_heads
    flags = {"C": of.chunk, "DECAY": of.total is not None, "REVERSE": reverse, "STRICT": strict, "num_warps": 4}
    run(vector_kernels.scalars, (of.heads, of.chunks), *given, FINISH=False, **flags)
    after = carry(of, states, first, last=True, reverse=reverse)
    run(vector_kernels.scalars, (of.heads, of.chunks), *given, FINISH=True, **flags)
    assert after is not None
    return out, after.view(of.heads)


def memory(
    of: Sequences, k: Tensor, v: Tensor, weight: Tensor | None = None, *, dot: int,
    reverse: bool = False,
) -> Tensor:  # fmt: skip
    """Matrices sum_t w_t phi(k_t) v_t^T of segments, (heads, segments, K, V)."""
    D, M = k.shape[-1], v.shape[-1]
    out = of.numbers(of.segments, D, M)
    block, compiled = _tile("memory", dot, D, M)
    block = min(block, padded(M))
    run(
        matrix_kernels.memory, (of.heads, of.segments, triton.cdiv(M, block)),
        k, v, _given(of, weight), of.masks(), *of.decays, out, *_strides(k), *_strides(v),
        of.per_sequence, of.length, of.chunks, of.segments, of.per, of.decay_heads, D=D, M=M, BD=padded(D), BM=block,
        MAP=of.feature_map, WEIGHTED=weight is not None, REVERSE=reverse, DOT=dot, **compiled, **of.flags(),
    )  # fmt: skip
    return out


class Sums(NamedTuple):
    """Sums of weights, which outputs are divided by.

    Attributes:
        keys: Features of keys, added up: before chunks (heads, chunks, 1, channels), or of all (heads, 1, channels).
        found: Written, (heads, length).
        before: Those of the tokens on the other side, likewise, where outputs are added to theirs.
        divide: Whether outputs are divided by them and eps.
        eps: Added to them.
    """

    keys: Tensor
    found: Tensor
    before: Tensor | None
    divide: bool
    eps: float


def attend(
    of: Sequences, q: Tensor, k: Tensor, v: Tensor, states: Tensor, out: Tensor, scale: Tensor | None = None,
    weight: Tensor | None = None, other: Tensor | None = None, *, totals: Sums | None = None, add: bool = False,
    dot: int, reverse: bool = False, strict: bool = False, local: bool = True,
) -> Tensor | None:  # fmt: skip
    """Write outputs; return their products with ``other``, (heads, length), where there is one: see the kernel."""
    D, M = q.shape[-1], v.shape[-1]
    block, compiled = _tile("attend", dot, D, M)
    block = min(block, padded(M), block if totals is None else 32)  # sums take registers
    blocks = triton.cdiv(M, block)
    products = None if other is None else of.dummy.new_empty(blocks, of.heads, of.length)
    beside = out if other is None else other
    by = totals or Sums(of.dummy, of.dummy, None, False, 0.0)
    run(
        matrix_kernels.attend, (of.heads, of.segments, blocks),
        q, k, v, states, _given(of, scale), _given(of, weight), beside, by.keys, _given(of, by.before),
        of.masks(), *of.decays, out, _given(of, products), by.found, *_strides(q), *_strides(k),
        *_strides(v), *_strides(out), *_strides(beside), of.per_sequence, of.heads, of.length, of.chunks, of.segments,
        of.per, of.decay_heads, by.eps, SUMS=totals is not None, DIVIDE=by.divide,
        D=D, M=M, BD=padded(D), BM=block, MAP=of.feature_map, SCALED=scale is not None,
        WEIGHTED=weight is not None, ADD=add, OTHER=other is not None, REVERSE=reverse, STRICT=strict, LOCAL=local,
        DOT=dot, **compiled, **of.flags(),
    )  # fmt: skip
    return None if products is None else products.sum(0)


class Pairs(NamedTuple):
    """Vectors over tokens whose products r_p(i) c_p(j) are gradients of capacities, with the states that they have.

    Attributes:
        rows: r, (pairs, heads, length).
        columns: c, likewise; ``None`` where the states are all there is.
        states: (heads, chunks, pairs, channels); or (heads, pairs, channels).
        shift: Added to the features of the other side.
        constant: Added to the gradient for each row.
        strict: Whether a token has none with itself.
    """

    rows: Tensor
    columns: Tensor | None
    states: Tensor
    shift: float = 0.0
    constant: float = 0.0
    strict: bool = False


def gradient(
    of: Sequences, x: Tensor, y: Tensor, g: Tensor, v: Tensor, states: Tensor, scale: Tensor, out: Tensor,
    weight: Tensor | None = None, past: Pairs | None = None, future: Pairs | None = None, *, add: bool = False,
    last: bool = True, products: bool = False, dot: int, reverse: bool = False, strict: bool = False,
    local: bool = True,
) -> Tensor | None:  # fmt: skip
    """Write gradients of x; return what decays need, (heads, length), if wanted: see the kernel."""
    D, M = x.shape[-1], v.shape[-1]
    block, compiled = _tile("gradient", dot, D, M)
    block = min(block, padded(D))
    blocks = triton.cdiv(D, block)
    found = of.dummy.new_empty(blocks, of.heads, of.length) if products else None
    nothing = Pairs(of.dummy, of.dummy, of.dummy)
    before, behind = past or nothing, future or nothing
    run(
        matrix_kernels.gradient, (of.heads, of.segments, blocks),
        x, y, g, v, states, scale.contiguous(), _given(of, weight),
        before.rows, _given(of, before.columns), before.states,
        behind.rows, _given(of, behind.columns), behind.states,
        of.masks(), *of.decays, out, _given(of, found),
        *_strides(x), *_strides(y), *_strides(g), *_strides(v), *_strides(out), of.per_sequence, of.heads, of.length,
        of.chunks, of.segments, of.per, of.decay_heads, before.shift, behind.shift, before.constant, behind.constant,
        D=D, M=M, BO=block, BM=padded(M), MAP=of.feature_map, PAST=0 if past is None else len(past.rows),
        FUTURE=0 if future is None else len(future.rows), WEIGHTED=weight is not None, LAST=last, ADD=add,
        OTHER=products, REVERSE=reverse, STRICT=strict, LATER_STRICT=behind.strict, LOCAL=local, DOT=dot,
        **compiled, **of.flags(),
    )  # fmt: skip
    return None if found is None else found.sum(0)
