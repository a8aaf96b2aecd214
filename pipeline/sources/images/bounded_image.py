"""Opens images with Pillow, and bounds the memory and time that a small file's header can cost.

A header out of proportion to the file is refused, and so is one that states too many pixels.
"""

import functools
import io
import types
from typing import Any, BinaryIO

FORMATS = ("PNG", "JPEG", "BMP", "DIB", "GIF", "WEBP", "PPM")
# The first bytes of a TIFF, as Pillow recognises one.
_TIFF = (b"II*\0", b"MM\0*", b"MM*\0", b"II\0*", b"II+\0", b"MM\0+")
# Limit on a PNG's text, uncompressed. Pillow allows 64 MiB, which a file of 60 kB can hold; the
# metadata of cameras and programs takes less than one.
_MAX_TEXT_BYTES = 4 << 20
# Limit on Pillow's read calls for a header: normally a few hundred. A GIF with 10 MB of comments
# takes 80,000 calls, and a minute and a half.
_MAX_HEADER_READS = 10_000
# The first bytes of PNG and JPEG.
_READ_ONCE = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")
# A header read may total twice the file and these bytes: parts of a header are read again.
_MORE_HEADER_BYTES = 1 << 16
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags.


class RefusedNow(ValueError):
    """An image that earlier versions read."""


class _Header:
    """A file that bounds how much Pillow reads while it parses the header.

    The parts of a TIFF header, and of JPEG metadata, state their offsets in the file, and all of
    them may point to the same megabyte.
    """

    def __init__(self, file: BinaryIO):
        self._file, position = file, file.tell()
        self._bytes_left = 2 * file.seek(0, io.SEEK_END) + _MORE_HEADER_BYTES
        self._reads_left = _MAX_HEADER_READS
        file.seek(position)
        self.seek, self.tell = file.seek, file.tell  # Faster than through __getattr__.

    def read(self, num_bytes: int = -1) -> bytes:
        """Reads from the file; raises a ValueError beyond the bounds."""
        data = self._file.read(num_bytes)
        self._bytes_left -= len(data)
        self._reads_left -= 1
        if self._bytes_left < 0 or self._reads_left < 0:
            raise ValueError("a header that is out of proportion to the file")
        return data

    def end(self) -> None:
        """Ends the header: later reads are unbounded."""
        self.read = self._file.read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@functools.cache
def pillow() -> types.ModuleType:
    """Pillow's Image module, with our bounds instead of Pillow's."""
    from PIL import Image, PngImagePlugin, TiffImagePlugin

    Image.MAX_IMAGE_PIXELS = None  # `open_image` checks the caller's limit.
    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES
    directory = TiffImagePlugin.ImageFileDirectory_v2
    load = directory.load
    directory.load = lambda self, file: load(self, _Header(file))
    return Image


def open_image(file: BinaryIO, max_pixels: int, *, allow_tiff: bool = False) -> Any:
    """A Pillow image with only the header read.

    Args:
      file: opened for reading, with random access.
      max_pixels: limit on height × width, and on those of a TIFF's tiles.
      allow_tiff: whether a TIFF may be opened, and decoded by libtiff.

    Raises:
      ValueError: not an image, or an image that must not be decoded.
      RefusedNow: a TIFF that is not allowed.
    """
    header = file if _is_bounded(file) else _Header(file)
    try:
        image = pillow().open(header, formats=(*FORMATS, "TIFF") if allow_tiff else FORMATS)
    except pillow().UnidentifiedImageError as error:
        num_bytes = file.seek(0, io.SEEK_END)
        file.seek(0)
        if not allow_tiff and file.read(4) in _TIFF:
            raise RefusedNow(
                "is a TIFF, which is not read unless asked for; expected PNG, JPEG or another "
                "format: convert trusted images, or set --allow_tiff"
            ) from error
        raise ValueError(f"{num_bytes} bytes that are no image") from error
    except (OSError, SyntaxError, EOFError) as error:
        raise ValueError(f"a damaged image ({error})") from error
    if isinstance(header, _Header):
        header.end()
    width, height = image.size
    _check_size(height, width, max_pixels)
    if tags := getattr(image, "tag_v2", None):
        tile = tags.get(_TILE_LENGTH, 0), tags.get(_TILE_WIDTH, 0)
        if not all(isinstance(size, int) for size in tile):
            raise ValueError("a damaged image (its tiles have no size)")
        # A tile is decoded completely, even if the image uses little of it.
        _check_size(*tile, max_pixels, prefix="tiles of ")
    return image


def _is_bounded(file: BinaryIO) -> bool:
    """Whether a file cannot make Pillow read much more than the file: a small PNG or JPEG.

    Their headers are read once, from the start to the end. (`pillow` bounds a JPEG's metadata.)
    """
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(len(_READ_ONCE[0]))
    file.seek(0)
    return num_bytes <= _MORE_HEADER_BYTES and start.startswith(_READ_ONCE)


def _check_size(height: int, width: int, max_pixels: int, prefix: str = "") -> None:
    """Raises a ValueError for more pixels than --max_image_pixels."""
    if height * width > max_pixels:
        raise ValueError(
            f"{prefix}{height}×{width} = {height * width:,} pixels, expected at most "
            f"{max_pixels:,}: --max_image_pixels allows more"
        )
