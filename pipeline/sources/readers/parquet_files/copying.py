"""Copies the images of Parquet files to one local file, from which records are read one by one.

Records of a shard lie all over the files, and Parquet is decoded in pages: without a copy, each
read would decode all files. The copy holds images as the files do, PNG and JPEG still encoded. An
unnamed file goes when the process ends.
"""

import os
import tempfile
from collections.abc import Mapping
from typing import BinaryIO, NamedTuple

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.options import SourceOptions
from pipeline.sources.readers.parquet_files import reading, values
from pipeline.sources.readers.parquet_files.columns import Columns
from pipeline.sources.source import UNLABELLED
from pipeline.storage import files, stamps

# Allowance for data beside the pixels of an image file, as in folder.py.
_EXTRA_BYTES = 1 << 20


class Copy(NamedTuple):
    """All n rows of a source, in order."""

    file: BinaryIO  # The images, or the reasons why a row has none.
    starts: np.ndarray  # (files + 1,) int64, the first row of each file, and n
    offsets: np.ndarray  # (n + 1,) int64, where each row begins in `file`
    shapes: np.ndarray  # (n, 3) int32, see values.Cells
    labels: np.ndarray  # (n,) int64; numbers of `texts` if these are not empty
    texts: dict[str, int]  # Text of a label -> its number
    highest: int  # Of the pixels in lists; 0 for image files.

    def read(self, first: int, end: int) -> bytes:
        """The bytes first to end − 1 of the file; nobody else can change it."""
        return os.pread(self.file.fileno(), end - first, first)


def copy_rows(stamp_by_path: Mapping[str, str], columns: Columns, options: SourceOptions) -> Copy:
    """Reads all rows once.

    Args:
      stamp_by_path: full path or URL -> stamp of each file, in the order of the records.
      columns: the columns to read.
      options: see SourceOptions.

    Raises:
      StageError: a damaged file, numbers that are no pixels, labels that name no classes, or a
        full disk.
      SourceChanged: a file changed while it was copied.
    """
    file, texts, max_pixels = tempfile.TemporaryFile(), dict[str, int](), options.max_image_pixels
    # Uncompressed, a pixel with 8 bits a channel takes at most 4 bytes.
    max_bytes = 4 * max_pixels + _EXTRA_BYTES
    starts, highest = [0], 0
    lengths, shapes, labels = [np.zeros(1, np.int64)], [np.zeros((0, 3), np.int32)], [starts[:0]]
    for path, stamp in stamp_by_path.items():
        starts.append(starts[-1])
        begin, num_packed = file.tell(), stamps.num_bytes(stamp) or files.num_bytes(path)
        with reading.opened(path, stamp) as parquet:
            names = set(parquet.schema_arrow.names) & {columns.image, columns.label}
            for batch in reading.batches(parquet, sorted(names)):
                try:
                    cells = values.cells(batch.column(columns.image), max_pixels, max_bytes)
                except values.OutOfRange as error:
                    raise StageError(
                        f"{path}: the column {columns.image!r} holds {error}; expected pixels 0 to "
                        "255: write the column again with (255 * (x - BLACK) / (WHITE - BLACK))"
                        ".round(), or without this column if its numbers are no pixels"
                    ) from error
                highest = max(highest, cells.highest)
                file.write(cells.data)
                reading.check_unpacked(file.tell() - begin, num_packed, f"{columns.image!r}")
                lengths.append(cells.lengths)
                shapes.append(cells.shapes)
                if columns.label not in names:
                    labels.append(np.full(len(batch), UNLABELLED, np.int64))
                else:
                    try:
                        labels.append(values.label_numbers(batch.column(columns.label), texts))
                    except ValueError as error:
                        raise StageError(
                            f"{path}: the column {columns.label!r} holds {error}; expected class "
                            "numbers or names: name another column with --label_column, or ignore "
                            "labels with --labels=none"
                        ) from error
                starts[-1] += len(batch)
            file.flush()  # Here, where a full disk is reported.
    return Copy(
        file,
        np.array(starts, np.int64),
        np.cumsum(np.concatenate(lengths)),
        np.concatenate(shapes),
        np.concatenate(labels).astype(np.int64),
        texts,
        highest,
    )
