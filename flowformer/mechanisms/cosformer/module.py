"""The module of cosFormer attention, and its row of the registry."""

from __future__ import annotations

from typing import Any, ClassVar

from flowformer.mechanisms.base import Attention
from flowformer.mechanisms.cosformer.operation import (
    check_options,
    cosformer_attention,
    cosformer_attention_step,
    cosformer_weights,
    init_cosformer_state,
)
from flowformer.mechanisms.registry import by_sizes, register
from flowformer.mechanisms.weights import rows_of, truth_of


@register(
    "cosformer",
    operation=cosformer_attention,
    truth=truth_of(cosformer_weights),
    rows=rows_of("cosformer_attention", cosformer_weights),
    step=cosformer_attention_step,
    init_state=by_sizes(init_cosformer_state),
    source="Qin et al., cosFormer: Rethinking softmax in attention, ICLR 2022",
    cost="L K V",
    cannot={"permutation": "weights fall with the distance of tokens"},
)
class CosformerAttention(Attention):
    """Attention of cosFormer (Qin et al., 2022), in linear time.

    Args:
        dim: Channels of input and output.
        num_heads: Heads.
        eps: The least denominator.
        max_length: The longest sequence, over which weights fall to 0. Causal modules need it for states and steps. The
            length of each sequence if absent.
        **options: As :class:`flowformer.mechanisms.Attention` takes them.

    Raises:
        TypeError, ValueError: for sizes that do not fit.
    """

    bounds_causal: ClassVar[bool] = True

    def __init__(
        self, dim: int, num_heads: int, *, eps: float = 1e-6, max_length: int | None = None, **options: Any
    ) -> None:
        super().__init__(dim, num_heads, **options)
        check_options("CosformerAttention", eps, max_length)
        self.eps, self.max_length = eps, max_length

    def arguments(self) -> dict[str, Any]:
        """Options of the operation."""
        return {"eps": self.eps, "max_length": self.max_length}

    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first token, for a batch of ``batch_size`` sequences."""
        if self.causal and self.max_length is None:
            raise ValueError("CosformerAttention: a state requires max_length: build the module with it")
        return super().init_state(batch_size)
