"""What some rows of a CSV tell before the job: labels that are words, and rows that are all bad."""

import re
import shlex
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.cli.errors import StageError
from pipeline.sources.readers.csv_table import fields as fields_lib
from pipeline.sources.readers.csv_table.header import Head

_MOST_ROWS, _LEAST_ROWS, _MOST_BYTES = 200, 20, 1 << 23
# 2**32 times the golden ratio: its multiples, modulo 2**32, spread evenly and without a period.
_SPREAD = 2_654_435_769
# A share of rows. If more of them are bad, the file holds something else than its columns say.
_MOST_BAD = 0.9
# Pixels that never exceed this are probably not of 0 to 255; as of NumPy arrays.
_DARK = 16
# The file that a remedy writes.
MADE = "new.csv"


class Row(NamedTuple):
    """One row."""

    where: str  # For messages.
    line: bytes
    num_columns: int
    label: bytes | None  # Its field, if the file has labels.
    pixels: Sequence[bytes]  # Their fields; empty if the row has more or fewer columns.


class Sample(NamedTuple):
    """What the rows tell."""

    num_labels: int
    num_words: int  # Labels that are words.
    notes: list[str]


def rows_of(num_rows: int, num_bytes: int) -> list[int]:
    """The rows to look at, one of each part of the file; fewer of long rows."""
    row_bytes = max(1, num_bytes // num_rows)
    num_sampled = min(_MOST_ROWS, max(_LEAST_ROWS, _MOST_BYTES // row_bytes))
    step = -(-num_rows // num_sampled)
    # Another place in each part: rows in a period, such as of classes, must not all be one class.
    return [
        first + (part * _SPREAD % (1 << 32) * min(step, num_rows - first) >> 32)
        for part, first in enumerate(range(0, num_rows, step))
    ]


def look(head: Head, separator: bytes, no_pixels: Sequence[int], rows: Sequence[Row]) -> Sample:
    """Looks at some rows of a file.

    Args:
      head: what the first line says.
      separator: of columns.
      no_pixels: the columns without pixels.
      rows: the rows.

    Raises:
      StageError: nearly all rows are bad.
    """
    faults, values, highest, has_commas = [], [], 0, False
    labels = [fields_lib.unquoted(row.label) for row in rows if row.label is not None]
    for row in rows:
        if row.num_columns != head.num_columns:
            fault = f"{row.num_columns} columns; expected {head.num_columns}, as in the first line"
            faults.append(f"{row.where} has {fault}")
            continue
        pixels = fields_lib.pixels(row.pixels, row.line)
        if pixels is None:
            number, pixel = fields_lib.first_bad(row.pixels)
            found = f"{fields_lib.shown(pixel)} as pixel {number}"
            faults.append(f"{row.where} has {found}; expected whole numbers 0 to 255")
            if not fields_lib.is_word(pixel):
                values += fields_lib.numbers(row.pixels)
            has_commas = not fields_lib.is_word(pixel.replace(b",", b"."))
        elif row.label is not None and fields_lib.is_bad_label(row.label):
            faults.append(f"{row.where} has the {fields_lib.bad_label(row.label)}")
        else:
            highest = max(highest, *set(pixels))
    if len(faults) > _MOST_BAD * len(rows):
        remedy = "name the column of the labels with --label_column, and remove other columns"
        if values:
            remedy = f"pixels are {min(values):g} to {max(values):g}; "
            remedy += _scaling(head, separator, no_pixels, values)
        elif has_commas:
            code = f"pd.read_csv({head.path!r}, sep={separator.decode()!r}, decimal=',')"
            code += f".to_csv({MADE!r}, index=False)"
            remedy = f"write decimals with points: {pandas_line(code)}"
        raise StageError(
            f"{faults[0]}: {len(faults)} of {len(rows)} rows looked at cannot be read: {remedy}"
        )
    notes = []
    if highest == 1:
        notes.append(
            f"pixels are 0 and 1 in all {len(rows)} rows looked at, and are stored so, nearly "
            f"black; {_scaling(head, separator, no_pixels, [0, 1])}"
        )
    elif 1 < highest <= _DARK:
        notes.append(
            f"warning: pixels are at most {highest} of 255 in all {len(rows)} rows looked at, "
            "nearly black, and stored as they are; to make 16 white, "
            f"{_scaling(head, separator, no_pixels, [0, _DARK])}"
        )
    num_words = sum(fields_lib.is_name(label) for label in labels)
    return Sample(len(labels), num_words, notes)


def _scaling(
    head: Head, separator: bytes, no_pixels: Sequence[int], values: Sequence[float]
) -> str:
    """The line of pandas that makes whole numbers 0 to 255 of pixels with such values."""
    low, high = min(values), max(values)
    pixels = "t[p]"
    if low < 0 or high > 255:
        pixels = f"((t[p] - {low:g}) * {255 / (high - low):.9g})"
    elif high <= _DARK:
        pixels = f"(t[p] * {255 / (1 if high <= 1 else _DARK):g})"
    code = (
        f"p = t.columns.delete({sorted(no_pixels)}); "
        f"t[p] = {pixels}.round().clip(0, 255).astype(int)"
    )
    return f"scale them: {pandas_edit(head, separator, code)}"


def pandas_edit(head: Head, separator: bytes, code: str) -> str:
    """A command for the shell that reads the table t of a file, runs code, and writes MADE."""
    read = "" if separator == b"," else f", sep={separator.decode()!r}"
    read += "" if head.names else ", header=None"
    written = "index=False" if head.names else "index=False, header=False"
    return pandas_line(
        f"t = pd.read_csv({head.path!r}{read}); {code}; t.to_csv({MADE!r}, {written})"
    )


def pandas_line(code: str) -> str:
    """A command for the shell that runs a line of pandas."""
    code = f"import pandas as pd; {code}"
    quoted = shlex.quote(code) if re.search(r'["$`\\!]', code) else f'"{code}"'
    return f"python -c {quoted}"
