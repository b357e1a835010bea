"""The ten UEA subsets of the Flowformer paper (ICML 2022): search, download, published accuracies."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path

from flowformer.common.errors import DataError
from flowformer.common.names import nearest
from flowformer.tasks.downloads import data_folder, make_folder
from flowformer.tasks.series.files import read_table
from flowformer.tasks.series.table import SeriesTable
from flowformer.tasks.series.task import SeriesTask, build_task

logger = logging.getLogger(__name__)

WEBSITE = "https://www.timeseriesclassification.com"
CITATION = (
    "A. Bagnall, H. A. Dau, J. Lines, M. Flynn, J. Large, A. Bostrom, P. Southam, E. Keogh: The UEA multivariate time "
    "series classification archive, 2018. arXiv:1811.00075"
)
LICENCE = (
    f"UEA multivariate time series classification archive ({WEBSITE}). The archive states no single licence; the data "
    "sets come from different donors, whose terms apply. Cite Bagnall et al. 2018 (arXiv:1811.00075)."
)

SUBSETS = (
    "EthanolConcentration",
    "FaceDetection",
    "Handwriting",
    "Heartbeat",
    "JapaneseVowels",
    "PEMS-SF",
    "SelfRegulationSCP1",
    "SelfRegulationSCP2",
    "SpokenArabicDigits",
    "UWaveGestureLibrary",
)

# Series in the published train and test splits: a download with other counts was cut short.
SPLIT_SIZES: Mapping[str, tuple[int, int]] = dict(
    zip(
        SUBSETS,
        [
            (261, 263),
            (5890, 3524),
            (150, 850),
            (204, 205),
            (270, 370),
            (267, 173),
            (268, 293),
            (200, 180),
            (6599, 2199),
            (120, 320),
        ],
        strict=True,
    )
)

# Accuracy in percent, in the order of SUBSETS: the UEA table of the Flowformer paper. "tcn" is the unsupervised TCN,
# "softmax" the row Transformer, "linear" the Linear Transformer, "yoso" YOSO-E, "flow" Flowformer. The averages
# printed for Longformer (72.0) and Performer (71.9) are not the means of these rows (72.28 and 71.68).
PUBLISHED: Mapping[str, Mapping[str, float]] = {
    method: dict(zip(SUBSETS, accuracies, strict=True))
    for method, accuracies in {
        "dtw": (32.3, 52.9, 28.6, 71.7, 94.9, 71.1, 77.7, 53.9, 96.3, 90.3),
        "xgboost": (43.7, 63.3, 15.8, 73.2, 86.5, 98.3, 84.6, 48.9, 69.6, 75.9),
        "rocket": (45.2, 64.7, 58.8, 75.6, 96.2, 75.1, 90.8, 53.3, 71.2, 94.4),
        "lstm": (32.3, 57.7, 15.2, 72.2, 79.7, 39.9, 68.9, 46.6, 31.9, 41.2),
        "tcn": (28.9, 52.8, 53.3, 75.6, 98.9, 68.8, 84.6, 55.6, 95.6, 88.4),
        "softmax": (32.7, 67.3, 32.0, 76.1, 98.7, 82.1, 92.2, 53.9, 98.4, 85.6),
        "linear": (31.9, 67.0, 34.7, 76.6, 99.2, 82.1, 92.5, 56.7, 98.0, 85.0),
        "reformer": (31.9, 68.6, 27.4, 77.1, 97.8, 82.7, 90.4, 56.7, 97.0, 85.6),
        "longformer": (32.3, 62.6, 39.6, 78.0, 98.9, 83.8, 90.1, 55.6, 94.4, 87.5),
        "performer": (31.2, 67.0, 32.1, 75.6, 98.1, 80.9, 91.5, 56.7, 98.4, 85.3),
        "yoso": (31.2, 67.3, 30.9, 76.5, 98.6, 85.2, 91.1, 53.9, 98.9, 88.4),
        "soft": (32.3, 64.8, 28.9, 77.1, 98.3, 83.2, 91.1, 55.0, 98.4, 85.6),
        "cosformer": (33.5, 67.1, 34.7, 75.6, 99.2, 80.9, 91.8, 55.6, 98.8, 85.0),
        "flow": (33.8, 67.6, 33.8, 77.6, 98.9, 83.8, 92.5, 56.1, 98.8, 86.6),
    }.items()
}


def get_published(subset: str) -> dict[str, float]:
    """Return the published accuracies on `subset`, in percent, by method name.

    Raises:
        DataError: `subset` is not one of `SUBSETS`.
    """
    _check_subset(subset)
    return {method: accuracies[subset] for method, accuracies in PUBLISHED.items()}


def load(subset: str, data_dir: str | Path | None = None) -> SeriesTask:
    """Load one of `SUBSETS`: from `data_dir` if given, else from aeon's wheel, else from the cache, else by download.

    Files are sought as {folder}/{subset}/{subset}_TRAIN.ts or {folder}/{subset}_TRAIN.ts, and with .ts.gz; likewise
    _TEST. The cache is the folder `uea` in the folder that the environment variable FLOWFORMER_DATA names, or
    `flowformer` in the user's cache folder (:func:`flowformer.common.folders.cache_folder`). A download goes to the
    cache.

    Raises:
        DataError: unknown subset; files that cannot be read; or no files and no way to download them, in which case
            the message states which files are needed where.
    """
    _check_subset(subset)
    folders = _search_folders(data_dir)
    found = _find_files(subset, folders)
    if found is None and data_dir:
        raise DataError(
            f"UEA subset {subset}: no {_describe_files(subset)} in {data_dir} or its folder {subset}; without "
            "--data-dir, aeon's files, the cache and a download are tried"
        )
    train, test = [read_table(path) for path in found] if found else _download(subset, folders)
    note = "" if found and not _ships_with_aeon(found[0]) else f" (through aeon {metadata.version('aeon')})"
    return build_task(
        train,
        test,
        name=subset,
        published=get_published(subset),
        licence=LICENCE,
        source=f"{train.origin} and {test.origin}{note}",
    )


def find(subset: str, data_dir: str | Path | None = None) -> tuple[Path, Path] | None:
    """Return the training and test file of a subset that :func:`load` would read; ``None`` if not found."""
    return _find_files(subset, _search_folders(data_dir))


def _search_folders(data_dir: str | Path | None) -> list[Path]:
    """Folders to search, in order. One that is given holds the data or is an error: another copy is other data."""
    return [Path(data_dir)] if data_dir else [folder for folder in (_find_aeon_data(), data_folder("uea")) if folder]


def _check_subset(subset: str) -> None:
    if subset in SUBSETS:
        return
    hint = nearest(subset, SUBSETS) or f"; known are {', '.join(SUBSETS)}"
    raise DataError(f"unknown UEA subset {subset!r}{hint}")


def _find_aeon_data() -> Path | None:
    # By the module's location: importing aeon takes seconds.
    spec = util.find_spec("aeon")
    return Path(spec.origin).parent / "datasets" / "data" if spec and spec.origin else None


def _ships_with_aeon(path: Path) -> bool:
    shipped = _find_aeon_data()
    return shipped is not None and path.is_relative_to(shipped)


def _find_files(subset: str, folders: Iterable[Path]) -> tuple[Path, Path] | None:
    for folder in folders:
        for place in (folder / subset, folder):
            for suffix in (".ts", ".ts.gz"):
                train, test = (place / f"{subset}_{part}{suffix}" for part in ("TRAIN", "TEST"))
                if train.is_file() and test.is_file():
                    return train, test
    return None


def _download(subset: str, folders: Iterable[Path]) -> tuple[SeriesTable, SeriesTable]:
    """Fetch both files through aeon, keep them only if they are whole, and return what they hold."""
    folder = data_folder("uea")
    logger.info("downloading %s to %s", subset, folder)
    try:
        make_folder(folder)
        # Inside the folder, so that a finished file moves into place in one step.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            train, test = _fetch(subset, Path(scratch))
            return _keep(train, folder / subset), _keep(test, folder / subset)
    except Exception as error:  # whatever the network, the disk or aeon raised, the way out is the same
        raise DataError(_describe_missing(subset, folders, folder, error)) from error


def _fetch(subset: str, scratch: Path) -> tuple[SeriesTable, SeriesTable]:
    from aeon.datasets import load_classification

    # Downloads every file of the data set; what it returns is read again below, with our checks.
    load_classification(subset, split="test", extract_path=str(scratch), load_equal_length=False, load_no_missing=False)
    train, test = (read_table(scratch / subset / f"{subset}_{part}.ts") for part in ("TRAIN", "TEST"))
    sizes = len(train.series), len(test.series)
    if sizes != SPLIT_SIZES[subset]:
        raise DataError(f"downloaded {sizes} train and test series instead of {SPLIT_SIZES[subset]}: cut short?")
    return train, test


def _keep(table: SeriesTable, folder: Path) -> SeriesTable:
    folder.mkdir(exist_ok=True)
    return replace(table, origin=str(Path(table.origin).replace(folder / Path(table.origin).name)))


def _describe_files(subset: str) -> str:
    return f"{subset}_TRAIN.ts and {subset}_TEST.ts (or .ts.gz)"


def _describe_missing(subset: str, looked_in: Iterable[Path], folder: Path, error: Exception) -> str:
    return (
        f"UEA subset {subset}: no {_describe_files(subset)} in "
        f"{', '.join(str(one) for one in looked_in)}, and the download failed: {type(error).__name__}: {error}. "
        f"Both files are published at {WEBSITE}/description.php?Dataset={subset}; put them into {folder / subset}, or "
        f"into any folder DIR and pass --data-dir DIR."
    )
