"""Parquet files: a column of images, and one of labels, as the dataset hubs publish them.

The parts are in parquet_files: which files belong together, which columns are read, and the copy
that records are read from.
"""

import collections
import hashlib
import io
import json
import os

import numpy as np
import pyarrow as pa

from pipeline.cli.errors import StageError, UsageError
from pipeline.sources import source
from pipeline.sources.image_file import decode, read_header
from pipeline.sources.local_file import OpenFile
from pipeline.sources.options import DEFAULTS, SourceOptions
from pipeline.sources.readers import arrays
from pipeline.sources.readers.parquet_files import (
    classes,
    copying,
    listing,
    looking,
    reading,
    values,
)
from pipeline.sources.readers.parquet_files import columns as columns_lib
from pipeline.sources.splits import UNSPLIT
from pipeline.storage import files

# Pixels in lists that never exceed one of these are probably not of 0 to 255, as in npz files.
_DARK = (1, 16)


class ParquetSource:
    """A source over the rows of Parquet files."""

    def __init__(self, place: str, options: SourceOptions = DEFAULTS):
        """Finds the columns, and copies them.

        Args:
          place: FILE, DIR or GLOB, local or a URL.
          options: see SourceOptions.

        Raises:
          UsageError: --label_column has to name a column, or a column states splits.
          StageError: no files, damaged files, or files that are no image set.
          SourceChanged: a file changed while it was copied.
        """
        self._place, self._where, self._options = place, f"--source=parquet:{place}", options
        self._listing = listed_files = listing.list_files(place)
        if not listed_files.stamps:
            raise StageError(
                f"{self._where}: no such Parquet files; expected a file, a directory with "
                f"{', '.join(listing.ENDINGS)} files below, or a pattern such as "
                "DIR/train-*.parquet: mend the path"
            )
        self.listed, self.ignored = dict(listed_files.stamps), listed_files.ignored
        splits = listing.splits_of(listed_files, self._where)
        self._paths = list(splits)
        stamp_by_path = {listed_files.full(path): listed_files.stamps[path] for path in self._paths}

        def read_schema(path: str) -> pa.Schema:
            with reading.opened(path, stamp_by_path[path]) as parquet:
                return parquet.schema_arrow

        read_schemas = files.each(listed_files.root, read_schema, stamp_by_path)
        schemas = dict(zip(self._paths, read_schemas, strict=True))
        columns = columns_lib.find(
            schemas,
            self._where,
            requested=options.label_column,
            is_labelled=options.labels != "none",
        )
        if columns.label is None and options.labels != "none":
            listing.refuse_labels_in_names(listed_files, self._where)
        split_by_path = dict(zip(stamp_by_path, splits.values(), strict=True))
        looking.refuse_splits_in_rows(split_by_path, stamp_by_path, columns)
        looking.refuse_distinct(stamp_by_path, columns, self._where)
        self._copy = copying.copy_rows(stamp_by_path, columns, options)
        self._labels = self._copy.labels
        sizes = collections.Counter[str]()
        for split, size in zip(splits.values(), np.diff(self._copy.starts).tolist(), strict=True):
            sizes[split] += size
        self.split_sizes = {split: size for split, size in sizes.items() if size}
        self.notes = [*listed_files.notes, *columns.notes]
        self.class_names: list[str] = []
        if columns.label is not None:
            named = classes.name_classes(self._copy, columns, schemas, self._where)
            self._labels, self.class_names = named.labels, named.class_names
            self.notes += named.notes
        if UNSPLIT not in sizes:
            counts = collections.Counter(splits.values())
            shown = ", ".join(f"{n:,} of {split}" for split, n in counts.items())
            self.notes.append(f"files are of the splits that their paths name: {shown}")
        if dark := next((limit for limit in _DARK if 0 < self._copy.highest <= limit), None):
            self.notes.append(
                f"warning: pixels are at most {self._copy.highest} of 255, nearly black, and "
                "stored as they are; a column that is written again with "
                f"(255 * x / {dark}).round() makes {dark} white"
            )
        self._shape: tuple[int, int, int] | None = None

    def listing(self) -> dict[str, str]:
        """Path -> current stamp of each file."""
        try:
            return listing.list_files(self._place).stamps
        except (FileNotFoundError, NotADirectoryError):
            return {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The most frequent image shape, by the headers of all images."""
        if self._shape is None:
            shapes, reason, num_of_16_bits = collections.Counter[tuple[int, int, int]](), "", 0
            options = self._options
            for index, shape in enumerate(self._copy.shapes.tolist()):
                if not values.is_fault(shape) and not values.is_encoded(shape):
                    shapes[tuple(shape)] += 1
                    continue
                data = self._copy.read(*self._copy.offsets[index : index + 2].tolist())
                try:
                    if values.is_fault(shape):
                        raise ValueError(data.decode())
                    image = io.BytesIO(data)
                    header = read_header(image, options.max_image_pixels, options.background)
                except ValueError as error:
                    reason = reason or f"{self.where(index)}: {error}"
                else:
                    shapes[header.shape] += 1
                    num_of_16_bits += header.is_of_16_bits
            if not shapes:
                raise StageError(
                    f"{self._where}: none of its {len(self._labels):,} images can be read "
                    f"({reason}); expected PNG, JPEG or another format that Pillow reads, or "
                    "pixels in lists: write the table again"
                )
            if len(shapes) > 1:
                shown = (f"{'×'.join(map(str, s))} ({n:,})" for s, n in shapes.most_common(5))
                more = ", …" if len(shapes) > 5 else ""
                self.notes.append(f"images are of {len(shapes):,} shapes: {', '.join(shown)}{more}")
            if num_of_16_bits:
                self.notes.append(
                    f"{num_of_16_bits:,} images of 16 bits are scaled to 8 bits: 65535 becomes 255"
                )
            self._shape = max(shapes.items(), key=lambda item: (item[1], item[0]))[0]
        return self._shape

    def fingerprint(self) -> str:
        """sha256 over paths below DIR, images, labels and class names."""
        copy = self._copy
        digest = hashlib.sha256(json.dumps([self.split_sizes, self.class_names]).encode())
        for path, first in zip(self._paths, copy.starts.tolist(), strict=False):
            digest.update(os.fsencode(path) + f"\0{first};".encode())
        for array, dtype in ((self._labels, "<i8"), (copy.offsets, "<i8"), (copy.shapes, "<i4")):
            digest.update(np.ascontiguousarray(array, dtype))
        file = OpenFile(copy.file, self._where)
        arrays.hash_rows(digest, arrays.FileRows(file, 0, (file.num_bytes,), np.dtype(np.uint8)))
        return digest.hexdigest()

    def _places(self, indices: np.ndarray) -> list[tuple[str, int]]:
        """The file of each record, and its row."""
        numbers = np.searchsorted(self._copy.starts, indices, side="right") - 1
        rows = indices - self._copy.starts[numbers]
        pairs = zip(numbers.tolist(), rows.tolist(), strict=True)
        return [(self._paths[number], row) for number, row in pairs]

    def ids(self, indices: np.ndarray) -> list[bytes]:
        """`<path below DIR>#<row>`."""
        places = self._places(indices)
        return [f"{path}#{row}".encode(errors="backslashreplace") for path, row in places]

    def where(self, index: int) -> str:
        """The file and the row."""
        [(path, row)] = self._places(np.array([index]))
        return f"{self._listing.full(path)}#{row}"

    def read(self, indices: np.ndarray) -> tuple[source.OneByOne, np.ndarray]:
        """Decodes the images at `indices`, each on access."""
        copy, labels = self._copy, self._labels[indices]
        # As Python's numbers, which cost less to look at one by one.
        firsts, ends = copy.offsets[indices].tolist(), copy.offsets[indices + 1].tolist()
        rows = list(zip(firsts, ends, copy.shapes[indices].tolist(), labels.tolist(), strict=True))
        return source.OneByOne(lambda i: self._image(*rows[i]), len(rows)), labels

    def _image(
        self, first: int, end: int, shape: list[int], label: int
    ) -> np.ndarray | source.Unreadable:
        """The image in the bytes `first` to `end` − 1 of the copy."""
        if not source.UNLABELLED <= label < len(self.class_names):
            what = "that is no whole number" if label == values.NOT_WHOLE else f"{label}"
            return source.Unreadable(f"label {what}, expected -1 to {len(self.class_names) - 1}")
        data = self._copy.read(first, end)
        try:
            if values.is_encoded(shape):
                return decode(data, self._options.max_image_pixels, self._options.background)
        except ValueError as error:
            return source.Unreadable(str(error))
        if values.is_fault(shape):
            return source.Unreadable(data.decode())
        return np.frombuffer(data, np.uint8).reshape(shape)


def open_parquet(place: str, options: SourceOptions = DEFAULTS) -> ParquetSource:
    """The image set in Parquet files.

    Args:
      place: FILE, DIR or GLOB, local or a URL. Names of files, and of directories below DIR,
        state the splits.
      options: see SourceOptions.

    Raises:
      UsageError: --label_column has to name a column.
      StageError: no such files, or no image set.
    """
    if not place:
        raise UsageError("--source=parquet: names no file; write --source=parquet:FILE_DIR_OR_GLOB")
    return ParquetSource(place, options)
