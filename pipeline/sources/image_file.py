"""Image files through Pillow, with bounds on what a small one may make of itself.

The header is read first. What is in it is refused if it is out of proportion to the file, and
pixels are decoded only where it does not promise too many of them.
"""

import functools
import io
import types
from typing import Any, BinaryIO

import numpy as np

from pipeline.sources.source import MAX_IMAGE_PIXELS

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# The Pillow modes of 8 bits a channel -> the mode that is stored.
_MODES = {"1": "L", "L": "L", "RGB": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "HSV": "RGB"}
# Text of a PNG, unpacked. Pillow bears 64 MiB, which a file of 60 kB can hold; notes of cameras
# and programs take less than one.
_MAX_TEXT_BYTES = 4 << 20
# Calls by which Pillow reads a header: some for each part of it, a few hundred in all. A GIF of
# 10 MB of comments takes 80,000 of them, and a minute and a half.
_MAX_HEADER_READS = 10_000
# More than the file: each part is read once, and the first bytes of it again.
_MORE_HEADER_BYTES = 1 << 16
# Scans of a progressive JPEG, each of which is decoded over the whole image: programs write some
# ten, and libjpeg-turbo's own fuzzers stop at 500.
_SCAN, _MAX_SCANS = b"\xff\xda", 500
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # Tags of TIFF.


class _Header:
    """A file of which Pillow reads the header, which may not have it read too much.

    The parts of a TIFF's header, and of a JPEG's notes, say where in the file they are, and may
    all be the same megabyte.
    """

    def __init__(self, file: BinaryIO):
        self._file, place = file, file.tell()
        self._bytes_left = 2 * file.seek(0, io.SEEK_END) + _MORE_HEADER_BYTES
        self._reads_left = _MAX_HEADER_READS
        file.seek(place)

    def read(self, num_bytes: int = -1) -> bytes:
        """As the file's; raises a ValueError where that is too much."""
        data = self._file.read(num_bytes)
        self._bytes_left -= len(data)
        self._reads_left -= 1
        if min(self._bytes_left, self._reads_left) < 0:
            raise ValueError("a header that is out of proportion to the file")
        return data

    def end(self) -> None:
        """Lets what follows be read as often as it takes."""
        self.read = self._file.read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@functools.cache
def _pillow() -> types.ModuleType:
    """Pillow's Image, with our bounds in place of its own."""
    from PIL import Image, PngImagePlugin, TiffImagePlugin

    Image.MAX_IMAGE_PIXELS = None  # The caller says how many, and `_opened` looks.
    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES
    directory = TiffImagePlugin.ImageFileDirectory_v2
    load = directory.load
    directory.load = lambda self, file: load(self, _Header(file))
    return Image


def _opened(file: BinaryIO, max_pixels: int) -> Any:
    """A Pillow image of which nothing but the header is read.

    Raises:
      ValueError: no image, or one that must not be decoded.
    """
    header = _Header(file)
    try:
        image = _pillow().open(header, formats=_FORMATS)
    except _pillow().UnidentifiedImageError as error:
        num_bytes = file.seek(0, io.SEEK_END)
        raise ValueError(f"{num_bytes} bytes that are no image") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"a damaged image ({error})") from error
    header.end()
    width, height = image.size
    _check_size(height, width, max_pixels)
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_LENGTH, 0), tags.get(_TILE_WIDTH, 0)
    if not all(isinstance(size, int) for size in tile):
        raise ValueError("a damaged image (its tiles have no size)")
    # A tile is decoded whole, however little of the image it is.
    _check_size(*tile, max_pixels, what="tiles of ")
    return image


def _check_size(height: int, width: int, max_pixels: int, what: str = "") -> None:
    """Raises a ValueError for more pixels than --max_image_pixels."""
    if height * width > max_pixels:
        raise ValueError(
            f"{what}{height}×{width} = {height * width:,} pixels, expected at most "
            f"{max_pixels:,}: --max_image_pixels allows more"
        )


def shape_of(file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS) -> tuple[int, int, int]:
    """The shape that `decode` would give, without decoding; raises a ValueError as it does."""
    with _opened(file, max_pixels) as image:
        return image.height, image.width, 1 if image.mode in ("1", "L", "LA", "La") else 3


def decode(data: bytes, max_pixels: int = MAX_IMAGE_PIXELS) -> np.ndarray:
    """The pixels of an image file, its first frame.

    Args:
      data: the file.
      max_pixels: how many it may have, height × width.

    Returns:
      uint8 (H, W, 1) for grey, (H, W, 3) for anything in colour.

    Raises:
      ValueError: no image, a damaged one, one with more than 8 bits a channel, one of more pixels
        than allowed, or one that is transparent somewhere: what shows through is not in it.
    """
    with _opened(io.BytesIO(data), max_pixels) as image:
        if image.format == "JPEG" and data.count(_SCAN) > _MAX_SCANS:
            raise ValueError(
                f"{data.count(_SCAN):,} scans of a JPEG, expected at most {_MAX_SCANS}"
            )
        try:
            pixels = _pixels(image)
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"a damaged image ({error})") from error
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _pixels(image: Any) -> np.ndarray:
    mode = image.mode
    if mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = _converted(image, "RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            raise ValueError("has transparent pixels, expected opaque ones: flatten it")
        image = image.convert("L" if mode in ("L", "LA", "La") else "RGB")
    elif mode not in _MODES:
        raise ValueError(f"is of Pillow's mode {mode}, expected 8 bits a channel")
    return np.asarray(_converted(image, _MODES.get(image.mode, "RGB")))


def _converted(image: Any, mode: str) -> Any:
    """An image in a mode; no copy where that is its own."""
    return image if image.mode == mode else image.convert(mode)
