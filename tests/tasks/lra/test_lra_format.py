"""Formats of sequences and pairs: batches, files of one's own, attention maps."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flowformer import create_model
from flowformer.common.errors import DataError
from flowformer.tasks.lra.format import PairFormat, SequenceChoice, SequenceFormat
from flowformer.tasks.lra.image import to_grey
from flowformer.tasks.protocols import Classifies, Shows
from flowformer.tasks.scenes import View

BYTES = SequenceFormat("bytes", ("no", "yes"), 8)
GREY = SequenceFormat("grey", ("a", "b"), 16)
LISTOPS = SequenceFormat("listops", tuple("0123456789"), 30)
PAIRS = PairFormat(("no", "yes"), 8)


def model(form, **options):
    torch.manual_seed(0)
    sizes = {"dim": 16, "num_heads": 2, "ffn_dim": 16, **options}
    return create_model(
        "flowformer_sequence", vocab_size=form.vocab_size, num_classes=len(form.classes), max_length=form.max_length,
        **sizes,
    ).eval()  # fmt: skip


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.uint16)


def test_batches_are_cut_and_padded():
    batch = BYTES.collate([(tokens(5, 6), 1), (tokens(*range(1, 12)), 0), (tokens(), 0)])
    assert batch["tokens"].tolist() == [[5, 6, 0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8], [0] * 8]
    assert batch["mask"].sum(-1).tolist() == [2, 8, 0]
    assert batch["y"].tolist() == [1, 0, 0]
    short = [(tokens(5, 6), 1), (tokens(7), 0)]
    assert BYTES.collate(short)["tokens"].shape == (2, 2)
    assert SequenceFormat("bytes", BYTES.classes, 8, trim=False).collate(short)["tokens"].shape == (2, 8)
    assert BYTES.collate([(tokens(), 0)])["tokens"].shape == (1, 1)
    pairs = PAIRS.collate([((tokens(1, 2, 3), tokens(4)), 1), ((tokens(5), tokens(6)), 0)])
    assert pairs["tokens"].tolist() == [[[1, 2, 3], [4, 0, 0]], [[5, 0, 0], [6, 0, 0]]]
    assert pairs["mask"].sum(-1).tolist() == [[3, 1], [1, 1]]
    for form in (BYTES, PAIRS):
        with pytest.raises(ValueError, match="at least one sequence, got none"):
            form.collate([])


@pytest.mark.parametrize("form", [BYTES, GREY, LISTOPS, SequenceFormat("bytes", ("x", "y"), 3, trim=False), PAIRS])
def test_formats_are_kept(form):
    assert type(form).from_json(form.to_json()) == form
    assert isinstance(form, Classifies)
    assert isinstance(form, Shows) == isinstance(form, SequenceFormat)
    for name, value in [("classes", ["a", "a"]), ("max_length", 0), ("trim", 1), ("max_length", None)]:
        with pytest.raises(ValueError, match=name):
            type(form).from_json({**form.to_json(), name: value})


def test_an_unknown_reading_is_refused():
    with pytest.raises(ValueError, match="reading must be one of bytes, listops, grey, got 'words'"):
        SequenceFormat.from_json({**BYTES.to_json(), "reading": "words"})


def test_texts_are_classified(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe any bytes")
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "b.txt").write_text("any by")
    names, found = BYTES.classify_files(model(BYTES), [tmp_path, tmp_path / "a.txt"])
    assert [Path(name).name for name in names] == ["a.txt", "b.txt", "a.txt"]
    assert found.shape == (3, 2)
    np.testing.assert_allclose(found.sum(1), 1)
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)  # whatever else is in the batch


def test_expressions_are_classified(tmp_path):
    lines = "[MAX 4 3 ]\n\n[MIN [SM 1 2 ] 9 ]\n"
    (tmp_path / "plain.txt").write_text(lines)
    with gzip.open(tmp_path / "some.tsv.gz", "wt") as file:
        file.write("Source\tTarget\n( ( [MAX 4 ) 3 ) ]\t4\n")
    names, found = LISTOPS.classify_files(model(LISTOPS), [tmp_path / "plain.txt", tmp_path / "some.tsv.gz"])
    assert [name.split(", ")[1] for name in names] == ["line 1", "line 3", "line 2"]
    np.testing.assert_allclose(found[0], found[2], atol=1e-6)
    (tmp_path / "wrong.txt").write_text("[MAX 1 2 ]\n[MAX 1 2\n")
    with pytest.raises(DataError, match=r"wrong\.txt, line 2: "):
        LISTOPS.classify_files(model(LISTOPS), [tmp_path / "wrong.txt"])


def test_pictures_are_classified(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "colours.png")
    Image.fromarray(to_grey(pixels)).save(tmp_path / "grey.png")
    Image.fromarray(pixels).resize((8, 12)).save(tmp_path / "large.png")
    names, found = GREY.classify_files(model(GREY), [tmp_path])
    assert [Path(name).name for name in names] == ["colours.png", "grey.png", "large.png"]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    (tmp_path / "broken.png").write_bytes((tmp_path / "grey.png").read_bytes()[:40])
    with pytest.raises(DataError, match=r"broken\.png"):
        GREY.classify_files(model(GREY), [tmp_path / "broken.png"])


def test_pairs_are_classified(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 3)
    paths = [tmp_path / f"{name}.txt" for name in "abcb"]
    names, found = PAIRS.classify_files(model(PAIRS, pairs="joined"), paths)
    assert [[Path(part).name for part in name.split(", ")] for name in names] == [
        ["a.txt", "b.txt"],
        ["c.txt", "b.txt"],
    ]
    assert found.shape == (2, 2)
    with pytest.raises(DataError, match="two texts for each pair, got 3 texts"):
        PAIRS.classify_files(model(PAIRS, pairs="joined"), paths[:3])


def test_files_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    for form, path, says in (
        (BYTES, "none.txt", "no such file or folder"),
        (BYTES, "empty.txt", "this text is empty"),
        (BYTES, "folder", "contains no text; expected texts"),
        (GREY, "folder", "contains no picture"),
        (GREY, "empty.txt", "empty.txt"),
        (LISTOPS, "empty.txt", "contains no expression"),
    ):
        with pytest.raises(DataError, match=says):
            form.classify_files(model(form), [tmp_path / path])


def test_probabilities_that_are_not_finite(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    broken = model(BYTES)
    torch.nn.init.constant_(broken.head[0].weight, torch.nan)
    with pytest.raises(DataError, match=r"a\.txt: the model gives no finite probabilities for this text"):
        BYTES.classify_files(broken, [tmp_path / "a.txt"])


def test_maps_of_a_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\nb")
    scene = BYTES.show(model(BYTES), tmp_path / "a.txt", SequenceChoice(), View())
    assert scene.tokens == ("a", "\\n", "b")
    strip = scene.strips[0]
    assert strip.label.endswith("from class token")
    assert strip.maps.shape == (3, 3)  # mean and two heads, over three tokens
    assert strip.point is None
    scene = BYTES.show(
        model(BYTES, pool="mean", attention="softmax"), tmp_path / "a.txt", SequenceChoice(), View(at=((2,),))
    )
    assert scene.strips[0].point == (2,)
    np.testing.assert_allclose(scene.strips[0].maps.sum(-1), 1, rtol=1e-4)
    with pytest.raises(ValueError, match="1 found, from 0 to 0; got --index 1"):
        BYTES.show(model(BYTES), tmp_path / "a.txt", SequenceChoice(index=1), View())
    with pytest.raises(ValueError, match="a file is required: texts"):
        BYTES.show(model(BYTES), None, SequenceChoice(), View())


def test_maps_of_a_picture(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 16
    Image.fromarray(pixels).save(tmp_path / "a.png")
    scene = GREY.show(model(GREY), tmp_path / "a.png", SequenceChoice(), View(at=((), (1, 3))))
    assert scene.image is not None
    np.testing.assert_allclose(scene.image[..., 0], pixels / 255)
    assert [strip.maps.shape for strip in scene.strips] == [(3, 4, 4)] * 2
    assert scene.strips[1].point == (0.375, 0.875)
