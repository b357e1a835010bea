"""Commands for models that act: collect, evaluate and play, with a run trained on what collect recorded."""

import json

import pytest

from flowformer import cli
from flowformer.tasks.decision.files import read_episodes

ENVIRONMENT = "acting_environment:Walk-v0"
MODULE = """
import gymnasium, numpy as np
from gymnasium.spaces import Box, Discrete


class Walk(gymnasium.Env):
    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space, action_space = Box(-9, 9, (2,), np.float32), Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        self.place[0] += 2 * action - 1
        return self.place.copy(), float(action), bool(abs(self.place[0]) > 4), False, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


gymnasium.register("Walk-v0", "acting_environment:Walk", max_episode_steps=8)


def up(observation):
    return 1
"""


def run(capsys, *words):
    capsys.readouterr()
    status = cli.main([str(word) for word in words])
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("acting")
    (folder / "acting_environment.py").write_text(MODULE, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder


@pytest.fixture(scope="module")
def trained(place):
    data = place / "data.hdf5"
    assert cli.main(["collect", ENVIRONMENT, "--policy", "random", "--episodes", "8", "--out", str(data)]) == 0
    sizes = ["--dim", "8", "--num-layers", "1", "--num-heads", "1", "--steps", "2"]
    episodes = ["--episodes", "1", "--test-episodes", "1", "--targets", "6,3"]
    words = [
        "train",
        "decision/own",
        "--data",
        str(data),
        "--env",
        ENVIRONMENT,
        *sizes,
        *episodes,
        "--out",
        str(place / "run"),
    ]
    assert cli.main(words) == 0
    return place / "run"


def test_what_a_function_does_is_recorded(place, capsys):
    files = [place / "up-v0", place / "up.hdf5"]
    outs = [word for file in files for word in ("--out", file)]
    status, out, err = run(capsys, "collect", ENVIRONMENT, "--policy", "acting_environment:up", "--episodes", 3, *outs)
    assert (status, err) == (0, "")
    assert "3 episodes" in out
    assert f"The data is in {files[0]}, {files[1]}" in out
    for file in files:
        assert (read_episodes(file).actions == 1).all()
    status, _, err = run(capsys, "collect", ENVIRONMENT, "--policy", "random", "--episodes", 1, "--out", files[0])
    assert (status, err) == (2, f"flowformer: {files[0]} is not empty: pass --out for a new folder\n")


def test_a_run_is_evaluated_without_its_data(trained, place, capsys):
    (place / "data.hdf5").rename(place / "moved.hdf5")
    status, out, err = run(
        capsys, "evaluate", trained, "--env", ENVIRONMENT, "--episodes", 2, "--out", place / "found.json"
    )
    assert status == 0, err
    assert "window of 20 steps, seeds 102 to 103" in out or "window of 20 steps, seeds 101 to 102" in out
    _, state, _ = run(
        capsys, "evaluate", trained, "--env", ENVIRONMENT, "--episodes", 2, "--evaluation", "recurrent", "--workers", 1
    )
    assert state.splitlines()[1:] == out.splitlines()[1:]  # episodes are shorter than the window
    assert len(json.loads((place / "found.json").read_text())["targets"]) == 2


def test_the_data_of_a_run_is_recorded(trained, place, capsys):
    words = ("--policy", trained, "--random", "1:0", "--episodes", 2, "--target", 5, "--out", place / "own-v1")
    status, _, err = run(capsys, "collect", ENVIRONMENT, *words)
    assert status == 0, err
    metadata = json.loads((place / "own-v1" / "data" / "metadata.json").read_text())
    assert metadata["algorithm_name"] == f"{trained}, asked for 5"


def test_a_film_of_a_run(trained, place, capsys):
    status, out, err = run(capsys, "play", trained, "--env", ENVIRONMENT, "--out", place / "a.gif", "--target", 4)
    assert status == 0, err
    assert "target 4, seed 10" in out
    assert (place / "a.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "RUN", "--env", "CartPole-v1"], "CartPole-v1 has observations of 4 values and 2 actions"),
        (["evaluate", "RUN", "--env", "Hopper-v3"], "Hopper-v3 needs mujoco-py"),
        (["evaluate", "RUN", "--evaluation", "all"], "invalid choice: 'all'"),
        (["evaluate", "RUN", "--episodes", "0"], "--episodes must be at least 1, got 0"),
        (["evaluate", "RUN", "--data", "x"], "--data does not apply to RUN; its options are --env, --target"),
        (["play", "RUN", "--out", "a.gif"], "module is imported only if you ask: pass --env acting_environment:Walk"),
        (["play", "RUN", "--env", "ENV", "--out", "a.avi"], "a.avi: films are written as .gif or .mp4"),
        (
            ["collect", "CartPole-v1", "--policy", "random", "--target", "5", "--episodes", "1", "--out", "b"],
            "--target has no effect with --policy random",
        ),
        (
            ["collect", "CartPole-v1", "--policy", "random", "--episodes", "1", "--out", "b", "--out", "b/c.hdf5"],
            "are the same, or one is within the other",
        ),
        (["play", "nowhere"], "nowhere is not the folder of a run"),
        (["predict", "RUN", "x"], "does not apply to RUN, whose data is decisions; available: evaluate, play"),
        (
            ["collect", "CartPol-v1", "--policy", "random", "--episodes", "1", "--out", "b"],
            "did you mean 'CartPole-v1'",
        ),
        (
            ["collect", "CartPole-v1", "--policy", "rando", "--episodes", "1", "--out", "b"],
            "is neither random, the folder",
        ),
        (["collect", "CartPole-v1", "--policy", "sb3:no.zip", "--episodes", "1", "--out", "b"], "no.zip: No such file"),
        (["collect", "CartPole-v1", "--policy", "json:up", "--episodes", "1", "--out", "b"], "json has no function up"),
        (
            ["collect", "CartPole-v1", "--policy", "random", "--episodes", "0", "--out", "b"],
            "must be at least 1, got 0",
        ),
        (
            ["collect", "CartPole-v1", "--policy", "random", "--random", "2", "--episodes", "1", "--out", "b"],
            "shares must be from 0 to 1",
        ),
    ],
)
def test_what_cannot_be_done(words, message, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(capsys, *[{"RUN": str(trained), "ENV": ENVIRONMENT}.get(word, word) for word in words])
    assert status == 2
    assert message.replace("RUN", str(trained)) in err
    assert list(tmp_path.iterdir()) == []
