"""Every attention mechanism by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from flowformer import ops
from flowformer.attention.base import Attention
from flowformer.attention.flow import FlowAttention
from flowformer.attention.linear import LinearAttention
from flowformer.attention.softmax import SoftmaxAttention
from flowformer.ops import reference


@dataclass(frozen=True)
class Mechanism:
    """One row of the registry: what models, laws, benchmarks and the command line need to know of a mechanism.

    Attributes:
        name: The name it is called by.
        module: The module class.
        op: The operation, on (batch, length, heads, channels).
        reference: The same in float64, :mod:`flowformer.ops.reference`.
        step: The operation for one token.
        init_state: The state before the first token.
        complexity: Time in terms of length L, key channels K and value channels V.
        linear: Whether memory is linear in length.
        source: The paper.
        variants: Named options of the operation under which the laws are checked.
    """

    name: str
    module: type[Attention]
    op: Callable[..., Any]
    reference: Callable[..., Any]
    step: Callable[..., Any]
    init_state: Callable[..., Any]
    complexity: str
    linear: bool
    source: str
    variants: Mapping[str, Mapping[str, Any]] = field(default_factory=lambda: MappingProxyType({"default": {}}))


_FLOW_VARIANTS = {
    **{preset: {"preset": preset} for preset in ops.PRESETS},
    "no-competition": {"competition": None},
    "no-allocation": {"allocation": False},
    "rescale": {"rescale": True},
    "relu": {"feature_map": "relu"},
}

_MECHANISMS = {
    row.name: row
    for row in (
        Mechanism(
            "flow", FlowAttention, ops.flow_attention, reference.flow_attention, ops.flow_attention_step,
            ops.init_flow_state, "L K V", True, "Wu et al., Flowformer, ICML 2022", _FLOW_VARIANTS,
        ),
        Mechanism(
            "linear", LinearAttention, ops.linear_attention, reference.linear_attention, ops.linear_attention_step,
            ops.init_linear_state, "L K V", True, "Katharopoulos et al., Transformers are RNNs, ICML 2020",
        ),
        Mechanism(
            "softmax", SoftmaxAttention, ops.softmax_attention, reference.softmax_attention,
            ops.softmax_attention_step, ops.init_softmax_state, "L^2 (K + V)", False,
            "Vaswani et al., Attention is all you need, NeurIPS 2017",
        ),
    )
}  # fmt: skip


def list_attentions() -> list[str]:
    """Names that :func:`create_attention` knows."""
    return sorted(_MECHANISMS)


def find_attention(name: str) -> Mechanism:
    """The registry's row of a mechanism.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    if name not in _MECHANISMS:
        near = difflib.get_close_matches(name, _MECHANISMS, 1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise ValueError(f"no attention {name!r}; there is {', '.join(list_attentions())}{hint}")
    return _MECHANISMS[name]


def create_attention(
    name: str, dim: int, num_heads: int, *, causal: bool = False, max_length: int | None = None, **options: Any
) -> Attention:
    """Build an attention module by name.

    Args:
        name: One of :func:`list_attentions`.
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        max_length: The longest sequence to come, for mechanisms with a table of positions. None of the present ones
            has one: they take any length.
        **options: Options of the mechanism's module.

    Returns:
        The module.

    Raises:
        ValueError: for an unknown name or sizes that do not fit.
        TypeError: for an option the mechanism does not have.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    return find_attention(name).module(dim, num_heads, causal=causal, **options)
