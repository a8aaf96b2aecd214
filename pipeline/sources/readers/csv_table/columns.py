"""What the columns of a CSV hold: the label, the id, pixels, or what is not read."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.csv_table import fields as fields_lib
from pipeline.sources.readers.csv_table import label_column, sample
from pipeline.sources.readers.csv_table.header import Head, listed, numbered, shape_of

# Names of columns that identify an image; the last two are of pandas' index.
_ID_NAME = re.compile(r".*id|file|file_?name|image|image_?name|name|path|index|unnamed: 0(\.\d+)?")
_INDEX_NAME = re.compile(r"|index|unnamed: .*")

# Column -> its first value that appears twice, and the two lines; None if all values differ.
Repeated = Callable[[int], tuple[str, int, int] | None]


class Columns(NamedTuple):
    """The columns that hold no pixels, and what is said of them."""

    label: int | None  # None if the file has no labels, or labels that are not used.
    ids: int | None  # A column with another value in each row.
    unread: list[int]
    notes: list[str]
    is_chosen: bool  # Whether an earlier version took another column for the labels.

    @property
    def no_pixels(self) -> list[int]:
        """The columns without pixels, the last one first."""
        return sorted({self.label, self.ids, *self.unread} - {None}, reverse=True)


def decide(
    head: Head, options: SourceOptions, *, rows: Sequence[Sequence[bytes]], repeated: Repeated
) -> Columns:
    """What each column holds.

    Args:
      head: what the first line says.
      options: the requested column, and whether labels are used.
      rows: the fields of some rows.
      repeated: see Repeated.

    Raises:
      UsageError: several columns, or none, may hold the labels, or an id column repeats a value.
      StageError: the pixels are those of no square.
    """
    _refuse_lists(head, rows)
    ids = id_like(head)
    label_choice = label_column.find(head, options, ids=ids, rows=rows)
    ids = [column for column in ids if column != label_choice.column]
    has_label = label_choice.column is not None
    num_left = head.num_columns - len(ids) - has_label
    unread = []
    if shape_of(num_left) is None:
        pixels = set(numbered(head.names or [])) - {label_choice.column, *ids}
        unread = sorted({*range(head.num_columns)} - {label_choice.column, *ids, *pixels})
        if num_left < 1:
            raise StageError(
                f"{head.path}: holds the columns {listed(head.names)} and no pixels; expected the "
                "pixels of an image in each row: name another file"
            )
        if shape_of(len(pixels)) is None:
            one_more = "; one column more than pixels and a label" if shape_of(num_left - 1) else ""
            raise StageError(
                f"{head.path}: {num_left} pixels a row; expected a square image, grey or RGB"
                f"{one_more}: save images of another shape as .npz, which stores the shape, and "
                "remove columns that are neither label nor pixel"
            )
    column, notes = _id_column(
        head, ids, repeated, options, has_label=label_choice.column is not None
    )
    unread += [other for other in ids if other != column]
    if unread:
        names = listed([head.names[other] or "nameless" for other in unread])
        notes = [f"columns that are neither label, id nor pixel are not read: {names}", *notes]
    if has_label and not label_choice.is_used:
        unread.append(label_choice.column)
    label = label_choice.column if label_choice.is_used else None
    return Columns(label, column, unread, [*label_choice.notes, *notes], label_choice.is_chosen)


def _refuse_lists(head: Head, rows: Sequence[Sequence[bytes]]) -> None:
    """Raises a StageError if one field of the first row holds all pixels, as FER2013 has it."""
    fields = rows[0] if rows and head.names else []
    for column, field in enumerate(fields):
        numbers = fields_lib.unquoted(field).split()
        if len(numbers) > 3 and all(map(bytes.isdigit, numbers)):
            code = (
                f"t = pd.read_csv({head.path!r}); c = t.columns[{column}]; "
                "pd.concat([t.drop(columns=c), t[c].str.split(expand=True)], axis=1)"
                f".to_csv({sample.MADE!r}, index=False)"
            )
            raise StageError(
                f"{head.path}: the column {head.names[column]!r} holds {len(numbers)} numbers in "
                f"one field; expected a column for each pixel: {sample.pandas_line(code)}"
            )


def id_like(head: Head) -> list[int]:
    """The columns that are named like ids; a nameless first column is pandas' index."""
    names = head.names or []
    return [
        column
        for column, name in enumerate(names)
        if _ID_NAME.fullmatch(name) or (not name and column == 0)
    ]


def _id_column(
    head: Head, ids: Sequence[int], repeated: Repeated, options: SourceOptions, *, has_label: bool
) -> tuple[int | None, list[str]]:
    """The column that holds the ids, if any, and the lines that say so.

    Args:
      head: what the first line says.
      ids: the columns named like ids.
      repeated: see Repeated.
      options: see `decide`.
      has_label: whether another column holds the labels.

    Raises:
      UsageError: a column repeats a value, so that it may be the label, or damaged.
    """
    is_decided = options.label_column is not None or options.labels == "none"
    # pandas' index only counts rows, and is the last choice.
    order = sorted(ids, key=lambda column: bool(_INDEX_NAME.fullmatch(head.names[column])))
    repetitions = {column: repeated(column) for column in order}
    unique = [column for column in order if repetitions[column] is None]
    notes = []
    for column, repetition in repetitions.items():
        if repetition is None:
            continue
        value, first, second = repetition
        name = head.names[column]
        found = f"{_shown(name)} holds {value!r} in lines {first} and {second}"
        if not is_decided and not (has_label and unique):
            raise UsageError(
                f"{head.path}: {found}, and is named like an id; expected another value in each "
                f"row: --label_column={name or 'first'} makes it the label, --label_column=NAME of "
                "another column, or --labels=none, leaves it out"
            )
        notes.append(f"{found}, so it holds no ids")
    if unique:
        notes.append(f"{_shown(head.names[unique[0]])} holds the ids")
    return (unique[0] if unique else None), notes


def _shown(name: str) -> str:
    return f"the column {name!r}" if name else "the nameless first column"
