"""Copies the images of Parquet files to one local file, from which records are read one by one.

Records of a shard lie all over the files, and Parquet is decoded in pages: without a copy, each
read would decode all files. The copy holds images as the files do, PNG and JPEG still encoded. An
unnamed file goes when the process ends.

A file whose rows are known from an earlier job has its place in the copy, and is copied when one
of its records is asked for.
"""

import os
import tempfile
import threading
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources import source
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.parquet_files import reading, values
from pipeline.sources.readers.parquet_files.columns import Columns
from pipeline.sources.source import UNLABELLED
from pipeline.storage import files, stamps

# Allowance for data beside the pixels of an image file, as in folder.py.
_EXTRA_BYTES = 1 << 20


class Rows(NamedTuple):
    """What is kept of the n rows of a file."""

    lengths: np.ndarray  # (n,) int64, bytes in the copy
    shapes: np.ndarray  # (n, 3) int32, see values.Cells
    labels: np.ndarray  # (n,) int64; positions in `texts` if these are not empty
    texts: list[str]  # Of the labels, in the order of their first rows.
    highest: int  # Of the pixels in lists; 0 for image files.


class Copy:
    """All n rows of a source, in order."""

    def __init__(
        self,
        stamp_by_path: Mapping[str, str],
        columns: Columns,
        options: SourceOptions,
        known: Mapping[str, Rows],
    ):
        """Copies the files that are not known.

        Args:
          stamp_by_path: full path or URL -> stamp of each file, in the order of the records.
          columns: the columns to read.
          options: see SourceOptions.
          known: full path or URL -> the rows of files that are copied later.

        Raises:
          StageError: a damaged file, numbers that are no pixels, labels that name no classes, or a
            full disk.
          SourceChanged: a file changed while it was copied.
        """
        self._file, self._lock = tempfile.TemporaryFile(), threading.Lock()
        self._columns, self._max_pixels = columns, options.max_image_pixels
        # Uncompressed, a pixel with 8 bits a channel takes at most 4 bytes.
        self._max_bytes = 4 * self._max_pixels + _EXTRA_BYTES
        self._files = list(stamp_by_path.items())
        self._is_copied = np.ones(len(self._files), bool)
        self.texts: dict[str, int] = {}  # Text of a label -> its number
        self.rows: list[Rows] = []  # Of each file.
        end = 0
        for number, (path, _) in enumerate(self._files):
            rows = known.get(path)
            if rows is None:
                rows = self._copy(number, end, self.texts)
            else:
                self._is_copied[number] = False
                for text in rows.texts:
                    self.texts.setdefault(text, len(self.texts))
                try:
                    values.check_classes(self.texts)
                except ValueError as error:
                    raise self._bad_labels(path, error) from error
            self.rows.append(rows)
            end += int(rows.lengths.sum())
        sizes = [len(rows.labels) for rows in self.rows]
        # (files + 1,) int64, the first row of each file, and n
        self.starts = np.cumsum([0, *sizes]).astype(np.int64)
        lengths = [np.zeros(1, np.int64), *(rows.lengths for rows in self.rows)]
        self.offsets = np.cumsum(np.concatenate(lengths))  # (n + 1,), where each row begins
        self.shapes = np.concatenate([rows.shapes for rows in self.rows])  # (n, 3)
        # (n,) int64; numbers of `texts` if these are not empty
        self.labels = np.concatenate([self._numbered(rows) for rows in self.rows])
        self.highest = max(rows.highest for rows in self.rows)

    def _numbered(self, rows: Rows) -> np.ndarray:
        """Labels of a file in the numbers of `texts`; negative numbers stay."""
        if not rows.texts:
            return rows.labels
        numbers = np.array([self.texts[text] for text in rows.texts], np.int64)
        return np.where(rows.labels < 0, rows.labels, numbers[rows.labels])

    def _bad_labels(self, path: str, error: ValueError) -> StageError:
        return StageError(
            f"{path}: the column {self._columns.label!r} holds {error}; expected class numbers or "
            "names: name another column with --label_column, or ignore labels with --labels=none"
        )

    def _copy(self, number: int, begin: int, texts: dict[str, int] | None) -> Rows:
        """Copies a file to the bytes from `begin`.

        Args:
          number: of the file.
          begin: offset in the copy.
          texts: see `texts`, which grow; None to leave the labels out.
        """
        path, stamp = self._files[number]
        image, label = self._columns.image, self._columns.label if texts is not None else None
        lengths, shapes = [np.zeros(0, np.int64)], [np.zeros((0, 3), np.int32)]
        labels, highest = [np.zeros(0, np.int64)], 0
        num_packed = stamps.num_bytes(stamp) or files.num_bytes(path)
        self._file.seek(begin)
        with reading.opened(path, stamp) as parquet:
            names = set(parquet.schema_arrow.names) & {image, label}
            for batch in reading.batches(parquet, sorted(names)):
                try:
                    cells = values.cells(batch.column(image), self._max_pixels, self._max_bytes)
                except values.OutOfRange as error:
                    raise StageError(
                        f"{path}: the column {image!r} holds {error}; expected pixels 0 to "
                        "255: write the column again with (255 * (x - BLACK) / (WHITE - BLACK))"
                        ".round(), or without this column if its numbers are no pixels"
                    ) from error
                highest = max(highest, cells.highest)
                self._file.write(cells.data)
                reading.check_unpacked(self._file.tell() - begin, num_packed, f"{image!r}")
                lengths.append(cells.lengths)
                shapes.append(cells.shapes)
                if label not in names:
                    labels.append(np.full(len(batch), UNLABELLED, np.int64))
                    continue
                try:
                    labels.append(values.label_numbers(batch.column(label), texts))
                except ValueError as error:
                    raise self._bad_labels(path, error) from error
            self._file.flush()  # Here, where a full disk is reported.
        all_labels = np.concatenate(labels).astype(np.int64)
        own_texts: list[str] = []
        if texts:
            by_number = list(texts)
            own, first, places = np.unique(all_labels, return_index=True, return_inverse=True)
            # The texts of this file, in the order of their first rows.
            ordered = [n for n in own[np.argsort(first)].tolist() if n >= 0]
            own_texts = [by_number[n] for n in ordered]
            local = {n: place for place, n in enumerate(ordered)}
            all_labels = np.array([local.get(n, n) for n in own.tolist()], np.int64)[places]
        return Rows(np.concatenate(lengths), np.concatenate(shapes), all_labels, own_texts, highest)

    def load(self, numbers: Iterable[int]) -> None:
        """Copies files that have not been copied, by their numbers.

        Raises:
          StageError, SourceChanged: as the constructor.
        """
        for number in numbers:
            if self._is_copied[number]:
                continue
            with self._lock:
                if self._is_copied[number]:
                    continue
                rows = self._copy(number, int(self.offsets[self.starts[number]]), None)
                if not np.array_equal(rows.lengths, self.rows[number].lengths):
                    raise source.changed(self._files[number][0])
                self._is_copied[number] = True

    def read(self, first: int, end: int) -> bytes:
        """The bytes first to end − 1, of rows that are copied; nobody else can change them."""
        return os.pread(self._file.fileno(), end - first, first)


class Bytes:
    """The bytes of all rows as an array; a slice copies the files that it needs."""

    def __init__(self, copy: Copy):
        """Reads nothing yet."""
        self._copy = copy
        self.shape, self.dtype = (int(copy.offsets[-1]),), np.dtype(np.uint8)
        self._ends = copy.offsets[copy.starts[1:]]  # Of each file.

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, places: slice) -> np.ndarray:
        first, end, _ = places.indices(len(self))
        numbers = np.searchsorted(self._ends, [first, end - 1], side="right")
        self._copy.load(range(numbers[0], numbers[1] + 1))
        return np.frombuffer(self._copy.read(first, end), np.uint8)
