"""Values of pixels in stored arrays, and their conversion to uint8."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.readers.array_layout.stored import StoredArray
from pipeline.sources.readers.arrays import FileRows

# Stored values -> uint8, of the same shape.
Conversion = Callable[[np.ndarray], np.ndarray]

# Bytes of an array whose values are looked at at a time.
_SCAN_BYTES = 1 << 23
# Floats that stay below half of [0, 1] may have another range.
_LEAST_HIGHEST = 0.5
# Ranges that people store; the first one that holds the values is proposed.
_RANGES = {
    "f": ((0, 1), (-1, 1), (0, 255)),
    "i": ((-128, 127), (0, 4_095), (0, 65_535)),
    "u": ((0, 4_095), (0, 65_535)),
}
# Integers that never exceed one of these are probably not of 0 to 255.
_DARK = (1, 16)


class _Range(NamedTuple):
    """The values of one array or of several."""

    lowest: Any
    highest: Any
    are_whole: bool


def check_dtypes(images: Sequence[StoredArray]) -> None:
    """Checks that the images of all splits are of one kind: booleans, integers or floats.

    Raises:
      StageError: another dtype, or two kinds.
    """
    kinds = {"b": "bool", "i": "integers", "u": "integers", "f": "floats"}
    for array in images:
        if array.dtype.kind not in kinds:
            raise StageError(f"{array}; expected numbers: save x.astype(numpy.uint8)")
        other = next((o for o in images if kinds[o.dtype.kind] != kinds[array.dtype.kind]), None)
        if other is not None:
            raise StageError(
                f"{array}; expected {other.dtype} as in {other.where}: save both with the same "
                f"values and dtype, x.astype(numpy.uint8)"
            )


def decide(
    arrays: Sequence[tuple[str, FileRows]], pixel_range: tuple[float, float] | None
) -> tuple[Conversion | None, list[str]]:
    """How the values of a set's images become uint8; the same for all splits.

    Args:
      arrays: (name, dtype and shape for messages; the images) of each split.
      pixel_range: values that become 0 and 255; None to find them.

    Returns:
      The conversion; None for values that are stored as they must be.
      Notes on what was decided.

    Raises:
      UsageError: only the user can know the range, or a value lies outside of `pixel_range`.
      StageError: a value is no number.
    """
    dtypes = [rows.dtype for _, rows in arrays]
    is_uint8, dtype = set(dtypes) == {np.dtype(np.uint8)}, dtypes[0].newbyteorder("=")
    if dtype.kind == "b" and not pixel_range:
        return _of_bool, ["bool images: False is stored as 0, True as 255"]
    ranges = [_scan(where, rows, to_the_end=bool(pixel_range)) for where, rows in arrays]
    lowest, highest = min(f.lowest for f in ranges), max(f.highest for f in ranges)
    if lowest < 0:
        where = arrays[[f.lowest for f in ranges].index(lowest)][0]
    else:
        where = arrays[[f.highest for f in ranges].index(highest)][0]
    values = f"values {lowest!s} to {highest!s}"  # Of float32, no more digits than it has.
    if pixel_range:
        low, high = pixel_range
        # A limit with the digits that float32 shows is that value of float32; its rest is rounded.
        with np.errstate(over="ignore"):
            least, most = np.array(pixel_range, dtype if dtype.kind == "f" else float)
        if lowest < least or highest > most:
            raise UsageError(
                f"{where}, {values}; expected values within "
                "--pixel_range={:g},{:g}: set the range to the values of black and white, or save "
                "numpy.clip(x, {:g}, {:g})".format(*pixel_range, *pixel_range)
            )
        return functools.partial(_scaled, low=low, high=high), []
    are_whole = all(f.are_whole for f in ranges)
    if dtype.kind == "f" and lowest >= 0 and _LEAST_HIGHEST < highest <= 1:
        note = f"{dtype} {values} are multiplied by 255 and rounded"
        return functools.partial(_scaled, low=0, high=1), [note]
    is_small = dtype.kind == "f" and highest <= 1
    if are_whole and lowest >= 0 and highest <= 255 and not is_small:
        notes = [] if is_uint8 else [f"{dtype} {values} are whole and stored as they are"]
        dark = _dark_limit(highest)
        if dark is None:
            notes += _dark_parts_notes(arrays, ranges)
        else:
            notes.append(
                f"warning: pixels are at most {int(highest)} of 255, nearly black, and stored as "
                f"they are; --pixel_range=0,{dark} makes {dark} white"
            )
        return (None if is_uint8 else _as_they_are), notes
    proposed = next(
        ((low, high) for low, high in _RANGES[dtype.kind] if low <= lowest and highest <= high),
        (math.floor(lowest), math.ceil(highest)),
    )
    raise UsageError(
        f"{where}, {values}; expected whole numbers 0 to 255, or floats 0 to 1: name the values of "
        "black and white, such as --pixel_range={},{}".format(*proposed)
    )


def _dark_limit(highest: Any) -> int | None:
    """The value that is probably white in pixels that reach `highest`; None for 255."""
    return next((limit for limit in _DARK if 0 < highest <= limit), None)


def _dark_parts_notes(
    arrays: Sequence[tuple[str, FileRows]], ranges: Sequence[_Range]
) -> list[str]:
    """Warnings of arrays that are nearly black beside others that are not."""
    names: dict[int, list[str]] = {}
    for (where, _), values in zip(arrays, ranges, strict=True):
        if limit := _dark_limit(values.highest):
            names.setdefault(limit, []).append(where)
    return [
        f"warning: pixels of {parts[0]}{f' and {len(parts) - 1} more' if parts[1:] else ''} are at "
        f"most {limit} of 255, nearly black, those of other arrays are not, and all are stored as "
        f"they are; if {limit} is white, save numpy.uint8(x * (255 / {limit}))"
        for limit, parts in names.items()
    ]


def _scan(where: str, rows: FileRows, *, to_the_end: bool) -> _Range:
    """The values of an array; of uint8, no more blocks than are needed unless `to_the_end`."""
    lowest, highest, are_whole = [], [], True
    is_float = rows.dtype.kind == "f"
    for first, block in rows.blocks(_SCAN_BYTES):
        if is_float and not np.isfinite(block).all():
            row = first + int(np.argwhere(~np.isfinite(block))[0][0])
            raise StageError(
                f"{where}: image {row} holds NaN or an infinity; expected numbers: save "
                "numpy.nan_to_num(x), or the array without these images"
            )
        lowest.append(block.min())
        highest.append(block.max())
        if is_float and are_whole:
            are_whole = bool((block == np.rint(block)).all())
        if rows.dtype == np.uint8 and not to_the_end and highest[-1] > max(_DARK):
            break
    return _Range(min(lowest), max(highest), are_whole)


def _of_bool(block: np.ndarray) -> np.ndarray:
    return block.astype(np.uint8) * 255


def _as_they_are(block: np.ndarray) -> np.ndarray:
    return block.astype(np.uint8)


def _scaled(block: np.ndarray, *, low: float, high: float) -> np.ndarray:
    """`low` becomes 0 and `high` 255; halves are rounded to the even number."""
    return np.rint((block.astype(np.float64) - low) / (high - low) * 255).astype(np.uint8)
