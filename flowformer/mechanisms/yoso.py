r"""YOSO, "You only sample (almost) once" (Zeng et al., 2021): attention by collisions of random hashes.

Queries and keys of length 1 collide in all of tau random hyperplanes with probability

    A_ij = (1 - arccos(q_i . k_j) / pi)^tau        out_i = A_i V / |A_i V|

YOSO-E, the default, computes this expectation, in quadratic time. Sampled, A is the share of some hashes in which the
codes of q_i and k_j are equal: values are added up in a table of 2^tau rows for each hash, in linear time. A sample has
no derivative by q and k; as published, its gradient is that of the expectation with (tau / 2) A for dA / d(q . k).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_flag, check_integer, check_number, check_sizes, check_table
from flowformer.core.masks import fill
from flowformer.core.precision import no_autocast, sum_dtype, without_autocast
from flowformer.core.run import Given, check_inputs, run
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, truth_of

__all__ = ["YosoAttention", "yoso_attention"]

TINY = 1e-12  # the least length, torch.nn.functional.normalize
MOST_BITS = 20  # tables have 2^bits rows
NOT_CAUSAL = "none is published, and its state would hold every key"


def yoso_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    planes: Tensor | None = None,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: None = None,
    return_state: bool = False,
    backend: str = "auto",
    bits: int = 9,
    cosine_scale: float = 0.98,
    surrogate: bool = False,
) -> Tensor:
    """YOSO attention (Zeng et al., 2021): its expectation, or with ``planes`` a sample of it.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        planes: Normal vectors of random hyperplanes, (hashes, bits, K), for a sample.
        causal: Refused: there is no causal form. Here so that mechanisms are exchangeable.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: None: there is no state. Here so that mechanisms are exchangeable.
        return_state: Likewise False.
        backend: ``"auto"`` or ``"torch"``.
        bits: tau, 1 to 20; the published models have 9.
        cosine_scale: By which cosines are multiplied, up to 1. At a cosine of 1 the arccosine has no derivative: 0.98
            in the later published code, 1 in the first, which has ``surrogate`` gradients.
        surrogate: Take (tau / 2) A for dA / d(q . k), as the first published code and transformers do.

    Returns:
        Output (batch, L, heads, V) of length 1, zeros at padded queries.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "yoso_attention"
    _check_options(op, bits, cosine_scale, surrogate)
    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    check_inputs(op, given)
    if causal:
        raise ValueError(f"{op}: there is no causal form, since {NOT_CAUSAL}")
    if planes is not None:
        check_table(f"{op}: planes", planes, "hashes, bits, channels", (None, bits, q.shape[-1]), q.device)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: Any) -> Any:
        dtype = q.dtype
        with no_autocast(q.device):
            Q, K = (_unit(fill(x, m).to(sum_dtype(dtype))) for x, m in ((q, query), (k, key)))
            V = fill(v, key).to(Q.dtype)
            if planes is None:
                out = _expected(Q, K, V, key, bits, cosine_scale, surrogate)
            else:
                out = _sampled(Q, K, V, key, planes)
            return fill(_unit(out), query).to(dtype), None

    return run(op, given, dense)


def _check_options(op: str, bits: Any, cosine_scale: Any, surrogate: Any) -> None:
    check_integer(f"{op}: bits", bits)
    if not 1 <= bits <= MOST_BITS:
        raise ValueError(f"{op}: bits must be from 1 to {MOST_BITS}, got {bits}")
    check_number(f"{op}: cosine_scale", cosine_scale, 0, 1)
    check_flag(f"{op}: surrogate", surrogate)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=TINY)


# --------------------------------------------------------------------------------------------------------- expectation


def _collisions(cosines: Tensor, bits: int) -> Tensor:
    return (1 - cosines.clamp(-1, 1).arccos() / math.pi) ** bits


class _Surrogate(torch.autograd.Function):
    """Probabilities of collisions, whose derivative by the cosine is taken to be bits / 2 times themselves."""

    @staticmethod
    def forward(ctx: Any, cosines: Tensor, bits: int) -> Tensor:
        ctx.bits, found = bits, _collisions(cosines, bits)
        ctx.save_for_backward(found)
        return found

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor, None]:
        (found,) = ctx.saved_tensors
        return grads_out[0] * found * (ctx.bits / 2), None


def _expected(Q: Tensor, K: Tensor, V: Tensor, key: Tensor | None, bits: int, scale: float, surrogate: bool) -> Tensor:
    cosines = scale * (Q.transpose(1, 2) @ K.permute(0, 2, 3, 1))
    A: Any = _Surrogate.apply(cosines, bits) if surrogate else _collisions(cosines, bits)
    if key is not None:
        A = A.masked_fill(~key[:, None, None, :], 0)
    return (A @ V.transpose(1, 2)).transpose(1, 2)


# -------------------------------------------------------------------------------------------------------------- sample


def hash_codes(x: Tensor, planes: Tensor) -> Tensor:
    """Return the side of each plane (bits, K) on which x (..., K) lies, as one number of so many bits, (...)."""
    sides = (x @ planes.to(x.dtype).T > 0).long()
    return (sides << torch.arange(len(planes), device=x.device)).sum(-1)


class _Sample(torch.autograd.Function):
    """Mean over hashes of sums of values under the query's code; rows are heads of sequences, (rows, tokens, ...)."""

    @staticmethod
    def forward(ctx: Any, Q: Tensor, K: Tensor, V: Tensor, of_queries: Tensor, of_keys: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(Q, K, V, of_queries, of_keys)
        ctx.size = size
        return _gathered(V, of_keys, of_queries, size)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, *grads_out: Tensor) -> tuple[Tensor | None, ...]:
        (grad,), (Q, K, V, of_queries, of_keys), size = grads_out, ctx.saved_tensors, ctx.size
        half = (size.bit_length() - 1) / 2
        of_Q, of_K = torch.zeros_like(Q), torch.zeros_like(K)
        for channel in range(V.shape[-1]):
            g, u = grad[..., channel, None], V[..., channel, None]
            of_Q += half * g * _gathered(u * K, of_keys, of_queries, size)
            of_K += half * u * _gathered(g * Q, of_queries, of_keys, size)
        return of_Q, of_K, _gathered(grad, of_queries, of_keys, size), None, None, None


def _gathered(x: Tensor, codes: Tensor, wanted: Tensor, size: int) -> Tensor:
    """Mean over hashes of sums of x (rows, tokens, c) by codes (hashes, rows, tokens), for the codes wanted."""
    rows, width = len(x), x.shape[-1]
    first = size * torch.arange(rows, device=x.device).unsqueeze(1)
    total = x.new_zeros(rows, wanted.shape[-1], width)
    for given, asked in zip(codes, wanted, strict=True):
        table = x.new_zeros(rows * size, width).index_add(0, (first + given).flatten(), x.flatten(0, 1))
        total += table.index_select(0, (first + asked).flatten()).view_as(total)
    return total / len(codes)


def _sampled(Q: Tensor, K: Tensor, V: Tensor, key: Tensor | None, planes: Tensor) -> Tensor:
    batch, heads = Q.shape[0], Q.shape[2]
    K = fill(K, key)  # values at padding are zeros, and so no key there counts
    Q, K, V = (x.transpose(1, 2).flatten(0, 1) for x in (Q, K, V))
    with torch.no_grad():
        of_queries, of_keys = (torch.stack([hash_codes(x, one) for one in planes]) for x in (Q, K))
    out: Any = _Sample.apply(Q, K, V, of_queries, of_keys, 2 ** planes.shape[1])
    return out.unflatten(0, (batch, heads)).transpose(1, 2)


# ------------------------------------------------------------------------------------------- the reference, the module


def yoso_weights(
    q: Tensor,
    k: Tensor,
    planes: Tensor | None = None,
    *,
    causal: bool = False,
    bits: int = 9,
    cosine_scale: float = 0.98,
    surrogate: bool = False,
) -> Rows:
    """Return rows of A of one sequence, before outputs are given length 1."""
    q, k = (x / x.norm(dim=-1, keepdim=True).clamp(min=TINY) for x in (q, k))

    def rows(places: Tensor) -> Tensor:
        if planes is not None:
            of_queries, of_keys = ((torch.einsum("ihk,nbk->nhib", x, planes) > 0) for x in (q[places], k))
            return (of_queries.unsqueeze(3) == of_keys.unsqueeze(2)).all(-1).to(q.dtype).mean(0)
        cosines = cosine_scale * torch.einsum("ihk,jhk->hij", q[places], k)
        return (1 - cosines.clamp(-1, 1).arccos() / math.pi) ** bits

    return rows


@register(
    "yoso",
    operation=yoso_attention,
    truth=truth_of(yoso_weights, finish=_unit),
    source="Zeng et al., You only sample (almost) once, ICML 2021",
    cost="L^2 (K + V); sampled, L hashes (bits K + V)",
    cannot={
        "causal": NOT_CAUSAL,
        "linear time": "in the expectation every query meets every key; a sample is linear",
        "linear memory": "in the expectation every query meets every key; a sample is linear",
    },
)
class YosoAttention(DrawnAttention):
    """YOSO attention (Zeng et al., 2021): YOSO-E, its expectation, or a sample of it in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        hashes: Random hashes of a sample, drawn once; 0 for the expectation. The paper has 16 to 128, drawn at each
            call, for which :meth:`redraw` may be called.
        bits: As in :func:`yoso_attention`.
        cosine_scale: Likewise.
        surrogate: Likewise.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        TypeError, ValueError: for sizes or options that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        hashes: int = 0,
        bits: int = 9,
        cosine_scale: float = 0.98,
        surrogate: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        if hashes != 0:
            check_sizes(hashes=hashes)
        _check_options("YosoAttention", bits, cosine_scale, surrogate)
        self.hashes = hashes
        self.options = {"bits": bits, "cosine_scale": cosine_scale, "surrogate": surrogate}
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Normal vectors of the planes, (hashes, bits, K), as ``planes``."""
        if not self.hashes:
            return {}
        return {"planes": torch.randn(self.hashes, self.options["bits"], self.head_dim, generator=generator)}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """The planes, where there are any."""
        return (self.get_buffer("planes"),) if self.hashes else ()

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return dict(self.options)
