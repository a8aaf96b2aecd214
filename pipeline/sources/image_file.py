"""Decodes image files with Pillow: upright, with 8 bits a channel, before a background.

images/bounded_image.py opens them. Pixels are decoded only if the header states no more
than the limit.
"""

import io
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from pipeline.sources.images.bounded_image import RefusedNow, open_image, pillow
from pipeline.sources.images.image_frames import num_frames
from pipeline.sources.source import MAX_IMAGE_PIXELS

# Pillow's endings of bounded_image.FORMATS and of TIFF; a test compares them with Pillow's list.
EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".dib", ".gif", ".apng", ".webp"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".pfm"),
)
# Pillow's modes with 8 bits a channel -> the mode of the decoded image.
_MODES = {"1": "L", "L": "L", "RGB": "RGB", "YCbCr": "RGB", "CMYK": "RGB", "HSV": "RGB"}
# Modes whose pixels may be transparent -> the mode of the decoded image.
_ALPHA_MODES = {"LA": "L", "La": "L", "P": "RGB", "PA": "RGB", "RGBA": "RGB", "RGBa": "RGB"}
# Grey modes of more than 8 bits. In mode I, Pillow holds 16 bits of some formats in 32.
_DEEP_MODES = {"I;16": "L", "I;16L": "L", "I;16B": "L", "I;16N": "L", "I": "L"}
_ALL_MODES = _MODES | _ALPHA_MODES | _DEEP_MODES
# Limit on the scans of a progressive JPEG, each of which is decoded over the whole image. Programs
# write about ten; libjpeg-turbo's own fuzzers stop at 500.
_SCAN, _MAX_SCANS = b"\xff\xda", 500
# TIFF tags.
_WIDTH, _LENGTH = 256, 257
_BITS, _PHOTOMETRIC, _PLANES, _EXTRA_SAMPLES = 258, 262, 284, 338
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


def _orientation(image: Any) -> int:
    """EXIF's orientation of an opened image; 1 (upright) if the file has none, or a damaged one.

    1 for a TIFF: Pillow turns its pixels.
    """
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # Pillow would decode the pixels to search behind them.
    try:
        value = image.getexif().get(_ORIENTATION)
    except Exception:  # A damaged EXIF block; viewers ignore it too.
        return 1
    return value if isinstance(value, int) and value in _UPRIGHT else 1


class Header(NamedTuple):
    """What the header of an image file says."""

    shape: tuple[int, int, int]  # (H, W, C) of the decoded image.
    is_turned: bool  # Pillow's pixels are not upright, and `decode` turns them.
    is_of_16_bits: bool  # The pixels are scaled to 8 bits.
    is_of_deep_colour: bool  # So they are, and are not grey.
    num_frames: int  # The first is decoded.


def read_header(
    file: BinaryIO,
    max_pixels: int = MAX_IMAGE_PIXELS,
    background: str | None = None,
    *,
    allow_tiff: bool = False,
) -> Header:
    """The header of a file that `decode` decodes with the same arguments.

    Raises:
      ValueError: as `decode`, where the header alone tells.
    """
    with open_image(file, max_pixels, allow_tiff=allow_tiff) as image:
        orientation = turned_by = _orientation(image)
        height, width = image.height, image.width
        if image.format == "TIFF":  # Some versions of Pillow swap height and width already here.
            height, width = image.tag_v2[_LENGTH], image.tag_v2[_WIDTH]
            turned_by = image.tag_v2.get(_ORIENTATION)
        size = (width, height) if turned_by in _TURNED else (height, width)
        channels = len(_decoded_mode(image, background))
        is_deep_colour = _is_of_deep_colour(image)
        is_of_16_bits = image.mode in _DEEP_MODES or is_deep_colour
        return Header(
            shape=(*size, channels),
            is_turned=orientation != 1,
            is_of_16_bits=is_of_16_bits,
            is_of_deep_colour=is_deep_colour,
            num_frames=num_frames(image, file),
        )


def shape_of(
    file: BinaryIO, max_pixels: int = MAX_IMAGE_PIXELS
) -> tuple[tuple[int, int, int], bool]:
    """The first two fields of `read_header`."""
    return read_header(file, max_pixels)[:2]


def _decoded_mode(image: Any, background: str | None) -> str:
    """Pillow's mode of the decoded image, L or RGB."""
    mode = _ALL_MODES.get(image.mode)
    if mode is None:
        raise ValueError(f"is of Pillow's mode {image.mode}, expected 8 or 16 bits a channel")
    tags = getattr(image, "tag_v2", {}) if image.format == "TIFF" else {}
    if num_lost := sum(kind == 0 for kind in tags.get(_EXTRA_SAMPLES, ())):
        raise RefusedNow(
            f"is a TIFF with {num_lost} more channels than its colours and alpha, which would be "
            "left out (its ExtraSamples are 0); expected grey, RGB or RGBA: save these alone"
        )
    if tags.get(_PLANES) == 2 and _is_of_deep_colour(image) and image.tile[0][0] == "raw":
        raise RefusedNow(
            "is a TIFF of 16 bits with uncompressed planes for its colours, which Pillow misreads; "
            "expected the colours of each pixel together, or compression: save the image so"
        )
    is_grey = not background or len(set(bytes.fromhex(background[1:]))) == 1
    return mode if is_grey or not _has_alpha(image) else "RGB"


def _is_of_deep_colour(image: Any) -> bool:
    """Whether colours, or grey with alpha, are of 16 bits; of these Pillow keeps the high byte."""
    if image.mode in _DEEP_MODES:
        return False
    if image.format == "TIFF":
        return image.tag_v2.get(_BITS, (1,))[0] > 8
    args = image.tile[0][3] if image.tile else None
    if image.format == "PNG":
        return str(args).endswith(";16B")
    return image.format == "PPM" and isinstance(args, tuple) and args[-1] > 255  # Its highest.


def _check_not_black(image: Any) -> None:
    """Raises a RefusedNow for 8 bits of deep colours if none is left of these."""
    *colours, alpha = [band.getextrema() for band in _converted(image, "RGBA").split()]
    if not any(high for _, high in colours) and alpha[0] == alpha[1]:
        raise RefusedNow(
            "is of 16 bits and holds no colour above 255, and would become black; expected "
            "values up to 65535: save the image with 8 bits"
        )


def _has_alpha(image: Any) -> bool:
    return image.mode in _ALPHA_MODES or "transparency" in image.info


def decode(
    data: bytes,
    max_pixels: int = MAX_IMAGE_PIXELS,
    background: str | None = None,
    *,
    allow_tiff: bool = False,
) -> np.ndarray:
    """Decodes the first frame of an image file, upright as viewers show it.

    Args:
      data: the file's bytes.
      max_pixels: limit on height × width.
      background: the colour behind transparent pixels, #rrggbb; None to refuse them.
      allow_tiff: see open_image.

    Returns:
      uint8 (H, W, 1) for a grey image, (H, W, 3) for a colour image, and for a grey image with
        transparency before a coloured background. 16 bits are scaled to 8: 257 · v becomes v. A
        grey value is rounded to the nearest, a colour is rounded down: v // 256.

    Raises:
      ValueError: not an image, damaged, more than 16 bits a channel, more pixels than allowed, or
        transparent pixels without a background.
      RefusedNow: a ValueError, for a TIFF that is not allowed, and for what earlier versions
        decoded and lost channels or all values.
    """
    with open_image(io.BytesIO(data), max_pixels, allow_tiff=allow_tiff) as image:
        if image.format in ("JPEG", "MPO") and data.count(_SCAN) > _MAX_SCANS:
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
    mode = _decoded_mode(image, background)
    has_alpha, is_deep_colour = _has_alpha(image), _is_of_deep_colour(image)
    if image.mode in _DEEP_MODES:
        image = _of_8_bits(image)
    if has_alpha:
        image = _converted(image, "RGBA")
        if image.getchannel("A").getextrema()[0] < 255:
            if background is None:
                raise ValueError(
                    "has transparent pixels, expected opaque ones: --background=white (or black, "
                    "or #rrggbb) is put behind them"
                )
            if is_deep_colour:
                _check_not_black(image)
            image = pillow().alpha_composite(pillow().new("RGBA", image.size, background), image)
    if is_deep_colour:
        _check_not_black(image)
    return np.asarray(_converted(image, mode))


def _of_8_bits(image: Any) -> Any:
    """A grey image of 16 bits in mode L, or LA if one value is transparent."""
    values = np.asarray(image)
    if image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC) == 0:
        values = 65_535 - values  # WhiteIsZero, which Pillow inverts only in 8 bits.
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65_535:
        raise ValueError(f"holds values from {low} to {high}, expected 16 bits, 0 to 65535")
    if 0 < high < 256:
        raise ValueError(
            f"is of 16 bits and holds no value above {high}, which would become black; expected "
            "values up to 65535: save the image with 8 bits"
        )
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else np.where(values == transparent, 0, 255)
    values = values.astype(np.uint32)
    values *= 255
    values += 32_767  # So that the quotient is rounded, and 257·v becomes v.
    values //= 65_535
    grey = pillow().fromarray(values.astype(np.uint8))
    if alpha is None:
        return grey
    return pillow().merge("LA", (grey, pillow().fromarray(alpha.astype(np.uint8))))


def _converted(image: Any, mode: str) -> Any:
    """An image in a mode; no copy if the image has that mode."""
    return image if image.mode == mode else image.convert(mode)
