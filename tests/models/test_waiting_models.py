"""No forward or backward pass looks at a value: on a GPU, Python would wait there for all that was asked before.

A tensor on the meta device has no values, so that looking at one is an error, and takes the paths of a GPU's. AFT looks
at its denominators, to mend those that underflow: it is traced into one graph, which cannot look either.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from flowformer import create_attention, create_model, list_attentions, list_models
from flowformer.mechanisms.registry import find_attention

VOCABULARY, LENGTH, CLASSES = 50, 40, 3
DECISIONS = ("behaviour_cloning", "flowformer_decision")
LOOKING = [(name, causal) for name in ("aft_full", "aft_local", "aft_conv") for causal in (False, True)]
FORMS = [
    (name, causal)
    for name in list_attentions()
    for causal in (False, True)
    if (name, causal) not in [*LOOKING, ("aft_simple", True)]
    and find_attention(name).can(*(["causal"] if causal else []))
]


class Case(NamedTuple):
    model: nn.Module
    inputs: tuple[Tensor, ...]


def build(name: str, device: str, **options: Any) -> Case:
    """A model of the registry with a layer or two, in training mode, and a batch for it, padded where it may be."""
    mask = torch.arange(LENGTH, device=device) < torch.tensor([[LENGTH], [LENGTH - 7]], device=device)
    if name == "flowformer_timeseries":
        model = create_model(
            name, in_chans=3, num_classes=CLASSES, max_length=LENGTH, num_layers=1, device=device, **options
        )
        return Case(model.train(), (torch.zeros(2, LENGTH, 3, device=device), mask))
    if name == "lstm_timeseries":
        model = create_model(name, in_chans=3, num_classes=CLASSES, device=device, **options)
        return Case(model.train(), (torch.zeros(2, LENGTH, 3, device=device), mask))
    if name in DECISIONS:
        model = create_model(name, observation_dim=3, action_dim=2, device=device, **options).train()
        steps, real = torch.zeros(2, LENGTH, dtype=torch.int64, device=device), torch.zeros(2, LENGTH, device=device)
        return Case(
            model, (real.unsqueeze(-1).expand(-1, -1, 3), real.unsqueeze(-1).expand(-1, -1, 2), real, steps, mask)
        )
    if "vision" in name or "deit" in name or "conv" in name:
        stages = 3 if "micro" in name else 4 if "vision" in name else 1
        model = create_model(name, num_classes=CLASSES, img_size=32, depths=(1,) * stages, device=device, **options)
        return Case(model.train(), (torch.zeros(2, 3, *model.img_size, device=device),))
    if name == "flowformer_sequence":
        options["num_classes"] = CLASSES
    model = create_model(name, vocab_size=VOCABULARY, max_length=LENGTH, num_layers=2, device=device, **options)
    tokens = torch.zeros(2, LENGTH, dtype=torch.int64, device=device)
    return Case(model.train(), (tokens, mask))


def loss(case: Case, call: Any = None) -> Tensor:
    call = case.model if call is None else call
    if hasattr(case.model, "loss"):
        tokens, mask = case.inputs
        return call(tokens, mask, targets=tokens)
    return call(*case.inputs).float().square().sum()


@pytest.mark.parametrize("name", [name for name in list_models() if "aft" not in name])
def test_a_training_step_of_a_model_waits_for_nothing(name: str) -> None:
    case = build(name, "meta")
    loss(case).backward()
    assert all(parameter.grad is not None for parameter in case.model.parameters())


@pytest.mark.parametrize(("name", "causal"), FORMS)
def test_a_mechanism_waits_for_nothing(name: str, causal: bool) -> None:
    attention = create_attention(name, 16, 4, causal=causal, max_length=2 * LENGTH + 1, device="meta")
    x = torch.zeros(2, LENGTH, 16, device="meta", requires_grad=True)
    for mask in (None, torch.ones(2, LENGTH, dtype=torch.bool, device="meta")):
        attention(x, mask=mask).sum().backward()
    if causal:
        out, state = attention(x, return_state=True)
        out, state = attention.step(out[:, -1], state)
        assert attention(x, initial_state=state).shape == x.shape


# In the default suite some; the others differ in sizes, or trace mechanisms that are traced elsewhere.
QUICK = {"deit_tiny_flow", "flowformer_gpt_nano", "flowformer_timeseries", "flowformer_vision_micro"}


@pytest.mark.parametrize(
    "name",
    # torch.compile refuses nn.LSTM within one graph.
    [
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
        for name in list_models()
        if name != "lstm_timeseries"
    ],
)
def test_a_model_in_training_is_one_graph(name: str) -> None:
    torch._dynamo.reset()
    case = build(name, "cpu", dropout=0.0)
    compiled = torch.compile(case.model, fullgraph=True, backend="aot_eager")
    got, want = loss(case, compiled), loss(case)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for one, other in zip(*(torch.autograd.grad(x, [*case.model.parameters()]) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
