"""Sinkhorn attention module, and its row of the registry."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowformer.core.checks import check_sizes
from flowformer.mechanisms.draws import DrawnAttention
from flowformer.mechanisms.past import init_past_state, step_of
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.sinkhorn.operation import EPS, LAYOUT, SORTS, Options, check_options, sinkhorn_attention
from flowformer.mechanisms.sinkhorn.weights import sinkhorn_truth, sinkhorn_weights
from flowformer.mechanisms.weights import rows_of


@register(
    "sinkhorn",
    operation=sinkhorn_attention,
    truth=sinkhorn_truth,
    rows=rows_of("sinkhorn_attention", sinkhorn_weights, LAYOUT),
    step=step_of(sinkhorn_attention),
    init_state=by_sizes(init_past_state),
    layout=LAYOUT,
    source="Tay et al., Sparse Sinkhorn attention, ICML 2020",
    cost="L (1 + num_top) bucket_length (K + V) + (L / bucket_length)^2 K",
    cannot={
        "permutation": "buckets are cut by position",
        "linear time": "every bucket has a score with every other",
        "linear memory": "every bucket has a score with every other, few as they are",
        "fixed state": "it remembers every token: any bucket may be sorted to a later one",
    },
)
class SinkhornAttention(DrawnAttention):
    """Sparse Sinkhorn attention (Tay et al., 2020), in the form of sinkhorn-transformer.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        bucket_length: Tokens of a bucket.
        sort: As in :func:`sinkhorn_attention`.
        num_top: Likewise.
        temperature: Likewise.
        iterations: Likewise.
        values: Likewise.
        max_buckets: Buckets of the longest sequence, for ``sort="gumbel"``, whose noise the module owns, and those of
            Long Range Arena.
        **options: As :class:`flowformer.mechanisms.draws.DrawnAttention` takes them.

    Raises:
        ValueError: for sizes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        bucket_length: int = 64,
        sort: str = "top",
        num_top: int = 1,
        temperature: float = 0.75,
        iterations: int = 7,
        values: str = "values",
        max_buckets: int = 64,
        **options: Any,
    ) -> None:
        super().__init__(dim, num_heads, **options)
        self.options = Options(bucket_length, sort, num_top, temperature, iterations, values)
        check_options("sinkhorn attention", self.options, self.causal)
        check_sizes(max_buckets=max_buckets)
        self.max_buckets = max_buckets
        like = {"device": self.out_proj.weight.device, "dtype": self.out_proj.weight.dtype}
        if self.causal:
            self.null_key = nn.Parameter(torch.empty(num_heads, self.head_dim, **like))
            self.null_value = nn.Parameter(torch.empty(num_heads, self.head_dim, **like))
        if SORTS[sort] == "lra":
            self.sort_kernel = nn.Parameter(torch.empty(self.head_dim, max_buckets, **like))
        self._reset_own()
        self.register_drawn()

    def reset_parameters(self) -> None:
        """Re-initialize all parameters, and return to the noise of :attr:`seed`."""
        super().reset_parameters()
        self._reset_own()

    def _reset_own(self) -> None:
        if self.causal:
            nn.init.normal_(self.null_key)
            nn.init.normal_(self.null_value)
        if SORTS[self.options.sort] == "lra":
            nn.init.normal_(self.sort_kernel, std=self.head_dim**-0.5)

    def draw(self, generator: torch.Generator) -> dict[str, Tensor]:
        """Gumbel noise, where the sort has any."""
        if self.options.sort != "gumbel":
            return {}
        uniform = torch.rand(self.num_heads, self.max_buckets, self.max_buckets, generator=generator)
        return {"noise": -(-(uniform + EPS).log() + EPS).log()}

    def learned(self, x: Tensor | None = None) -> tuple[Any, ...]:
        """Return the null buckets, the noise and the sort network, where there are any."""
        return tuple(getattr(self, name, None) for name in ("null_key", "null_value", "noise", "sort_kernel"))

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return self.options._asdict()
