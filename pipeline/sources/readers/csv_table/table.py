"""One CSV file: its rows, and how a row is read."""

import hashlib
from collections.abc import Iterator

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources import source
from pipeline.sources.local_file import LocalFile
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.csv_table import columns as columns_lib
from pipeline.sources.readers.csv_table import fields as fields_lib
from pipeline.sources.readers.csv_table import header, sample

_BOM = b"\xef\xbb\xbf"
# Bytes read or searched for line ends at a time.
_BLOCK_BYTES = 1 << 24
# Bytes that tell how lines end, and lines that tell what separates columns.
_HEAD_BYTES, _HEAD_LINES = 1 << 20, 5


class Table:
    """One file: the offsets of its rows, and how to read a row."""

    def __init__(self, path: str):
        """Finds the lines, the separator and the header.

        Args:
          path: path or URL, compressed with gzip if it ends in .gz.

        Raises:
          StageError: no such file, or no text in columns.
        """
        self.path = path
        self._file = LocalFile(path)
        self.stamp = self._file.stamp
        start = self._file.read(0, min(_HEAD_BYTES, self._file.num_bytes))
        header.refuse_encoding(path, start)
        self._find_lines(b"\n")
        if len(self._ends) == 1 and b"\r" in start:  # As old Macs end lines.
            self._find_lines(b"\r")
        first_lines = [self._line(line) for line in self._lines[:_HEAD_LINES]]
        self.separator = header.separator_of(path, first_lines)
        self._plain_bytes = b"0123456789- \r" + self.separator
        self.head = header.head_of(path, fields_lib.split(first_lines[0], self.separator))
        if self.head.names is not None:
            self._lines = self._lines[1:]
        # Class name -> label if the labels of the set are words; else None.
        self.classes: dict[str, int] | None = None

    def decide(self, options: SourceOptions) -> None:
        """Decides what the columns hold.

        Raises:
          StageError: no rows, or nearly all rows are bad.
          UsageError: the columns do not tell; see columns.decide.
        """
        if not len(self):
            raise StageError(f"{self.path}: holds a header but no rows; expected at least one row")
        sampled = {
            row: self._line(self._lines[row])
            for row in sample.rows_of(len(self), self._file.num_bytes)
        }
        fields = [self._fields(line) for line in sampled.values()]
        whole = [row for row in fields if len(row) == self.head.num_columns]
        self.columns = columns_lib.decide(
            self.head, options, rows=whole, repeated=self._first_repeated
        )
        self._label, self._no_pixels = self.columns.label, self.columns.no_pixels
        self.num_pixels = self.head.num_columns - len(self._no_pixels)
        self.notes = list(self.columns.notes)
        if self.separator != b",":
            self.notes.insert(0, f"columns are separated by {self.separator.decode()!r}")
        looked_at = []
        for (row, line), of_row in zip(sampled.items(), fields, strict=True):
            num_columns = len(of_row)
            is_whole = num_columns == self.head.num_columns
            parts = self._divided(of_row) if is_whole else (None, [])
            looked_at.append(sample.Row(self.where(row), line, num_columns, *parts))
        found = sample.look(self.head, self.separator, self._no_pixels, looked_at)
        self.num_labels, self.num_words = found.num_labels, found.num_words
        self.notes += found.notes

    def __len__(self) -> int:
        return len(self._lines)

    def _find_lines(self, line_end: bytes) -> None:
        """Finds the offsets of all lines; a line that is empty is no row."""
        size, ends = 0, []
        for block in self._file.blocks(_BLOCK_BYTES):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord(line_end)) + size)
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

    def _line(self, line: int) -> bytes:
        return self._file.read(int(self._starts[line]), int(self._ends[line]))

    def _each_line(self) -> Iterator[bytes]:
        """The lines of all rows, read in blocks."""
        starts, ends = self._starts[self._lines], self._ends[self._lines]
        first = 0
        while first < len(self):
            last = int(np.searchsorted(ends, starts[first] + _BLOCK_BYTES, side="right"))
            last = max(first + 1, last)
            offset = int(starts[first])
            block = self._file.read(offset, int(ends[last - 1]))
            places = starts[first:last] - offset, ends[first:last] - offset
            for start, end in zip(*(place.tolist() for place in places), strict=True):
                yield block[start:end]
            first = last

    def _fields(self, line: bytes) -> list[bytes]:
        fields = line.split(self.separator)
        if len(fields) != self.head.num_columns and b'"' in line:
            return fields_lib.split(line, self.separator)
        return fields

    def where(self, row: int) -> str:
        """The file and the line."""
        return f"{self.path} line {self._lines[row] + 1}"

    def id_of(self, row: int) -> bytes:
        """The id that the row states, or its number if its columns are not as in other rows."""
        return self._id(row, self._line(self._lines[row]), self.columns.ids)

    def _id(self, row: int, line: bytes, column: int) -> bytes:
        if b'"' not in line and line.count(self.separator) == self.head.num_columns - 1:
            fields = line.split(self.separator, column + 1)  # Only as many as needed.
        elif len(fields := self._fields(line)) != self.head.num_columns:
            return b"%07d" % row
        return fields_lib.unquoted(fields[column]).decode(errors="backslashreplace").encode()

    def _first_repeated(self, column: int) -> tuple[str, int, int] | None:
        """A value that a column holds twice, and the two lines; None if all values differ."""
        lines = enumerate(self._each_line())
        # Hashes take 8 bytes a row. Rows whose hashes are equal are compared.
        ids = (hash(self._id(row, line, column)) for row, line in lines)
        hashes = np.fromiter(ids, np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        places = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for place in places[np.argsort(order[places + 1])].tolist():
            rows = order[place : place + 2].tolist()
            first, second = (self._id(row, self._line(self._lines[row]), column) for row in rows)
            if first == second:
                return first.decode(), *(self._lines[rows] + 1).tolist()
        return None

    def _divided(self, fields: list[bytes]) -> tuple[bytes | None, list[bytes]]:
        """The field of the label, and the fields of the pixels; takes the list apart."""
        field = None if self._label is None else fields[self._label]
        for column in self._no_pixels:
            del fields[column]
        return field, fields

    def labels(self, *, are_words: bool) -> Iterator[tuple[bytes, bool]]:
        """The field of the label in each well-formed row; other rows do not define classes.

        Args:
          are_words: whether labels are words, which no earlier version read.

        Yields:
          The field.
          Whether an earlier version put the row into quarantine for the way its numbers are
          written; False for words.
        """
        column, num_columns = self._label, self.head.num_columns
        num_splits = 1 if column == 0 else -1  # Only as many as needed.
        for line in self._each_line():
            left = line.translate(None, self._plain_bytes)
            if not left:
                if line.count(self.separator) == num_columns - 1:
                    yield line.split(self.separator, num_splits)[column], False
                continue
            fields = self._fields(line)
            if len(fields) != num_columns:
                continue
            others = b"".join([fields[place] for place in reversed(self._no_pixels)])
            field, pixel_fields = self._divided(fields)
            is_plain = left == others.translate(None, self._plain_bytes)
            if is_plain and (are_words or fields_lib.INTEGER.fullmatch(field)):
                yield field, False
            elif fields_lib.pixels(pixel_fields, line) is not None:
                was_read = (
                    fields_lib.INTEGER.fullmatch(field)
                    and fields_lib.plain_pixels(pixel_fields, line) is not None
                )
                yield field, not was_read

    def read(self, row: int, shape: tuple[int, ...]) -> tuple[np.ndarray | source.Unreadable, int]:
        """Image and label of a row."""
        line = self._line(self._lines[row])
        fields = self._fields(line)
        if len(fields) != self.head.num_columns:
            reason = f"{len(fields)} columns, expected {self.head.num_columns}"
            return source.Unreadable(reason), source.UNLABELLED
        field, pixel_fields = self._divided(fields)
        label = source.UNLABELLED
        if field is not None:
            if self.classes is None:
                label = fields_lib.label_of(field)
            else:
                label = self.classes.get(fields_lib.name_of(field))
            if label is None:
                reason = fields_lib.bad_label(field, self.classes)
                return source.Unreadable(reason), source.UNLABELLED
        pixels = fields_lib.pixels(pixel_fields, line)
        if pixels is None:
            number, pixel = fields_lib.first_bad(pixel_fields)
            found = f"pixel {number} is {fields_lib.shown(pixel)}"
            return source.Unreadable(f"{found}, expected a whole number 0 to 255"), label
        return np.frombuffer(pixels, np.uint8).reshape(shape), label

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Adds all the file's bytes to a digest."""
        for block in self._file.blocks(_BLOCK_BYTES):
            digest.update(block)
