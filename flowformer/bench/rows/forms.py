"""Mechanisms as contenders call them: their names, backends, inputs and learned tensors, from the registry's rows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from flowformer.bench.registry import Function, Shape
from flowformer.bench.rows.variants import PLAIN, Variant, find_variant
from flowformer.core.backends import backends_of, choose
from flowformer.core.checks import HEADS, Layout
from flowformer.mechanisms import Mechanism, find_attention, list_attentions

STD = 0.1  # of learned tensors
SEED = 10  # of the first learned tensor; below it are those of q, k, v and the gradient

# ---------------------------------------------------------------------------------------------- names and backends


def mechanisms(first: str = "") -> list[Mechanism]:
    """All mechanisms, sorted by name but for the one that others are compared with."""
    return [find_attention(name) for name in sorted(list_attentions(), key=lambda name: (name != first, name))]


def has_heads(layout: Layout) -> bool:
    """Whether q, k and v have an axis of heads; otherwise heads lie side by side in their channels."""
    return layout.axes == HEADS.axes


def name_of(mechanism: Mechanism, variant: Variant = PLAIN) -> str:
    """What a mechanism is called among contenders."""
    return "-".join([mechanism.name.replace("_", "-"), *filter(None, [variant.name])])


def backends_to_time(function: Function) -> list[str]:
    """Names of the backends that an operation or step has, the preferred one first; none where it has no choice.

    Without those that run on request only.
    """
    names = [row.name for row in backends_of(function.__name__) if not row.by_request]
    return names if len(names) > 1 else []


def by_backend(name: str, function: Function) -> Iterator[tuple[str, str | None, str, str]]:
    """For each backend of an operation or step the contender's name, the backend, words for help and the device.

    Those that run on request only, which are for GPUs, come last.
    """
    for backend in backends_to_time(function):
        yield f"{name}-{backend}", backend, f", backend {backend}", ""
    if not backends_to_time(function):
        yield name, None, "", ""
    for row in backends_of(function.__name__):
        if row.by_request:
            yield f"{name}-{row.name}", row.name, f", backend {row.name}", "cuda"


def refusal(mechanism: Mechanism, backend: str | None, like: Tensor | None = None) -> str | None:
    """Why a backend cannot compute a mechanism's operation here, or ``None``."""
    try:
        choose(mechanism.operation.__name__, backend or "auto", like)
    except ValueError as error:
        return str(error)
    return None


def width_refusal(layout: Layout, key_channels: int, value_channels: int) -> str | None:
    """Why a layout does not allow such keys and values, or ``None``."""
    if has_heads(layout) or key_channels == value_channels:
        return None
    return "without an axis of heads values are as wide as keys: --channels and --value-channels must be equal"


# -------------------------------------------------------------------------------------------------------------- inputs


def random_tensor(size: tuple[int, ...], seed: int, dtype: torch.dtype, layout: str = "length-first") -> Tensor:
    """N(0, 1) numbers, but for rounding the same for every dtype and layout."""
    tensor = torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "heads-first":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    return tensor


def draw_learned(
    variant: Variant, length: int, heads: int, channels: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> tuple[Any, ...]:
    """What an operation takes after v, N(0, STD^2), for sequences of up to ``length`` tokens; drawn on the CPU."""
    seeds = itertools.count(SEED)
    count = heads * channels if variant.per_channel else heads
    of_keys = (channels,) if variant.by_channels else ()

    def draw(*sizes: int) -> Tensor:
        return (STD * random_tensor(sizes, next(seeds), dtype)).to(device)

    return variant.learned(draw, length, count, *of_keys)


def learned_bytes(variant: Variant, shape: Shape) -> float:
    """Bytes of float32 of what :func:`draw_learned` makes."""
    heads = shape.width if variant.per_channel else shape.heads
    of_keys = (shape.channels,) if variant.by_channels else ()
    made = variant.learned(lambda *size: torch.empty(size, device="meta"), shape.length, heads, *of_keys)
    return 4.0 * sum(tensor.numel() for tensor in tree_leaves(made) if tensor is not None)


def cache_bytes(shape: Shape) -> float:
    """Bytes of the float32 keys and values of a whole context."""
    return 4.0 * shape.batch * shape.length * shape.heads * (shape.channels + shape.value_channels)


def count_bytes(state: Any) -> int:
    """Bytes of the tensors of a state."""
    return sum(leaf.numel() * leaf.element_size() for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


class Sequences:
    """Inputs of a point on whole sequences, drawn on the CPU.

    Attributes:
        q: (batch, length, heads, K).
        k: (batch, length, heads, K).
        v: (batch, length, heads, V).
    """

    def __init__(self, shape: Shape, dtype: torch.dtype, layout: str = "length-first") -> None:
        self._shape, self._dtype, self._layout = shape, dtype, layout
        self.q, self.k, self.v = self._draw(shape.channels, 0), self._draw(shape.channels, 1), self._draw_value(2)
        self._learned: dict[Any, tuple[Any, ...]] = {}
        self._host: Sequences | None = None  # what these are a copy of, on another device

    def to(self, device: torch.device | str) -> Sequences:
        """The same numbers on a device, in memory of their own."""
        moved = copy.copy(self)
        moved.__dict__.pop("upstream", None)
        moved.q, moved.k, moved.v = (tensor.to(device) for tensor in (self.q, self.k, self.v))
        moved._learned, moved._host = {}, self
        return moved

    @cached_property
    def upstream(self) -> Tensor:
        """The gradient of the output, shaped like v."""
        return self._draw_value(3) if self._host is None else self._host.upstream.to(self.v.device)

    def learned(self, variant: Variant) -> tuple[Any, ...]:
        """What the operation takes after v, made once for all contenders that take the same."""
        key, shape = (variant.learned, variant.per_channel), self._shape
        if key not in self._learned:
            if self._host is None:
                drawn = draw_learned(variant, shape.length, shape.heads, shape.channels, self._dtype)
            else:
                drawn = tree_map(
                    lambda leaf: None if leaf is None else leaf.to(self.v.device), self._host.learned(variant)
                )
            self._learned[key] = drawn
        return self._learned[key]

    def _draw(self, channels: int, seed: int) -> Tensor:
        shape = self._shape
        return random_tensor((shape.batch, shape.length, shape.heads, channels), seed, self._dtype, self._layout)

    def _draw_value(self, seed: int) -> Tensor:
        return self._draw(self._shape.value_channels, seed)


# --------------------------------------------------------------------------------------------------------------- forms


@dataclass(frozen=True)
class Form:
    """A function of q, k, v and learned tensors, with what it is to be given: an operation, its truth, or a peer.

    Attributes:
        function: ``function(q, k, v, *learned, causal=..., **options)``.
        layout: The axes of q, k and v.
        variant: Options and learned tensors.
    """

    function: Function
    layout: Layout = HEADS
    variant: Variant = PLAIN

    def arrange(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v (..., heads, channels) in the axes that the function takes."""
        if has_heads(self.layout):
            return q, k, v
        one_key = self.layout.heads and not self.variant.per_channel
        return q.flatten(-2), k[..., 0].contiguous() if one_key else k.flatten(-2), v.flatten(-2)

    def prepare(self, given: Sequences) -> tuple[Function, tuple[Tensor, ...]]:
        """A function of tensors and ``causal``, and the tensors: q, k, v and what is learned, but for integers."""
        tensors, learned = self.arrange(given.q, given.k, given.v), given.learned(self.variant)
        if not learned and not self.variant.options:
            return self.function, tensors
        leaves, structure = tree_flatten(learned)
        floating = [leaf is not None and leaf.is_floating_point() for leaf in leaves]

        def run(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor, causal: bool) -> Any:
            each = iter(rest)
            filled = [next(each) if given else leaf for given, leaf in zip(floating, leaves, strict=True)]
            learned = tree_unflatten(filled, structure)
            return self.function(q, k, v, *learned, causal=causal, **self.variant.options)

        return run, (*tensors, *(leaf for given, leaf in zip(floating, leaves, strict=True) if given))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
        """The output for q, k, v (batch, length, heads, channels), shaped like v."""
        length, heads, channels = q.shape[1:]
        learned = draw_learned(self.variant, length, heads, channels, q.dtype, q.device)
        return self.function(*self.arrange(q, k, v), *learned, causal=causal, **self.variant.options).view_as(v)


def as_form(function: Form | Function, layout: Layout = HEADS) -> Form:
    """A form as it is; a plain function as the form that gives it q, k and v alone."""
    return function if isinstance(function, Form) else Form(function, layout)


def truth_of(mechanism: str, variant: str = "") -> Form:
    """What contenders that compute a mechanism have to equal."""
    row = find_attention(mechanism)
    return Form(row.truth, row.layout, find_variant(mechanism, variant))
