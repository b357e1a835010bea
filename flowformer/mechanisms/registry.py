"""Registry of attention mechanisms: one row each, registered by the mechanism's own file."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from flowformer.common.names import nearest
from flowformer.common.registry import Registry
from flowformer.core.checks import HEADS, Layout, check_flag, check_optional_sizes
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
    """A row of the registry: what models, laws, benchmarks, maps and the command line use of a mechanism.

    Attributes:
        name: The name it is called by.
        module: The module class.
        operation: ``operation(q, k, v, *learned, causal=..., mask=..., **options)``.
        truth: The float64 reference of the operation.
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
        """Add implied limits, and raise for unknown ones."""
        if not isinstance(self.name, str) or not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"a mechanism's name must be lower-case words joined by _, got {self.name!r}")
        for label in ("operation", "truth"):
            if not callable(getattr(self, label)):
                raise TypeError(f"{self.name}: {label} must be a function, got {getattr(self, label)!r}")
        if not isinstance(self.layout, Layout):
            raise TypeError(f"{self.name}: layout must be a Layout, got {self.layout!r}")
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
            raise ValueError(f"{self.name}: unknown limit {unknown[0]!r}; available: {', '.join(LIMITS)}")
        object.__setattr__(self, "cannot", cannot)

    def can(self, *limits: str) -> bool:
        """Return whether the mechanism has none of the given :data:`LIMITS`."""
        return not any(limit in self.cannot for limit in limits)


_MECHANISMS: Registry[Mechanism] = Registry("attention", package="flowformer.mechanisms")


def _check_operation(name: str, operation: Callable[..., Any]) -> None:
    """Raise a TypeError for an operation that does not take what modules pass to it."""
    parameters = inspect.signature(operation).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    missing = [one for one in ("causal", "mask", "context_mask", "cu_seqlens", "backend") if one not in parameters]
    if missing:
        raise TypeError(f"{name}: operation must take {', '.join(missing)}")


M = TypeVar("M", bound="type[Attention]")


def register(name: str, **row: Any) -> Callable[[M], M]:
    """Register a module class as a mechanism; see :class:`Mechanism` for the fields of a row."""

    def enter(module: M) -> M:
        if not hasattr(module, "learns_positions"):
            raise TypeError(f"{name}: the class must derive from flowformer.mechanisms.Attention, got {module!r}")
        mechanism = Mechanism(name, module, **row)
        _check_operation(name, mechanism.operation)
        module.mechanism = _MECHANISMS.add(name, mechanism)
        return module

    return enter


def by_sizes(init_state: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``init_state`` for a row, for states that depend on (batch, heads, key and value channels) only."""

    def init(*sizes_and_learned: Any, dtype: Any = torch.float32, device: Any = None, **options: Any) -> Any:
        return init_state(*sizes_and_learned[:4], dtype=dtype, device=device)

    return init


def unregister(name: str) -> None:
    """Remove a mechanism from the registry."""
    _MECHANISMS.remove(name)


def list_attentions() -> list[str]:
    """Return the names that :func:`create_attention` accepts."""
    return _MECHANISMS.names()


def find_attention(name: str) -> Mechanism:
    """Return the registry's row of a mechanism.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    if isinstance(name, str) and name not in _MECHANISMS and name.removesuffix("_attention") in _MECHANISMS:
        mechanism = name.removesuffix("_attention")
        raise ValueError(f"{name!r} is an operation, not an attention mechanism (did you mean {mechanism!r}?)")
    return _MECHANISMS.find(name)


# Arguments that a model sets, which are not options of a mechanism.
DECIDED = ("self", "dim", "num_heads", "causal", "max_length", "device", "dtype")


def option_names(name: str) -> list[str]:
    """Return the options of a mechanism's module, those of its base classes and of its operation's presets included."""
    module = find_attention(name).module
    names: dict[str, None] = {}
    for one in module.__mro__:
        if "__init__" not in vars(one):
            continue
        kinds = {key: parameter.kind for key, parameter in inspect.signature(one.__init__).parameters.items()}
        names.update({key: None for key, kind in kinds.items() if kind is not inspect.Parameter.VAR_KEYWORD})
        if inspect.Parameter.VAR_KEYWORD not in kinds.values():
            break
    names.update(dict.fromkeys(module.further_options))
    return [key for key in names if key not in DECIDED]


def create_attention(
    name: str, dim: int, num_heads: int, *, causal: bool = False, max_length: int | None = None, **options: Any
) -> Attention:
    """Build an attention module by name.

    Args:
        name: One of :func:`list_attentions`.
        dim: Channels of input and output.
        num_heads: Heads.
        causal: Output t depends on positions up to t only.
        max_length: The longest sequence, which modules with parameters for each position need, and some causal ones;
            the others take any length and ignore it.
        **options: Options of the mechanism's module; ``device`` and ``dtype`` among them.

    Returns:
        The module.

    Raises:
        ValueError: for an unknown name, sizes that do not fit, a mechanism without a causal form, or a ``max_length``
            that is needed and absent.
        TypeError: for an option the mechanism does not have.
    """
    check_flag("causal", causal)
    check_optional_sizes(max_length=max_length)
    module = find_attention(name).module
    known = option_names(name)
    for key in options:
        if key not in (*known, "device", "dtype"):
            listed = f"available: {', '.join(known)}{nearest(key, known)}"
            raise TypeError(f"attention {name!r} has no option {key!r}; {listed}")
    if module.learns_positions or (causal and module.bounds_causal):
        options["max_length"] = max_length
    return module(dim, num_heads, causal=causal, **options)
