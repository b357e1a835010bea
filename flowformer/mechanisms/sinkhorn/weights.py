"""Rows of weights of Sinkhorn attention, and its float64 reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.mechanisms.sinkhorn.operation import EPS, SORTS
from flowformer.mechanisms.weights import Rows, truth_of


def sinkhorn_weights(
    q: Tensor,
    k: Tensor,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    noise: Tensor | None = None,
    sort_kernel: Tensor | None = None,
    *,
    causal: bool = False,
    of_nulls: bool = False,
    bucket_length: int = 64,
    sort: str = "top",
    num_top: int = 1,
    temperature: float = 0.75,
    iterations: int = 7,
    values: str = "values",
) -> Rows:
    """Return rows of weights of one sequence; ``of_nulls``, those of null buckets in the first column instead."""
    if SORTS[sort] == "lra" or values == "keys":
        raise ValueError("sinkhorn: the released forms have no rows of weights here: sort must be 'top' or 'gumbel'")
    (length, heads, channels), width = q.shape, bucket_length
    place, head = torch.arange(length, device=q.device), torch.arange(heads, device=q.device).unsqueeze(1)
    shift = (head >= heads // 2).long() if causal else torch.zeros_like(head)
    bucket = (place + shift) // width  # (heads, length)
    count = int(bucket.max()) + 1
    of_q, of_k = q.transpose(0, 1), k.transpose(0, 1)
    if causal:
        of_q, of_k = _running(of_q, shift, width), _add_up(_running(of_k, shift, width), bucket, count)
    else:
        sizes = _add_up(torch.ones_like(of_q[..., :1]), bucket, count)
        of_q, of_k = (_add_up(x, bucket, count) / sizes for x in (of_q, of_k))
    null_key = q.new_zeros(heads, channels) if null_key is None else null_key

    def rows(places: Tensor) -> Tensor:
        u = bucket[:, places]
        asking = of_q[head, (u * width - shift).clamp(min=0) if causal else u]
        r = torch.einsum("hrk,hjk->hrj", asking, of_k) / channels**0.5
        scores = torch.einsum("rhk,jhk->hrj", q[places], k) / channels**0.5
        own = bucket.unsqueeze(1) == u.unsqueeze(2)
        own = own & (place <= places.unsqueeze(1)) if causal else own
        own = scores.masked_fill(~own, -torch.inf)
        if noise is not None:
            whole = torch.einsum("huk,hjk->huj", of_q, of_k) / channels**0.5
            R = _balanced(whole, noise[:, :count, :count], temperature, iterations)[head, u]
            return _mixture_rows(q[places], k, own, R, width)
        if causal:
            over = torch.arange(count, device=q.device)
            r = (r / temperature).masked_fill((over >= u.unsqueeze(2)) | (over < shift.unsqueeze(2)), -torch.inf)
            r = nn.functional.pad(r, (num_top, 0))
        of_tops, of_null, weights = [], [], []
        for _ in range(min(num_top, r.shape[-1])):
            weight, chosen = r.softmax(-1).max(-1, keepdim=True)
            r = r.scatter(-1, chosen, -torch.inf)
            at = chosen - num_top if causal else chosen
            there = (bucket.unsqueeze(1) == at) & ~((u == 0) & (shift == 1)).unsqueeze(2)
            of_tops.append((weight * scores).masked_fill(~there, -torch.inf))
            null = weight.squeeze(-1) * torch.einsum("rhk,hk->hr", q[places], null_key) / channels**0.5
            is_null = (at.squeeze(-1) < 0) & ~((u == 0) & (shift == 1))
            of_null.append((null + math.log(width)).masked_fill(~is_null, -torch.inf))
            weights.append(weight)
        total = torch.cat([own, *of_tops, torch.stack(of_null, -1)], -1).logsumexp(-1, keepdim=True)
        if of_nulls:
            mass = sum(w.squeeze(-1) * (x - total.squeeze(-1)).exp() for w, x in zip(weights, of_null, strict=True))
            return nn.functional.pad(torch.as_tensor(mass).unsqueeze(-1), (0, length - 1))
        return (own - total).exp() + sum(w * (x - total).exp() for w, x in zip(weights, of_tops, strict=True))

    return rows


def _running(x: Tensor, shift: Tensor, width: int) -> Tensor:
    """Means of x (heads, length, K) up to each token, from the first limit of buckets on."""
    since = torch.arange(x.shape[1], device=x.device) - shift * (width - 1) + 1
    return torch.where(since.unsqueeze(-1) > 0, x, 0).cumsum(1) / since.clamp(min=1).unsqueeze(-1)


def _add_up(x: Tensor, bucket: Tensor, count: int) -> Tensor:
    """Sums of x (heads, length, K) by bucket, (heads, count, K)."""
    return x.new_zeros(len(x), count, x.shape[-1]).scatter_add(1, bucket.unsqueeze(-1).expand_as(x), x)


def _mixture_rows(q: Tensor, k: Tensor, own: Tensor, R: Tensor, width: int) -> Tensor:
    """Rows where mixtures R (heads, rows, buckets) of buckets are sorted to that of each query."""
    length, _, channels = k.shape
    slots = nn.functional.pad(k, (0, 0, 0, 0, 0, -length % width)).unflatten(0, (-1, width))
    scores = torch.einsum("rhk,hrj,jwhk->hrw", q, R, slots) / channels**0.5
    scores = scores.masked_fill(torch.arange(width, device=k.device) >= length, -torch.inf)
    total = torch.cat([own, scores], -1).logsumexp(-1, keepdim=True)
    mixed = R.unsqueeze(-1) * (scores - total).exp().unsqueeze(-2)
    return (own - total).exp() + mixed.flatten(2)[..., :length]


def _balanced(r: Tensor, noise: Tensor, temperature: float, iterations: int) -> Tensor:
    weights = ((r.relu() + EPS).log() + noise).div(temperature)
    weights = (weights - weights.amax((-1, -2), keepdim=True)).exp()
    for _ in range(iterations):
        weights = weights / weights.sum(-1, keepdim=True)
        weights = weights / weights.sum(-2, keepdim=True)
    return weights


def sinkhorn_truth(q: Tensor, k: Tensor, v: Tensor, *tensors: Any, **arguments: Any) -> Tensor:
    """Return the float64 reference: rows times values, and what null buckets have of the null value."""
    out = truth_of(sinkhorn_weights)(q, k, v, *tensors, **arguments)
    if not arguments.get("causal") or tensors[1:2] in ((), (None,)):
        return out
    of_null = truth_of(sinkhorn_weights)(q, k, torch.ones_like(v), *tensors, of_nulls=True, **arguments)
    return out + of_null * tensors[1].double()
