"""Tensors that are not dense, or have no values where they are needed, are refused in words of our own."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from law_cases import shapes_of, tensors_after_v, variants_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

from flowformer import ops
from flowformer.mechanisms import find_attention, list_attentions

pytestmark = pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta:UserWarning")

every_mechanism = pytest.mark.parametrize("name", list_attentions())
BOUNDS = torch.tensor([0, 2, 5], dtype=torch.int32)


def arguments(name: str, batch: int = 2, label: str | None = None) -> tuple[list[Tensor], list[Any], dict[str, Any]]:
    """q, k and v of five tokens, random and learned tensors, and options; of the first variant where none is named."""
    row = find_attention(name)
    variants = variants_of(row)
    variant = variants[label or next(iter(variants))]
    tensors = [torch.ones(batch, 5, *shape) for shape in shapes_of(row, 2, 4, 4)]
    further = tensors_after_v(variant, torch.ones, batch=batch, length=5, heads=2, channels=4)
    return tensors, further, {**variant.options, **variant.for_length(5)}


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
def test_masks_and_boundaries_that_are_not_dense(name: str) -> None:
    tensors, learned, options = arguments(name)
    with pytest.raises(TypeError, match=r"mask must be a dense tensor, got layout torch.sparse_coo"):
        call(name, tensors, learned, options, mask=torch.ones(2, 5, dtype=torch.bool).to_sparse())
    with pytest.raises(TypeError, match=r"cu_seqlens must be a dense tensor, got layout torch.sparse_coo"):
        call(name, *arguments(name, 1), cu_seqlens=BOUNDS.to_sparse())


# Each tensor after v of each variant: the argument it is, or is a part of, and its place among all of them.
FURTHER = [
    pytest.param(name, label, causal, argument, part, id=f"{name}-{label}-{argument}-{part}")
    for name in list_attentions()
    for label, variant in variants_of(find_attention(name)).items()
    for causal in [variant.only == "causal"]
    for argument, found in enumerate(arguments(name, label=label)[1])
    for part, tensor in enumerate(tree_leaves(found))
    if isinstance(tensor, Tensor)
]


@pytest.mark.parametrize(("name", "label", "causal", "argument", "part"), FURTHER)
def test_random_and_learned_tensors_that_are_not_dense(
    name: str, label: str, causal: bool, argument: int, part: int
) -> None:
    tensors, learned, options = arguments(name, label=label)
    leaves, structure = tree_flatten(learned[argument])
    leaves[part] = leaves[part].to_sparse()
    learned[argument] = tree_unflatten(leaves, structure)
    called = list(inspect.signature(find_attention(name).operation).parameters)[3 + argument]
    with pytest.raises(TypeError, match=f"{called} must be a dense tensor, got layout torch.sparse_coo: call to_dense"):
        call(name, tensors, learned, options, causal=causal)


# Tensors after v that no variant has.
ABSENT = [
    (name, parameter.name)
    for name in list_attentions()
    for place, parameter in enumerate(inspect.signature(find_attention(name).operation).parameters.values())
    if place > 2 and parameter.kind is parameter.POSITIONAL_OR_KEYWORD and "Tensor" in parameter.annotation
    if not any(case.values[0] == name and case.values[3] == place - 3 for case in FURTHER)
]


@pytest.mark.parametrize(("name", "argument"), ABSENT)
def test_optional_tensors_that_are_not_dense(name: str, argument: str) -> None:
    tensors, _, options = arguments(name)
    with pytest.raises(TypeError, match=f"{argument} must be a dense tensor, got layout torch.sparse_coo: call to_den"):
        call(name, tensors, [], options, **{argument: torch.ones(2, 5, 2, 4).to_sparse()})


@every_mechanism
def test_boundaries_on_another_device_or_without_values(name: str) -> None:
    tensors, learned, options = arguments(name, 1)
    with pytest.raises(ValueError, match=r"cu_seqlens must be on cpu like q, got .* on meta"):
        call(name, tensors, learned, options, cu_seqlens=BOUNDS.to("meta"))
    without = "a packed batch requires the values of cu_seqlens, which a meta or fake tensor does not have"
    mode = FakeTensorMode()
    for move, context in ((lambda t: t.to("meta"), nullcontext()), (mode.from_tensor, mode)):
        moved = tree_map_only(Tensor, move, [*tensors, *learned, BOUNDS])
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
