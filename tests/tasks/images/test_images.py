"""Pictures: preparing and varying them, the two small sets, classifying."""

import numpy as np
import pytest
import torch
from PIL import Image

from flowformer.common.errors import DataError
from flowformer.tasks.images.cifar import LabelledImages
from flowformer.tasks.images.format import ImageFormat, classify
from flowformer.tasks.images.task import ImageTask, hold_out, load_cifar10, load_digits, shift_at_random
from flowformer.tasks.splits import stratify

FORM = ImageFormat(("a", "b"), 4, 3, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))


def made(count=6, classes=2, side=4):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return LabelledImages(images, np.arange(count) % classes)


def test_collate_standardises():
    images = made()
    batch = FORM.collate([images[0], images[3]])
    assert batch["x"].shape == (2, 3, 4, 4)
    expected = (images.images[3, 1, 2] / 255 - np.array([0.5, 0.25, 0.0])) / np.array([0.5, 0.25, 1.0])
    np.testing.assert_allclose(batch["x"][1, :, 1, 2].numpy(), expected, rtol=1e-5)
    assert batch["y"].tolist() == [0, 1]


def test_collate_refuses_what_is_not_prepared():
    with pytest.raises(ValueError, match=r"expected images of shape \(4, 4, 3\), got \(5, 4, 3\)"):
        FORM.collate([(np.zeros((5, 4, 3), np.uint8), 0)])
    with pytest.raises(ValueError, match="got none"):
        FORM.collate([])


def test_format_survives_json():
    assert ImageFormat.from_json(FORM.to_json()) == FORM


@pytest.mark.parametrize("size", [(40, 20), (20, 40), (20, 21), (3, 300), (8, 8)])
@pytest.mark.parametrize("crop", [1.0, 0.8])
def test_prepare_gives_the_centre_of_any_picture(size, crop):
    form = ImageFormat(("a",), 8, crop=crop)
    assert form.prepare(Image.new("RGB", size, (9, 8, 7))).tolist() == [[[9, 8, 7]] * 8] * 8


def test_prepare_crops_the_centre():
    image = Image.new("RGB", (30, 10))
    image.paste((255, 255, 255), (10, 0, 20, 10))
    form = ImageFormat(("a",), 10)
    assert form.prepare(image).min() == 255
    shrunk = ImageFormat(("a",), 5).prepare(image)
    assert shrunk[:, 1:4].min() > 240


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "I;16"])
def test_prepare_takes_any_colours(mode):
    image = Image.new(mode, (6, 6))
    assert FORM.prepare(image).shape == (4, 4, 3)
    grey = ImageFormat(("a",), 4, 1, (0.0,), (1.0,)).prepare(image)
    assert grey.shape == (4, 4, 1)


def test_a_picture_of_the_right_size_stays_as_it_is():
    image = made().images[0]
    assert np.array_equal(FORM.prepare(Image.fromarray(image)), image)


def test_shifts_are_shifts():
    torch.manual_seed(0)
    x = torch.rand(200, 2, 5, 6) + 1
    out = shift_at_random(x, 2)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    seen = set()
    for before, after in zip(padded, out, strict=True):
        found = [
            (row, column)
            for row in range(5)
            for column in range(5)
            if torch.equal(before[:, row : row + 5, column : column + 6], after)
        ]
        assert len(found) == 1
        seen.update(found)
    assert len(seen) == 25


class Seen(torch.nn.Module):
    """Notes what it is given, and votes for class 0."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.inputs = []

    def forward(self, x):
        self.inputs.append(x)
        return torch.tensor([2.0, 0.0]).expand(len(x), 2) + 0 * self.weight


def task(**options):
    images = made()
    return ImageTask("made", images, images, FORM, **options)


def test_pictures_are_varied_in_training_only():
    batch = FORM.collate([made()[index] for index in range(6)])
    varied, model = task(flip=True, crop_padding=1, label_smoothing=0.2), Seen()
    plain = varied.step(model.eval(), batch)
    assert torch.equal(model.inputs[0], batch["x"])
    assert plain["accuracy"].item() == len(batch["y"]) / 2
    logits = torch.tensor([2.0, 0.0]).log_softmax(0)
    assert plain["loss"].item() == pytest.approx(-logits.mean().item())
    torch.manual_seed(0)
    varied.step(model.train(), batch)
    assert not torch.equal(model.inputs[1], batch["x"])


def test_half_of_the_pictures_are_mirrored():
    x = torch.rand(400, 3, 4, 4)
    model = Seen().train()
    torch.manual_seed(0)
    task(flip=True).step(model, {"x": x, "y": torch.zeros(400, dtype=torch.int64)})
    mirrored = (model.inputs[0] == x.flip(-1)).flatten(1).all(1)
    same = (model.inputs[0] == x).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


def test_labels_are_smoothed_in_training():
    batch = {"x": torch.zeros(1, 3, 4, 4), "y": torch.tensor([0])}
    loss = task(label_smoothing=0.2).step(Seen().train(), batch)["loss"].item()
    logits = torch.tensor([2.0, 0.0]).log_softmax(0)
    assert loss == pytest.approx(-(0.9 * logits[0] + 0.1 * logits[1]).item())


def test_a_validation_part_is_of_all_classes():
    images = made(40)
    split = ImageTask("made", images, images, FORM).split_validation(0.25, seed=1)
    assert np.bincount(split.validation.labels).tolist() == [5, 5]
    assert np.bincount(split.train.labels).tolist() == [15, 15]
    assert set(split.evaluated) == {"test", "validation"}


def test_what_is_held_out_is_always_the_same():
    first, second = hold_out(made(40), "ab", 0.2), hold_out(made(40), "ab", 0.2)
    assert np.array_equal(first[1].images, second[1].images)
    assert len(first[0]) == 32
    together = np.concatenate([part.images for part in first]).reshape(40, -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, made(40).images.reshape(40, -1)))


@pytest.mark.parametrize(("fraction", "labels"), [(0.0, [0, 0]), (1.0, [0, 0]), (0.5, [0])])
def test_a_split_that_is_none_is_refused(fraction, labels):
    with pytest.raises(ValueError, match=r"above 0 and below 1|class 'a' has 1 training examples"):
        stratify(np.array(labels), ["a"], fraction, 0)


def test_digits():
    digits = load_digits(test_fraction=0.2)
    assert len(digits.train) + len(digits.test) == 1797
    assert digits.train.images.max() == 255
    batch = digits.format.collate([digits.train[row] for row in range(len(digits.train))])
    assert batch["x"].mean().item() == pytest.approx(0, abs=1e-4)
    assert batch["x"].std().item() == pytest.approx(1, abs=1e-3)


def test_cifar10_is_looked_for_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"CIFAR-10: no cifar-10-python\.tar\.gz in .*170,498,071 bytes"):
        load_cifar10(None, test_fraction=0.1)


def test_classify():
    model = Seen().eval()
    probabilities = classify(model, FORM, list(made(5).images), batch_size=2)
    assert probabilities.shape == (5, 2)
    np.testing.assert_allclose(probabilities[:, 0], 1 / (1 + np.exp(-2.0)), rtol=1e-6)
    assert [len(x) for x in model.inputs] == [2, 2, 1]
