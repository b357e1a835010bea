"""What the rows of language and image models share: the attention of a model, its truth, and its backend."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from flowformer.bench.registry import Call, Inputs, Outputs, Shape
from flowformer.bench.rows.forms import refusal
from flowformer.core.backends import ENVIRONMENT_VARIABLE
from flowformer.mechanisms import Attention, Mechanism

M = TypeVar("M", bound=nn.Module)

CHANNELS_DIFFER = "a model's values are as wide as its keys: --channels and --value-channels must be equal"


def substitute(module: Any, **functions: Callable[..., Any]) -> None:
    """Give one attention module other functions of its mechanism: ``operation``, ``step``."""
    module.__dict__["mechanism"] = dataclasses.replace(module.mechanism, **functions)


def computed_by_truth(model: nn.Module) -> nn.Module:
    """The same model in float64, its attention computed by the float64 truth of the mechanism."""
    model = model.double()
    for module in model.modules():
        if isinstance(module, Attention):
            substitute(module, operation=module.mechanism.truth)
    return model


def mixed(dtype: torch.dtype, place: torch.device) -> AbstractContextManager[Any]:
    """Autocast to a dtype, as training in it does; nothing for float32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(place.type, dtype)


@contextmanager
def chosen(backend: str | None) -> Iterator[None]:
    """Have a backend run inside; without one, the one that is chosen by default."""
    before = os.environ.get(ENVIRONMENT_VARIABLE)
    if backend is None:
        yield
        return
    os.environ[ENVIRONMENT_VARIABLE] = backend
    try:
        yield
    finally:
        if before is None:
            del os.environ[ENVIRONMENT_VARIABLE]
        else:
            os.environ[ENVIRONMENT_VARIABLE] = before


@dataclass(frozen=True)
class OfModel:
    """What a contender or its truth does with a model around an attention; equal ones compute the same.

    Attributes:
        do: ``do(attention, given) -> `` a call, or the outputs of the truth.
        attention: Name of the mechanism; ``None`` for the attention that the model has by itself.
        backend: Name of the backend, or ``None`` for the one chosen by default.
    """

    do: Callable[..., Any]
    attention: str | None
    backend: str | None = None

    def __call__(self, given: Any) -> Any:
        """The outputs of the truth; or the call, which runs in the backend."""
        done = self.do(self.attention, given)
        if not isinstance(done, Call):
            return done

        def run() -> Outputs:
            with chosen(self.backend):
                return done.run()

        return Call(run, done.state_bytes)


def apply(function: Callable[..., Any], inputs: Inputs) -> Any:
    """Call a contender, or its truth, with the inputs of a point."""
    return function(*inputs)


def build_alike(fresh: Callable[[str], M], attention: str, new_std: float) -> M:
    """Build a model around an attention whose weights are those of the model around softmax attention.

    Args:
        fresh: From the name of an attention to a fresh model around it.
        attention: The name.
        new_std: Of parameters that only this attention has, such as filters and position biases; fresh ones may be
            zeros.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = fresh(attention)
        torch.manual_seed(0)
        shared = dict(fresh("softmax").named_parameters())
        for name, parameter in model.named_parameters():
            if name not in shared:
                nn.init.normal_(parameter, std=new_std)
            elif parameter.shape == shared[name].shape:
                parameter.data.copy_(shared[name].data)
        return model


def model_refusal(row: Mechanism, backend: str | None, shape: Shape, dtype: torch.dtype, place: Any) -> str | None:
    """Return why a model around a mechanism cannot run with these sizes, dtype and device, or ``None``."""
    if shape.channels != shape.value_channels:
        return CHANNELS_DIFFER
    return refusal(row, backend, torch.empty(0, dtype=dtype, device=place))


def gradients_of(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """The gradients of a loss with regard to all parameters of a model, by name."""
    parameters = dict(model.named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


@torch.no_grad()
def enlarge(model: nn.Module, names: Iterable[str], bias_std: float) -> None:
    """Give parameters values that keep the size of what they see: of fresh ones, attention is next to the mean."""
    for name in names:
        parameter = model.get_parameter(name)
        parameter.normal_(std=bias_std if parameter.ndim == 1 else parameter[0].numel() ** -0.5)


def per_sequence(shape: Shape) -> int:
    """Calls of a model that are counted by the batch: sequences or images."""
    return shape.batch
