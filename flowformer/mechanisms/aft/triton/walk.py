"""AFT-simple by Triton kernels: a thread has a channel, and walks through the tokens of a chunk.

The sums up to a token t are s_t = sum_j exp(k_j - m_t) and w_t = sum_j exp(k_j - m_t) v_j, where m_t is the largest key
so far: their quotient is the mean mu_t, and no exponential is above 1. Sums of chunks are carried in float64.

With dm_t, the gradient of mu_t, and e(j, t) = exp(m_j - m_t) s_j / s_t, which is at most 1 for j <= t,

    R_j = sum_{t>=j} e(j, t) dm_t                   dv_j = exp(k_j - m_j) / s_j R_j
    S_j = sum_{t>=j} e(j, t) dm_t (mu_t - mu_j)     dk_j = exp(k_j - m_j) / s_j ((v_j - mu_j) R_j - S_j)

of which both sums are recurrences against the direction of time. Those over a chunk from the sums before it on take no
walk back.
"""

# Triton's language has Python's syntax, not its types.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false, reportCallIssue=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowformer.core.precision import LOG_ZERO
from flowformer.kernels.triton import launch

NOTHING = tl.constexpr(LOG_ZERO)


@triton.jit
def _token(mask, at, L, MASKED: tl.constexpr):
    """Return whether there is a real token at a place."""
    real = at < L
    if MASKED:
        real = real & (tl.load(mask + at, real, 0) != 0)
    return real


@triton.jit
def _read(x, at, stride, d, real, inside):
    """Return the channels of a token in float32; zeros where it is not real."""
    return tl.load(x + at * stride + d, inside & real, 0.0).to(tl.float32)


@triton.jit
def _weight(k, m, real):
    """Return exp(k - m), at most 1; zero where the token is not real."""
    return tl.exp(tl.where(real, k - m, NOTHING))


@triton.jit
def _add(m, s, w, k, v, real):
    """Return the sums with one more token."""
    new = tl.where(real, tl.maximum(m, k), m)
    kept, part = tl.exp(m - new), _weight(k, new, real)
    return new, s * kept + part, w * kept + part * v


@triton.jit
def _marks(marks, row, d, inside, D):
    """Return the sums of a mark: those before a chunk."""
    p = marks + row * 3 * D + d
    return tl.load(p, inside, 0.0), tl.load(p + D, inside, 1.0), tl.load(p + 2 * D, inside, 0.0)


@triton.jit(do_not_specialize=["L", "chunks"])
def sum_chunks(
    k, v, mask, marks, kb, kt, vb, vt, L, chunks, D: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Sums of each chunk by itself, (batch, chunks + 1, 3, D) without the last."""
    b, chunk, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * B + tl.arange(0, B)
    inside = d < D
    k += b * kb
    v += b * vb
    m, s, w = tl.zeros([B], tl.float32) + NOTHING, tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    for t in range(C):
        at = chunk.to(tl.int64) * C + t
        real = _token(mask + b * L, at, L, MASKED)
        m, s, w = _add(m, s, w, _read(k, at, kt, d, real, inside), _read(v, at, vt, d, real, inside), real)
    p = marks + (b * (chunks + 1) + chunk) * 3 * D + d
    tl.store(p, m, inside)
    tl.store(p + D, s, inside)
    tl.store(p + 2 * D, w, inside)


@triton.jit(do_not_specialize=["chunks"])
def carry(marks, log_weight, mean, log_weight_after, mean_after, chunks, D: tl.constexpr, B: tl.constexpr,
          FIRST: tl.constexpr):  # fmt: skip
    """Replace the sums of each chunk by those before it, and those after the last; also as a state, in float64."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    inside = d < D
    m = tl.zeros([B], tl.float32) + NOTHING
    s, w = tl.zeros([B], tl.float64) + 1.0, tl.zeros([B], tl.float64)
    if FIRST:
        given = tl.load(log_weight + b * D + d, inside, 0.0)
        m = given.to(tl.float32)
        # Of a state without tokens the rounding of LOG_ZERO itself is large.
        s = tl.exp(tl.where(given > 0.5 * NOTHING, given - m.to(tl.float64), 0.0))
        w = s * tl.load(mean + b * D + d, inside, 0.0)
    for chunk in range(chunks + 1):
        p = marks + (b * (chunks + 1) + chunk) * 3 * D + d
        ours = inside & (chunk < chunks)
        of_m, of_s, of_w = tl.load(p, ours, NOTHING), tl.load(p + D, ours, 0.0), tl.load(p + 2 * D, ours, 0.0)
        tl.store(p, m, inside)
        tl.store(p + D, s.to(tl.float32), inside)
        tl.store(p + 2 * D, w.to(tl.float32), inside)
        new = tl.maximum(m, of_m)
        kept, part = tl.exp((m - new).to(tl.float64)), tl.exp((of_m - new).to(tl.float64))
        s = s * kept + of_s.to(tl.float64) * part
        w = w * kept + of_w.to(tl.float64) * part
        m = new
    tl.store(log_weight_after + b * D + d, m.to(tl.float64) + tl.log(s), inside)
    tl.store(mean_after + b * D + d, w / s, inside)


@triton.jit(do_not_specialize=["L", "chunks"])
def outputs(
    q, k, v, mask, marks, out, qb, qt, kb, kt, vb, vt, ob, ot, L, chunks, D: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gated means sigmoid(q_t) w_t / s_t, from the sums before each chunk."""
    b, chunk, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * B + tl.arange(0, B)
    inside = d < D
    q += b * qb
    k += b * kb
    v += b * vb
    out += b * ob
    m, s, w = _marks(marks, b * (chunks + 1) + chunk, d, inside, D)
    for t in range(C):
        at = chunk.to(tl.int64) * C + t
        real = _token(mask + b * L, at, L, MASKED)
        m, s, w = _add(m, s, w, _read(k, at, kt, d, real, inside), _read(v, at, vt, d, real, inside), real)
        gate = 1.0 / (1.0 + tl.exp(-_read(q, at, qt, d, real, inside)))
        found = tl.where(real, gate * w / s, 0.0)
        tl.store(out + at * ot + d, found.to(out.dtype.element_ty), inside & (at < L))


@triton.jit(do_not_specialize=["L", "chunks"])
def sum_gradients(
    q, k, v, g, mask, marks, sums, qb, qt, kb, kt, vb, vt, gb, gt, L, chunks, D: tl.constexpr, B: tl.constexpr,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """R and S of the sums before each chunk, over the tokens of the chunk, (batch, chunks, 2, D)."""
    b, chunk, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * B + tl.arange(0, B)
    inside = d < D
    q += b * qb
    k += b * kb
    v += b * vb
    g += b * gb
    m, s, w = _marks(marks, b * (chunks + 1) + chunk, d, inside, D)
    first_m, first_s, mean = m, s, w / s
    R, S = tl.zeros([B], tl.float32), tl.zeros([B], tl.float32)
    for t in range(C):
        at = chunk.to(tl.int64) * C + t
        real = _token(mask + b * L, at, L, MASKED)
        m, s, w = _add(m, s, w, _read(k, at, kt, d, real, inside), _read(v, at, vt, d, real, inside), real)
        of_mean = _read(g, at, gt, d, real, inside) / (1.0 + tl.exp(-_read(q, at, qt, d, real, inside)))
        of_mean *= tl.exp(first_m - m) * first_s / s
        R += of_mean
        S += of_mean * (w / s - mean)
    p = sums + (b * chunks + chunk) * 2 * D + d
    tl.store(p, R, inside)
    tl.store(p + D, S, inside)


@triton.jit(do_not_specialize=["chunks"])
def carry_gradients(
    marks, sums, of_log_weight, of_mean, of_first_log_weight, of_first_mean, chunks, D: tl.constexpr, B: tl.constexpr,
    LOG_WEIGHT: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Replace R and S of each chunk by those behind it; and those before all as gradients of the state, in float64."""
    b, d = tl.program_id(0).to(tl.int64), tl.program_id(1) * B + tl.arange(0, B)
    inside = d < D
    R, S = tl.zeros([B], tl.float64), tl.zeros([B], tl.float64)
    if MEAN:
        R = tl.load(of_mean + b * D + d, inside, 0.0)
    if LOG_WEIGHT:
        S = -tl.load(of_log_weight + b * D + d, inside, 0.0)
    for turn in range(chunks):
        chunk = chunks - 1 - turn
        m, s, w = _marks(marks, b * (chunks + 1) + chunk, d, inside, D)
        next_m, next_s, next_w = _marks(marks, b * (chunks + 1) + chunk + 1, d, inside, D)
        p = sums + (b * chunks + chunk) * 2 * D + d
        of_R, of_S = tl.load(p, inside, 0.0), tl.load(p + D, inside, 0.0)
        tl.store(p, R.to(tl.float32), inside)
        tl.store(p + D, S.to(tl.float32), inside)
        kept = (tl.exp(m - next_m) * s / next_s).to(tl.float64)
        apart = (next_w / next_s - w / s).to(tl.float64)
        S = of_S.to(tl.float64) + kept * (S + apart * R)
        R = of_R.to(tl.float64) + kept * R
    tl.store(of_first_mean + b * D + d, R, inside)
    tl.store(of_first_log_weight + b * D + d, -S, inside)


@triton.jit(do_not_specialize=["L", "chunks", "segments", "per"])
def gradients(
    q, k, v, g, mask, marks, sums, scratch, grad_q, grad_k, grad_v,
    qb, qt, kb, kt, vb, vt, gb, gt, L, chunks, segments, per,
    D: tl.constexpr, B: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k and v (batch, L, D): the sums of each chunk once more, kept in ``scratch``, and a walk back."""
    b, segment, block = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    i = tl.arange(0, B)
    d = block * B + i
    inside = d < D
    scratch += ((b * segments + segment) * tl.num_programs(2) + block) * 3 * C * B
    q += b * qb
    k += b * kb
    v += b * vb
    g += b * gb
    to = b * L * D
    first, last = segment * per, tl.minimum((segment + 1) * per, chunks)
    for turn in range(first, last):
        chunk = first + last - 1 - turn
        m, s, w = _marks(marks, b * (chunks + 1) + chunk, d, inside, D)
        for t in range(C):
            at = chunk.to(tl.int64) * C + t
            real = _token(mask + b * L, at, L, MASKED)
            m, s, w = _add(m, s, w, _read(k, at, kt, d, real, inside), _read(v, at, vt, d, real, inside), real)
            tl.store(scratch + t * B + i, m)
            tl.store(scratch + (C + t) * B + i, s)
            tl.store(scratch + (2 * C + t) * B + i, w / s)
        tl.debug_barrier()
        p = sums + (b * chunks + chunk) * 2 * D + d
        R, S = tl.load(p, inside, 0.0), tl.load(p + D, inside, 0.0)
        next_m, next_s, next_mean = m, s, w / s
        for back in range(C):
            t = C - 1 - back
            at = chunk.to(tl.int64) * C + t
            real = _token(mask + b * L, at, L, MASKED)
            now, total, mean = (
                tl.load(scratch + t * B + i), tl.load(scratch + (C + t) * B + i), tl.load(scratch + (2 * C + t) * B + i)
            )  # fmt: skip
            kept = tl.exp(now - next_m) * total / next_s
            S = kept * (S + (next_mean - mean) * R)
            gate = 1.0 / (1.0 + tl.exp(-_read(q, at, qt, d, real, inside)))
            grad = _read(g, at, gt, d, real, inside)
            R = grad * gate + kept * R
            part = _weight(_read(k, at, kt, d, real, inside), now, real) / total
            ok, place = inside & (at < L), to + at * D + d
            of_k = part * ((_read(v, at, vt, d, real, inside) - mean) * R - S)
            tl.store(grad_q + place, (grad * mean * gate * (1.0 - gate)).to(grad_q.dtype.element_ty), ok)
            tl.store(grad_k + place, of_k.to(grad_k.dtype.element_ty), ok)
            tl.store(grad_v + place, (part * R).to(grad_v.dtype.element_ty), ok)
            next_m, next_s, next_mean = now, total, mean
        tl.debug_barrier()


@triton.jit(do_not_specialize=["L", "chunks"])
def spread(
    k, v, mask, marks, of_log_weight, of_mean, grad_k, grad_v, kb, kt, vb, vt, L, chunks, D: tl.constexpr,
    B: tl.constexpr, C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Gradients of k and v (batch, L, D) from those of the sums over all tokens, (batch, D) in float64."""
    b, chunk, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * B + tl.arange(0, B)
    inside = d < D
    k += b * kb
    v += b * vb
    m, s, w = _marks(marks, b * (chunks + 1) + chunks, d, inside, D)
    of_weight = tl.load(of_log_weight + b * D + d, inside, 0.0).to(tl.float32)
    given = tl.load(of_mean + b * D + d, inside, 0.0).to(tl.float32)
    for t in range(C):
        at = chunk.to(tl.int64) * C + t
        real = _token(mask + b * L, at, L, MASKED)
        part = _weight(_read(k, at, kt, d, real, inside), m, real) / s
        ok, place = inside & (at < L), b * L * D + at * D + d
        of_k = part * ((_read(v, at, vt, d, real, inside) - w / s) * given + of_weight)
        tl.store(grad_k + place, of_k.to(grad_k.dtype.element_ty), ok)
        tl.store(grad_v + place, (part * given).to(grad_v.dtype.element_ty), ok)


# ------------------------------------------------------------------------------------------------------------ launches


class Form(NamedTuple):
    """Keys and values (batch, L, channels), their mask (batch, L), and how many tokens a chunk has."""

    k: Tensor
    v: Tensor
    mask: Tensor | None
    chunk: int

    @property
    def chunks(self) -> int:
        """Number of chunks."""
        return triton.cdiv(self.k.shape[1], self.chunk)

    def run(self, kernel: Any, middle: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """Launch a kernel for each sequence and block of channels, with chunks or segments between them."""
        batch, _, D = self.k.shape
        block = min(128, triton.next_power_of_2(D))
        options = {"D": D, "B": block, "num_warps": max(1, block // 32), **options}
        launch.run(kernel, (batch, *middle, triton.cdiv(D, block)), *arguments, **options)

    def walk(self, kernel: Any, *arguments: Any, number: int | None = None) -> None:
        """Launch a kernel for each chunk too, or another number of its programs, with the mask's flags."""
        options = {"C": self.chunk, "MASKED": self.mask is not None}
        self.run(kernel, (self.chunks if number is None else number,), *arguments, **options)

    @property
    def given(self) -> Tensor:
        """Pointer to the mask."""
        return self.k if self.mask is None else self.mask.contiguous()

    def numbers(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Memory for (batch, ..., channels)."""
        return self.k.new_empty(self.k.shape[0], *shape, self.k.shape[2], dtype=dtype)

    def sum(self, log_weight: Tensor | None, mean: Tensor | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return marks, the sums before each chunk and after the last (batch, chunks + 1, 3, channels); the state."""
        k, v = self[:2]
        marks = self.numbers(self.chunks + 1, 3, dtype=torch.float32)
        self.walk(sum_chunks, k, v, self.given, marks, *k.stride()[:2], *v.stride()[:2], k.shape[1], self.chunks)
        after = self.numbers(), self.numbers()
        first = (marks, marks) if log_weight is None or mean is None else (log_weight.contiguous(), mean.contiguous())
        self.run(carry, (), marks, *first, *after, self.chunks, FIRST=log_weight is not None)
        return marks, after


def causal_forward(form: Form, q: Tensor, log_weight: Tensor | None, mean: Tensor | None) -> tuple[Tensor, ...]:
    """Return outputs, the state after them, and marks."""
    marks, after = form.sum(log_weight, mean)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    strides = (stride for x in (q, form.k, form.v, out) for stride in x.stride()[:2])
    form.walk(outputs, q, form.k, form.v, form.given, marks, out, *strides, q.shape[1], form.chunks)
    return out, *after, marks


def causal_backward(
    form: Form, q: Tensor, marks: Tensor, grad_out: Tensor, of_log_weight: Tensor | None, of_mean: Tensor | None
) -> tuple[Tensor, ...]:
    """Return the gradients of q, k and v, and of the state before."""
    k, v = form[:2]
    tensors = q, k, v, grad_out
    strides = [stride for x in tensors for stride in x.stride()[:2]]
    sums = form.numbers(form.chunks, 2, dtype=torch.float32)
    form.walk(sum_gradients, *tensors, form.given, marks, sums, *strides, q.shape[1], form.chunks)
    before = form.numbers(), form.numbers()
    given = [marks if x is None else x.contiguous() for x in (of_log_weight, of_mean)]
    form.run(
        carry_gradients, (), marks, sums, *given, *before, form.chunks, LOG_WEIGHT=of_log_weight is not None,
        MEAN=of_mean is not None,
    )  # fmt: skip
    per = max(1, launch.SEGMENT // form.chunk)
    segments = triton.cdiv(form.chunks, per)
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    width = min(128, triton.next_power_of_2(k.shape[2]))
    scratch = marks.new_empty(q.shape[0] * segments * triton.cdiv(k.shape[2], width), 3, form.chunk, width)
    form.walk(
        gradients, *tensors, form.given, marks, sums, scratch, *grads, *strides, q.shape[1], form.chunks, segments, per,
        number=segments,
    )  # fmt: skip
    return *grads, *before


def means_backward(form: Form, marks: Tensor, of_log_weight: Tensor, of_mean: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of k and v from those of the state after all tokens."""
    k, v = form[:2]
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v)]
    strides = (stride for x in (k, v) for stride in x.stride()[:2])
    given = (x.double().contiguous() for x in (of_log_weight, of_mean))
    form.walk(spread, k, v, form.given, marks, *given, *grads, *strides, k.shape[1], form.chunks)
    return grads[0], grads[1]
