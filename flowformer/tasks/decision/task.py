"""Decisions from recorded episodes: loss, and evaluation in a simulator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.core.masks import fill
from flowformer.tasks.decision.format import DecisionFormat
from flowformer.tasks.decision.policies import Evaluation, make_policy
from flowformer.tasks.decision.rollout import Episode, describe_episode, run_episodes, summarise
from flowformer.tasks.decision.scores import normalise, reference_of
from flowformer.tasks.decision.trials import Trials
from flowformer.tasks.decision.windows import Windows
from flowformer.tasks.metric import Metric

QUALITIES = ("medium-expert", "medium", "medium-replay")
ENVIRONMENTS: Mapping[str, str] = {"halfcheetah": "HalfCheetah", "hopper": "Hopper", "walker2d": "Walker2d"}
SETS = tuple(f"{family}-{quality}" for quality in QUALITIES for family in ENVIRONMENTS)
# Wu et al., ICML 2022, the table of D4RL: normalised reward by set, in the order of SETS; "softmax" is the Decision
# Transformer. Figures of behaviour cloning and AWAC are not theirs.
_REWARDS: Mapping[str, tuple[float, ...]] = {
    "bc": (55.2, 52.5, 107.5, 42.6, 52.9, 75.3, 36.6, 18.1, 26.0),
    "awac": (42.8, 55.8, 74.5, 43.5, 57.0, 72.4, 40.5, 37.2, 27.0),
    "softmax": (83.8, 104.0, 107.7, 42.4, 64.2, 70.6, 34.6, 79.7, 62.9),
    "linear": (78.2, 107.2, 67.2, 42.3, 58.7, 57.9, 32.1, 74.3, 62.1),
    "reformer": (81.5, 104.2, 71.4, 42.2, 59.9, 65.8, 33.6, 66.1, 50.1),
    "performer": (85.1, 93.5, 72.6, 42.1, 59.7, 63.3, 31.7, 64.6, 61.3),
    "cosformer": (85.5, 98.1, 100.5, 42.1, 59.8, 71.4, 32.8, 59.3, 60.5),
    "flow": (90.8, 109.9, 108.0, 42.2, 66.9, 71.7, 34.7, 75.5, 62.0),
}
# The figures printed after +-, of seeds: how many is not said.
_SPREADS: Mapping[str, tuple[float, ...]] = {
    "softmax": (3.3, 2.5, 0.6, 0.1, 1.1, 3.2, 0.6, 7.4, 5.0),
    "linear": (3.2, 0.9, 27.3, 0.2, 0.4, 10.6, 1.5, 7.0, 7.4),
    "reformer": (1.6, 9.8, 1.8, 0.1, 0.7, 4.9, 0.7, 2.6, 3.5),
    "performer": (2.1, 13.9, 2.4, 0.2, 7.5, 10.7, 0.9, 24.2, 6.7),
    "cosformer": (2.9, 7.4, 14.5, 0.3, 3.8, 1.2, 3.6, 16.5, 9.9),
    "flow": (0.4, 1.0, 0.4, 0.2, 2.5, 2.5, 1.5, 14.5, 3.1),
}
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    name: {row: values[index] for row, values in _REWARDS.items()} for index, name in enumerate(SETS)
}  # normalised reward by set and row
SPREADS: Mapping[str, Mapping[str, float]] = {
    name: {row: values[index] for row, values in _SPREADS.items()} for index, name in enumerate(SETS)
}
TARGETS: Mapping[str, tuple[float, float]] = {
    "halfcheetah": (12_000, 6_000), "hopper": (3_600, 1_800), "walker2d": (5_000, 2_500),
}  # returns that the published evaluation asks for; Flowformer_RL, experiment.py  # fmt: skip


@dataclass(frozen=True, eq=False)
class DecisionTask:
    """Actions of recorded episodes to learn, and trials in a simulator to evaluate them by.

    Attributes:
        name: Of the data.
        train: Windows of recorded episodes.
        validation: Episodes to run in evaluations during training.
        test: Episodes to run when it is over.
        format: How observations, actions and returns are scaled.
        published: Normalised rewards by method.
        source: Where the data came from.
        licence: What is known of its terms.
        evaluation: "window": the model sees the last steps, as in training; "recurrent": its state, of all steps.
        simulators: Worker processes of the simulator; 0 for this one.
        last_only: Whether of each window only the last action is learned, as published of behaviour cloning.
    """

    name: str
    train: Windows
    validation: Trials
    test: Trials
    format: DecisionFormat
    published: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    licence: str = ""
    evaluation: Evaluation = "window"
    simulators: int = 0
    last_only: bool = False
    _episodes: list[Episode] = field(default_factory=list, init=False, repr=False)

    @property
    def metric(self) -> Metric:
        """Normalised score, or return where D4RL has no references; its name tells the version of the environment."""
        environment = self.format.environment
        if reference_of(environment) is None:
            return Metric(f"return in {environment}", "return", digits=1)
        return Metric(f"normalised score in {environment}", "score", digits=1)

    @property
    def evaluated(self) -> dict[str, Any]:
        """The evaluation sets used during training."""
        return {"validation": self.validation}

    def size(self, batch: Mapping[str, Tensor]) -> int:
        """Return the number of actions that are learned, or of episodes."""
        if "seeds" in batch:
            return len(batch["seeds"])
        return int(self._counted(batch["mask"]).sum())

    def _counted(self, mask: Tensor) -> Tensor:
        """Which actions are learned: real ones; with ``last_only`` those that no real one follows."""
        return mask & ~nn.functional.pad(mask[:, 1:], (0, 1)) if self.last_only else mask

    def step(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the loss of a batch of windows, or run a batch of trials.

        Returns:
            Of windows "loss": mean squared error over the numbers of real actions, or cross-entropy of discrete ones,
            with "accuracy", how many were right. Of trials, means: "return", "length", "score" where there is one, the
            same of each target where there are several ("return_3600"); and "failed", how many a simulator ended.
        """
        if "seeds" in batch:
            return self._simulate(model, batch)
        counted = self._counted(batch["mask"])
        predicted = model(*(batch[name] for name in ("observations", "actions", "returns_to_go", "timesteps", "mask")))
        predicted, actions = predicted.float(), batch["actions"]
        if self.format.num_actions is None:
            squares = fill(predicted - actions, counted).square().sum()
            return {"loss": squares / (counted.sum().clamp(min=1) * actions.shape[-1])}
        loss = fill(_cross_entropies(predicted, fill(actions, counted, 0)), counted).sum()
        right = (predicted.argmax(-1) == actions) & counted
        return {"loss": loss / counted.sum().clamp(min=1), "accuracy": right.sum()}

    def _simulate(self, model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        policy = make_policy(model, self.format, self.evaluation)
        targets, seeds = (batch[name].cpu().numpy() for name in ("targets", "seeds"))
        with torch.autocast(batch["seeds"].device.type, enabled=False):  # policies compute in the dtype of the weights
            episodes = run_episodes(policy, self.format.environment, targets, seeds, workers=self.simulators)
        self._episodes.extend(episodes)
        values = self._values(episodes)
        means = {name: column.mean() for name, column in values.items()}
        different = tuple(dict.fromkeys(self.format.targets))
        for target in different if len(different) > 1 else ():
            # So that the mean over all trials, as many of each target, is that of the target.
            own = (targets == target) * len(different)
            means |= {f"{name}_{target:g}": (column * own).mean() for name, column in values.items()}
        device = batch["seeds"].device
        found = {name: torch.tensor(value, dtype=torch.float32, device=device) for name, value in means.items()}
        failed = sum(bool(episode.failed) for episode in episodes)
        return {**found, "failed": torch.tensor(failed, device=device)}

    def _values(self, episodes: list[Episode]) -> dict[str, np.ndarray]:
        returns = np.array([episode.return_ for episode in episodes])
        scores = normalise(returns, self.format.environment)
        found = {"return": returns, "length": np.array([float(episode.length) for episode in episodes])}
        return found if scores is None else {**found, "score": scores}

    def recount(self) -> dict[str, Any]:
        """Return the episodes since the last call, each of them and by target: see ``protocols.Recounts``.

        For comparison the recorded episodes are among the parts, all and the best tenth.
        """
        episodes = list(self._episodes)
        self._episodes.clear()
        parts = []
        for part in summarise(episodes):
            said = f", {len(part.failed)} failed" if part.failed else ""
            parts.append(self._part(f"target {part.target:g}, {len(part.episodes)} episodes{said}", part.returns))
        recorded = np.sort(self.train.episodes.returns)
        data = [
            self._part(f"data, {len(recorded)} episodes", recorded),
            self._part("data, best tenth", recorded[-max(len(recorded) // 10, 1) :]),
        ]
        records = [describe_episode(one, self.format.environment) for one in episodes]
        return {"parts": [*parts, *data] if parts else [], "episodes": records}

    def _part(self, name: str, returns: np.ndarray) -> dict[str, Any]:
        scores = normalise(returns, self.format.environment)
        values = returns if scores is None else scores
        return {"name": name, "value": float(values.mean()), "spread": float(values.std())}


def _cross_entropies(logits: Tensor, actions: Tensor) -> Tensor:
    """Cross-entropy of each action, (batch, length)."""
    return nn.functional.cross_entropy(logits.transpose(1, 2), actions, reduction="none")
