"""Kernels for the K x V matrix: its sums, the outputs read from it, and the gradients of queries and keys.

A program has a segment of ``per`` chunks and a block of output channels; the matrix stays in registers.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

import triton
import triton.language as tl

from flowformer.kernels.triton.device import GIVEN, between, decay_of, load_tokens, multiply, slope, tokens_of


@triton.jit(do_not_specialize=["H", "L", "chunks", "segments", "per", "decay_heads"])
def memory(
    k, v, weight, mask, total, ends, out,
    kb, kt, kh, vb, vt, vh, H, L, chunks, segments, per, decay_heads,
    D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
    WEIGHTED: tl.constexpr, MASKED: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sum_t w_t gamma(end, t) phi(k_t) v_t^T of each segment, (heads, segments, D, M)."""
    head, segment, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h = head // H, head % H
    d, m = tl.arange(0, BD), block * BM + tl.arange(0, BM)
    inside, columns = d < D, m < M
    k += b * kb + h * kh
    v += b * vb + h * vh
    row = head % decay_heads
    first, last = segment * per, tl.minimum((segment + 1) * per, chunks)
    end = 0.0
    if DECAY:
        end = tl.load(ends + row * (chunks + 1) + (first if REVERSE else last))
    S = tl.zeros([BD, BM], tl.float32)
    for chunk in range(first, last):
        at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
        factor = tl.where(real, 1.0, 0.0)
        if WEIGHTED:
            factor = tl.load(weight + head * L + at, real, 0.0)
        if DECAY:
            here = tl.load(total + row * L + at, there, 0.0)
            away = here - end if REVERSE else end - here
            factor *= tl.exp(tl.where(there, away, 0.0).to(tl.float32))
        K = load_tokens(k, at, real, kt, d, inside, MAP)
        V = load_tokens(v, at, real, vt, m, columns, GIVEN) * factor[:, None]
        S += multiply(tl.trans(K), V, DOT)
    p = out + (head * segments + segment) * D * M
    tl.store(p + d[:, None] * M + m[None, :], S, inside[:, None] & columns[None, :])


@triton.jit(do_not_specialize=["H", "heads", "L", "chunks", "segments", "per", "decay_heads"])
def attend(
    q, k, v, states, scale, weight, other, keys, sums_before, mask, total, ends, out, products, sums,
    qb, qt, qh, kb, kt, kh, vb, vt, vh, ob, ot, oh, xb, xt, xh, H, heads, L, chunks, segments, per, decay_heads, eps,
    D: tl.constexpr, M: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, C: tl.constexpr, MAP: tl.constexpr,
    SCALED: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr, OTHER: tl.constexpr, SUMS: tl.constexpr,
    DIVIDE: tl.constexpr, MASKED: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr,
    LOCAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Outputs a_i phi(q_i) . sum_j gamma(i, j) w_j phi(k_j) v_j^T of a segment, from the matrix before it.

    Without LOCAL the matrix is all there is: one for each head, whatever the token. OTHER: also the products with other
    vectors before the scale, x_i . out_i / a_i, (blocks, heads, L). ADD: to what ``out`` holds.

    SUMS: also sums of weights phi(q_i) . sum_j gamma(i, j) phi(k_j), (heads, L), from the states of keys before chunks,
    (heads, chunks, D); with ADD those of the tokens on the other side are ``sums_before``. DIVIDE: outputs divided by
    them and eps.
    """
    head, segment, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h = head // H, head % H
    d, m, i = tl.arange(0, BD), block * BM + tl.arange(0, BM), tl.arange(0, C)
    inside, columns = d < D, m < M
    q += b * qb + h * qh
    k += b * kb + h * kh
    v += b * vb + h * vh
    out += b * ob + h * oh
    other += b * xb + h * xh
    p = states + (head * segments + segment if LOCAL else head) * D * M
    S = tl.load(p + d[:, None] * M + m[None, :], inside[:, None] & columns[None, :], 0.0)
    first, last = segment * per, tl.minimum((segment + 1) * per, chunks)
    for turn in range(first, last):
        chunk = first + last - 1 - turn if REVERSE else turn
        at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
        Q = load_tokens(q, at, real, qt, d, inside, MAP)
        y = multiply(Q, S, DOT)
        found = tl.zeros([C], tl.float32)
        if SUMS:
            key = tl.load(keys + (head * chunks + chunk if LOCAL else head) * D + d, inside, 0.0)
            found = tl.sum(Q * key[None, :], 1)
        if LOCAL:
            here, rest, arrive, _, away, whole = decay_of(
                total, ends, head, decay_heads, L, chunks, chunk, at, there, C, DECAY, REVERSE
            )
            if DECAY:
                y *= arrive[:, None]
            K = load_tokens(k, at, real, kt, d, inside, MAP)
            V = load_tokens(v, at, real, vt, m, columns, GIVEN)
            if WEIGHTED:
                V *= tl.load(weight + head * L + at, real, 0.0)[:, None]
            A = multiply(Q, tl.trans(K), DOT) * between(here, rest, i, REVERSE, STRICT, DECAY)
            y += multiply(A, V, DOT)
            if SUMS:
                found = found * arrive + tl.sum(A, 1)
            if DECAY:
                V *= away[:, None]
                S *= whole
            S += multiply(tl.trans(K), V, DOT)
        if OTHER:
            X = load_tokens(other, at, real, xt, m, columns, GIVEN)
            tl.store(products + (block * heads + head) * L + at, tl.sum(X * y, 1), there)
        if SCALED:
            y *= tl.load(scale + head * L + at, real, 0.0)[:, None]
        ok = there[:, None] & columns[None, :]
        to = out + at[:, None] * ot + m[None, :]
        if ADD:
            y += tl.load(to, ok, 0.0).to(tl.float32)
        if SUMS:
            if ADD:
                found += tl.load(sums_before + head * L + at, there, 0.0)
            if block == 0:
                tl.store(sums + head * L + at, found, there)
        if DIVIDE:
            y = tl.where(real[:, None], y / (found + eps)[:, None], 0.0)
        tl.store(to, y.to(out.dtype.element_ty), ok)


@triton.jit
def _coefficients(rows, columns, head, heads, L, at, real, C: tl.constexpr, PAIRS: tl.constexpr):
    """Return sum_p r_p(i) c_p(j) over the tokens of a chunk, (C, C)."""
    found = tl.zeros([C, C], tl.float32)
    for p in tl.static_range(PAIRS):
        r = tl.load(rows + (p * heads + head) * L + at, real, 0.0)
        c = tl.load(columns + (p * heads + head) * L + at, real, 0.0)
        found += r[:, None] * c[None, :]
    return found


@triton.jit
def _from_states(rows, states, at_state, head, heads, L, at, real, factor, d, inside, D, PAIRS: tl.constexpr):
    """Return sum_p r_p(i) factor_i s_p for the vectors s_p of a state, (C, channels), and sum_p r_p, (C,)."""
    found = factor[:, None] * tl.zeros_like(d).to(tl.float32)[None, :]
    total = factor * 0.0
    for p in tl.static_range(PAIRS):
        r = tl.load(rows + (p * heads + head) * L + at, real, 0.0)
        s = tl.load(states + (at_state * PAIRS + p) * D + d, inside, 0.0)
        found += (r * factor)[:, None] * s[None, :]
        total += r
    return found, total


@triton.jit(do_not_specialize=["H", "heads", "L", "chunks", "segments", "per", "decay_heads"])
def gradient(
    x, y, g, v, states, scale, weight, rows, columns, past, later_rows, later_columns, future,
    mask, total, ends, out, products,
    xb, xt, xh, yb, yt, yh, gb, gt, gh, vb, vt, vh, ob, ot, oh, H, heads, L, chunks, segments, per, decay_heads,
    shift_past, shift_future, constant_past, constant_future,
    D: tl.constexpr, M: tl.constexpr, BO: tl.constexpr, BM: tl.constexpr, C: tl.constexpr,
    MAP: tl.constexpr, PAST: tl.constexpr, FUTURE: tl.constexpr, WEIGHTED: tl.constexpr, LAST: tl.constexpr,
    ADD: tl.constexpr, OTHER: tl.constexpr, MASKED: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    STRICT: tl.constexpr, LATER_STRICT: tl.constexpr, LOCAL: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Gradients of the features of one side, sinks or with REVERSE sources, from those of the other.

        dX_i = a_i sum_{j<=i} gamma(i, j) (g_i . w_j v_j) Y_j
             + sum_{j<=i} gamma(i, j) sum_p r_p(i) c_p(j) (Y_j + e)
             + sum_{j>=i} gamma(j, i) sum_p r'_p(i) c'_p(j) (Y_j + e')
             + constant sum_p r_p(i) + constant' sum_p r'_p(i)

    and dx = dX phi'(x). For queries Y are keys, g the gradient of outputs and v values; for keys Y are queries, and g
    and v exchanged. ``states`` is sum_j gamma w_j Y_j v_j^T before segments, ``past`` and ``future`` are
    sum_j gamma c_p(j) (Y_j + e) before chunks and sum_j gamma c'_p(j) (Y_j + e') behind, (heads, chunks, pairs, D).

    Without LOCAL ``states``, ``past`` and ``future`` are all there is. OTHER: also what X_i has with earlier ones
    less what it has with later ones, for the gradient of decays: X . (first part) + (X + constant) . (second) - (X +
    constant') . (third), (blocks, heads, L). LAST: write gradients of x, else those of X.
    """
    head, segment, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    b, h = head // H, head % H
    d, m, i = block * BO + tl.arange(0, BO), tl.arange(0, BM), tl.arange(0, C)
    inside, columns_v = d < D, m < M
    x += b * xb + h * xh
    y += b * yb + h * yh
    g += b * gb + h * gh
    v += b * vb + h * vh
    out += b * ob + h * oh
    p = states + (head * segments + segment if LOCAL else head) * D * M
    S = tl.load(p + d[:, None] * M + m[None, :], inside[:, None] & columns_v[None, :], 0.0)
    first, last = segment * per, tl.minimum((segment + 1) * per, chunks)
    for turn in range(first, last):
        chunk = first + last - 1 - turn if REVERSE else turn
        at, there, real = tokens_of(mask + b * L, chunk, L, C, MASKED)
        a = tl.load(scale + head * L + at, real, 0.0)
        G = load_tokens(g, at, real, gt, m, columns_v, GIVEN) * a[:, None]
        here, rest, arrive, depart, away, whole = decay_of(
            total, ends, head, decay_heads, L, chunks, chunk, at, there, C, DECAY, REVERSE
        )
        found = multiply(G, tl.trans(S), DOT) * arrive[:, None]
        nearby, r = _from_states(
            rows, past, head * chunks + chunk if LOCAL else head, head, heads, L, at, real, arrive, d, inside, D, PAST
        )
        later, later_r = _from_states(
            later_rows, future, head * chunks + chunk if LOCAL else head, head, heads, L, at, real, depart, d, inside,
            D, FUTURE,
        )  # fmt: skip
        shares = tl.sum(nearby, 1)
        found += nearby
        if LOCAL:
            Y = load_tokens(y, at, real, yt, d, inside, MAP)
            V = load_tokens(v, at, real, vt, m, columns_v, GIVEN)
            if WEIGHTED:
                V *= tl.load(weight + head * L + at, real, 0.0)[:, None]
            of_y = tl.sum(Y, 1)
            width = tl.sum(tl.where(inside, 1.0, 0.0), 0)
            gamma = between(here, rest, i, REVERSE, STRICT, DECAY)
            A = multiply(G, tl.trans(V), DOT) * gamma
            if PAST > 0:
                B = _coefficients(rows, columns, head, heads, L, at, real, C, PAST) * gamma
                of_rows = tl.sum(B, 1)
                found += tl.where(inside[None, :], (shift_past * of_rows)[:, None], 0.0)
                shares += tl.sum(B * of_y[None, :], 1) + width * shift_past * of_rows
                A += B
            found += multiply(A, Y, DOT)
            if FUTURE > 0:
                B = _coefficients(later_rows, later_columns, head, heads, L, at, real, C, FUTURE)
                B *= between(here, rest, i, not REVERSE, LATER_STRICT, DECAY)
                later += multiply(B, Y, DOT) + tl.where(inside[None, :], (shift_future * tl.sum(B, 1))[:, None], 0.0)
            if DECAY:
                V *= away[:, None]
                S *= whole
            S += multiply(tl.trans(Y), V, DOT)
        if OTHER:
            X = load_tokens(x, at, real, xt, d, inside, MAP)
            mine = tl.sum(X * (found - later), 1) + constant_past * shares - constant_future * tl.sum(later, 1)
            tl.store(products + (block * heads + head) * L + at, mine, there)
        found += later + tl.where(inside[None, :], (constant_past * r + constant_future * later_r)[:, None], 0.0)
        ok = there[:, None] & inside[None, :]
        to = out + at[:, None] * ot + d[None, :]
        if ADD:
            found += tl.load(to, ok, 0.0).to(tl.float32)
        if LAST:
            found *= slope(x, at, real, xt, d, inside, MAP)
        tl.store(to, found.to(out.dtype.element_ty), ok)
