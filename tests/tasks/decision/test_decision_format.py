"""The format of decisions."""

import json

import numpy as np
import pytest
import torch
from decision_writers import make_episodes

from flowformer.tasks.decision.format import DecisionFormat
from flowformer.tasks.decision.windows import Windows


@pytest.mark.parametrize("discrete", [False, True])
def test_statistics_are_those_of_all_steps(discrete, monkeypatch):
    monkeypatch.setattr("flowformer.tasks.decision.format._PIECE", 7)
    episodes = make_episodes([9, 20], discrete, environment="Own-v1")
    form = DecisionFormat.fit(episodes, context=3, targets=(5.0, 2.5))
    np.testing.assert_allclose(form.mean, episodes.observations.mean(axis=0, dtype=np.float64))
    np.testing.assert_allclose(form.std, episodes.observations.std(axis=0, dtype=np.float64) + 1e-6)
    assert (form.observation_dim, form.action_dim, form.num_actions) == (
        4,
        None if discrete else 2,
        3 if discrete else None,
    )
    assert (form.environment, form.context, form.targets) == ("Own-v1", 3, (5.0, 2.5))
    assert DecisionFormat.fit(episodes, environment="Own-v2").environment == "Own-v2"


def test_standardised_observations_have_mean_0_and_deviation_1():
    episodes = make_episodes([2000])
    scaled = DecisionFormat.fit(episodes).standardise(episodes.observations)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(scaled.std(axis=0), 1, atol=1e-4)


def test_constant_observation_stays_finite():
    episodes = make_episodes([50])
    episodes.observations[:, 1] = 1e6
    assert np.isfinite(DecisionFormat.fit(episodes).standardise(episodes.observations)).all()


@pytest.mark.parametrize(
    ("low", "high", "wanted"),
    [
        (None, None, ((-1, -3), (2, 1))),  # what is not known is -1 and 1, or what was seen
        ((-np.inf, -1), (np.inf, 1), ((-1, -3), (2, 1))),
        ((-4, -4), (4, 2), ((-4, -4), (4, 2))),
    ],
)
def test_bounds_of_actions_become_minus_1_and_1(low, high, wanted):
    episodes = make_episodes([50], action_low=low, action_high=high)
    episodes.actions[:2] = [[2, 0.5], [0.5, -3]]
    form = DecisionFormat.fit(episodes)
    assert (form.action_low, form.action_high) == wanted
    bounds = np.array(wanted)
    np.testing.assert_allclose(form.scale_actions(bounds), [[-1, -1], [1, 1]], atol=1e-6)
    there = form.scale_actions(episodes.actions)
    assert np.abs(there).max() <= 1 + 1e-6
    np.testing.assert_allclose(form.unscale_actions(there), episodes.actions, atol=1e-6)
    batch = form.collate(Windows(episodes, 1).__getitems__(range(50)))
    torch.testing.assert_close(batch["actions"][:, 0], torch.from_numpy(there))


def test_actions_within_minus_1_and_1_stay_as_they_are():
    episodes = make_episodes([50])
    form = DecisionFormat.fit(episodes)
    assert form.scale_actions(episodes.actions) is episodes.actions
    assert form.unscale_actions(episodes.actions) is episodes.actions
    discrete = make_episodes([50], True)
    assert DecisionFormat.fit(discrete).unscale_actions(discrete.actions) is discrete.actions


@pytest.mark.parametrize("discrete", [False, True])
def test_json_is_read_back(discrete):
    form = DecisionFormat.fit(make_episodes([9], discrete), environment="Own-v1", targets=(5.0,), padding="left")
    assert DecisionFormat.from_json(json.loads(json.dumps(form.to_json()))) == form
    assert DecisionFormat.from_json({**form.to_json(), "targets": []}).targets == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"environment": 3}, "environment must be a text, got 3"),
        ({"mean": [0.0]}, "1 means and 4 deviations"),
        ({"std": [1.0, 1.0, 0.0, 1.0]}, "std must be a finite number above 0"),
        ({"action_low": None}, "action_low must be a list"),
        ({"action_low": [1.0, 1.0]}, "low must be below high"),
        ({"action_low": [-1.0]}, "as many bounds action_low as action_high"),
        ({"num_actions": 0}, "num_actions must be a whole number, at least 1"),
        ({"context": 0}, "context must be"),
        ({"return_scale": 0}, "return_scale must be"),
        ({"padding": "middle"}, "padding must be one of right, left"),
    ],
)
def test_other_json_is_refused(change, message):
    values = DecisionFormat.fit(make_episodes([9])).to_json()
    with pytest.raises(ValueError, match=message):
        DecisionFormat.from_json({**values, **change})


def test_empty_batch_is_refused():
    with pytest.raises(ValueError, match="at least one window or trial"):
        DecisionFormat.fit(make_episodes([9])).collate([])
