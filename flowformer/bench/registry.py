"""What an operation and a contender are, and where all of them are found.

Nothing here knows what is timed: the modules of :mod:`flowformer.bench.rows` enter it, and :func:`load` imports them.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from flowformer.common.names import nearest

Function = Callable[..., Any]
Inputs = tuple[Any, ...]
Outputs = tuple[Tensor, ...]

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
        """Refuse sizes below 1."""
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    @property
    def width(self) -> int:
        """Channels of all heads, side by side."""
        return self.heads * self.channels


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
    """What is computed, by any contender.

    Attributes:
        name: The name it is called by.
        about: One line for help and figures.
        axis: What the length of a shape is: ``"length"`` or ``"context"``.
        lengths: Lengths measured by default.
        inputs: ``(shape, dtype, layout) -> inputs``: the same random numbers for every dtype and layout.
        bind: ``(function, inputs) -> Call``: prepares the call, and returns it.
        truth: ``(reference, inputs) -> outputs`` in float64.
        tokens: ``shape -> `` tokens that one call computes (or images: see ``unit``), for bytes per token and rates.
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
    bind: Callable[[Any, Inputs], Call]
    truth: Callable[[Any, Inputs], Outputs]
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
        reference: What the operation's ``truth`` is given; ``None`` where there is none, and results must only be
            finite. Contenders with equal references are compared with one truth, computed once.
        about: One line for help.
        unchecked: Why there is no reference, where there is none.
        ours: Whether it is an implementation of this library.
        tolerance: Largest error allowed, where a peer's own arithmetic is worse than its operation's tolerance.
        twin: Name of this library's contender that computes the same; tables show the ratio of times.
        dtype: dtype of the inputs, where the plan names none.
        dtypes: dtypes that it can be asked for; empty for all.
        device: The type of device that it is for; empty for all.
        layout: ``"length-first"`` for contiguous (batch, length, heads, channels), ``"heads-first"`` for the same shape
            as a view of contiguous (batch, heads, length, channels).
        flops: ``shape -> `` floating-point operations of one call; ``None`` where there is no formula.
        unavailable: ``inputs -> `` reason why it cannot run here, or ``None``.
        needs_bytes: ``shape -> `` bytes needed above the inputs, estimated where they are many.
    """

    name: str
    operation: str
    function: Any
    reference: Any
    about: str
    unchecked: str = "approximation"
    ours: bool = False
    tolerance: float | None = None
    twin: str = ""
    dtype: torch.dtype = torch.float32
    dtypes: tuple[torch.dtype, ...] = ()
    device: str = ""
    layout: str = "length-first"
    flops: Callable[[Shape], float] | None = None
    unavailable: Callable[[Inputs], str | None] = lambda inputs: None
    needs_bytes: Callable[[Shape], float] = lambda shape: 0.0


Source = Callable[[], Iterable[Contender]]

ROWS = "flowformer.bench.rows"  # the package whose modules enter operations and contenders
OPERATIONS: dict[str, Operation] = {}
SOURCES: list[Source] = []
ADDED: dict[tuple[str, str], Contender] = {}


def add_operation(row: Operation) -> None:
    """Enter an operation; one of the same name is replaced."""
    OPERATIONS[row.name] = row


def add_contender(row: Contender) -> None:
    """Enter a contender; one of the same name and operation is replaced."""
    if row.operation not in OPERATIONS:
        raise ValueError(f"contender {row.name}: {_unknown('operation', row.operation, OPERATIONS)}")
    ADDED[row.operation, row.name] = row


def add_contenders(source: Source) -> Source:
    """Enter a function that yields contenders.

    It is called whenever contenders are asked for, so what it yields may depend on another registry: a mechanism
    registered at any time is timed.
    """
    SOURCES.append(source)
    return source


def contenders() -> dict[tuple[str, str], Contender]:
    """All contenders by operation and name.

    Figures show them in this order, and ratios are to the first one: those of sources come before those added singly.

    Raises:
        ValueError: for a contender that a source yields and that was added singly too.
    """
    found = {(row.operation, row.name): row for source in SOURCES for row in source()}
    for operation, name in found.keys() & ADDED.keys():
        raise ValueError(f"two contenders of {operation!r} are called {name!r}: rename the one that is no mechanism")
    return found | ADDED


def load(modules: Iterable[str] = ()) -> None:
    """Import the rows of this package, then further modules.

    Raises:
        ValueError: for a module that is not there.
    """
    package = importlib.import_module(ROWS)
    for found in pkgutil.iter_modules(package.__path__, f"{ROWS}."):
        importlib.import_module(found.name)
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
    """Contenders of some operations; where names are given only those, in the order of the names.

    Raises:
        ValueError: for a name that none of the operations has; the message suggests the nearest.
    """
    chosen, names = [row.name for row in operations], list(names)
    rows = [row for row in contenders().values() if row.operation in chosen]
    known = dict.fromkeys(row.name for row in rows)
    for name in names:
        if name not in known:
            raise ValueError(_unknown("contender", name, known))
    rows = [row for row in rows if not names or row.name in names]
    return sorted(rows, key=lambda row: (chosen.index(row.operation), names.index(row.name) if names else 0))


def _unknown(kind: str, name: str, known: Iterable[str]) -> str:
    return f"no {kind} {name!r}{nearest(name, known)}; there is {', '.join(known)}"
