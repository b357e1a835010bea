"""Scenes of models, and pictures of them."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.image import imread

from flowformer import cli
from flowformer.mechanisms.maps import model_maps
from flowformer.models.language import LanguageModel
from flowformer.models.timeseries import SeriesClassifier
from flowformer.models.vision import VisionModel
from flowformer.report import drawing
from flowformer.tasks.images.format import ImageFormat
from flowformer.tasks.images.pixels import PixelFormat
from flowformer.tasks.scenes import Scene, Strip, View, parse_point
from flowformer.tasks.series.format import SeriesFormat, SeriesScaler
from flowformer.tasks.text.format import TextFormat
from flowformer.tasks.text.tokenizers import BytesTokenizer

FORM = ImageFormat(("a", "b"), 16)
TEXT = TextFormat(BytesTokenizer(), 40)
SERIES = SeriesFormat(("a", "b"), 12, SeriesScaler(np.zeros(2), np.ones(2)))
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
STEPS = np.random.default_rng(1).normal(size=(9, 2))


def vision(**options) -> VisionModel:
    torch.manual_seed(0)
    shape = {"img_size": 16, "patch_size": 2, "embed_dims": (8, 16), "depths": (1, 2), "num_heads": (2, 4)}
    return VisionModel(2, **{**shape, **options}).eval()


def series(**options) -> SeriesClassifier:
    torch.manual_seed(0)
    return SeriesClassifier(2, 2, 12, dim=8, num_heads=2, num_layers=2, ffn_dim=8, **options).eval()


def language(**options) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(256, dim=8, num_layers=2, num_heads=2, max_length=40, **options).eval()


# -------------------------------------------------------------------------------------------------------------- scenes


@pytest.mark.parametrize("attention", ["flow", "softmax", "aft_conv"])
def test_scene_of_an_image(attention):
    model = vision(attention=attention)
    scene = FORM.scene(model, PIXELS, View(at=((5, 12),)))
    assert scene.title == attention
    assert [strip.label for strip in scene.strips] == [f"layer {n}, from (5, 12)" for n in range(3)]
    assert [strip.maps.shape for strip in scene.strips] == [(3, 8, 8), (5, 4, 4), (5, 4, 4)]
    assert scene.strips[1].heads == ("mean", "head 0", "head 1", "head 2", "head 3")
    assert all(strip.point == (5.5 / 16, 12.5 / 16) for strip in scene.strips)
    assert np.array_equal(scene.image, PIXELS / 255)
    # The pixel lies in patch (2, 6) of 8 x 8, and (1, 3) of 4 x 4.
    x = FORM.collate([(PIXELS, 0)])["x"]
    for strip, (name, layer) in zip(scene.strips, model_maps(model, x, rows=lambda *_: range(16)).items(), strict=True):
        row = 7 if strip.maps.shape[1] == 4 else None
        if row is not None:
            assert np.allclose(strip.maps[1:].reshape(4, -1), layer.weights[0, :, row]), name
            assert np.allclose(strip.maps[0], strip.maps[1:].mean(0))
    finest = model_maps(model, x, rows=lambda name, tokens: [2 * 8 + 6 if tokens == 64 else 0])
    assert np.allclose(scene.strips[0].maps[1:].reshape(2, -1), finest["stages.0.blocks.0.attention"].weights[0, :, 0])


def test_class_token_is_no_place_of_an_image():
    model = vision(embed_dims=(8,), depths=(2,), num_heads=2, class_token=True, attention="softmax")
    x = FORM.collate([(PIXELS, 0)])["x"]
    for at, row in (((), 0), ((0.0, 0.0), 1), ((0.0, 0.99), 8)):
        scene = FORM.scene(model, PIXELS, View(at=(at,), heads=(1,)))
        weights = model_maps(model, x, rows=[row])["stages.0.blocks.1.attention"].weights[0, 1, 0]
        assert np.allclose(scene.strips[1].maps, weights[1:].reshape(1, 8, 8))
        assert (scene.strips[1].point is None) == (at == ())
    with pytest.raises(ValueError, match="ROW,COLUMN as query, got class"):
        FORM.scene(vision(), PIXELS, View(at=((),)))


def test_flows_follow_the_layer_they_are_of():
    scene = FORM.scene(vision(), PIXELS, View(flows=True, layers=(2,), heads=("mean",)))
    assert [strip.label for strip in scene.strips] == [
        "layer 2, from (8, 8)", "layer 2, conserved incoming flow", "layer 2, conserved outgoing flow",
        "layer 2, competition", "layer 2, allocation",
    ]  # fmt: skip
    for strip in scene.strips[1:4]:
        assert abs(strip.maps.mean() - 1) < 1e-3
        assert strip.point is None
    assert len(FORM.scene(vision(attention="linear"), PIXELS, View(flows=True)).strips) == 3


@pytest.mark.parametrize("trim", [True, False])
@pytest.mark.parametrize("mask_padding", [True, False])
def test_scene_of_a_series(trim, mask_padding):
    form = SeriesFormat(SERIES.classes, 12, SERIES.scaler, trim)
    scene = form.scene(series(mask_padding=mask_padding), STEPS, View(at=((3,), (-1,))))
    length = 9 if trim or mask_padding else 12
    assert scene.series.shape == (length, 2)
    assert np.allclose(scene.series[:9], STEPS)
    assert [strip.maps.shape for strip in scene.strips] == [(3, length)] * 4
    assert [strip.point for strip in scene.strips] == [(3,), (length - 1,)] * 2
    assert scene.strips[0].label == "layer 0, from step 3"


def test_scene_of_a_text():
    scene = TEXT.scene(language(), "a b\nö", View())
    assert scene.tokens == ("a", "␣", "b", "↵", "c3", "b6")
    assert [strip.label for strip in scene.strips] == [f"layer {n}, from token 5, 'b6'" for n in (0, 1)]
    early = TEXT.scene(language(), "a b\nö", View(at=((2,),), layers=(1,)))
    assert np.isnan(early.strips[0].maps[:, 3:]).all()
    assert not np.isnan(early.strips[0].maps[:, :3]).any()


def test_what_is_not_there_is_refused():
    model = vision()
    for view, message in (
        (View(layers=(3,)), "no layer 3: the model has 3, from 0 to 2"),
        (View(heads=(2,)), "no head 2: layer 0 has 2, from 0 to 1"),
        (View(heads=("all",)), "no head 'all'"),
        (View(at=((16, 0),)), "16,0 is out of range: expected 0 to 15"),
        (View(at=((0.5, 1.5),)), "0.5,1.5 is out of range"),
        (View(at=((0.5,),)), "expected ROW,COLUMN as query, got 0.5"),
    ):
        with pytest.raises(ValueError, match=message):
            FORM.scene(model, PIXELS, view)
    with pytest.raises(ValueError, match="a position as query, got 1,2"):
        SERIES.scene(series(), STEPS, View(at=((1, 2),)))
    with pytest.raises(ValueError, match="at least one token"):
        TEXT.scene(language(), "", View())
    with pytest.raises(ValueError, match="max_length = 40"):
        TEXT.scene(language(), 41 * "a", View())


def test_points_are_read():
    assert parse_point("112,40") == (112, 40)
    assert parse_point("0.5, 1") == (0.5, 1)
    assert parse_point("-1") == (-1,)
    assert parse_point("class") == ()
    assert isinstance(parse_point("1.0")[0], float)
    for text in ("", "a,b", "1;2"):
        with pytest.raises(ValueError, match="expected ROW,COLUMN or a position"):
            parse_point(text)


# ------------------------------------------------------------------------------------------------------------ drawing


def scenes() -> dict[str, list[Scene]]:
    view = View(flows=True, layers=(0,))
    return {
        "image": [FORM.scene(vision(attention=name), PIXELS, view) for name in ("flow", "softmax")],
        "series": [SERIES.scene(series(attention=name), STEPS, view) for name in ("flow", "linear")],
        "text": [TEXT.scene(language(attention=name), "to $be$", view) for name in ("flow", "mobile")],
    }


@pytest.mark.parametrize("kind", ["image", "series", "text"])
def test_pictures_are_drawn_and_written(kind, tmp_path):
    drawn = scenes()[kind]
    path = tmp_path / "new" / "picture.png"
    drawing.write(drawn, path)
    picture = imread(path)
    assert [other.name for other in path.parent.iterdir()] == ["picture.png"]
    assert 0.05 < (picture[..., :3] < 0.99).any(-1).mean() < 0.95  # neither blank nor full
    figure = drawing.draw(drawn)
    words = {text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title]} | {
        text.get_text() for text in figure.texts
    }
    assert drawn[0].title in words
    assert drawn[1].title in words


def test_scenes_stand_side_by_side_while_there_is_room():
    two = scenes()["series"]
    narrow, wide = drawing.draw(two), drawing.draw(two * 4)
    assert narrow.get_size_inches()[0] > 2 * 6
    assert wide.get_size_inches()[0] < drawing.WIDEST
    assert wide.get_size_inches()[1] > 4 * narrow.get_size_inches()[1]  # two of five bands, two of one
    for figure in (narrow, wide):
        for axes in figure.axes:
            box = axes.get_position()
            assert min(box.x0, box.y0) >= 0
            assert max(box.x1, box.y1) <= 1


def test_each_tile_has_the_scale_that_is_written_below_it():
    maps = np.array([[[0.25, 0.5], [0.75, 1.0]], [[3.0, 3.0], [3.0, 3.0]]])
    strip = Strip("layer 0, from (0, 0)", ("head 0", "head 1"), maps, (0.5, 0.5))
    (axes,) = drawing.draw([Scene("flow", [strip], image=np.zeros((4, 4, 3)))]).axes
    assert [image.get_clim() for image in axes.images[1:]] == [(0.25, 1.0), (0.0, 6.0)]
    words = [text.get_text() for text in axes.texts]
    assert "0.25 to 1" in words
    assert "3 throughout" in words
    assert drawing._range(np.array([1e-30, 0.5, math.nan])) == "0 to 0.5"


def test_many_tokens_are_counted_and_few_are_written():
    few = Scene("flow", [Strip("layer 0, x", ("head 0",), np.ones((1, 5)), (4,))], tokens=tuple("abcde"))
    many = Scene("flow", [Strip("layer 0, x", ("head 0",), np.ones((1, 500)), (4,))], tokens=("a",) * 500)
    labels = [[label.get_text() for label in drawing.draw([one]).axes[0].get_xticklabels()] for one in (few, many)]
    assert labels[0] == list("abcde")
    assert labels[1][0] == "0"
    assert labels[1][-1] == "499"


def test_a_picture_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    path.write_bytes(b"old")
    strip = Strip("layer 0, x", ("head 0",), np.ones((1, 5)), (4,))

    def fail(_, beside, **__):
        beside.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        drawing.write([Scene("flow", [strip], tokens=tuple("abcde"))], path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Folders that stand for runs of fresh models."""
    made = {
        "flow": (vision(), FORM),
        "softmax": (vision(attention="softmax"), FORM),
        "series": (series(), SERIES),
        "text": (language(), TEXT),
        "pixels": (language(), PixelFormat(8, 8, 1)),
    }
    monkeypatch.setattr("flowformer.cli.visualize.open_run", lambda folder, checkpoint: (None, *made[str(folder)]))
    monkeypatch.setattr("flowformer.cli.visualize.open_format", lambda folder: made[str(folder)][1])
    monkeypatch.chdir(tmp_path)
    for name in made:
        (tmp_path / name).mkdir()
        (tmp_path / name / "recipe.json").write_text("{}")
    from PIL import Image

    Image.fromarray(PIXELS).resize((40, 24)).save("image.png")
    rows = [f"s,{time},{a},{b}" for time, (a, b) in enumerate(STEPS)]
    (tmp_path / "series.csv").write_text("series,time,x,y\n" + "\n".join(rows) + "\n")
    (tmp_path / "text.txt").write_text("to be\n")
    (tmp_path / "bytes").write_bytes(b"a\xff\xfe")
    return tmp_path


def run(capsys, *words):
    status = cli.main(["visualize", *words])
    return status, *capsys.readouterr()


@pytest.mark.parametrize(
    ("words", "strips"),
    [
        (["flow", "softmax", "image.png", "--at", "0.5,0.5"], 6),
        (["flow", "flow", "image.png", "--at", "3,4", "--at", "0.1,0.9", "--layer", "1", "--head", "mean"], 4),
        (["flow", "image.png", "--flows"], 15),
        (["series", "series.csv", "--at", "2"], 2),
        (["text", "text.txt", "--at", "-1"], 2),
        (["text", "--text", "to be", "--flows", "--layer", "0", "--head", "0"], 5),
    ],
)
def test_command(words, strips, runs, capsys):
    status, out, err = run(capsys, *words, "--out", "picture.png")
    assert (status, err) == (0, "")
    assert f"{strips} strips" in out
    assert imread("picture.png").std() > 0.05


def test_runs_of_one_mechanism_are_told_apart_by_their_folders(runs, capsys, monkeypatch):
    written = []
    monkeypatch.setattr(drawing, "write", lambda scenes, path: written.extend(scenes))
    assert run(capsys, "flow", "flow", "softmax", "image.png", "--out", "a.png")[0] == 0
    assert [scene.title for scene in written] == ["flow: flow", "flow: flow", "softmax"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image.png"], "image.png is not the folder of a run"),
        (["flow", "nowhere", "image.png"], "nowhere is not the folder of a run"),
        (["image.png", "flow"], "the file image.png must come after the runs"),
        (["flow"], "a file is required: a picture"),
        (["flow", "series", "image.png"], "all runs must use the same kind of data"),
        (["flow", "image.png", "--out", "a.jpg"], "must be .png, .pdf, .svg"),
        (["flow", "no.png"], "no.png cannot be read: No such file"),
        (["flow", "text.txt"], "text.txt: not an image"),
        (["flow", "--text", "a"], "--text does not apply to flow; its options are --out, --checkpoint, --at, --layer"),
        (["flow", "image.png", "--index", "1"], "--index does not apply to flow"),
        (["series"], "a file is required: series as .ts"),
        (["text"], "or give --text TEXT"),
        (["text", "text.txt", "--text", "a"], "pass either a file or --text, got both"),
        (["softmax", "image.png", "--flows"], "--flows requires Flow-Attention or Mobile-Attention"),
        (["flow", "image.png", "--at", "here"], "expected ROW,COLUMN or a position, got 'here'"),
        (["flow", "image.png", "--layer", "9"], "no layer 9"),
        (["series", "series.csv", "--index", "1"], "has 1 series, from 0 to 0; got --index 1"),
        (["series", "no.csv"], "no such file"),
        (["text", "bytes"], "bytes is not UTF-8: byte 1"),
        (["text", "no.txt"], "cannot be read"),
        (["pixels", "image.png"], "does not apply to pixels, whose data is images; available: evaluate, generate"),
    ],
)
def test_mistakes_are_explained(words, message, runs, capsys):
    words = words if "--out" in words else [*words, "--out", "a.png"]
    status, _, err = run(capsys, *words)
    assert status == 2
    assert message in err
    assert not (runs / "a.png").exists()


def test_a_run_that_was_trained_is_pictured(waves, tmp_path, capsys):
    sizes = ["--dim", "8", "--num-heads", "2", "--ffn-dim", "8", "--epochs", "1", "--accelerator", "cpu"]
    files = ["--train-file", waves["train_file"], "--test-file", waves["test_file"]]
    folder, picture = str(tmp_path / "run"), tmp_path / "picture.svg"
    assert cli.main(["train", "timeseries/own", *files, *sizes, "--out", folder]) == 0
    assert json.loads((tmp_path / "run" / "result.json").read_text())
    status, out, _ = run(capsys, folder, waves["test_file"], "--index", "3", "--out", str(picture))
    assert status == 0
    assert "2 strips" in out
    assert "<svg" in picture.read_text()
    assert run(capsys, str(tmp_path), waves["test_file"], "--out", str(picture))[2].startswith("flowformer: ")
