"""Decodes image files with Pillow, and bounds the memory and time that a small file can cost.

The header is read first. A header out of proportion to the file is refused, and pixels are decoded
only if the header states no more than the limit.
"""

import functools
import io
import types
from typing import Any, BinaryIO

import numpy as np

from pipeline.sources.source import MAX_IMAGE_PIXELS

_FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM")
# Pillow's modes with 8 bits a channel -> the mode of the decoded image.
_MODES = {"1": "L", "L": "L", "RGB": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "HSV": "RGB"}
# Limit on a PNG's text, uncompressed. Pillow allows 64 MiB, which a file of 60 kB can hold; the
# metadata of cameras and programs takes less than one.
_MAX_TEXT_BYTES = 4 << 20
# Limit on Pillow's read calls for a header: normally a few hundred. A GIF with 10 MB of comments
# takes 80,000 calls, and a minute and a half.
_MAX_HEADER_READS = 10_000
# A header read may total twice the file and these bytes: parts of a header are read again.
_MORE_HEADER_BYTES = 1 << 16
# Limit on the scans of a progressive JPEG, each of which is decoded over the whole image. Programs
# write about ten; libjpeg-turbo's own fuzzers stop at 500.
_SCAN, _MAX_SCANS = b"\xff\xda", 500
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags.
# EXIF's tag of the orientation in which a camera was held, and what turns stored pixels upright:
# CIPA DC-008 (EXIF 2.32), section 4.6.4. Orientation 1 is upright.
_ORIENTATION = 274
_UPRIGHT = {
    2: np.fliplr,
    3: lambda pixels: np.rot90(pixels, 2),
    4: np.flipud,
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],
    8: np.rot90,
}
_TURNED = (5, 6, 7, 8)  # These orientations swap height and width.


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

    def read(self, num_bytes: int = -1) -> bytes:
        """Reads from the file; raises a ValueError beyond the bounds."""
        data = self._file.read(num_bytes)
        self._bytes_left -= len(data)
        self._reads_left -= 1
        if min(self._bytes_left, self._reads_left) < 0:
            raise ValueError("a header that is out of proportion to the file")
        return data

    def end(self) -> None:
        """Ends the header: later reads are unbounded."""
        self.read = self._file.read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@functools.cache
def _pillow() -> types.ModuleType:
    """Pillow's Image module, with our bounds instead of Pillow's."""
    from PIL import Image, PngImagePlugin, TiffImagePlugin

    Image.MAX_IMAGE_PIXELS = None  # `_opened` checks the caller's limit.
    PngImagePlugin.MAX_TEXT_MEMORY = _MAX_TEXT_BYTES
    directory = TiffImagePlugin.ImageFileDirectory_v2
    load = directory.load
    directory.load = lambda self, file: load(self, _Header(file))
    return Image


def _opened(file: BinaryIO, max_pixels: int) -> Any:
    """A Pillow image with only the header read.

    Raises:
      ValueError: not an image, or an image that must not be decoded.
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
    # A tile is decoded completely, even if the image uses little of it.
    _check_size(*tile, max_pixels, prefix="tiles of ")
    return image


def _check_size(height: int, width: int, max_pixels: int, prefix: str = "") -> None:
    """Raises a ValueError for more pixels than --max_image_pixels."""
    if height * width > max_pixels:
        raise ValueError(
            f"{prefix}{height}×{width} = {height * width:,} pixels, expected at most "
            f"{max_pixels:,}: --max_image_pixels allows more"
        )


def _orientation(image: Any) -> int:
    """EXIF's orientation of an opened image; 1 (upright) if the file has none, or a damaged one."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to search behind them.
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # A damaged EXIF block; viewers ignore it too.
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


def shape_of(
    file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[tuple[int, int, int], bool]:
    """The shape that `decode` would return, without decoding; raises the same ValueErrors.

    Returns:
      (H, W, C).
      Whether EXIF says that the stored pixels are not upright.
    """
    with _opened(file, max_pixels) as image:
        orientation = _orientation(image)
        size = image.size if orientation in _TURNED else (image.height, image.width)
        channels = 1 if image.mode in ("1", "L", "LA", "La") else 3
        return (*size, channels), orientation != 1


def decode(
    data: bytes, max_pixels: int = MAX_IMAGE_PIXELS, background: str | None = None
) -> np.ndarray:
    """Decodes the first frame of an image file, upright as viewers show it.

    Args:
      data: the file's bytes.
      max_pixels: limit on height × width.
      background: the colour behind transparent pixels, #rrggbb; None to refuse them.

    Returns:
      uint8 (H, W, 1) for a grey image, (H, W, 3) for a colour image.

    Raises:
      ValueError: not an image, damaged, more than 8 bits a channel, more pixels than allowed, or
        transparent pixels, whose background the file does not define.
    """
    with _opened(io.BytesIO(data), max_pixels) as image:
        if image.format == "JPEG" and data.count(_SCAN) > _MAX_SCANS:
            raise ValueError(
                f"{data.count(_SCAN):,} scans of a JPEG, expected at most {_MAX_SCANS}"
            )
        try:
            orientation = _orientation(image)
            pixels = _pixels(image, background)
        except (OSError, SyntaxError, EOFError) as error:
            raise ValueError(f"a damaged image ({error})") from error
    if orientation in _UPRIGHT:
        pixels = np.ascontiguousarray(_UPRIGHT[orientation](pixels))
    return pixels[..., np.newaxis] if pixels.ndim == 2 else pixels


def _pixels(image: Any, background: str | None) -> np.ndarray:
    mode = image.mode
    if mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        image = _converted(image, "RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            if background is None:
                raise ValueError(
                    "has transparent pixels, expected opaque ones: --background=white (or black, "
                    "or #rrggbb) is put behind them"
                )
            image = _pillow().alpha_composite(_pillow().new("RGBA", image.size, background), image)
        image = image.convert("L" if mode in ("L", "LA", "La") else "RGB")
    elif mode not in _MODES:
        raise ValueError(f"is of Pillow's mode {mode}, expected 8 bits a channel")
    return np.asarray(_converted(image, _MODES.get(image.mode, "RGB")))


def _converted(image: Any, mode: str) -> Any:
    """An image in a mode; no copy if the image has that mode."""
    return image if image.mode == mode else image.convert(mode)
