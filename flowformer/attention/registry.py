"""Every attention mechanism by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from flowformer import ops
from flowformer.attention.aft import AFTFull, AFTLocal, AFTSimple
from flowformer.attention.aft_conv import AFTConv
from flowformer.attention.base import Attention
from flowformer.attention.flow import FlowAttention
from flowformer.attention.linear import LinearAttention
from flowformer.attention.mobile import MobileAttention
from flowformer.attention.softmax import SoftmaxAttention
from flowformer.ops import reference

Sizes = tuple[int, ...]


def _with_heads(heads: int, key_channels: int, value_channels: int) -> tuple[Sizes, Sizes, Sizes]:
    return (heads, key_channels), (heads, key_channels), (heads, value_channels)


def _no_parameters(length: int, heads: int) -> tuple[Any, ...]:
    return ()


@dataclass(frozen=True)
class Variant:
    """One way to call an operation: the laws are checked for each, and each can be timed.

    Attributes:
        options: Keyword arguments of the operation, of its reference, of its step and of its state.
        parameters: Shapes of the learned tensors that the operation takes after v and the step after the state, for
            sequences of up to ``length`` tokens and for ``heads``. One entry for each argument: a ``torch.Size``, or a
            tuple of them where the argument is a tuple of tensors.
        linear: Whether memory is linear in length, where this differs from the mechanism's.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    parameters: Callable[[int, int], tuple[Any, ...]] = _no_parameters
    linear: bool | None = None


@dataclass(frozen=True)
class Mechanism:
    """One row of the registry: what models, laws, benchmarks and the command line need to know of a mechanism.

    Attributes:
        name: The name it is called by.
        module: The module class.
        op: The operation ``op(q, k, v, *parameters, causal=..., **options)``.
        reference: The same in float64, :mod:`flowformer.ops.reference`.
        step: The operation for one token, ``step(q, k, v, state, *parameters, **options)``.
        init_state: The state before the first token, ``init_state(batch, heads, key channels, value channels,
            *parameters, dtype=..., device=..., **options)``: a row takes what its state depends on, and no other need.
        complexity: Time in terms of length L, key channels K and value channels V.
        source: The paper.
        linear: Whether memory is linear in length.
        linear_time: Whether time is, and a sequence of a million tokens within reach.
        fixed_state: Whether the state keeps its size, however many tokens came before.
        causal: Whether there is a causal form.
        cross: Whether the bidirectional form takes another number of queries than of keys.
        ordered: Whether the bidirectional form knows the order of tokens.
        shapes: Axes of q, k and v after (batch, length), for (heads, key channels, value channels).
        variants: The ways to call it, by name.
    """

    name: str
    module: type[Attention]
    op: Callable[..., Any]
    reference: Callable[..., Any]
    step: Callable[..., Any]
    init_state: Callable[..., Any]
    complexity: str
    source: str
    _: KW_ONLY
    linear: bool = True
    linear_time: bool = True
    fixed_state: bool = True
    causal: bool = True
    cross: bool = True
    ordered: bool = False
    shapes: Callable[[int, int, int], tuple[Sizes, Sizes, Sizes]] = _with_heads
    variants: Mapping[str, Variant] = field(default_factory=lambda: {"default": Variant()})

    def is_linear(self, variant: Variant) -> bool:
        """Whether memory is linear in length, called in this way."""
        return self.linear if variant.linear is None else variant.linear


def _by_sizes(init_state: Callable[..., Any]) -> Callable[..., Any]:
    """The state of a mechanism that depends on (batch, heads, key channels, value channels) and nothing else."""

    def init(*sizes_and_parameters: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> Any:
        return init_state(*sizes_and_parameters[:4], dtype=dtype, device=device)

    return init


def _options(variants: Mapping[str, Mapping[str, Any]]) -> dict[str, Variant]:
    """Variants that differ in options alone."""
    return {name: Variant(options) for name, options in variants.items()}


_FLOW = {
    **{preset: {"preset": preset} for preset in ops.PRESETS},
    "no-competition": {"competition": None},
    "no-allocation": {"allocation": False},
    "rescale": {"rescale": True},
    "relu": {"feature_map": "relu"},
}

_AFT_SOURCE = "Zhai et al., An Attention Free Transformer, 2021"


def _in_channels(heads: int, key_channels: int, value_channels: int) -> tuple[Sizes, Sizes, Sizes]:
    channels = (heads * value_channels,)
    return channels, channels, channels


def _key_per_head(heads: int, key_channels: int, value_channels: int) -> tuple[Sizes, Sizes, Sizes]:
    return (heads * value_channels,), (heads,), (heads * value_channels,)


def _table(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((length, length)),)


def _factors(length: int, heads: int) -> tuple[Any, ...]:
    return ((torch.Size((length, 2)), torch.Size((length, 2))),)


def _filters(length: int, heads: int) -> tuple[Any, ...]:
    return (torch.Size((heads, 5)),)


def _aft_full_state(batch: int, heads: int, key: int, value: int, *bias: Any, **like: Any) -> ops.AFTFullState:
    return ops.init_aft_full_state(batch, heads * value, **like)


def _aft_local_state(
    batch: int, heads: int, key: int, value: int, *bias: Any, window: int, hard: bool = False, **like: Any
) -> ops.AFTLocalState:
    return ops.init_aft_local_state(batch, heads * value, window, **like)


def _aft_simple_state(batch: int, heads: int, key: int, value: int, **like: Any) -> ops.AFTSimpleState:
    return ops.init_aft_simple_state(batch, heads * value, **like)


def _aft_conv_state(
    batch: int, heads: int, key: int, value: int, filters: torch.Tensor, hard: bool = False, **like: Any
) -> ops.AFTConvState:
    return ops.init_aft_conv_state(batch, heads, heads * value, filters.shape[1], **like)


_AFT_FULL = {"factors": Variant(parameters=_factors), "free": Variant(parameters=_table, linear=False)}
_AFT_LOCAL = {
    "factors": Variant({"window": 3}, _factors),
    "free": Variant({"window": 40}, _table, linear=False),
    "hard": Variant({"window": 3, "hard": True}, _factors),
}
_AFT_CONV = {"default": Variant(parameters=_filters), "hard": Variant({"hard": True}, _filters)}

_MOBILE = {
    "default": {},
    "normalized": {"normalize": True},
    "no-competition": {"competition": None},
    "heads": {"competition": "heads", "normalize": True},
    "no-allocation": {"allocation": False},
    "no-clamp": {"clamp": None},
    # eps bounds what is divided by: with 1e-6 and relu, outputs of few heads and channels are beyond float16.
    "relu": {"feature_map": "relu", "eps": 1e-2},
}

_MECHANISMS = {
    row.name: row
    for row in (
        Mechanism(
            "flow", FlowAttention, ops.flow_attention, reference.flow_attention, ops.flow_attention_step,
            _by_sizes(ops.init_flow_state), "L K V", "Wu et al., Flowformer, ICML 2022", variants=_options(_FLOW),
        ),
        Mechanism(
            "linear", LinearAttention, ops.linear_attention, reference.linear_attention, ops.linear_attention_step,
            _by_sizes(ops.init_linear_state), "L K V", "Katharopoulos et al., Transformers are RNNs, ICML 2020",
        ),
        Mechanism(
            "mobile", MobileAttention, ops.mobile_attention, reference.mobile_attention, ops.mobile_attention_step,
            _by_sizes(ops.init_mobile_state), "L K V", "Yao et al., Mobile Attention, ICML 2024",
            cross=False, variants=_options(_MOBILE),
        ),
        Mechanism(
            "softmax", SoftmaxAttention, ops.softmax_attention, reference.softmax_attention,
            ops.softmax_attention_step, _by_sizes(ops.init_softmax_state), "L^2 (K + V)",
            "Vaswani et al., Attention is all you need, NeurIPS 2017",
            linear=False, linear_time=False, fixed_state=False,
        ),
        Mechanism(
            "aft_full", AFTFull, ops.aft_full, reference.aft_full, ops.aft_full_step, _aft_full_state, "L^2 V",
            _AFT_SOURCE, linear_time=False, fixed_state=False, ordered=True, shapes=_in_channels, variants=_AFT_FULL,
        ),
        Mechanism(
            "aft_local", AFTLocal, ops.aft_local, reference.aft_local, ops.aft_local_step, _aft_local_state,
            "L window V", _AFT_SOURCE, cross=False, ordered=True, shapes=_in_channels, variants=_AFT_LOCAL,
        ),
        Mechanism(
            "aft_simple", AFTSimple, ops.aft_simple, reference.aft_simple, ops.aft_simple_step, _aft_simple_state,
            "L V", _AFT_SOURCE, shapes=_in_channels,
        ),
        Mechanism(
            "aft_conv", AFTConv, ops.aft_conv, reference.aft_conv, ops.aft_conv_step, _aft_conv_state, "L kernel V",
            _AFT_SOURCE, cross=False, ordered=True, shapes=_key_per_head, variants=_AFT_CONV,
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
        max_length: The longest sequence to come, which modules with parameters for each position want; the others
            take any length and do without.
        **options: Options of the mechanism's module.

    Returns:
        The module.

    Raises:
        ValueError: for an unknown name, sizes that do not fit, or a ``max_length`` that is wanted and absent.
        TypeError: for an option the mechanism does not have.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    module = find_attention(name).module
    if module.learns_positions:
        options["max_length"] = max_length
    return module(dim, num_heads, causal=causal, **options)
