"""Films of episodes: frames of a simulator without a screen, as GIF or MP4."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from flowformer.common.errors import DataError
from flowformer.common.files import replacing
from flowformer.tasks.decision.simulators.environments import make_environment
from flowformer.tasks.decision.simulators.hosts import Here, Moment

SUFFIXES = (".gif", ".mp4")
MOST_FPS = 30  # of a film; of a faster simulator only some frames are rendered
_LIBRARIES = {"egl": "EGL", "osmesa": "OSMesa"}  # through which MuJoCo renders without a screen
_PACKAGES = "libegl1 (egl) or libosmesa6 (osmesa)"
_WINDOWS = ("glfw", "cgl", "wgl")  # with one
_DEFAULT_FPS = 30  # of an environment that does not say


class Film(Protocol):
    """Takes frames (height, width, 3) uint8, one after the other."""

    def __call__(self, frame: np.ndarray) -> None: ...  # noqa: D102


class Filmed(Here):
    """Environments in this process, of which frames are rendered.

    Args:
        spec: Of the environment.
        film: Takes the frames.
        every: Steps from one frame to the next.
    """

    def __init__(self, spec: Any, film: Film, every: int = 1) -> None:
        super().__init__(spec)
        self._film, self._every, self._steps = film, every, 0

    def _make(self) -> Any:
        return make_environment(self.spec, "rgb_array")

    def _begin(self, number: int, seed: int) -> Moment:
        moment = super()._begin(number, seed)
        self._render(number)
        return moment

    def _act(self, number: int, action: Any) -> Moment:
        moment = super()._act(number, action)
        self._steps += 1
        if self._steps % self._every == 0 or moment.terminated or moment.truncated:
            self._render(number)
        return moment

    def _render(self, number: int) -> None:
        frame = np.asarray(self._running[number].render())
        if frame.ndim != 3 or frame.shape[-1] != 3 or frame.dtype != np.uint8:
            raise DataError(f"expected frames (height, width, 3) uint8, got {frame.shape} {frame.dtype}")
        self._film(frame)


def check_film(path: Path, spec: Any) -> None:
    """Check that films of an environment can be written, before anything is computed; choose how MuJoCo renders.

    Where ``MUJOCO_GL`` is not set it becomes ``egl``, or ``osmesa`` where only that library is there.

    Raises:
        DataError: for another suffix, a missing library, or an environment that does not render frames.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: films are written as {' or '.join(SUFFIXES)}, got {path.suffix or 'no suffix'}")
    if path.suffix.lower() == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise DataError(f"{path}: MP4 needs imageio-ffmpeg: pip install imageio-ffmpeg; GIF needs nothing more")
    if "mujoco" in str(spec.entry_point):
        _choose_renderer()


def _choose_renderer() -> None:
    given = os.environ.get("MUJOCO_GL", "")
    if given.lower() in _LIBRARIES and not _has(_LIBRARIES[given.lower()]):
        raise DataError(f"MUJOCO_GL is {given}, and that library was not found: install {_PACKAGES}, or unset it")
    if given:
        if given.lower() not in (*_LIBRARIES, *_WINDOWS):
            raise DataError(f"MUJOCO_GL must be {', '.join((*_LIBRARIES, *_WINDOWS))} or unset, got {given!r}")
        return
    found = next((name for name, library in _LIBRARIES.items() if _has(library)), None)
    if found is None:
        raise DataError(
            f"MuJoCo renders without a screen through EGL or OSMesa, and neither library was found: install {_PACKAGES}"
        )
    os.environ["MUJOCO_GL"] = found


def _has(library: str) -> bool:
    return ctypes.util.find_library(library) is not None


def choose_frames(environment: Any, fps: float | None = None) -> tuple[int, float]:
    """Return how many steps there are from one frame to the next, and the frames of a second of film.

    Args:
        environment: It says how many steps are a second.
        fps: Most frames of a second; 30 if absent.
    """
    steps = float(environment.metadata.get("render_fps") or _DEFAULT_FPS)
    every = max(1, round(steps / (fps or MOST_FPS)))
    return every, steps / every


@contextmanager
def open_film(path: Path, fps: float) -> Iterator[Film]:
    """Write a film whole or not at all.

    Args:
        path: The file; its suffix says which kind.
        fps: Frames of a second.

    Yields:
        What takes the frames.

    Raises:
        OSError: if the file cannot be written.
    """
    with replacing(path) as staged:
        if path.suffix.lower() == ".gif":
            frames: list[Any] = []
            yield lambda frame: frames.append(_reduce(frame))
            _write_gif(staged, frames, fps)
            return

        import imageio

        writer: Any = imageio.get_writer(staged, format=cast("Any", "FFMPEG"), fps=fps, macro_block_size=2)
        with closing(writer):
            yield writer.append_data


def _reduce(frame: np.ndarray) -> Any:
    """A frame in 256 colours, a third of the memory."""
    from PIL import Image

    return Image.fromarray(frame).quantize(dither=Image.Dither.NONE)


def _write_gif(path: Path, frames: list[Any], fps: float) -> None:
    first, *rest = frames
    first.save(path, format="GIF", save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)
