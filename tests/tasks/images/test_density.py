"""Images as sequences of sub-pixels: what counts, what is seen, what is drawn."""

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from flowformer.common.errors import DataError
from flowformer.models.language import LanguageModel
from flowformer.tasks.images import cifar, density
from flowformer.tasks.images.density import DensityTask, PixelImages, augment, load_cifar10, load_digits
from flowformer.tasks.images.pixels import START, PixelFormat, sample, write_grid

FORM = PixelFormat(4, 5, 3, 16)
ATTENTIONS = {
    "aft_local": {"window": 7, "position_dim": 4}, "aft_simple": {}, "aft_full": {"position_dim": 4},
    "flow": {}, "linear": {}, "softmax": {},
}  # fmt: skip


def images(count=2, form=FORM, seed=0):
    return np.random.default_rng(seed).integers(0, form.levels, (count, *form.shape), dtype=np.uint8)


def build(attention="aft_local", form=FORM, **options):
    torch.manual_seed(0)
    model = LanguageModel(
        form.levels, dim=16, num_layers=2, num_heads=2, max_length=form.length, dropout=0.0, attention=attention,
        attention_options=ATTENTIONS[attention], **options,
    )  # fmt: skip
    with torch.no_grad():  # far enough from uniform for a difference to be seen
        model.head.weight.mul_(50)
    return model.eval()


def task_of(form, values):
    data = PixelImages(values, form.levels)
    return DensityTask("made", data, data, form)


def test_an_image_is_read_in_raster_order():
    image = np.arange(60, dtype=np.uint8).reshape(4, 5, 3)
    form = replace(FORM, levels=256)
    batch = form.collate([image, image])
    assert batch["targets"][1].tolist() == [int(image[r, c, k]) for r in range(4) for c in range(5) for k in range(3)]
    assert batch["tokens"][1].tolist() == [START, *range(59)]
    assert batch["tokens"].dtype == batch["targets"].dtype == torch.int64
    assert form.length == 60
    assert PixelFormat(32, 32, 3).length == 3072


@torch.no_grad()
@pytest.mark.parametrize("levels", [256, 17])
def test_a_uniform_model_takes_log2_of_the_levels(levels):
    form = replace(FORM, levels=levels)
    model = build(form=form).double()
    torch.nn.init.zeros_(model.head.weight)
    task = task_of(form, images(3, form))
    batch = form.collate(list(task.test.images))
    bits = task.metric.shown(float(task.step(model, batch)["loss"]))
    assert bits == pytest.approx(math.log2(levels), abs=1e-12)
    assert levels != 256 or bits == pytest.approx(8.0, abs=1e-12)


@torch.no_grad()
def test_every_sub_pixel_counts():
    """Bits per dimension are those of the whole image, the first sub-pixel among them, by the number of sub-pixels."""
    model, task = build(), task_of(FORM, images(3))
    batch = FORM.collate(list(task.test.images))
    logs = model(batch["tokens"]).log_softmax(-1).gather(-1, batch["targets"].unsqueeze(-1)).squeeze(-1)
    assert logs.shape == (3, 60)
    bits = -float(logs.double().sum()) / (3 * 60) / math.log(2)
    assert task.metric.shown(float(task.step(model, batch)["loss"])) == pytest.approx(bits, rel=1e-6)
    assert task.size(batch) == 180
    # What the first sub-pixel is costs something, and nothing before it tells.
    first = logs[:, 0]
    other = FORM.collate(list(images(3, seed=1)))
    assert torch.equal(model(other["tokens"])[:, 0], model(batch["tokens"])[:, 0])
    assert (first < -0.01).all()


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_sub_pixel_is_foretold_from_those_before_it(attention):
    model, image = build(attention), images(1)[0]
    before = model(FORM.collate([image])["tokens"])
    for row, column, channel in ((0, 0, 0), (1, 2, 1), (3, 4, 1)):
        changed = image.copy()
        changed[row, column, channel] ^= 1
        after = model(FORM.collate([changed])["tokens"])
        place = (row * 5 + column) * 3 + channel
        assert torch.equal(after[:, : place + 1], before[:, : place + 1])
        assert not torch.equal(after[:, place + 1], before[:, place + 1])  # the next channel of the pixel, say
    changed = image.copy()
    changed[3, 4, 2] ^= 1  # the last one is not seen at all
    assert torch.equal(model(FORM.collate([changed])["tokens"]), before)


@torch.no_grad()
@pytest.mark.parametrize("attention", ATTENTIONS)
def test_what_is_drawn_has_the_probabilities_of_the_parallel_pass(attention):
    model = build(attention).double()
    scores, logits = [], model.logits
    model.logits = lambda hidden: scores.append(logits(hidden)) or scores[-1]
    drawn = sample(model, FORM, 3, seed=5)
    model.logits = logits
    assert drawn.shape == (3, *FORM.shape)
    assert drawn.dtype == np.uint8
    batch = FORM.collate(list(drawn))
    whole = model(batch["tokens"]).log_softmax(-1)
    steps = torch.stack(scores, 1).log_softmax(-1)
    assert steps.shape == whole.shape == (3, 60, 16)
    torch.testing.assert_close(steps, whole, rtol=0, atol=1e-9)
    assert whole.std() > 0.5  # not uniform


def state_sizes(attention):
    model = build(attention)
    sizes, step = [], model.step

    def watched(tokens, state):
        scores, state = step(tokens, state)
        sizes.append(sum(part.numel() for layer in state.layers for part in layer))
        return scores, state

    model.step = watched
    sample(model, FORM, 2, seed=0)
    return sizes


@pytest.mark.parametrize("attention", ["aft_local", "aft_simple", "flow", "linear"])
def test_nothing_grows_with_what_is_drawn(attention):
    sizes = state_sizes(attention)
    assert len(sizes) == FORM.length - 1
    assert len(set(sizes)) == 1


def test_softmax_remembers_every_sub_pixel():
    sizes = state_sizes("softmax")
    assert sizes[-1] > 5 * sizes[5]


def test_drawing_is_a_function_of_the_seed():
    model = build()
    three = sample(model, FORM, 3, seed=7)
    assert np.array_equal(sample(model, FORM, 3, seed=7), three)
    assert np.array_equal(sample(model, FORM, 1, seed=8)[0], three[1])
    assert not np.array_equal(three[0], three[1])
    coldest = sample(model, FORM, 2, temperature=0)
    assert np.array_equal(coldest[0], coldest[1])


def test_progress_is_handed_the_steps():
    seen = []

    def watch(steps):
        for step in steps:
            seen.append(step.shape)
            yield step

    sample(build(), FORM, 2, seed=0, watch=watch)
    assert seen == [(2,)] * FORM.length


def test_a_memorised_image_is_drawn_again():
    form = PixelFormat(3, 3, 3, 256)
    image = images(1, form)
    torch.manual_seed(0)
    model = LanguageModel(
        256, dim=32, num_layers=1, num_heads=1, max_length=27, dropout=0.0, attention="aft_local",
        attention_options={"window": 9, "position_dim": 4},
    )  # fmt: skip
    task = task_of(form, image)
    batch = form.collate(list(image))
    optimizer = torch.optim.Adam(model.parameters(), 3e-2)
    for _ in range(200):
        optimizer.zero_grad()
        loss = task.step(model, batch)["loss"]
        loss.backward()
        optimizer.step()
    assert form.length * loss.item() < 0.005
    drawn = sample(model, form, 4, seed=0)
    assert (drawn == image).all()


def test_augmentation_stays_in_its_bounds():
    image = np.array([[[0], [5], [12]], [[15], [8], [3]]], dtype=np.uint8)
    turns, shifts = [], []
    for seed in range(400):
        generator = np.random.default_rng(seed)
        out = augment(image, flip=True, shift=3, levels=16, generator=generator).astype(int)
        assert out.min() >= 0
        assert out.max() <= 15
        turned = out[0, 0, 0] > out[0, 2, 0]
        if turned:
            out = out[:, ::-1]
        shift = out[1, 1, 0] - 8  # far from both ends
        assert np.array_equal(out, (image.astype(int) + shift).clip(0, 15))
        turns.append(turned)
        shifts.append(shift)
    assert set(shifts) == set(range(-3, 4))
    assert 150 < sum(turns) < 250
    plain = augment(image, flip=False, shift=0, levels=16, generator=np.random.default_rng(0))
    assert np.array_equal(plain, image)


def test_changes_are_those_of_the_seed():
    data = PixelImages(images(4), 16, flip=True, shift=3)
    assert np.array_equal(data[2], data.images[2])
    assert np.array_equal(data[2, (0, 9)], data[2, (0, 9)])
    assert len({data[2, (0, place)].tobytes() for place in range(30)}) > 6
    assert len({data[2, (seed, 9)].tobytes() for seed in range(30)}) > 6
    for place in range(20):
        assert data[1, (0, place)].max() <= 15


def cifar_folder(tmp_path, train, test=0, seed=0):
    generator = np.random.default_rng(seed)
    for name, count in (("data_batch_1", train), ("test_batch", test)):
        if count:
            data = generator.integers(0, 256, (count, 3072), dtype=np.uint8)
            labels = [int(label) for label in generator.integers(0, 10, count)]
            (tmp_path / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}))
    return tmp_path


def test_cifar10_is_known_by_its_counts_and_sums(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path, train=9, test=4)
    part = load_cifar10(folder)
    assert (len(part.train), len(part.test)) == (9, 4)
    assert part.published == {}
    assert part.name != "cifar10"
    monkeypatch.setattr(density, "CIFAR10_SIZES", (9, 4))
    assert load_cifar10(folder).published == {}  # as many images, but others
    sums = part.train.images.astype(int).reshape(-1, 3).sum(0).tolist()
    monkeypatch.setattr(density, "CIFAR10_SUMS", tuple(sums))
    whole = load_cifar10(folder, shift=7)
    assert whole.name == "cifar10"
    assert whole.published["aft-local-24"] == 2.74
    assert whole.format == PixelFormat(32, 32, 3, 256)
    assert (whole.train.flip, whole.train.shift) == (True, 7)
    # Test images are as they came.
    assert (whole.test.flip, whole.test.shift) == (False, 0)
    assert np.array_equal(whole.test.images, cifar.read_cifar10(folder)[1].images)
    assert whole.evaluated == {"test": whole.test}
    assert whole.licence == cifar.LICENCE


def test_without_a_test_set_some_are_held_out(tmp_path, monkeypatch):
    folder = cifar_folder(tmp_path, train=25)
    sums = cifar.read_cifar10(folder)[0].images.sum((0, 1, 2), dtype=int).tolist()
    monkeypatch.setattr(density, "CIFAR10_SIZES", (25, 0))
    monkeypatch.setattr(density, "CIFAR10_SUMS", tuple(sums))  # that does not make a test set of what is held out
    task = load_cifar10(folder, held_out=0.2)
    assert (len(task.train), len(task.test)) == (20, 5)
    assert task.name == "images in a form of CIFAR-10"
    assert "5 of its 25 images held out to test with (no test set of CIFAR-10)" in task.source
    assert task.published == {}
    every = {image.tobytes() for image in np.concatenate((task.train.images, task.test.images))}
    assert len(every) == 25
    again = load_cifar10(folder, held_out=0.2)
    assert np.array_equal(task.test.images, again.test.images)


def test_digits_are_there_offline():
    task = load_digits()
    assert (len(task.train), len(task.test)) == (1438, 359)
    assert task.format == PixelFormat(8, 8, 1, 17)
    assert task.train.images.max() == 16
    assert task.published == {}


def test_a_format_comes_back_from_json():
    assert PixelFormat.from_json(FORM.to_json()) == FORM


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda folder: load_cifar10(folder / "nowhere"), DataError, "nowhere"),
        (lambda folder: load_cifar10(cifar_folder(folder, 1)), DataError, "0 for training and 1 for testing"),
        (lambda folder: load_cifar10(folder, held_out=1.0), ValueError, "held_out must be above 0 and below 1"),
        (lambda folder: PixelFormat(8, 8, 1, 257), ValueError, "levels from 2 to 256"),
        (lambda folder: PixelFormat(8, 0, 1), ValueError, "sizes must be positive"),
        (lambda folder: PixelImages(images(2), 9), ValueError, "sub-pixels must be below 9, got 15"),
        (lambda folder: PixelImages(images(2)[0], 16), ValueError, r"got uint8 \(4, 5, 3\)"),
        (lambda folder: PixelImages(images(2), 16, shift=-1), ValueError, "shift must be at least 0, got -1"),
        (lambda folder: FORM.collate([images(1)[0][:3]]), ValueError, r"must be \(4, 5, 3\), got \(3, 5, 3\)"),
        (lambda folder: sample(build(), replace(FORM, levels=17)), ValueError, "17 levels.* vocabulary of 16"),
        (lambda folder: sample(build(), FORM, 0), ValueError, "at least one sequence of tokens"),
        (lambda folder: write_grid(images(0), 16, folder / "x.png"), ValueError, "n positive"),
        (lambda folder: write_grid(images(1)[..., :2], 16, folder / "x.png"), ValueError, "1 or 3"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(call, error, message, tmp_path):
    with pytest.raises(error, match=message):
        call(tmp_path)


def test_a_grid_shows_each_image_in_its_place(tmp_path):
    made, path = images(5), tmp_path / "made" / "grid.png"
    write_grid(made, 16, path, gap=2, scale=3)
    with Image.open(path) as file:
        assert file.mode == "RGB"
        grid = np.asarray(file)
    assert grid.shape == ((2 * 4 + 2) * 3, (3 * 5 + 2 * 2) * 3, 3)
    assert np.array_equal(grid[:12, 21:36], (made[1] * 17).repeat(3, 0).repeat(3, 1))
    assert np.array_equal(grid[18:, 21:36], (made[4] * 17).repeat(3, 0).repeat(3, 1))
    assert (grid[12:18] == 255).all()
    assert (grid[18:, 42:] == 255).all()
    write_grid(np.array([[[[16], [0]]]], dtype=np.uint8), 17, path)
    with Image.open(path) as file:
        assert file.mode == "L"
        assert np.asarray(file).tolist() == [[255, 0]]


def test_a_grid_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    path.write_bytes(b"what was there")

    def full(self, data):
        with self.open("wb") as file:
            file.write(data[:5])
        raise OSError("no space left")

    monkeypatch.setattr(type(path), "write_bytes", full)
    with pytest.raises(OSError, match="no space"):
        write_grid(images(1), 16, path)
    assert path.read_bytes() == b"what was there"
    assert list(tmp_path.iterdir()) == [path]
