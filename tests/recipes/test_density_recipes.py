"""Recipes of densities: the published models, settings and numbers, and runs from the command line to the picture."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from flowformer import cli
from flowformer.recipes import create_recipe, find_recipe, list_recipes
from flowformer.recipes.density import SeededRounds
from flowformer.tasks.images import density
from flowformer.tasks.images.density import DensityTask, PixelImages
from flowformer.tasks.images.pixels import PixelFormat
from flowformer.training.fit import train
from flowformer.training.module import TaskModule
from flowformer.training.order import RoundSampler

CIFAR = ["aft-local-12", "aft-local-24", "aft-local-24-free", "aft-simple", "transformer-12", "transformer-24"]
TINY = {
    "num_layers": 1, "dim": 16, "ffn_dim": 16, "batch_size": 8, "steps": 12, "eval_every": 4, "warmup_steps": 3,
    "accelerator": "cpu", "shift": 2, "flip": True,
}  # fmt: skip


def run(folder, resume=False, **fields):
    recipe = create_recipe("density/digits", **{**TINY, **fields})
    return train(recipe, folder, resume=resume, command="the command", console=Console(quiet=True))


def untimed(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    return folder, run(folder)


@pytest.fixture(scope="module", autouse=True)
def few_digits():
    """Few enough to evaluate in no time."""
    split = density.split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(density, "split", lambda images, tested: split(images[:120], min(tested, 40)))
        yield


def test_all_recipes_are_there():
    assert [name for name in list_recipes() if name.startswith("density/")] == [
        *(f"density/{row}" for row in CIFAR[:3]), "density/aft-simple", "density/digits",
        "density/transformer-12", "density/transformer-24",
    ]  # fmt: skip
    for row in CIFAR:
        assert len(find_recipe(f"density/{row}").func.__doc__) > 80


def task_of(published):
    form = PixelFormat(1, 1, 1, 2)
    data = PixelImages(np.zeros((1, 1, 1, 1), np.uint8))
    return DensityTask("made", data, data, form, published)


@pytest.mark.parametrize(
    ("row", "bits"),
    [
        ("aft-local-12", 2.80), ("aft-local-24", 2.74), ("aft-local-24-free", 2.84), ("aft-simple", 2.89),
        ("transformer-12", 2.88), ("transformer-24", 2.86),
    ],
)  # fmt: skip
def test_published_values_stand_beside_their_own_row(row, bits):
    recipe, whole = create_recipe(f"density/{row}"), task_of(density.PUBLISHED)
    assert recipe.row == row
    assert recipe.published(whole) == bits
    assert recipe.published(task_of({})) is None
    assert recipe.published_table()[1][row] == bits
    for change in ({"attention": "mobile"}, {"dim": 128}, {"positions": None}, {"num_heads": 8}):
        assert create_recipe(f"density/{row}", **change).published(whole) is None
    other = create_recipe(f"density/{row}", attention="aft_local", attention_options={"window": 9})
    assert other.published(whole) is None


@pytest.mark.parametrize(
    ("row", "layers", "dim", "heads", "attention"),
    [
        ("aft-local-12", 12, 512, 1, "AFTLocal"), ("aft-local-24", 24, 256, 1, "AFTLocal"),
        ("aft-local-24-free", 24, 256, 1, "AFTLocal"), ("aft-simple", 24, 256, 1, "AFTSimple"),
        ("transformer-12", 12, 512, 4, "SoftmaxAttention"), ("transformer-24", 24, 256, 2, "SoftmaxAttention"),
    ],
)  # fmt: skip
def test_models_are_the_published_ones(row, layers, dim, heads, attention):
    recipe = create_recipe(f"density/{row}")
    with torch.device("meta"):
        model = recipe.build_model(PixelFormat(32, 32, 3))
    block = model.decoder.layers[0]
    assert (len(model.decoder.layers), model.dim, block.attention.num_heads) == (layers, dim, heads)
    assert type(block.attention).__name__ == attention
    assert block.linear1.out_features == 4 * dim
    assert block.norm_first
    assert (model.vocab_size, model.position.num_embeddings) == (256, 3_072)
    if "local" in row:
        free = row.endswith("free")
        assert (block.attention.window, block.attention.position_dim) == (256, None if free else 64)
        # Table 3 has 9.6 and 0.6 million parameters a layer.
        size = sum(one.numel() for one in block.attention.parameters()) / 1e6
        assert dim != 256 or size == pytest.approx(9.7 if free else 0.66, abs=0.02)


def test_settings_are_the_published_ones():
    recipe = create_recipe("density/aft-local-24")
    images = recipe.batch_size * recipe.accumulate
    assert images == 128
    assert recipe.steps * images == 200 * 50_000
    assert recipe.steps == recipe.rounds * recipe.eval_every
    assert (recipe.learning_rate, recipe.schedule, recipe.optimizer) == (3e-3, "inverse-sqrt", "adamw")
    assert (recipe.weight_decay, recipe.decayed, recipe.dropout) == (0.1, "linear", 0.1)
    assert (recipe.flip, recipe.shift) == (True, 10)


def test_seeds_do_not_depend_on_rounds_or_devices():
    def keys(length, rounds, world=1):
        seen = {}
        for rank in range(world):
            sampler = SeededRounds(RoundSampler(7, length, world=world, rank=rank, seed=3))
            for round_ in range(rounds):
                sampler.set_epoch(round_)
                assert len(sampler) == length
                for index, (seed, place) in sampler:
                    seen[place] = (index, seed)
        return seen

    whole = keys(12, 1)
    assert sorted(whole) == list(range(12))
    assert sorted(index for index, _ in list(whole.values())[:7]) == list(range(7))
    assert {seed for _, seed in whole.values()} == {3}
    assert whole == keys(3, 4) == keys(3, 2, world=2)


def test_training_sees_changed_images_and_the_test_does_not():
    recipe = create_recipe("density/digits", **TINY)
    task = recipe.build_task()
    plain = {image.tobytes() for image in task.train.images}
    sampler = recipe.sampler(task.train, 1, 0)
    seen = [task.train[key].tobytes() for key in sampler]
    assert len(seen) == recipe.eval_every * recipe.batch_size
    changed = sum(image not in plain for image in seen)
    assert 0.7 * len(seen) < changed < len(seen)
    assert all(np.array_equal(image, task.test.images[number]) for number, image in enumerate(task.test))


def test_a_run_learns(finished):
    folder, result = finished
    losses = [record["test/loss"] for record in untimed(folder)]
    assert losses[0] == pytest.approx(np.log(17), rel=0.02)
    assert losses[-1] < losses[0] - 0.1
    honest = result["protocols"]["honest"]
    assert honest["metric"] == "test bits per dimension"
    assert honest["value"] == pytest.approx(losses[-1] / np.log(2))
    assert honest["published"] is None


@pytest.mark.parametrize("stop_at", [0, 2])
def test_interrupted_run_resumes_to_the_same_numbers(finished, tmp_path, monkeypatch, stop_at):
    step = TaskModule.training_step

    def interrupted(self, batch, index):
        if self.current_epoch == stop_at and index == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    monkeypatch.setattr(TaskModule, "training_step", step)
    result = run(tmp_path, resume=True)
    assert untimed(tmp_path) == untimed(finished[0])
    assert result["protocols"] == finished[1]["protocols"]


def test_rounds_and_workers_do_not_change_what_is_learned(tmp_path):
    """The random changes of an image are those of its place in the order."""
    fields = {"dropout": 0.0, "num_layers": 1, "steps": 4, "warmup_steps": 0}
    run(tmp_path / "one", eval_every=4, **fields)
    run(tmp_path / "other", eval_every=2, workers=1, **fields)
    assert untimed(tmp_path / "one")[-1]["test/loss"] == untimed(tmp_path / "other")[-1]["test/loss"]


def command(capsys, *words):
    status = cli.main([str(word) for word in words])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_images_are_drawn_from_the_command_line(finished, tmp_path, capsys):
    folder, path = finished[0], tmp_path / "grid.png"
    status, out, _ = command(capsys, "generate", folder, "--out", path, "--count", 3, "--seed", 1)
    assert status == 0
    assert f"3 images in {path}" in out
    with Image.open(path) as file:
        assert (file.mode, file.size) == ("L", (17 * 8, 17 * 8))
        grid = np.asarray(file)
    assert command(capsys, "generate", folder, "--out", path, "--count", 3, "--seed", 1)[0] == 0
    with Image.open(path) as file:
        assert np.array_equal(np.asarray(file), grid)
    assert command(capsys, "generate", folder, "--out", path, "--count", 3, "--seed", 9)[0] == 0
    with Image.open(path) as file:
        assert not np.array_equal(np.asarray(file), grid)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["generate", "RUN"], "images require --out FILE.png, got None"),
        (["generate", "RUN", "--out", "grid.jpg"], "images require --out FILE.png, got grid.jpg"),
        (["generate", "RUN", "--out", "a.png", "--prompt", "x", "--stop", "y"], "--prompt, --stop does not apply to"),
        (["generate", "RUN", "--out", "a.png", "--count", "0"], "--count must be at least 1, got 0"),
        (["export", "RUN", "--to", "hf"], "data is images; available: evaluate, generate"),
        (["train", "density/aft-simple"], "`flowformer data cifar10` downloads it"),
        (["train", "density/aft-simple", "--data", "nowhere"], "nowhere: no such file or folder"),
    ],
)  # fmt: skip
def test_mistakes_are_explained(finished, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path))
    status, _, err = command(capsys, *(finished[0] if word == "RUN" else word for word in words))
    assert status == 2
    assert message in err
    assert not (tmp_path / "a.png").exists()


def test_a_run_of_text_draws_nothing(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be, or not to be " * 20)
    recipe = create_recipe("text/own", file=str(text), steps=1, eval_every=1, num_layers=1, dim=8, accelerator="cpu")
    train(recipe, tmp_path / "run", command="", console=Console(quiet=True))
    words = ["generate", tmp_path / "run", "--out", tmp_path / "grid.png", "--count", 2]
    status, _, err = command(capsys, *words)
    assert status == 2
    assert f"--out, --count does not apply to {tmp_path / 'run'}; its options are --temperature, " in err


def test_a_growing_state_is_announced(tmp_path, capsys, caplog):
    run(tmp_path / "run", attention="softmax", num_heads=1, steps=1, eval_every=1)
    status, _, _ = command(capsys, "generate", tmp_path / "run", "--out", tmp_path / "grid.png", "--count", 1)
    assert status == 0
    assert "softmax remembers every sub-pixel" in caplog.text


def test_images_in_the_form_of_cifar10_go_from_data_to_picture(tmp_path, capsys):
    generator = np.random.default_rng(0)
    data = generator.integers(0, 256, (10, 3072), dtype=np.uint8)
    (tmp_path / "data_batch_1").write_bytes(pickle.dumps({b"data": data, b"labels": [0] * 10}))
    folder = tmp_path / "run"
    status, out, _ = command(
        capsys, "train", "density/aft-simple", "--data", tmp_path, "--out", folder, "--num-layers", 1, "--dim", 8,
        "--ffn-dim", 8, "--steps", 2, "--eval-every", 1, "--batch-size", 2, "--accumulate", 2, "--held-out", 0.3,
        "--accelerator", "cpu",
    )  # fmt: skip
    assert status == 0
    assert "bits per" in out
    result = json.loads((folder / "result.json").read_text())
    assert "3 of its 10 images held out" in result["data"]["source"]
    assert result["protocols"]["honest"]["published"] is None
    assert result["protocols"]["honest"]["value"] == pytest.approx(8, abs=0.1)
    status, out, _ = command(capsys, "generate", folder, "--out", tmp_path / "grid.png", "--count", 2, "--seed", 0)
    assert status == 0
    with Image.open(tmp_path / "grid.png") as file:
        assert (file.mode, file.size) == ("RGB", (2 * 65, 64))


@pytest.mark.slow
def test_jpeg_copies_of_cifar10_go_through_the_pipeline(shared, tmp_path):
    """The pipeline on real pictures. JPEG has changed them, and some are held out: no result on CIFAR-10."""
    data = shared / "data" / "cifar10" / "cifar10_train_20000_jpeg.zip"
    recipe = create_recipe(
        "density/aft-simple", data=str(data), num_layers=1, dim=32, steps=4, eval_every=4,
        batch_size=8, accumulate=1, warmup_steps=2, held_out=0.001, accelerator="cpu",
    )  # fmt: skip
    result = train(recipe, tmp_path / "run", command="", console=Console(quiet=True))
    assert "20 of its 20000 images held out to test with (no test set of CIFAR-10)" in result["data"]["source"]
    assert result["protocols"]["honest"]["published"] is None
    assert result["protocols"]["honest"]["value"] < 8
