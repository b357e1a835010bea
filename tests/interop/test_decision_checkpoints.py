"""Published weights of Decision Transformers give published actions."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from flowformer.interop.decision import decision_state_dict, load_decision
from flowformer.mechanisms import find_attention

STATES, ACTIONS, DIM, HEADS, LAYERS, LENGTH = 7, 3, 32, 4, 2, 6


def episodes(length: int = LENGTH) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    observations = torch.randn(2, length, STATES, generator=generator)
    actions = torch.rand(2, length, ACTIONS, generator=generator) * 2 - 1
    return observations, actions, torch.randn(2, length, generator=generator), torch.arange(5, 5 + length).expand(2, -1)


@pytest.fixture(scope="module")
def port() -> Any:
    """transformers' port, with weights that are all different."""
    transformers = pytest.importorskip("transformers")
    config = transformers.DecisionTransformerConfig(
        state_dim=STATES, act_dim=ACTIONS, hidden_size=DIM, max_ep_len=50, n_layer=LAYERS, n_head=HEADS, n_inner=4 * DIM
    )
    torch.manual_seed(0)
    model = transformers.DecisionTransformerModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def original(port: Any, *, buffers: bool = False) -> dict[str, Tensor]:
    """The port's weights as the original names them; it has no position vectors."""
    named = {name.replace("encoder.", "transformer."): tensor for name, tensor in port.state_dict().items()}
    found = {name: tensor for name, tensor in named.items() if "wpe" not in name and not name.endswith(".attn.bias")}
    if buffers:
        found |= {"transformer.h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8)}
        found |= {"transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    return found


def actions_of(port: Any, batch: tuple[Tensor, ...], mask: Tensor | None = None) -> Tensor:
    observations, actions, returns, timesteps = batch
    with torch.no_grad():
        return port(
            states=observations, actions=actions, rewards=None, returns_to_go=returns.unsqueeze(-1),
            timesteps=timesteps, attention_mask=mask,
        ).action_preds  # fmt: skip


def test_weights_of_transformers_give_its_actions(port: Any) -> None:
    model = load_decision(port.state_dict(), num_heads=HEADS)
    torch.testing.assert_close(model(*episodes()), actions_of(port, episodes()), rtol=1e-5, atol=1e-5)
    left = torch.arange(LENGTH) >= torch.tensor([[2], [0]])  # padded as the original pads
    want = actions_of(port, episodes(), left.long())
    torch.testing.assert_close(model(*episodes(), left)[left], want[left], rtol=1e-5, atol=1e-5)


def test_weights_of_the_original_give_its_actions(port: Any) -> None:
    with torch.no_grad():
        saved = port.encoder.wpe.weight.clone()
        port.encoder.wpe.weight.zero_()  # the original has no positions
        want = actions_of(port, episodes())
        port.encoder.wpe.weight.copy_(saved)
    model = load_decision(original(port, buffers=True), num_heads=HEADS)
    torch.testing.assert_close(model(*episodes()), want, rtol=1e-5, atol=1e-5)
    assert (model.max_timestep, model.dim, model.observation_dim, model.action_dim) == (50, DIM, STATES, ACTIONS)


# ------------------------------------------------------------------------------------------------------- Flowformer_RL


def with_flow(port: Any) -> dict[str, Tensor]:
    """Weights as the copy with Flow-Attention names them: plain linear layers inside ``attn.att``."""
    found = {name: tensor for name, tensor in original(port).items() if ".attn." not in name}
    generator = torch.Generator().manual_seed(1)
    for layer in range(LAYERS):
        for part in ("query", "key", "value", "out"):
            for name, shape in (("weight", (DIM, DIM)), ("bias", (DIM,))):
                values = torch.randn(shape, generator=generator) / math.sqrt(DIM)
                found[f"transformer.h.{layer}.attn.att.{part}_projection.{name}"] = values
    return {name: tensor.double() for name, tensor in found.items()}


def plain_flowformer(weights: dict[str, Tensor], batch: tuple[Tensor, ...]) -> Tensor:
    """The published forward pass, written down once more."""

    def linear(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return x @ (weight if ".c_" in name else weight.T) + weights[f"{name}.bias"]

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(x, (DIM,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    observations, actions, returns, timesteps = batch
    time = weights["embed_timestep.weight"][timesteps]
    parts = (linear(returns[..., None], "embed_return"), linear(observations, "embed_state"))
    tokens = torch.stack([part + time for part in (*parts, linear(actions, "embed_action"))], 2).flatten(1, 2)
    x = norm(tokens, "embed_ln")
    flow = find_attention("flow")
    for layer in range(LAYERS):
        block = f"transformer.h.{layer}"
        seen = norm(x, f"{block}.ln_1")
        q, k, v = (linear(seen, f"{block}.attn.att.{part}_projection") for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (HEADS, -1)) for part in (q, k, v))
        out = flow.truth(q, k, v, causal=True, preset="decision").flatten(-2)
        x = x + linear(out, f"{block}.attn.att.out_projection")
        inside = functional.relu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(inside, f"{block}.mlp.c_proj")
    return linear(norm(x, "transformer.ln_f")[:, 1::3], "predict_action.0").tanh()


def test_weights_of_flowformer_give_its_actions(port: Any) -> None:
    weights = with_flow(port)
    batch = tuple(part.double() if part.is_floating_point() else part for part in episodes())
    model = load_decision(weights, num_heads=HEADS)
    torch.testing.assert_close(model(*batch), plain_flowformer(weights, batch), rtol=1e-9, atol=1e-9)
    assert model.decoder.layers[0].attention.mechanism.name == "flow"


def test_weights_that_do_not_fit_are_named(port: Any) -> None:
    with pytest.raises(ValueError, match=r"'transformer\.h\.0\.other' is not a parameter of the published Decision"):
        decision_state_dict({"transformer.h.0.other": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"missing embed_observation\.weight"):
        load_decision({}, num_heads=1)
    with pytest.raises(TypeError, match="must be a state dict"):
        decision_state_dict([])  # pyright: ignore[reportArgumentType]
    weights = original(port)
    del weights["embed_return.bias"]
    with pytest.raises(ValueError, match=r"missing: embed_return\.bias"):
        load_decision(weights, num_heads=HEADS)
