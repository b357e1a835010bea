"""Reformer attention module, and its row of the registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowformer.core.checks import check_flag, check_sizes
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.past import init_past_state, step_of
from flowformer.mechanisms.reformer.operation import FORMS, LAYOUT, check_options, reformer_attention
from flowformer.mechanisms.reformer.weights import reformer_weights
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import rows_of, truth_of


@register(
    "reformer",
    operation=reformer_attention,
    truth=truth_of(reformer_weights),
    rows=rows_of("reformer_attention", reformer_weights, LAYOUT),
    step=step_of(reformer_attention),
    init_state=by_sizes(init_past_state),
    layout=LAYOUT,
    source="Kitaev, Kaiser and Levskaya, Reformer, ICLR 2020",
    cost="hashes L (2 chunk_length (K + V) + K buckets)",
    cannot={
        "permutation": "tokens of one bucket are cut into chunks in the order of their positions",
        "smooth": "buckets are steps of the queries, whose gradients take them as given",
        "fixed state": "it remembers every token, and sorts all of them again",
    },
)
class ReformerAttention(DrawnAttention):
    """LSH attention of the Reformer (Kitaev et al., 2020).

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        num_hashes: Hashes; 8 gives the paper's best results.
        num_buckets: Buckets of a hash, an even number.
        chunk_length: Tokens of a chunk.
        form: As in :func:`reformer_attention`. ``"hf"`` draws rotations for each head. Long Range Arena's module has no
            output projection; this one has.
        chunks_after: Likewise; 1 is the default of transformers in its bidirectional form.
        sees_future: Likewise.
        shared_qk: Queries are keys, as published: there is no ``k_proj``.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        num_hashes: int = 8,
        num_buckets: int = 32,
        chunk_length: int = 64,
        form: str = "paper",
        chunks_after: int = 0,
        sees_future: bool = False,
        shared_qk: bool = True,
        **options: Any,
    ) -> None:
        check_flag("shared_qk", shared_qk)
        self.shared_qk = shared_qk  # the base class asks for it
        super().__init__(dim, num_heads, **options)
        check_sizes(num_hashes=num_hashes, num_buckets=num_buckets)
        if num_buckets % 2:
            raise ValueError(f"num_buckets must be even, got {num_buckets}")
        check_options("reformer attention", form, chunk_length, chunks_after, sees_future, self.causal)
        self.num_hashes, self.num_buckets, self.chunk_length = num_hashes, num_buckets, chunk_length
        self.form, self.chunks_after, self.sees_future = form, chunks_after, sees_future
        self.register_drawn()

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Normally distributed rotations."""
        heads = (self.num_heads,) if FORMS[self.form].by_head else ()
        shape = (*heads, self.num_hashes, self.head_dim, self.num_buckets // 2)
        return {"rotations": torch.randn(shape, generator=generator)}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the rotations."""
        return (self.rotations,)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        options = {"form": self.form, "chunk_length": self.chunk_length, "chunks_after": self.chunks_after}
        return {**options, "sees_future": self.sees_future}

    @property
    def projections(self) -> tuple[str, ...]:
        """Queries have one, and keys unless they are the queries."""
        return ("q",) if self.shared_qk else ("q", "k")
