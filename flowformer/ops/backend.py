"""Which implementation of an operation runs, and why."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from flowformer.ops.masking import check, sum_dtype

ENVIRONMENT_VARIABLE = "FLOWFORMER_BACKEND"
BACKENDS = ("torch",)


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


def choose(op: str, backend: str = "auto") -> tuple[str, str]:
    """Pick the implementation of an operation.

    Args:
        op: Name of the operation, for messages.
        backend: ``"auto"`` or one of :data:`BACKENDS`. With ``"auto"`` the environment variable
            ``FLOWFORMER_BACKEND`` decides where it is set.

    Returns:
        The backend's name and the reason in words.

    Raises:
        ValueError: for a backend that does not exist.
    """
    source = "asked for by the backend argument"
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        source = f"asked for by {ENVIRONMENT_VARIABLE}"
    if backend == "auto":
        return "torch", "plain PyTorch runs on every device and is the only implementation there is"
    if backend not in BACKENDS:
        raise ValueError(f"{op}: no backend {backend!r} ({source}); there is {', '.join(('auto', *BACKENDS))}")
    return backend, source


def explain(
    op: str | Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    backend: str = "auto",
    **arguments: Tensor | None,
) -> Explanation:
    """Which implementation an operation would run for these arguments, and why; nothing is computed.

    Args:
        op: The operation or its name, for example ``"flow_attention"``.
        q: Queries (batch, L, heads, K).
        k: Keys (batch, S, heads, K).
        v: Values (batch, S, heads, V).
        causal: As the operation takes it.
        backend: As the operation takes it.
        **arguments: ``key_padding_mask``, ``query_padding_mask`` or ``cu_seqlens``, as the operation takes them.

    Raises:
        TypeError, ValueError: what the operation itself would raise for these arguments.
    """
    name = op if isinstance(op, str) else op.__name__
    check(name, q, k, v, causal=causal, **arguments)
    chosen, why = choose(name, backend)
    return Explanation(name, chosen, str(sum_dtype(q.dtype)).removeprefix("torch."), why)
