"""Images as sequences of sub-pixels: preprocessing for density models, and sampling from them.

An image (height, width, channels) is a sequence in raster order: row by row, in a row pixel by pixel, in a pixel red,
green and blue. A value is a token; all channels share one vocabulary, and so one embedding and one head.

Every sub-pixel counts, the first one too: it is predicted from :data:`START`, which stands at position 0 of what a
model sees. Sub-pixel t stands at position t + 1, and the last one is not seen, so that a model needs as many positions
as there are sub-pixels. Learned positions tell START from a sub-pixel of the same value: nothing else is at position 0.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from flowformer.common.fields import option
from flowformer.common.files import write_whole
from flowformer.common.values import read_integer
from flowformer.mechanisms import find_attention
from flowformer.models.generation import stream_tokens
from flowformer.models.language import LanguageModel
from flowformer.tasks.protocols import Track
from flowformer.tasks.sampling import SamplingOptions
from flowformer.tasks.scenes import find_mechanisms

logger = logging.getLogger(__name__)


START = 0  # the token that the first sub-pixel is predicted from


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(SamplingOptions):
    """Options of ``flowformer generate`` for images."""

    out: Path | None = option(None, "PNG file to write; required")
    count: int = option(16, "number of images to sample", at_least=1, largest=100_000)


@dataclass(frozen=True)
class PixelFormat:
    """Format of images for a density model.

    Attributes:
        height: Rows.
        width: Pixels of a row.
        channels: Sub-pixels of a pixel.
        levels: Values that a sub-pixel has, from 0; at most 256.
    """

    kind: ClassVar[str] = "images"
    generate_options: ClassVar[type] = DrawingOptions

    height: int
    width: int
    channels: int
    levels: int = 256

    def __post_init__(self) -> None:
        """Raise for invalid sizes."""
        if min(self.height, self.width, self.channels) < 1 or not 2 <= self.levels <= 256:
            raise ValueError(f"sizes must be positive and levels from 2 to 256, got {self}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Height, width and channels."""
        return self.height, self.width, self.channels

    @property
    def vocab_size(self) -> int:
        """Size of the vocabulary, which is the number of levels."""
        return self.levels

    @property
    def length(self) -> int:
        """Number of sub-pixels per image, which is the dimension of the density."""
        return math.prod(self.shape)

    def collate(self, items: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """Make a batch of uint8 images (height, width, channels).

        Returns:
            ``targets``, the sub-pixels in raster order, and ``tokens``, what each is predicted from: START and those
            before it; both (batch, length) int64.

        Raises:
            ValueError: for images of another shape.
        """
        for item in items:
            if item.shape != self.shape:
                raise ValueError(f"images must be {self.shape}, got {item.shape}")
        targets = torch.from_numpy(np.stack(items).reshape(len(items), self.length).astype(np.int64))
        return {"tokens": nn.functional.pad(targets[:, :-1], (1, 0), value=START), "targets": targets}

    def to_json(self) -> dict[str, Any]:
        """Return the format as JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PixelFormat:
        """Read a format that :meth:`to_json` wrote."""
        return cls(*(read_integer(values, name) for name in ("height", "width", "channels", "levels")))

    def generate(self, model: LanguageModel, options: DrawingOptions, *, track: Track) -> Iterator[str]:
        """Sample images and write them as a grid to a PNG file.

        Raises:
            ValueError, TypeError: for a file of another kind, and as :func:`sample`.
            ModuleNotFoundError: without Pillow.
        """
        import PIL  # noqa: F401 - if it is missing, say so before the images are drawn

        if options.out is None or options.out.suffix.lower() != ".png" or options.out.is_dir():
            raise ValueError(f"images require --out FILE.png, got {options.out}")
        growing = [name for name in find_mechanisms(model) if not find_attention(name).can("fixed state")]
        if growing:
            logger.warning("%s remembers every sub-pixel: memory grows with each that is drawn", ", ".join(growing))
        images = sample(
            model, self, options.count, watch=lambda steps: track(steps, self.length, "sub-pixels"),
            **options.as_arguments(),
        )  # fmt: skip
        write_grid(images, self.levels, options.out, scale=max(1, 64 // self.height))
        yield f"{len(images)} images in {options.out}\n"


def sample(
    model: LanguageModel,
    form: PixelFormat,
    count: int = 1,
    *,
    watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] | None = None,
    **options: Any,
) -> np.ndarray:
    """Sample images from a model, one sub-pixel of each image at a time.

    Besides the sub-pixels drawn, only the states of the attentions are kept: with flow, linear and AFT-simple as much
    at the end as at the beginning, with AFT-local the window; with softmax and AFT-full they grow with each sub-pixel.

    Args:
        model: The model.
        form: The format of its images.
        count: Images, drawn together.
        watch: Is given the steps, and hands them on: a progress bar.
        **options: ``seed``, ``temperature``, ``top_k`` and ``top_p``, as in
            :func:`flowformer.models.generation.stream_tokens`. Image i of ``seed`` is image 0 of ``seed + i``, but for
            rounding.

    Returns:
        (count, height, width, channels) uint8, values below the format's levels.

    Raises:
        ValueError, TypeError: for a model of another vocabulary, and as
            :func:`flowformer.models.generation.stream_tokens`.
    """
    if model.vocab_size != form.levels:
        raise ValueError(f"the format has {form.levels} levels, but the model a vocabulary of {model.vocab_size}")
    steps = stream_tokens(model, [[START]] * count, max_new_tokens=form.length, **options)
    values = [step.to("cpu", torch.uint8) for step in (steps if watch is None else watch(steps))]
    return torch.stack(values, 1).view(count, *form.shape).numpy()


def write_grid(images: np.ndarray, levels: int, path: str | Path, *, gap: int = 1, scale: int = 1) -> None:
    """Write images as a grid to a PNG file, atomically; as many columns as rows, or slightly more.

    Args:
        images: (n, height, width, channels) uint8, 1 channel (grey) or 3 (red, green, blue).
        levels: Values that a sub-pixel has; the brightest is white.
        path: The file.
        gap: Pixels of the white line between images.
        scale: Pixels that a pixel is wide and high.

    Raises:
        ValueError: for no image, or ones of other channels.
    """
    from PIL import Image

    if images.ndim != 4 or not len(images) or images.shape[-1] not in (1, 3):
        raise ValueError(f"images must be (n, height, width, 1 or 3) with n positive, got {images.shape}")
    count, height, width, channels = images.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8)
    for number, image in enumerate(images):
        top, left = number // columns * (height + gap), number % columns * (width + gap)
        grid[top : top + height, left : left + width] = np.rint(image * (255 / (levels - 1)))
    grid = grid.repeat(scale, 0).repeat(scale, 1)
    png = io.BytesIO()
    Image.fromarray(grid[..., 0] if channels == 1 else grid).save(png, "PNG")
    write_whole(Path(path), png.getvalue())
