"""Working memory of the Triton kernels: that of PyTorch's tensors beside them, counted without running any.

A unit is a tensor of the size of q: forward at most one above what is returned, backward at most three.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flowformer import ops
from flowformer.kernels.triton import launch, linear, parts
from flowformer.mechanisms.aft.triton import CHUNK, walk
from flowformer.mechanisms.flow.equations import Learned
from flowformer.mechanisms.flow.options import PRESETS
from flowformer.mechanisms.flow.triton import bidirectional, causal, decayed
from flowformer.mechanisms.flow.triton.setting import Flows

LENGTH, HEADS = 4096, 4  # longer than the state, whose size is no function of length


def storages(*tensors: Any) -> dict[int, int]:
    """Bytes of storages, by their addresses."""
    found = (t.untyped_storage() for t in tree_leaves(tensors) if isinstance(t, Tensor))
    return {storage.data_ptr(): storage.nbytes() for storage in found}


class Memory(TorchDispatchMode):
    """The most bytes of tensors that have come to be and are alive; not of those given."""

    def __init__(self, *given: Any) -> None:
        super().__init__()
        self.given, self.alive, self.peak = storages(*given), {}, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.left()
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self.given:
                storage = tensor.untyped_storage()
                self.alive[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.left())
        return out

    def left(self) -> int:
        """Bytes of those that are alive now."""
        self.alive = {address: one for address, one in self.alive.items() if not one[0].expired()}
        return sum(size for _, size in self.alive.values())


Passes = tuple[Callable[[], Any], Callable[[Any], Any], Sequence[Any]]  # forward; backward, of its result; inputs


def flow(preset: str, is_causal: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Passes:
    options, numbers = PRESETS[preset].values(), torch.ones(HEADS, LENGTH)
    learned = Learned(-torch.rand(1, LENGTH, HEADS) if preset == "distance" else None)
    of_decay = learned.log_decay is not None
    state = ops.init_flow_state(1, HEADS, q.shape[-1], v.shape[-1])
    given, flows, nothing = (q, k, v, g, learned, numbers, state), Flows(*[numbers] * 4), [None] * 4
    if is_causal:
        return (
            lambda: causal.forward(q, k, v, None, learned, state, options),
            lambda _: causal.backward(q, k, v, None, learned, state, options, v, flows, g, nothing, of_decay),
            given,
        )
    form, flat = decayed if of_decay else bidirectional, numbers.expand(4, -1, -1).flatten()
    return (
        lambda: form.forward(q, k, v, None, None, learned, options),
        lambda _: form.backward(q, k, v, None, None, learned, options, v, flat, g, of_decay),
        (*given, flat),
    )


def linearly(decays: bool, is_causal: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Passes:
    log_decay = -torch.rand(1, LENGTH, HEADS) if decays else None
    inputs = linear.Inputs(q, k, v, None, None, log_decay, None, None, 2, 1e-6)
    keys, memory = torch.zeros(1, HEADS, q.shape[-1]).double(), torch.zeros(1, HEADS, q.shape[-1], v.shape[-1]).double()
    state, totals = linear.State(keys, memory) if is_causal else None, torch.ones(HEADS, LENGTH)
    return (
        lambda: linear.forward(inputs, state, is_causal),
        lambda _: linear.backward(inputs, state, is_causal, v, totals, linear.OfResults(g), None, decays),
        (inputs, g, state, totals),
    )


def aft(is_causal: bool, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Passes:
    q, k, v, g = (t.flatten(2) for t in (q, k, v, g))
    form, ones = walk.Form(k, v, None, CHUNK), torch.ones(1, k.shape[2]).double()
    given = (q, k, v, g, ones)
    if is_causal:
        return (
            lambda: walk.causal_forward(form, q, None, None),
            lambda found: walk.causal_backward(form, q, found[3], g, None, None),
            given,
        )
    return lambda: form.sum(None, None), lambda found: walk.means_backward(form, found[0], ones, ones), given


MECHANISMS: dict[str, Callable[..., Passes]] = {
    **{f"flow-{preset}": lambda *given, preset=preset: flow(preset, *given) for preset in ("core", "lra", "distance")},
    "linear": lambda *given: linearly(False, *given),
    "linear-decay": lambda *given: linearly(True, *given),
    "aft_simple": aft,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [128, *(pytest.param(c, marks=pytest.mark.slow) for c in (64, 256))])
@pytest.mark.parametrize("is_causal", [False, True], ids=["bidirectional", "causal"])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_working_memory(
    mechanism: str, is_causal: bool, channels: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "run", lambda *_, **__: None)
    monkeypatch.setattr(parts, "SMALLEST", LENGTH * channels)
    tensors = [torch.randn(1, LENGTH, HEADS, channels).to(dtype) for _ in range(4)]
    unit = LENGTH * HEADS * channels * dtype.itemsize
    forward, backward, given = MECHANISMS[mechanism](is_causal, *tensors)
    with Memory(given) as memory:
        found = forward()
    assert memory.peak <= sum(storages(found[0]).values()) + unit
    assert memory.left() <= sum(storages(tuple(found)).values())
    with Memory(given, found) as memory:
        grads = backward(found)
    assert memory.peak <= sum(storages(tuple(grads)[:3]).values()) + 3 * unit
    assert memory.left() <= sum(storages(tuple(grads)).values())
