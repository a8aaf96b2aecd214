"""TFRecord files: records in frames with checksums, written, and read past damage.

A frame is: length (uint64), masked crc32c of the length, data, masked crc32c of the
data; all numbers little-endian. Source of the format:
tensorflow/core/lib/io/record_writer.h. What the records hold is not known here.
"""

import functools
import gzip
import itertools
import struct
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import google_crc32c
import numpy as np

from pipeline.cli.errors import StageError

COMPRESSIONS = ("none", "gzip")
# Beam and gunzip recognise a packed file by this suffix.
_GZIP_SUFFIX = ".gz"
_FRAME = struct.Struct("<QI")
_CRC = struct.Struct("<I")
# Bytes of a frame beside its data.
FRAME_BYTES = _FRAME.size + _CRC.size
# Records written, and hashed, at a time.
_RECORDS_A_WRITE = 64
# Bytes searched for the next frame at a time, and unpacked at a time.
_SEARCH_BYTES = 1 << 20
_UNPACK_BYTES = 1 << 16


class Fault(NamedTuple):
    """A place in a file that holds no whole record."""

    offset: int  # Bytes from the beginning of the (unpacked) file.
    reason: str


def suffix(compression: str) -> str:
    """The suffix of file names."""
    return _GZIP_SUFFIX if compression == "gzip" else ""


def _masked_crc(data: bytes) -> int:
    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@functools.lru_cache(maxsize=4096)
def _frame_header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + _CRC.pack(_masked_crc(packed))


def write(file: BinaryIO, name: str, records: Iterable[bytes]) -> int:
    """Writes records to an open file; does not close the file.

    Args:
      file: takes the bytes of a whole TFRecord file.
      name: the file's name; packed with gzip if it ends in .gz.
      records: the records, in order.

    Returns:
      The number of records.
    """
    num_examples = 0
    # The gzip header gets no name and no time, so that equal records give equal bytes.
    packed = gzip.GzipFile("", "wb", 6, file, mtime=0) if is_packed(name) else None
    out = packed or file
    records = iter(records)
    while chunk := list(itertools.islice(records, _RECORDS_A_WRITE)):
        frames = (
            part
            for record in chunk
            for part in (_frame_header(len(record)), record, _CRC.pack(_masked_crc(record)))
        )
        out.write(b"".join(frames))
        num_examples += len(chunk)
    if packed:
        packed.close()
    return num_examples


def is_packed(name: str) -> bool:
    """Whether a file of this name is packed with gzip."""
    return name.endswith(_GZIP_SUFFIX)


def _unpacked(data: bytes) -> tuple[bytes, str]:
    """The readable bytes of a gzip file, and the reason if they are not all; else ""."""
    parts, unpacker = [], zlib.decompressobj(wbits=31)  # 31: gzip's header and checksum.
    try:
        for first in range(0, len(data), _UNPACK_BYTES):
            parts.append(unpacker.decompress(data[first : first + _UNPACK_BYTES]))
    except zlib.error as error:
        return b"".join(parts), f"the gzip stream is damaged from here on ({error})"
    reason = ""
    if not unpacker.eof:
        reason = "the gzip stream ends here, before its end"
    elif unpacker.unused_data:
        reason = f"{len(unpacker.unused_data)} bytes follow the end of the gzip stream"
    return b"".join(parts), reason


def unpacked(data: bytes, name: str) -> bytes:
    """The readable bytes of a file without its packing."""
    return _unpacked(data)[0] if is_packed(name) else data


def read_at(file: BinaryIO, offset: int) -> bytes:
    """The record whose frame begins at an offset of an unpacked file.

    Raises:
      ValueError: no whole frame begins there.
    """
    file.seek(offset)
    header = file.read(_FRAME.size)
    length = _length_at(header, 0)
    data = b"" if length is None else file.read(length + _CRC.size)
    end, fault = _look(header + data, 0)
    if fault or end != len(header + data):
        raise ValueError(fault or "a record runs past the end of the file")
    return data[: -_CRC.size]


def scan(data: bytes, name: str) -> Iterator[tuple[int, bytes] | Fault]:
    """All records of a TFRecord file, and every fault; every checksum is checked.

    After a fault the scan resumes at the next whole frame.

    Args:
      data: the bytes of the file.
      name: name of the file; packed with gzip if the name ends in .gz.

    Yields:
      (offset, record) or a Fault, in the order of their offsets.
    """
    data, reason = _unpacked(data) if is_packed(name) else (data, "")
    offset = 0
    while offset < len(data):
        end, fault = _look(data, offset)
        if not fault:
            yield offset, data[offset + _FRAME.size : end - _CRC.size]
            offset = end
            continue
        if reason and end > len(data):
            break  # Reported below.
        yield Fault(offset, fault)
        # If a frame begins at this frame's end, only its data is wrong; else search for a frame.
        is_next = end == len(data) or (end < len(data) and _length_at(data, end) is not None)
        offset = end if is_next else _find_frame(data, offset + 1)
    if reason:
        yield Fault(len(data), reason)


def _length_at(data: bytes, offset: int) -> int | None:
    """The length in a frame's header; None if its checksum is wrong."""
    if offset + _FRAME.size > len(data):
        return None
    length, _ = _FRAME.unpack_from(data, offset)
    return length if data[offset : offset + _FRAME.size] == _frame_header(length) else None


def _look(data: bytes, offset: int) -> tuple[int, str]:
    """The end of the frame at an offset, and its fault; "" if the frame is whole."""
    length = _length_at(data, offset)
    if length is None:
        left = len(data) - offset
        if left < _FRAME.size:
            return len(data) + 1, f"a record runs past the end of the file ({left} bytes are left)"
        return len(data) + 1, "the checksum of a record's length is wrong"
    end = offset + _FRAME.size + length + _CRC.size
    if end > len(data):
        return end, f"a record of {length} bytes runs past the end of the file ({len(data)} bytes)"
    record = data[offset + _FRAME.size : end - _CRC.size]
    if _masked_crc(record) != _CRC.unpack_from(data, end - _CRC.size)[0]:
        return end, f"the checksum of a record of {length} bytes is wrong"
    return end, ""


def _find_frame(data: bytes, start: int) -> int:
    """Offset of the first whole frame at or after `start`; the end of the data if none follows."""
    view = np.frombuffer(data, np.uint8)
    for first in range(start, len(data) - _FRAME.size, _SEARCH_BYTES):
        block = view[first : first + _SEARCH_BYTES + 7]
        words = np.lib.stride_tricks.sliding_window_view(block, 8)
        # Cheap checks rule out nearly all places before any checksum is computed.
        lengths = np.ascontiguousarray(words).view("<u8")[:, 0]
        room = len(data) - first - np.arange(len(lengths), dtype=np.int64) - _FRAME.size - _CRC.size
        fits = (lengths > 0) & (room > 0) & (lengths <= np.maximum(room, 0).astype(np.uint64))
        for place in np.flatnonzero(fits):
            if not _look(data, first + int(place))[1]:
                return first + int(place)
    return len(data)


def records(data: bytes, path: str) -> Iterator[bytes]:
    """The records in the bytes of a TFRecord file.

    Args:
      data: the bytes of the file.
      path: path of the file; packed with gzip if the path ends in .gz.

    Raises:
      StageError: the file has a fault.
    """
    for part in scan(data, path):
        if isinstance(part, Fault):
            raise StageError(
                f"{path}: at byte {part.offset} {part.reason}; make the data set again"
            )
        yield part[1]
