"""Enwik8: the first 100,000,000 bytes of the English Wikipedia of 3 March 2006, byte by byte."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from flowformer.common.errors import DataError
from flowformer.tasks.downloads import DATASETS, checksum, describe_missing, search_folders
from flowformer.tasks.stored import StoredTokens
from flowformer.tasks.text.corpus import Corpus
from flowformer.tasks.text.tokenizers import BytesTokenizer
from flowformer.tasks.token_cache import keep, open_bytes

# Bytes of train, validation and test: the usual split, as in Transformer-XL's prep_enwik8.py.
SPLIT_SIZES = (90_000_000, 5_000_000, 5_000_000)
# Of the 100,000,000 bytes: https://mattmahoney.net/dc/textrules.html
MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
SPLIT_FILES = ("train.txt.raw", "valid.txt.raw", "test.txt.raw")  # what prep_enwik8.py writes

# Test bits per byte of AFT-local with 24 layers and 256 channels, by window and by the length of sequences.
WINDOWS: Mapping[int, float] = {
    1: 1.205, 2: 1.176, 4: 1.165, 8: 1.162, 64: 1.160, 128: 1.165, 256: 1.164, 512: 1.171, 1_024: 1.173,
}  # fmt: skip
LENGTHS: Mapping[int, float] = {2_048: 1.135, 4_096: 1.134}
# Test bits per byte: Zhai et al., "An Attention Free Transformer", 2021, table 4 (sequences of 1,024). Models of 12
# layers and 512 channels, but for those of "-24" and aft-simple: 24 layers and 256 channels. Then tables 5 and 6, whose
# other rows are in table 4 too.
PUBLISHED: Mapping[str, float] = {
    "transformer": 1.137,
    "transformer-24": 1.130,
    "reformer": 1.195,
    "synthesizer": 1.298,
    "linear": 1.207,
    "performer": 1.199,
    "aft-local-12": 1.180,
    "aft-local-24": 1.154,
    "aft-simple": 1.209,
    **{f"aft-local-24-window-{window}": bits for window, bits in WINDOWS.items()},
    **{f"aft-local-24-length-{length}": bits for length, bits in LENGTHS.items()},
}


def load(data_dir: str | Path | None = None) -> Corpus:
    """Load Enwik8 from ``data_dir`` if given, else from the cache.

    It is sought as ``enwik8``, as ``enwik8.zip``, or as the three files of Transformer-XL's prep_enwik8.py
    (``train.txt.raw``, ``valid.txt.raw``, ``test.txt.raw``), in the folder itself and in its folder ``enwik8``. The
    cache is the folder that the environment variable FLOWFORMER_DATA names, or ``flowformer`` in the user's cache
    folder.

    Raises:
        DataError: if it is not found, with a message how to get it; or if it is not Enwik8, by its size and
            MD5.
    """
    dataset = DATASETS["enwik8"]
    folders = search_folders(dataset, data_dir)
    found = _find(folders)
    if found is None:
        raise DataError(describe_missing(dataset, f"enwik8, enwik8.zip or {', '.join(SPLIT_FILES)}", folders))
    files = [_unpack(found[0])] if found[0].suffix == ".zip" else found
    _check(found[0], files)
    train, validation, test = _split(files)
    source = ", ".join(map(str, found))
    return Corpus("enwik8", BytesTokenizer(), train, validation, test, source, dataset.licence)


def is_here(data_dir: str | Path | None = None) -> bool:
    """Return whether :func:`load` would find the files."""
    return _find(search_folders(DATASETS["enwik8"], data_dir)) is not None


def _find(folders: Iterable[Path]) -> list[Path] | None:
    for folder in folders:
        for names in (("enwik8",), ("enwik8.zip",), SPLIT_FILES):
            files = [folder / name for name in names]
            if all(file.is_file() for file in files):
                return files
    return None


def _unpack(archive: Path) -> Path:
    def build(folder: Path) -> None:
        try:
            with zipfile.ZipFile(archive) as zipped:
                zipped.extract("enwik8", folder)
        except (zipfile.BadZipFile, zlib.error, KeyError, EOFError, RuntimeError) as error:
            raise DataError(f"{archive} is not a zip file that contains enwik8: {error}; incomplete?") from error

    return keep("enwik8", archive, [archive], build) / "enwik8"


def _check(found: Path, files: list[Path]) -> None:
    sizes = [file.stat().st_size for file in files]
    wanted = list(SPLIT_SIZES) if len(files) > 1 else [sum(SPLIT_SIZES)]
    if sizes != wanted:
        raise DataError(
            f"{found}: expected {' and '.join(f'{size:,}' for size in wanted)} bytes, got "
            f"{' and '.join(f'{size:,}' for size in sizes)}: incomplete, or not Enwik8? Your own text is read by "
            f"flowformer.tasks.text.files."
        )
    if (md5 := checksum(files, "md5")) != MD5:
        raise DataError(f"{found}: expected the MD5 {MD5}, got {md5}: not Enwik8")


def _split(files: list[Path]) -> list[StoredTokens]:
    if len(files) > 1:
        return [open_bytes(file) for file in files]
    ends = np.cumsum(SPLIT_SIZES).tolist()
    return [open_bytes(files[0], end - size, end) for size, end in zip(SPLIT_SIZES, ends, strict=True)]
