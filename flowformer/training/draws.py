"""Random numbers of one training, apart from PyTorch's global generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode

# Functions that draw numbers and take a generator. Those of torch.nn.init are here since within a function that is
# called from a mode, the mode is off.
_DRAWING = {
    *(getattr(Tensor, f"{name}_") for name in ("uniform", "normal", "bernoulli", "random", "exponential")),
    init.uniform_, init.normal_, init.trunc_normal_, init.xavier_uniform_, init.xavier_normal_, init.kaiming_uniform_,
    init.kaiming_normal_, init.orthogonal_,
    torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial,
}  # fmt: skip


class Draws(TorchFunctionMode):
    """Within ``with``, and in this thread only, random numbers are drawn from generators of its own.

    The global generators of PyTorch are neither read nor changed, so that several models can be trained at once in
    threads, each as if it were alone. On a CPU the numbers are those that PyTorch's generator gives after
    ``torch.manual_seed`` with the same seed.

    Args:
        seed: Of the generators, one on each device that numbers are drawn on.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()

    def seed(self, seed: int) -> None:
        """Start anew from another seed."""
        self._seed = seed
        self._generators.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of PyTorch, with a generator if it draws numbers."""
        kwargs = kwargs or {}
        if func is functional.dropout:
            return self._drop(*args, **kwargs)
        if func in _DRAWING and kwargs.get("generator") is None:
            first = next((one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)), None)
            device = kwargs.get("device") or torch.get_default_device() if first is None else first.device
            if torch.device(device).type != "meta":
                kwargs = {**kwargs, "generator": self._generator(torch.device(device))}
        return func(*args, **kwargs)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    def _drop(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        """Dropout as PyTorch computes it on a CPU; the function itself takes no generator."""
        if not training or not p:
            return functional.dropout(x, p, training, inplace)
        kept = torch.empty_like(x).bernoulli_(1 - p, generator=self._generator(x.device))
        kept = kept.div_(1 - p) if p < 1 else kept
        return x.mul_(kept) if inplace else x * kept
