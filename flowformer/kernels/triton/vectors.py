"""Kernels for what a recurrence has besides its matrix: sums of vectors, flows, scalars, and the carry of any state."""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

from flowformer.kernels.triton.device import GIVEN, between, decay_of, load_tokens, multiply, tokens_of


@triton.jit
def _add_up(X, weights, out, head, heads, L, at, real, away, d, inside, D, WEIGHTS: tl.constexpr):
    """Store sum_t w_t gamma(end, t) X_t of a chunk for each of the weights; for w = 1 if there are none."""
    if WEIGHTS == 0:
        tl.store(out + d, tl.sum(X * away[:, None], 0), inside)
    for w in tl.static_range(WEIGHTS):
        weight = tl.load(weights + (w * heads + head) * L + at, real, 0.0) * away
        tl.store(out + w * D + d, tl.sum(X * weight[:, None], 0), inside)


@triton.jit(do_not_specialize=["H", "heads", "L", "chunks", "decay_heads"])
def sums(
    x, y, weights_x, weights_y, mask, total, ends, out,
    xb, xt, xh, yb, yt, yh, H, heads, L, chunks, decay_heads, shift_x, shift_y,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, WEIGHTS_X: tl.constexpr,
    WEIGHTS_Y: tl.constexpr, BOTH: tl.constexpr, MASKED: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Sums sum_t w_t gamma(end, t) (phi(x_t) + shift) of each chunk, (heads, chunks, vectors, D); BOTH: of y too."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // H, head % H
    d = tl.arange(0, BD)
    inside = d < D
    at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
    _, _, _, _, away, _ = decay_of(total, ends, head, decay_heads, L, chunks, chunk, at, there, C, DECAY, REVERSE)
    away = tl.where(real, away, 0.0)
    ONES_X: tl.constexpr = WEIGHTS_X if WEIGHTS_X > 0 else 1
    ONES_Y: tl.constexpr = (WEIGHTS_Y if WEIGHTS_Y > 0 else 1) if BOTH else 0
    out += (head * chunks + chunk) * (ONES_X + ONES_Y) * D
    X = load_tokens(x + b * xb + h * xh, at, real, xt, d, inside, MAP) + shift_x
    _add_up(X, weights_x, out, head, heads, L, at, real, away, d, inside, D, WEIGHTS_X)
    if BOTH:
        Y = load_tokens(y + b * yb + h * yh, at, real, yt, d, inside, MAP) + shift_y
        _add_up(Y, weights_y, out + ONES_X * D, head, heads, L, at, real, away, d, inside, D, WEIGHTS_Y)


@triton.jit(do_not_specialize=["size", "chunks", "decay_heads"])
def carry(
    states, ends, first, last, size, chunks, step, decay_heads, all_chunks,
    BLOCK: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """Replace the sum of each chunk by the state that comes into it, (heads, chunks, size): float64 on the way.

    ``step`` is how many chunks of ``ends`` one of these is; ``first`` the state before all, ``last`` that after all.
    """
    head, i = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    state = tl.zeros([BLOCK], tl.float64)
    if FIRST:
        state = tl.load(first + head * size + i, ok, 0.0).to(tl.float64)
    ends += (head % decay_heads) * (all_chunks + 1)
    for turn in range(chunks):
        chunk = chunks - 1 - turn if REVERSE else turn
        p = states + (head * chunks + chunk) * size + i
        new = tl.load(p, ok, 0.0).to(tl.float64)
        tl.store(p, state.to(states.dtype.element_ty), ok)
        if DECAY:
            end = tl.load(ends + tl.minimum((chunk + 1) * step, all_chunks))
            state *= tl.exp(end - tl.load(ends + chunk * step))
        state += new
    if LAST:
        tl.store(last + head * size + i, state, ok)


@triton.jit(do_not_specialize=["H", "heads", "L", "chunks", "decay_heads"])
def flows(
    q, k, states, weights, mask, total, ends, out,
    qb, qt, qh, kb, kt, kh, H, heads, L, chunks, decay_heads, eps_sink, eps_source, constant,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, WEIGHTED: tl.constexpr,
    MASKED: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Flows into queries and out of keys, (2, heads, L), from the states before chunks, (heads, chunks, 2, D).

        x_i = (Q_i + e) . sum_j gamma(i, j) w_j (K_j + e') + constant (sum Q_i + D e)
        y_i = (K_i + e) . sum_j gamma(i, j) u_j (Q_j + e') + constant (sum K_i + D e)

    e is ``eps_sink`` and e' ``eps_source``, one of which is zero; w and u are ``weights``, (2, heads, L).
    """
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // H, head % H
    d, i = tl.arange(0, BD), tl.arange(0, C)
    inside = d < D
    at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
    here, rest, arrive, _, _, _ = decay_of(
        total, ends, head, decay_heads, L, chunks, chunk, at, there, C, DECAY, REVERSE
    )
    gamma = between(here, rest, i, REVERSE, STRICT, DECAY)
    Q = load_tokens(q + b * qb + h * qh, at, real, qt, d, inside, MAP)
    K = load_tokens(k + b * kb + h * kh, at, real, kt, d, inside, MAP)
    p = states + (head * chunks + chunk) * 2 * D + d
    keys, queries = tl.load(p, inside, 0.0), tl.load(p + D, inside, 0.0)
    of_q, of_k = tl.sum(Q, 1), tl.sum(K, 1)
    w, u = tl.where(real, 1.0, 0.0), tl.where(real, 1.0, 0.0)
    if WEIGHTED:
        w = tl.load(weights + head * L + at, real, 0.0)
        u = tl.load(weights + (heads + head) * L + at, real, 0.0)
    # Two products, not one and its transpose: sums along rows take fewer registers than sums along columns.
    A = multiply(Q, tl.trans(K), DOT) + eps_sink * of_k[None, :] + eps_source * of_q[:, None]
    x = tl.sum(A * gamma * w[None, :], 1) + arrive * (tl.sum(Q * keys[None, :], 1) + eps_sink * tl.sum(keys, 0))
    A = multiply(K, tl.trans(Q), DOT) + eps_sink * of_q[None, :] + eps_source * of_k[:, None]
    y = tl.sum(A * gamma * u[None, :], 1) + arrive * (tl.sum(K * queries[None, :], 1) + eps_sink * tl.sum(queries, 0))
    tl.store(out + head * L + at, x + constant * (of_q + D * eps_sink), there)
    tl.store(out + (heads + head) * L + at, y + constant * (of_k + D * eps_sink), there)


@triton.jit(do_not_specialize=["H", "heads", "L"])
def project(
    x, states, mask, out, xb, xt, xh, H, heads, L, shift,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr, COUNT: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Products (phi(x_i) + shift) . s of each token with vectors of its head, (heads, COUNT, D): (COUNT, heads, L)."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // H, head % H
    d = tl.arange(0, BD)
    inside = d < D
    at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
    X = load_tokens(x + b * xb + h * xh, at, real, xt, d, inside, MAP)
    for n in tl.static_range(COUNT):
        s = tl.load(states + (head * COUNT + n) * D + d, inside, 0.0)
        tl.store(out + (n * heads + head) * L + at, tl.sum(X * s[None, :], 1) + shift * tl.sum(s, 0), there)


@triton.jit(do_not_specialize=["H", "L"])
def dots(
    x, y, mask, out, xb, xt, xh, yb, yt, yh, H, L,
    D: tl.constexpr, BD: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Products x_t . y_t of the same tokens, (heads, L)."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    b, h = head // H, head % H
    d = tl.arange(0, BD)
    at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
    X = load_tokens(x + b * xb + h * xh, at, real, xt, d, d < D, GIVEN)
    Y = load_tokens(y + b * yb + h * yh, at, real, yt, d, d < D, GIVEN)
    tl.store(out + head * L + at, tl.sum(X * Y, 1), there)


@triton.jit(do_not_specialize=["L", "chunks", "decay_heads"])
def scalars(
    x, states, total, ends, out, L, chunks, decay_heads,
    C: tl.constexpr, FINISH: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """Decayed sums of numbers (heads, L): of chunks; with FINISH of each token, from the states before chunks."""
    head, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, C)
    at, there, _ = tokens_of(x, chunk, L, C, False)
    here, rest, arrive, _, away, _ = decay_of(
        total, ends, head, decay_heads, L, chunks, chunk, at, there, C, DECAY, REVERSE
    )
    X = tl.load(x + head * L + at, there, 0.0)
    if FINISH:
        gamma = between(here, rest, i, REVERSE, STRICT, DECAY)
        found = tl.sum(gamma * X[None, :], 1) + arrive * tl.load(states + head * chunks + chunk)
        tl.store(out + head * L + at, found, there)
    else:
        tl.store(states + head * chunks + chunk, tl.sum(X * away, 0))
