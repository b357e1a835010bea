"""Where contenders run: inputs, times and memory on the CPU and on a CUDA GPU."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from flowformer.bench.memory import available_bytes
from flowformer.bench.registry import Inputs
from flowformer.bench.timing import time_call
from flowformer.common.errors import RunError

LEAST_CACHE = 2**28  # bytes that are written before a call on a GPU, or twice its L2 cache if that is more
ROTATION = 3  # inputs that calls on a GPU take by turns


def move(value: Any, place: torch.device) -> Any:
    """A value with its tensors on a device; whatever else has a method ``to`` moves itself."""
    return tree_map(lambda leaf: leaf.to(place) if hasattr(leaf, "to") else leaf, value)


class Device:
    """A type of device, and how a call is measured there. This one is the CPU.

    Attributes:
        name: The name that ``--device`` takes.
        compiles: Whether the first call of a contender may compile, and so says nothing about the others.
        checked_batch: The most sequences that are checked: the truth is computed on the CPU. ``None`` for all of them.
        limit_factor: What the side of the matrices of the limits is multiplied by.
    """

    name = "cpu"
    compiles = False
    checked_batch: int | None = None
    limit_factor = 1

    def __init__(self, place: torch.device | None = None) -> None:
        self.place = place or torch.device(self.name)

    def put(self, host: Any) -> Any:
        """Tensors, or inputs, that were made on the CPU, on this device."""
        return host

    def copies(self, host: Inputs) -> list[Inputs]:
        """The inputs that calls take by turns: equal numbers, in memory of their own."""
        return [self.put(host)]

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds that a call takes."""
        return time_call(call)

    def cost(self, call: Callable[[], Any]) -> float:
        """Seconds that it takes to time a call."""
        return self.seconds(call)

    def synchronize(self) -> None:
        """Wait until all that was asked for is done."""

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Peak memory of a call above what is held before it; ``None`` if that takes a process of its own."""
        return None

    def available_bytes(self) -> int | None:
        """Memory that can be had, where the system says so."""
        return available_bytes()

    def clear(self) -> None:
        """Give back what is held and not used."""

    def describe(self) -> dict[str, Any]:
        """What results say about the device, beside the machine."""
        return {}

    @contextmanager
    def session(self) -> Iterator[None]:
        """The settings under which all is measured."""
        yield


class Cuda(Device):
    """A CUDA GPU, the one that torch takes by itself.

    Args:
        place: Where tensors are; the GPU by default.
    """

    name = "cuda"
    compiles = True
    checked_batch = 2
    limit_factor = 4

    def put(self, host: Any) -> Any:
        """Tensors, or inputs, that were made on the CPU, on the GPU."""
        return move(host, self.place)

    def copies(self, host: Inputs) -> list[Inputs]:
        """:data:`ROTATION` of them; or one, if they would fill more than a quarter of the memory that is free."""
        before = torch.cuda.memory_allocated()
        first = self.put(host)
        size = torch.cuda.memory_allocated() - before
        more = ROTATION - 1 if size * (ROTATION - 1) <= self.available_bytes() // 4 else 0
        return [first, *(self.put(host) for _ in range(more))]

    @cached_property
    def _cache(self) -> Tensor:
        """What is written to push everything else out of the L2 cache."""
        l2 = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 0)
        return torch.empty(max(LEAST_CACHE, 2 * l2), dtype=torch.uint8, device=self.place)

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds between two events of the GPU, before and after the call, with the L2 cache flushed before it.

        The host asks for the call while the cache is written, so that short kernels need not wait for it.
        """
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.zero_()
        start.record()
        out = call()
        stop.record()
        self.synchronize()
        del out
        return start.elapsed_time(stop) / 1e3

    def cost(self, call: Callable[[], Any]) -> float:
        """Seconds that it takes to time a call, by the clock of the host: with the flush."""
        return time_call(lambda: self.seconds(call))

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def peak_bytes(self, call: Callable[[], Any]) -> int:
        """Peak of PyTorch's allocator in a call, above what is held before it. What it needed before is forgotten."""
        gc.collect()
        self.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = call()
        self.synchronize()
        del out
        return torch.cuda.max_memory_allocated() - before

    def available_bytes(self) -> int:
        """Memory of the GPU that nobody uses; what the allocator holds for reuse is free too."""
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()

    def clear(self) -> None:
        """Give back what the allocator holds for reuse."""
        gc.collect()
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """The card, and versions of what runs on it."""
        found = torch.cuda.get_device_properties()
        has_triton = importlib.util.find_spec("triton") is not None
        card = {
            "type": self.name, "name": found.name, "capability": f"{found.major}.{found.minor}",
            "memory_bytes": found.total_memory, "multiprocessors": found.multi_processor_count,
            "driver": driver_version(), "cuda": torch.version.cuda,
            "triton": importlib.metadata.version("triton") if has_triton else None,
            "torch": torch.__version__,
        }  # fmt: skip
        return {"device": card}

    @contextmanager
    def session(self) -> Iterator[None]:
        """float32 products and convolutions in float32: PyTorch's default for convolutions is TF32."""
        parts: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
        before = [part.allow_tf32 for part in parts]
        for part in parts:
            part.allow_tf32 = False
        try:
            yield
        finally:
            for part, value in zip(parts, before, strict=True):
                part.allow_tf32 = value
            self.__dict__.pop("_cache", None)
            self.clear()


def driver_version() -> str | None:
    """The version of NVIDIA's driver, where its ``nvidia-smi`` says it."""
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return None
    return said[0] if said else None


DEVICES: dict[str, type[Device]] = {kind.name: kind for kind in (Device, Cuda)}


def find_device(name: str) -> Device:
    """A device by name.

    Raises:
        RunError: where there is no such device.
    """
    if name == Cuda.name and not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        raise RunError(f"there is no CUDA device here: torch {torch.__version__}, {built}, finds none")
    return DEVICES[name]()
