"""The UEA subsets: where their files are found, what a download may leave behind, the published numbers."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from flowformer.common.errors import DataError
from flowformer.tasks.series import uea

DATA = Path(__file__).parents[4] / "shared" / "data" / "uea"
HEADER = "@problemName fake\n@univariate false\n@equalLength true\n@classLabel true a b\n@data\n"
TRAIN = HEADER + "1,2,3:4,5,6:a\n1,2,2:3,4,4:b\n"
TEST = HEADER + "1,2,3:4,5,7:b\n"


@pytest.fixture(autouse=True)
def _offline(monkeypatch, tmp_path):
    """No network, and no cache but an empty one."""

    def refuse(*args, **kwargs):
        raise OSError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    monkeypatch.setattr("aeon.datasets._data_loaders.urlopen", refuse)
    monkeypatch.setenv("FLOWFORMER_DATA", str(tmp_path / "cache"))


def write_archive(folder: Path, subset: str, suffix: str = ".ts") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for part, text in (("TRAIN", TRAIN), ("TEST", TEST)):
        body = text.encode()
        (folder / f"{subset}_{part}{suffix}").write_bytes(gzip.compress(body) if suffix.endswith("gz") else body)


def test_japanese_vowels_needs_no_download():
    task = uea.load("JapaneseVowels")
    assert (len(task.train), len(task.test)) == (270, 370)
    assert (task.format.channels, len(task.format.classes)) == (12, 9)
    assert (task.format.max_length, task.train.lengths.max(), task.test.lengths.max()) == (26, 26, 29)
    assert task.published["flow"] == 98.9
    assert "aeon" in task.source
    assert "JapaneseVowels_TRAIN.ts" in task.source
    assert "no single licence" in task.licence
    batch = task.format.collate(list(task.train))
    np.testing.assert_allclose(batch["x"][batch["mask"]].std(0), 1, rtol=1e-5)
    assert task.format.collate(list(task.test))["x"].shape == (370, 26, 12)


@pytest.mark.parametrize(
    "subset", ["JapaneseVowels", "SelfRegulationSCP1", "SelfRegulationSCP2", "UWaveGestureLibrary"]
)
def test_real_archive(subset):
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there")
    task = uea.load(subset, DATA)
    assert (len(task.train), len(task.test)) == uea.SPLIT_SIZES[subset]
    assert str(DATA) in task.source
    assert all(np.isfinite(one).all() for part in (task.train, task.test) for one in part.series)


@pytest.mark.parametrize("suffix", [".ts", ".ts.gz"])
@pytest.mark.parametrize("nested", [True, False])
def test_finds_files_in_data_dir(tmp_path, suffix, nested):
    write_archive(tmp_path / "PEMS-SF" if nested else tmp_path, "PEMS-SF", suffix)
    task = uea.load("PEMS-SF", tmp_path)
    assert (task.name, len(task.train), len(task.test), task.format.channels) == ("PEMS-SF", 2, 1, 2)
    assert "aeon" not in task.source


@pytest.mark.parametrize("subset", ["JapaneseVowels", "Heartbeat"])
def test_no_other_copy_stands_in_for_that_of_data_dir(monkeypatch, tmp_path, subset):
    """Neither that of aeon's wheel, nor that of the cache, nor a download."""
    write_archive(tmp_path / "cache" / "uea", "Heartbeat")
    calls = fake_download(monkeypatch, TRAIN, TEST)
    folder = tmp_path / "mine"
    with pytest.raises(DataError, match=rf"no {subset}_TRAIN.ts .* in {folder} or its folder .* without --data-dir"):
        uea.load(subset, folder)
    assert uea.find(subset, folder) is None
    assert not calls
    write_archive(folder, subset)
    assert len(uea.load(subset, folder).train) == 2


def test_finds_files_in_the_cache(tmp_path):
    write_archive(tmp_path / "cache" / "uea" / "Heartbeat", "Heartbeat")
    assert len(uea.load("Heartbeat").train) == 2


def test_cache_defaults_to_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("FLOWFORMER_DATA")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    write_archive(tmp_path / ".cache" / "flowformer" / "uea", "Heartbeat")
    assert len(uea.load("Heartbeat").train) == 2


def test_one_of_two_files_is_none(tmp_path):
    write_archive(tmp_path, "Heartbeat")
    (tmp_path / "Heartbeat_TEST.ts").unlink()
    with pytest.raises(DataError, match=r"no Heartbeat_TRAIN.ts and Heartbeat_TEST.ts \(or .ts.gz\) in"):
        uea.load("Heartbeat", tmp_path)


def test_offline_says_what_to_put_where(tmp_path):
    with pytest.raises(DataError) as caught:
        uea.load("FaceDetection")
    for part in (
        "FaceDetection_TRAIN.ts",
        "FaceDetection_TEST.ts",
        str(tmp_path / "cache" / "uea" / "FaceDetection"),
        "--data-dir",
        "timeseriesclassification.com",
        "no network in tests",
    ):
        assert part in str(caught.value)


def fake_download(monkeypatch, train: str, test: str, error: Exception | None = None) -> list[str]:
    """Let aeon "download" the given files, then perhaps fail."""
    calls = []

    def load_classification(name, *, extract_path, **options):
        calls.append(name)
        folder = Path(extract_path) / name
        folder.mkdir(parents=True)
        (folder / f"{name}_TRAIN.ts").write_text(train)
        (folder / f"{name}_TEST.ts").write_text(test)
        (folder / f"{name}_eq_TEST.ts").write_text(test)
        if error:
            raise error

    monkeypatch.setattr("aeon.datasets.load_classification", load_classification)
    return calls


def test_download_is_kept_and_found_again(monkeypatch, tmp_path):
    monkeypatch.setattr(uea, "SPLIT_SIZES", {"Heartbeat": (2, 1)})
    calls = fake_download(monkeypatch, TRAIN, TEST)
    folder = tmp_path / "cache" / "uea" / "Heartbeat"
    first, again = uea.load("Heartbeat"), uea.load("Heartbeat")
    assert calls == ["Heartbeat"]
    assert sorted(path.name for path in folder.iterdir()) == ["Heartbeat_TEST.ts", "Heartbeat_TRAIN.ts"]
    assert str(folder) in first.source
    assert "aeon" in first.source
    assert str(folder) in again.source
    np.testing.assert_array_equal(first.test.series[0], again.test.series[0])
    assert [path.name for path in folder.parent.iterdir()] == ["Heartbeat"]


@pytest.mark.parametrize(
    ("train", "test", "error"),
    [
        (TRAIN, TEST[:-4], None),
        (TRAIN[:-16], TEST, None),
        (TRAIN[: TRAIN.rindex("1,2,2")], TEST, None),  # cut between two rows
        (TRAIN, "", None),
        (TRAIN, TEST, OSError("connection reset")),
    ],
)
def test_broken_download_leaves_nothing(monkeypatch, tmp_path, train, test, error):
    monkeypatch.setattr(uea, "SPLIT_SIZES", {"Heartbeat": (2, 1)})
    fake_download(monkeypatch, train, test, error)
    with pytest.raises(DataError, match="download failed"):
        uea.load("Heartbeat")
    assert not list((tmp_path / "cache" / "uea").iterdir())
    fake_download(monkeypatch, TRAIN, TEST)
    assert len(uea.load("Heartbeat").train) == 2


def test_missing_aeon_is_no_crash(monkeypatch, tmp_path):
    monkeypatch.setattr(uea, "_find_aeon_data", lambda: None)
    write_archive(tmp_path, "JapaneseVowels")
    assert len(uea.load("JapaneseVowels", tmp_path).train) == 2


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("JapanesVowels", "did you mean 'JapaneseVowels'?"),
        ("pems-sf", "did you mean 'PEMS-SF'?"),
        ("selfregulationscp2", "did you mean 'SelfRegulationSCP2'?"),
        ("BasicMotions", "unknown UEA subset 'BasicMotions'"),
        ("zzz", "known are EthanolConcentration, FaceDetection"),
    ],
)
def test_unknown_subset(name, hint):
    for call in (uea.load, uea.get_published):
        with pytest.raises(DataError) as caught:
            call(name)
        assert hint in str(caught.value)


def test_published_numbers_have_the_printed_averages():
    printed = {
        "dtw": 67.0,
        "xgboost": 66.0,
        "rocket": 72.5,
        "lstm": 48.6,
        "tcn": 70.3,
        "softmax": 71.9,
        "linear": 72.4,
        "reformer": 71.5,
        "yoso": 72.2,
        "soft": 71.5,
        "cosformer": 72.2,
        "flow": 73.0,
    }
    # Two printed averages are not the means of the printed rows: Longformer 72.0 (72.28), Performer 71.9 (71.68).
    assert set(uea.PUBLISHED) == set(printed) | {"longformer", "performer"}
    for method, average in printed.items():
        assert np.mean(list(uea.PUBLISHED[method].values())) == pytest.approx(average, abs=0.0501), (
            method
        )  # half a printed digit


def test_published_of_one_subset():
    accuracies = uea.get_published("Handwriting")
    assert accuracies["rocket"] == 58.8
    assert accuracies["softmax"] == 32.0
    assert len(accuracies) == 14
    assert len(uea.SUBSETS) == 10
