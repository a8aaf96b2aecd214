"""What the files of a folder hold: the digest and the header of each."""

import collections
import json
from typing import TYPE_CHECKING

import numpy as np

from pipeline.sources.image_file import Header
from pipeline.sources.memory import Memory
from pipeline.sources.readers.folder_tree.places import printable

if TYPE_CHECKING:
    import pyarrow as pa

_DIGEST_BYTES = 32
# Image shapes that a note names.
_MAX_SHAPES = 5


class Contents:
    """Digests and headers of n files, in 37 bytes a file: many headers are equal."""

    def __init__(self, num_files: int):
        """Knows nothing yet."""
        self._digests = np.zeros((num_files, _DIGEST_BYTES), np.uint8)
        self._is_read = np.zeros(num_files, bool)
        self._numbers = np.zeros(num_files, np.int32)  # Of the header of each file.
        self._headers: dict[Header | str, int] = {}

    def add(self, place: int, digest: bytes, header: Header | str) -> None:
        """Keeps what was found in a file.

        Args:
          place: the place of the file.
          digest: 32 bytes; b"" if the file could not be read.
          header: the header, or the reason why the image is not read.
        """
        if digest:
            self._digests[place] = np.frombuffer(digest, np.uint8)
            self._is_read[place] = True
        self._numbers[place] = self._number_of(header)

    def _number_of(self, header: Header | str) -> int:
        return self._headers.setdefault(header, len(self._headers))

    def recall(self, memory: Memory, rows: np.ndarray) -> None:
        """Takes what a memory holds.

        Args:
          memory: with the columns of `columns`.
          rows: int64 (n,), see Memory.rows_of; negative for files that are not taken.
        """
        places = np.flatnonzero(rows >= 0)
        digests, headers = memory.take(rows[places], ["digest", "header"]).values()
        numbers = {text: self._number_of(_header_in(text)) for text in dict.fromkeys(headers)}
        self._digests[places] = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)
        self._is_read[places] = True
        self._numbers[places] = [numbers[text] for text in headers]

    def columns(self) -> "tuple[dict[str, pa.Array], np.ndarray]":
        """Columns of a memory, and whether each file was read, bool (n,)."""
        import pyarrow as pa

        texts = pa.array([json.dumps(header) for header in self._headers], pa.string())
        digests = pa.py_buffer(self._digests.tobytes())
        columns = {
            "digest": pa.Array.from_buffers(
                pa.binary(_DIGEST_BYTES), len(self._numbers), [None, digests]
            ),
            "header": pa.DictionaryArray.from_arrays(self._numbers, texts),
        }
        return columns, self._is_read

    def digest_of(self, place: int) -> bytes:
        """The digest as it was added."""
        return self._digests[place].tobytes() if self._is_read[place] else b""

    def first_refused(self) -> tuple[int, str] | None:
        """The place of the first file whose image is not read, and the reason."""
        is_refused = np.array([isinstance(header, str) for header in self._headers])
        places = np.flatnonzero(is_refused[self._numbers])
        if not len(places):
            return None
        return int(places[0]), list(self._headers)[self._numbers[places[0]]]

    def shapes(self) -> list[tuple[tuple[int, int, int], int]]:
        """Each shape and the number of its images, the most frequent and then largest first."""
        counts = collections.Counter[tuple[int, int, int]]()
        for header, number in self._counts():
            if isinstance(header, Header):
                counts[header.shape] += number
        return sorted(counts.items(), key=lambda item: item[::-1], reverse=True)

    def _counts(self) -> list[tuple[Header | str, int]]:
        counts = np.bincount(self._numbers, minlength=len(self._headers)).tolist()
        return list(zip(self._headers, counts, strict=True))

    def notes(self, paths: list[str]) -> list[str]:
        """What is said of the files.

        Args:
          paths: of all n files.
        """
        notes, shapes, counts = [], self.shapes(), self._counts()
        if len(shapes) > 1:
            shown = [f"{'×'.join(map(str, shape))} ({n:,})" for shape, n in shapes[:_MAX_SHAPES]]
            if len(shapes) > _MAX_SHAPES:
                shown.append(f"and {len(shapes) - _MAX_SHAPES:,} other shapes")
            notes.append(f"images are {', '.join(shown)}")
        if refused := self.first_refused():
            place, reason = refused
            num_refused = sum(n for header, n in counts if isinstance(header, str))
            notes.append(
                f"images that go to quarantine by their headers: {num_refused:,}, such as "
                f"{printable(f'{paths[place]}: {reason}')}"
            )
        headers = [(header, n) for header, n in counts if isinstance(header, Header)]
        if num_of_16_bits := sum(n for header, n in headers if header.is_of_16_bits):
            notes.append(
                f"{num_of_16_bits:,} images of 16 bits are scaled to 8 bits: 65535 becomes 255"
            )
        if num_animated := sum(n for header, n in headers if header.num_frames > 1):
            num_left_out = sum(n * (header.num_frames - 1) for header, n in headers)
            notes.append(
                f"{num_animated:,} files hold more than one frame; the first is read, and "
                f"{num_left_out:,} are left out"
            )
        return notes


def _header_in(text: str) -> Header | str:
    """The header in a column of a memory."""
    value = json.loads(text)
    return value if isinstance(value, str) else Header(tuple(value[0]), *value[1:])
