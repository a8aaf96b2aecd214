"""Pictures as PNG: single images, grids, and originals above their reconstructions."""

import io

import numpy as np

NUM_COLUMNS = 16
# Pixels of margin around each pair, and between rows of pairs.
_GAP = 4
# Images are enlarged to at least this many pixels a side; 28 becomes 56.
_MIN_SIDE = 48
_BACKGROUND = 96


def contact_sheet(originals: np.ndarray, *below: np.ndarray) -> bytes:
    """A PNG with each original directly above its reconstruction, and whatever else is below.

    Args:
      originals: uint8 (n, H, W, C); n ≥ 1. Unless C is 1 or 3, the first channel is shown.
      *below: pictures of the same shape.

    Returns:
      The bytes of the PNG.
    """
    return grid(np.concatenate([originals, *below], axis=1), side=originals.shape[1])


def grid(
    tiles: np.ndarray, *, num_columns: int = NUM_COLUMNS, side: int | None = None, gap: int = _GAP
) -> bytes:
    """A PNG of a grid of equally large images, enlarged.

    Args:
      tiles: uint8 (n, H, W, C); n ≥ 1. Unless C is 1 or 3, the first channel is shown.
      num_columns: pictures in a row.
      side: height that decides the enlargement; H by default.
      gap: pixels between rows and between columns.

    Returns:
      The bytes of the PNG.
    """
    if tiles.shape[-1] != 3:
        tiles = tiles[..., :1]
    scale = -(-_MIN_SIDE // min(side or tiles.shape[1], tiles.shape[2]))
    tiles = tiles.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = tiles.shape
    num_columns = min(num_columns, count)
    num_rows = -(-count // num_columns)
    sheet = np.full(
        (num_rows * (height + gap) + gap, num_columns * (width + gap) + gap, channels),
        _BACKGROUND,
        np.uint8,
    )
    for i, tile in enumerate(tiles):
        row, column = divmod(i, num_columns)
        top, left = gap + row * (height + gap), gap + column * (width + gap)
        sheet[top : top + height, left : left + width] = tile
    return png(sheet)


def png(image: np.ndarray) -> bytes:
    """An image, uint8 (H, W, C), as a PNG; unless C is 1 or 3, the first channel is shown."""
    from PIL import Image

    picture = image if image.shape[-1] == 3 else image[..., 0]
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG")
    return buffer.getvalue()
