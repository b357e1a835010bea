"""Tensors that are not dense, or have no values where they are needed, are refused in words of our own."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from law_cases import shapes_of, variants_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from flowformer import ops
from flowformer.mechanisms import find_attention, list_attentions

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

every_mechanism = pytest.mark.parametrize("name", list_attentions())
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)


def arguments(name: str, batch: int = 2) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """q, k and v of five tokens, learned tensors and options."""
    row = find_attention(name)
    variant = next(iter(variants_of(row).values()))
    tensors = [torch.ones(batch, 5, *shape) for shape in shapes_of(row, 2, 4, 4)]
    return tensors, [*variant.drawn(2, 4), *(_ones(shape) for shape in variant.learned(5, 2))], dict(variant.options)


def _ones(shape: Any) -> Any:
    return torch.ones(shape) if isinstance(shape, torch.Size) else tuple(map(_ones, shape))


def call(name: str, tensors: list[Tensor], learned: list[Any], options: dict[str, Any], **more: Any) -> Any:
    return find_attention(name).operation(*tensors, *learned, **options, **more)


LAYOUTS = {
    "coo": Tensor.to_sparse,
    "mkldnn": Tensor.to_mkldnn,
    "nested": lambda t: torch.nested.nested_tensor([*t], layout=torch.jagged),
    "nested strided": lambda t: torch.nested.as_nested_tensor([*t], layout=torch.strided),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
@pytest.mark.parametrize("layout", LAYOUTS)
@every_mechanism
def test_inputs_that_are_not_dense(name: str, layout: str) -> None:
    tensors, learned, options = arguments(name)
    for index in range(3):
        changed = list(tensors)
        changed[index] = LAYOUTS[layout](changed[index])
        with pytest.raises(TypeError, match=f"{'qkv'[index]} must be a dense tensor, got .*: (call|pack)"):
            call(name, changed, learned, options)


@every_mechanism
def test_masks_boundaries_and_learned_tensors_that_are_not_dense(name: str) -> None:
    tensors, learned, options = arguments(name)
    with pytest.raises(TypeError, match=r"mask must be a dense tensor, got layout torch.sparse_coo"):
        call(name, tensors, learned, options, mask=torch.ones(2, 5, dtype=torch.bool).to_sparse())
    with pytest.raises(TypeError, match=r"cu_seqlens must be a dense tensor, got layout torch.sparse_coo"):
        call(name, *arguments(name, 1), cu_seqlens=BOUNDS.to_sparse())
    if learned:
        parts = learned[0] if isinstance(learned[0], tuple) else (learned[0],)
        sparse = tuple(part.to_sparse() for part in parts)
        with pytest.raises(
            TypeError, match=r"(position_bias|filters|random_blocks) must be a dense tensor, got layout torch.sparse"
        ):
            call(name, tensors, [sparse if isinstance(learned[0], tuple) else sparse[0]], options)


@every_mechanism
def test_boundaries_on_another_device_or_without_values(name: str) -> None:
    tensors, learned, options = arguments(name, 1)
    with pytest.raises(ValueError, match=r"cu_seqlens must be on cpu like q, got .* on meta"):
        call(name, tensors, learned, options, cu_seqlens=BOUNDS.to("meta"))
    without = "a packed batch requires the values of cu_seqlens, which a meta or fake tensor does not have"
    mode = FakeTensorMode()
    for move, context in ((lambda t: t.to("meta"), nullcontext()), (mode.from_tensor, mode)):
        moved = [tuple(map(move, x)) if isinstance(x, tuple) else move(x) for x in (*tensors, *learned, BOUNDS)]
        with context, pytest.raises(ValueError, match=without):
            call(name, moved[:3], moved[3:-1], options, cu_seqlens=moved[-1])


def test_states_that_are_not_dense() -> None:
    x = torch.ones(2, 5, 2, 4)
    state = ops.FlowState(*(part.to_sparse() for part in ops.init_flow_state(2, 2, 4, 4)))
    with pytest.raises(TypeError, match=r"state.tokens must be a dense tensor"):
        ops.flow_attention(x, x, x, causal=True, initial_state=state)
    with pytest.raises(TypeError, match=r"state.tokens must be a dense tensor"):
        ops.flow_attention_step(x[:, 0], x[:, 0], x[:, 0], state)
    with pytest.raises(TypeError, match=r"q must be a dense tensor"):
        ops.flow_attention_step(x[:, 0].to_sparse(), x[:, 0], x[:, 0], ops.init_flow_state(2, 2, 4, 4))
