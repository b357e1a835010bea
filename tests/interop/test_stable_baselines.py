"""Saved models of Stable-Baselines3 act as their networks do, and what is in their pickles is not run."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from flowformer.common.errors import DataError
from flowformer.interop.stable_baselines import load_policy
from flowformer.tasks.decision.simulators.environments import Spaces

EMPTY = np.zeros(0, np.float32)
NUMBERS = Spaces(4, None, 3, EMPTY, EMPTY)
VECTORS = Spaces(4, 2, None, np.array([-1.0, 0.0], np.float32), np.array([1.0, 4.0], np.float32))


def save(path, weights, **settings):
    tensors = io.BytesIO()
    torch.save(weights, tensors)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("policy.pth", tensors.getvalue())
        archive.writestr("data", json.dumps({"policy_kwargs": {}, **settings}))
    return path


def layers(names, sizes):
    torch.manual_seed(1)
    found = {}
    for name, size, larger in zip(names, sizes, sizes[1:], strict=False):
        layer = nn.Linear(size, larger)
        found |= {f"{name}.weight": layer.weight.detach(), f"{name}.bias": layer.bias.detach()}
    return found


def run(weights, names, x, hidden):
    for name in names[:-1]:
        x = hidden(nn.functional.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"]))
    return nn.functional.linear(x, weights[f"{names[-1]}.weight"], weights[f"{names[-1]}.bias"])


PPO = ["mlp_extractor.policy_net.0", "mlp_extractor.policy_net.2", "action_net"]
SAC = ["actor.latent_pi.0", "actor.latent_pi.2", "actor.mu"]
TD3 = ["actor.mu.0", "actor.mu.2", "actor.mu.4"]
DQN = ["q_net.q_net.0", "q_net.q_net.2", "q_net.q_net.4"]


@pytest.mark.parametrize(
    ("names", "spaces", "hidden", "bounded"),
    [
        (PPO, NUMBERS, torch.tanh, False), (PPO, VECTORS, torch.tanh, False), (SAC, VECTORS, torch.relu, True),
        (TD3, VECTORS, torch.relu, True), (DQN, NUMBERS, torch.relu, False),
    ],
    ids=["ppo-discrete", "ppo", "sac", "td3", "dqn"],
)  # fmt: skip
def test_a_policy_acts_as_its_network(names, spaces, hidden, bounded, tmp_path):
    weights = layers(names, [4, 7, 7, spaces.action_dim or spaces.num_actions])
    other = layers(["mlp_extractor.value_net.0", "value_net", "critic.qf0.0", "actor.log_std"], [4, 7, 1, 3, 3])
    policy = load_policy(save(tmp_path / "a.zip", weights | other), spaces)
    observations = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    running = np.array([True, True, False, True, True])
    found = policy.act(observations, running)
    wanted = run(weights, names, torch.from_numpy(observations), hidden)
    if spaces.num_actions:
        wanted = wanted.argmax(-1).numpy()
    elif bounded:
        wanted = np.array([-1, 0]) + (wanted.tanh().numpy() + 1) / 2 * np.array([2, 4])
    np.testing.assert_allclose(found[running], wanted[running], rtol=1e-5, atol=1e-6)
    assert (found[2] == 0).all()


def test_the_activation_is_that_of_the_settings(tmp_path):
    weights = layers(PPO, [4, 7, 7, 2])
    kwargs = {":type:": "<class 'dict'>", "activation_fn": "<class 'torch.nn.modules.activation.ReLU'>"}
    policy = load_policy(save(tmp_path / "a.zip", weights, policy_kwargs=kwargs), VECTORS)
    x = np.ones((1, 4), np.float32)
    wanted = run(weights, PPO, torch.from_numpy(x), torch.relu)
    np.testing.assert_allclose(policy.act(x, np.array([True])), wanted, rtol=1e-5, atol=1e-6)


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("was run",))


def test_what_cannot_be_used(tmp_path):
    file = tmp_path / "a.zip"
    file.write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"a\.zip is not a model of Stable-Baselines3"):
        load_policy(file, VECTORS)
    with pytest.raises(DataError, match=r"expected an MlpPolicy of PPO.*got weights features_extractor\.cnn"):
        load_policy(save(file, layers(["features_extractor.cnn.0"], [4, 2])), VECTORS)
    with pytest.raises(DataError, match=r"for observations of 4 values and 3 actions; the environment has 4 and 2"):
        load_policy(save(file, layers(PPO, [4, 7, 7, 3])), VECTORS)
    with pytest.raises(DataError, match="use_sde"):
        load_policy(save(file, layers(PPO, [4, 7, 7, 2]), use_sde=True), VECTORS)
    with pytest.raises(DataError, match=r"activation <class 'mine\.Odd'>"):
        load_policy(
            save(file, layers(PPO, [4, 7, 7, 2]), policy_kwargs={"activation_fn": "<class 'mine.Odd'>"}), VECTORS
        )
    with pytest.raises(DataError, match="more than tensors"):
        load_policy(save(file, {"action_net.weight": Evil()}), VECTORS)
    with pytest.raises(FileNotFoundError):
        load_policy(tmp_path / "absent.zip", VECTORS)
