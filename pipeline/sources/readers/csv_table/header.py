"""The first lines of a CSV: encoding, separator, and the names of the columns."""

import collections
import math
import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.cli.errors import StageError
from pipeline.sources.readers.csv_table import fields as fields_lib

LABEL_NAMES = ("label", "class", "target", "y")
# A shorter run of numbers may be the row of a small image.
_LEAST_RUN = 16
# Columns beside such a run: an index, an id, a label.
_MOST_BESIDE = 3
# The first bytes of files that are no text in UTF-8; the longer mark comes first.
_MARKS = {b"\xff\xfe\0\0": "UTF-32", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
_PACKED = (b"PK\3\4",)


class Head(NamedTuple):
    """What the first line says of the columns."""

    path: str  # For messages.
    num_columns: int
    names: list[str] | None  # In lower case; None without a header.
    numbering: str  # What is said of a header that names nothing, such as 0,1,2,…; else "".


def refuse_encoding(path: str, data: bytes) -> None:
    """Raises a StageError if the first bytes of a file are not of text in UTF-8."""
    mark = next((mark for mark in _MARKS if data.startswith(mark)), None)
    if mark:
        found, encoding = f"text in {_MARKS[mark]}", _MARKS[mark]
    elif data.startswith(_PACKED):
        raise StageError(f"{path}: is a packed file; expected text in UTF-8: unpack it")
    elif b"\0" in data.partition(b"\n")[0]:
        found, encoding = "no text, or UTF-16 without a mark: it holds zero bytes", "UTF-16LE"
    else:
        return
    raise StageError(
        f"{path}: is {found}; expected text in UTF-8: convert it with iconv -f {encoding} "
        f"-t UTF-8 {shlex.quote(path)} > utf8.csv"
    )


def separator_of(path: str, lines: Sequence[bytes]) -> bytes:
    """The comma; or, if the first line has none, the one of ; tab | that all lines share.

    Args:
      path: path of the file, for the message.
      lines: the first lines.

    Raises:
      StageError: the first line has fewer than two columns.
    """
    first = lines[0] if lines else b""
    bare = [re.sub(rb'"[^"]*"', b"", line) for line in lines]  # Quoted fields may hold separators.
    if any(b"," in line for line in bare[:1]):
        return b","
    others = [s for s in (b";", b"\t", b"|") if s in first]
    others = [s for s in others if len({line.count(s) for line in bare}) == 1]
    if len(others) == 1:
        return others[0]
    remedy = "convert the file"
    if len(first.split(b" ")) > 2:
        remedy = f"sed -E 's/^ +| +$//g; s/ +/,/g' {shlex.quote(path)} > commas.csv"
    raise StageError(
        f"{path}: the first line has {int(bool(first))} column(s); expected a label and pixels, "
        f"separated by commas, semicolons, tabs or |: {remedy}"
    )


def head_of(path: str, fields: Sequence[bytes]) -> Head:
    """What the fields of the first line say: a header of names, one of numbers, or a row."""
    names = [field.decode(errors="replace").strip(" \"'\r").lower() for field in fields]
    # If most fields are not numbers, the line is a header and not a row with a bad field.
    is_named = 2 * sum(not fields_lib.is_word(field) for field in fields) < len(fields)
    numbering = ""
    if not is_named and _are_column_numbers(names):
        numbering = "the first line numbers the columns"
    elif not is_named and _are_of_pandas(names):
        numbering = "the first line is a row that pandas took for a header, and is not read"
    return Head(path, len(fields), names if is_named or numbering else None, numbering)


def _are_column_numbers(names: list[str]) -> bool:
    """Whether names are 0, 1, 2 and so on, beside few others: a header and no image."""
    numbers = [int(name) for name in names if re.fullmatch(r"\d{1,9}", name)]
    if numbers == list(range(len(names))):
        return len(names) > 2
    is_run = len(numbers) > _LEAST_RUN and len(names) - len(numbers) <= _MOST_BESIDE
    return is_run and numbers[0] in (0, 1) and numbers == list(range(numbers[0], numbers[-1] + 1))


def _are_of_pandas(names: list[str]) -> bool:
    """Whether a row was made a header: pandas writes a repeated number as 0, 0.1, 0.2."""
    counts: dict[str, int] = collections.Counter()
    for name in names:
        number, _, repetition = name.partition(".")
        if repetition != (str(counts[number]) if counts[number] else ""):
            return False
        counts[number] += 1
    return len(names) > _LEAST_RUN and max(counts.values()) > 1 and "" not in counts


def shape_of(num_pixels: int) -> tuple[int, int, int] | None:
    """The shape (H, W, C) of a square grey or RGB image with so many numbers; None for no such."""
    for channels in (1, 3):
        side = math.isqrt(max(0, num_pixels) // channels)
        if side and side * side * channels == num_pixels:
            return side, side, channels
    return None


def may_hold_pixels(head: Head) -> bool:
    """Whether a file in a directory can be of images; a list of answers or of files is not."""
    if head.num_columns < 5:  # A label and 2×2 pixels.
        return False
    is_image = shape_of(head.num_columns - 1) and not set(LABEL_NAMES).isdisjoint(head.names or ())
    return not head.names or bool(is_image) or len(numbered(head.names)) >= 4


def numbered(names: list[str]) -> list[int]:
    """The columns named like pixels, alike but for digits: pixel0, pixel1; 1x1, 1x2; 0, 1."""
    stems = [re.sub(r"\d+(\.\d+)*", "#", name) for name in names]  # pandas repeats 0 as 0.1.
    counts = collections.Counter(stems)
    return [column for column, stem in enumerate(stems) if "#" in stem and counts[stem] > 1]


def listed(names: Sequence[str]) -> str:
    """Names for a message, the first few."""
    shown = ", ".join(map(repr, names[:5]))
    return shown + (", …" if len(names) > 5 else "")


def encoding_hint(head: Head) -> str:
    """The remedy if the names are not UTF-8, for the end of a message."""
    if not any("\ufffd" in name for name in head.names or ()):
        return ""
    path = shlex.quote(head.path)
    return f"; the header is not UTF-8: convert it with iconv -f LATIN1 -t UTF-8 {path} > utf8.csv"
