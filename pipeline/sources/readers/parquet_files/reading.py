"""Opens Parquet files and reads their rows, in memory that their headers cannot inflate."""

import contextlib
import io
import tempfile
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.cli.errors import StageError
from pipeline.sources import source
from pipeline.storage import files, stamps

_DAMAGED = (pa.ArrowException, OSError, ValueError, MemoryError, OverflowError, RecursionError)
# Bytes that pyarrow reads from a file at once.
_READ_BYTES = 1 << 20
# Limits on the rows that are decoded at once: their number, their bytes on average, and their
# bytes if each of them is the largest value that the file stores once and refers to.
_BATCH_ROWS, _BATCH_BYTES, _REPEATED_BYTES = 1_024, 1 << 24, 1 << 26
# What unpacks to more is refused: so many times as many bytes (deflate's largest ratio), and more
# than so many bytes.
MAX_RATIO, MAX_UNPACKED_BYTES = 1_032, 1 << 26
# A pixel of a list, while it is decoded.
_VALUE_BYTES = 4
# Rows that a byte of a file may hold: nulls and repetitions take a few bits.
_MAX_ROWS_PER_BYTE = 16


@contextlib.contextmanager
def opened(path: str, stamp: str) -> Iterator[pq.ParquetFile]:
    """Opens a file, and reports damage that the block meets in it.

    Args:
      path: local path or URL.
      stamp: the file's stamp in the listing.

    Raises:
      StageError: not a whole Parquet file, or a full disk in the block.
      SourceChanged: the file does not match the stamp, at the start or at the end.
    """
    own_stamp = stamp
    try:
        with files.open_read(path) as file:
            own_stamp = stamps.of_open(file)
            # Some stores word an object's time in one way in a listing and in another way here.
            sizes = [stamps.num_bytes(text) for text in (own_stamp, stamp)]
            if sizes[0] != sizes[1] if files.is_url(path) else own_stamp != stamp:
                raise source.changed(path)
            head, num_bytes = file.read(4), file.seek(0, io.SEEK_END)
            if head != b"PAR1":
                raise ValueError(f"{num_bytes:,} bytes that begin with {head!r}, not with b'PAR1'")
            file.seek(0)
            parquet = pq.ParquetFile(
                file, pre_buffer=False, buffer_size=_READ_BYTES, page_checksum_verification=True
            )
            num_rows = parquet.metadata.num_rows
            if not 0 <= num_rows <= _MAX_ROWS_PER_BYTE * num_bytes:
                raise ValueError(f"states {num_rows:,} rows in {num_bytes:,} bytes")
            yield parquet
    except _DAMAGED as error:
        if stamps.of_path(path) != own_stamp:
            raise source.changed(path) from error
        if isinstance(error, OSError) and error.errno in files.FULL:
            raise StageError(
                f"{tempfile.gettempdir()}: {error.strerror}; images are copied to that directory: "
                "free some space, or name another one with TMPDIR"
            ) from error
        reason = " ".join(str(error).split())[:300]
        raise StageError(
            f"{path}: not a Parquet file that can be read ({reason}); expected a whole one, "
            "without encryption: download it or write it again"
        ) from error
    if stamps.of_path(path) != own_stamp:
        raise source.changed(path)


def batches(parquet: pq.ParquetFile, names: list[str]) -> Iterator[pa.RecordBatch]:
    """The rows of a file, without empty batches.

    Args:
      parquet: an opened file.
      names: the columns to read.

    Raises:
      ValueError: the file contradicts itself, or unpacks out of proportion.
      OSError or pa.ArrowException: the file is damaged.
    """
    num_read = 0
    for number in range(parquet.num_row_groups):
        size = _rows_at_a_time(parquet.metadata.row_group(number), names)
        for batch in parquet.iter_batches(
            batch_size=size, row_groups=[number], columns=names, use_threads=False
        ):
            num_read += len(batch)
            if len(batch):
                yield batch
    if num_read != parquet.metadata.num_rows:
        raise ValueError(f"states {parquet.metadata.num_rows:,} rows, holds {num_read:,}")


def _rows_at_a_time(group: pq.RowGroupMetaData, names: list[str]) -> int:
    """How many rows of a row group to decode at once; raises a ValueError for a bomb."""
    num_unpacked, num_repeated = 0, 0
    for number in range(group.num_columns):
        chunk = group.column(number)
        path, num_packed = chunk.path_in_schema, max(1, chunk.total_compressed_size)
        if not any(f"{path}.".startswith(f"{name}.") for name in names):
            continue
        unpacked = max(chunk.total_uncompressed_size, _VALUE_BYTES * chunk.num_values)
        check_unpacked(unpacked, num_packed, f"its column {path!r}")
        num_unpacked += unpacked
        if chunk.dictionary_page_offset is not None:
            num_dictionary = max(0, chunk.data_page_offset - chunk.dictionary_page_offset)
            num_repeated += num_dictionary * max(1, unpacked // num_packed)
    average = num_unpacked // max(1, group.num_rows)
    rows = min(_BATCH_BYTES // max(1, average), _REPEATED_BYTES // max(1, num_repeated))
    return max(1, min(_BATCH_ROWS, rows))


def check_unpacked(unpacked: int, num_packed: int, what: str) -> None:
    """Raises a ValueError for bytes that are out of proportion to the packed ones."""
    if unpacked > max(MAX_UNPACKED_BYTES, MAX_RATIO * num_packed):
        raise ValueError(
            f"{what} unpacks from {num_packed:,} bytes to {unpacked:,} or more, expected at most "
            f"{MAX_RATIO:,} times as many"
        )
