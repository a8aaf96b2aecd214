"""CSV files with a label and pixels in each row."""

import hashlib
import math
import re

import numpy as np

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.local_file import LocalFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers import csv_label_column as label_column_lib
from pipeline.sources.splits import UNSPLIT, in_order, split_named
from pipeline.storage import files, stamps

_BOM = b"\xef\xbb\xbf"
_NUMBER = re.compile(rb'\s*"?[-+]?\d*(\.\d*)?"?\s*')
_INTEGER_BYTES = b"0123456789,- \r"
_INTEGER = re.compile(rb"\s*-?\d+\s*")
# Bytes searched for line ends at a time.
_BLOCK_BYTES = 1 << 24


class _Table:
    """One file: the offsets of its rows, and how to read a row."""

    def __init__(self, path: str, requested: str | None = None):
        self.path = path
        self._file, size, ends = LocalFile(path), 0, []
        for block in self._file.blocks(_BLOCK_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size)
            size += len(block)
        ends = np.concatenate([*ends, [size]]).astype(np.int64)
        starts = np.concatenate([[0], ends[:-1] + 1])
        if self._file.read(0, len(_BOM)) == _BOM:
            starts[0] = len(_BOM)
        self._starts, self._ends = starts, ends
        # An empty line, or a carriage return alone, is not a row.
        lengths = ends - starts
        empty = [i for i in np.flatnonzero(lengths == 1) if self._line(i) == b"\r"]
        lengths[empty] = 0
        self._lines = np.flatnonzero(lengths > 0)
        first = self._fields(0) if len(self._lines) else []
        if len(first) < 2:
            raise StageError(
                f"{path}: the first line has {len(first)} column(s); expected a label and pixels, "
                "separated by commas: convert the file"
            )
        self.num_columns = len(first)
        names = None
        # If most fields are not numbers, the line is a header and not a row with a bad field.
        if 2 * sum(bool(_NUMBER.fullmatch(field)) for field in first) < len(first):
            names = [field.decode(errors="replace").strip(' "\r').lower() for field in first]
        is_numbered = label_column_lib.are_column_numbers(first)
        if names or is_numbered:
            self._lines = self._lines[1:]
        if not len(self._lines):
            raise StageError(f"{path}: holds a header but no rows; expected at least one row")
        self._label, choice = label_column_lib.find(path, names, self.num_columns, requested)
        # An earlier version took the first column where this one chooses another.
        self.chosen_label = self._label if choice and self._label else None
        if is_numbered and requested is None:
            choice = label_column_lib.NUMBERED
        self.notes = [f"{path}: {choice}"] if choice else []
        if not names and not is_numbered and requested is None:
            rows = range(0, len(self), -(-len(self) // label_column_lib.NUM_SAMPLED))
            label_column_lib.refuse_last(path, [self._fields(row) for row in rows])

    def __len__(self) -> int:
        return len(self._lines)

    @property
    def stamp(self) -> str:
        return self._file.stamp

    def _line(self, line: int) -> bytes:
        return self._file.read(int(self._starts[line]), int(self._ends[line]))

    def _fields(self, row: int) -> list[bytes]:
        return self._line(self._lines[row]).split(b",")

    def where(self, row: int) -> str:
        return f"{self.path} line {self._lines[row] + 1}"

    def highest_label(self) -> int:
        """The highest label of the well-formed rows; other rows do not define classes."""
        highest = -1
        for row in range(len(self)):
            line = self._line(self._lines[row])
            if line.count(b",") == self.num_columns - 1 and not line.translate(
                None, _INTEGER_BYTES
            ):
                num_splits = 1 if self._label == 0 else -1  # Only as many as needed.
                label = _label(line.split(b",", num_splits)[self._label])
                highest = max(highest, -1 if label is None else label)
        return highest

    def read(self, row: int, shape: tuple[int, ...]) -> tuple[np.ndarray | source.Unreadable, int]:
        """Image and label of a row."""
        line = self._line(self._lines[row])
        fields = line.split(b",")
        if len(fields) != self.num_columns:
            return source.Unreadable(f"{len(fields)} columns, expected {self.num_columns}"), -1
        field = fields.pop(self._label)
        label = _label(field)
        if label is None:
            reason = f"label {_shown(field)}, expected a whole number up to {arrays.MAX_LABEL}"
            return source.Unreadable(reason), -1
        try:
            pixels = bytes(map(int, fields))
            if (
                b"_" in line or b"+" in line
            ):  # Python accepts them in integers; other programs do not.
                raise ValueError
        except ValueError:
            number, pixel = next((i, f) for i, f in enumerate(fields) if not _is_pixel(f))
            reason = f"pixel {number} is {_shown(pixel)}, expected a whole number 0 to 255"
            return source.Unreadable(reason), label
        return np.frombuffer(pixels, np.uint8).reshape(shape), label

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Adds all the file's bytes to a digest."""
        for block in self._file.blocks(_BLOCK_BYTES):
            digest.update(block)


def _label(field: bytes) -> int | None:
    """The label in a field, or None."""
    if not _INTEGER.fullmatch(field) or len(field) > 20:
        return None
    label = int(field)
    return label if -arrays.MAX_LABEL <= label <= arrays.MAX_LABEL else None


def _is_pixel(field: bytes) -> bool:
    return bool(_INTEGER.fullmatch(field)) and len(field) < 20 and 0 <= int(field) <= 255


def _shown(field: bytes) -> str:
    return repr(field[:24].decode(errors="replace").strip())


def _shape_of(num_pixels: int, path: str) -> tuple[int, int, int]:
    """The shape (H, W, C) of a square grey or RGB image with so many numbers."""
    for channels in (1, 3):
        side = math.isqrt(num_pixels // channels)
        if side * side * channels == num_pixels:
            return side, side, channels
    raise StageError(
        f"{path}: {num_pixels} pixels a row; expected a square image, grey or RGB: save images of "
        "another shape as .npz, which stores the shape"
    )


class CsvSource:
    """A source over the rows of CSV files, one file a split."""

    def __init__(self, paths: dict[str, str], requested: str | None = None):
        """Finds the rows.

        Args:
          paths: split -> path or URL, compressed with gzip if it ends in .gz.
          requested: the column with the labels, see SourceOptions.

        Raises:
          StageError: a file is missing or not such a table, or image shapes differ.
        """
        self._tables = [_Table(path, requested) for path in paths.values()]
        shapes = {t.path: _shape_of(t.num_columns - 1, t.path) for t in self._tables}
        if len(set(shapes.values())) > 1:
            raise StageError(
                f"image shapes differ between files: {shapes}; expected one shape in the whole set"
            )
        self.image_shape = next(iter(shapes.values()))
        self.split_sizes = dict(zip(paths, map(len, self._tables), strict=True))
        self._starts = np.cumsum([0, *self.split_sizes.values()])
        self._names: list[str] | None = None
        self.listed = {table.path: table.stamp for table in self._tables}
        self.notes = [note for table in self._tables for note in table.notes]

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        return stamps.of_paths(self.listed)

    @property
    def class_names(self) -> list[str]:
        """Names of the classes 0 to the highest label."""
        if self._names is None:
            tables = [(table.highest_label(), table.path) for table in self._tables]
            self._names = arrays.class_names_up_to(*max(tables))
        return self._names

    def fingerprint(self) -> str:
        """sha256 over the files' bytes, and the column of the labels if it had to be chosen."""
        digest = hashlib.sha256()
        for split, table in zip(self.split_sizes, self._tables, strict=True):
            digest.update(f"{split} {len(table)};".encode())
            if table.chosen_label is not None:
                digest.update(f"labels in column {table.chosen_label};".encode())
            table.hash_into(digest)
        return digest.hexdigest()

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<split>-<row, 7 digits>`."""
        prefixes = [split.encode() for split in self.split_sizes]
        return arrays.number_ids(prefixes, self._starts, indices)

    def _row(self, index: int) -> tuple[_Table, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._tables[number], index - self._starts[number]

    def where(self, index: int) -> str:
        """The file and the line."""
        table, row = self._row(index)
        return table.where(row)

    def read(self, indices: np.ndarray) -> tuple[list[np.ndarray | source.Unreadable], np.ndarray]:
        """Parses the rows at `indices`."""
        images, labels = [], np.empty(len(indices), np.int64)
        for position, index in enumerate(indices):
            table, row = self._row(index)
            image, labels[position] = table.read(row, self.image_shape)
            images.append(image)
        return images, labels


def open_csv(path: str, options: SourceOptions = DEFAULTS) -> CsvSource:
    """The image set in a CSV file, or in a directory with one file for each split.

    With a header, the label is in the column named label, class, target or y, or else in the only
    column that is not named like a pixel; without a header, in the first column. The other columns
    are the pixels of a square image, row by row.

    Args:
      path: FILE, local or a URL, a set without splits; or DIR, where file names (*train*.csv,
        *test*.csv) state the split.
      options: see SourceOptions.

    Raises:
      UsageError: more than one column may hold the labels, or none may.
      StageError: no such file, or not such a table.
    """
    if not path:
        raise UsageError("--source=csv: names no file; write --source=csv:FILE")
    if not files.is_dir(path):
        return CsvSource({UNSPLIT: path}, options.label_column)
    paths: dict[str, str] = {}
    for name in files.list_names(path):
        if re.search(r"\.csv(\.gz)?$", name):
            split = split_named(name)
            if split in paths:
                raise StageError(
                    f"--source=csv:{path}: {paths[split]} and {name} belong to the same split; "
                    "expected one file for each split: name one file"
                )
            paths[split] = files.join(path, name)
    if not paths:
        raise StageError(
            f"--source=csv:{path}: no .csv files in this directory; expected at least one: "
            "name another directory, or the file itself"
        )
    return CsvSource({split: paths[split] for split in in_order(paths)}, options.label_column)
