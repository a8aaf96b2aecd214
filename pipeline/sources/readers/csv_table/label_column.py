"""Which column of a CSV holds the labels: named by the user, by the header, or the first one."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

from pipeline.cli.errors import UsageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.csv_table import fields as fields_lib
from pipeline.sources.readers.csv_table.header import (
    LABEL_NAMES,
    Head,
    encoding_hint,
    listed,
    numbered,
    shape_of,
)

# Fewer rows say nothing about a column, and more values are no classes.
_LEAST_ROWS, _MOST_CLASSES = 20, 1000
# Labels and the pixel beside them differ by such a factor in their number of values, or in the
# highest one; two pixels side by side do not.
_UNLIKE = 1.5
# A share of rows. Of a pixel at the edge, more rows are black.
_MOST_IN_A_CLASS = 0.9
_UNLABELLED = "so the images have no labels"


class Found(NamedTuple):
    """The column with the labels."""

    column: int | None  # None if the file has no labels.
    notes: list[str]
    is_used: bool  # False if labels are not used: the column is no pixel in any case.
    is_chosen: bool  # Whether an earlier version took another column.


def missing(head: Head, requested: str | None, num_ids: int) -> str:
    """Why a file does not have the requested column; "" if it does, or if none is requested.

    Args:
      head: what the first line says.
      requested: see SourceOptions.
      num_ids: number of columns that are named like ids.
    """
    if requested is None:
        return ""
    if requested in ("first", "last"):
        if requested == "first" and head.names and not head.names[0]:
            return ""  # A nameless column has no other name.
        num_left = head.num_columns - num_ids
        is_full = shape_of(num_left) and not shape_of(num_left - 1)
        return f"has {num_left} columns of pixels and none of labels" if is_full else ""
    if head.names is not None and requested.lower() in head.names:
        return ""
    shown = "no header" if head.names is None else f"the columns {listed(head.names)}"
    hint = encoding_hint(head)
    return f"has {shown}; expected the name of a column, first or last{hint}"


def find(
    head: Head,
    options: SourceOptions,
    *,
    ids: Sequence[int],
    rows: Sequence[Sequence[bytes]],
) -> Found:
    """Finds the column with the labels.

    Args:
      head: what the first line says.
      options: the requested column, and whether labels are used.
      ids: the columns that are named like ids.
      rows: the fields of some rows.

    Raises:
      UsageError: several columns, or none, may hold the labels.
    """
    requested, names = options.label_column, head.names or []
    is_used, notes = options.labels != "none", []
    if reason := missing(head, requested, len(ids)):
        is_full = requested in ("first", "last")
        notes.append(f"{reason if is_full else f'has no column {requested!r}'}, {_UNLABELLED}")
        is_used, requested = False, None
    if requested in ("first", "last"):
        return Found(0 if requested == "first" else head.num_columns - 1, notes, is_used, False)
    wanted = LABEL_NAMES if requested is None else (requested.lower(),)
    known = [column for column, name in enumerate(names) if name in wanted]
    if len(known) > 1 and is_used:
        shown = " and ".join(f"{names[column]!r} (column {column + 1})" for column in known[:5])
        raise UsageError(
            f"{head.path}: the header names {shown}; expected one column with the labels: name it "
            "with --label_column=NAME, or first, or last; give columns distinct names"
        )
    if known:
        return Found(known[0], notes, is_used, False)
    pixels = set(numbered(names) if names else range(head.num_columns)) - {*ids}
    others = sorted({*range(head.num_columns)} - {*ids} - pixels)
    if not others and (not names or head.numbering):
        column, note = _by_place(head, sorted(pixels), rows)
    elif len(others) == 1:
        column, note = others[0], f"the column {names[others[0]]!r} holds the labels"
        if is_used:
            _refuse_distinct(head, column, rows)
    else:
        column, note = None, f"no column holds labels, {_UNLABELLED}"
        if is_used and (others or shape_of(len(pixels)) is None):
            shown = listed([names[c] for c in others or range(head.num_columns)])
            shown = f"{shown} beside pixels" if others else f"pixels only ({shown})"
            raise UsageError(
                f"{head.path}: the header names {shown}; expected one column with the labels: "
                f"name it with --label_column=NAME, or first, or last{encoding_hint(head)}"
            )
    return Found(column, [note] if note and is_used else notes, is_used, bool(column))


def _by_place(
    head: Head, columns: Sequence[int], rows: Sequence[Sequence[bytes]]
) -> tuple[int | None, str]:
    """The column with the labels where no name tells it, and the line that says so.

    Args:
      head: what the first line says.
      columns: the columns that may hold the labels or pixels.
      rows: the fields of some rows.

    Raises:
      UsageError: values speak against the first column.
    """
    if not shape_of(len(columns) - 1):
        # One RGB pixel is no image.
        if len(columns) > 3 and shape_of(len(columns)):
            return None, f"all {len(columns)} columns are pixels, {_UNLABELLED}"
        return columns[0], ""
    few = rows[:_LEAST_ROWS]
    words = [c for c in columns if few and all(fields_lib.is_word(row[c]) for row in few)]
    if len(words) > 1:
        shown = ", ".join(str(column + 1) for column in words[:5])
        raise UsageError(
            f"{head.path}: the columns {shown} hold words; expected one column with the labels "
            "beside pixels: remove the others, or name one with --label_column=first or last"
        )
    if not words:
        _refuse_by_values(head, columns, rows)
    column = words[0] if words else columns[0]
    if head.names:
        shown = f"column {head.names[column]!r}" if column else "first column"
        return column, f"{head.numbering}, and the {shown} holds the labels"
    return column, f"column {column + 1} holds words, which are the labels" if column else ""


def _refuse_by_values(head: Head, columns: Sequence[int], rows: Sequence[Sequence[bytes]]) -> None:
    """Refuses a file without names whose first column does not look like labels.

    Raises:
      UsageError: the first column differs in each row; or the last one has the values of classes,
        and the first one is constant or has as many values as the pixel beside it.
    """
    edges = [[row[columns[place]].strip() for row in rows] for place in (0, 1, -2, -1)]
    first, second, before, last = map(set, edges)
    evidence, is_enough = "", len(rows) >= _LEAST_ROWS
    if _are_labels(edges[3], edges[2]) and not (
        _are_labels(edges[0], edges[1]) and len(first) >= len(last)
    ):
        values = [int(value) for value in last]
        evidence = (
            f"has {len(first)} value{'s' if len(first) > 1 else ''} in {len(rows)} rows, and the "
            f"last one, unlike the pixel beside it, {len(last)} values from {min(values)} to "
            f"{max(values)}"
        )
    elif not is_enough:
        return
    elif len(first) == len(rows):
        evidence = f"differs in all {len(rows)} rows looked at, as an id does"
    elif not 2 <= len(last) <= _MOST_CLASSES:
        return
    elif len(first) == 1:
        value = first.pop().decode(errors="replace")
        evidence = (
            f"is {value} in all {len(rows)} rows looked at, and the last one has {len(last)} values"
        )
    if evidence:
        raise UsageError(
            f"{head.path}: the first column {evidence}; expected labels in the first column: say "
            "where they are with --label_column=last, or =first; --labels=none beside it ignores "
            "them"
        )


def _are_labels(column: Sequence[bytes], pixel: Sequence[bytes]) -> bool:
    """Whether a column at an edge has the values of classes, and not those of the pixel beside it.

    Classes are numbered from 0 or 1, most numbers appear, and no class has nearly all rows, as
    black has at the edge of images.
    """
    numbers, beside = (
        [fields_lib.whole_number(field) for field in fields] for fields in (column, pixel)
    )
    if None in numbers or None in beside or not numbers:
        return False
    values, others = set(numbers), set(beside)
    span = max(values) - min(values) + 1
    is_run = min(values) in (0, 1) and 2 * len(values) >= min(span, len(numbers))
    [(_, most)] = collections.Counter(numbers).most_common(1)
    repeats = 1 < len(values) < len(numbers) and most <= _MOST_IN_A_CLASS * len(numbers)
    pairs = (len(values), len(others)), (max(values), max(others))
    is_unlike = any(max(pair) >= _UNLIKE * min(pair) for pair in pairs)
    return is_run and repeats and is_unlike and len(values) <= _MOST_CLASSES


def _refuse_distinct(head: Head, column: int, rows: Sequence[Sequence[bytes]]) -> None:
    """Raises a UsageError if a column that is left over has another value in each row."""
    if len(rows) >= _LEAST_ROWS and len({row[column] for row in rows}) == len(rows):
        name = head.names[column]
        raise UsageError(
            f"{head.path}: the column {name!r} differs in all {len(rows)} rows looked at; expected "
            f"labels, which repeat: --label_column={name} takes it all the same, --labels=none "
            "leaves it out"
        )
