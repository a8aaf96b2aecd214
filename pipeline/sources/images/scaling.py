"""Scales decoded images, and makes them grey."""

from collections.abc import Callable
from typing import Any

import numpy as np


def _through_pillow(image: np.ndarray, change: Callable[[Any], Any]) -> np.ndarray:
    """Applies a function of Pillow images to an image (H, W, 1) or (H, W, 3)."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image[..., 0] if image.shape[2] == 1 else image))
    changed = np.asarray(change(picture))
    return changed[..., np.newaxis] if changed.ndim == 2 else changed


def grey(image: np.ndarray) -> np.ndarray:
    """An image (H, W, 3) as (H, W, 1)."""
    return _through_pillow(image, lambda picture: picture.convert("L"))


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Scales an image with any channels to (H, W): bilinear, antialiased, in integers."""
    from PIL import Image

    def scale(picture: Image.Image) -> Image.Image:
        return picture.resize(size[::-1], Image.Resampling.BILINEAR)

    if image.shape[2] in (1, 3):
        return _through_pillow(image, scale)
    channels = [_through_pillow(image[..., i : i + 1], scale) for i in range(image.shape[2])]
    return np.concatenate(channels, axis=2)
