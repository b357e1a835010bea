"""Device functions that all kernels share: products, feature maps, and the factors of decay.

Conventions of all kernels here. A program has one chunk of C tokens, or a segment of several chunks, of one head of one
sequence: ``head`` counts both. Tokens come with strides of batch, token and head, in elements, their channels adjacent.
What there is of each token, a weight or a flow, is float32 (heads of all sequences, length). A state stands at the
*end* of a chunk, at its last token; that before the first chunk stands before the first token.

With REVERSE the same sums go over later tokens: chunks in reverse, the triangle of a chunk turned over. States then
stand at the same places, so that those of either direction meet.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import os

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# How operands are multiplied; sums are in float32 in any case.
TF32X3 = tl.constexpr(0)  # float32 by three products in tf32
TF32 = tl.constexpr(1)  # one product in tf32, which has the digits of float16 and the range of float32
BF16 = tl.constexpr(2)
HALVES = tl.constexpr(3)  # features, which are of order 1, as two float16: 22 bits by three products
# Not every AMD GPU has tf32: there, both are products in float32.
ONE_TF32 = tl.constexpr("ieee" if torch.version.hip else "tf32")
THREE_TF32 = tl.constexpr("ieee" if torch.version.hip else "tf32x3")

# Feature maps, by the numbers of flow/equations.py
SIGMOID, RELU, ELU, GIVEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
RELU_FLOOR = tl.constexpr(1e-6)


@triton.jit
def multiply(a, b, DOT: tl.constexpr):
    """Return a @ b, with sums in float32."""
    if DOT == BF16:
        if INTERPRETED:  # its product of bfloat16 is wrong: round, and multiply in float32
            return tl.dot(a.to(tl.bfloat16).to(tl.float32), b.to(tl.bfloat16).to(tl.float32), input_precision="ieee")
        return tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    if DOT == HALVES:
        x, y = a.to(tl.float16), b.to(tl.float16)
        small = tl.dot((a - x.to(tl.float32)).to(tl.float16), y)
        small = tl.dot(x, (b - y.to(tl.float32)).to(tl.float16), small)
        return tl.dot(x, y, small)
    if DOT == TF32:
        return tl.dot(a, b, input_precision=ONE_TF32)
    return tl.dot(a, b, input_precision=THREE_TF32)


@triton.jit
def load_tokens(x, at, there, stride, d, inside, MAP: tl.constexpr):
    """Return tokens (C, channels) in float32, by their feature map; zeros where there are none.

    Args:
        x: Pointer to the first token.
        at: Places (C,), int64.
        there: Which of them are tokens.
        stride: From token to token.
        d: Channels.
        inside: Which of them there are.
        MAP: The feature map.
    """
    ok = there[:, None] & inside[None, :]
    y = tl.load(x + at[:, None] * stride + d[None, :], ok, 0.0).to(tl.float32)
    if MAP == SIGMOID:
        y = 1.0 / (1.0 + tl.exp(-y))
    if MAP == RELU:
        y = tl.maximum(y, 0.0) + RELU_FLOOR
    if MAP == ELU:
        y = tl.exp(tl.minimum(y, 0.0)) + tl.maximum(y, 0.0)
    return tl.where(ok, y, 0.0)


@triton.jit
def slope(x, at, there, stride, d, inside, MAP: tl.constexpr):
    """Return the derivative of the feature map at tokens (C, channels); arguments as of :func:`load_tokens`."""
    y = tl.load(x + at[:, None] * stride + d[None, :], there[:, None] & inside[None, :], 0.0).to(tl.float32)
    if MAP == SIGMOID:
        y = 1.0 / (1.0 + tl.exp(-y))
        return y * (1.0 - y)
    if MAP == RELU:
        return tl.where(y > 0, 1.0, 0.0)
    if MAP == ELU:
        return tl.where(y > 0, 1.0, tl.exp(tl.minimum(y, 0.0)))
    return y * 0.0 + 1.0


@triton.jit
def tokens_of(mask, chunk, L, C: tl.constexpr, MASKED: tl.constexpr):
    """Return the places of a chunk, int64, which of them are in the sequence, and which are real tokens; (C,) each."""
    at = chunk * C + tl.arange(0, C).to(tl.int64)
    there = at < L
    real = there
    if MASKED:
        real = tl.load(mask + at, there, 0) != 0
    return at, there, real


@triton.jit
def _load_decay(total, ends, chunk, at, there):
    """Return the log-decays of a chunk: from its start, what float32 leaves of them, to its end (C,); and the whole.

    Differences of the first, between neighbours, would have lost digits: gamma of two tokens takes the second too.

    Args:
        total: Pointer to the log-decays of a head up to and with each token, float64.
        ends: Pointer to those at the ends of chunks, first 0 for the start of the sequence.
        chunk: Which chunk.
        at: Places (C,).
        there: Which of them are in the sequence, padding too.
    """
    start, end = tl.load(ends + chunk), tl.load(ends + chunk + 1)
    exact = tl.where(there, tl.load(total + at, there, 0.0), end) - start
    here = exact.to(tl.float32)
    whole = end - start
    return here, (exact - here.to(tl.float64)).to(tl.float32), (whole - exact).to(tl.float32), whole.to(tl.float32)


@triton.jit
def between(here, rest, i, REVERSE: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr):
    """Return gamma of a chunk, rows for sinks: zero for sources that come later (with REVERSE: earlier) than the sink.

    STRICT: zero for the sink itself too.
    """
    rows, columns = i[:, None], i[None, :]
    later, earlier = (columns, rows) if REVERSE else (rows, columns)
    ok = later > earlier if STRICT else later >= earlier
    if DECAY:
        difference = (here[:, None] - here[None, :]) + (rest[:, None] - rest[None, :])
        return tl.exp(tl.where(ok, -difference if REVERSE else difference, -float("inf")))
    return tl.where(ok, 1.0, 0.0)


@triton.jit
def decay_of(
    total, ends, head, decay_heads, L, chunks, chunk, at, there,
    C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Return what a chunk has of decay, for :func:`between` first, then gamma; ones without DECAY.

    Returns:
        Log-decays from the chunk's start (C,), what float32 leaves of them (C,), and gamma: from the state that comes
        into the chunk to each token (C,), from the state that comes in against the direction (C,), from each token to
        the state that leaves (C,), and of the whole chunk.
    """
    here, rest = tl.zeros([C], tl.float32), tl.zeros([C], tl.float32)
    before, behind = here + 1.0, here + 1.0
    gamma = 1.0
    if DECAY:
        row = head % decay_heads
        here, rest, left, whole = _load_decay(total + row * L, ends + row * (chunks + 1), chunk, at, there)
        before, behind, gamma = tl.exp(here), tl.exp(left), tl.exp(whole)
    if REVERSE:
        return here, rest, behind, before, before, gamma
    return here, rest, before, behind, behind, gamma
