"""Weighted means over images: what AFT-conv is made of in two dimensions.

The sum over a filter's window is a depthwise convolution with exp(w), whose terms are all positive. What is outside of
the window is summed by itself, from positive terms too: the rows above and below it, and in the rows it covers what is
on its left and on its right. See :mod:`flowformer.mechanisms.aft.means` for scales and repairs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d, pad

from flowformer.core.precision import LOG_ZERO, state_dtype
from flowformer.mechanisms.aft.means import REPAIR, TINY, is_plain


def image_means(w: Tensor, K: Tensor, V: Tensor, *, hard: bool) -> Tensor:
    """Means of values under exp(k_j + w_{j - t}), head by head.

    Args:
        w: Filters (heads, rows, columns), of odd sizes.
        K: Keys (batch, height, width, heads), next to -infinity where there is none.
        V: Values (batch, height, width, heads, e).
        hard: See nothing outside of a filter's window.

    Returns:
        (batch, height, width, heads, e).
    """
    m = K.detach().amax((1, 2), keepdim=True)
    r = w.detach().amax((1, 2))
    r = r if hard else r.clamp(min=0)
    E, A = (K - m).exp(), (w - r.view(-1, 1, 1)).exp()
    a, e = None if hard else (-r).exp(), V.shape[-1]
    total = _sums(E, A, a)
    EV = (E.unsqueeze(-1) * V).flatten(3)
    out = _sums(EV, A.repeat_interleave(e, 0), None if a is None else a.repeat_interleave(e, 0))
    out, tiny = out.unflatten(3, (-1, e)), TINY[total.dtype]
    if is_plain():
        return out / total.clamp(min=tiny).unsqueeze(-1)
    bad = total < tiny
    if not bad.any():
        return out / total.unsqueeze(-1)
    out = out / total.masked_fill(bad, 1).unsqueeze(-1)
    return _repair(out, bad, w, K, V, hard)


def _sums(x: Tensor, A: Tensor, a: Tensor | None) -> Tensor:
    """Sum of A x within the windows around each pixel, and of a x outside; x (batch, height, width, c), a (c,)."""
    channels, rows, columns = A.shape
    down, across = rows // 2, columns // 2
    image = x.permute(0, 3, 1, 2)
    within = conv2d(image, A.unsqueeze(1), padding=(down, across), groups=channels).permute(0, 2, 3, 1)
    if a is None:
        return within
    ones = x.new_ones(channels, 1, rows, 1)
    band = conv2d(image, ones, padding=(down, 0), groups=channels).permute(0, 2, 3, 1)
    outside = _beyond(x.sum(2), 1, down).unsqueeze(2) + _beyond(band, 2, across)
    return within + a * outside


def _beyond(x: Tensor, dim: int, reach: int) -> Tensor:
    """Sums along ``dim`` of what is more than ``reach`` away, on either side."""
    length = x.shape[dim]
    if reach + 1 >= length:
        return torch.zeros_like(x)
    sides = [0, 0] * (x.ndim - 1 - dim)
    before = pad(x.cumsum(dim), (*sides, reach + 1, 0)).narrow(dim, 0, length)
    behind = pad(x.flip(dim).cumsum(dim), (*sides, reach + 1, 0)).narrow(dim, 0, length).flip(dim)
    return before + behind


def _repair(out: Tensor, bad: Tensor, w: Tensor, K: Tensor, V: Tensor, hard: bool) -> Tensor:
    """The means, with those of the entries (batch, height, width, heads) in question taken one by one."""
    wide, (height, width) = state_dtype(K.device), K.shape[1:3]
    rows, columns = w.shape[1:]
    outside = w.new_full((len(w), 1), LOG_ZERO if hard else 0.0)
    taps = torch.cat([w.flatten(1), outside], 1)
    entries = bad.nonzero()
    place = torch.arange(height * width, device=w.device)
    for some in entries.split(max(1, REPAIR // (height * width * V.shape[-1]))):
        image, y, x, head = some.unbind(1)
        down = place // width - y.unsqueeze(1) + rows // 2
        across = place % width - x.unsqueeze(1) + columns // 2
        far = (down < 0) | (down >= rows) | (across < 0) | (across >= columns)
        bias = taps[head.unsqueeze(1), (down * columns + across).masked_fill(far, rows * columns)]
        logits = K[image, :, :, head].flatten(1).to(wide) + bias.to(wide)
        values = V[image, :, :, head].flatten(1, 2).to(wide)
        mean = (logits.softmax(1).unsqueeze(-1) * values).sum(1)
        out = out.index_put(some.unbind(1), mean.to(out.dtype))
    return out
