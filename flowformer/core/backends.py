"""Backends: the implementations of an operation, and how one of them is chosen.

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
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowformer import kernels
from flowformer.core.precision import FLOAT_DTYPES, sum_dtype
from flowformer.core.tracing import is_exporting, is_transformed

ENVIRONMENT_VARIABLE = "FLOWFORMER_BACKEND"


@dataclass(frozen=True)
class Backend:
    """A backend: one way to compute operations.

    Attributes:
        name: What ``backend=`` and ``FLOWFORMER_BACKEND`` call it.
        about: What it is, in a few words.
        dtypes: What it computes; first the one that laws are checked in where they name none.
        refuses: ``(device type, dtype) -> `` why it cannot compute tensors of these; empty where it can.
        describe: What runs here, in words; called where ``refuses`` is empty.
        device: The type of device that its laws are checked on.
        rank: Backends are tried in ascending order.
        longest: The longest sequence that its laws are checked on, where more would take too long; 0 for any length.
        by_request: Why it is chosen only where it is asked for by name; empty where it is chosen by itself.
    """

    name: str
    about: str
    dtypes: tuple[torch.dtype, ...]
    refuses: Callable[[str, torch.dtype], str]
    describe: Callable[[], str]
    device: str = "cpu"
    rank: int = 0
    longest: int = 0
    by_request: str = ""


TORCH = Backend(
    "torch", "plain PyTorch", (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    lambda device, dtype: "", lambda: "plain PyTorch", rank=1_000,
)  # fmt: skip


@functools.cache
def list_backends() -> tuple[Backend, ...]:
    """Return all backends, the preferred one first, plain PyTorch last."""
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__)]
    rows = [importlib.import_module(f"{kernels.__name__}.{name}.backend").BACKEND for name in names]
    return tuple(sorted([*rows, TORCH], key=lambda row: row.rank))


def find_backend(name: str) -> Backend:
    """Return a backend by name.

    Raises:
        ValueError: for an unknown name.
    """
    for row in list_backends():
        if row.name == name:
            return row
    raise ValueError(f"unknown backend {name!r}; available: {', '.join(row.name for row in list_backends())}")


_IMPLEMENTATIONS: dict[str, dict[str, Callable[..., Any]]] = {}


def implements(op: str, backend: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as a backend's implementation of an operation; :func:`flowformer.core.run.run` calls it."""

    def enter(function: Callable[..., Any]) -> Callable[..., Any]:
        _IMPLEMENTATIONS.setdefault(op, {})[backend] = function
        return function

    return enter


def implementation(op: str, backend: str) -> Callable[..., Any]:
    """Return a backend's implementation of an operation; raises KeyError if it has none."""
    return _IMPLEMENTATIONS[op][backend]


def backends_of(op: str) -> list[Backend]:
    """Return the backends that implement an operation, available here or not; the preferred one first."""
    return [row for row in list_backends() if row is TORCH or row.name in _IMPLEMENTATIONS.get(op, ())]


def adjacent(x: Tensor) -> Tensor:
    """Return the tensor with adjacent channels, as kernels read them: itself, or a contiguous copy."""
    return x if x.shape[-1] == 1 or x.stride(-1) == 1 else x.contiguous()


def refuse_second_gradients(kernels: str) -> None:
    """Raise RuntimeError if second-order gradients are requested of kernels."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"the {kernels} kernels do not support second-order gradients: omit create_graph=True, or, if attention is "
            "neither causal nor decays, pass backend='torch'"
        )


@dataclass(frozen=True)
class Explanation:
    """The implementation that would run, and the reason.

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


def choose(
    op: str, backend: str = "auto", like: Tensor | None = None, refusals: Mapping[str, str] | None = None, *,
    everywhere: bool = False,
) -> str:  # fmt: skip
    """Choose the backend of an operation; arguments and errors as in :func:`choose_and_say_why`.

    ``refusals`` are the reasons why backends cannot compute it with its options, by the name of the backend. With
    ``everywhere``, plain PyTorch is the choice where a backend has no kernels for it: so for one token, which is little
    work.
    """
    return _decide(op, backend, like, refusals, everywhere)[0]


def choose_and_say_why(op: str, backend: str = "auto", like: Tensor | None = None) -> tuple[str, str]:
    """Choose the backend of an operation, and report the reason.

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


def _decide(
    op: str,
    backend: str,
    like: Tensor | None,
    refusals: Mapping[str, str] | None = None,
    everywhere: bool = False,
) -> tuple[str, str]:
    device, dtype = ("cpu", torch.float32) if like is None else (like.device.type, like.dtype)
    reasons = tuple((refusals or {}).items())
    chosen, why = _choose(op, backend, device, dtype, is_exporting(), is_transformed(), reasons, everywhere)
    if not torch.compiler.is_compiling() and _asking.now:
        raise _OnlyAskedError(op, like, chosen, why)
    return chosen, why


@torch.compiler.assume_constant_result
def _choose(
    op: str,
    backend: str,
    device: str,
    dtype: torch.dtype,
    exporting: bool,
    transformed: bool,
    refusals: tuple[tuple[str, str], ...],
    everywhere: bool,
) -> tuple[str, str]:
    source = "requested by the backend argument"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        source = f"requested by {ENVIRONMENT_VARIABLE}"
    if backend != "auto" and backend not in (names := ["auto", *(row.name for row in list_backends())]):
        raise ValueError(f"{op}: unknown backend {backend!r} ({source}); available: {', '.join(names)}")
    if backend == TORCH.name:
        return backend, source
    reasons = []
    for row in list_backends():
        if row is TORCH or backend not in ("auto", row.name):
            continue
        reason = _refusal(op, row, device, dtype, exporting, transformed) or dict(refusals).get(row.name, "")
        if backend == "auto" and row.by_request:
            reasons += [] if reason else [row.by_request]
            continue
        if not reason:
            return row.name, ""  # the description is added on request
        reasons.append(reason)
    if backend != "auto" and not (everywhere and backend not in _IMPLEMENTATIONS.get(op, ())):
        raise ValueError(f"{op}: backend {backend!r} ({source}) cannot run here: {reasons[0]}")
    return TORCH.name, f"plain PyTorch, since {', and '.join(reasons)}"


def _refusal(op: str, row: Backend, device: str, dtype: torch.dtype, exporting: bool, transformed: bool) -> str:
    """Return why a backend cannot compute an operation; empty if it can."""
    if row.name not in _IMPLEMENTATIONS.get(op, ()):
        return f"{op} has no {row.name} kernels"
    reason = row.refuses(device, dtype) if dtype in FLOAT_DTYPES else f"{dtype} is not a floating-point dtype"
    if reason:
        return reason
    if exporting:
        return "an exported graph must run without this package"
    if transformed:
        return f"the {row.name} kernels do not support torch.func transforms and forward-mode differentiation"
    return ""


class _OnlyAskedError(Exception):
    """Leaves an operation as soon as it has chosen a backend: see :func:`explain`."""

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
    """Return which implementation would run for these arguments, and why, without computing anything.

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
    raise ValueError(f"{getattr(operation, '__name__', operation)} has only one implementation, in plain PyTorch")
