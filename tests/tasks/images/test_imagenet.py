"""ImageNet: its classes, what a model sees, what is random about it, and what cannot be read."""

import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from image_writers import encode, picture, png, write_folder, write_parquet, write_tar
from PIL import Image
from torch.utils.data import DataLoader

from flowformer.common.errors import DataError
from flowformer.tasks.images import imagenet
from flowformer.tasks.images.files import find_images
from flowformer.tasks.images.format import IMAGENET_MEAN, IMAGENET_STD, ImageFormat
from flowformer.tasks.images.imagenet import Augmentation, DrawSampler, ImageNetFormat, seeded
from flowformer.training.module import total

WNIDS = ("n01440764", "n01443537", "n15075141")  # classes 0, 1 and 999


def content(count=3, classes=WNIDS, first=0):
    names = [f"{name}/{number}.png" for name in classes for number in range(count)]
    return {name: png(first + number) for number, name in enumerate(names)}


def below(split, files):
    return {f"{split}/{name}": data for name, data in files.items()}


@pytest.fixture
def small(tmp_path):
    """Nine images to train on, six to validate with."""
    return write_folder(tmp_path / "small", below("train", content()) | below("val", content(2, first=50)))


def loader(task, data, batch_size, workers=0, sampler=None):
    return DataLoader(
        data, batch_size, sampler=sampler, num_workers=workers, collate_fn=task.format.collate,
        generator=torch.Generator(),  # else the loader draws from the global one
    )  # fmt: skip


class Bright(torch.nn.Module):
    """Class 1 for bright images, 0 for dark ones."""

    def forward(self, images):
        score = images.mean((1, 2, 3))
        return torch.stack([-score, score], 1)


# ------------------------------------------------------------------------------------------------- the 100 originals


@pytest.fixture(scope="module")
def originals(request, tmp_path_factory):
    archive = request.config.rootpath.parent / "shared" / "data" / "imagenet" / "imagenet1k_originals_100classes.zip"
    if not archive.is_file():
        pytest.skip(f"no {archive}: it is not part of the repository")
    folder = tmp_path_factory.mktemp("imagenet")
    with zipfile.ZipFile(archive) as zipped:
        for split in ("train", "val"):
            zipped.extractall(folder / split)
    listed = [line.split("\t") for line in archive.with_name("labels.tsv").read_text().splitlines()[1:]]
    return folder, {wnid: int(index) for index, wnid, *_ in listed}


@pytest.fixture(scope="module")
def seen(originals):
    """The originals as an evaluation sees them, in one batch."""
    task = imagenet.load(originals[0])
    return task, next(iter(loader(task, task.test, 200)))


def test_classes_of_originals(originals, seen):
    folder, index = originals
    task, batch = seen
    assert len(task.format.classes) == 1000
    assert len(task.test) == len(batch["y"]) == 100
    assert batch["y"].tolist() == [index[name[:9]] for name in map(task.test.files.name, range(100))]
    assert all(task.format.classes[place] == name for name, place in index.items())
    assert task.source.startswith(f"{folder / 'train'}: 100 images of 100 classes in folders by class; ")
    assert not task.published


def test_originals_are_seen_as_timm_does(originals, seen):
    from timm.data import create_transform

    transform = create_transform(
        224, interpolation="bicubic", crop_pct=0.875, mean=IMAGENET_MEAN, std=IMAGENET_STD, is_training=False
    )
    task, batch = seen
    grey = 0
    for number, name in enumerate(map(task.test.files.name, range(100))):
        with Image.open(originals[0] / "val" / name) as image:
            grey += image.mode == "L"
            torch.testing.assert_close(batch["x"][number], transform(image.convert("RGB")), rtol=0, atol=1e-6)
    assert grey == 1


def test_other_forms_of_originals_are_the_same(originals, seen, tmp_path):
    task, batch = seen
    items = [(one.data, one.label) for one in task.test.files.subset(range(0, 100, 5))]
    for split in ("train", "validation"):
        write_parquet(tmp_path / "parquet" / f"{split}-00000-of-00001.parquet", items)
        members = {f"{n:05}.{suffix}": data for n, (image, label) in enumerate(items)
                   for suffix, data in (("jpg", image), ("cls", str(label).encode()))}  # fmt: skip
        write_tar(tmp_path / "tar" / f"imagenet-{split}-000000.tar", members)
    for form in ("parquet", "tar"):
        other = imagenet.load(tmp_path / form)
        assert (other.format.classes, other.test.files.form) == (task.format.classes, f"{form} files")
        found = next(iter(loader(other, other.test, 200)))
        assert torch.equal(found["x"], batch["x"][::5])
        assert torch.equal(found["y"], batch["y"][::5])


# ------------------------------------------------------------------------------------------------------------- classes


def test_wordnet_names_have_their_indices(small):
    task = imagenet.load(small)
    assert task.train.files.labels.tolist() == [0] * 3 + [1] * 3 + [999] * 3
    assert len(set(task.format.classes)) == 1000


def test_other_names_are_sorted(tmp_path):
    names = ("zebra", "ant", "n99999999")
    write_folder(tmp_path, below("train", content(1, names)) | below("val", content(1, names[:2])))
    task = imagenet.load(tmp_path)
    assert task.format.classes == ("ant", "n99999999", "zebra")
    assert task.test.files.labels.tolist() == [0, 2]
    assert task.licence == imagenet.OWN_LICENCE


def parquet(folder, labels, **options):
    for split in ("train", "val"):
        write_parquet(
            folder / f"{split}-0.parquet", [(png(number), label) for number, label in enumerate(labels)], **options
        )
    return folder


def test_numbers_are_indices_of_imagenet(tmp_path):
    task = imagenet.load(parquet(tmp_path, [5, 999]))
    assert task.train.files.labels.tolist() == [5, 999]
    assert task.format.classes == imagenet.classes()
    named = imagenet.load(parquet(tmp_path / "b", [5, 999], names=[f"name {number}" for number in range(1000)]))
    assert named.format.classes == imagenet.classes()


def test_numbers_with_names_of_their_own(tmp_path):
    assert imagenet.load(parquet(tmp_path / "a", [1, 0], names=["ant", "bee"])).format.classes == ("ant", "bee")
    classes = imagenet.load(parquet(tmp_path / "b", [1, 1000])).format.classes
    assert classes == ("1", "1000")


def test_numbers_beside_names(tmp_path):
    """Training images in folders by WordNet name, validation images in a list with indices."""
    files = below("train", content(1)) | {"val/a.png": png(1), "val/b.png": png(2), "val/labels.csv": b"a,999\nb,0\n"}
    task = imagenet.load(write_folder(tmp_path, files))
    assert task.test.files.labels.tolist() == [999, 0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (below("train", content()), "expected a train and a val set; found train: .*9 images of 3 classes"),
        (content(), "expected a train and a val set; found all"),
        (below("train", content(1, ("a", "b"))) | below("val", content(1, ("a", "c"))), "unknown classes 'c'"),
        (below("train", content(1, ("a",))) | below("val", content(1, ("a",))), "classification requires two classes"),
        (below("train", content(1)) | below("val", {"n01440764/a.jpg": b""}), "none of 1 images can be read; .*empty"),
        (below("train", {"a/a.jpg": b"", "b/b.jpg": b""}) | below("val", content(1, ("a",))), "none of 2 images"),
        (below("train", content(1, ("a", "b"))) | {"val/a.png": png(1), "val/labels.csv": b"a,2\n"}, "labels up to 2"),
    ],
)  # fmt: skip
def test_data_that_is_refused(tmp_path, files, message):
    with pytest.raises(DataError, match=message):
        imagenet.load(write_folder(tmp_path, files))


def test_published_of_all_of_imagenet_only(small, monkeypatch):
    monkeypatch.setattr(imagenet, "SIZES", (9, 6))
    assert imagenet.load(small).published["flowformer"] == 80.6


def test_validation_part(small):
    task = imagenet.load(small, validation_fraction=0.3, seed=1)
    assert {name: len(data) for name, data in task.evaluated.items()} == {"test": 6, "validation": 3}
    assert len(task.train) == 6
    assert sorted(task.validation.files.labels.tolist()) == [0, 1, 999]
    names = [data.files.name(index) for data in (task.train, task.validation) for index in range(len(data))]
    assert sorted(names) == sorted(content())
    with pytest.raises(ValueError, match="'n01440764' has 1 training examples"):
        imagenet.load(
            write_folder(small / "b", below("train", content(1)) | below("val", content(1))), validation_fraction=0.5
        )


# -------------------------------------------------------------------------------------------------------------- chance


def run_of(task, workers, epoch=0, batch_size=4, **options):
    sampler = DrawSampler(len(task.train), batch_size, seed=3, **options)
    sampler.set_epoch(epoch)
    return list(loader(task, task.train, batch_size, workers, sampler))


def same(one, other):
    return all(torch.equal(a[name], b[name]) for a, b in zip(one, other, strict=True) for name in ("x", "y"))


@pytest.mark.parametrize("augmentation", [Augmentation(erasing=1.0), Augmentation(rand_augment="", mixup=0, cutmix=0)])
def test_epoch_is_a_function_of_its_number(small, augmentation):
    task = imagenet.load(small, image_size=32, augmentation=augmentation)
    states = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    first = run_of(task, 0)
    assert random.getstate() == states[0]
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])
    torch.rand(1), np.random.rand(), random.random()  # noqa: NPY002
    assert same(run_of(task, 0), first)
    assert same(run_of(task, 2), first)
    assert not same(run_of(task, 0, epoch=1), first)
    assert same(run_of(task, 2, epoch=1), run_of(task, 0, epoch=1))
    assert [len(batch["x"]) for batch in first] == [4, 4]


def test_sets_can_be_pickled(small):
    """Where processes do not begin as copies, workers get them so."""
    task = imagenet.load(small, image_size=32)
    train, test = (pickle.loads(pickle.dumps(data)) for data in (task.train, task.test))
    draw = next(iter(DrawSampler(9, 4)))
    assert np.array_equal(train[draw].image, task.train[draw].image)
    assert np.array_equal(test[5].image, task.test[5].image)


def test_batches_are_mixed_in_different_shares(small):
    task = imagenet.load(small, image_size=32, augmentation=Augmentation(cutmix=0, smoothing=0))
    batches = [batch for epoch in range(3) for batch in run_of(task, 0, epoch)]
    shares = {round(float(share), 4) for batch in batches for share in batch["y"].unique()}
    assert len(shares - {0.0, 1.0}) > 2  # one share and the rest of it, if all were mixed alike


def test_views_of_an_image_differ(small):
    task = imagenet.load(small, image_size=32, augmentation=Augmentation(mixup=0, cutmix=0))
    sampler = DrawSampler(len(task.train), 8, repeats=4)
    rows = [draw.row for draw in sampler]
    assert rows[:4] == [rows[0]] * 4
    assert rows[4] != rows[0]
    images = [task.train[draw].image for draw in sampler]
    assert len({image.tobytes() for image in images}) == 8


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("size", [5, 24, 31])
def test_devices_share_an_epoch(size, world):
    ranks = [list(DrawSampler(size, 4, world=world, rank=rank, seed=5)) for rank in range(world)]
    together = [draw for draws in zip(*ranks, strict=True) for draw in draws]
    assert len(together) == max(size // (4 * world), 1) * 4 * world
    rows = [draw.row for draw in together]
    assert len(set(rows)) == min(size, len(rows))
    assert len({draw.seed for draw in together}) == len(rows)
    assert len(DrawSampler(size, 4, world=world)) == len(ranks[0])
    if world == 2 and size == 24:
        repeated = [list(DrawSampler(size, 4, world=2, rank=rank, repeats=2)) for rank in range(2)]
        assert [draw.row for draw in repeated[0]] == [draw.row for draw in repeated[1]]
        assert not {draw.seed for draw in repeated[0]} & {draw.seed for draw in repeated[1]}


def test_orders_differ_by_seed_and_round():
    def rows(seed, epoch):
        sampler = DrawSampler(50, 10, seed=seed)
        sampler.set_epoch(epoch)
        return tuple(draw.row for draw in sampler)

    assert len({rows(seed, epoch) for seed in range(3) for epoch in range(3)}) == 9


def test_empty_set_is_refused():
    with pytest.raises(ValueError, match="the training set is empty"):
        DrawSampler(0, 4)


def test_seeded_restores_after_an_error():
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), seeded(1):
        torch.rand(1).view(2)
    assert torch.equal(torch.get_rng_state(), before)


# -------------------------------------------------------------------------------------------------------------- mixing


def batch(count=8, classes=10):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(count, 3, 16, 16, generator=generator) + torch.arange(count).view(-1, 1, 1, 1)
    return x, torch.arange(count) % classes


def test_smoothing_alone():
    x, y = batch()
    mixed, target = Augmentation(mixup=0, cutmix=0, smoothing=0.1).mix(x.clone(), y, 10)
    assert torch.equal(mixed, x)
    assert torch.allclose(target, 0.9 * torch.nn.functional.one_hot(y, 10) + 0.01)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0), (0, 1.0), (0.8, 1.0)])
def test_images_and_targets_are_mixed_alike(mixup, cutmix):
    x, y = batch()
    with seeded(4):
        mixed, target = Augmentation(mixup=mixup, cutmix=cutmix, smoothing=0.0).mix(x.clone(), y, 10)
    assert torch.allclose(target.sum(1), torch.ones(8))
    share = target[torch.arange(8), y]
    assert ((share > 0) & (share < 1)).all()
    assert torch.equal(target[torch.arange(8), y.flip(0)], 1 - share)
    if not cutmix:
        expected = share.view(-1, 1, 1, 1) * x + (1 - share).view(-1, 1, 1, 1) * x.flip(0)
        assert torch.allclose(mixed, expected, atol=1e-6)
    if not mixup:
        own = (mixed == x).all(1).float().mean((1, 2))
        assert torch.allclose(own, share, atol=1e-6)


def test_parts_are_erased():
    x, y = batch()
    with seeded(0):
        erased, _ = Augmentation(erasing=1.0, mixup=0, cutmix=0).mix(x.clone(), y, 10)
    share = (erased != x).all(1).float().mean((1, 2))
    assert ((share > 0.01) & (share < 0.4)).all()


def test_training_batches_have_shares_and_evaluations_classes(small):
    task = imagenet.load(small, image_size=32)
    train, test = run_of(task, 0)[0], next(iter(loader(task, task.test, 4)))
    assert (train["y"].shape, train["y"].dtype) == ((4, 1000), torch.float32)
    assert train["y"][:, [0, 1, 999]].sum() > 3.5
    assert (test["y"].shape, test["y"].dtype, test["x"].shape) == ((4,), torch.int64, (4, 3, 32, 32))


def test_loss_of_shares_is_that_of_soft_targets(small):
    from timm.loss import SoftTargetCrossEntropy

    task = imagenet.load(small, image_size=32)
    train = run_of(task, 0)[0]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 1000))
    values = task.step(model, train)
    assert set(values) == {"loss"}
    torch.testing.assert_close(values["loss"], SoftTargetCrossEntropy()(model(train["x"]), train["y"]))


# -------------------------------------------------------------------------------------------------- evaluation and step


def test_top_five(small):
    task = imagenet.load(small, image_size=32)
    logits = torch.zeros(4, 1000)
    logits[:, :6] = torch.tensor([6.0, 5, 4, 3, 2, 1])
    given = {"x": torch.zeros(4, 3, 32, 32), "y": torch.tensor([0, 4, 5, 999]), "left_out": []}
    values = task.step(lambda x: logits, given)
    assert (float(values["accuracy"]), float(values["top5"]), task.size(given)) == (1, 2, 4)
    torch.testing.assert_close(values["loss"], torch.nn.functional.cross_entropy(logits, given["y"]))


def test_format_is_kept_without_what_trains(small):
    form = imagenet.load(small, image_size=48).format
    read = ImageNetFormat.from_json(form.to_json())
    assert read.augmentation is None
    assert read == ImageNetFormat(form.classes, 48, crop=0.875)
    pair = read.collate([(read.prepare(picture(1, (70, 50))), 3)])
    assert (pair["x"].shape, pair["y"].tolist()) == ((1, 3, 48, 48), [3])
    assert isinstance(pickle.loads(pickle.dumps(form)), ImageFormat)


def test_prepare_takes_any_picture():
    form = ImageNetFormat(("a", "b"), 32, crop=0.875)
    for size in ((1, 1), (300, 7), (7, 300), (32, 32)):
        assert form.prepare(picture(0, size).convert("L")).shape == (32, 32, 3)


# --------------------------------------------------------------------------------------------- what cannot be read


@pytest.fixture
def damaged(tmp_path):
    """Dark images of class a and bright ones of b; three of seven to validate with cannot be read, nor two to train."""
    dark, light = (encode(Image.new("RGB", (20, 20), (shade,) * 3)) for shade in (0, 255))
    train = {f"a/{number}.png": dark for number in range(3)} | {f"b/{number}.png": light for number in range(3)}
    test = {"a/0.png": dark, "a/1.jpg": b"", "a/2.png": light, "b/0.jpg": b"?", "b/1.jpg": dark[:30], "b/2.png": light,
            "b/3.png": light}  # fmt: skip
    return write_folder(tmp_path, below("train", train | {"a/1.jpg": b"", "b/9.jpg": b"?"}) | below("val", test))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_read_is_not_counted(damaged, batch_size, workers, caplog):
    task = imagenet.load(damaged, image_size=32)
    size, sums = 0, {"accuracy": 0.0, "loss": 0.0}
    for given in loader(task, task.test, batch_size, workers):
        values = task.step(Bright(), given)
        size += task.size(given)
        for name in sums:
            sums[name] += total(values[name], task.size(given))
    assert size == 4
    assert sums["accuracy"] == 3
    assert np.isfinite(sums["loss"])
    assert set(task.test.files.left_out) == {"a/1.jpg", "b/0.jpg", "b/1.jpg"}
    assert "a/1.jpg is left out: empty (1 so far)" in caplog.text
    assert "val: 7 images of 2 classes in folders by class, 3 left out" in task.source


@pytest.mark.parametrize("workers", [0, 2])
def test_the_next_image_stands_in(damaged, workers):
    plain = Augmentation(rand_augment="", color_jitter=0, mixup=0, cutmix=0, smoothing=0)
    task = imagenet.load(damaged, image_size=32, augmentation=plain)
    batches = run_of(task, workers, batch_size=8)
    assert torch.equal(batches[0]["y"][:, 1] == 1, batches[0]["x"].mean((1, 2, 3)) > 0)  # with the label of its own
    assert [len(given["x"]) for given in batches] == [8]
    for given in batches * 2:
        task.step(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2)), given)
    assert set(task.train.files.left_out) == {"a/1.jpg", "b/9.jpg"}
    assert not task.test.files.left_out
    counts = batches[0]["y"].sum(0).tolist()
    assert sum(counts) == 8
    assert min(counts) >= 3


def test_nothing_left_to_stand_in(damaged):
    task = imagenet.load(damaged, image_size=32)
    for path in (damaged / "train").rglob("*.png"):
        path.unlink()
    with pytest.raises(DataError, match="no readable image left"):
        run_of(task, 0)


def test_damage_inside_a_tar_file(tmp_path):
    for split in ("train", "val"):
        members = {f"{n}.{suffix}": data for n in range(4)
                   for suffix, data in (("png", png(n) if n != 2 else b"wrong"), ("cls", b"%d" % (n % 2)))}  # fmt: skip
        write_tar(tmp_path / f"imagenet-{split}-000000.tar", members)
    task = imagenet.load(tmp_path, image_size=32)
    given = next(iter(loader(task, task.test, 4)))
    assert given["left_out"] == [
        (f"{tmp_path}, validation", "imagenet-val-000000.tar:2.png", "not an image of a known format")
    ]
    assert len(given["x"]) == 3
    assert len(find_images(tmp_path)["train"]) == 4
