"""Folder of cached files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder for cached files: ``flowformer`` in ``XDG_CACHE_HOME``, else in ``~/.cache``.

    An empty or relative ``XDG_CACHE_HOME`` is ignored, as the XDG Base Directory Specification requires.

    Returns:
        The folder, which need not exist: see :func:`make_private`.

    Raises:
        FileNotFoundError: if the user has no home folder.
    """
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (given if given.is_absolute() else Path.home() / ".cache") / "flowformer"
    except RuntimeError as error:
        raise FileNotFoundError("no home folder found for the cache: set XDG_CACHE_HOME to a folder") from error


def make_private(folder: Path) -> None:
    """Create a folder and its missing parents, all with mode 0700; those that exist are left as they are.

    Raises:
        OSError: if it cannot be created, or is something other than a folder.
    """
    if folder.is_dir():
        return
    if folder.parent != folder:
        make_private(folder.parent)
    try:
        folder.mkdir(mode=0o700)
    except FileExistsError:  # another process may have been faster
        if not folder.is_dir():
            raise
