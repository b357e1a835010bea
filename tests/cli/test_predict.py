"""`flowformer predict`, and what the commands say of data they cannot use."""

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from flowformer import cli
from flowformer.models import create_model
from flowformer.tasks.series.format import classify
from flowformer.tasks.series.task import load_pair


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Predict with a model that was never trained, without the folder of a run."""
    rows = ["s,1,a,1,2", "s,2,a,2,3", 't,1,"b, or c",3,2', 'u,1,"b, or c",5,9']
    path = write(tmp_path / "train.csv", "series,time,label,x,y", *rows)
    form = load_pair(path, path).format
    torch.manual_seed(0)
    sizes = {"in_chans": 2, "num_classes": 2, "max_length": form.max_length}
    model = create_model("flowformer_timeseries", **sizes, dim=8, num_heads=2, num_layers=1, ffn_dim=8).eval()
    monkeypatch.setattr("flowformer.cli.predict.open_run", lambda folder, checkpoint: (None, model, form))
    return model, form


def predict(*words) -> int:
    return cli.main(["predict", "folder", *map(str, words)])


def test_predict_writes_csv(run, tmp_path, capsys):
    rows = ['"one, two",1,2,1', "2,1,9,5", "2,2,9,6"]
    path = write(tmp_path / "new.csv", "series,time,y,x", *rows)
    assert predict(path) == 0
    shown = capsys.readouterr().out
    header, *lines = csv.reader(io.StringIO(shown))
    assert header == ["series", "label", "p_a", "p_b, or c"]
    assert [line[0] for line in lines] == ["one, two", "2"]
    truth = classify(*run, [np.array([[1.0, 2.0]]), np.array([[5.0, 9.0], [6.0, 9.0]])])
    np.testing.assert_allclose([[float(cell) for cell in line[2:]] for line in lines], truth, atol=1e-6)
    assert [line[1] for line in lines] == [run[1].classes[index] for index in truth.argmax(axis=1)]
    out = tmp_path / "deep" / "out.csv"
    assert predict(path, "--out", out) == 0
    assert out.read_text(encoding="utf-8") == shown
    assert capsys.readouterr().out == f"2 predictions in {out}\n"


def test_predict_takes_ts_without_labels(run, tmp_path, capsys):
    path = write(tmp_path / "new.ts", "@classLabel false", "@data", "1,2:3,4", "5:6")
    assert predict(path) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()] == ["series", "0", "1"]


@pytest.mark.parametrize(
    ("name", "text", "cause"),
    [
        ("gone.csv", None, "gone.csv: no such file"),
        ("new.txt", "", "unknown kind of file"),
        ("new.csv", "series,time,x\ns,1,1\n", "channels ['y'] of the training data are missing"),
        ("new.ts", "@classLabel false\n@data\n1,2\n", "1 channels, but the training data has 2"),
        ("new.csv", "series,time,x,y\ns,1,1,?\ns,soon,1,2\n", "line 3: time 'soon' is neither"),
    ],
)
@pytest.mark.usefixtures("run")
def test_predict_refuses_in_one_line(tmp_path, capsys, name, text, cause):
    if text is not None:
        (tmp_path / name).write_text(text)
    out = tmp_path / "out.csv"
    assert predict(tmp_path / name, "--out", out) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert re.fullmatch(rf"flowformer: .*{re.escape(cause)}.*\n", shown.err)
    assert not out.exists()


def test_train_refuses_missing_files_in_one_line(tmp_path, capsys):
    gone, out = tmp_path / "gone.ts", tmp_path / "run"
    words = ["timeseries/own", "--train-file", gone, "--test-file", gone, "--out", out]
    assert cli.main(["train", *map(str, words)]) == 2
    assert capsys.readouterr().err == f"flowformer: {gone}: no such file\n"
    assert not out.exists()
