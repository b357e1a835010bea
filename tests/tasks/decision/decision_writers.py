"""Small recorded episodes for tests, and writers of the files that they come in."""

import h5py
import numpy as np

from flowformer.tasks.decision.episodes import Episodes


def make_episodes(lengths, discrete=False, seed=0, **fields):
    """Episodes of random steps: 4 observations, and 2 actions or one of 3."""
    rng = np.random.default_rng(seed)
    steps = sum(lengths)
    actions = rng.integers(0, 3, steps) if discrete else rng.uniform(-1, 1, (steps, 2)).astype(np.float32)
    return Episodes(
        rng.normal(3, 2, (steps, 4)).astype(np.float32), actions, rng.normal(1, 1, steps).astype(np.float32),
        np.concatenate([[0], np.cumsum(lengths)]), np.arange(len(lengths)) % 2 == 0,
        **{"num_actions": 3 if discrete else None, **fields},
    )  # fmt: skip


def last_observations(episodes):
    """What came after the last step of each episode: (E, S)."""
    return np.random.default_rng(7).normal(3, 2, (len(episodes), 4)).astype(np.float32)


def d4rl_arrays(episodes):
    """The arrays of D4RL's layout."""
    last = episodes.starts[1:] - 1
    terminals, timeouts = np.zeros((2, episodes.num_steps), dtype=bool)
    terminals[last], timeouts[last] = episodes.terminated, ~episodes.terminated
    following = np.roll(episodes.observations, -1, axis=0)
    following[last] = last_observations(episodes)
    return {
        "observations": episodes.observations, "actions": episodes.actions, "rewards": episodes.rewards,
        "terminals": terminals, "timeouts": timeouts, "next_observations": following,
    }  # fmt: skip


def write_hdf5(path, arrays, chunk=7, **attributes):
    """Write arrays, as compressed chunks of rows, and attributes; an array that is None is left out."""
    with h5py.File(path, "w") as file:
        for name, values in arrays.items():
            if values is not None:
                values = np.asarray(values)
                options = {"chunks": (chunk, *values.shape[1:]), "compression": "gzip"} if len(values) > chunk else {}
                file.create_dataset(name, data=values, **options)
        file.attrs.update(attributes)
    return path


def assert_same(found, wanted):
    """Two sets have the same steps and episodes."""
    for name in ("observations", "actions", "rewards", "starts", "terminated"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), err_msg=name, strict=True)
    assert found.num_actions == wanted.num_actions
