"""Policies of Stable-Baselines3: the network of a saved model, read without that package; nothing in it is run.

The archive that ``model.save`` writes has the weights in ``policy.pth``, plain tensors, and settings in ``data``, JSON
with pickles in it, of which only texts are read.
"""

from __future__ import annotations

import json
import re
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.errors import DataError
from flowformer.interop.weights import read_weights
from flowformer.tasks.decision.policies import empty_actions
from flowformer.tasks.decision.simulators.environments import Spaces

_MOST_BYTES = 2**30
_ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "Tanh": nn.Tanh,
    "ELU": nn.ELU,
    "LeakyReLU": nn.LeakyReLU,
    "SiLU": nn.SiLU,
    "GELU": nn.GELU,
}
# Names of linear layers in policy.pth, by algorithm (stable_baselines3 2.x, common/policies.py and */policies.py): the
# layers, whether the last output is bounded to -1 and 1 by tanh, and the activation between layers if none is given.
_FORMS: tuple[tuple[str, bool, str], ...] = (
    (r"(?:mlp_extractor\.policy_net\.(\d+)|action_net)\.(weight|bias)", False, "Tanh"),  # PPO, A2C
    (r"actor\.(?:latent_pi\.(\d+)|mu)\.(weight|bias)", True, "ReLU"),  # SAC
    (r"actor\.mu\.(\d+)\.(weight|bias)", True, "ReLU"),  # TD3, DDPG
    (r"q_net\.q_net\.(\d+)\.(weight|bias)", False, "ReLU"),  # DQN
)


class NetworkPolicy:
    """A network of the observation: its output, or the number of the largest where actions are numbers.

    Args:
        network: (n, observation_dim) to (n, action_dim) or (n, num_actions).
        spaces: Of the environment.
        bounded: Whether -1 and 1 in the output are the bounds of the actions.
    """

    def __init__(self, network: nn.Module, spaces: Spaces, bounded: bool) -> None:
        self.network, self.spaces, self.bounded = network, spaces, bounded

    def reset(self, targets: np.ndarray, seeds: np.ndarray) -> None:  # noqa: D102 - see tasks.decision.policies.Policy
        pass

    @torch.inference_mode()
    def act(self, observations: np.ndarray, running: np.ndarray) -> np.ndarray:  # noqa: D102
        actions = empty_actions(len(running), self.spaces.action_dim)
        found = self.network(torch.from_numpy(observations[running]))
        if self.spaces.num_actions is not None:
            actions[running] = found.argmax(-1).numpy()
        elif self.bounded:
            low, high = self.spaces.low, self.spaces.high
            actions[running] = low + 0.5 * (found.numpy() + 1) * (high - low)
        else:
            actions[running] = found.numpy()
        return actions

    def observe(self, actions: np.ndarray, rewards: np.ndarray) -> None:  # noqa: D102
        pass


def load_policy(file: Path, spaces: Spaces) -> NetworkPolicy:
    """Read the deterministic policy of a model of PPO, A2C, SAC, TD3, DDPG or DQN with an ``MlpPolicy``.

    ``VecNormalize``, whose statistics are in another file, is not read: such a policy must be given what it was trained
    on.

    Args:
        file: What ``model.save`` wrote.
        spaces: Of the environment in which it is to act.

    Raises:
        DataError: for a file that is no such archive, another kind of policy, and another environment.
        OSError: if it cannot be read.
    """
    weights, settings = _read(file)
    for pattern, squashed, activation in _FORMS:
        layers = _find_layers(weights, pattern)
        if layers:
            network = _build(layers, _find_activation(settings, activation, file), squashed, file)
            _check(layers, spaces, settings, file)
            return NetworkPolicy(network, spaces, squashed)
    some = ", ".join(list(weights)[:4])
    raise DataError(f"{file}: expected an MlpPolicy of PPO, A2C, SAC, TD3, DDPG or DQN; got weights {some}, ...")


def _read(file: Path) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
    try:
        with zipfile.ZipFile(file) as archive, tempfile.TemporaryDirectory() as folder:
            for name in ("policy.pth", "data"):
                if archive.getinfo(name).file_size > _MOST_BYTES:
                    raise DataError(f"{file}: {name} is larger than {_MOST_BYTES:,} bytes")
            weights = Path(folder, "policy.pth")
            weights.write_bytes(archive.read("policy.pth"))
            settings = json.loads(archive.read("data"))
            return read_weights(weights), settings if isinstance(settings, dict) else {}
    except (zipfile.BadZipFile, KeyError, ValueError, RecursionError, NotImplementedError) as error:
        if isinstance(error, DataError):
            raise DataError(f"{file}: {error}") from error
        raise DataError(f"{file} is not a model of Stable-Baselines3, as model.save writes it: {error}") from error


def _find_layers(weights: Mapping[str, Tensor], pattern: str) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases of the layers, in order; one without a number is the last."""
    found: dict[float, dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(pattern, name):
            found.setdefault(float(match[1] or "inf"), {})[match[2]] = tensor
    if not all(len(layer) == 2 for layer in found.values()):
        return []
    return [(found[place]["weight"], found[place]["bias"]) for place in sorted(found)]


def _find_activation(settings: Mapping[str, Any], default: str, file: Path) -> type[nn.Module]:
    given = settings.get("policy_kwargs")
    text = str(given.get("activation_fn", default)) if isinstance(given, dict) else default
    name = re.split(r"[.']", text.strip("'<> "))[-1]
    if name not in _ACTIVATIONS:
        raise DataError(f"{file}: activation {text}; expected {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[name]


def _build(
    layers: list[tuple[Tensor, Tensor]], activation: type[nn.Module], squashed: bool, file: Path
) -> nn.Sequential:
    """The network, which copies the weights."""
    parts: list[nn.Module] = []
    size = None
    for weight, bias in layers:
        if weight.ndim != 2 or bias.shape != weight.shape[:1] or size not in (None, weight.shape[1]):
            raise DataError(f"{file}: layers {[tuple(weight.shape) for weight, _ in layers]} do not fit each other")
        size = weight.shape[0]
        layer = nn.Linear(weight.shape[1], size)
        layer.load_state_dict({"weight": weight, "bias": bias})
        parts += [layer, activation()]
    parts[-1] = nn.Tanh() if squashed else nn.Identity()
    return nn.Sequential(*parts).eval().requires_grad_(False)


def _check(layers: list[tuple[Tensor, Tensor]], spaces: Spaces, settings: Mapping[str, Any], file: Path) -> None:
    if settings.get("use_sde"):
        raise DataError(f"{file}: a policy of state-dependent exploration (use_sde) is not supported")
    sizes = layers[0][0].shape[1], layers[-1][0].shape[0]
    wanted = spaces.observation_dim, spaces.action_dim or spaces.num_actions
    if sizes != wanted:
        raise DataError(
            f"{file} was trained for observations of {sizes[0]} values and {sizes[1]} actions; the environment has"
            f" {wanted[0]} and {wanted[1]}"
        )
