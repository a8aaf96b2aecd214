"""One CSV file: its rows, and how a row is read."""

import csv
import hashlib
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources import source
from pipeline.sources.local_file import LocalFile
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers import arrays, csv_columns

_BOM = b"\xef\xbb\xbf"
_INTEGER = re.compile(rb"\s*-?\d+\s*")
# Whole numbers are written as 5, 5.0 and 5.000e+00 too.
_DECIMAL = re.compile(rb"-?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")
_DECIMAL_BYTES = b"0123456789.eE+-,"
# Bytes read or searched for line ends at a time.
_BLOCK_BYTES = 1 << 24
# Rows and bytes that tell at the start whether a file can be read.
_NUM_SAMPLED, _LEAST_SAMPLED, _SAMPLED_BYTES = 400, 20, 1 << 23
# A share of rows; with more bad ones a file is not read at all.
_MOST_BAD = 0.9


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
        self._refuse_encoding()
        self._find_lines(b"\n")
        if len(self._ends) == 1 and b"\r" in self._file.read(0, min(int(self._ends[0]), 1 << 20)):
            self._find_lines(b"\r")  # As old Macs end lines.
        first_lines = [self._line(line) for line in self._lines[:5]]
        self.separator = _separator(first_lines)
        self._plain_bytes = b"0123456789- \r" + self.separator
        first = first_lines[0].split(self.separator) if first_lines else []
        if len(first) < 2:
            raise StageError(
                f"{path}: the first line has {len(first)} column(s); expected a label and pixels, "
                f"separated by commas, semicolons, tabs or |: {self._remedy(first)}"
            )
        self.head = csv_columns.head_of(path, first)
        if self.head.names is not None:
            self._lines = self._lines[1:]
        # Class name -> label if the labels of the set are words; else None.
        self.classes: dict[str, int] | None = None

    def decide(self, options: SourceOptions) -> None:
        """Decides what the columns hold; see csv_columns.decide.

        Raises:
          StageError: no rows, or nearly all rows are bad.
          UsageError: the columns do not tell.
        """
        if not len(self):
            raise StageError(f"{self.path}: holds a header but no rows; expected at least one row")
        row_bytes = max(1, self._file.num_bytes // len(self))
        num_sampled = min(_NUM_SAMPLED, max(_LEAST_SAMPLED, _SAMPLED_BYTES // row_bytes))
        rows = range(0, len(self), -(-len(self) // num_sampled))
        sampled = {row: self._line(self._lines[row]) for row in rows}
        whole = [
            fields
            for fields in map(self._fields, sampled.values())
            if len(fields) == self.head.num_columns
        ]
        self.columns = csv_columns.decide(
            self.head, options, rows=whole, repeated=self._first_repeated
        )
        self.no_pixels = self.columns.no_pixels
        self.num_pixels = self.head.num_columns - len(self.no_pixels)
        self.notes = list(self.columns.notes)
        if self.separator != b",":
            self.notes.insert(0, f"columns are separated by {self.separator.decode()!r}")
        self.num_words = self.num_labels = 0
        self._check(sampled)

    def __len__(self) -> int:
        return len(self._lines)

    def _refuse_encoding(self) -> None:
        head = self._file.read(0, 1 << 12).partition(b"\n")[0]
        quoted = shlex.quote(self.path)
        found, remedy = "", ""
        for mark, name in (
            (b"\xff\xfe\0\0", "UTF-32"),
            (b"\xff\xfe", "UTF-16"),
            (b"\xfe\xff", "UTF-16"),
        ):
            if head.startswith(mark) and not found:
                found = f"is text in {name}"
                remedy = f"convert it with iconv -f {name} -t UTF-8 {quoted} > utf8.csv"
        if not found and head.startswith((b"\x1f\x8b", b"PK\3\4")):
            found, remedy = "is packed", "unpack it, or name a gzip file .csv.gz"
        elif not found and b"\0" in head:
            found = "holds zero bytes in its first line, like UTF-16 without a mark"
            remedy = f"if so, convert it with iconv -f UTF-16LE -t UTF-8 {quoted} > utf8.csv"
        if found:
            raise StageError(f"{self.path}: {found}; expected text in UTF-8: {remedy}")

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

    def _remedy(self, first: list[bytes]) -> str:
        """What to do with a file of one column."""
        if not first or len(first[0].split()) < 2:
            return "convert the file"
        command = "sed -E 's/^ +| +$//g; s/ +/,/g'"
        return f"convert spaces with {command} {shlex.quote(self.path)} > commas.csv"

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
        """The fields of a line; a field in quotes may hold the separator."""
        fields = line.split(self.separator)
        if len(fields) != self.head.num_columns and b'"' in line:
            text = line.decode(errors="surrogateescape").strip("\r")
            try:
                texts = next(csv.reader([text], delimiter=self.separator.decode()))
            except csv.Error:
                return fields
            fields = [text.encode(errors="surrogateescape") for text in texts]
        return fields

    def where(self, row: int) -> str:
        """The file and the line."""
        return f"{self.path} line {self._lines[row] + 1}"

    def id_of(self, row: int) -> bytes:
        """The id that the row states, or its number if its columns are not as in other rows."""
        return self._id(row, self._line(self._lines[row]), self.columns.ids)

    def _id(self, row: int, line: bytes, column: int) -> bytes:
        fields = self._fields(line)
        if len(fields) != self.head.num_columns:
            return b"%07d" % row
        return _unquoted(fields[column]).decode(errors="backslashreplace").encode()

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

    def _check(self, sampled: Mapping[int, bytes]) -> None:
        """Counts labels that are words, and refuses a file in which nearly all rows are bad.

        Args:
          sampled: row -> line.

        Raises:
          StageError: nearly all rows are bad.
        """
        faults: list[tuple[int, str]] = []
        highest, values = 0, []
        for row, line in sampled.items():
            fields = self._fields(line)
            if len(fields) != self.head.num_columns:
                faults.append((row, f"has {len(fields)} columns, expected {self.head.num_columns}"))
                continue
            field, pixel_fields = self._divided(fields)
            if field is not None:
                self.num_labels += 1
                text = _unquoted(field)
                self.num_words += bool(text) and not _DECIMAL.fullmatch(text)
                if _DECIMAL.fullmatch(text) and label_of(field) is None:
                    faults.append((row, f"has the {_bad_label(field)}"))
                    continue
            pixels = _pixels(pixel_fields, line)
            if pixels is not None:
                highest = max(highest, *set(pixels))
                continue
            number, pixel = _first_bad(pixel_fields)
            faults.append(
                (row, f"has {_shown(pixel)} as pixel {number}; expected whole numbers 0 to 255")
            )
            if _DECIMAL.fullmatch(_unquoted(pixel)):
                texts = map(_unquoted, pixel_fields)
                values += [float(text) for text in texts if _DECIMAL.fullmatch(text)]
        if len(faults) > _MOST_BAD * len(sampled):
            remedy = (
                self._scaling(values)
                if values
                else (
                    "look for columns that are no pixels, and name the labels with --label_column"
                )
            )
            row, fault = faults[0]
            raise StageError(
                f"{self.path}: {len(faults)} of {len(sampled)} rows looked at cannot be read: line "
                f"{self._lines[row] + 1} {fault}: {remedy}"
            )
        if highest == 1:
            self.notes.append(
                f"pixels are 0 and 1 in all {len(sampled)} rows looked at, and are stored so, "
                f"nearly black: {self._scaling([0, 1])}"
            )

    def _scaling(self, values: Sequence[float]) -> str:
        """The line of pandas that makes pixels of these values whole numbers 0 to 255."""
        low, high = min(values), max(values)
        pixels = "t[p]"
        if low < 0 or high > 255:
            pixels = f"((t[p] - {low:g}) * {255 / (high - low):.9g})"
        elif high <= 1:
            pixels = "(t[p] * 255)"
        read = "" if self.separator == b"," else f", sep={self.separator.decode()!r}"
        read += "" if self.head.names else ", header=None"
        written = "index=False" if self.head.names else "index=False, header=False"
        code = (
            f"import pandas as pd; t = pd.read_csv({self.path!r}{read}); "
            f"p = t.columns.delete({sorted(self.no_pixels)}); "
            f"t[p] = {pixels}.round().astype(int); t.to_csv('scaled.csv', {written})"
        )
        return f"pixels are {low:g} to {high:g}; scale them with python -c {shlex.quote(code)}"

    def _divided(self, fields: list[bytes]) -> tuple[bytes | None, list[bytes]]:
        """The field of the label, and the fields of the pixels; takes the list apart."""
        field = None if self.columns.label is None else fields[self.columns.label]
        for column in self.no_pixels:
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
        column, num_columns = self.columns.label, self.head.num_columns
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
            others = b"".join([fields[place] for place in reversed(self.no_pixels)])
            field, pixel_fields = self._divided(fields)
            is_plain = left == others.translate(None, self._plain_bytes)
            if is_plain and (are_words or _INTEGER.fullmatch(field)):
                yield field, False
            elif _pixels(pixel_fields, line) is not None:
                was_read = (
                    _INTEGER.fullmatch(field) and _plain_pixels(pixel_fields, line) is not None
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
            label = label_of(field) if self.classes is None else self.classes.get(name_of(field))
            if label is None:
                return source.Unreadable(_bad_label(field, self.classes)), source.UNLABELLED
        pixels = _pixels(pixel_fields, line)
        if pixels is None:
            number, pixel = _first_bad(pixel_fields)
            reason = f"pixel {number} is {_shown(pixel)}, expected a whole number 0 to 255"
            return source.Unreadable(reason), label
        return np.frombuffer(pixels, np.uint8).reshape(shape), label

    def hash_into(self, digest: "hashlib._Hash") -> None:
        """Adds all the file's bytes to a digest."""
        for block in self._file.blocks(_BLOCK_BYTES):
            digest.update(block)


def _separator(lines: list[bytes]) -> bytes:
    """The comma, or the one other separator that all lines hold equally often."""
    others = [s for s in (b";", b"\t", b"|") if len({line.count(s) for line in lines}) == 1]
    others = [s for s in others if lines[0].count(s)]
    return others[0] if len(others) == 1 and b"," not in lines[0] else b","


def label_of(field: bytes) -> int | None:
    """The whole number in a field, or None."""
    if _INTEGER.fullmatch(field):
        label = int(field) if len(field) <= 20 else None
    else:
        label = _whole_number(field)
    return label if label is not None and abs(label) <= arrays.MAX_LABEL else None


def name_of(field: bytes) -> str:
    """The name of the class in a field; 5.0 is class 5."""
    number = label_of(field)
    if number is not None:
        return str(number)
    return _unquoted(field).decode(errors="surrogateescape")


def _bad_label(field: bytes, classes: Mapping[str, int] | None = None) -> str:
    expected = f"a whole number up to {arrays.MAX_LABEL}"
    return f"label {_shown(field)}, expected {expected if classes is None else 'a class name'}"


def _whole_number(field: bytes) -> int | None:
    """The whole number that is written as a decimal or in quotes, or None."""
    text = _unquoted(field)
    number = float(text) if _DECIMAL.fullmatch(text) else 0.5
    return int(number) if number.is_integer() else None


def _plain_pixels(fields: list[bytes], line: bytes) -> bytes | None:
    """Pixels that are written as integers, or None."""
    try:
        pixels = bytes(map(int, fields))
    except ValueError:
        return None
    # Python accepts them in integers; other programs do not.
    return None if b"_" in line or b"+" in line else pixels


def _pixels(fields: list[bytes], line: bytes) -> bytes | None:
    """The pixels in fields of a line, or None if one of them is no whole number 0 to 255."""
    pixels = _plain_pixels(fields, line)
    if pixels is not None:
        return pixels
    texts = list(map(_unquoted, fields))
    if b",".join(texts).translate(None, _DECIMAL_BYTES):
        return None
    try:
        values = np.array(list(map(float, texts)))
    except ValueError:
        return None
    is_whole = (values >= 0) & (values <= 255) & (values == np.floor(values))
    is_signed = any(text.startswith(b"+") for text in texts)
    return values.astype(np.uint8).tobytes() if is_whole.all() and not is_signed else None


def _first_bad(fields: list[bytes]) -> tuple[int, bytes]:
    """The first field that is no pixel, and its position."""
    for position, field in enumerate(fields):
        number = _whole_number(field)
        if number is None or not 0 <= number <= 255:
            return position, field
    raise AssertionError(fields)


def _unquoted(field: bytes) -> bytes:
    """A field without spaces and quotes around it."""
    text = field.strip()
    if len(text) > 1 and text[:1] == text[-1:] == b'"':
        return text[1:-1].replace(b'""', b'"').strip()
    return text


def _shown(field: bytes) -> str:
    return repr(field[:24].decode(errors="replace").strip())
