"""Every attention mechanism by name: one row each, entered by the mechanism's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flowformer.common.registry import Registry
from flowformer.core.checks import HEADS, Layout
from flowformer.mechanisms.weights import FlowMaps

if TYPE_CHECKING:
    from flowformer.mechanisms.base import Attention

# What a mechanism may be unable to do by its definition; see Mechanism.cannot.
LIMITS = {
    "causal": "causal form",
    "state": "state to continue from, and no decoding token by token",
    "fixed state": "state of fixed size, however many tokens came before",
    "cross": "cross-attention",
    "permutation": "permutation equivariance: it knows the order of tokens",
    "linear memory": "memory linear in length",
    "linear time": "time linear in length",
    "smooth": "gradients that equal finite differences",
}


@dataclass(frozen=True)
class Mechanism:
    """One row of the registry: what models, laws, benchmarks, pictures and the command line know of a mechanism.

    Attributes:
        name: The name it is called by.
        module: The module class.
        operation: ``operation(q, k, v, *learned, causal=..., mask=..., **options)``.
        truth: The same in float64, written to be read.
        source: The paper.
        cost: Time in terms of length L, key channels K and value channels V.
        step: The operation for one token, ``step(q, k, v, state, *learned, **options)``; ``None`` where there is none.
        init_state: The state before the first token, ``init_state(batch, heads, key channels, value channels,
            *learned, dtype=..., device=..., **options)``.
        rows: Rows of weights of a batch, ``rows(q, k, places, *learned, causal=..., mask=..., **options)``.
        flows: Flows of a batch, ``flows(q, k, causal=..., mask=..., **options)``, where there are any.
        layout: The axes of q, k and v, and whether they must be equally long.
        cannot: What it cannot do by its definition, of :data:`LIMITS`, and why.
    """

    name: str
    module: type[Attention]
    operation: Callable[..., Any]
    truth: Callable[..., Tensor]
    source: str
    cost: str
    _: KW_ONLY
    step: Callable[..., Any] | None = None
    init_state: Callable[..., Any] | None = None
    rows: Callable[..., Tensor] | None = None
    flows: Callable[..., FlowMaps] | None = None
    layout: Layout = HEADS
    cannot: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Add the limits that follow from the rest, and refuse unknown ones."""
        cannot = dict(self.cannot)
        if self.layout.self_only:
            cannot["cross"] = self.layout.self_only
        if "causal" in cannot:
            cannot["state"] = cannot["causal"]
        elif self.step is None:
            cannot.setdefault("state", "it has no step")
        if "state" in cannot:
            cannot["fixed state"] = cannot["state"]
        unknown = sorted(set(cannot) - set(LIMITS))
        if unknown:
            raise ValueError(f"{self.name}: no limit {unknown[0]!r}; there is {', '.join(LIMITS)}")
        object.__setattr__(self, "cannot", cannot)

    def can(self, *limits: str) -> bool:
        """Whether it can do all of some things, of :data:`LIMITS`."""
        return not any(limit in self.cannot for limit in limits)


_MECHANISMS: Registry[Mechanism] = Registry("attention", package="flowformer.mechanisms")

M = TypeVar("M", bound="type[Attention]")


def register(name: str, **row: Any) -> Callable[[M], M]:
    """Enter a module class as a mechanism; see :class:`Mechanism` for what a row says."""

    def enter(module: M) -> M:
        module.mechanism = _MECHANISMS.add(name, Mechanism(name, module, **row))
        return module

    return enter


def by_sizes(init_state: Callable[..., Any]) -> Callable[..., Any]:
    """``init_state`` for a row, where the state depends on (batch, heads, key channels, value channels) alone."""

    def init(*sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> Any:
        return init_state(*sizes_and_learned[:4], dtype=dtype, device=device)

    return init


def unregister(name: str) -> None:
    """Remove a mechanism, as tests do with what they registered."""
    _MECHANISMS.remove(name)


def list_attentions() -> list[str]:
    """Names that :func:`create_attention` knows."""
    return _MECHANISMS.names()


def find_attention(name: str) -> Mechanism:
    """The registry's row of a mechanism.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    return _MECHANISMS.find(name)


def create_attention(
    name: str, dim: int, num_heads: int, *, causal: bool = False, max_length: int | None = None, **options: Any
) -> Attention:
    """Build an attention module by name.

    Args:
        name: One of :func:`list_attentions`.
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        max_length: The longest sequence, which modules with parameters for each position need; the others take any
            length and ignore it.
        **options: Options of the mechanism's module; ``device`` and ``dtype`` among them.

    Returns:
        The module.

    Raises:
        ValueError: for an unknown name, sizes that do not fit, a mechanism without a causal form, or a ``max_length``
            that is needed and absent.
        TypeError: for an option the mechanism does not have.
    """
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length must be positive, got {max_length}")
    module = find_attention(name).module
    if module.learns_positions:
        options["max_length"] = max_length
    return module(dim, num_heads, causal=causal, **options)
