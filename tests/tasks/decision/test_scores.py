"""Normalised scores."""

import json

import numpy as np
import pytest

from flowformer.tasks.decision.files import read_episodes
from flowformer.tasks.decision.scores import caution, normalise, reference_of, split_environment


@pytest.mark.parametrize(
    ("name", "family", "version"),
    [
        ("Hopper-v5", "Hopper", 5),
        ("Walker2d-v12", "Walker2d", 12),
        ("Hopper", "Hopper", None),
        ("gymnasium_robotics:Fetch/FetchReach-v2", "FetchReach", 2),
        ("my-env-v1", "my-env", 1),
        ("", "", None),
    ],
)
def test_names_have_a_family_and_a_version(name, family, version):
    assert split_environment(name) == (family, version)


def test_scores_are_those_of_the_published_formula():
    assert normalise(3234.3, "Hopper-v5") == 100
    assert normalise(-20.272305, "hopper-v2") == 0
    np.testing.assert_allclose(
        normalise(np.array([1.629008, 4592.3, 2296.964504]), "Walker2d-v4"), [0, 100, 50], atol=1e-9
    )
    assert normalise(500.0, "CartPole-v1") is None
    assert normalise(500.0, "") is None


def test_references_are_those_of_d4rl(shared):
    published = json.loads((shared / "data" / "rl" / "d4rl_reference_scores.json").read_text())
    for name, maximum in published["REF_MAX_SCORE"].items():
        reference = reference_of(name.partition("-")[0])
        assert reference == (published["REF_MIN_SCORE"][name], maximum)


def test_another_version_is_said_to_be_one():
    said = caution("Hopper-v5")
    assert "Scores in Hopper-v5 are normalised by D4RL's references for Hopper-v3" in said
    assert "not comparable" in said
    assert caution("Hopper")
    assert caution("Hopper-v3") == caution("CartPole-v1") == caution("") == ""


# Rollouts of trained policies in Gymnasium, not D4RL: facts that came with them.
@pytest.mark.parametrize(
    ("name", "score", "episodes", "partial"),
    [
        ("halfcheetah_medium", 48.7, 20, 0),
        ("halfcheetah_mixed", 18.2, 10, 0),
        ("halfcheetah_expert", 91.4, 10, 0),
        ("hopper_medium", 49.5, 46, 15),
        ("hopper_mixed", 7.5, 116, 0),
        ("hopper_expert", 108.1, 10, 344),
    ],
)
def test_scores_of_real_data(name, score, episodes, partial, shared):
    family = "HalfCheetah" if name.startswith("half") else "Hopper"
    found = read_episodes(shared / "data" / "rl" / f"{name}-rollout-v4.hdf5", f"{family}-v4")
    assert round(float(normalise(found.returns.mean(), found.environment) or 0), 1) == score
    assert (len(found), found.partial_steps) == (episodes, partial)
