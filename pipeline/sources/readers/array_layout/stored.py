"""Arrays in files of which only the header has been read, and NumPy's header."""

import io
import math
import tempfile
import tokenize
import warnings
from typing import BinaryIO

import numpy as np

from pipeline.cli.errors import StageError
from pipeline.sources.local_file import OpenFile
from pipeline.sources.readers.arrays import FileRows

# Bytes of an array that are rearranged at a time.
_TURN_BYTES = 1 << 26


class StoredArray:
    """An array in a file, with only the header read."""

    def __init__(
        self, where: str, shape: tuple[int, ...], dtype: np.dtype, *, is_fortran: bool = False
    ):
        """Reads nothing.

        Args:
          where: the array's name in messages.
          shape: the array's shape.
          dtype: the array's dtype.
          is_fortran: whether the first axis varies fastest in the file.
        """
        self.where, self.shape, self.dtype, self._is_fortran = where, shape, dtype, is_fortran

    @property
    def about(self) -> str:
        """The dtype and the shape, for messages."""
        return f"{self.dtype.newbyteorder('=')} {self.shape}"

    def __str__(self) -> str:
        return f"{self.where}: {self.about}"

    def open(self) -> tuple[OpenFile, int]:
        """A file that holds the array uncompressed, and the byte at which the array begins."""
        raise NotImplementedError

    def rows(self, axes: str) -> tuple[FileRows, str]:
        """The array in a file, with the axis first that counts the images.

        Args:
          axes: a letter for each axis; the first or the last one is N, which counts the images.

        Returns:
          The array; its further axes may have another order.
          A letter for each of its axes.
        """
        file, offset = self.open()
        shape = self.shape
        if self._is_fortran:
            shape, axes = shape[::-1], axes[::-1]
        if axes[0] != "N":
            file, offset = _turned(file, offset, shape, self.dtype), 0
            shape, axes = (shape[-1], *shape[:-1]), axes[-1] + axes[:-1]
        return FileRows(file, offset, shape, self.dtype), axes

    def check_size(self, num_bytes: int) -> None:
        """Raises a StageError unless `num_bytes` bytes hold exactly the array."""
        if (
            min(self.shape, default=0) < 0
            or num_bytes != math.prod(self.shape) * self.dtype.itemsize
        ):
            raise StageError(
                f"{self.where}: its header states {self.about}, but it holds "
                f"{num_bytes} bytes; save it again"
            )

    def check_numbers(self) -> None:
        """Raises a StageError if the array holds objects, which only a program can read."""
        if self.dtype.hasobject:
            raise StageError(
                f"{self.where} holds Python objects, which are never unpickled; expected numbers: "
                "save the array with a numeric dtype"
            )


def _turned(file: OpenFile, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> OpenFile:
    """A copy of an array in a file, whose last axis becomes the first."""
    *rest, count = shape
    num_cells, size = math.prod(rest), dtype.itemsize
    copy = tempfile.TemporaryFile()
    # Reads or writes are of long runs, whether there are many images or large ones.
    if num_cells <= count:
        step = max(1, _TURN_BYTES // (num_cells * size))
        for first in range(0, count, step):
            width = min(step, count - first)
            starts = range(offset + first * size, offset + num_cells * count * size, count * size)
            data = file.read_each(list(starts), width * size)
            copy.write(np.ascontiguousarray(np.frombuffer(data, dtype).reshape(num_cells, width).T))
    else:
        step = max(1, _TURN_BYTES // (count * size))
        for first in range(0, num_cells, step):
            last = min(first + step, num_cells)
            data = file.read(offset + first * count * size, offset + last * count * size)
            images = np.ascontiguousarray(np.frombuffer(data, dtype).reshape(-1, count).T)
            for number, image in enumerate(images):
                copy.seek((number * num_cells + first) * size)
                copy.write(image)
    copy.flush()
    return OpenFile(copy, file.path)


def read_npy_header(head: bytes, where: str) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Reads the header of an .npy file.

    Args:
      head: the beginning of the file, at least as long as its header.
      where: the array's name in messages.

    Returns:
      shape, whether the order is Fortran's, dtype, and the byte at which the array begins.

    Raises:
      StageError: not an array.
    """
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    file: BinaryIO = io.BytesIO(head)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Headers of Python 2 are read as any other.
            header = readers[np.lib.format.read_magic(file)](file)
    except (ValueError, KeyError, TypeError, SyntaxError, tokenize.TokenError) as error:
        raise StageError(
            f"{where}: not a NumPy array ({error}); save it with numpy.savez or numpy.save"
        ) from error
    return *header, file.tell()
