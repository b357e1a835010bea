r"""Sparse Sinkhorn attention (Tay et al., ICML 2020): buckets of tokens meet buckets that are sorted to them.

A sequence is cut into buckets of w tokens. Bucket u attends to itself and to other buckets under weights R, by one
softmax over both, with scores scaled by 1 / sqrt(K). R is a function of scores of buckets, r_uj = mean(q in u) . mean(k
in j) / sqrt(K), as in sinkhorn-transformer:

    sort="top"      the num_top largest r_uj, one after the other, each with its share of a softmax of what is left
    sort="gumbel"   (log(relu(r) + 1e-6) + noise) / temperature, rows and columns normalised in turn, a mixture of all

Keys and values of a bucket that is sorted to another are multiplied by its weight R_uj. Published sinkhorn-transformer
takes sorted *keys* as values too (bidirectional form): ``values="keys"``.

The causal form sorts buckets that are over to a bucket that begins, by r_uj = mean(q up to the first token of u) . (sum
over the tokens of j of mean(k up to the token)) / sqrt(K) for j < u, and as many null buckets as ``num_top``, all of a
learned key and value, with r = 0. In the second half of the heads, limits of buckets are one token earlier; the w - 1
tokens before their first limit see one another only.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowformer.core.checks import Layout, check_choice, check_dense, check_number, check_sizes, describe
from flowformer.core.masks import close_up, fill, spread
from flowformer.core.precision import LOG_ZERO, no_autocast, state_dtype, sum_dtype
from flowformer.core.run import Given, check_inputs, run
from flowformer.core.tracing import is_traced, is_transformed
from flowformer.core.tracing import shift as move
from flowformer.mechanisms.past import PastState, check_no_packed_state, fresh, recall

EPS = 1e-6  # in logarithms, of sinkhorn-transformer
LAYOUT = Layout(self_only="a query's own bucket is one of the buckets of keys")
SORTS = {"top": "paper", "gumbel": "paper", "lra_softmax": "lra", "lra_sinkhorn": "lra"}


class Options(NamedTuple):
    """Checked options."""

    bucket_length: int
    sort: str
    num_top: int
    temperature: float
    iterations: int
    values: str


def sinkhorn_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    null_key: Tensor | None = None,
    null_value: Tensor | None = None,
    noise: Tensor | None = None,
    sort_kernel: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: PastState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    bucket_length: int = 64,
    sort: str = "top",
    num_top: int = 1,
    temperature: float = 0.75,
    iterations: int = 7,
    values: str = "values",
) -> Tensor | tuple[Tensor, PastState]:
    """Sparse Sinkhorn attention (Tay et al., 2020), in the form of sinkhorn-transformer.

    ``sort="lra_softmax"`` and ``"lra_sinkhorn"`` are what Long Range Arena released: the sum of two attentions, to the
    tokens whose positions differ by multiples of L / bucket_length, and to sums over buckets of tokens, multiplied by
    what the sort network gives, which is 1 with the softmax.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, L, heads, K).
        v: Values (batch, L, heads, V).
        null_key: (heads, K), of the buckets before the first one; zeros if absent. Causal form.
        null_value: (heads, V), likewise.
        noise: Gumbel noise (heads, N, N) for up to N buckets, for ``sort="gumbel"``.
        sort_kernel: (K, N) of the sort network of Long Range Arena, for up to N buckets.
        causal: Output t sees positions up to t only. Only with ``sort="top"``.
        mask: (batch, L) boolean, True = real token. Not in the forms of Long Range Arena.
        context_mask: None: there is no cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1. Not in the forms of Long Range Arena.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        bucket_length: w, tokens of a bucket; the last one may have fewer.
        sort: ``"top"``, ``"gumbel"``, ``"lra_softmax"`` or ``"lra_sinkhorn"``.
        num_top: Buckets that are sorted to each, for ``"top"``.
        temperature: Scores of buckets are divided by it; not in the bidirectional form of ``"top"``.
        iterations: Times that rows and columns are normalised, for ``"gumbel"``.
        values: ``"values"``, or ``"keys"`` for the bidirectional form of sinkhorn-transformer as released.

    Returns:
        Output (batch, L, heads, V), zeros at padding; with ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "sinkhorn_attention"
    check_no_packed_state(op, cu_seqlens, return_state)
    options = Options(bucket_length, sort, num_top, temperature, iterations, values)
    check_options(op, options, causal)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    check_inputs(op, given, LAYOUT)
    _check_tensors(op, given, options, (null_key, null_value, noise, sort_kernel))

    def attend(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None) -> Tensor:
        if SORTS[sort] == "lra":
            assert sort_kernel is not None  # checked
            compute = sum_dtype(q.dtype)
            return _as_released(q.to(compute), k.to(compute), v.to(compute), sort_kernel.to(compute), options).to(
                q.dtype
            )
        length, places = q.shape[1], None
        if key is not None:
            (q, k, v), key, places = close_up([fill(x, key) for x in (q, k, v)], key)
        if causal:
            out = _causal(q, k, v, null_key, null_value, options)
        else:
            out = _bidirectional(q, k, v, key, noise, options)
        out = fill(out.to(q.dtype), key)
        return out if places is None else spread(out, places, length)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Any, query: Tensor | None, state: Any) -> Any:
        with no_autocast(q.device):
            return recall(attend, (q, k, v), key, state, return_state)

    return run(op, given, dense, layout=LAYOUT, init_state=fresh(q, v))


def check_options(op: str, options: Options, causal: bool) -> None:
    """Raise for options out of range, or that a form does not have."""
    check_choice(f"{op}: sort", options.sort, tuple(SORTS))
    sizes = {"bucket_length": options.bucket_length, "num_top": options.num_top, "iterations": options.iterations}
    check_sizes(**{f"{op}: {name}": size for name, size in sizes.items()})
    check_number(f"{op}: temperature", options.temperature)
    if options.temperature <= 0:
        raise ValueError(f"{op}: temperature must be positive, got {options.temperature!r}")
    if options.values not in ("values", "keys"):
        raise ValueError(f"{op}: values must be 'values' or 'keys', got {options.values!r}")
    if causal and options.sort != "top":
        raise ValueError(f"{op}: sort must be 'top' in the causal form, got {options.sort!r}")
    if options.values == "keys" and (causal or SORTS[options.sort] == "lra"):
        raise ValueError(f"{op}: values must be 'values' in the causal form and those of Long Range Arena, got 'keys'")


def _check_tensors(op: str, given: Given, options: Options, tensors: tuple[Any, ...]) -> None:
    """Raise for tensors that are needed and absent, not needed, or of another shape."""
    _, length, heads, channels = given.q.shape
    buckets, released = -(-length // options.bucket_length), SORTS[options.sort] == "lra"
    shapes = {
        "null_key": (heads, channels), "null_value": (heads, given.v.shape[-1]),
        "noise": (heads, buckets, buckets), "sort_kernel": (channels, buckets),
    }  # fmt: skip
    wanted = {"null_key": given.causal, "null_value": given.causal}
    wanted |= {"noise": options.sort == "gumbel", "sort_kernel": released}
    for (name, shape), tensor in zip(shapes.items(), tensors, strict=True):
        check_dense(f"{op}: {name}", tensor)
        if tensor is None and (not wanted[name] or name.startswith("null")):
            continue
        if not wanted[name]:
            raise ValueError(f"{op}: {name} must be None in this form, got {describe(tensor)}")
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be a tensor {shape}, got {describe(tensor)}")
        fits = tensor.ndim == len(shape) and tensor.device == given.q.device
        exact = fits and (tensor.shape == shape if name.startswith("null") else tensor.shape[0] == shape[0])
        if not exact or (not name.startswith("null") and any(n < buckets for n in tensor.shape[1:])):
            least = "" if name.startswith("null") else f", or larger, for {buckets} buckets"
            raise ValueError(f"{op}: {name} must be {shape} on {given.q.device}{least}, got {describe(tensor)}")
    if released and (given.mask is not None or given.cu_seqlens is not None or length % options.bucket_length):
        raise ValueError(
            f"{op}: sort {options.sort!r} must have neither mask nor cu_seqlens, and a length that "
            f"{options.bucket_length} divides, got length {length}"
        )
    if options.values == "keys" and given.v.shape[-1] != channels:
        raise ValueError(f"{op}: values 'keys' must have as many channels as v, got {channels} and {given.v.shape[-1]}")


# ------------------------------------------------------------------------------------------- what both forms share


def _cut(x: Tensor, width: int, before: int = 0) -> Tensor:
    """Cut (batch, length, heads, channels) into buckets (batch, heads, buckets, width, channels), zeros where none."""
    after = -(x.shape[1] + before) % width
    padded = nn.functional.pad(x, (0, 0, 0, 0, before, after)) if before or after or is_traced() else x
    # Copied once, where each product and sum would copy it otherwise.
    return padded.unflatten(1, (-1, width)).movedim(3, 1).contiguous()


def _join(x: Tensor, length: int, before: int = 0) -> Tensor:
    """Undo :func:`_cut`."""
    return x.movedim(1, 3).flatten(1, 2)[:, before : before + length]


def _choose(scores: Tensor, allowed: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Choose ``count`` buckets for each: places, weights and whether there was one, (batch, heads, buckets, count).

    Args:
        scores: r (batch, heads, buckets, candidates).
        allowed: Which candidates there are, of a shape that broadcasts to that of scores.
        count: How many.
    """
    places, weights, found = [], [], []
    scores = scores.masked_fill(~allowed, LOG_ZERO)
    for _ in range(count):
        weight, place = scores.softmax(-1).max(-1, keepdim=True)
        found.append(scores.gather(-1, place) > LOG_ZERO / 2)
        places.append(place)
        weights.append(weight)
        scores = scores.scatter(-1, place, LOG_ZERO)
    return torch.cat(places, -1), torch.cat(weights, -1), torch.cat(found, -1)


def _take(x: Tensor, places: Tensor) -> Tensor:
    """Buckets of (batch, heads, buckets, width, channels) at places (batch, heads, buckets, count)."""
    batch, heads, buckets = x.shape[:3]
    row = torch.arange(batch * heads, device=x.device).view(batch, heads, 1, 1) * buckets
    return x.flatten(0, 2).index_select(0, (row + places).flatten()).unflatten(0, places.shape)


def _bias(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides keys when it is added to scores, which is several times as fast as filling them on a CPU."""
    return torch.zeros_like(hidden, dtype=dtype).masked_fill(hidden, LOG_ZERO)


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of each bucket to its keys, those sorted to it included; ``bias`` is added to scores."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q / q.shape[-1] ** 0.5) @ k.transpose(-1, -2)
        return (scores if bias is None else scores + bias).softmax(-1) @ v

    if is_traced() or is_transformed() or not any(x.requires_grad for x in (q, k, v)):
        return attend(q, k, v)
    out = checkpoint(attend, q, k, v, use_reentrant=False, preserve_rng_state=False)
    assert isinstance(out, Tensor)  # as it returns
    return out


# ------------------------------------------------------------------------------------------------ bidirectional


def _bidirectional(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, noise: Tensor | None, options: Options
) -> Tensor:
    """Outputs for tokens that come before padding."""
    compute, wide, length = sum_dtype(q.dtype), state_dtype(q.device), q.shape[1]
    width = min(options.bucket_length, length)  # a longer bucket holds no more
    real = torch.ones(q.shape[:2], dtype=torch.bool, device=q.device) if mask is None else mask
    real = _cut(real[..., None, None].to(compute), width)[..., 0] > 0  # (batch, 1, buckets, width)
    Q, K, V = (_cut(x.to(compute), width) for x in (q, k, v))
    count = real.sum(-1, keepdim=True).clamp(min=1)
    of_q, of_k = (x.sum(-2, dtype=wide) / count for x in (Q, K))  # few of them, and choices hang on them
    scores = of_q @ of_k.transpose(-1, -2) / q.shape[-1] ** 0.5
    some = real.any(-1)
    own = real.unsqueeze(-2).expand(*K.shape[:3], 1, width)
    taken = (K,) if options.values == "keys" else (K, V)
    if noise is None:
        places, weights, found = _choose(scores, some.unsqueeze(-2), min(options.num_top, scores.shape[-1]))
        weights = weights.to(compute)[..., None, None]
        arranged = [(_take(x, places) * weights).flatten(3, 4) for x in taken]
        there = (_take(own.squeeze(-2).unsqueeze(-1), places).squeeze(-1) & found.unsqueeze(-1)).flatten(3, 4)
    else:
        R = _balance(scores, some, noise[:, : scores.shape[-1], : scores.shape[-1]].to(wide), options).to(compute)
        arranged = [torch.einsum("bhuj,bhjwc->bhuwc", R, x) for x in taken]
        there = own[:, :, :1].squeeze(-2).expand(*K.shape[:4])  # no bucket has more tokens than the first
    # Whole buckets, of which each finds as many as it may: nothing is hidden.
    whole = mask is None and length % width == 0 and not is_traced()
    bias = None if whole else _bias(~torch.cat([there.unsqueeze(-2), own], -1), compute)
    K, V = torch.cat([arranged[0], K], -2), torch.cat([arranged[-1], V], -2)
    return _join(_attend(Q, K, V, bias), length)


def _balance(scores: Tensor, some: Tensor, noise: Tensor, options: Options) -> Tensor:
    """The mixture of buckets for each bucket, (batch, heads, buckets, buckets): rows and columns add up to about 1."""
    both = some.unsqueeze(-1) & some.unsqueeze(-2)
    r = ((scores.relu() + EPS).log() + noise) / options.temperature
    r = r.masked_fill(~both, LOG_ZERO)
    for _ in range(options.iterations):
        r = (r - r.logsumexp(-1, keepdim=True)).masked_fill(~both, LOG_ZERO)
        r = (r - r.logsumexp(-2, keepdim=True)).masked_fill(~both, LOG_ZERO)
    return r.exp()


# -------------------------------------------------------------------------------------------------------- causal


def _causal(
    q: Tensor, k: Tensor, v: Tensor, null_key: Tensor | None, null_value: Tensor | None, options: Options
) -> Tensor:
    """Outputs of the causal form, the two halves of the heads one after the other."""
    heads = q.shape[2]
    null_key = q.new_zeros(heads, q.shape[-1]) if null_key is None else null_key
    null_value = v.new_zeros(heads, v.shape[-1]) if null_value is None else null_value
    outs = []
    for shift, some in enumerate((slice(0, heads // 2), slice(heads // 2, heads))):
        if some.start < some.stop:
            Q, K, V = (x[:, :, some] for x in (q, k, v))
            outs.append(_causal_half(Q, K, V, null_key[some], null_value[some], shift, options))
    return torch.cat(outs, 2)


def _causal_half(
    q: Tensor, k: Tensor, v: Tensor, null_key: Tensor, null_value: Tensor, shift: int, options: Options
) -> Tensor:
    """Outputs where limits of buckets are ``shift`` tokens earlier, and the bucket before the first limit is alone."""
    compute, length, top = sum_dtype(q.dtype), q.shape[1], options.num_top
    width = min(options.bucket_length, length + 1)  # a longer bucket holds no more but in null buckets
    Q, K, V = (_cut(x.to(compute), width, shift) for x in (q, k, v))
    buckets = Q.shape[2]
    scores = _causal_scores(Q, K, shift) / options.temperature
    scores = nn.functional.pad(scores, (top, 0))  # the null buckets
    place = torch.arange(buckets, device=q.device)
    past = (place < place.unsqueeze(-1)) & (place >= shift)
    places, weights, _ = _choose(scores, nn.functional.pad(past, (top, 0), value=True), top)
    nulls = (x.to(compute).view(1, len(x), 1, 1, -1).expand(len(q), -1, top, width, -1) for x in (null_key, null_value))
    weights = weights.to(compute)[..., None, None]
    sorted_k, sorted_v = (
        (_take(torch.cat([null, x], 2), places) * weights).flatten(3, 4) for null, x in zip(nulls, (K, V), strict=True)
    )
    later = torch.ones(width, width, dtype=torch.bool, device=q.device).triu(1)
    before = (place < shift).view(-1, 1, 1).expand(-1, width, top * width)  # alone: nothing is sorted to it
    own = later.expand(buckets, -1, -1)
    if shift:  # what was put before the first token
        first = (place == 0).view(-1, 1, 1) & (torch.arange(width, device=q.device) < shift)
        own = own | first
    bias = _bias(torch.cat([before, own], -1), compute)
    if width < options.bucket_length:  # there is one bucket, and all that is sorted to it are null buckets
        bias[..., : top * width] += math.log(options.bucket_length / width)
    return _join(_attend(Q, torch.cat([sorted_k, K], -2), torch.cat([sorted_v, V], -2), bias), length, shift)


def _causal_scores(q: Tensor, k: Tensor, shift: int) -> Tensor:
    """Scores (batch, heads, buckets, buckets) of buckets that begin with buckets that are over, in float64.

    Args:
        q: Queries cut into buckets.
        k: Keys, likewise.
        shift: Whether the first bucket, of no token and those before the first limit, is left out.
    """
    wide, (buckets, width) = state_dtype(q.device), q.shape[2:4]
    count = torch.arange(1, buckets * width + 1, device=q.device).view(buckets, width) - shift * width
    inverse = 1 / count.clamp(min=1).to(wide)
    # The mean up to a token is that of what is before its bucket and what is in it: a token is in the means of those
    # behind it in the bucket, and what is before is in all of them.
    parts = inverse.flip(-1).cumsum(-1).flip(-1)
    shares = torch.stack([torch.ones_like(parts), parts], -2)  # (buckets, 2, width)
    of_first, (of_bucket, of_means) = q[..., 0, :].to(wide), (shares @ k.to(wide)).unbind(-2)
    sums = q.sum(-2, dtype=wide), of_bucket
    if shift:
        of_first, of_means, *sums = (_without_first(x) for x in (of_first, of_means, *sums))
    before_q, before_k = (move(x, 0.0).cumsum(-2) for x in sums)  # nothing of a bucket that is not over
    of_q, of_k = (before_q + of_first) * inverse[:, :1], before_k * parts[:, :1] + of_means
    return of_q @ of_k.transpose(-1, -2) / q.shape[-1] ** 0.5


def _without_first(x: Tensor) -> Tensor:
    """Set the first bucket of (batch, heads, buckets, ...) to zero."""
    return torch.cat([torch.zeros_like(x[:, :, :1]), x[:, :, 1:]], 2)


# ---------------------------------------------------------------------------------------- Long Range Arena's form


def _as_released(q: Tensor, k: Tensor, v: Tensor, sort_kernel: Tensor, options: Options) -> Tensor:
    """Outputs as Long Range Arena has them: buckets are strides, and what is sorted is a sum of all of them."""
    width = options.bucket_length
    buckets = q.shape[1] // width
    Q, K, V = (x.unflatten(1, (width, buckets)).permute(0, 3, 2, 1, 4) for x in (q, k, v))  # (batch, heads, n, w, c)
    logits = torch.einsum("bhnwc,cm->bnhm", K, sort_kernel)[..., :buckets]
    if options.sort == "lra_softmax":
        shares = logits.softmax(-1)
    else:  # rows of (bucket, head) are read as matrices of buckets
        r = logits.reshape(-1, buckets, buckets)
        r = r - r.logsumexp(2, keepdim=True)
        r = r - r.logsumexp(1, keepdim=True)
        shares = r.clamp(-1, 1).exp().reshape(logits.shape)
    factor = shares.sum(-1).transpose(1, 2)[..., None, None]  # (batch, heads, buckets, 1, 1)
    summed_k, summed_v = (x.sum(2, keepdim=True) * factor for x in (K, V))
    out = _attend(Q, K, V, None) + _attend(Q, summed_k, summed_v, None)
    return out.permute(0, 3, 2, 1, 4).flatten(1, 2)
