"""Recipes of offline reinforcement learning: the nine published sets of D4RL (Wu et al., ICML 2022), and your own data.

Source of every default: Flowformer_RL of thuml/Flowformer, experiment.py, data/context_dataset.py and
scripts/flowformer.sh; where it says nothing, kzl/decision-transformer, of which it is a copy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import numpy as np
from torch import nn

from flowformer.common.errors import DataError
from flowformer.common.fields import option
from flowformer.models.decision import DecisionModel
from flowformer.recipes.mechanism import check_attention, find_row, merge_fields
from flowformer.recipes.model import build_model, check_model
from flowformer.recipes.registry import RECIPES, register_recipe
from flowformer.tasks.decision.collecting import record_episodes
from flowformer.tasks.decision.episodes import Episodes
from flowformer.tasks.decision.files import FORMS, read_episodes
from flowformer.tasks.decision.format import DecisionFormat
from flowformer.tasks.decision.policies import Blend, FunctionPolicy
from flowformer.tasks.decision.rollout import open_environment
from flowformer.tasks.decision.scores import caution
from flowformer.tasks.decision.simulators.environments import check_spaces
from flowformer.tasks.decision.task import ENVIRONMENTS, PUBLISHED, SETS, SPREADS, TARGETS, DecisionTask
from flowformer.tasks.decision.trials import Trials
from flowformer.tasks.decision.windows import Windows
from flowformer.tasks.splits import SPLIT_SEED
from flowformer.training.recipe import DataState, StepRecipe

CLONING = "behaviour_cloning"
_FLOW: Mapping[str, Any] = {"attention": "flow", "attention_options": {"preset": "decision"}}
_VALIDATION = 1_000_000  # added to the seed, for episodes that no test runs
# What tells a row of the table from the others.
_PLAIN: Mapping[str, Any] = {
    "model": "flowformer_decision", "attention": None, "attention_options": {}, "num_layers": 3, "num_heads": 4,
    "dim": 256, "dropout": 0.1, "context": 20, "every_action": False,
}  # fmt: skip
_ROWS: Mapping[str, Mapping[str, Any]] = {
    "flow": _FLOW, "softmax": {"attention": "softmax"}, "linear": {"attention": "linear"},
    "reformer": {"attention": "reformer"}, "performer": {"attention": "performer"},
    "cosformer": {"attention": "cosformer"}, "bc": {"model": CLONING},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DecisionRecipe(StepRecipe):
    """A policy that is learned from recorded episodes, and evaluated in a simulator."""

    paper_round: ClassVar[Literal["best", "last"]] = "last"

    data: str | None = option(None, f"recorded episodes, several joined by commas: {FORMS}", group="data", neutral=True)
    env: str | None = option(
        None, "Gymnasium environment to evaluate in, such as Hopper-v5; null for that of the data", group="data"
    )
    targets: str | None = option(
        None, "returns that the policy is asked for, joined by commas; null for the best and the median of the data",
        group="data",
    )  # fmt: skip
    context: int = option(20, "steps that a model sees in training", group="data", at_least=1, largest=1_000_000)
    padding: Literal["right", "left"] = option(
        "right", "where shorter windows are padded: right as published, left as in the original Decision Transformer",
        group="data",
    )  # fmt: skip
    return_scale: float = option(1_000.0, "number that returns are divided by", group="data", above=0, largest=1e12)
    max_timestep: int = option(
        1_000, "steps of an episode that a model tells apart", group="data", at_least=1, largest=10_000_000
    )
    episodes: int = option(
        10, "episodes for each target in evaluations during training", group="data", at_least=1, largest=100_000
    )
    test_episodes: int = option(
        100, "episodes for each target in the test, when training is over", group="data", at_least=1, largest=100_000
    )
    evaluation: Literal["window", "recurrent"] = option(
        "window",
        "what a model knows of an episode: the last steps (window, as published), or its state since the first step, "
        "in constant time (recurrent)",
        group="data",
    )
    simulators: int = option(
        0, "worker processes of the simulator; 0 for the main process", group="machine", neutral=True, at_least=0,
        largest=1_000,
    )  # fmt: skip
    model: str = option("flowformer_decision", "decision model, see `flowformer list models`", group="model")
    attention: str | None = option(
        "flow", "causal attention mechanism, see `flowformer list attentions`; null with behaviour_cloning",
        group="attention",
    )  # fmt: skip
    attention_options: dict[str, Any] = option({}, "options of the attention mechanism", group="attention")
    num_layers: int = option(3, "number of blocks, or of hidden layers", group="model", at_least=1, largest=1_000)
    num_heads: int = option(4, "number of attention heads", group="attention", at_least=1, largest=1_000_000)
    dim: int = option(256, "model dimension", group="model", at_least=1, largest=1_000_000)
    dropout: float = option(0.1, "dropout", group="model", at_least=0, below=1)
    every_action: bool = option(
        False, "of behaviour cloning: learn every action of a window, not its last alone as published", group="model"
    )

    def __post_init__(self) -> None:
        """Check every field."""
        super().__post_init__()
        check_model(self.model, DecisionModel)
        if self.attention is None and not self.clones:
            raise ValueError(f"attention must be given with {self.model}")
        check_attention(self.attention, self.attention_options, causal=True)
        if not self.clones and self.dim % self.num_heads:
            raise ValueError(f"num_heads must divide dim, got dim {self.dim} and num_heads {self.num_heads}")
        if self.targets is not None:
            read_targets(self.targets)

    @property
    def clones(self) -> bool:
        """Whether the model is behaviour cloning."""
        return self.model == CLONING

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        unread = ("attention", "attention_options", "num_heads") if self.clones else ("every_action",)
        return super().misfits() | {name: f"{name} has no effect with {self.model}" for name in unread}

    @property
    def label(self) -> str:
        """Default name of the run's folder."""
        return f"{self.attention or self.model}-seed{self.seed}"

    @property
    def data_state(self) -> DataState:
        """Unknown: the user specifies the files."""
        return "unknown"

    def read_format(self, values: dict[str, Any]) -> DecisionFormat:
        """Read the format saved by a run."""
        return DecisionFormat.from_json(values)

    def read_data(self) -> Episodes:
        """Read the recorded episodes."""
        if self.data is None:
            raise ValueError(f"{self.name} requires --data FILE[,FILE]: {FORMS}")
        return read_episodes(self.data, self.env or "")

    def build_task(self, form: DecisionFormat | None = None) -> DecisionTask:
        """Read the episodes, and open the simulator."""
        recorded = self.read_data()
        environment = self.env or recorded.environment
        if not environment:
            raise ValueError(f"{recorded.source} does not tell its environment: pass --env, such as --env Hopper-v5")
        spaces = open_environment(environment)[1]
        recorded = recorded.match(spaces, environment)
        if form is None:
            targets = _default_targets(recorded) if self.targets is None else read_targets(self.targets)
            form = DecisionFormat.fit(
                recorded, environment=environment, context=self.context, return_scale=self.return_scale,
                targets=targets, max_timestep=self.max_timestep, padding=self.padding,
            )  # fmt: skip
        if form.environment != environment:
            raise DataError(f"the run is of {form.environment!r:.200}, not of {environment}")
        check_spaces(spaces, form, environment)
        return DecisionTask(
            self.name, Windows(recorded, form.context, form.padding),
            Trials.of(form.targets, self.episodes, self.seed + _VALIDATION),
            Trials.of(form.targets, self.test_episodes, self.seed), form, self.published_rewards, recorded.source,
            self.licence, self.evaluation, self.simulators, last_only=self.clones and not self.every_action,
        )  # fmt: skip

    @property
    def published_rewards(self) -> Mapping[str, float]:
        """Published normalised rewards by row."""
        return {}

    @property
    def licence(self) -> str:
        """What is known of the terms of the data."""
        return ""

    def build_model(self, form: Any) -> nn.Module:
        """Build the model of the recipe, for the format's observations and actions."""
        sizes = {
            "observation_dim": form.observation_dim, "action_dim": form.action_dim, "num_actions": form.num_actions,
            "dim": self.dim, "num_layers": self.num_layers, "dropout": self.dropout,
        }  # fmt: skip
        if self.clones:
            return build_model(self.model, **sizes, context=form.context)
        return build_model(
            self.model, **sizes, num_heads=self.num_heads, max_timestep=form.max_timestep,
            max_length=form.max_timestep if self.evaluation == "recurrent" else form.context,
            attention=self.attention, attention_options=self.attention_options,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PublishedDecisionRecipe(DecisionRecipe):
    """A policy that is learned from one of the nine published sets."""

    @property
    def set_name(self) -> str:
        """Name of the set: ``hopper-medium``, for example."""
        return self.name.partition("/")[2]

    @property
    def published_rewards(self) -> Mapping[str, float]:
        """Published normalised rewards by row."""
        return PUBLISHED[self.set_name]

    @property
    def licence(self) -> str:
        """What is known of the terms of the data."""
        return "D4RL's data: Creative Commons Attribution 4.0, if the files are D4RL's"

    @property
    def row(self) -> str:
        """The name of this model in the published table; "" if it is not in it."""
        return find_row(self, _ROWS, _PLAIN)

    def published_table(self) -> tuple[str, Mapping[str, float]]:
        """The published normalised rewards."""
        return "normalised reward (Wu et al., ICML 2022)", self.published_rewards

    @property
    def published_note(self) -> str:
        """What a reader of the published reward should know."""
        said = "the paper does not say for which of the two targets its reward is"
        if self.row == "bc":
            said = "the paper cites the reward of behaviour cloning"
        spread = SPREADS[self.set_name]
        parts = [f"published with ± {spread[self.row]:g}"] if self.row in spread else []
        return "; ".join([*parts, said, *filter(None, [caution(self.env or "")])])


@dataclass(frozen=True, kw_only=True)
class CartPoleRecipe(DecisionRecipe):
    """A policy that is learned from episodes of CartPole, which are recorded first."""

    recorded: int = option(
        200, "number of episodes to record, of mixed quality", group="data", at_least=2, largest=1_000_000
    )

    def misfits(self) -> dict[str, str]:
        """Return fields that have no effect beside the values of the others."""
        found = super().misfits()
        return found if self.data is None else found | {"recorded": "recorded has no effect with data"}

    @property
    def data_state(self) -> DataState:
        """The episodes are recorded where no file is given."""
        return "here"

    def read_data(self) -> Episodes:
        """Record the episodes, the same for all seeds; or read those that are given."""
        if self.data is not None:
            return super().read_data()
        spaces = open_environment("CartPole-v1")[1]
        policy = FunctionPolicy(_balance, spaces)
        shares = np.linspace(*_RANDOM, self.recorded)
        return record_episodes(Blend(policy, spaces, shares), "CartPole-v1", SPLIT_SEED + np.arange(self.recorded))


_RANDOM = (1.0, 0.1)  # share of random actions in the first recorded episode and in the last


def _balance(observation: np.ndarray) -> int:
    """Push to the side to which the pole falls, and a little towards the middle."""
    position, velocity, angle, spin = observation
    return int(0.1 * position + 0.3 * velocity + 3 * angle + spin > 0)


def read_targets(text: str) -> tuple[float, ...]:
    """Read returns, joined by commas.

    Raises:
        ValueError: for anything but finite numbers.
    """
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(map(math.isfinite, found)):
        raise ValueError(f"targets must be numbers joined by commas, such as 3600,1800, or None, got {text!r:.80}")
    return tuple(dict.fromkeys(found))


def _default_targets(recorded: Episodes) -> tuple[float, ...]:
    returns = recorded.returns
    return tuple(dict.fromkeys((float(returns.max()), float(np.median(returns)))))


def _merge(published: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Merge published fields with given ones; behaviour cloning has no attention, and clips no gradients."""
    if fields.get("model") == CLONING:
        published = {**published, "attention": None, "attention_options": {}, "clip_grad_norm": None}
    return merge_fields(published, fields)


# Flowformer_RL: scripts/flowformer.sh, and defaults of experiment.py; the clip is that of training/seq_trainer.py.
_PUBLISHED: Mapping[str, Any] = {
    **_FLOW, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 1e-4, "warmup_steps": 10_000,
    "clip_grad_norm": 0.25, "batch_size": 64, "steps": 100_000, "eval_every": 10_000, "seed": 1,
}  # fmt: skip


def published_set(name: str, **fields: Any) -> PublishedDecisionRecipe:
    """The published experiment on one set of D4RL (Wu et al., ICML 2022): a Decision Transformer with Flow-Attention.

    3 layers of 256 channels, 4 heads, ReLU, dropout 0.1; windows of 20 steps, padded on the right, drawn uniformly over
    all steps; 10 times 10,000 steps of 64 windows with AdamW at 1e-3, weight decay 1e-4, 10,000 steps of warm-up and a
    constant rate, gradient norm 0.25. Evaluated with 10 episodes for each of two targets, in the end with 100; which
    target, and how many seeds, the published table is of, is not said. D4RL's files are read as they are: --data
    hopper_medium-v2.hdf5.

    The published simulators are Hopper-v3, HalfCheetah-v3 and Walker2d-v3, which need mujoco-py. Here they are -v4, the
    same models in today's MuJoCo; scores are not the published ones exactly. Rows softmax (the Decision Transformer),
    linear, reformer, performer and cosformer by --attention, with the defaults of their modules: no option of them is
    published. Behaviour cloning: --model behaviour_cloning, which learns the last action of each window and clips no
    gradients, as published.

    Two protocols: the paper's tests the last step; the honest one the step that is best in other episodes than those of
    the test. Windows are permuted here, and drawn with replacement there.
    """
    family = name.partition("-")[0]
    defaults = {
        "name": f"decision/{name}", **_PUBLISHED, "env": f"{ENVIRONMENTS[family]}-v4",
        "targets": ",".join(f"{target:g}" for target in TARGETS[family]),
    }  # fmt: skip
    return PublishedDecisionRecipe(**_merge(defaults, fields))


@register_recipe("decision/own")
def decision_own(**fields: Any) -> DecisionRecipe:
    """The same policy from your own recorded episodes, in any environment of Gymnasium: --data FILE --env NAME.

    With the hyper-parameters of the published experiments. The targets are the best return of the data and its median,
    unless --targets gives others.
    """
    return DecisionRecipe(**_merge({"name": "decision/own", **_PUBLISHED}, fields))


@register_recipe("decision/cartpole")
def decision_cartpole(**fields: Any) -> CartPoleRecipe:
    """A policy for CartPole from recorded episodes of mixed quality: the demo, in minutes and without a download.

    The episodes are recorded here, by a controller whose actions are replaced by random ones, all of them in the first
    episode and a tenth in the last. Asked for a return of 500, the most there is, the policy balances the pole to the
    end. Sizes and optimizer are ours: 2 layers of 64 channels with a head for discrete actions. It acts by the state of
    its attention, not by a window.
    """
    ours: dict[str, Any] = {
        **_PUBLISHED, "env": "CartPole-v1", "targets": "500", "return_scale": 100.0, "max_timestep": 500,
        "num_layers": 2, "dim": 64, "learning_rate": 2e-3, "warmup_steps": 50, "schedule": "cosine",
        "steps": 300, "eval_every": 150, "episodes": 20, "evaluation": "recurrent", "clip_grad_norm": 1.0,
    }  # fmt: skip
    return CartPoleRecipe(**_merge({"name": "decision/cartpole", **ours}, fields))


for _name in SETS:
    RECIPES.add(f"decision/{_name}", partial(published_set, _name))
