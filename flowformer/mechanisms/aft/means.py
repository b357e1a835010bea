r"""Weighted means of values by matrix products that cannot overflow, shared by all forms of AFT.

For each query t and each channel, AFT computes the mean of the values under weights exp(k_j + w_tj):

    y_t = sum_j exp(w_tj) exp(k_j) v_j / sum_j exp(w_tj) exp(k_j)

w has no channels and k has no queries, so numerator and denominator are two matrix products: of A = exp(w - max_j w)
with E = exp(k - m) and with E v. Both are exact for any m, since it cancels, as long as the denominator is neither 0
nor infinite.

* Bidirectional: m is the largest key of the channel.
* Causal: m must not know later keys than the first query of a chunk does, for a key to come must change no digit of
  what was: it is the largest key up to there. A later key may exceed it. exp(k - m) is cut off at exp(CAP), and a query
  that sees such a key is repaired.
* Where the denominator is next to nothing (the largest key has the smallest w), the entry is repaired too.

To repair an entry is to take its softmax by itself, in float64. Only keys that jump by 40 ask for it. A traced graph
(compile, export) cannot look for them: it takes the largest key of a chunk for m. There, a key that exceeds all others
so far by 57 hides what was before it from the other queries of its chunk: values stay finite, but are not exact.

What lies outside a window has w = 0: it is one more key, whose logarithmic weight is the log-sum-exp of all those keys,
and whose value is their weighted mean. Such pairs, :class:`Past`, add up like log-sums, from left to right or by
halves: they are the state of a causal form. No sum is ever a difference, so nothing cancels.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowformer.core.precision import LOG_ZERO, state_dtype
from flowformer.core.tracing import cumulate, is_exporting, is_traced, is_transformed, log_add

CAP = 40.0  # exp(40) = 2e17: products of it and its inverse stay within float32
TINY = {torch.float32: 1e-25, torch.float64: 1e-200}  # denominators below are repaired
REPAIR = 2**22  # numbers that exist at a time while entries are repaired


# ------------------------------------------------------------------------------------------------ what is far away


class Past(NamedTuple):
    """Summary of keys and values that all queries see equally: one key and one value.

    Attributes:
        log_weight: log sum_j exp(k_j), (..., M), float64.
        mean: sum_j exp(k_j) v_j / sum_j exp(k_j), (..., M, e), float64.
    """

    log_weight: Tensor
    mean: Tensor


def summarise(K: Tensor, V: Tensor) -> Past:
    """Summarise tokens by log-sum and mean: K (..., tokens, M), V (..., tokens, M, e)."""
    m = K.detach().amax(-2, keepdim=True)
    weights = (K - m).exp()
    total = weights.sum(-2)
    mean = (weights.unsqueeze(-1) * V).sum(-3) / total.unsqueeze(-1)
    wide = state_dtype(K.device)
    # The logarithm is small beside a large key: added in float64, it keeps its digits.
    return Past(m.squeeze(-2).to(wide) + total.to(wide).log(), mean.to(wide))


def join(one: Past, other: Past) -> Past:
    """Combine two summaries."""
    total = log_add(one.log_weight, other.log_weight)
    of_one, of_other = ((past.log_weight - total).exp().unsqueeze(-1) for past in (one, other))
    return Past(total, of_one * one.mean + of_other * other.mean)


def accumulate(pieces: Past, dim: int = 1) -> Past:
    """Combine each piece along ``dim`` with all before it, by doubling."""
    if is_exporting():
        return Past(*cumulate(pieces, lambda one, other: join(Past(*one), Past(*other)), (LOG_ZERO, 0.0), dim))
    shift, count = 1, pieces.log_weight.shape[dim]
    while shift < count:
        left = Past(*(part.narrow(dim, 0, count - shift) for part in pieces))
        right = Past(*(part.narrow(dim, shift, count - shift) for part in pieces))
        joined = join(left, right)
        pieces = Past(*(torch.cat([a.narrow(dim, 0, shift), b], dim) for a, b in zip(pieces, joined, strict=True)))
        shift *= 2
    return pieces


# --------------------------------------------------------------------------------------------------- weighted means


class Sources(NamedTuple):
    """Scaled keys and values, ready to be summed.

    Attributes:
        K: Keys, (..., n, M).
        V: Values, (..., n, M, e).
        past: What all queries see besides with w = 0, or ``None``.
        E: exp(K - m), at most exp(CAP), (..., n, M).
        EV: E V, (..., n, M e).
        over: Which keys were cut off, (..., n, M); ``None`` where none was.
        far: exp(past.log_weight - m), (..., 1, M).
    """

    K: Tensor
    V: Tensor
    past: Past | None
    E: Tensor
    EV: Tensor
    over: Tensor | None
    far: Tensor | None


def prepare(K: Tensor, V: Tensor, past: Past | None, first: int | None) -> Sources:
    """``first``: how many leading keys may be looked at for the scale; ``None`` for all."""
    m = K.detach()[..., : None if is_plain() else first, :].amax(-2, keepdim=True)
    if past is not None:
        m = m.maximum(past.log_weight.detach().unsqueeze(-2).to(m.dtype))
    above, over = K - m, None
    may_exceed = first is not None and first < K.shape[-2] and not is_plain() and above.numel() > 0
    if may_exceed and above[..., first:, :].max() > CAP:
        above, over = above.clamp(max=CAP), above > CAP
    E = above.exp_()
    far = None
    if past is not None:
        # Taken in float64, since m has lost digits of it, and cut off, since without any key both are -1e30, rounded.
        far = (past.log_weight.unsqueeze(-2) - m).clamp(max=1).exp().to(E.dtype)
    return Sources(K, V, past, E, (E.unsqueeze(-1) * V).flatten(-2), over, far)


def is_plain() -> bool:
    """Return whether data must not be inspected, since a graph is traced or torch.func is active."""
    return is_traced() or is_transformed()


def is_below(x: Tensor, bound: float) -> bool:
    """Return whether a number of x is below ``bound``; none is where there is no sequence."""
    return x.numel() > 0 and bool(x.min() < bound)


class Weights(NamedTuple):
    """A scaled position bias.

    Attributes:
        w: The bias, (..., q, n).
        A: exp(w - r), where r is the largest w of a row, or 0 if that is more and there is a past, (..., q, n).
        a: exp(-r), the weight of the past, (..., q, 1); ``None`` where there is none.
    """

    w: Tensor
    A: Tensor
    a: Tensor | None


def weigh(w: Tensor, has_past: bool) -> Weights:
    """Return the weights of a position bias."""
    r = w.detach().amax(-1, keepdim=True)
    r = r.clamp(min=0) if has_past else r
    return Weights(w, (w - r).exp_(), (-r).exp() if has_past else None)


def means(weights: Weights, sources: Sources) -> tuple[Tensor, Tensor]:
    """Return means (..., q, M, e) and denominators (..., q, M), which are 0 where an entry was recomputed."""
    w, A, a = weights
    total, out = A @ sources.E, A @ sources.EV
    out = out.unflatten(-1, (-1, sources.V.shape[-1]))
    if a is not None:
        assert sources.far is not None  # as there is a past
        assert sources.past is not None
        far = a * sources.far
        total = total + far
        mean = sources.past.mean.to(out.dtype).unsqueeze(-3)
        out = torch.addcmul(out, far.unsqueeze(-1), mean)
    tiny = TINY[total.dtype]
    if is_plain():
        return out / total.clamp(min=tiny).unsqueeze(-1), total
    if sources.over is None and not is_below(total, tiny):
        return out.div_(total.unsqueeze(-1)), total
    bad = total < tiny
    if sources.over is not None:
        bad = bad | ((A > 0).to(A.dtype) @ sources.over.to(A.dtype) > 0)
    total = total.masked_fill(bad, 0)
    out = out / total.masked_fill(bad, 1).unsqueeze(-1)
    for entries, shares, values in _repairs(bad, w, sources):
        out[entries] = (shares.unsqueeze(-1) * values).sum(-2).to(out.dtype)
    return out, total


Entries = tuple[Tensor, ...]


def _repairs(bad: Tensor, w: Tensor, sources: Sources) -> Iterator[tuple[Entries, Tensor, Tensor]]:
    """For entries (..., q, M) to repair, some at a time: where, their shares (N, 1 + n) and values (N, 1 + n, e)."""
    K, V, past = sources.K, sources.V, sources.past
    entries = bad.nonzero()
    lead = bad.shape[:-2]
    wide = state_dtype(K.device)
    for some in entries.split(max(1, REPAIR // (K.shape[-2] * V.shape[-1]))):
        *where, query, column = some.unbind(1)
        rows = w.expand(*lead, *w.shape[-2:])[(*where, query)]
        # Advanced indices around a slice: the chosen entries come first, then the slice.
        keys = K.expand(*lead, *K.shape[-2:])[(*where, slice(None), column)]
        values = V.expand(*lead, *V.shape[-3:])[(*where, slice(None), column)]
        logits, values = keys.to(wide) + rows.to(wide), values.to(wide)
        if past is not None:
            logits = torch.cat([past.log_weight.expand(*lead, -1)[(*where, column)].unsqueeze(-1), logits], -1)
            mean = past.mean.expand(*lead, *past.mean.shape[-2:])[(*where, column)]
            values = torch.cat([mean.unsqueeze(-2), values], -2)
        yield tuple(some.unbind(1)), logits.softmax(-1), values


class Gradients(NamedTuple):
    """Gradients of K (..., n, M), V (..., n, M, e), the past, and w (..., q, n)."""

    K: Tensor
    V: Tensor
    past: Past | None
    w: Tensor | None


class Upstream(NamedTuple):
    """Gradients of the two matrix products.

    Attributes:
        out: Gradient of the numerators, (..., q, M, e).
        total: Minus that of the denominators, (..., q, M).
        bad: Which entries were repaired, and are 0 here; ``None`` where none was.
    """

    out: Tensor
    total: Tensor
    bad: Tensor | None


def come_back(y: Tensor, total: Tensor, grad: Tensor) -> Upstream:
    """Compute :class:`Upstream` from the results ``y`` and ``total`` of :func:`means` and the gradient of y."""
    tiny = TINY[total.dtype]
    bad = total < tiny if is_below(total, tiny) else None
    out = grad / (total if bad is None else total.masked_fill(bad, torch.inf)).unsqueeze(-1)
    return Upstream(out, (out * y).sum(-1), bad)


def finish_sources(sources: Sources, of_EV: Tensor, of_E: Tensor) -> tuple[Tensor, Tensor]:
    """Return gradients of K and V from A^T times each part of :class:`Upstream`; overwrites its arguments.

    With p_tj = exp(k_j + w_tj) / sum: dy_t / dv_j = p_tj, and the gradient of k_j + w_tj is p_tj grad_t (v_j - y_t).
    """
    of_K = (sources.V * of_EV).sum(-1).sub_(of_E).mul_(sources.E)
    return of_K, of_EV.mul_(sources.E.unsqueeze(-1))


def of_weights(weights: Weights, sources: Sources, back: Upstream) -> Tensor:
    """Return the gradient of w, (..., q, n)."""
    return (back.out.flatten(-2) @ sources.EV.mT).sub_(back.total @ sources.E.mT).mul_(weights.A)


def means_backward(
    weights: Weights, sources: Sources, y: Tensor, total: Tensor, grad: Tensor, *, of_w: bool
) -> Gradients:
    """Return gradients of :func:`means` from its results ``y`` and ``total`` and the gradient of y, (..., q, M, e)."""
    back = come_back(y, total, grad)
    of_EV = (weights.A.mT @ back.out.flatten(-2)).unflatten(-1, back.out.shape[-2:])
    of_K, of_V = finish_sources(sources, of_EV, weights.A.mT @ back.total)
    of_past = None
    if weights.a is not None:
        assert sources.far is not None
        assert sources.past is not None
        a, past = weights.a, sources.past
        mean = (a.mT @ back.out.flatten(-2)).squeeze(-2).unflatten(-1, back.out.shape[-2:]) * sources.far.mT
        log_weight = (past.mean * mean).sum(-1) - ((a.mT @ back.total) * sources.far).squeeze(-2)
        of_past = Past(log_weight.to(past.mean.dtype), mean.to(past.mean.dtype))
    grads = Gradients(of_K, of_V, of_past, of_weights(weights, sources, back) if of_w else None)
    if back.bad is not None:
        repair_gradients(grads, back.bad, weights.w, sources, y, grad)
    return grads


def repair_gradients(grads: Gradients, bad: Tensor, w: Tensor, sources: Sources, y: Tensor, grad: Tensor) -> None:
    """Add the gradients of recomputed entries."""
    for entries, shares, values in _repairs(bad, w, sources):
        *where, query, column = entries
        upstream = grad[entries].to(values.dtype).unsqueeze(-2)
        of_values = shares.unsqueeze(-1) * upstream
        of_logits = shares * (upstream * (values - y[entries].to(values.dtype).unsqueeze(-2))).sum(-1)
        if grads.past is not None:
            grads.past.mean.index_put_((*where, column), of_values[:, 0], accumulate=True)
            grads.past.log_weight.index_put_((*where, column), of_logits[:, 0], accumulate=True)
            of_values, of_logits = of_values[:, 1:], of_logits[:, 1:]
        places = torch.arange(of_logits.shape[1], device=w.device)
        across = (*(index.unsqueeze(1) for index in where), places, column.unsqueeze(1))
        grads.V.index_put_(across, of_values.to(grads.V.dtype), accumulate=True)
        grads.K.index_put_(across, of_logits.to(grads.K.dtype), accumulate=True)
        if grads.w is not None:
            grads.w.index_put_((*where, query), of_logits.to(grads.w.dtype), accumulate=True)


def refuse_second_gradients() -> None:
    """Raise RuntimeError if second-order gradients are requested."""
    if torch.is_grad_enabled():
        raise RuntimeError("AFT does not support second-order gradients: omit create_graph=True")
