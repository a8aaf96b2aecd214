"""Contact sheets: originals above their reconstructions, as a PNG."""

import io

import numpy as np

NUM_COLUMNS = 16
# Pixels of margin around each pair, and between rows of pairs.
_GAP = 4
# A picture is enlarged to at least this many pixels a side; 28 becomes 56.
_MIN_SIDE = 48
_BACKGROUND = 96


def contact_sheet(originals: np.ndarray, reconstructions: np.ndarray) -> bytes:
    """A PNG with each original directly above its reconstruction.

    Args:
      originals: uint8 (n, H, W, C); n ≥ 1. With other than 1 or 3 channels the first is shown.
      reconstructions: the same shape.

    Returns:
      The bytes of the PNG.
    """
    from PIL import Image

    pairs = np.concatenate([originals, reconstructions], axis=1)  # (n, 2H, W, C)
    if pairs.shape[-1] != 3:
        pairs = pairs[..., :1]
    scale = -(-_MIN_SIDE // min(originals.shape[1:3]))
    pairs = pairs.repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, channels = pairs.shape
    num_columns = min(NUM_COLUMNS, count)
    num_rows = -(-count // num_columns)
    sheet = np.full(
        (num_rows * (height + _GAP) + _GAP, num_columns * (width + _GAP) + _GAP, channels),
        _BACKGROUND,
        np.uint8,
    )
    for i, pair in enumerate(pairs):
        row, column = divmod(i, num_columns)
        top, left = _GAP + row * (height + _GAP), _GAP + column * (width + _GAP)
        sheet[top : top + height, left : left + width] = pair
    buffer = io.BytesIO()
    Image.fromarray(sheet.squeeze(-1) if channels == 1 else sheet).save(buffer, format="PNG")
    return buffer.getvalue()
