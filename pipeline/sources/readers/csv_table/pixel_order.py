"""The order of the pixel columns of a CSV: that of their names if they state one."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.readers.csv_table import sample
from pipeline.sources.readers.csv_table.header import Head, listed

_COLOURS = {"r": 0, "red": 0, "g": 1, "green": 1, "b": 2, "blue": 2}
_NUMBERS = re.compile(r"\d+(?:\.\d+)*")  # As in header.numbered.
# In names such as x0y1 the first number may be the column, and people write both orders.
_MAY_BE_COLUMN = re.compile(r"(x[^a-z#]*#[^a-z#]*y|c(ol[a-z]*)?[^a-z#]*#[^a-z#]*r(ow)?)[^a-z#]*#")


class Order(NamedTuple):
    """The order in which pixel columns are read."""

    # (pixels,) int64: places among the pixel columns, row by row, channels last; None for 0, 1, ….
    places: np.ndarray | None
    note: str  # What is said of it; "" if nothing had to be decided.


def find(
    head: Head, separator: bytes, columns: Sequence[int], shape: tuple[int, int, int]
) -> Order:
    """The order of the pixel columns.

    Args:
      head: what the first line says.
      separator: of columns.
      columns: the pixel columns, as in the file.
      shape: (H, W, C) of the image that they hold.

    Raises:
      StageError: names that state no order, or columns of several kinds.
    """
    plain = Order(None, _told(shape))
    if not head.names or head.numbering:
        return plain
    names = [head.names[column] for column in columns]
    stems = [_NUMBERS.sub("#", name) for name in names]
    kinds = list(dict.fromkeys(stems))
    # pandas repeats a name as name.1, name.2: such numbers count names, not pixels.
    if not any("#" in kind for kind in kinds) or kinds[1:] == [f"{kinds[0]}.#"]:
        return plain
    numbers = [[_number(text) for text in re.findall(r"\d+", name)] for name in names]
    renaming = _renaming(head, separator, columns)
    if len(kinds) > 1:
        colours = _colours(kinds) if shape[2] == 3 else None
        if colours is None:
            shown = ", ".join(repr(names[stems.index(kind)]) for kind in kinds[:5])
            raise StageError(
                f"{head.path}: {len(columns)} columns of {len(kinds)} kinds ({shown}) would be the "
                f"pixels of {shape[0]}×{shape[1]}; expected pixels named alike but for numbers, or "
                "r, g and b: remove columns that are no pixels, alpha among them, or "
                f"{renaming}"
            )
        places = _by_colour(stems, numbers, colours, shape)
        notes = []
    elif len({len(of_name) for of_name in numbers}) > 1:
        return plain
    else:
        table = np.array(numbers, np.int64)
        places = _by_number(table, shape)
        is_swapped = _MAY_BE_COLUMN.search(kinds[0]) and shape[2] == 1 and table.shape[1] == 2
        if is_swapped and places is not None and not _is_plain(places):
            is_in_order = _is_plain(_by_number(table[:, ::-1], shape))
            if is_in_order:
                first = listed(names[:3])
                return Order(None, f"pixel columns ({first}, …) are read in the file's order")
            places = None
        num_axes = sum(len(np.unique(axis)) > 1 for axis in table.T)
        notes = [plain.note] if num_axes == 1 and plain.note else []
        if num_axes == 2 and shape[2] == 1 and not _is_plain(places):
            notes.append("the first number is the row")
    if places is None:
        raise StageError(
            f"{head.path}: the pixel columns {listed(names)} are in an order that their numbers do "
            "not tell; expected numbers that count the pixels of a square image, or its rows and "
            f"columns: {renaming}"
        )
    if _is_plain(places):
        return Order(None, "; ".join(notes))
    shown = ", ".join(repr(names[place]) for place in places[:4])
    told = f"pixel columns are read in the order of their names ({shown}, …), not of the file"
    return Order(places, "; ".join([told, *notes]))


def _told(shape: tuple[int, int, int]) -> str:
    """What is said of columns of RGB whose names do not tell the channels."""
    if shape[2] == 1:
        return ""
    side = shape[0]
    return (
        f"warning: images are RGB of {side}×{side}, and no name tells the channels, which are read "
        "as the last axis: r, g, b, r, g, b, …; if all of r is first, save "
        f"x.reshape(-1, 3, {side}, {side}).transpose(0, 2, 3, 1) as .npz"
    )


def _number(text: str) -> int:
    return int(text) if len(text) < 19 else -1  # int64 holds 18 digits.


def _is_plain(places: np.ndarray | None) -> bool:
    return places is not None and bool((places == np.arange(len(places))).all())


def _by_number(numbers: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray | None:
    """The places of names row by row, channels last.

    Args:
      numbers: int64 (n, k), the numbers in each name.
      shape: (H, W, C) with n numbers.

    Returns:
      int64 (n,); None if the numbers neither ascend nor state an order.
    """
    values = [np.unique(axis) for axis in numbers.T]
    axes = [axis for axis in range(len(values)) if len(values[axis]) > 1]
    sizes = [len(values[axis]) for axis in axes]
    ascending = np.lexsort(numbers.T[::-1])
    are_distinct = len(np.unique(numbers, axis=0)) == len(numbers)
    are_runs = all(values[axis][-1] - values[axis][0] == len(values[axis]) - 1 for axis in axes)
    if not are_distinct:
        return None
    if len(axes) < 2 or not are_runs or math.prod(sizes) != len(numbers):
        return ascending if _is_plain(ascending) or (are_runs and len(axes) < 2) else None
    channel = max((axis for axis in axes if len(values[axis]) == shape[2] == 3), default=None)
    space = [axis for axis in axes if axis != channel]
    if [len(values[axis]) for axis in space] not in ([shape[0] * shape[1]], [*shape[:2]]):
        return None
    order = space if channel is None else [*space, channel]
    return np.lexsort(numbers.T[order[::-1]])


def _colours(kinds: Sequence[str]) -> Mapping[str, int] | None:
    """Stem -> channel, if three stems differ by a colour alone; else None."""
    words = [set(re.findall("[a-z]+", kind)) for kind in kinds]
    own = [of_kind - set.intersection(*words) for of_kind in words]
    colours = [_COLOURS.get(next(iter(rest))) if len(rest) == 1 else None for rest in own]
    is_rgb = len(kinds) == 3 and set(colours) == {0, 1, 2}
    return dict(zip(kinds, colours, strict=True)) if is_rgb else None


def _by_colour(
    stems: Sequence[str],
    numbers: Sequence[Sequence[int]],
    colours: Mapping[str, int],
    shape: tuple[int, int, int],
) -> np.ndarray | None:
    """The places of names that state a colour and numbers; None if the numbers state no order."""
    channels = np.array([colours[stem] for stem in stems])
    parts = []
    for channel in range(3):
        places = np.flatnonzero(channels == channel)
        of_channel = [numbers[place] for place in places]
        if len(places) != shape[0] * shape[1] or len({len(n) for n in of_channel}) > 1:
            return None
        table = np.array(of_channel, np.int64)
        if table.shape[1] == 1 and (np.diff(np.unique(table)) == 3).all():
            table //= 3  # Numbers that go through all channels: r0, g1, b2, r3.
        order = _by_number(table, (*shape[:2], 1))
        if order is None:
            return None
        parts.append(places[order])
    return np.stack(parts, axis=1).reshape(-1)


def _renaming(head: Head, separator: bytes, columns: Sequence[int]) -> str:
    """The remedy: names in the order of the file."""
    no_pixels = sorted({*range(head.num_columns)} - {*columns})
    code = (
        f"p = t.columns.delete({no_pixels}); "
        "t = t.rename(columns={c: f'pixel{i}' for i, c in enumerate(p)})"
    )
    return f"if the file has them row by row, {sample.pandas_edit(head, separator, code)}"
