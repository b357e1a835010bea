"""Small environments, registered when this module is imported; worker processes import it too."""

import os
import signal
import sys

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Discrete

RAISES, DIES = 666, 999  # seeds


class Line(gymnasium.Env):
    """A point that actions of -2 to 2 move; the reward is the action, and what is above 5 ends the episode.

    The observation: place, time, and a number drawn by the seed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 60}  # noqa: RUF012 - Gymnasium's
    observation_space = Box(-np.inf, np.inf, (3,), np.float64)
    action_space = Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.place, self.time, self.drawn = seed, self.np_random.uniform(-1, 1), 0, self.np_random.uniform()
        return self._observe(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        if self.time == 3 and self.seed == RAISES:
            raise RuntimeError("unstable\nsimulation")
        if self.time == 3 and self.seed == DIES:
            os.kill(os.getpid(), signal.SIGKILL)
        self.place += float(action[0])
        return self._observe(), float(action[0]), self.place > 5, False, {}

    def _observe(self):
        return np.array([self.place, self.time, self.drawn])

    def render(self):
        return np.full((20, 30, 3), min(255, 10 * self.time), np.uint8)


class Choices(Line):
    """The same with three actions, numbered from 4: one down, none, one up."""

    action_space = Discrete(3, start=4)

    def step(self, action):
        assert self.action_space.contains(action), action
        self.time += 1
        self.place += action - 5
        return self._observe(), float(action - 5), self.place > 5, False, {}


class Picture(Line):
    observation_space = Box(0, 255, (8, 8, 3), np.uint8)


class Two(Line):
    observation_space = gymnasium.spaces.Dict({"a": Line.observation_space})


class Many(Line):
    action_space = gymnasium.spaces.MultiDiscrete([2, 2])


class Plain(Line):
    """Takes no arguments, and with the seeds of failures it ends the program, or returns another shape."""

    def __init__(self):
        super().__init__()

    def step(self, action):
        if self.seed == RAISES:
            sys.exit(5)
        return super().step(action) if self.seed != DIES else (np.zeros(7), 0.0, False, False, {})


for kind in (Line, Choices, Picture, Two, Many, Plain):
    gymnasium.register(f"{kind.__name__}-v0", f"{__name__}:{kind.__name__}", max_episode_steps=12)
gymnasium.register("Endless-v0", f"{__name__}:Line")
gymnasium.register("Broken-v0", f"{__name__}:Line", kwargs={"unknown": 1})
