"""The values of columns: images as bytes with their shapes, and labels as numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.sources.readers.parquet_files import column_types

# A longer text is a caption and names no class.
_MAX_NAME_BYTES = 1_000
# More distinct texts are no classes.
_MAX_CLASSES = 65_536
# The label of a row whose number is not whole.
NOT_WHOLE = np.iinfo(np.int64).min
# The shape of a row without an image (its data is the reason), and of an image file.
_FAULT, _ENCODED = (-1, 0, 0), (0, 0, 0)


class OutOfRange(Exception):
    """The numbers of a column of lists, in words, of which some are no pixels."""


class Cells(NamedTuple):
    """The images in n rows of a column."""

    data: bytes | memoryview  # Of all rows, joined.
    lengths: np.ndarray  # (n,) int64, bytes of each row
    shapes: np.ndarray  # (n, 3) int32, (H, W, C) of pixels; see `is_fault` and `is_encoded`
    highest: int = 0  # Of the pixels in lists.


def is_fault(shape: Sequence[int]) -> bool:
    """Whether a row of `Cells.shapes` belongs to no image; its data is the reason."""
    return shape[0] < 0


def is_encoded(shape: Sequence[int]) -> bool:
    """Whether a row of `Cells.shapes` belongs to the bytes of an image file."""
    return shape[0] == 0


def label_numbers(column: pa.Array, numbers: dict[str, int]) -> np.ndarray:
    """The labels in a column as numbers.

    Args:
      column: (n,), whole numbers, booleans, texts or nulls.
      numbers: text -> its number; texts that are new are added.

    Returns:
      int64 (n,); -1 for a null, a NaN or an empty text, NOT_WHOLE for a fraction.

    Raises:
      ValueError: texts that name no classes, or a number beyond int64.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_null(column.type):
        return np.full(len(column), -1, np.int64)
    if column_types.is_text(column.type):
        encoded = column.cast(pa.large_string()).dictionary_encode()
        longest = pc.max(pc.binary_length(encoded.dictionary)).as_py() or 0
        if longest > _MAX_NAME_BYTES:
            raise ValueError(f"a label of {longest:,} bytes")
        texts = encoded.dictionary.to_pylist()
        own = [numbers.setdefault(text, len(numbers)) if text else -1 for text in texts]
        check_classes(numbers)
        places = encoded.indices.fill_null(len(own)).to_numpy(zero_copy_only=False)
        return np.array([*own, -1], np.int64)[places]
    if pa.types.is_floating(column.type):
        values = column.to_numpy(zero_copy_only=False).astype(np.float64)
        is_whole = (np.abs(values) < 2**53) & (values == np.floor(values))
        labels = np.where(is_whole, np.where(is_whole, values, 0).astype(np.int64), NOT_WHOLE)
        return np.where(np.isnan(values), -1, labels)
    return column.cast(pa.int64()).fill_null(-1).to_numpy(zero_copy_only=False)


def check_classes(numbers: Mapping[str, int]) -> None:
    """Raises a ValueError for too many texts to be classes."""
    if len(numbers) > _MAX_CLASSES:
        raise ValueError(f"more than {_MAX_CLASSES:,} different labels")


def cells(column: pa.Array, max_pixels: int, max_bytes: int) -> Cells:
    """The images in a column.

    Args:
      column: (n,), structs with bytes, bytes, or lists of whole numbers.
      max_pixels: limit on height × width of pixels in lists.
      max_bytes: limit on the bytes of an image file.

    Raises:
      OutOfRange: numbers in lists that are no pixels.
    """
    dims: list[int] = []
    if isinstance(column, pa.ExtensionArray):
        about, column = column.type, column.storage
        dims = list(getattr(about, "shape", ()))  # Of Arrow's fixed_shape_tensor.
        if list(getattr(about, "permutation", None) or range(len(dims))) != list(range(len(dims))):
            raise ValueError("a tensor whose dimensions are permuted, expected them in order")
    if column_types.is_list(column.type):
        highest = _highest(column)
        return _pixel_cells(column, dims, max_pixels)._replace(highest=highest)
    paths = None
    if pa.types.is_struct(column.type):
        if column.type.get_field_index("path") >= 0:
            paths = pc.struct_field(column, "path")
        column = pc.struct_field(column, "bytes")
    return _encoded_cells(column.cast(pa.large_binary()), paths, max_bytes)


def _highest(column: pa.Array) -> int:
    """The highest number in lists; raises OutOfRange for numbers that are no pixels."""
    while column_types.is_list(column.type):
        column = column.flatten()
    found = pc.min_max(column).as_py()
    lowest, highest = found["min"] or 0, found["max"] or 0  # None without numbers.
    if lowest < 0 or highest > 255:
        raise OutOfRange(f"numbers {lowest} to {highest}")
    return highest


def _encoded_cells(column: pa.Array, paths: pa.Array | None, max_bytes: int) -> Cells:
    """Image files as they are."""
    _, offsets_buffer, data = column.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int64)[column.offset :][: len(column) + 1]
    lengths, data = np.diff(offsets), memoryview(data or b"")
    shapes = np.full((len(column), 3), _ENCODED, np.int32)
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    faults = np.flatnonzero(is_null | (lengths > max_bytes)).tolist()
    if not faults:
        return Cells(data[offsets[0] : offsets[-1]], lengths, shapes)
    parts = [data[first:end] for first, end in zip(offsets, offsets[1:], strict=False)]
    for row in faults:
        path = paths[row].as_py() if paths is not None else None
        reason = f"{lengths[row]:,} bytes, expected at most {max_bytes:,}"
        if is_null[row]:
            reason = f"no image, only the path {path!r}" if path else "no image (null)"
            reason += ": write the bytes of the file into the table" if path else ""
        parts[row], shapes[row] = reason.encode(errors="backslashreplace"), _FAULT
    return Cells(b"".join(parts), np.array([len(part) for part in parts], np.int64), shapes)


def _pixel_cells(column: pa.Array, dims: list[int], max_pixels: int) -> Cells:
    """Pixels in lists: all rows at once if they have one shape, else row by row."""
    try:
        pixels = _stacked(column, dims, max_pixels)
    except ValueError as error:
        if len(column) > 1:
            rows = [_pixel_cells(column.slice(i, 1), dims, max_pixels) for i in range(len(column))]
            data, lengths, shapes, _ = zip(*rows, strict=True)
            return Cells(b"".join(data), np.concatenate(lengths), np.concatenate(shapes))
        reason = str(error).encode()
        return Cells(reason, np.array([len(reason)]), np.array([_FAULT], np.int32))
    shapes = np.full((len(pixels), 3), pixels.shape[1:], np.int32)
    return Cells(pixels.tobytes(), np.full(len(pixels), math.prod(pixels.shape[1:])), shapes)


def _stacked(column: pa.Array, dims: list[int], max_pixels: int) -> np.ndarray:
    """The pixels in lists of lists.

    Args:
      column: (n,), n > 0, of numbers 0 to 255.
      dims: the shape of flat lists, or [].
      max_pixels: limit on height × width.

    Returns:
      uint8 (n, H, W, C).

    Raises:
      ValueError: the lists differ in length, or are no image.
    """
    num_rows, shape = len(column), []
    while column_types.is_list(column.type):
        if column.null_count:
            raise ValueError("no image (null)")
        if pa.types.is_fixed_size_list(column.type):
            shape.append(column.type.list_size)
        else:
            lengths = pc.min_max(pc.list_value_length(column)).as_py()
            if lengths["min"] != lengths["max"]:
                raise ValueError("rows of different lengths, expected a rectangle of pixels")
            shape.append(lengths["max"])
        if not shape[-1]:
            raise ValueError("a list without pixels")
        column = column.flatten()
    height, width, channels = _image_shape(dims or shape)
    if height * width > max_pixels:
        raise ValueError(
            f"{height}×{width} = {height * width:,} pixels, expected at most {max_pixels:,}: "
            "--max_image_pixels allows more"
        )
    if column.null_count:
        raise ValueError("a pixel that is null, expected whole numbers 0 to 255")
    values = column.to_numpy(zero_copy_only=False)
    return values.astype(np.uint8, copy=False).reshape(num_rows, height, width, channels)


def _image_shape(dims: list[int]) -> tuple[int, int, int]:
    """The shape (H, W, C) of lists with these lengths; raises a ValueError for no image."""
    if len(dims) == 1:
        side, colour_side = math.isqrt(dims[0]), math.isqrt(dims[0] // 3)
        if side * side == dims[0]:
            return side, side, 1
        if 3 * colour_side * colour_side == dims[0]:
            s = colour_side
            raise ValueError(
                f"a flat list of {dims[0]} pixels, which may be 3×{s}×{s} or {s}×{s}×3; expected "
                f"lists of lists: x.reshape(3, {s}, {s}).transpose(1, 2, 0).tolist() or "
                f"x.reshape({s}, {s}, 3).tolist()"
            )
        raise ValueError(
            f"a flat list of {dims[0]} pixels, which is no square; expected lists of lists: "
            "x.reshape(HEIGHT, WIDTH).tolist()"
        )
    if len(dims) == 2:
        return dims[0], dims[1], 1
    if len(dims) == 3 and dims[2] in (1, 3):
        return dims[0], dims[1], dims[2]
    shape = "×".join(map(str, dims))
    raise ValueError(
        f"{shape} numbers, expected height×width×1 or ×3: channels that come first move with "
        "x.transpose(1, 2, 0).tolist()"
    )
