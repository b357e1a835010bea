"""Decision models: episodes at once and step by step give the same numbers, and padding is invisible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowformer import create_model, list_attentions
from flowformer.mechanisms import find_attention
from flowformer.models.decision import BehaviourCloning, DecisionModel, DecisionTransformer

STATES, ACTIONS, LENGTH = 5, 3, 9
CAUSAL = [name for name in list_attentions() if find_attention(name).can("causal")]
SIZES: dict[str, Any] = {"dim": 16, "num_heads": 2, "num_layers": 2, "max_timestep": 30, "max_length": 20}
KINDS = {"continuous": {"action_dim": ACTIONS}, "discrete": {"num_actions": ACTIONS}}
each_kind = pytest.mark.parametrize("kind", KINDS)


def larger(module: DecisionModel) -> DecisionModel:
    """The module in float64, with parameters that are all different."""
    torch.manual_seed(0)
    for parameter in module.double().parameters():
        nn.init.normal_(parameter, std=0.4)
    return module.eval()


def transformer(kind: str, attention: str = "flow", **options: Any) -> DecisionModel:
    return larger(DecisionTransformer(STATES, **KINDS[kind], **SIZES, attention=attention, **options))


def cloning(kind: str) -> DecisionModel:
    return larger(BehaviourCloning(STATES, **KINDS[kind], context=4, dim=16))


BUILDERS = {"transformer": transformer, "cloning": cloning}


def episodes(kind: str, batch: int = 3, length: int = LENGTH, first: int = 4) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    observations = torch.randn(batch, length, STATES, generator=generator, dtype=torch.float64)
    actions = torch.rand(batch, length, ACTIONS, generator=generator, dtype=torch.float64) * 2 - 1
    returns = torch.randn(batch, length, generator=generator, dtype=torch.float64)
    taken = actions.argmax(-1) if kind == "discrete" else actions
    return observations, taken, returns, torch.arange(first, first + length).expand(batch, length)


def walk(model: DecisionModel, *batch: Tensor) -> Tensor:
    """Predictions step by step."""
    observations, actions, returns, timesteps = batch
    state, found, previous = model.init_state(len(observations)), [], None
    for t in range(observations.shape[1]):
        out, state = model.step(observations[:, t], returns[:, t], timesteps[:, t], previous, state)
        found.append(out)
        previous = actions[:, t]
    return torch.stack(found, 1)


@pytest.mark.parametrize("attention", CAUSAL)
@each_kind
def test_step_by_step_is_the_whole_at_once(kind: str, attention: str) -> None:
    model, batch = transformer(kind, attention), episodes(kind)
    whole = model(*batch)
    assert whole.shape == (3, LENGTH, ACTIONS)
    torch.testing.assert_close(walk(model, *batch), whole, rtol=1e-10, atol=1e-10)


@each_kind
def test_cloning_step_by_step_is_the_whole_at_once(kind: str) -> None:
    model, batch = cloning(kind), episodes(kind)
    torch.testing.assert_close(walk(model, *batch), model(*batch), rtol=1e-10, atol=1e-10)


def pad(x: Tensor, before: int, after: int, filler: float) -> Tensor:
    value = filler if x.is_floating_point() else -7
    sides = [x.new_full((len(x), count, *x.shape[2:]), value) for count in (before, after)]
    return torch.cat((sides[0], x, sides[1]), 1)


@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -10.0])
@pytest.mark.parametrize(("before", "after"), [(0, 6), (6, 0), (2, 3)])
@pytest.mark.parametrize("name", BUILDERS)
@each_kind
def test_padding_is_invisible(kind: str, name: str, before: int, after: int, filler: float) -> None:
    model, batch = BUILDERS[name](kind), episodes(kind)
    padded = [pad(x, before, after, filler) for x in batch]
    mask = torch.zeros(3, before + LENGTH + after, dtype=torch.bool)
    mask[:, before : before + LENGTH] = True
    results = []
    for arguments in ((*batch,), (*padded, mask)):
        out = model(*arguments)
        out = out if len(arguments) == 4 else out[:, before : before + LENGTH]
        model.zero_grad()
        out.sin().sum().backward()
        results.append((out, [parameter.grad for parameter in model.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("attention", ["flow", "softmax", "linear", "performer"])
def test_rows_of_different_lengths_are_what_they_are_alone(attention: str) -> None:
    model, batch = transformer("continuous", attention), episodes("continuous", batch=3)
    lengths = (9, 1, 4)
    right = torch.arange(LENGTH) < torch.tensor(lengths).unsqueeze(1)
    for mask, places in ((right, lambda n: slice(0, n)), (right.flip(1), lambda n: slice(LENGTH - n, LENGTH))):
        rows = [[x[row : row + 1, :length] for x in batch] for row, length in enumerate(lengths)]
        spread = [
            torch.cat([pad(x[i], mask_start, LENGTH - mask_start - x[i].shape[1], torch.nan) for x, mask_start in
                       zip(rows, [places(n).start for n in lengths], strict=True)])
            for i in range(4)
        ]  # fmt: skip
        out = model(*spread, mask)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(out[row : row + 1, places(length)], model(*rows[row]), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BUILDERS)
def test_what_comes_later_is_not_seen(name: str) -> None:
    model, batch = BUILDERS[name]("continuous"), episodes("continuous")
    before, changed = model(*batch), [x.clone() for x in batch]
    for x in changed[:3]:
        x[:, 5:] += 1
    torch.testing.assert_close(model(*changed)[:, :5], before[:, :5], rtol=0, atol=0)
    changed = [x.clone() for x in batch]
    changed[1][:, 5] += 1  # the action itself is seen from the next step on
    torch.testing.assert_close(model(*changed)[:, :6], before[:, :6], rtol=0, atol=0)
    assert torch.equal(model(*changed)[:, 6:], before[:, 6:]) == (name == "cloning")


def test_it_is_as_published() -> None:
    torch.manual_seed(0)
    model = create_model("flowformer_decision", observation_dim=11, action_dim=3)
    assert (len(model.decoder.blocks), model.dim, model.embed_timestep.num_embeddings) == (3, 256, 1_000)
    block = model.decoder.layers[0]
    assert (block.attention.num_heads, block.linear1.out_features, block.dropout.p) == (4, 1_024, 0.1)
    assert block.attention.arguments()["preset"] == "decision"
    assert isinstance(block.activation, nn.ReLU)
    for layer in (block.attention.q_proj, block.linear1, block.linear2, block.attention.out_proj):
        assert float(layer.weight.detach().std()) == pytest.approx(0.02, rel=0.02)  # GPT-2's, none of them scaled down
        assert not layer.bias.any()
    assert float(model.embed_timestep.weight.detach().std()) == pytest.approx(1, rel=0.02)  # PyTorch's own
    # 11, 3 and 1 channels in, 1,000 time steps; three blocks; 3 channels out.
    blocks = 3 * (12 * 256**2 + 13 * 256)
    assert sum(p.numel() for p in model.parameters()) == 256 * (11 + 3 + 1 + 3 + 1_000 + 4) + 3 * 257 + blocks
    out = model(*(x.float() if x.is_floating_point() else x for x in _batch(11, 3)))
    assert out.abs().max() <= 1
    cloned = create_model("behaviour_cloning", observation_dim=11, action_dim=3)
    assert [one.out_features for one in cloned.layers if isinstance(one, nn.Linear)] == [256, 256, 256, 3]
    assert cloned.layers[0].in_features == 20 * 11


def _batch(states: int, actions: int) -> tuple[Tensor, ...]:
    return torch.randn(2, 4, states), torch.randn(2, 4, actions), torch.randn(2, 4), torch.arange(4).expand(2, 4)


def test_without_tanh_actions_are_not_bounded() -> None:
    batch = [x * 50 if x.is_floating_point() else x for x in episodes("continuous")]
    assert transformer("continuous", tanh=False)(*batch).abs().max() > 1


@pytest.mark.parametrize(
    ("place", "value", "error", "says"),
    [
        (0, torch.zeros(3, LENGTH, 4, dtype=torch.float64), ValueError, r"observations must be \(batch, length, 5\)"),
        (0, torch.zeros(3, LENGTH, STATES, dtype=torch.int64), TypeError, "observations must be a tensor of dtype"),
        (1, torch.zeros(3, LENGTH, 2, dtype=torch.float64), ValueError, r"actions must be \(batch, length, 3\) of"),
        (1, torch.zeros(3, LENGTH, dtype=torch.int64), TypeError, r"actions must be \(batch, length, 3\) of floating"),
        (2, torch.zeros(3, LENGTH, 1, dtype=torch.float64), ValueError, r"returns_to_go must be \(batch, length\) of"),
        (3, torch.zeros(3, LENGTH), TypeError, r"timesteps must be \(batch, length\) of integers"),
        (3, torch.full((3, LENGTH), 30), ValueError, "timesteps must be from 0 to 29, got 30"),
    ],
)  # fmt: skip
def test_wrong_input_is_named(place: int, value: Tensor, error: type[Exception], says: str) -> None:
    batch = list(episodes("continuous"))
    batch[place] = value
    with pytest.raises(error, match=says):
        transformer("continuous")(*batch)


def test_wrong_actions_and_steps_are_named() -> None:
    model, (observations, actions, returns, timesteps) = transformer("discrete"), episodes("discrete")
    with pytest.raises(ValueError, match="actions must be from 0 to 2, got 3"):
        model(observations, actions + 3, returns, timesteps)
    with pytest.raises(ValueError, match=r"one of action_dim, .* and num_actions, .* must be given"):
        DecisionTransformer(STATES)
    with pytest.raises(ValueError, match="must be given, got action_dim 3 and num_actions 4"):
        BehaviourCloning(STATES, 3, num_actions=4)
    first = (observations[:, 0], returns[:, 0], timesteps[:, 0])
    with pytest.raises(ValueError, match="previous_action must be None at the first time step"):
        model.step(*first, actions[:, 0], model.init_state(3))
    _, state = model.step(*first, None, model.init_state(3))
    with pytest.raises(ValueError, match="previous_action must be given after the first"):
        model.step(*first, None, state)
    with pytest.raises(TypeError, match="the state must be a DecisionState"):
        model.step(*first, None, None)
    with pytest.raises(ValueError, match="2 layers and 3 rows"):
        model.step(*first, None, model.init_state(2))
