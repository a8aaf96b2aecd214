"""Which column of a CSV holds the labels: named by the user, by the header, or the first one."""

import re

from pipeline.cli.errors import UsageError

# What is said of a header 0,1,2,…, which pandas writes for columns without names.
NUMBERED = "the first line numbers the columns, and the first column holds the labels"
# Rows that tell a column of labels from a column of pixels where no header does.
NUM_SAMPLED = 1000
_LEAST_ROWS, _MOST_CLASSES = 20, 1000
_LABEL_NAMES = ("label", "class", "target", "y")
# Names of columns that hold pixels, as people number them: pixel0, 1x1, p_12, 784.
_PIXEL_NAME = re.compile(r"[a-z]*[ _.-]?\d+([x_.-]\d+)?")
# Names of columns that identify an image; a nameless column is pandas' index.
_ID_NAME = re.compile(r"|.*id|index|filename|file")


def find(
    path: str, names: list[str] | None, num_columns: int, requested: str | None
) -> tuple[int, str]:
    """The number of the column with the labels.

    Args:
      path: path of the file, for messages.
      names: names of the columns in lower case; None without a header of names.
      num_columns: number of columns.
      requested: a column's name, "first" or "last"; None to find the column.

    Returns:
      The column's number.
      A line that names the column if it had to be chosen; "" if it is requested or evident.

    Raises:
      UsageError: no column has the requested name; or several columns, or none, may hold labels.
    """
    if requested in ("first", "last"):
        return (0 if requested == "first" else num_columns - 1), ""
    if requested is not None:
        if names is None or requested.lower() not in names:
            shown = "no header" if names is None else f"the columns {_listed(names)}"
            raise UsageError(
                f"--label_column={requested}: {path} has {shown}; expected the name of a column, "
                "first or last"
            )
        return names.index(requested.lower()), ""
    if names is None:
        return 0, ""
    for name in _LABEL_NAMES:
        if name in names:
            return names.index(name), ""
    others = [name for name in names if not _PIXEL_NAME.fullmatch(name)]
    if len(others) == 1 and not _ID_NAME.fullmatch(others[0]):
        return names.index(others[0]), f"the column {others[0]!r} holds the labels"
    columns = f"{_listed(others)} beside pixels" if others else f"pixels only ({_listed(names)})"
    raise UsageError(
        f"{path}: the header names {columns}; expected one column with the labels: name it with "
        "--label_column=NAME, or first, or last"
    )


def are_column_numbers(fields: list[bytes]) -> bool:
    """Whether the fields of a line are 0, 1, 2 and so on, which is a header and no image."""
    numbers = [b"%d" % number for number in range(len(fields))]
    return len(fields) > 2 and [field.strip() for field in fields] == numbers


def refuse_last(path: str, rows: list[list[bytes]]) -> None:
    """Refuses a file without a header whose last column looks like labels, and not its first.

    Args:
      path: path of the file, for the message.
      rows: the fields of some rows.

    Raises:
      UsageError: the first column is constant, and the last one has the values of labels.
    """
    first, last = ({fields[column].strip() for fields in rows} for column in (0, -1))
    if len(rows) < _LEAST_ROWS or len(first) > 1 or not 2 <= len(last) <= _MOST_CLASSES:
        return
    raise UsageError(
        f"{path}: the first column is {first.pop().decode(errors='replace')} in all {len(rows)} "
        f"rows looked at, and the last one has {len(last)} values; expected labels in the first "
        "column: say where they are with --label_column=last, or =first"
    )


def _listed(names: list[str]) -> str:
    """Names for a message, the first few."""
    shown = ", ".join(map(repr, names[:5]))
    return shown + (", …" if len(names) > 5 else "")
