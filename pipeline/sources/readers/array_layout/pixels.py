"""Images in stored arrays as uint8 (n, H, W, C): which axis is which; values are in values.py."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.readers.array_layout import values as values_lib
from pipeline.sources.readers.array_layout.stored import StoredArray
from pipeline.sources.readers.arrays import FileRows

_CHANNELS = (1, 3)
_EXPECTED = "expected uint8 (n, H, W), (n, H, W, 1) or (n, H, W, 3)"
# Bytes of stored pixels that are converted at a time: conversion takes several times as much.
_PIECE_BYTES = 1 << 22
# Rows of pixels are not taken for features of smaller images, height and width.
LEAST_SIDE = 8


class _Layout(NamedTuple):
    """The axes of an array of images."""

    axes: str  # A letter for each: N counts images; H, W, C; P all pixels of an image.
    shape: tuple[int, int, int]  # (H, W, C)
    note: str = ""  # What is said of it; "" if nothing had to be decided.


class Pixels:
    """Images uint8 (n, H, W, C), converted on access."""

    dtype = np.dtype(np.uint8)

    def __init__(
        self,
        rows: FileRows,
        axes: str,
        shape: tuple[int, int, int],
        convert: values_lib.Conversion | None,
    ):
        """Reads nothing.

        Args:
          rows: the stored array, images first.
          axes: a letter for each axis, see _Layout.
          shape: (H, W, C).
          convert: stored values -> uint8; None if they are stored so.
        """
        self.shape = (len(rows), *shape)
        self._rows, self._convert = rows, convert
        self._order = [axes.index(letter) for letter in "NHWCP" if letter in axes]
        row_bytes = math.prod(rows.shape[1:]) * rows.dtype.itemsize
        self._step = max(1, _PIECE_BYTES // max(1, row_bytes))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray | slice) -> np.ndarray:
        if self._convert is None:
            return self._arranged(rows)
        if isinstance(rows, slice):
            first, last, _ = rows.indices(len(self))
            pieces = [
                slice(start, min(start + self._step, last))
                for start in range(first, last, self._step)
            ]
        else:
            pieces = [rows[start : start + self._step] for start in range(0, len(rows), self._step)]
        return np.concatenate([self._convert(self._arranged(piece)) for piece in pieces or [rows]])

    def _arranged(self, rows: np.ndarray | slice) -> np.ndarray:
        """Stored values (n, H, W, C)."""
        block = self._rows[rows]
        return block.transpose(self._order).reshape(len(block), *self.shape[1:])


def open_images(
    images: Mapping[str, StoredArray],
    labels: Mapping[str, StoredArray | None],
    pixel_range: tuple[float, float] | None,
) -> tuple[dict[str, Pixels], list[str]]:
    """The images of a set.

    Args:
      images: split -> array.
      labels: split -> array with as many labels as the split has images; None without labels.
      pixel_range: see SourceOptions.

    Returns:
      split -> images.
      Notes on what was decided.

    Raises:
      UsageError: values that only `pixel_range` explains, or values outside of it.
      StageError: an array that is no images, or whose axes are ambiguous.
    """
    counts_first = _is_first_axis_counted(images, labels)
    layouts = {
        split: _find_layout(array, labels.get(split), counts_first=counts_first)
        for split, array in images.items()
    }
    values_lib.check_dtypes(list(images.values()))
    opened = {split: array.rows(layouts[split].axes) for split, array in images.items()}
    stored = [(str(images[split]), rows) for split, (rows, _) in opened.items()]
    convert, notes = values_lib.decide(stored, pixel_range)
    pixels = {
        split: Pixels(rows, axes, layouts[split].shape, convert)
        for split, (rows, axes) in opened.items()
    }
    return pixels, [*(layout.note for layout in layouts.values() if layout.note), *notes]


def _is_first_axis_counted(
    images: Mapping[str, StoredArray], labels: Mapping[str, StoredArray | None]
) -> bool:
    """Whether the arrays of a set show that their first axis counts images.

    They agree in all other axes, and differ in the first, or labels count the first axis alone.
    """
    shapes = {array.shape for array in images.values()}
    is_counted = any(
        _count(labels.get(split)) == array.shape[0] != array.shape[-1]
        for split, array in images.items()
        if array.shape
    )
    return len({shape[1:] for shape in shapes}) == 1 and (len(shapes) > 1 or is_counted)


def _count(labels: StoredArray | None) -> int | None:
    """The number of labels; None without labels."""
    return labels.shape[0] if labels is not None and labels.shape else None


def _find_layout(images: StoredArray, labels: StoredArray | None, *, counts_first: bool) -> _Layout:
    """The meaning of each axis of an array.

    Args:
      images: the array.
      labels: as many labels as images; None without labels.
      counts_first: whether other arrays show that the first axis counts images.

    Raises:
      StageError: the array is no images, or its axes have more than one meaning.
    """
    shape = images.shape
    count = _count(labels)
    if not math.prod(shape) or not 2 <= len(shape) <= 4:
        raise StageError(f"{images}; {_EXPECTED} with at least one image")
    is_first, is_last = (count in (None, shape[axis]) for axis in (0, -1))
    if not is_first and not (is_last and len(shape) > 2):
        raise StageError(
            f"{images.where} has {shape[0]} images and labels {labels.about}; "
            f"expected one integer for each image, and images {images.about} counted by "
            "the first axis: check that both belong to the same set, or ignore labels with "
            "--labels=none"
        )
    if len(shape) == 2:
        return _flat(images, is_labelled=count is not None, counts_first=counts_first)
    if count is None:
        _check_counted(images, counts_first=counts_first)
    elif len(shape) == 3 and is_first and is_last and not counts_first:
        raise StageError(
            f"{images}; {_EXPECTED}, and the first axis and the last have as many entries as "
            "labels: save numpy.moveaxis(x, -1, 0)[..., None] if the last counts the images, or "
            "x[..., None] if the first does"
        )
    if len(shape) == 3 and is_first:
        return _Layout("NHW", (*shape[1:], 1))
    if len(shape) == 3:
        return _counted_last("HWN", (*shape[:2], 1))
    if is_first and shape[3] in _CHANNELS:
        return _Layout("NHWC", shape[1:])
    if is_first and shape[1] in _CHANNELS:
        channels, height, width = shape[1:]
        note = f"arrays (n, {channels}, {height}, {width}) are images with the channels first"
        return _Layout("NCHW", (height, width, channels), note)
    if is_last and shape[2] in _CHANNELS:
        return _counted_last("HWCN", shape[:3])
    raise StageError(f"{images}; {_EXPECTED}: save x[..., :3], or another part of the channels")


def _counted_last(axes: str, shape: tuple[int, int, int]) -> _Layout:
    sizes = ", ".join(map(str, shape[: len(axes) - 1]))
    note = f"arrays ({sizes}, n) are images that the last axis counts, as many as labels"
    return _Layout(axes, shape, note)


def _check_counted(images: StoredArray, *, counts_first: bool) -> None:
    """Raises a StageError if, without labels, another axis than the first may count images."""
    shape, reason, remedy = images.shape, "", "numpy.moveaxis(x, -1, 0)"
    if len(shape) == 3 and shape[2] in _CHANNELS:
        reason, remedy = "can be one image with channels", "x[None]"
    elif len(shape) == 3 and shape[0] == shape[1] and not counts_first:
        reason = "can be images that the last axis counts"
    elif len(shape) == 4 and shape[2] in _CHANNELS and not {shape[1], shape[3]} & {*_CHANNELS}:
        reason = "looks like images that the last axis counts"
    if reason:
        raise StageError(f"{images}; {_EXPECTED}, and this {reason}: if so, save {remedy}")


def _flat(images: StoredArray, *, is_labelled: bool, counts_first: bool) -> _Layout:
    """The layout of an array (n, pixels)."""
    num_images, num_pixels = images.shape
    side, other = math.isqrt(num_pixels), math.isqrt(num_images)
    if side * side == num_pixels:
        may_be_turned = (
            other * other == num_images
            and other >= min(side, LEAST_SIDE)
            and not counts_first
            and (not is_labelled or num_images == num_pixels)
        )
        if may_be_turned:
            raise StageError(
                f"{images}; {_EXPECTED}, and this can be one image, or {num_images} images of "
                f"{side}×{side}, or {num_pixels} of {other}×{other} with an image in each column: "
                f"save x[None], or x.reshape(-1, {side}, {side}), or "
                f"x.T.reshape(-1, {other}, {other})"
            )
        note = f"arrays (n, {num_pixels}) are images of {side}×{side}, row by row"
        return _Layout("NP", (side, side, 1), note)
    side = math.isqrt(num_pixels // 3)
    if side * side * 3 == num_pixels:
        raise StageError(
            f"{images}; {_EXPECTED}, and this can be RGB images with the channels first or last: "
            f"save x.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1) if the channels are "
            f"first, or x.reshape(-1, {side}, {side}, 3) if they are last"
        )
    raise StageError(f"{images}; {_EXPECTED}: save x.reshape(-1, H, W) with the images' size")
