"""ImageNet's recipes: what was published, steps on any number of devices, and whole runs on made images."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from flowformer.cli import main
from flowformer.common.errors import DataError
from flowformer.recipes import create_recipe, list_recipes
from flowformer.tasks.images import imagenet
from flowformer.training.fit import evaluate, load, train
from flowformer.training.module import TaskModule

RECIPES = [name for name in list_recipes() if name == "images/own" or name.startswith("imagenet/")]
TINY = {
    "model": "flowformer_vision_micro", "image_size": 32, "batch_size": 4, "step_images": 8, "epochs": 2,
    "warmup_epochs": 1, "workers": 0, "accelerator": "cpu", "drop_path": 0.3, "erasing": 0.5,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Red and blue noise: 21 images to train on, one of which cannot be read, and 9 to validate with, one likewise."""
    root, generator = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 10), ("val", 4)):
        for name, channel in (("blue", 2), ("red", 0)):
            (root / split / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.integers(0, 100, (30 + number, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 120
                Image.fromarray(pixels).save(root / split / name / f"{number}.png")
    for name in ("train/red/broken.jpg", "val/blue/broken.jpg"):
        (root / name).write_text("no image")
    return str(root)


def run(folder, resume=False, **fields):
    recipe = create_recipe("imagenet/flowformer", **{**TINY, **fields})
    return recipe, train(recipe, folder, resume=resume, command="the command", console=Console(quiet=True))


def records(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in lines]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder, *run(folder, data=images)


# ----------------------------------------------------------------------------------------------------------- published


def test_every_recipe_has_its_published_row():
    rows = (*imagenet.PUBLISHED, "deit-tiny-mobile", "deit-small-mobile")
    assert set(RECIPES) == {"images/own", *(f"imagenet/{row}" for row in rows)}

    class All:
        published = imagenet.PUBLISHED

    for name in RECIPES:
        if name == "images/own":
            assert create_recipe(name).published_table() is None
            continue
        row = name.removeprefix("imagenet/")
        assert create_recipe(name).published(All) == imagenet.PUBLISHED.get(row), name


@pytest.mark.parametrize(
    ("name", "fields", "row"),
    [
        ("flowformer", {"attention": "softmax"}, "softmax"),
        ("flowformer", {"attention": None}, "flowformer"),
        ("softmax", {"attention": "flow"}, "flowformer"),
        ("flowformer", {"attention": "aft_simple"}, ""),
        ("flowformer", {"attention": "yoso"}, "yoso"),
        ("yoso", {"attention_options": {"num_hashes": 8}}, ""),
        ("flowformer", {"attention": "soft"}, ""),  # of series: its landmarks are not of patches
        ("soft", {"attention": "performer"}, ""),
        ("flowformer", {"attention_options": {"competition": None}}, ""),
        ("flowformer", {"image_size": 256}, ""),
        ("flowformer", {"patch_size": 8}, ""),
        ("flowformer", {"model": "flowformer_vision_tiny"}, ""),
        ("aft-conv-small-11-384", {"model": "aft_conv_small_15_384"}, "aft-conv-small-15-384"),
        ("aft-conv-small-11-384", {"attention": "flow"}, ""),
        ("aft-conv-transfer", {"image_size": 224}, ""),
        ("aft-conv-transfer", {"learning_rate": 1e-4}, "aft-conv-transfer"),
    ],
)
def test_row_of_a_changed_recipe(name, fields, row):
    assert create_recipe(f"imagenet/{name}", **fields).row == row


def test_published_settings():
    ours, deit = create_recipe("imagenet/flowformer"), create_recipe("imagenet/aft-full-small")
    assert (ours.learning_rate, ours.batches_of_a_step * ours.batch_size) == (5e-4 * 768 / 512, 768)
    assert (deit.learning_rate, deit.batches_of_a_step * deit.batch_size) == (5e-4 * 1024 / 512, 1024)
    shared = ("optimizer", "epochs", "weight_decay", "min_learning_rate", "warmup_learning_rate", "warmup_epochs",
              "mixup", "cutmix", "label_smoothing", "rand_augment", "schedule")  # fmt: skip
    values = ["adamw", 300, 0.05, 1e-5, 1e-6, 5, 0.8, 1.0, 0.1, "rand-m9-mstd0.5-inc1", "cosine"]
    for recipe in (ours, deit):
        assert [getattr(recipe, name) for name in shared] == values
    own = ("clip_grad_norm", "drop_path", "erasing", "repeats")
    assert [getattr(ours, name) for name in own] == [1.0, 0.2, 0.0, 1]
    assert [getattr(deit, name) for name in own] == [None, 0.1, 0.25, 3]


@pytest.mark.parametrize("name", [name for name in RECIPES if "deit" in name or "aft" in name])
def test_models_are_those_of_their_names(name):
    recipe = create_recipe(name)
    if name == "imagenet/aft-conv-transfer":
        assert (recipe.model, recipe.image_size) == ("deit_base_patch16_384", 384)
        return
    words = name.removeprefix("imagenet/").replace("aft-full", "aft_full").replace("-", "_")
    size = "tiny" if "tiny" in words else "small"
    expected = f"deit_{size}_aft_full" if "aft_full" in words else words
    softmax = words.endswith("softmax")
    assert recipe.model == (f"deit_{size}_flow" if softmax else expected)
    assert recipe.attention == ("softmax" if softmax else None)


def test_soft_has_landmarks_of_patches():
    with torch.device("meta"):
        model = create_recipe("imagenet/soft").build_model(imagenet.ImageNetFormat(("a", "b"), 224))
    attentions = [[block.attention for block in stage.blocks] for stage in model.stages]
    assert [len(of_stage) for of_stage in attentions] == [3, 3, 10, 3]
    for of_stage, ratio in zip(attentions, (8, 4, 2), strict=False):
        for attention in of_stage:
            assert (attention.ratio, attention.own["value_conv"], attention.num_heads) == (ratio, ratio + 1, 12)
    assert {type(attention).__name__ for attention in attentions[3]} == {"SoftmaxAttention"}


# ---------------------------------------------------------------------------------------------------- steps and devices


@pytest.mark.parametrize(("devices", "batches"), [(1, 8), (2, 4), (4, 2), (8, 1)])
def test_step_is_of_as_many_images_on_any_devices(devices, batches):
    for name in ("imagenet/flowformer", "imagenet/aft-full-tiny"):
        assert create_recipe(name, devices=devices).batches_of_a_step == batches


def test_six_devices_want_the_published_batch():
    with pytest.raises(ValueError, match=r"step_images 768 is not a multiple of batch_size 96 on 6 .*--batch-size 64"):
        create_recipe("imagenet/flowformer", devices=6)
    assert create_recipe("imagenet/flowformer", devices=6, batch_size=128).batches_of_a_step == 1
    assert create_recipe("imagenet/flowformer", devices=6, accumulate=2).batches_of_a_step == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"batch_size": 3, "accumulate": 1}, "batch_size must be even, since images are mixed in pairs, got 3"),
        ({"devices": 5}, "not a multiple of batch_size 96 on 5 devices; or pass --accumulate"),
        ({"accumulate": -1}, "accumulate must be at least 1, or None, got -1"),
        ({"mixup": -0.1}, "mixup must be above 0, or None, got -0.1"),
        ({"erasing": 1.1}, "erasing must be from 0 to 1, got 1.1"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"image_size": 0}, "image_size must be at least 1, got 0"),
        ({"precision": "8-mixed"}, "precision must be one of auto, 32-true"),
    ],
)
def test_values_that_mean_nothing(fields, message):
    with pytest.raises(ValueError, match=message):
        create_recipe("imagenet/flowformer", **fields)


def test_odd_batches_without_mixing():
    assert create_recipe("imagenet/flowformer", batch_size=3, mixup=None, cutmix=None).batches_of_a_step == 256


@pytest.mark.parametrize(
    ("gpu", "fields", "used"),
    [
        (True, {}, "16-mixed"),
        (True, {"accelerator": "cpu"}, "32-true"),
        (True, {"precision": "32-true"}, "32-true"),
        (False, {}, "32-true"),
        (False, {"precision": "bf16-mixed"}, "bf16-mixed"),
    ],
)
def test_precision_is_that_of_the_machine(monkeypatch, gpu, fields, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert create_recipe("imagenet/flowformer", **fields).used_precision == used


def test_data_must_be_named():
    with pytest.raises(ValueError, match="imagenet/softmax requires --data DIR: images as folders"):
        create_recipe("imagenet/softmax").build_task()


# ---------------------------------------------------------------------------------------------------------- whole runs


def test_run(finished, images):
    folder, _, result = finished
    found = records(folder)
    assert [record["epoch"] for record in found] == [0, 1, 2]
    assert set(found[2]) == {"epoch", "train/loss", "test/loss", "test/accuracy", "test/top5"}
    assert all(record["test/top5"] == 1 for record in found)
    # Eighths: the ninth image cannot be read.
    assert all((8 * record["test/accuracy"]) % 1 == 0 for record in found)
    assert result["data"]["source"] == (
        f"{images}/train: 21 images of 2 classes in folders by class, 1 left out; "
        f"{images}/val: 9 images of 2 classes in folders by class, 1 left out"
    )
    honest = result["protocols"]["honest"]
    assert (honest["metric"], honest["published"]) == ("test top-1 accuracy, percent", None)
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * 3  # of 5 batches in pairs, the last alone
    assert json.loads((folder / "format.json").read_text())["classes"] == ["blue", "red"]


def test_it_is_evaluated_again(finished):
    folder, recipe, result = finished
    model, form = load(recipe, folder)
    assert form.augmentation is None
    values = evaluate(recipe, recipe.build_task(), model)
    assert 100 * values["test/accuracy"] == result["protocols"]["honest"]["value"]
    assert values["test/top5"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_interrupted_run_resumes_to_the_same_numbers(finished, images, tmp_path, monkeypatch, workers):
    step = TaskModule.training_step

    def interrupted(self, batch, index):
        if self.current_epoch == 1 and index == 2:
            raise KeyboardInterrupt
        return step(self, batch, index)

    monkeypatch.setattr(TaskModule, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, data=images, workers=workers)
    monkeypatch.undo()
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1]
    recipe, _ = run(tmp_path, resume=True, data=images, workers=workers)
    assert records(tmp_path) == records(finished[0])
    one, other = (load(recipe, folder)[0].state_dict() for folder in (tmp_path, finished[0]))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_own_pictures_by_command(images, tmp_path, capsys):
    small = ["--epochs", "1", "--batch-size", "4", "--image-size", "32", "--workers", "0", "--accelerator", "cpu"]
    # A folder of classes alone: a part is held out.
    words = ["train", "images/own", "--data", f"{images}/train", "--out", str(tmp_path / "run"), *small]
    assert main([*words, "--test-fraction", "0.3"]) == 0
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["data"]["source"].startswith(f"{images}/train: 15 images of 2 classes")
    assert result["protocols"]["honest"]["published"] is None
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--data", f"{images}/train"]) == 0
    shown = capsys.readouterr().out
    assert f"{result['protocols']['honest']['value']:.2f}" in shown
    assert main(["predict", str(tmp_path / "run"), f"{images}/val"]) == 0
    rows = list(csv.reader(capsys.readouterr().out.splitlines()))
    assert rows[0] == ["picture", "label", "p_blue", "p_red"]
    assert len(rows) == 1 + 8


def test_own_pictures_with_a_part_to_test_on(images, tmp_path):
    made = create_recipe("images/own", data=images, image_size=32, workers=0)
    task = made.build_task()
    assert (len(task.train), len(task.test)) == (21, 9)
    with pytest.raises(ValueError, match="test_fraction must be above 0 and below 1, got 1"):
        create_recipe("images/own", test_fraction=1)
    # ImageNet's recipes hold nothing out by themselves.
    with pytest.raises(DataError, match="expected a train and a val set"):
        create_recipe("imagenet/flowformer", data=f"{images}/train").build_task()


def test_validation_part_chooses_the_epoch(images, tmp_path):
    _, result = run(tmp_path, data=images, validation_fraction=0.2, epochs=1)
    assert "on the validation set" in result["protocols"]["honest"]["selection"]
    assert "validation/top5" in records(tmp_path)[1]


@pytest.mark.slow
def test_two_devices_share_a_run(images, tmp_path):
    """Lightning starts the command anew for the second; what comes of it is one run, which can be resumed."""
    fields = {**TINY, "devices": 2, "workers": 1, "data": images, "out": tmp_path / "run"}
    options = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    command = [str(Path(sys.executable).with_name("flowformer")), "train", "imagenet/flowformer", *options]
    for words in ([], ["--resume"]):
        subprocess.run([*command, *words], check=True, timeout=600)
    assert [record["epoch"] for record in records(tmp_path / "run")] == [0, 1, 2]
    checkpoint = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2 * 2  # of 21 images two batches of 4 on each, every one a step of 8


# ------------------------------------------------------------------------------------------------------------ transfer


TRANSFER = {
    "model": "vit_tiny_patch16_224", "attention_options": {"num_heads": 4, "kernel_size": [3, 3]}, "batch_size": 8,
    "step_images": 8, "epochs": 1, "warmup_epochs": 0, "image_size": 32, "workers": 0, "accelerator": "cpu",
}  # fmt: skip


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    import timm

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save({"model": timm.create_model("vit_tiny_patch16_224").state_dict()}, path)
    return str(path)


def test_transfer_begins_with_the_weights(images, weights):
    recipe = create_recipe("imagenet/aft-conv-transfer", **TRANSFER, data=images, weights=weights)
    task = recipe.build_task()
    model = recipe.build_model(task.format)
    given = torch.load(weights)["model"]
    now = model.state_dict()
    for name in ("patch_embed.proj.weight", "blocks.3.mlp.fc1.weight", "norm.bias"):
        assert torch.equal(now[name], given[name]), name
    dim = now["patch_embed.proj.bias"].shape[0]
    values = given["blocks.0.attn.qkv.weight"][2 * dim :]
    assert torch.equal(now["blocks.0.attn.attention.v_proj.weight"], values)
    assert not {"pos_embed", "cls_token"} & set(now)
    assert now["head.weight"].shape == (2, dim)
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 2)


def test_model_of_a_run_needs_no_weights(images, weights, monkeypatch):
    import timm

    recipe = create_recipe("imagenet/aft-conv-transfer", **TRANSFER, data=images, weights="gone.pth")
    form = recipe.read_format(recipe.build_task().format.to_json())
    made, asked = timm.create_model, []
    monkeypatch.setattr(
        timm, "create_model", lambda *words, **options: asked.append(options) or made(*words, **options)
    )
    recipe.build_model(form)
    assert [options["pretrained"] for options in asked] == [False]


@pytest.mark.slow
def test_transfer_runs(images, weights, tmp_path):
    recipe = create_recipe("imagenet/aft-conv-transfer", **TRANSFER, data=images, weights=weights)
    train(recipe, tmp_path, console=Console(quiet=True))
    assert [record["epoch"] for record in records(tmp_path)] == [0, 1]
    load(create_recipe("imagenet/aft-conv-transfer", **TRANSFER, data=images), tmp_path)


def test_weights_that_do_not_fit(images, tmp_path):
    recipe = create_recipe("imagenet/aft-conv-transfer", **TRANSFER, data=images, weights=str(tmp_path / "a.pth"))
    form = recipe.build_task().format
    with pytest.raises(ValueError, match=r"a.pth: cannot read weights"):
        recipe.build_model(form)
    torch.save({"model": {"norm.weight": torch.zeros(192)}}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a.pth: \d+ missing or unexpected weights: cls_token"):
        recipe.build_model(form)


def test_model_that_timm_does_not_have(images):
    recipe = create_recipe("imagenet/aft-conv-transfer", **{**TRANSFER, "model": "vit_of_mine"}, data=images)
    with pytest.raises(ValueError, match=r"timm cannot create vit_of_mine: .*--weights FILE"):
        recipe.build_model(recipe.build_task().format)
