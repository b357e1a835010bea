r"""Linformer: attention to a fixed number of mixtures of the tokens.

Source: Wang et al., "Linformer: Self-Attention with Linear Complexity", 2020. Keys and values are projected along the
length, from S tokens to r rows, by learned matrices E and F with a column for each position:

    out_i = softmax(q_i (E K)^T / sqrt(K)) (F V)

The published implementations differ in E and F: apart and shared by all heads (linformer on PyPI), E = F shared by all
heads (Long Range Arena), E = F by head (Nystromformer's repository). Positions are counted over real tokens, so that
padding does not change a result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import check_bidirectional, check_dense, check_flag, check_sizes, describe
from flowformer.core.masks import attending, close_up_if, fill
from flowformer.core.precision import no_autocast, sum_dtype
from flowformer.core.run import Given, run
from flowformer.core.sums import sum_over_tokens, times_sum
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.weights import Rows, rows_of, truth_of

__all__ = ["LinformerAttention", "linformer_attention"]

NO_CAUSAL_FORM = "each of the rows that it attends to mixes all positions"

Projection = Tensor | tuple[Tensor, Tensor]


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Projection,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    context_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Linformer (Wang et al., 2020), in time and memory linear in length.

    Args:
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        projection: E = F, (r, T) shared by all heads or (heads, r, T), with T at least as large as any S; or a pair of
            such, E and F. Shorter sequences use the first columns.
        causal: There is no causal form.
        mask: (batch, L) boolean, True = real token; of keys and values too where L == S and there is no
            ``context_mask``. Positions count real tokens only.
        context_mask: (batch, S) boolean, of keys and values in cross-attention.
        cu_seqlens: (N + 1,) int32 boundaries of a packed batch of size 1.
        initial_state: There is no state.
        return_state: Likewise.
        backend: ``"auto"`` or ``"torch"``.

    Returns:
        Output (batch, L, heads, V), zeros at padded queries.

    Raises:
        TypeError, ValueError: for invalid arguments.
    """
    op = "linformer_attention"
    check_bidirectional(op, causal, NO_CAUSAL_FORM)

    def dense(q: Tensor, k: Tensor, v: Tensor, key: Tensor | None, query: Tensor | None, state: None) -> Any:
        with no_autocast(q.device):
            compute, alive = sum_dtype(q.dtype), attending(key, query)
            E, F = check_projection(op, projection, k, compute)
            (K, V), _, _ = close_up_if([fill(x, key).to(compute) for x in (k, v)], key)
            E, F = (_columns(op, each, K.shape[1]) for each in (E, F))
            out = _attend(fill(q, query).to(compute), K, V, E, F)
            return fill(out.to(v.dtype), alive), None

    given = Given(q, k, v, causal, mask, context_mask, cu_seqlens, initial_state, return_state, backend)
    return run(op, given, dense)


def _attend(q: Tensor, k: Tensor, v: Tensor, E: Tensor, F: Tensor) -> Tensor:
    """Outputs (batch, L, heads, V), for projections (heads or 1, r, S)."""
    rows, values = _mix(E, k), _mix(F, v)
    scores = times_sum(q.transpose(1, 2), rows.mT / q.shape[-1] ** 0.5)
    return times_sum(scores.softmax(-1), values).transpose(1, 2).contiguous()


def _mix(projection: Tensor, x: Tensor) -> Tensor:
    """Rows (batch, heads, r, C) of x (batch, S, heads, C), for a projection (heads or 1, r, S)."""
    if len(projection) > 1:
        return sum_over_tokens(projection.mT, x.transpose(1, 2))
    rows = sum_over_tokens(projection.mT, x.flatten(2))  # heads side by side: one product for all
    return rows.unflatten(2, x.shape[2:]).transpose(1, 2)


def _columns(op: str, projection: Tensor, tokens: int) -> Tensor:
    if tokens > projection.shape[-1]:
        raise ValueError(f"{op}: projection has {projection.shape[-1]} positions, got {tokens} tokens")
    return projection[..., :tokens]


def check_projection(op: str, projection: Any, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return E and F, each (heads or 1, r, T) in a dtype.

    Raises:
        TypeError, ValueError: for anything but one or two projections, for keys (..., heads, K).
    """
    parts = tuple(projection) if isinstance(projection, (tuple, list)) else (projection,)
    heads, shown = k.shape[-2], f"got {', '.join(describe(part) for part in parts)}"
    wanted = f"{op}: projection must be a tensor (r, T) or ({heads}, r, T), or two of the same shape"
    for part in parts:
        check_dense(f"{op}: projection", part)
    if len(parts) not in (1, 2) or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise TypeError(f"{wanted}, of floating-point dtype, {shown}")
    if any(part.shape != parts[0].shape or part.ndim not in (2, 3) or not part.numel() for part in parts):
        raise ValueError(f"{wanted}, {shown}")
    if parts[0].ndim == 3 and len(parts[0]) != heads:
        raise ValueError(f"{wanted}, {shown}")
    if any(part.device != k.device for part in parts):
        raise ValueError(f"{op}: projection must be on {k.device} like k, {shown}")
    by_head = [part.to(dtype).reshape(-1, *part.shape[-2:]) for part in parts]
    return by_head[0], by_head[-1]


def linformer_weights(q: Tensor, k: Tensor, projection: Projection, *, causal: bool = False) -> Rows:
    """Return rows sum_r softmax_r(q_i . (E K)_r / sqrt(K)) F_rj of one sequence."""
    check_bidirectional("linformer_attention", causal, NO_CAUSAL_FORM)
    E, F = check_projection("linformer_attention", projection, k, k.dtype)
    E, F = (_columns("linformer_attention", each, len(k)) for each in (E, F))
    heads = k.shape[1]
    mixed = torch.einsum("hrj,jhk->hrk", E.expand(heads, -1, -1), k)

    def rows(places: Tensor) -> Tensor:
        scores = torch.einsum("ihk,hrk->hir", q[places], mixed) / q.shape[-1] ** 0.5
        return torch.einsum("hir,hrj->hij", scores.softmax(-1), F.expand(heads, -1, -1))

    return rows


@register(
    "linformer",
    operation=linformer_attention,
    truth=truth_of(linformer_weights),
    rows=rows_of("linformer_attention", linformer_weights),
    source="Wang et al., Linformer: Self-Attention with Linear Complexity, 2020",
    cost="L rank (K + V)",
    cannot={
        "causal": NO_CAUSAL_FORM,
        "permutation": "it learns a weight for each position",
    },
)
class LinformerAttention(Attention):
    """Linformer (Wang et al., 2020): attention to ``rank`` learned mixtures of the tokens, in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        max_length: Longest sequence of keys (T); must be given. Shorter ones use the first positions.
        rank: Rows that keys and values are projected to (r). The default is that of the linformer package; Long Range
            Arena's runs have 16.
        share_heads: All heads share the projections, as in the linformer package and Long Range Arena.
        share_values: Keys and values share one projection, as in Long Range Arena and Nystromformer's repository.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Attributes:
        key_projection: E, (rank, max_length) or (num_heads, rank, max_length).
        value_projection: F, likewise; ``None`` where it is E.

    Raises:
        ValueError: for sizes that do not fit; when called, for a sequence longer than ``max_length``.

    Example:
        >>> import torch
        >>> from flowformer import LinformerAttention
        >>> attention = LinformerAttention(dim=64, num_heads=4, max_length=1000, rank=32)
        >>> attention(torch.randn(2, 800, 64)).shape
        torch.Size([2, 800, 64])
    """

    learns_positions = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int | None = None,
        rank: int = 256,
        share_heads: bool = True,
        share_values: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        if max_length is None:
            raise ValueError(
                "LinformerAttention: max_length is required, the length of the longest sequence: there is a column of "
                "its projections for each position"
            )
        check_sizes(max_length=max_length, rank=rank)
        check_flag("share_heads", share_heads)
        check_flag("share_values", share_values)
        self.max_length, self.rank = max_length, rank
        self.share_heads, self.share_values = share_heads, share_values
        shape = (rank, max_length) if share_heads else (num_heads, rank, max_length)
        self.key_projection = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        self.value_projection = None if share_values else nn.Parameter(torch.empty_like(self.key_projection))
        self._reset_projections()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as a new module has them."""
        super().reset_parameters()
        self._reset_projections()

    def _reset_projections(self) -> None:
        bound = self.rank**-0.5  # as the linformer package has it
        for projection in (self.key_projection, self.value_projection):
            if projection is not None:
                nn.init.uniform_(projection, -bound, bound)

    def learned(self, x: Tensor | None = None) -> tuple[Projection]:
        """The projection E = F, or the pair of E and F."""
        if self.value_projection is None:
            return (self.key_projection,)
        return ((self.key_projection, self.value_projection),)

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, max_length={self.max_length}, rank={self.rank}"
