"""The module of the Synthesizer. See :mod:`flowformer.mechanisms.synthesizer`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import apply, check_sizes
from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.registry import register
from flowformer.mechanisms.short_conv import ShortConv
from flowformer.mechanisms.synthesizer.operation import (
    state_of,
    synthesizer_attention,
    synthesizer_attention_step,
    synthesizer_weights,
)
from flowformer.mechanisms.synthesizer.scores import Options, Synthetic
from flowformer.mechanisms.weights import rows_of, truth_of


@register(
    "synthesizer",
    operation=synthesizer_attention,
    truth=truth_of(synthesizer_weights),
    rows=rows_of("synthesizer_attention", synthesizer_weights),
    step=synthesizer_attention_step,
    init_state=state_of,
    source="Tay et al., Synthesizer: Rethinking Self-Attention for Transformer Models, ICML 2021",
    cost="L^2 (K + V)",
    cannot={
        "linear time": "every pair of positions has a score of its own",
        "linear memory": "it builds the matrix of scores",
        "fixed state": "it remembers every key and value",
        "permutation": "it learns scores for each position",
    },
)
class SynthesizerAttention(Attention):
    """Synthesizer (Tay et al., 2021): attention with learned scores, in quadratic time.

    Projections that scores do not depend on are left out: without ``dot_product`` those of keys, and in random kinds
    those of queries.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        max_length: Longest sequence (T); must be given. Shorter ones use the first positions.
        kind: ``"random"``, ``"factorized_random"``, ``"dense"`` or ``"factorized_dense"``, as
            :func:`synthesizer_attention` takes it.
        dot_product: Add the scores of softmax attention. With random tables that is what Long Range Arena's runs have,
            and the default here.
        rank: Columns of the factors of random tables (r); Long Range Arena's code has 32.
        factors: Sizes a and b of the factors of dense scores, with a b at least ``max_length``; near its square root if
            absent.
        activation: As :func:`synthesizer_attention` takes it.
        tiling: Likewise.
        lra_reshape: Likewise.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Attributes:
        tables: The learned tensors, as :func:`synthesizer_attention` takes them.

    Raises:
        ValueError: for sizes that do not fit; when called, for a sequence longer than ``max_length``.

    Example:
        >>> import torch
        >>> from flowformer import SynthesizerAttention
        >>> attention = SynthesizerAttention(dim=64, num_heads=4, max_length=200, kind="dense", dot_product=False)
        >>> attention(torch.randn(2, 150, 64)).shape
        torch.Size([2, 150, 64])
    """

    learns_positions = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        max_length: int | None = None,
        kind: str = "random",
        dot_product: bool = True,
        rank: int = 32,
        factors: tuple[int, int] | None = None,
        activation: str = "relu",
        tiling: str = "outer",
        lra_reshape: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        self.options = Options(kind, dot_product, activation, tiling, lra_reshape)
        self.options.check()
        super().__init__(dim, num_heads, device=device, dtype=dtype, **options)
        if max_length is None:
            raise ValueError(
                "SynthesizerAttention: max_length is required, the length of the longest sequence: there are learned "
                "scores for each position"
            )
        check_sizes(max_length=max_length, rank=rank)
        self.max_length, self.rank = max_length, rank
        if lra_reshape and self.causal:
            raise ValueError("SynthesizerAttention: lra_reshape has no causal form: build it with causal=False")
        self.factors = _check_factors(factors, max_length)
        self.tables = nn.ParameterList(
            nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) for shape in self._shapes()
        )
        self._reset_tables()

    def _shapes(self) -> list[tuple[int, ...]]:
        heads, T, width = self.num_heads, self.max_length, self.head_dim
        if self.options.kind == "random":
            return [(heads, T, T)]
        if self.options.kind == "factorized_random":
            return [(heads, T, self.rank), (heads, self.rank, T)]
        if self.options.kind == "dense":
            return [(heads, width, T)]
        return [(heads, width, size) for size in self.factors]

    @property
    def projections(self) -> tuple[str, ...]:
        """Those that scores depend on."""
        if self.options.dot_product:
            return ("q", "k")
        return ("q",) if "dense" in self.options.kind else ()

    def reset_parameters(self) -> None:
        """Draw fresh parameters, as a new module has them."""
        super().reset_parameters()
        self._reset_tables()

    def _reset_tables(self) -> None:
        # Deviation 1 / sqrt(rows of a matrix), as Long Range Arena's code draws kernels.
        for table in self.tables:
            nn.init.normal_(table, std=table.shape[1] ** -0.5)

    def learned(self, x: Tensor | None = None) -> tuple[Synthetic]:
        """The table, or the pair of factors."""
        first, *others = self.tables
        return ((first, *others) if others else first,)

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()

    def _project(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values; zeros for those that scores do not depend on."""
        name = f"{type(self).__name__}: inputs"
        v = apply(name, self.v_proj, source)
        q = apply(name, self.q_proj, x) if "q" in self.projections else v.new_zeros(*x.shape[:-1], v.shape[-1])
        k = apply(name, self.k_proj, source) if "k" in self.projections else torch.zeros_like(v)
        return q, k, v

    @property
    def _convs(self) -> tuple[ShortConv, ShortConv, ShortConv]:
        """Those of values stand in for those that there are not: what they would convolve is of no consequence."""
        q, k = (getattr(self, f"{name}_conv" if name in self.projections else "v_conv") for name in "qk")
        return q, k, self.v_conv

    def extra_repr(self) -> str:
        """Sizes, for printing."""
        return f"{super().extra_repr()}, max_length={self.max_length}, kind={self.options.kind}"


def _check_factors(factors: Any, positions: int) -> tuple[int, int]:
    """Return sizes whose product is at least ``positions``, and raise for others."""
    if factors is None:
        first = math.isqrt(positions - 1) + 1
        return first, -(-positions // first)
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise ValueError(f"factors must be two sizes, got {factors!r}")
    first, second = factors
    check_sizes(**{"factors[0]": first, "factors[1]": second})
    if first * second < positions:
        raise ValueError(f"the product of factors must be at least max_length, {positions}, got {first} x {second}")
    return first, second
