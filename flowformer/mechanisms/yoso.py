r"""YOSO: attention by Bernoulli sampling (Zeng et al., ICML 2021, "You Only Sample (Almost) Once").

Queries and keys of unit length get codes of tau bits, the signs of tau random projections. Two tokens have one code
with probability (1 - acos(q . k) / pi)^tau, which takes the place of exp(q . k) in softmax attention:

    A_ij = (1 - acos(q_i . k_j) / pi)^tau                           the expectation (YOSO-E)
    A_ij = the share of hashes in which q_i and k_j have one code   sampled
    out_i = sum_j A_ij v_j / |sum_j A_ij v_j|                       of unit length; no sum of weights divides

The expectation takes time quadratic in length, in linear memory: rows of A exist for a block of queries at a time, in
the backward pass once more. Sampled, values are added up in a table with one row for each code, in linear time.

A has an infinite derivative at q = k. The paper takes (tau / 2) A in its place, ``gradient="surrogate"``: released as
yoso_v1, and the form of transformers. yoso_v2 of the same authors differentiates A, with 0.98 q . k in place of q . k:
``gradient="exact"``, the default here, since only this is the gradient of the output. Sampled weights are steps, and
have the surrogate only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_dense, check_optional_sizes, check_sizes, describe
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, state_dtype, sum_dtype, without_autocast
from flowformer.core.run import Given, check_inputs, run
from flowformer.core.tracing import is_traced, is_transformed
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.past import PastState, check_no_packed_state, fresh, init_past_state, recall, step_of
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import Rows, lower, rows_of, truth_of

__all__ = ["YosoAttention", "yoso_attention"]

BLOCK = 128  # queries whose rows of weights exist at a time
IN_CACHE = 2**18  # weights that exist at a time on a CPU, where a row for each of those queries is no more
DOT_SCALE = 0.98  # of yoso_v2: keeps the derivative of acos finite
GRADIENTS = ("exact", "surrogate")
TINY = 1e-12  # the least length that a vector is divided by, as in torch.nn.functional.normalize


def yoso_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotations: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: PastState | None = None,
    return_state: bool = False,
    backend: str = "auto",
    hash_code_len: int = 9,
    gradient: str = "exact",
) -> Tensor | tuple[Tensor, PastState]:
    """YOSO attention (Zeng et al., 2021): weights are probabilities of collision, or shares of collisions.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        rotations: Random projections (hashes, K, hash_code_len), normally distributed, for the sampled form; absent for
            its expectation.
        causal: Output t sees positions up to t only. Requires L == S. Sampled, this form is quadratic in time.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: State to continue from (causal only); batch N for a packed batch.
        return_state: Return the state after the last token as well (causal only).
        backend: ``"auto"`` or ``"torch"``.
        hash_code_len: tau, the bits of a code.
        gradient: ``"exact"`` (yoso_v2) or ``"surrogate"`` (yoso_v1, transformers). The sampled form has the latter.

    Returns:
        Output (batch, L, heads, V), each of length 1 over V; zeros at padded queries; with
        ``return_state`` also the state.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "yoso_attention"
    check_no_packed_state(op, cu_seqlens, return_state)
    check_dense(f"{op}: rotations", rotations)
    check_options(op, hash_code_len, gradient, rotations is not None)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    if rotations is not None:
        check_inputs(op, given)
        check_rotations(op, rotations, q, hash_code_len)

    def attend(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None) -> Tensor:
        return _dense(q, k, v, key, query, rotations, causal, hash_code_len, gradient)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        return recall(functools.partial(attend, query=query), (q, k, v), key, state, return_state)

    return run(op, given, dense, init_state=fresh(q, v, queries=False))


def check_options(op: str, hash_code_len: Any, gradient: Any, sampled: bool) -> None:
    """Raise for a code of no bits or more than an integer has, or an unknown gradient."""
    check_sizes(**{f"{op}: hash_code_len": hash_code_len})
    if hash_code_len > 32:
        raise ValueError(f"{op}: hash_code_len must be at most 32, got {hash_code_len}")
    if gradient not in GRADIENTS:
        raise ValueError(f"{op}: gradient must be 'exact' or 'surrogate', got {gradient!r}")
    if sampled and gradient == "exact":
        raise ValueError(
            f"{op}: gradient must be 'surrogate' with rotations, since sampled weights are steps, got 'exact'"
        )


def check_rotations(op: str, rotations: Any, q: Tensor, hash_code_len: int) -> None:
    """Raise unless rotations are (hashes, K, hash_code_len) and go with the queries."""
    wanted = f"(hashes, {q.shape[-1]}, {hash_code_len}) {q.dtype} on {q.device}".replace("torch.", "")
    fits = isinstance(rotations, Tensor) and rotations.ndim == 3 and rotations.shape[1:] == (q.shape[-1], hash_code_len)
    if not fits or not len(rotations) or rotations.device != q.device or not rotations.is_floating_point():
        raise (ValueError if isinstance(rotations, Tensor) else TypeError)(
            f"{op}: rotations must be {wanted}, got {describe(rotations)}"
        )


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key: Tensor | None,
    query: Tensor | None,
    rotations: Tensor | None,
    causal: bool,
    bits: int,
    gradient: str,
) -> Tensor:
    """Outputs of a padded batch."""
    with no_autocast(q.device):
        dtype, compute = q.dtype, sum_dtype(q.dtype)
        codes = None
        if rotations is not None:
            codes = _codes(fill(q, query), rotations), _codes(fill(k, key), rotations)
        Q, K, V = (
            x.to(compute).transpose(1, 2) for x in (unit(fill(q, query)), unit(fill(k, key)), fill(v, key))
        )  # (batch, heads, length, channels)
        if is_transformed():
            out = _differentiable(Q, K, V, key, codes, causal, bits, gradient)
        elif codes is None or causal:
            out = _Sum.apply(Q, K, V, key, codes, causal, bits, gradient)
        else:
            out = _Tables.apply(Q, K, V, key, codes, bits)
        return fill(unit(out.transpose(1, 2)).to(dtype), query)


def unit(x: Tensor) -> Tensor:
    """Return vectors along the last axis at unit length, in the dtype of sums; zeros stay zeros."""
    return torch.nn.functional.normalize(x.to(sum_dtype(x.dtype)), dim=-1, eps=TINY)


def _codes(x: Tensor, rotations: Tensor) -> Tensor:
    """Codes (hashes, batch, heads, length) of vectors (batch, length, heads, K): the signs of their projections.

    In float64, so that vectors of any dtype have the same codes as their exact copies.
    """
    wide = state_dtype(x.device)
    powers = 2 ** torch.arange(rotations.shape[-1], device=x.device)
    x = x.detach().to(wide).transpose(1, 2)
    return torch.stack([((x @ rotation.to(wide) > 0) * powers).sum(-1) for rotation in rotations])


# ------------------------------------------------------------------------------------------------ sums over all pairs


def _power(x: Tensor, exponent: int) -> Tensor:
    """Return x to a power of 0 or more, by products in place of logarithms."""
    if exponent == 0:
        return torch.ones_like(x)
    power = x.clone()
    for digit in f"{exponent:b}"[1:]:
        power.square_()
        if digit == "1":
            power *= x
    return power


def _of_cosines(cosines: Tensor, bits: int, gradient: str, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """The expected weights of cosines, which are overwritten; and, for the backward pass, their ``slopes``.

    Slopes are derivatives by the cosines, but for the factor ``bits / 2`` of the surrogate, which are the weights.
    """
    exact = gradient == "exact"
    scaled = (cosines.mul_(DOT_SCALE) if exact else cosines).clamp_(-1, 1)
    root = (1 - scaled.square()).sqrt_() if exact and slopes else None
    probability = scaled.acos_().mul_(-1 / math.pi).add_(1)
    if root is None:
        weights = _power(probability, bits)
        return weights, weights if slopes else None
    lower = _power(probability, bits - 1)
    return probability.mul_(lower), lower.mul_(DOT_SCALE * bits / math.pi).div_(root)


def _collisions(codes: tuple[Tensor, Tensor], rows: slice, keys: slice, dtype: torch.dtype) -> Tensor:
    """The share of hashes in which codes are equal, (batch, heads, rows, keys)."""
    equal = (
        of_queries[..., rows, None] == of_keys[..., None, keys] for of_queries, of_keys in zip(*codes, strict=True)
    )
    count = next(equal).to(dtype)
    for one in equal:
        count += one
    return count / len(codes[0])


def _differentiable(
    Q: Tensor, K: Tensor, V: Tensor, key: Tensor | None, codes: Any, causal: bool, bits: int, gradient: str
) -> Tensor:
    """sum_j A_ij v_j for transforms of torch.func, which keep weights in memory for themselves.

    A surrogate has no second derivatives: its slopes are constants.
    """
    outs = []
    given = key, codes, causal, bits, gradient
    for rows, keys, weights, slopes in _blocks(Q.detach(), K.detach(), *given, slopes=gradient == "surrogate"):
        cosines = Q[..., rows, :] @ K[..., keys, :].mT
        if slopes is None:  # exact
            probability = 1 - (DOT_SCALE * cosines).clamp(-1, 1).acos() / math.pi
            weights = torch.where(weights == 0, 0.0, probability**bits)  # where hidden, or opposite
        else:
            weights = weights + bits / 2 * slopes * (cosines - cosines.detach())
        outs.append(weights @ V[..., keys, :])
    return torch.cat(outs, -2)


class _Sum(torch.autograd.Function):
    """sum_j A_ij v_j, by blocks of queries that the backward pass computes anew."""

    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, K: Tensor, V: Tensor, key: Tensor | None, codes: Any, causal: bool, bits: int,
        gradient: str,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(Q, K, V)
        ctx.given = key, codes, causal, bits, gradient
        out = Q.new_empty(*Q.shape[:-1], V.shape[-1])
        for part in _parts(Q, K):
            q, k, v, of_part = (x[part] for x in (Q, K, V, out))
            for rows, keys, weights, _ in _blocks(q, k, *_of_part(ctx.given, part), slopes=False):
                of_part[..., rows, :] = weights @ v[..., keys, :]
        return out

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("yoso_attention does not support second-order gradients: omit create_graph=True")
        (above,) = grads_out
        Q, K, V = ctx.saved_tensors
        grads = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
        for part in _parts(Q, K):
            q, k, v, upstream, of_q, of_k, of_v = (x[part] for x in (Q, K, V, above, *grads))
            for rows, keys, weights, slopes in _blocks(q, k, *_of_part(ctx.given, part), slopes=True):
                given = upstream[..., rows, :]
                of_v[..., keys, :] += weights.mT @ given
                of_cosines = (given @ v[..., keys, :].mT).mul_(slopes)
                of_q[..., rows, :] = of_cosines @ k[..., keys, :]
                of_k[..., keys, :] += of_cosines.mT @ q[..., rows, :]
        if ctx.given[-1] == "surrogate":
            for grad in grads[:2]:
                grad *= ctx.given[3] / 2
        return *grads, None, None, None, None, None


def _parts(Q: Tensor, K: Tensor) -> list[tuple[slice, slice]]:
    """Rows of the batch and heads that are computed at a time: all, but on a CPU so many as its cache may hold."""
    batch, heads, length = Q.shape[:3]
    if Q.device.type != "cpu" or is_traced():
        return [(slice(None), slice(None))]
    fit = max(1, IN_CACHE // max(1, min(BLOCK, length) * K.shape[2]))
    rows = max(1, fit // heads)
    return [
        (slice(row, row + rows), slice(head, head + fit))
        for row in range(0, batch, rows)
        for head in range(0, heads, fit)
    ]


def _of_part(given: tuple[Any, ...], part: tuple[slice, slice]) -> tuple[Any, ...]:
    """What :func:`_blocks` is given, of some rows of the batch and heads."""
    key, codes, *rest = given
    codes = None if codes is None else tuple(x[(slice(None), *part)] for x in codes)
    return None if key is None else key[part[0]], codes, *rest


def _blocks(
    Q: Tensor, K: Tensor, key: Tensor | None, codes: Any, causal: bool, bits: int, gradient: str, slopes: bool
) -> Iterator[tuple[slice, slice, Tensor, Any]]:
    """Rows, the keys they see, their weights and, if asked for, ``slopes`` by cosines: zeros where they see nothing."""
    length, sources = Q.shape[-2], K.shape[-2]
    past = sources - length  # of causal queries, which are the last tokens
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        rows, keys = slice(start, end), slice(0, past + end if causal else sources)
        if codes is None:
            weights, by_cosines = _of_cosines(Q[..., rows, :] @ K[..., keys, :].mT, bits, gradient, slopes)
        else:
            weights = by_cosines = _collisions(codes, rows, keys, Q.dtype)
        hidden = _hidden(key, causal, past, rows, keys, Q.device)
        if hidden is not None:
            weights.masked_fill_(hidden, 0)
            if by_cosines is not None and by_cosines is not weights:
                by_cosines.masked_fill_(hidden, 0)
        yield rows, keys, weights, by_cosines


def _hidden(
    key: Tensor | None, causal: bool, past: int, rows: slice, keys: slice, device: torch.device
) -> Tensor | None:
    """What rows do not see, (batch or 1, 1, rows, keys)."""
    hidden = None if key is None else ~key[:, None, None, keys]
    if causal:
        places = past + torch.arange(rows.start, rows.stop, device=device)
        later = torch.arange(keys.stop, device=device) > places[:, None]
        hidden = later if hidden is None else hidden | later
    return hidden


# ------------------------------------------------------------------------------------------------ sums by tables


class _Tables(torch.autograd.Function):
    """sum_j A_ij v_j for sampled A, by a table with a row for each code: linear in length.

    The backward pass is the paper's: sums of v_jc k_j by code, one channel c of the values at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, Q: Tensor, K: Tensor, V: Tensor, key: Tensor | None, codes: tuple[Tensor, Tensor], bits: int
    ) -> Tensor:
        if key is not None:
            K, V = (x.masked_fill(~key[:, None, :, None], 0) for x in (K, V))
        ctx.save_for_backward(Q, K, V, *codes)
        ctx.given = key, bits
        out = V.new_zeros(*Q.shape[:-1], V.shape[-1])
        for of_queries, of_keys in zip(*codes, strict=True):
            out += _through(V, of_keys, of_queries, bits)
        return out / len(codes[0])

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("yoso_attention does not support second-order gradients: omit create_graph=True")
        (above,) = grads_out
        Q, K, V, *codes = ctx.saved_tensors
        key, bits = ctx.given
        above = above / len(codes[0])
        of_q, of_k, of_v = torch.zeros_like(Q), torch.zeros_like(K), torch.zeros_like(V)
        for of_queries, of_keys in zip(*codes, strict=True):
            of_v += _through(above, of_queries, of_keys, bits)
            for channel in range(V.shape[-1]):
                given, value = above[..., channel, None], V[..., channel, None]
                of_q += given * _through(value * K, of_keys, of_queries, bits)
                of_k += value * _through(given * Q, of_queries, of_keys, bits)
        if key is not None:
            of_v = of_v.masked_fill(~key[:, None, :, None], 0)
        return bits / 2 * of_q, bits / 2 * of_k, of_v, None, None, None


def _through(x: Tensor, writing: Tensor, reading: Tensor, bits: int) -> Tensor:
    """Add up x (batch, heads, length, channels) in the rows ``writing``, and read the rows ``reading``."""
    table = x.new_zeros(*x.shape[:2], 2**bits, x.shape[-1])
    table.scatter_add_(2, writing.unsqueeze(-1).expand_as(x), x)
    return table.gather(2, reading.unsqueeze(-1).expand(*reading.shape, x.shape[-1]))


# ------------------------------------------------------------------------------------------------------- the truth


def yoso_weights(
    q: Tensor,
    k: Tensor,
    rotations: Tensor | None = None,
    *,
    causal: bool = False,
    hash_code_len: int = 9,
    gradient: str = "exact",
) -> Rows:
    """Return rows of A of one sequence: outputs are proportional to rows times values."""
    q, k = (x / x.norm(dim=-1, keepdim=True).clamp(min=TINY) for x in (q, k))

    def rows(places: Tensor) -> Tensor:
        cosines = torch.einsum("ihk,jhk->hij", q[places], k)
        if gradient == "exact":
            weights = (1 - (DOT_SCALE * cosines).acos() / math.pi) ** hash_code_len
        else:
            if rotations is None:
                weights = (1 - cosines.detach().clamp(-1, 1).acos() / math.pi) ** hash_code_len
            else:
                signs = [torch.einsum("ihk,rkt->rhit", x.detach(), rotations) > 0 for x in (q[places], k)]
                weights = (signs[0].unsqueeze(3) == signs[1].unsqueeze(2)).all(-1).double().mean(0)
            weights = weights * (1 + hash_code_len / 2 * (cosines - cosines.detach()))
        return lower(weights, places) if causal else weights

    return rows


def yoso_truth(*tensors: Any, **arguments: Any) -> Tensor:
    """Return the float64 reference: rows of weights times values, at unit length."""
    out = truth_of(yoso_weights)(*tensors, **arguments)
    return out / out.norm(dim=-1, keepdim=True).clamp(min=TINY)


@register(
    "yoso",
    operation=yoso_attention,
    truth=yoso_truth,
    rows=rows_of("yoso_attention", yoso_weights),
    step=step_of(yoso_attention, queries=False),
    init_state=by_sizes(functools.partial(init_past_state, queries=False)),
    source="Zeng et al., You only sample (almost) once, ICML 2021",
    cost="L^2 (K + V); sampled: hashes L V",
    cannot={
        "linear time": "the expectation compares every query with every key; the sampled form does not",
        "fixed state": "it remembers every key and value",
    },
)
class YosoAttention(DrawnAttention):
    """YOSO attention (Zeng et al., 2021).

    The published modules add a depthwise convolution of the values (``conv_window``) in some configurations; the option
    ``conv`` of every module of this library is another one.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        hash_code_len: tau, the bits of a code; 9 in transformers.
        num_hashes: Hashes of the sampled form; absent for its expectation.
        gradient: As in :func:`yoso_attention`; ``"surrogate"`` for the sampled form if absent, else ``"exact"``.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hash_code_len: int = 9,
        num_hashes: int | None = None,
        gradient: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        check_optional_sizes(num_hashes=num_hashes)
        gradient = ("exact" if num_hashes is None else "surrogate") if gradient is None else gradient
        check_options("yoso attention", hash_code_len, gradient, num_hashes is not None)
        self.hash_code_len, self.num_hashes, self.gradient = hash_code_len, num_hashes, gradient
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Normally distributed projections, where the form is sampled."""
        if self.num_hashes is None:
            return {}
        shape = (self.num_hashes, self.head_dim, self.hash_code_len)
        return {"rotations": torch.randn(shape, generator=generator)}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the projections of the sampled form."""
        return () if self.num_hashes is None else (self.rotations,)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"hash_code_len": self.hash_code_len, "gradient": self.gradient}
