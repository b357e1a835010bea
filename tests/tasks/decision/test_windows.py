"""Windows of episodes equal those cut by the plain loops of the published code."""

import numpy as np
import pytest
import torch
from decision_writers import make_episodes
from torch.utils.data import DataLoader

from flowformer.tasks.decision.format import DecisionFormat
from flowformer.tasks.decision.trials import Trial, Trials
from flowformer.tasks.decision.windows import Windows


@pytest.fixture
def episodes():
    return make_episodes([1, 7, 3, 12])


def cut_plainly(episodes, episode, start, context, padding):
    """A window as kzl/decision-transformer's get_batch cuts it, or padded on the right as thuml/Flowformer's does."""
    begin, end = episodes.starts[episode], episodes.starts[episode + 1]
    observations, actions, rewards = (
        getattr(episodes, name)[begin:end] for name in ("observations", "actions", "rewards")
    )
    window = {
        "observations": observations[start : start + context],
        "actions": actions[start : start + context],
        "returns_to_go": np.array([rewards[t:].sum() for t in range(start, min(start + context, len(rewards)))]),
        "timesteps": np.arange(start, min(start + context, len(rewards))),
    }
    count = len(window["timesteps"])
    window["mask"] = np.ones(count, dtype=bool)
    missing = context - count
    before, after = (missing, 0) if padding == "left" else (0, missing)
    fill = {"actions": -10 if episodes.num_actions is None else 0}
    return {
        name: np.pad(one, [(before, after)] + [(0, 0)] * (one.ndim - 1), constant_values=fill.get(name, 0))
        for name, one in window.items()
    }


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("context", [1, 5, 20])
def test_windows_are_those_of_plain_loops(padding, context, discrete):
    episodes = make_episodes([1, 7, 3, 12], discrete)
    windows = Windows(episodes, context, padding)
    pairs = [(episode, start) for episode, length in enumerate(episodes.lengths) for start in range(length)]
    assert len(windows) == len(pairs) == 23
    together = windows.__getitems__(range(23))
    for index, (episode, start) in enumerate(pairs):
        wanted = cut_plainly(episodes, episode, start, context, padding)
        assert together.keys() == wanted.keys()
        for name, values in wanted.items():
            np.testing.assert_allclose(together[name][index], values, rtol=1e-6, err_msg=f"{index}: {name}")
            np.testing.assert_array_equal(together[name][index], windows[index][name])
    assert {name: one.dtype for name, one in together.items()} == {
        "observations": np.float32, "actions": np.int64 if discrete else np.float32, "returns_to_go": np.float32,
        "timesteps": np.int64, "mask": np.bool_,
    }  # fmt: skip


def test_loader_makes_batches_with_one_call_for_each(episodes):
    windows, form = Windows(episodes, 5), DecisionFormat.fit(episodes, context=5)
    batches = list(DataLoader(windows, 10, collate_fn=form.collate))
    assert [len(batch["mask"]) for batch in batches] == [10, 10, 3]
    one_by_one = form.collate([windows[index] for index in range(10)])
    for name, values in batches[0].items():
        torch.testing.assert_close(values, one_by_one[name], rtol=0, atol=0)


def test_batch_is_scaled(episodes):
    form = DecisionFormat.fit(episodes, context=5, return_scale=10.0, max_timestep=6)
    windows = Windows(episodes, 5)
    raw, batch = windows.__getitems__(range(23)), form.collate(windows.__getitems__(range(23)))
    mean, std = episodes.observations.mean(axis=0), episodes.observations.std(axis=0) + 1e-6
    torch.testing.assert_close(batch["observations"], torch.tensor((raw["observations"] - mean) / std))
    torch.testing.assert_close(batch["returns_to_go"], torch.tensor(raw["returns_to_go"] / 10))
    torch.testing.assert_close(batch["actions"], torch.tensor(raw["actions"]))
    assert batch["timesteps"].max() == 5
    assert raw["timesteps"].max() == 11


def test_windows_outside_are_refused(episodes):
    windows = Windows(episodes, 5)
    np.testing.assert_array_equal(windows[-1]["observations"], windows[22]["observations"])
    for index in (23, -24):
        with pytest.raises(IndexError, match=str(index)):
            windows[index]
    with pytest.raises(ValueError, match="context must be at least 1"):
        Windows(episodes, 0)
    with pytest.raises(ValueError, match="padding must be one of right, left, got 'middle'"):
        Windows(episodes, 5, "middle")  # pyright: ignore[reportArgumentType]


def test_trials_have_the_same_seeds_for_every_target(episodes):
    trials = Trials.of([3600, 1800], 3, seed=2)
    assert list(trials) == [Trial(t, s) for t in (3600.0, 1800.0) for s in (102, 103, 104)]
    batch = DecisionFormat.fit(episodes).collate(list(trials))
    assert batch["targets"].tolist() == [3600.0] * 3 + [1800.0] * 3
    assert batch["seeds"].tolist() == [102, 103, 104] * 2
    for targets, count in (([], 3), ([1.0], 0)):
        with pytest.raises(ValueError, match="expected targets"):
            Trials.of(targets, count)
