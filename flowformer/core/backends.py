"""Which implementation of an operation runs, and why.

A backend is a package in :mod:`flowformer.kernels` whose module ``backend`` holds one row, ``BACKEND``; plain PyTorch
is the last row. A mechanism offers its function for a backend with :func:`implements`, in a file of its room that is
named after the backend.
"""

from __future__ import annotations

import functools
import importlib
import os
import pkgutil
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowformer import kernels
from flowformer.core.precision import FLOAT_DTYPES, sum_dtype

ENVIRONMENT_VARIABLE = "FLOWFORMER_BACKEND"


@dataclass(frozen=True)
class Backend:
    """One way to compute operations.

    Attributes:
        name: What ``backend=`` and ``FLOWFORMER_BACKEND`` call it.
        about: What it is, in a few words.
        dtypes: What it computes; first the one that laws are checked in where they name none.
        refuses: ``(device type, dtype) -> `` why it cannot compute tensors of these; empty where it can.
        describe: What runs here, in words; called where ``refuses`` is empty.
        device: The type of device that its laws are checked on.
        rank: Backends are tried in ascending order.
    """

    name: str
    about: str
    dtypes: tuple[torch.dtype, ...]
    refuses: Callable[[str, torch.dtype], str]
    describe: Callable[[], str]
    device: str = "cpu"
    rank: int = 0


TORCH = Backend(
    "torch", "plain PyTorch", (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    lambda device, dtype: "", lambda: "plain PyTorch", rank=1_000,
)  # fmt: skip


@functools.cache
def list_backends() -> tuple[Backend, ...]:
    """All backends, the preferred one first, plain PyTorch last."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__)]
    rows = [importlib.import_module(f"{kernels.__name__}.{name}.backend").BACKEND for name in names]
    return tuple(sorted([*rows, TORCH], key=lambda row: row.rank))


def find_backend(name: str) -> Backend:
    """The row of a backend.

    Raises:
        ValueError: for an unknown name.
    """
    for row in list_backends():
        if row.name == name:
            return row
    raise ValueError(f"no backend {name!r}; there is {', '.join(row.name for row in list_backends())}")


_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def implements(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Enter a function as a backend's implementation of an operation: what :func:`flowformer.core.run.run` calls."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _IMPLEMENTATIONS.setdefault(op, {})[backend] = function
        return function

    return enter


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """The function that a backend has for an operation; KeyError where it has none."""
    return _IMPLEMENTATIONS[op][backend]


def backends_of(op: str) -> list[Backend]:
    """The backends that have an operation, whether or not they run here; the preferred one first."""
    return [row for row in list_backends() if row is TORCH or row.name in _IMPLEMENTATIONS.get(op, ())]


@dataclass(frozen=True)
class Explanation:
    """Which implementation would run.

    Attributes:
        op: The operation asked about.
        backend: Name of the implementation.
        sums: dtype in which the operation computes.
        why: One sentence.
    """

    op: str
    backend: str
    sums: str
    why: str

    def __str__(self) -> str:
        return f"{self.op}: {self.backend}, sums in {self.sums}: {self.why}"


def choose(op: str, backend: str = "auto", like: Tensor | None = None) -> str:
    """The name of the backend that runs an operation; arguments and errors as :func:`choose_and_say_why`."""
    return _decide(op, backend, like)[0]


def choose_and_say_why(op: str, backend: str = "auto", like: Tensor | None = None) -> tuple[str, str]:
    """Pick the backend of an operation.

    Args:
        op: Name of the operation.
        backend: ``"auto"`` or the name of one of :func:`list_backends`. With ``"auto"`` the environment variable
            ``FLOWFORMER_BACKEND`` decides where it is set.
        like: One of the inputs: its device and dtype count. A float32 tensor on the CPU if absent.

    Returns:
        The backend's name and the reason in words.

    Raises:
        ValueError: for a backend that does not exist, or cannot compute these inputs.
    """
    chosen, why = _decide(op, backend, like)
    return chosen, why or find_backend(chosen).describe()


def _decide(op: str, backend: str, like: Tensor | None) -> tuple[str, str]:
    device, dtype = ("cpu", torch.float32) if like is None else (like.device.type, like.dtype)
    chosen, why = _choose(op, backend, device, dtype, torch.compiler.is_exporting(), is_transformed())
    if not torch.compiler.is_compiling() and _asking.now:
        raise _OnlyAskedError(op, like, chosen, why)
    return chosen, why


def is_transformed() -> bool:
    """Whether torch.func, or forward-mode differentiation, is active: they need plain operations of PyTorch."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@torch.compiler.assume_constant_result
def _choose(
    op: str, backend: str, device: str, dtype: torch.dtype, exporting: bool, transformed: bool
) -> tuple[str, str]:
    source = "asked for by the backend argument"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        source = f"asked for by {ENVIRONMENT_VARIABLE}"
    names = ["auto", *(row.name for row in list_backends())]
    if backend not in names:
        raise ValueError(f"{op}: no backend {backend!r} ({source}); there is {', '.join(names)}")
    if backend == TORCH.name:
        return backend, source
    reasons = []
    for row in list_backends():
        if row is TORCH or backend not in ("auto", row.name):
            continue
        reason = _refusal(op, row, device, dtype, exporting, transformed)
        if not reason:
            return row.name, ""  # described where somebody asks
        reasons.append(reason)
    if backend != "auto":
        raise ValueError(f"{op}: backend {backend!r} ({source}) cannot run here: {reasons[0]}")
    return TORCH.name, f"plain PyTorch, since {', and '.join(reasons)}"


def _refusal(op: str, row: Backend, device: str, dtype: torch.dtype, exporting: bool, transformed: bool) -> str:
    """Why a backend does not compute an operation; empty where it does."""
    if row.name not in _IMPLEMENTATIONS.get(op, ()):
        return f"{op} has no {row.name} kernels"
    reason = row.refuses(device, dtype) if dtype in FLOAT_DTYPES else f"{dtype} is no floating dtype"
    if reason:
        return reason
    if exporting:
        return "an exported graph has to run where this package is not installed"
    if transformed:
        return f"the {row.name} kernels support no torch.func transforms and no forward-mode differentiation"
    return ""


class _OnlyAskedError(Exception):
    """Leaves an operation that is only asked which backend it chooses."""

    def __init__(self, op: str, like: Tensor | None, backend: str, why: str) -> None:
        super().__init__(op)
        dtype = sum_dtype(torch.float32 if like is None else like.dtype)
        self.explanation = Explanation(
            op, backend, str(dtype).removeprefix("torch."), why or find_backend(backend).describe()
        )


class _Asking(threading.local):
    now = False


_asking = _Asking()


def explain(operation: Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Which implementation an operation would run for these arguments, and why; nothing is computed.

    The operation is called, checks its arguments, and is left as soon as it has chosen.

    Args:
        operation: The operation, for example :func:`flowformer.ops.flow_attention`.
        *arguments: As the operation takes them: q, k, v, and position bias or filters where it takes them.
        **options: Likewise.

    Raises:
        TypeError, ValueError: what the operation itself would raise for these arguments; ValueError for an operation
            that has one implementation only.
    """
    before, _asking.now = _asking.now, True
    try:
        operation(*arguments, **options)
    except _OnlyAskedError as answer:
        return answer.explanation
    finally:
        _asking.now = before
    raise ValueError(f"{operation.__name__} has one implementation, in plain PyTorch")
