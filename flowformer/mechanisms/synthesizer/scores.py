"""Scores that are learned, or computed from queries alone. See :mod:`flowformer.mechanisms.synthesizer`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowformer.core.checks import check_choice, check_dense, check_flag, describe
from flowformer.core.precision import sum_dtype
from flowformer.core.tracing import is_traced

KINDS = ("random", "factorized_random", "dense", "factorized_dense")
ACTIVATIONS, TILINGS = ("relu", "identity"), ("outer", "both")

Synthetic = Tensor | Sequence[Tensor]


class Options(NamedTuple):
    """What scores are made of; see :func:`synthesizer_attention`."""

    kind: str = "random"
    dot_product: bool = True
    activation: str = "relu"
    tiling: str = "outer"
    lra_reshape: bool = False

    def check(self, of: str = "") -> None:
        """Raise for a wrong value."""
        check_choice(f"{of}kind", self.kind, KINDS)
        check_flag(f"{of}dot_product", self.dot_product)
        check_choice(f"{of}activation", self.activation, ACTIVATIONS)
        check_choice(f"{of}tiling", self.tiling, TILINGS)
        check_flag(f"{of}lra_reshape", self.lra_reshape)
        if self.lra_reshape and self.kind != "dense":
            raise ValueError(f"{of}lra_reshape is of kind='dense', got kind={self.kind!r}")


def check_synthetic(op: str, synthetic: Any, options: Options, q: Tensor) -> tuple[Tensor, ...]:
    """Return the learned tensors in the dtype of sums.

    Raises:
        TypeError, ValueError: for others than ``kind`` takes, for queries (..., heads, K).
    """
    parts = tuple(synthetic) if isinstance(synthetic, (tuple, list)) else (synthetic,)
    heads, width = q.shape[-2:]
    shapes = {
        "random": f"R ({heads}, T, T)",
        "factorized_random": f"R_1 ({heads}, T, r) and R_2 ({heads}, r, T)",
        "dense": f"W_2 ({width}, T) or ({heads}, {width}, T), and with a bias (T,) or ({heads}, T)",
        "factorized_dense": f"W_A ({heads}, {width}, a) and W_B ({heads}, {width}, b)",
    }
    wanted = f"{op}: synthetic must be {shapes[options.kind]}"
    shown = f"got {', '.join(describe(part) for part in parts)}"
    for part in parts:
        check_dense(f"{op}: synthetic", part)
    if not parts or not all(isinstance(part, Tensor) and part.is_floating_point() for part in parts):
        raise TypeError(f"{wanted}, of floating-point dtype, {shown}")
    if not _fits(options.kind, [part.shape for part in parts], heads, width):
        raise ValueError(f"{wanted}, {shown}")
    if any(part.device != q.device for part in parts):
        raise ValueError(f"{op}: synthetic must be on {q.device} like q, {shown}")
    return tuple(part.to(sum_dtype(q.dtype)) for part in parts)


def _fits(kind: str, shapes: Sequence[torch.Size], heads: int, width: int) -> bool:
    first, last, count = shapes[0], shapes[-1], len(shapes)
    if not all(shape.numel() for shape in shapes):
        return False
    if kind == "random":
        return count == 1 and first == (heads, last[-1], last[-1])
    if kind == "factorized_random":
        return count == 2 and len(last) == 3 and first == (heads, last[2], last[1]) and last[0] == heads
    if kind == "dense":
        biases = ((first[-1],), (heads, first[-1]))
        return first in ((width, first[-1]), (heads, width, first[-1])) and (
            count == 1 or (count == 2 and tuple(last) in biases)
        )
    return count == 2 and all(shape == (heads, width, shape[-1]) for shape in shapes)


def _positions(tables: Sequence[Tensor], kind: str) -> int:
    """How many positions there are learned tensors for (T)."""
    return tables[0].shape[-1] * tables[1].shape[-1] if kind == "factorized_dense" else _last(tables, kind).shape[-1]


def _last(tables: Sequence[Tensor], kind: str) -> Tensor:
    return tables[0] if kind == "dense" else tables[-1]


def check_length(tables: Sequence[Tensor], kind: str, tokens: int) -> None:
    """Raise ValueError for sequences that reach beyond the learned positions; causal queries are among the keys."""
    positions = _positions(tables, kind)
    if not is_traced() and tokens > positions:
        raise ValueError(f"synthesizer_attention: synthetic has {positions} positions, got {tokens} tokens")


def synthesize(q: Tensor, tables: Sequence[Tensor], place: Tensor, keys: int, options: Options) -> Tensor:
    """Synthetic scores (batch or 1, heads, L, S) of queries (batch, heads, L, K) at positions (L,) or (batch, L)."""
    if options.kind in ("random", "factorized_random"):
        rows = tables[0][:, place.clamp(max=tables[0].shape[1] - 1)]  # in a traced graph padding may lie beyond
        rows = rows.transpose(0, 1) if rows.ndim == 4 else rows.unsqueeze(0)
        return rows[..., :keys] if len(tables) == 1 else rows @ tables[1][..., :keys]
    active = q.relu() if options.activation == "relu" else q
    if options.kind == "dense":
        scores = active @ tables[0]
        if len(tables) > 1:
            scores = scores + (tables[1].unsqueeze(1) if tables[1].ndim == 2 else tables[1])
        if options.lra_reshape:
            scores = scores.transpose(1, 2).reshape(scores.shape)
        return scores[..., :keys]
    A, B = (active @ table for table in tables)
    if options.tiling == "outer":
        return (A.unsqueeze(-1) * B.unsqueeze(-2)).flatten(-2)[..., :keys]
    j = torch.arange(keys, device=q.device)
    return A[..., j % A.shape[-1]] * B[..., j % B.shape[-1]]
