"""Policies learned from recorded episodes: the Decision Transformer with any causal attention, and behaviour cloning.

Sources: kzl/decision-transformer (Chen et al., NeurIPS 2021), gym/decision_transformer/models, and Flowformer_RL of
thuml/Flowformer, which replaces its attention.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.types import Device

from flowformer.core.checks import (
    apply,
    check_flag,
    check_fresh_state,
    check_mask,
    check_optional_sizes,
    check_probability,
    check_sizes,
    check_tokens_of,
    describe,
)
from flowformer.core.masks import fill
from flowformer.core.precision import FLOAT_DTYPES, dtype_and_device
from flowformer.core.tracing import may_look
from flowformer.mechanisms.dropout import Dropout
from flowformer.models.decoder import Decoder
from flowformer.models.encoder import EncoderBlock
from flowformer.models.initialization import GPT_STD, draw_parameters, normal, set_initializer
from flowformer.models.registry import register_model
from flowformer.models.vocabulary.cross_entropy import TOKEN_DTYPES, check_tokens

_STEP = 3  # tokens of a time step: return, observation, action


class DecisionState(NamedTuple):
    """State of a Decision Transformer after the time steps so far.

    Attributes:
        timestep: The last time step, (batch,), int64; -1 before the first one.
        layers: The states of the attentions, first layer first.
    """

    timestep: Tensor
    layers: tuple[Any, ...]


class ObservationState(NamedTuple):
    """State of behaviour cloning.

    Attributes:
        observations: The last ones, (batch, context - 1, observation_dim); zeros before the first.
    """

    observations: Tensor


class DecisionModel(nn.Module, ABC):
    """Base class of models that predict actions from episodes: a whole batch of them at once, or step by step.

    Padding is invisible, on either side.

    Args:
        observation_dim: Channels of an observation.
        action_dim: Channels of an action, which is then a vector.
        num_actions: Number of actions, which are then numbers from 0. One of ``action_dim`` and ``num_actions`` is
            given.

    Raises:
        ValueError, TypeError: for sizes that do not fit.
    """

    def __init__(self, observation_dim: int, action_dim: int | None, num_actions: int | None) -> None:
        super().__init__()
        check_sizes(observation_dim=observation_dim)
        check_optional_sizes(action_dim=action_dim, num_actions=num_actions)
        if (action_dim is None) == (num_actions is None):
            raise ValueError(
                "one of action_dim, of actions that are vectors, and num_actions, of discrete ones, must be given, got"
                f" action_dim {action_dim} and num_actions {num_actions}"
            )
        self.observation_dim, self.action_dim, self.num_actions = observation_dim, action_dim, num_actions
        self.outputs: int = action_dim or num_actions or 0

    @abstractmethod
    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        """Return the action of each time step, predicted from what came before it.

        Args:
            observations: (batch, length, observation_dim).
            actions: The actions taken, (batch, length, action_dim), or (batch, length) integers. That of the last time
                step is not read.
            returns_to_go: Sum of the rewards that are to come, or wanted, (batch, length).
            timesteps: Of the episode, from 0: (batch, length) integers.
            mask: (batch, length) boolean, True = a real time step; padding on either side, any value in it.

        Returns:
            Actions (batch, length, action_dim) or logits (batch, length, num_actions); undefined at padding.

        Raises:
            TypeError, ValueError: for another shape or dtype, or a time step or action that is not there.
        """

    @abstractmethod
    def init_state(self, batch_size: int) -> Any:
        """Return the state before the first time step of ``batch_size`` episodes."""

    @abstractmethod
    def step(
        self, observation: Tensor, return_to_go: Tensor, timestep: Tensor, previous_action: Tensor | None, state: Any
    ) -> tuple[Tensor, Any]:
        """Predict the action of one time step: the numbers of :meth:`forward` over the episode so far.

        Args:
            observation: (batch, observation_dim).
            return_to_go: (batch,).
            timestep: (batch,) integers.
            previous_action: The action taken at the time step before, (batch, action_dim) or (batch,) integers;
                ``None`` at the first.
            state: The state before this time step.

        Returns:
            The action (batch, action_dim), or logits (batch, num_actions); and the state after this time step.

        Raises:
            TypeError, ValueError: as :meth:`forward`; for a previous action at the first step, or none later.
        """


class DecisionTransformer(DecisionModel):
    """The Decision Transformer (Chen et al., NeurIPS 2021) with any causal attention.

    Each time step is three tokens: return-to-go, observation, action; to each is added the learned embedding of its
    time step, and the sum is normalised. An action is predicted from the output at its observation. As published, but
    that there is no dropout on softmax attention's weights; the heads for observations and returns, which its training
    does not use, are left out.

    Args:
        observation_dim: Channels of an observation.
        action_dim: Channels of an action; or
        num_actions: Number of discrete actions.
        dim: Channels of the model.
        num_layers: Pre-norm blocks.
        num_heads: Heads of each attention.
        ffn_dim: Channels inside the feed-forward networks; ``4 * dim`` if absent.
        max_timestep: Time steps that have an embedding: the longest episode.
        max_length: Most time steps of a sequence, for mechanisms that have parameters for each position.
        dropout: Probability, on embeddings and on the outputs of attentions and feed-forward networks.
        activation: ``"relu"``, ``"gelu"`` (exact) or ``"gelu_tanh"``.
        tanh: Whether actions are bounded to -1 to 1 by tanh.
        attention: Name of a causal mechanism: :func:`flowformer.list_attentions`.
        attention_options: Options of the mechanism; for ``"flow"`` the preset ``"decision"`` unless one is given.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for sizes or options that do not fit.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int | None = None,
        *,
        num_actions: int | None = None,
        dim: int = 256,
        num_layers: int = 3,
        num_heads: int = 4,
        ffn_dim: int | None = None,
        max_timestep: int = 1_000,
        max_length: int | None = None,
        dropout: float = 0.1,
        activation: str = "relu",
        tanh: bool = True,
        attention: str = "flow",
        attention_options: Mapping[str, Any] | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(observation_dim, action_dim, num_actions)
        check_sizes(dim=dim, num_layers=num_layers, num_heads=num_heads, max_timestep=max_timestep)
        check_optional_sizes(ffn_dim=ffn_dim, max_length=max_length)
        check_probability("dropout", dropout)
        check_flag("tanh", tanh)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        options = dict(attention_options or {})
        if attention == "flow":
            options.setdefault("preset", "decision")
        self.dim, self.max_timestep, self.max_length, self.tanh = dim, max_timestep, max_length, tanh
        self.embed_timestep = nn.Embedding(max_timestep, dim, **factory)
        self.embed_return = nn.Linear(1, dim, **factory)
        self.embed_observation = nn.Linear(observation_dim, dim, **factory)
        self.embed_action: nn.Module = (
            nn.Embedding(num_actions, dim, **factory) if action_dim is None else nn.Linear(action_dim, dim, **factory)  # pyright: ignore[reportArgumentType] - one of both is given
        )
        self.embed_norm = nn.LayerNorm(dim, **factory)
        self.dropout = Dropout(dropout)
        blocks = [
            EncoderBlock(
                dim, num_heads, 4 * dim if ffn_dim is None else ffn_dim, dropout=dropout, attention=attention,
                attention_options=options, max_length=None if max_length is None else _STEP * max_length, causal=True,
                norm_first=True, activation=activation, activation_dropout=0.0, **factory,
            )
            for _ in range(num_layers)
        ]  # fmt: skip
        self.decoder = Decoder(blocks, dim, norm_first=True, **factory)
        self.head = nn.Linear(dim, self.outputs, **factory)
        self._set_initializers()

    def _set_initializers(self) -> None:
        """Weights of the blocks are GPT-2's; embeddings and head are PyTorch's own, as in the published code."""
        for layer in self.decoder.modules():
            if isinstance(layer, nn.Linear):
                set_initializer(layer, partial(normal, std=GPT_STD))
        draw_parameters(self)

    def forward(  # noqa: D102 - see the base class
        self,
        observations: Tensor,
        actions: Tensor,
        returns_to_go: Tensor,
        timesteps: Tensor,
        mask: Tensor | None = None,
    ) -> Tensor:
        check_tokens_of("observations", observations, "batch, length", self.observation_dim)
        if mask is not None:
            check_mask("mask", mask, observations.shape[:2], observations.device)
        self._check_steps("batch, length", observations, returns_to_go, timesteps, actions)
        x = self._embed(
            *(fill(part, mask) for part in (observations, returns_to_go, timesteps, actions))
        )  # (batch, length, 3, dim)
        x = self.dropout(self.embed_norm(x)).flatten(1, 2)[:, :-1]  # nothing is predicted after the last action
        tokens = None if mask is None else mask.unsqueeze(-1).expand(-1, -1, _STEP).flatten(1)[:, :-1]
        return self._predict(self.decoder(x, tokens)[:, 1::_STEP])

    def _embed(self, observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, actions: Tensor) -> Tensor:
        """Return the tokens of time steps (batch, length, 3, dim), not yet normalised."""
        parts = self._embed_seen(observations, returns_to_go, timesteps)
        return torch.stack((*parts, self._embed_taken(actions, timesteps)), 2)

    def _embed_seen(self, observations: Tensor, returns_to_go: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        check_tokens("timesteps", timesteps, self.max_timestep)
        time = self.embed_timestep(timesteps.to(torch.int64))
        returns = apply("returns_to_go", self.embed_return, returns_to_go.unsqueeze(-1)) + time
        return returns, apply("observations", self.embed_observation, observations) + time

    def _embed_taken(self, actions: Tensor, timesteps: Tensor) -> Tensor:
        if self.num_actions is not None:
            check_tokens("actions", actions, self.num_actions)
            actions = actions.to(torch.int64)
        return apply("actions", self.embed_action, actions) + self.embed_timestep(timesteps.to(torch.int64))

    def _predict(self, hidden: Tensor) -> Tensor:
        found = self.head(hidden)
        return found.tanh() if self.tanh and self.num_actions is None else found

    def init_state(self, batch_size: int) -> DecisionState:  # noqa: D102
        layers = tuple(block.attention.init_state(batch_size) for block in self.decoder.layers)
        device = dtype_and_device(self)["device"]
        return DecisionState(torch.full((batch_size,), -1, dtype=torch.int64, device=device), layers)

    def step(  # noqa: D102
        self, observation: Tensor, return_to_go: Tensor, timestep: Tensor, previous_action: Tensor | None, state: Any
    ) -> tuple[Tensor, DecisionState]:
        check_tokens_of("observation", observation, "batch", self.observation_dim)
        self._check_steps("batch", observation, return_to_go, timestep, previous_action)
        self._check_state(observation, previous_action, state)
        tokens = self._embed_seen(observation, return_to_go, timestep)
        if previous_action is not None:
            tokens = (self._embed_taken(previous_action, state.timestep), *tokens)
        x, layers = self.dropout(self.embed_norm(torch.stack(tokens, 1))), state.layers
        out, layers = self.decoder.extend(x, None, layers)
        return self._predict(out[:, -1]), DecisionState(timestep.to(torch.int64), layers)

    def _check_steps(
        self, axes: str, observations: Tensor, returns_to_go: Tensor, timesteps: Tensor, actions: Tensor | None
    ) -> None:
        shape = observations.shape[:-1]
        discrete = self.action_dim is None
        wanted = {
            "returns_to_go": (returns_to_go, FLOAT_DTYPES, shape, f"({axes}) of floating-point numbers"),
            "timesteps": (timesteps, TOKEN_DTYPES, shape, f"({axes}) of integers"),
        }
        if actions is not None and discrete:
            wanted["actions"] = (actions, TOKEN_DTYPES, shape, f"({axes}) of integers")
        elif actions is not None:
            said = f"({axes}, {self.action_dim}) of floating-point numbers"
            wanted["actions"] = (actions, FLOAT_DTYPES, (*shape, self.action_dim), said)
        for name, (tensor, dtypes, size, said) in wanted.items():
            if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
                raise TypeError(f"{name} must be {said}, got {describe(tensor)}")
            if tensor.shape != torch.Size(size):
                raise ValueError(f"{name} must be {said} like the observations, got {describe(tensor)}")

    def _check_state(self, observation: Tensor, previous_action: Tensor | None, state: Any) -> None:
        if not isinstance(state, DecisionState):
            raise TypeError(f"the state must be a DecisionState, got {type(state).__name__}")
        if state.timestep.shape != observation.shape[:1] or len(state.layers) != len(self.decoder.blocks):
            raise ValueError(
                f"the state must have {len(self.decoder.blocks)} layers and {len(observation)} rows, got"
                f" {len(state.layers)} layers and timestep {describe(state.timestep)}"
            )
        if may_look(state.timestep) and state.timestep.numel():
            fresh = bool(state.timestep[0] < 0)
            if fresh != (previous_action is None):
                raise ValueError(
                    f"previous_action must be {'None at the first time step' if fresh else 'given after the first'},"
                    f" got {describe(previous_action)}"
                )


class BehaviourCloning(DecisionModel):
    """Behaviour cloning: a network of linear layers that predicts the action from the last observations.

    Returns, actions and time steps are not read. Where there are fewer observations than ``context``, zeros stand
    before them.

    Source: MLPBCModel of kzl/decision-transformer.

    Args:
        observation_dim: Channels of an observation.
        action_dim: Channels of an action; or
        num_actions: Number of discrete actions.
        context: How many observations are read, the current one among them.
        dim: Channels of the hidden layers.
        num_layers: Hidden layers.
        dropout: Probability, after each of them.
        tanh: Whether actions are bounded to -1 to 1 by tanh.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError, TypeError: for sizes that do not fit.
    """

    def __init__(
        self,
        observation_dim: int,
        action_dim: int | None = None,
        *,
        num_actions: int | None = None,
        context: int = 20,
        dim: int = 256,
        num_layers: int = 3,
        dropout: float = 0.1,
        tanh: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(observation_dim, action_dim, num_actions)
        check_sizes(context=context, dim=dim, num_layers=num_layers)
        check_probability("dropout", dropout)
        check_flag("tanh", tanh)
        self.context, self.tanh = context, tanh
        widths = [context * observation_dim, *[dim] * num_layers]
        layers: list[nn.Module] = []
        for i in range(num_layers):
            layers += [nn.Linear(widths[i], dim, device=device, dtype=dtype), nn.ReLU(), Dropout(dropout)]
        self.layers = nn.Sequential(*layers, nn.Linear(dim, self.outputs, device=device, dtype=dtype))

    def forward(  # noqa: D102 - see the base class
        self,
        observations: Tensor,
        actions: Tensor | None = None,
        returns_to_go: Tensor | None = None,
        timesteps: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        check_tokens_of("observations", observations, "batch, length", self.observation_dim)
        if mask is not None:
            check_mask("mask", mask, observations.shape[:2], observations.device)
        before = nn.functional.pad(fill(observations, mask), (0, 0, self.context - 1, 0))
        return self._predict(before.unfold(1, self.context, 1).transpose(2, 3).flatten(2))

    def _predict(self, stacked: Tensor) -> Tensor:
        found = apply("observations", self.layers, stacked)
        return found.tanh() if self.tanh and self.num_actions is None else found

    def init_state(self, batch_size: int) -> ObservationState:  # noqa: D102
        check_fresh_state("BehaviourCloning.init_state", batch_size)
        like = dtype_and_device(self)
        return ObservationState(torch.zeros(batch_size, self.context - 1, self.observation_dim, **like))

    def step(  # noqa: D102
        self,
        observation: Tensor,
        return_to_go: Tensor | None,
        timestep: Tensor | None,
        previous_action: Tensor | None,
        state: Any,
    ) -> tuple[Tensor, ObservationState]:
        check_tokens_of("observation", observation, "batch", self.observation_dim)
        if not isinstance(state, ObservationState):
            raise TypeError(f"the state must be an ObservationState, got {type(state).__name__}")
        seen = torch.cat((state.observations, observation.unsqueeze(1)), 1)
        return self._predict(seen.flatten(1)), ObservationState(seen[:, 1:])


@register_model
def flowformer_decision(observation_dim: int, action_dim: int | None = None, **options: Any) -> DecisionTransformer:
    """The Decision Transformer as published: 3 layers, 256 channels, 4 heads, ReLU.

    Args:
        observation_dim: Channels of an observation.
        action_dim: Channels of an action; ``num_actions`` instead, of discrete ones.
        **options: As in :class:`DecisionTransformer`.
    """
    return DecisionTransformer(observation_dim, action_dim, **options)


@register_model
def behaviour_cloning(observation_dim: int, action_dim: int | None = None, **options: Any) -> BehaviourCloning:
    """Behaviour cloning as published: 3 layers of 256 channels on the last 20 observations.

    Args:
        observation_dim: Channels of an observation.
        action_dim: Channels of an action; ``num_actions`` instead, of discrete ones.
        **options: As in :class:`BehaviourCloning`.
    """
    return BehaviourCloning(observation_dim, action_dim, **options)
