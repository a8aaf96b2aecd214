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
from pipeline.sources.readers.csv_table import header, pixel_order, sample

_BOM = b"\xef\xbb\xbf"
# Bytes read or searched for line ends at a time.
_BLOCK_BYTES = 1 << 24
# Line ends are searched in fewer bytes: each one takes 30 bytes while a block is searched.
_SEARCH_BYTES = 1 << 22
# A longer first line is refused, and a longer row is read no further: images of 1024×1024 RGB fit.
_MOST_LINE_BYTES, _MOST_COLUMNS = 1 << 24, 1 << 22
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
        has_ends = self._find_lines(b"\n")
        if not has_ends and b"\r" in start:  # As old Macs end lines.
            self._find_lines(b"\r")
        num_bytes = int(self._ends[0] - self._starts[0]) if len(self) else 0
        if num_bytes > _MOST_LINE_BYTES:
            raise StageError(
                f"{path}: the first line is longer than {_MOST_LINE_BYTES:,} bytes; expected an "
                "image in each line: check how lines end, or save the images as .npz"
            )
        first_lines = [self._line(row) for row in range(min(len(self), _HEAD_LINES))]
        self.separator = header.separator_of(path, first_lines)
        self._plain_bytes = b"0123456789- \r" + self.separator
        num_columns = first_lines[0].count(self.separator) + 1
        if num_columns > _MOST_COLUMNS:
            raise StageError(
                f"{path}: the first line has {num_columns} columns; expected at most "
                f"{_MOST_COLUMNS}: save the images as .npz"
            )
        self.head = header.head_of(path, fields_lib.split(first_lines[0], self.separator))
        if self.head.names is not None:
            self._starts, self._ends = self._starts[1:], self._ends[1:]
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
        sampled = {row: self._line(row) for row in sample.rows_of(len(self), self._file.num_bytes)}
        fields = [self._fields(line) for line in sampled.values()]
        whole = [row for row in fields if len(row) == self.head.num_columns]
        self.columns = columns_lib.decide(
            self.head, options, rows=whole, repeated=self._first_repeated
        )
        self._label, self._no_pixels = self.columns.label, self.columns.no_pixels
        self.num_pixels = self.head.num_columns - len(self._no_pixels)
        self.notes = list(self.columns.notes)
        pixels = np.delete(np.arange(self.head.num_columns), self._no_pixels).tolist()
        self.order = pixel_order.find(
            self.head, self.separator, pixels, header.shape_of(self.num_pixels)
        )
        self.notes += [self.order.note] if self.order.note else []
        # The names of the pixels in the order of reading; None if no names tell them.
        self.pixel_names: list[str] | None = None
        if self.head.names and not self.head.numbering:
            places = range(len(pixels)) if self.order.places is None else self.order.places
            self.pixel_names = [self.head.names[pixels[place]] for place in places]
        if self.separator != b",":
            self.notes.insert(0, f"columns are separated by {self.separator.decode()!r}")
        looked_at = []
        for (row, line), of_row in zip(sampled.items(), fields, strict=True):
            num_columns = len(of_row)
            is_whole = num_columns == self.head.num_columns
            parts = self._divided(of_row) if is_whole else (None, [])
            looked_at.append(sample.Row(self.where(row), line, num_columns, *parts))
        sampled = sample.look(self.head, self.separator, self._no_pixels, looked_at)
        self.num_labels, self.num_words = sampled.num_labels, sampled.num_words
        self.notes += sampled.notes

    def __len__(self) -> int:
        return len(self._lines)

    def _find_lines(self, line_end: bytes) -> bool:
        """Finds the offsets of all rows; a line that is empty, or a carriage return, is no row.

        Returns:
          Whether any line ends so.
        """
        start = len(_BOM) if self._file.read(0, len(_BOM)) == _BOM else 0
        size, num_lines, before = 0, 0, b""
        parts = []
        for block in self._file.blocks(_SEARCH_BYTES):
            ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord(line_end)) + size
            if ends.size:
                parts.append(_rows(start, ends, num_lines, before=before, block=block, at=size))
                start, num_lines = int(ends[-1]) + 1, num_lines + len(ends)
            size, before = size + len(block), block[-1:]
        end = np.array([size], np.int64)
        parts.append(_rows(start, end, num_lines, before=before, block=b"", at=size))
        self._starts, self._ends, self._lines = map(np.concatenate, zip(*parts, strict=True))
        return num_lines > 0

    def _line(self, row: int) -> bytes:
        return self._file.read(int(self._starts[row]), int(self._ends[row]))

    def _each_line(self) -> Iterator[bytes]:
        """The lines of all rows, read in blocks."""
        starts, ends = self._starts, self._ends
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
        return self._id(row, self._line(row), self.columns.ids)

    def _id(self, row: int, line: bytes, column: int) -> bytes:
        if b'"' not in line and line.count(self.separator) == self.head.num_columns - 1:
            fields = line.split(self.separator, column + 1)  # Only as many as needed.
        elif len(fields := self._fields(line)) != self.head.num_columns:
            return b"%07d" % row
        return fields_lib.unquoted(fields[column]).decode(errors="backslashreplace").encode()

    def _first_repeated(self, column: int) -> tuple[str, int, int] | None:
        """A value that a column holds twice, and the two lines; None if all values differ."""
        lines = enumerate(self._each_line())
        # Hashes take 8 bytes a row. Rows whose hashes are equal are compared; no hash is kept.
        ids = (hash(self._id(row, line, column)) for row, line in lines)
        hashes = np.fromiter(ids, np.int64, len(self))
        order = np.argsort(hashes, kind="stable")
        places = np.flatnonzero(hashes[order[1:]] == hashes[order[:-1]])
        for place in places[np.argsort(order[places + 1])].tolist():
            rows = order[place : place + 2].tolist()
            first, second = (self._id(row, self._line(row), column) for row in rows)
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
        line = self._line(row)
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
        image = np.frombuffer(pixels, np.uint8)
        if self.order.places is not None:
            image = image[self.order.places]
        return image.reshape(shape), label

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Adds all the file's bytes to a digest."""
        for block in self._file.blocks(_BLOCK_BYTES):
            digest.update(block)


def _rows(
    start: int, ends: np.ndarray, num_before: int, *, before: bytes, block: bytes, at: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The rows among some lines.

    Args:
      start: offset of the first line.
      ends: int64 (n,), offsets of the lines' ends, all in the block.
      num_before: number of lines before these.
      before: the byte before the block; empty at the start of the file.
      block: bytes of the file.
      at: offset of the block.

    Returns:
      Three arrays int64 (rows,): where rows start, where their reading ends, and their lines.
    """
    starts = np.concatenate([[start], ends[:-1] + 1]).astype(np.int64)
    is_row = ends > starts
    single = np.flatnonzero(ends - starts == 1)
    data = np.frombuffer(before + block, np.uint8)
    is_row[single] = data[starts[single] - (at - len(before))] != ord("\r")
    rows = np.flatnonzero(is_row)
    starts = starts[rows]
    return starts, np.minimum(ends[rows], starts + _MOST_LINE_BYTES + 1), rows + num_before
