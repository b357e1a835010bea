"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flowformer.ops.masking import sum_dtype
from flowformer.ops.native import build, kernels

ENVIRONMENT_VARIABLE = "FLOWFORMER_BACKEND"
BACKENDS = ("native", "torch")
NATIVE_OPS = ("flow_attention", "flow_attention_step", "aft_simple")


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
    """The name of the implementation that is to run; arguments and errors as :func:`choose_and_say_why`."""
    return _decide(op, backend, like)[0]


def choose_and_say_why(op: str, backend: str = "auto", like: Tensor | None = None) -> tuple[str, str]:
    """Pick the implementation of an operation.

    Args:
        op: Name of the operation.
        backend: ``"auto"`` or one of :data:`BACKENDS`. With ``"auto"`` the environment variable
            ``FLOWFORMER_BACKEND`` decides where it is set.
        like: One of the inputs: its device and dtype count. A float32 tensor on the CPU if absent.

    Returns:
        The backend's name and the reason in words.

    Raises:
        ValueError: for a backend that does not exist, or cannot run what is asked for.
    """
    chosen, why = _decide(op, backend, like)
    return chosen, why or _describe_native()


def _decide(op: str, backend: str, like: Tensor | None) -> tuple[str, str]:
    device, dtype = ("cpu", torch.float32) if like is None else (like.device.type, like.dtype)
    chosen, why = _choose(op, backend, device, dtype, torch.compiler.is_exporting(), is_transformed())
    if not torch.compiler.is_compiling() and _asking.now:
        raise _OnlyAskedError(op, like, chosen, why)
    return chosen, why


def is_transformed() -> bool:
    """Whether torch.func, or forward-mode differentiation, is at work: it wants plain operations of PyTorch."""
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
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: no backend {backend!r} ({source}); there is {', '.join(('auto', *BACKENDS))}")
    if backend == "torch":
        return backend, source
    reason = _not_native(op, device, dtype, exporting, transformed)
    if not reason:
        return "native", ""  # described where somebody asks
    if backend == "native":
        raise ValueError(f"{op}: backend 'native' ({source}) cannot run here: {reason}")
    return "torch", f"plain PyTorch, since {reason}"


def _not_native(op: str, device: str, dtype: torch.dtype, exporting: bool, transformed: bool) -> str:
    """Why the native kernels cannot compute an operation; empty where they can."""
    if op not in NATIVE_OPS:
        return f"{op} has no native kernels"
    if device != "cpu":
        return f"the native kernels run on the CPU, and this is on {device}"
    if dtype not in kernels.DTYPES:
        name = str(dtype).removeprefix("torch.")
        return f"the native kernels compute float32 and bfloat16, and this is {name}"
    if exporting:
        return "what is exported has to run where this package is not"
    if transformed:
        return "the native kernels know no torch.func transforms and no forward-mode differentiation"
    return "" if kernels.kernels() else f"the native kernels do not run: {build.why_not()}"


def _describe_native() -> str:
    library, found = build.load(), kernels.kernels()
    assert library is not None  # asked before
    assert found is not None
    return f"C++ kernels for {found.level}, {library.how}, threads by {library.threads}"


class _OnlyAskedError(Exception):
    """Takes the choice out of an operation that is only asked for it."""

    def __init__(self, op: str, like: Tensor | None, backend: str, why: str) -> None:
        super().__init__(op)
        dtype = sum_dtype(torch.float32 if like is None else like.dtype)
        self.explanation = Explanation(op, backend, str(dtype).removeprefix("torch."), why or _describe_native())


class _Asking(threading.local):
    now = False


_asking = _Asking()


def explain(op: str | Callable[..., Any], *arguments: Any, **options: Any) -> Explanation:
    """Which implementation an operation would run for these arguments, and why; nothing is computed.

    The operation is called, checks what it is given, and is left as soon as it has chosen.

    Args:
        op: The operation or its name, for example ``"flow_attention"``.
        *arguments: As the operation takes them: q, k, v, and position bias or filters where it wants them.
        **options: Likewise.

    Raises:
        TypeError, ValueError: what the operation itself would raise for these arguments; ValueError for what has one
            implementation only.
    """
    function = _find(op) if isinstance(op, str) else op
    before, _asking.now = _asking.now, True
    try:
        function(*arguments, **options)
    except _OnlyAskedError as answer:
        return answer.explanation
    finally:
        _asking.now = before
    raise ValueError(f"{function.__name__} has one implementation, in plain PyTorch")


def _find(op: str) -> Callable[..., Any]:
    from flowformer import ops  # not above: its modules import this one

    if op not in ops.__all__ or not inspect.isfunction(getattr(ops, op)):
        raise ValueError(f"flowformer.ops has no operation {op!r}")
    return getattr(ops, op)
