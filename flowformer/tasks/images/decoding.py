"""Decoding of image files."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from flowformer.common.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")
# Pillow's names of them. Others may run another program, as EPS does.
_FORMATS = {"JPEG", "PNG", "BMP", "DIB", "GIF", "WEBP", "TIFF", "PPM", "JPEG2000"}
_reported: list[int] = []  # the largest value of the first image that was scaled by its maximum
_ORIENTATION = 0x0112  # the tag of EXIF


class UnreadableImage(DataError):  # noqa: N818 - it costs a run nothing but that image
    """An image that cannot be read; the message states the reason."""


def decode(data: bytes) -> Image.Image:
    """Decode an image to 8-bit RGB, oriented by its EXIF data.

    Grey, palettes and CMYK are converted; what is transparent is laid on white; of an animation the first image is
    taken. Of 16 bits the upper 8 are kept. An image that does not use the highest of them, as 12-bit ones of cameras
    and scanners, is scaled by its own maximum, which is logged once.

    Raises:
        UnreadableImage: for anything that Pillow cannot read as an image, or not to its end.
    """
    from PIL import Image

    if not data:
        raise UnreadableImage("empty")
    try:
        Image.init()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=sorted(_FORMATS.intersection(Image.OPEN))) as image:
                deep = any(_swap_bytes(tile.args) != tile.args for tile in image.tile)
                image.load()
                if 0 in image.size:
                    raise UnreadableImage(f"an image of {image.width} x {image.height} pixels")
                return _to_rgb(_upright(_scale_colours(image, data) if deep else image))
    except UnreadableImage:
        raise
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage("not an image of a known format") from error
    except Exception as error:  # decoders raise whatever broken data lead them to
        raise UnreadableImage(f"{type(error).__name__}: {error}") from error


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    try:
        turned = image.getexif().get(_ORIENTATION, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image
    except Exception:  # damaged metadata; the image is there
        return image


def _scale_colours(image: Image.Image, data: bytes) -> Image.Image:
    """Return an image of 16 bits, scaled where it is one of colours that does not use the highest bit."""
    from PIL import Image

    # Pillow keeps the upper bytes. Where they are small, the lower ones are read too.
    if image.mode not in ("RGB", "RGBA"):
        return image
    extrema: Any = image.getextrema()  # a pair for each band
    if max(high for _, high in extrema[:3]) > 127:
        return image
    with Image.open(io.BytesIO(data)) as other:
        other.tile = [tile._replace(args=_swap_bytes(tile.args)) for tile in other.tile]
        other.load()
        values = np.asarray(image).astype(np.int64) * 256 + np.asarray(other)
    scaled = np.asarray(image).copy()
    scaled[..., :3] = _scale(values[..., :3])
    return Image.fromarray(scaled)


def _swap_bytes(args: Any) -> Any:
    """Return the arguments of Pillow's decoder for numbers of 16 bits with their bytes swapped; others unchanged."""
    if isinstance(args, tuple) and args:
        return (_swap_bytes(args[0]), *args[1:])
    if not isinstance(args, str) or not args.endswith((";16B", ";16L", ";16N")):
        return args
    native = "L" if sys.byteorder == "little" else "B"
    order = args[-1].replace("N", native)
    return args[:-1] + ("L" if order == "B" else "B")


def _scale(values: np.ndarray) -> np.ndarray:
    """Scale numbers of 16 bits to uint8: their upper 8 bits, or by their maximum if none uses the highest bit."""
    most = int(values.max())
    if most >= 2**15:
        return (values >> 8).astype(np.uint8)
    if most and not _reported:
        _reported.append(most)
        logger.warning(
            "images of 16 bits that use fewer (the first has values up to %d) are scaled by their maximum", most
        )
    return np.rint(values * (255 / max(most, 1))).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "F":
        raise UnreadableImage("pixels are floating-point numbers of unknown range")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UnreadableImage(f"pixels from {values.min()} to {values.max()}, expected at most 16 bits")
        deep = image.mode != "I" or values.max() > 0xFF
        return Image.fromarray(_scale(values) if deep else values.astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
    return image.convert("RGB")
