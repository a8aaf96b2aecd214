"""What the columns of a CSV hold: the label, the id, pixels, or what is not read."""

import collections
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources.options import SourceOptions

# Fewer rows say nothing about a column, and more values are no classes.
_LEAST_ROWS, _MOST_CLASSES = 20, 1000
_LABEL_NAMES = ("label", "class", "target", "y")
# Names of columns that identify an image; the last ones are pandas' index.
_ID_NAME = re.compile(r".*id|index|file|file_?name|image|image_?name|name|path|unnamed: 0(\.\d+)?")
_INDEX_NAME = re.compile(r"|index|unnamed: .*")
_NUMBER = re.compile(rb'\s*"?[-+]?\d*(\.\d*)?([eE][-+]?\d+)?"?\s*')
# A shorter run of numbers may be the row of a small image.
_LEAST_RUN = 16
# Columns beside such a run: an index, an id, a label.
_MOST_BESIDE = 3


class Head(NamedTuple):
    """What the first line says."""

    path: str  # For messages.
    num_columns: int
    names: list[str] | None  # In lower case; None without a header.
    has_names: bool  # Whether the header has words; a header may be 0,1,2,… too.


class Columns(NamedTuple):
    """Columns that hold no pixels, and what is said of them."""

    label: int | None  # None if the file has no labels, or labels that are not used.
    ids: int | None  # Of a column with another value in each row.
    unread: list[int]
    notes: list[str]
    missing: str  # The message if the requested column is not in this file; else "".
    is_chosen: bool  # Whether an earlier version took another column for the labels.

    @property
    def no_pixels(self) -> list[int]:
        """The columns without pixels, the last one first."""
        return sorted({self.label, self.ids, *self.unread} - {None}, reverse=True)


def head_of(path: str, fields: Sequence[bytes]) -> Head:
    """What the fields of the first line say: a header of names, one of numbers, or a row."""
    names = [field.decode(errors="replace").strip(" \"'\r").lower() for field in fields]
    # If most fields are not numbers, the line is a header and not a row with a bad field.
    has_names = 2 * sum(bool(_NUMBER.fullmatch(field)) for field in fields) < len(fields)
    is_header = has_names or _are_column_numbers(names) or _are_of_pandas(names)
    return Head(path, len(fields), names if is_header else None, has_names)


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
        side = math.isqrt(num_pixels // channels)
        if side and side * side * channels == num_pixels:
            return side, side, channels
    return None


def may_hold_pixels(head: Head) -> bool:
    """Whether a file in a directory can be of images; a list of answers or of files is not."""
    if head.num_columns < 5:  # A label and 2×2 pixels.
        return False
    is_image = shape_of(head.num_columns - 1) and not set(_LABEL_NAMES).isdisjoint(head.names or ())
    return not head.names or bool(is_image) or len(_numbered(head.names)) >= 4


def _numbered(names: list[str]) -> list[int]:
    """The columns named like pixels, alike but for digits: pixel0, pixel1; 1x1, 1x2; 0, 1."""
    stems = [re.sub(r"\d+", "#", name) for name in names]
    counts = collections.Counter(stems)
    return [column for column, stem in enumerate(stems) if "#" in stem and counts[stem] > 1]


def decide(
    head: Head,
    options: SourceOptions,
    *,
    rows: list[list[bytes]],
    repeated: Callable[[int], tuple[str, int, int] | None],
) -> Columns:
    """What each column holds.

    Args:
      head: what the first line says.
      options: the requested column, and whether labels are used.
      rows: the fields of some rows.
      repeated: column -> its first value that appears twice and the two lines; None if all values
        differ.

    Raises:
      UsageError: several columns, or none, may hold the labels, or an id column repeats a value.
      StageError: the pixels are those of no square.
    """
    names, columns = head.names or [], range(head.num_columns)
    id_like = [
        column
        for column in columns
        if names and (_ID_NAME.fullmatch(names[column]) or (not names[column] and column == 0))
    ]
    label, missing = _requested(head, options.label_column, len(id_like))
    is_used = options.labels != "none" and not missing
    if label is None and names:
        label = _known(head, is_used=is_used)
    id_like = [column for column in id_like if column != label]
    numbered = set(_numbered(names) if names else columns) - {label, *id_like}
    others = [column for column in columns if column not in {label, *id_like} | numbered]
    notes, is_found = [], label is None  # Found here, where an earlier version took the first.
    if label is None and not others and not head.has_names:
        label, note = _by_place(head, sorted(numbered), rows)
        notes += [note] if note else []
    elif label is None and len(others) == 1:
        label = others.pop()
        notes.append(f"the column {names[label]!r} holds the labels")
        if is_used:
            _refuse_distinct(head, label, rows)
    elif label is None and is_used and (others or shape_of(len(numbered)) is None):
        listed = _listed([names[column] for column in others or [*id_like, *sorted(numbered)]])
        shown = f"{listed} beside pixels" if others else f"pixels only ({listed})"
        raise UsageError(
            f"{head.path}: the header names {shown}; expected one column with the labels: name it "
            f"with --label_column=NAME, or first, or last{_encoding_hint(names)}"
        )
    num_left = head.num_columns - len(id_like) - (label is not None)
    if shape_of(num_left):
        others = []  # Pixels with names of their own.
    elif not others or shape_of(len(numbered)) is None:
        raise StageError(
            f"{head.path}: {num_left} pixels a row; expected a square image, grey or RGB: save "
            "images of another shape as .npz, which stores the shape"
        )
    ids, id_notes = _ids(head, id_like, repeated, is_free=label is None, options=options)
    unread = others + [column for column in id_like if column != ids]
    if unread:
        notes.append(f"not read: {_listed([names[column] or 'nameless' for column in unread])}")
    is_chosen = is_found and bool(label)
    if not is_used and label is not None:
        label = unread.append(label)
        notes = [note for note in notes if not note.endswith("the labels")]
    if label is None and options.labels != "none" and not any("no labels" in n for n in notes):
        notes.append("no column holds labels, so the images have no labels")
    return Columns(label, ids, unread, notes + id_notes, missing, is_chosen)


def _requested(head: Head, requested: str | None, num_ids: int) -> tuple[int | None, str]:
    """The requested column, or None; and the message if this file does not have the column."""
    names, num_columns = head.names, head.num_columns
    wanted = f"--label_column={requested}: {head.path}"
    if requested in ("first", "last"):
        num_left = num_columns - num_ids
        if shape_of(num_left) and not shape_of(num_left - 1):
            return None, f"{wanted} has {num_left} columns of pixels and none of labels"
        return (0 if requested == "first" else num_columns - 1), ""
    if requested is None:
        return None, ""
    if names is None or requested.lower() not in names:
        shown = "no header" if names is None else f"the columns {_listed(names)}"
        hint = _encoding_hint(names or [])
        return None, f"{wanted} has {shown}; expected the name of a column, first or last{hint}"
    _refuse_twice(head, [c for c, name in enumerate(names) if name == requested.lower()])
    return names.index(requested.lower()), ""


def _known(head: Head, *, is_used: bool) -> int | None:
    """The column with a name of labels."""
    known = [column for column, name in enumerate(head.names) if name in _LABEL_NAMES]
    if is_used:
        _refuse_twice(head, known)
    return known[0] if known else None


def _refuse_twice(head: Head, columns: list[int]) -> None:
    """Raises a UsageError if several columns have a label's name."""
    if len(columns) > 1:
        shown = " and ".join(f"{head.names[column]!r} (column {column + 1})" for column in columns)
        raise UsageError(
            f"{head.path}: the header names {shown}; expected one column with the labels: give the "
            "columns distinct names, and name one with --label_column=NAME, or first, or last"
        )


def _by_place(head: Head, columns: list[int], rows: list[list[bytes]]) -> tuple[int | None, str]:
    """The column with the labels where no name tells it, and the line that says so.

    Args:
      head: what the first line says.
      columns: the columns that may hold labels or pixels.
      rows: the fields of some rows.
    """
    if not shape_of(len(columns) - 1):
        # One RGB pixel is no image.
        if len(columns) > 3 and shape_of(len(columns)):
            return None, f"all {len(columns)} columns are pixels, so the images have no labels"
        return columns[0], ""
    few = rows[:_LEAST_ROWS]
    words = [c for c in columns if few and not any(_NUMBER.fullmatch(row[c]) for row in few)]
    if len(words) > 1:
        raise UsageError(
            f"{head.path}: columns {', '.join(str(column + 1) for column in words[:5])} hold "
            "words; expected one column with the labels beside pixels: say which one with "
            "--label_column=first or last, and remove the others"
        )
    label = words[0] if words else columns[0]
    if not words:
        _refuse_by_values(head, columns, rows)
    if head.names:
        place = "first column" if label == 0 else f"column {head.names[label]!r}"
        return label, f"the first line numbers the columns, and the {place} holds the labels"
    return label, f"column {label + 1} holds words, so it holds the labels" if label else ""


def _refuse_by_values(head: Head, columns: list[int], rows: list[list[bytes]]) -> None:
    """Refuses a file without names whose first column does not look like labels.

    Raises:
      UsageError: the first column differs in each row; or the last one has the values of labels,
        and the first one is constant or has as many values as the pixel beside it.
    """
    if len(rows) < _LEAST_ROWS:
        return
    first, second, before, last = (
        {row[columns[place]].strip() for row in rows} for place in (0, 1, -2, -1)
    )
    num_rows, has_classes = len(rows), 2 <= len(last) <= _MOST_CLASSES
    found = ""
    if len(first) == num_rows:
        found = f"another value in each of {num_rows} rows looked at, like an id"
    elif len(first) == 1 and has_classes:
        found = (
            f"{_text(first.pop())} in all {num_rows} rows looked at, and the last one has "
            f"{len(last)} values"
        )
    elif (
        has_classes
        and _are_classes(last)
        and not _are_classes(first)
        and 5 * len(last) <= len(before)
        and len(second) <= 2 * len(first) <= 4 * len(second)
    ):
        found = (
            f"like the pixels beside it in {num_rows} rows looked at, and the last one has the "
            f"values of {len(last)} classes"
        )
    if found:
        raise UsageError(
            f"{head.path}: the first column is {found}; expected labels in the first column: say "
            "where they are with --label_column=last, or =first; --labels=none beside it ignores "
            "them"
        )


def _are_classes(values: set[bytes]) -> bool:
    """Whether values are 0 to n, or 1 to n."""
    numbers = sorted(int(value) for value in values if re.fullmatch(rb"\d{1,9}", value))
    is_run = numbers and numbers == list(range(numbers[0], numbers[-1] + 1))
    return bool(is_run) and len(numbers) == len(values) and numbers[0] in (0, 1)


def _refuse_distinct(head: Head, label: int, rows: list[list[bytes]]) -> None:
    """Raises a UsageError if a column that is only left over has another value in each row."""
    if len(rows) >= _LEAST_ROWS and len({row[label] for row in rows}) == len(rows):
        name = head.names[label]
        raise UsageError(
            f"{head.path}: the column {name!r} has another value in each of {len(rows)} rows "
            f"looked at; expected labels, which repeat: --label_column={name} takes the column "
            "all the same, and --labels=none ignores it"
        )


def _ids(
    head: Head,
    id_like: list[int],
    repeated: Callable[[int], tuple[str, int, int] | None],
    *,
    is_free: bool,
    options: SourceOptions,
) -> tuple[int | None, list[str]]:
    """The column with the ids, and the lines that say so.

    Args:
      head: what the first line says.
      id_like: the columns named like ids.
      repeated: see `decide`.
      is_free: whether no other column holds the labels.
      options: see `decide`.

    Raises:
      UsageError: a column repeats a value, so that it may be the label or damaged.
    """
    is_said = options.label_column is not None or options.labels == "none"
    # pandas' index counts rows and is the last choice.
    order = sorted(id_like, key=lambda column: bool(_INDEX_NAME.fullmatch(head.names[column])))
    found = {column: repeated(column) for column in order}
    unique = [column for column in order if found[column] is None]
    notes = []
    for column in order:
        if not found[column]:
            continue
        value, first, second = found[column]
        shown = _column(head.names[column])
        repeats = f"repeats values: {value!r} is in lines {first} and {second}"
        if not is_said and (is_free or not unique):
            name = head.names[column] or "first"
            raise UsageError(
                f"{head.path}: {shown} is named like an id, but {repeats}; expected another value "
                f"in each row: --label_column={name} makes it the label; with the label named by "
                "--label_column=NAME, or with --labels=none, it is not read"
            )
        notes.append(f"{shown} {repeats}, so it holds no ids")
    if unique:
        notes.append(f"{_column(head.names[unique[0]])} holds the ids")
    return (unique[0] if unique else None), notes


def _column(name: str) -> str:
    return f"the column {name!r}" if name else "the nameless first column"


def _listed(names: list[str]) -> str:
    """Names for a message, the first few."""
    shown = ", ".join(map(repr, names[:5]))
    return shown + (", …" if len(names) > 5 else "")


def _encoding_hint(names: list[str]) -> str:
    """The remedy if the header is not UTF-8."""
    if not any("\ufffd" in name for name in names):
        return ""
    return " (the header is not UTF-8; convert it: iconv -f LATIN1 -t UTF-8 FILE > NEW.csv)"


def _text(field: bytes) -> str:
    return field.decode(errors="replace")
