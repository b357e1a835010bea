"""What the tests of the native kernels share: inputs, and how two results are compared."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from flowformer import ops
from flowformer.kernels.native import build, compiler
from flowformer.kernels.native.kernels import kernels

_CANNOT = build._switched_off() or sys.platform == "win32" or compiler.find_compiler() is None
ABSENT = build.why_not() if _CANNOT and kernels() is None else ""
needs_kernels = pytest.mark.skipif(bool(ABSENT), reason=f"there are no native kernels: {ABSENT}")

both_forms = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
competitions = pytest.mark.parametrize("competition", ["sequence", "heads", None])


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def inputs(
    length: int, sources: int | None = None, *, batch: int = 2, heads: int = 2, keys: int = 8, values: int = 8
) -> list[Tensor]:
    sources = length if sources is None else sources
    sizes = ((length, keys), (sources, keys), (sources, values))
    return [random(batch, n, heads, channels, seed=i) for i, (n, channels) in enumerate(sizes)]


native = functools.partial(ops.flow_attention, backend="native")


def exact(*tensors: Tensor, **arguments: Any) -> Any:
    """Plain PyTorch in float64."""
    return ops.flow_attention(*(t.double() for t in tensors), backend="torch", **arguments)


def with_gradients(function: Callable[..., Tensor], *tensors: Tensor) -> list[Tensor]:
    """The output, and the gradients of a fixed random combination of it."""
    leaves = [t.detach().requires_grad_() for t in tensors]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, random(*out.shape).to(out))]


def with_states(function: Callable[..., Any], *tensors: Tensor, state: ops.FlowState) -> list[Tensor]:
    """The same of the causal form, its final state and the gradients of its initial state with it."""
    parts = [part.detach().requires_grad_() for part in state[1:]]
    leaves = [*(t.detach().requires_grad_() for t in tensors), *parts]
    out, after = function(
        *leaves[:3], causal=True, initial_state=ops.FlowState(state.tokens, *leaves[3:]), return_state=True
    )
    outputs = [out, *after[1:]]
    # Next to the size of each, lest the largest drown the others.
    upstream = [random(*o.shape, seed=1).to(o) / o.detach().abs().max() for o in outputs]
    return [*(o.detach() for o in outputs), *torch.autograd.grad(outputs, leaves, upstream)]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    """Differ by no more than ``tolerance`` of the largest element; NaN is never close."""
    assert got.shape == want.shape
    error, size = (got.double() - want.double()).abs().max(), want.double().abs().max()
    assert error <= tolerance * size, f"off by {error:.3g}, {error / size:.3g} of the largest"


def all_close(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(got, want, strict=True):
        close(one, other, tolerance)


def heads_first(x: Tensor) -> Tensor:
    """The same numbers, but (batch, heads, length, channels) in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def in_a_larger(x: Tensor) -> Tensor:
    larger = x.new_full([n + 3 for n in x.shape], torch.nan)
    view = larger[1:-2, 2:-1, 1:-2, 2:-1]
    return view.copy_(x)


def every_other(x: Tensor) -> Tensor:
    return torch.stack([x, torch.full_like(x, torch.nan)], -1).flatten(-2)[..., ::2]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "heads first": heads_first,
    "batch last": lambda x: x.movedim(0, 2).contiguous().movedim(2, 0),
    "part of a larger": in_a_larger,
    "channels apart": every_other,
    "channels first": lambda x: x.movedim(-1, 1).contiguous().movedim(1, -1),
    "first of the batch for all": lambda x: x[:1].expand_as(x),
    "first token for all": lambda x: x[:, :1].expand_as(x),
    "first head for all": lambda x: x[:, :, :1].expand_as(x),
    "first channel for all": lambda x: x[..., :1].expand_as(x),
    "one number": lambda x: x[:1, :1, :1, :1].expand_as(x),
}


class Recorder(TorchDispatchMode):
    """Names of this package's operators, in the order in which they run."""

    def __init__(self) -> None:
        super().__init__()
        self.ran: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "flowformer":
            self.ran.append(func._schema.name.removeprefix("flowformer::"))
        return func(*args, **(kwargs or {}))


class Graphs:
    """A compiler that keeps the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.kept: list[torch.fx.GraphModule] = []
        self.backend = aot_autograd(fw_compiler=self.keep, bw_compiler=self.keep)

    def keep(self, graph: torch.fx.GraphModule, example: Any) -> Any:
        self.kept.append(graph)
        return make_boxed_func(graph.forward)

    def operators(self) -> list[list[str]]:
        return [
            [str(node.target) for node in graph.graph.nodes if str(node.target).startswith("flowformer")]
            for graph in self.kept
        ]


def run_python(code: str, *arguments: object, timeout_s: float = 300, **environment: str) -> str:
    """What it prints; it has to end well."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, (
        f"exit {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[:4000]}\n{done.stderr[-4000:]}"
    )
    return done.stdout
