"""From the bytes of an image file to its pixels."""

from __future__ import annotations

import io
import warnings
from typing import TYPE_CHECKING

import numpy as np

from flowformer.common.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")
_ORIENTATION = 0x0112  # the tag of EXIF


class UnreadableImage(DataError):  # noqa: N818 - it costs a run nothing but that image
    """An image that cannot be read; the message says why."""


def decode(data: bytes) -> Image.Image:
    """Decode an image to RGB of 8 bits, upright as its EXIF data say.

    Grey, palettes and CMYK are converted; what is transparent is laid on white; of 16 bits the upper 8 are kept; of an
    animation the first image is taken.

    Raises:
        UnreadableImage: for anything that Pillow cannot read as an image, or not to its end.
    """
    from PIL import Image

    if not data:
        raise UnreadableImage("empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                return _to_rgb(_upright(image))
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("no image of a known kind") from error
    except Exception as error:  # decoders raise whatever broken data lead them to
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata; the image is there
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise UnreadableImage("pixels are floating-point numbers of an unknown range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UnreadableImage(f"pixels from {values.min()} to {values.max()}; wanted are 16 bits at most")
        deep = image.mode != "I" or values.max() > 0xFF
        return Image.fromarray((values >> 8 if deep else values).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
