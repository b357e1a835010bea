"""What an operation and a contender are, and the one place where all of them stand."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flowformer.common.names import nearest
from flowformer.core.backends import list_backends
from flowformer.mechanisms import find_attention, list_attentions

Function = Callable[..., Any]
Inputs = tuple[Any, ...]
Outputs = tuple[Tensor, ...]

# The float64 truth of each operation, and the names of backends.
reference = SimpleNamespace(
    **{find_attention(name).operation.__name__: find_attention(name).truth for name in list_attentions()}
)
BACKENDS = tuple(row.name for row in list_backends())

# Largest error of a row relative to that row; see check.error_of. The sums of bfloat16 and float16 are float32, and
# what remains is the rounding of outputs, and of softmax's weights in peers.
TOLERANCES = MappingProxyType(
    {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2},
)


@dataclass(frozen=True)
class Shape:
    """Sizes of the inputs of one point.

    Attributes:
        length: Tokens of a sequence; for a decoding step, the tokens before it.
        batch: Sequences.
        heads: Heads.
        channels: Channels of a query or key of one head, K.
        value_channels: Channels of a value of one head, V.
    """

    length: int
    batch: int = 1
    heads: int = 8
    channels: int = 64
    value_channels: int = 64

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Call:
    """What is timed.

    Attributes:
        run: Called without arguments; returns the outputs that are checked.
        state_bytes: Bytes of the state that a step starts from, where there is one.
    """

    run: Callable[[], Outputs]
    state_bytes: int | None = None


@dataclass(frozen=True)
class Operation:
    """A thing to be computed, whoever computes it.

    Attributes:
        name: The name it is called by.
        about: One line for help and figures.
        axis: What the length of a shape is: ``"length"`` or ``"context"``.
        lengths: Lengths measured where none are given.
        inputs: ``(shape, dtype, layout) -> inputs``: the same random numbers whatever the dtype and layout.
        bind: ``(function, inputs) -> Call``: what is done beforehand and what is timed.
        truth: ``(reference, inputs) -> outputs`` in float64.
        flops: ``shape -> `` floating-point operations of our way to compute it; ``None`` where that says nothing.
        tokens: ``shape -> `` tokens that one call computes, or whatever ``unit`` says, for bytes per token and rates.
        check_length: The longest length at which the truth is computed; longer points are checked at this one.
        tolerances: Largest error allowed, by dtype.
        measure_memory: Whether a point's peak memory is measured, in a fresh process.
        show_rate: Whether tables say how many tokens a second a contender computes.
        unit: What ``tokens`` counts.
        extent: What lengths count, for figures.
    """

    name: str
    about: str
    axis: str
    lengths: tuple[int, ...]
    inputs: Callable[[Shape, torch.dtype, str], Inputs]
    bind: Callable[[Function, Inputs], Call]
    truth: Callable[[Function, Inputs], Outputs]
    flops: Callable[[Shape], float] | None
    tokens: Callable[[Shape], int]
    check_length: int = 1024
    tolerances: Mapping[torch.dtype, float] = field(default_factory=lambda: TOLERANCES)
    measure_memory: bool = True
    show_rate: bool = False
    unit: str = "token"
    extent: str = "tokens"


@dataclass(frozen=True)
class Contender:
    """One way to compute an operation.

    Attributes:
        name: The name it is called by.
        operation: Name of the operation.
        function: What the operation's ``bind`` is given.
        reference: What the operation's ``truth`` is given; ``None`` where there is none, and only finite values are
            asked.
        about: One line for help.
        unchecked: Why there is no reference, where there is none.
        ours: Whether it is this library's own.
        dtype: dtype of the inputs.
        layout: ``"length-first"`` for contiguous (batch, length, heads, channels), ``"heads-first"`` for the same shape
            as a view of contiguous (batch, heads, length, channels).
        flops: As in :class:`Operation`; that of the operation is meant for ``ours`` only.
        unavailable: ``inputs -> `` reason why it cannot run here, or ``None``.
        needs_bytes: ``shape -> `` bytes above the inputs, estimated, for those that need much.
    """

    name: str
    operation: str
    function: Function
    reference: Function | None
    about: str
    unchecked: str = "approximation"
    ours: bool = False
    dtype: torch.dtype = torch.float32
    layout: str = "length-first"
    flops: Callable[[Shape], float] | None = None
    unavailable: Callable[[Inputs], str | None] = lambda inputs: None
    needs_bytes: Callable[[Shape], float] = lambda shape: 0.0


OPERATIONS: dict[str, Operation] = {}
CONTENDERS: dict[tuple[str, str], Contender] = {}
# The rows; importing a module adds its own. Figures show contenders in this order, and ratios are to the first.
MODULES = (
    "flowformer.bench.operations",
    "flowformer.bench.contenders",
    "flowformer.bench.peers",
    "flowformer.bench.aft",
    "flowformer.bench.aft_peers",
    "flowformer.bench.aft_steps",
    "flowformer.bench.language",
    "flowformer.bench.vision",
)


def add_operation(row: Operation) -> None:
    """Enter an operation; one of the same name is replaced."""
    OPERATIONS[row.name] = row


def add_contender(row: Contender) -> None:
    """Enter a contender; one of the same name and operation is replaced."""
    if row.operation not in OPERATIONS:
        raise ValueError(f"contender {row.name}: {_unknown('operation', row.operation, OPERATIONS)}")
    CONTENDERS[row.operation, row.name] = row


def load(modules: Iterable[str] = ()) -> None:
    """Import the rows of this package, then of further modules.

    Raises:
        ValueError: for a module that is not there.
    """
    for module in MODULES:
        importlib.import_module(module)
    for module in modules:
        if importlib.util.find_spec(module.split(".")[0]) is None:
            raise ValueError(f"no module {module!r} to import contenders from")
        importlib.import_module(module)


def find_operations(names: Iterable[str] = ()) -> list[Operation]:
    """Operations by name; all of them where no name is given.

    Raises:
        ValueError: for an unknown name; the message suggests the nearest.
    """
    names = list(names) or list(OPERATIONS)
    for name in names:
        if name not in OPERATIONS:
            raise ValueError(_unknown("operation", name, OPERATIONS))
    return [OPERATIONS[name] for name in names]


def find_contenders(operations: Iterable[Operation], names: Iterable[str] = ()) -> list[Contender]:
    """Contenders of some operations, those of ``names`` only where names are given, in that order.

    Raises:
        ValueError: for a name that none of the operations has; the message suggests the nearest.
    """
    chosen = [row.name for row in operations]
    names = list(names)
    known = dict.fromkeys(name for operation, name in CONTENDERS if operation in chosen)
    for name in names:
        if name not in known:
            raise ValueError(_unknown("contender", name, known))
    rows = [row for row in CONTENDERS.values() if row.operation in chosen and (not names or row.name in names)]
    return sorted(rows, key=lambda row: (chosen.index(row.operation), names.index(row.name) if names else 0))


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    return f"no {kind} {name!r}{nearest(name, known)}; there is {', '.join(known)}"
