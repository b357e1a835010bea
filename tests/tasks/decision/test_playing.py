"""What the commands evaluate and play do with a model: results as text and JSON, and films."""

import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from decision_environments import RAISES
from PIL import Image

import flowformer
from flowformer.common.errors import DataError, RunError
from flowformer.tasks.decision.format import DecisionFormat
from flowformer.tasks.decision.playing import EvaluationOptions, PlayOptions, table
from flowformer.tasks.decision.rollout import Episode
from flowformer.tasks.decision.simulators import filming
from flowformer.tasks.decision.simulators.environments import find_environment
from flowformer.tasks.protocols import Acts

LINE = "decision_environments:Line-v0"
FORM = DecisionFormat(LINE, (0.0,) * 3, (1.0,) * 3, (-2.0,), (2.0,), context=4, targets=(8.0, 4.0), max_timestep=20)


def track(steps, total, what):
    return steps


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"dim": 8, "num_layers": 1, "num_heads": 1, "max_timestep": 20}
    return flowformer.create_model("flowformer_decision", observation_dim=3, action_dim=1, **sizes).eval()


def evaluate(model, form=FORM, **options):
    options = {"episodes": 3, "env": form.environment or None, **options}
    return "".join(form.evaluate(model, EvaluationOptions(**options), track=track))


def test_a_format_acts():
    assert isinstance(FORM, Acts)


def test_a_table_and_each_episode(model, tmp_path):
    text = evaluate(model, each=True, out=tmp_path / "a.json")
    lines = text.splitlines()
    assert lines[0] == f"{LINE}, window of 4 steps, seeds 101 to 103"
    assert [line.split(":")[0] for line in lines[1:7]] == [
        f"target {target}, seed {seed}" for target in (8, 4) for seed in (101, 102, 103)
    ]
    assert lines[7].split() == ["target", "episodes", "failed", "return", "std", "steps"]
    assert [line.split()[:3] for line in lines[8:]] == [["8", "3", "0"], ["4", "3", "0"], ["all", "6", "0"]]
    found = json.loads((tmp_path / "a.json").read_text())
    assert [part["target"] for part in found["targets"]] == [8.0, 4.0]
    first = found["targets"][0]
    returns = [episode["return"] for episode in first["episodes"]]
    assert first["return_mean"] == pytest.approx(sum(returns) / 3)
    assert f"return {returns[0]:.1f}" in lines[1]


def test_options(model):
    text = evaluate(model, target=(5.0,), seed=7, evaluation="recurrent", max_steps=2, episodes=2)
    assert text.splitlines()[0] == f"{LINE}, recurrent state over the episode, seeds 107 to 108"
    assert text.splitlines()[-1].split() == ["5", "2", "0", *text.splitlines()[-1].split()[3:5], "2.0"]
    with pytest.raises(DataError, match="CartPole-v1 has observations of 4 values and 2 actions"):
        evaluate(model, env="CartPole-v1")
    with pytest.raises(RunError, match="pass --env"):
        evaluate(model, DecisionFormat("", FORM.mean, FORM.std, (-2.0,), (2.0,), targets=(1.0,)))
    with pytest.raises(RunError, match="pass --target"):
        evaluate(model, DecisionFormat(LINE, FORM.mean, FORM.std, (-2.0,), (2.0,)))


def test_what_fails_is_counted(model):
    text = evaluate(model, seed=RAISES - 101)
    said = "2 of 6 episodes failed and count with their return until then; the first: RuntimeError: unstable simulation"
    assert said in text
    assert ["8", "3", "1"] in [line.split()[:3] for line in text.splitlines()]
    with pytest.raises(RunError, match="every episode failed; the first: RuntimeError: unstable simulation"):
        evaluate(model, seed=RAISES - 100, episodes=1)


def test_a_run_has_no_module_imported(model):
    with pytest.raises(RunError, match="imported only if you ask: pass --env decision_environments:Line"):
        evaluate(model, env=None)


@pytest.mark.parametrize(("name", "said"), [("foo", "MUJOCO_GL must be egl, osmesa"), ("osmesa", "was not found")])
def test_a_renderer_that_is_not_there_is_refused(name, said, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", name)
    monkeypatch.setattr(filming, "_has", lambda library: library == "EGL")
    with pytest.raises(DataError, match=said):
        filming.check_film(Path("a.gif"), find_environment("Hopper-v5"))


def test_scores_stand_beside_returns():
    text = table([Episode(3600.0, 1, 3234.3, 1000), Episode(3600.0, 2, -20.272305, 20)], "Hopper-v5")
    assert text.splitlines()[1].split() == ["3600", "2", "0", "1607.0", "1627.3", "50.0", "50.0", "510.0"]


# ------------------------------------------------------------------------------------------------------------- films


def play(model, out, **options):
    return "".join(FORM.play(model, PlayOptions(out=out, env=LINE, **options), track=track))


def test_a_film(model, tmp_path):
    out = tmp_path / "a.gif"
    text = play(model, out, max_steps=9)
    assert "target 8, seed 101: return" in text
    assert f"The film is in {out}" in text
    steps = int(re.search(r"(\d+) steps", text)[1])
    assert steps > 2
    with Image.open(out) as film:
        assert film.size == (30, 20)
        assert film.n_frames == 1 + steps // 2 + steps % 2  # 60 steps a second, 30 frames; and the last step
        assert film.info["duration"] == 30  # of 33 ms, whole hundredths
        film.seek(1)
        assert abs(film.convert("L").getpixel((3, 3)) - 20) <= 2
    play(model, tmp_path / "b.gif", max_steps=9, fps=60)
    with Image.open(tmp_path / "b.gif") as film:
        assert film.n_frames == 1 + steps


def test_a_failure_leaves_no_film(model, tmp_path):
    with pytest.raises(DataError, match=r"Line-v0 failed after 2 steps, and no film is kept: RuntimeError: unstable"):
        play(model, tmp_path / "a.gif", seed=RAISES - 100)
    assert list(tmp_path.iterdir()) == []


def test_films_that_cannot_be_made(model, tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"\.gif or \.mp4, got \.avi"):
        play(model, tmp_path / "a.avi")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="MP4 needs imageio-ffmpeg: pip install imageio-ffmpeg"):
        play(model, tmp_path / "a.mp4")


class Spec:
    entry_point = "gymnasium.envs.mujoco.hopper_v5:HopperEnv"


@pytest.mark.parametrize(("libraries", "chosen"), [(("EGL", "OSMesa"), "egl"), (("OSMesa",), "osmesa")])
def test_how_mujoco_renders(libraries, chosen, tmp_path, monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "")  # so that it is restored
    monkeypatch.delenv("MUJOCO_GL")
    monkeypatch.setattr(filming.ctypes.util, "find_library", lambda name: name if name in libraries else None)
    filming.check_film(tmp_path / "a.gif", Spec())
    assert os.environ["MUJOCO_GL"] == chosen


def test_mujoco_without_a_library(tmp_path, monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(filming.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(DataError, match="EGL or OSMesa, and neither library was found: install libegl1"):
        filming.check_film(tmp_path / "a.gif", Spec())
    monkeypatch.setenv("MUJOCO_GL", "glfw")  # which needs neither
    filming.check_film(tmp_path / "a.gif", Spec())
