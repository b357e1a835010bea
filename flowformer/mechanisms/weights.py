r"""Rows of attention weights in float64, from which references and attention maps are made.

Given queries and keys, every mechanism is linear in its values: out_i = sum_j W_ij v_j. A mechanism defines W by one
function, written like its equations:

    weights(q, k, *learned, causal=..., **options) -> rows

for one sequence without padding, q (L, heads, K) and k (S, heads, K) in float64 (or (L, channels) where there are no
heads). ``rows(places)`` are the rows of W of the queries at ``places``, (groups, rows, S), where a group of values
shares its weights: a head, or a channel. From it this module makes

* the float64 reference, :func:`truth_of`: rows times values, in quadratic time; every fast path is tested against it;
* rows of a batch, :func:`rows_of`: rows x S x channels of time and memory, never L x S, for attention maps.

Padded tokens are removed, the mechanism runs on the rest, and results are moved back to their positions. Gradients come
from autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from flowformer.core.checks import HEADS, Layout, check
from flowformer.core.precision import state_dtype

ROWS = 1024  # rows of W that the truth makes at a time

Places = Sequence[int] | Tensor  # places of queries, the same in every sequence of a batch
Rows = Callable[[Tensor], Tensor]
Weights = Callable[..., Rows]


class FlowMaps(NamedTuple):
    """The flows of Flow- or Mobile-Attention, each (batch, heads, L) or (batch, heads, S); zeros at padding.

    Attributes:
        incoming: I, of each sink (query).
        outgoing: O, of each source (key).
        conserved_incoming: I^, of each sink. In the bidirectional form of Flow-Attention its mean is S / L.
        conserved_outgoing: O^, of each source, before any clamp. Likewise L / S.
        competition: C, the weight of each source; its mean over a sequence is 1 where sources compete along it. In
            causal Flow-Attention it is settled at the source's own time; in causal Mobile-Attention, where each later
            token settles it anew, this is what the last one sees.
        allocation: A, the gate of each sink.
    """

    incoming: Tensor
    outgoing: Tensor
    conserved_incoming: Tensor
    conserved_outgoing: Tensor
    competition: Tensor
    allocation: Tensor


# ------------------------------------------------------------------------------------------------- what weights share


def lower(scores: Tensor, places: Tensor, elsewhere: float = 0.0) -> Tensor:
    """Mask (groups, rows, S) causally: set keys later than the queries at ``places`` to ``elsewhere``."""
    future = torch.arange(scores.shape[-1], device=scores.device) > places.unsqueeze(1)
    return scores.masked_fill(future, elsewhere)


# --------------------------------------------------------------------------------------------------------- the truth


def _same(learned: tuple[Any, ...], row: int, places: Tensor) -> tuple[Any, ...]:
    return learned


def truth_of(
    weights: Weights,
    *,
    gate: Callable[[Tensor], Tensor] | None = None,
    finish: Callable[[Tensor], Tensor] | None = None,
    of_sequence: Callable[..., Any] = _same,
) -> Callable[..., Tensor]:
    """Return the float64 reference of a mechanism: its rows of weights times the values.

    Args:
        weights: The mechanism's rows of weights.
        gate: What outputs are multiplied by, as a function of the queries.
        finish: What becomes of outputs in the end, where a mechanism is not linear in its values.
        of_sequence: Learned tensors for one sequence, of (all of them, its row of the batch, its places in there).

    Returns:
        A function of q, k, v and learned tensors, with ``causal``, masks, packing and options as the operation takes
        them; it returns the output in float64.
    """

    def truth(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *learned: Any,
        causal: bool = False,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        learned = tree_map_only(Tensor, Tensor.double, learned)

        def attend(q: Tensor, k: Tensor, v: Tensor, row: int, places: Tensor) -> Tensor:
            rows = weights(q, k, *of_sequence(learned, row, places), causal=causal, **options)
            out = torch.cat([_weigh(rows(places), v) for places in _places_in_turn(len(q), q.device)])
            out = out if gate is None else gate(q) * out
            return out if finish is None else finish(out)

        return _per_sequence(attend, q.double(), k.double(), v.double(), mask, context_mask, cu_seqlens)

    return truth


def _weigh(rows: Tensor, v: Tensor) -> Tensor:
    """Rows (groups, rows, S) times values (S, ...)."""
    out = torch.einsum("grs,sgv->rgv", rows, v.reshape(len(v), len(rows), -1))
    return out.reshape(len(out), *v.shape[1:])


def _places_in_turn(length: int, device: torch.device) -> Iterator[Tensor]:
    for start in range(0, length, ROWS):
        yield torch.arange(start, min(start + ROWS, length), device=device)


def _per_sequence(
    attend: Callable[[Tensor, Tensor, Tensor, int, Tensor], Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    context_mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Run ``attend`` on the real tokens of each sequence; zeros elsewhere, and where there is nothing to attend to."""
    if cu_seqlens is not None:
        bounds = [torch.arange(a, b, device=q.device) for a, b in pairwise(cu_seqlens.tolist()) if b > a]
        pieces = [attend(q[0, at], k[0, at], v[0, at], 0, at) for at in bounds]
        return torch.cat(pieces).unsqueeze(0)
    if context_mask is None and q.shape[1] == k.shape[1]:
        context_mask = mask
    outs = []
    for row in range(len(q)):
        sinks, sources = real_places(mask, row, q), real_places(context_mask, row, k)
        out = q.new_zeros(*q.shape[1:-1], v.shape[-1])
        if len(sinks) and len(sources):
            out = out.index_put((sinks,), attend(q[row, sinks], k[row, sources], v[row, sources], row, sinks))
        outs.append(out)
    return torch.stack(outs)


def real_places(mask: Tensor | None, row: int, tokens: Tensor) -> Tensor:
    """Return the positions of the real tokens in one row of a batch (batch, length, ...)."""
    if mask is None:
        return torch.arange(tokens.shape[1], device=tokens.device)
    return mask[row].nonzero().squeeze(-1)


# ----------------------------------------------------------------------------------------------------- rows of a batch


def rows_of(
    op: str, weights: Weights, layout: Layout = HEADS, of_sequence: Callable[..., Any] = _same
) -> Callable[..., Tensor]:
    """Return a function that computes rows of weights of a batch, for attention maps.

    Args:
        op: Name of the operation, for messages.
        weights: The mechanism's rows of weights.
        layout: The axes of q and k, and whether they must be equally long.
        of_sequence: As in :func:`truth_of`.

    Returns:
        A function of q, k, places of queries and learned tensors, with ``causal``, ``mask``, ``context_mask`` and
        options as the operation takes them. With ``heads``, groups are averaged to so many. It returns weights
        (batch, groups or heads, rows, S), float64 (float32 on devices without it); zeros from and to padding.
    """

    def rows(
        q: Tensor,
        k: Tensor,
        places: Places,
        *learned: Any,
        causal: bool = False,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        heads: int | None = None,
        **options: Any,
    ) -> Tensor:
        v = q if layout.heads else k  # values do not matter: others stand in for them in the checks
        masks = check(op, q, k, v, layout=layout, causal=causal, mask=mask, context_mask=context_mask)
        places = check_places(op, places, q.shape[1]).to(q.device)
        wide = state_dtype(q.device)
        learned = tree_map_only(Tensor, lambda t: t.to(wide), learned)
        out = []
        for row in range(len(q)):
            sinks, sources = real_places(masks.query, row, q), real_places(masks.key, row, k)
            of_row = q.new_zeros(heads or 1, len(places), len(sources), dtype=wide)
            if len(sinks) and len(sources):
                given = of_sequence(learned, row, sinks)
                found = weights(q[row, sinks].to(wide), k[row, sources].to(wide), *given, causal=causal, **options)
                # Padded queries take the place of a real one, and are hidden below.
                of_row = _take(found, torch.searchsorted(sinks, places).clamp(max=len(sinks) - 1), heads)
            of_row = of_row.masked_fill(~torch.isin(places, sinks).unsqueeze(1), 0)
            out.append(of_row.new_zeros(*of_row.shape[:2], k.shape[1]).index_copy(2, sources, of_row))
        if not out:  # a batch of no sequences
            return q.new_zeros(0, heads or 1, len(places), k.shape[1], dtype=wide)
        groups = max(len(of_row) for of_row in out)
        return torch.stack([of_row.expand(groups, -1, -1) for of_row in out])

    return rows


def _take(rows: Rows, places: Tensor, heads: int | None) -> Tensor:
    """Rows (groups, rows, S), or averaged to (heads, rows, S)."""
    if heads is None:
        return rows(places)
    groups = len(rows(places[:1]))
    if heads < 1 or groups % heads:
        raise ValueError(f"heads must divide the groups of values that share weights, {groups}, got {heads}")
    # One row at a time, for each may be as large as the keys before it is averaged.
    return torch.cat([rows(place).unflatten(0, (heads, -1)).mean(1) for place in places.split(1)], 1)


def check_places(op: str, places: Places, queries: int) -> Tensor:
    """Return positions of queries as a tensor (rows,), and raise for invalid ones."""
    found = torch.as_tensor(places)
    if found.ndim != 1 or not len(found) or found.is_floating_point() or found.dtype == torch.bool:
        raise ValueError(f"{op}: rows must be one or more positions of queries, integers, got {places}")
    if int(found.min()) < 0 or int(found.max()) >= queries:
        raise ValueError(f"{op}: rows must be from 0 to {queries - 1}, got {places}")
    return found.long()


def flows_of(
    op: str, flows: Callable[..., FlowMaps], layout: Layout = HEADS, of_sequence: Callable[..., Any] = _same
) -> Callable[..., FlowMaps]:
    """Return a function that computes flows of a batch, from a function of one sequence without padding."""

    def maps(
        q: Tensor,
        k: Tensor,
        *learned: Any,
        causal: bool = False,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        **options: Any,
    ) -> FlowMaps:
        masks = check(op, q, k, k, layout=layout, causal=causal, mask=mask, context_mask=context_mask)
        wide = state_dtype(q.device)
        learned = tree_map_only(Tensor, lambda t: t.to(wide), learned)
        whole = FlowMaps(*(q.new_zeros(len(q), *x.shape[1:3], dtype=wide) for x in (q, k, q, k, k, q)))
        for row in range(len(q)):
            sinks, sources = real_places(masks.query, row, q), real_places(masks.key, row, k)
            if len(sinks) and len(sources):
                given = of_sequence(learned, row, sinks)
                found = flows(q[row, sinks].to(wide), k[row, sources].to(wide), *given, causal=causal, **options)
                for name, of_all, of_real in zip(FlowMaps._fields, whole, found, strict=True):
                    of_source = name in ("outgoing", "conserved_outgoing", "competition")
                    of_all[row, sources if of_source else sinks] = of_real
        return FlowMaps(*(x.transpose(1, 2) for x in whole))

    return maps
