"""Local files with random access, which detect a change since they were opened."""

import gzip
import os
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO

from pipeline.cli.errors import StageError
from pipeline.sources import source
from pipeline.storage import files, stamps

_COPY_BYTES = 1 << 20
# Bytes at the head of an uncompressed file from which its format knows the total size; the longest
# header is NumPy's.
HEAD_BYTES = 1 << 16
# The first bytes of a gzip file (RFC 1952, section 2.3.1), whatever its name.
_GZIP_MAGIC = b"\x1f\x8b"
# Deflate's largest compression ratio (https://zlib.net/zlib_tech.html).
_MAX_RATIO = 1_032


class OpenFile:
    """An open local file that must not change."""

    def __init__(self, file: BinaryIO, path: str):
        """`file` is flushed; `path` is the path or URL that messages name."""
        self.path, self._file = path, file
        status = os.fstat(file.fileno())
        self.num_bytes, self._open_stamp = status.st_size, stamps.of_status(status)

    def read(self, first: int, last: int) -> bytes:
        """The bytes first to last − 1.

        Raises:
          SourceChanged: the file has changed since it was opened.
        """
        data = os.pread(self._file.fileno(), last - first, first)
        self.check_unchanged()
        return data

    def read_each(self, firsts: list[int], num_bytes: int) -> bytes:
        """`num_bytes` bytes from each offset, joined; raises as `read`."""
        fd = self._file.fileno()
        data = b"".join([os.pread(fd, num_bytes, first) for first in firsts])
        self.check_unchanged()
        return data

    def blocks(self, num_bytes: int) -> Iterator[bytes]:
        """The file in blocks of `num_bytes` bytes; raises as `read`."""
        for first in range(0, self.num_bytes, num_bytes):
            yield self.read(first, min(first + num_bytes, self.num_bytes))

    def check_unchanged(self) -> None:
        """Raises SourceChanged if the file has changed since it was opened."""
        if stamps.of_status(os.fstat(self._file.fileno())) != self._open_stamp:
            raise source.changed(self.path)


class LocalFile(OpenFile):
    """A file opened by its path; a gzip file or a URL is first copied to an unnamed local file."""

    def __init__(self, path: str, *, expected_size: Callable[[bytes], int] | None = None):
        """Opens the file.

        Args:
          path: local path or URL; decompressed if its first bytes are those of gzip.
          expected_size: the first HEAD_BYTES of the decompressed file -> its total size in bytes,
            or a StageError; no more than that is decompressed. None if the format states no size.

        Raises:
          StageError: no such file, not a regular file, a damaged gzip file, or of another size
            than its header states.
          SourceChanged: the file changed while it was copied.
        """
        self.path, self._expected_size = path, expected_size
        try:
            file = files.open_read(path)
            self.stamp = stamps.of_open(file)
            self.is_gzip = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        except (FileNotFoundError, IsADirectoryError) as error:
            raise StageError(
                f"{path}: no such file; expected a file of images: mend the path in --source"
            ) from error
        file.seek(0)
        is_copied = self.is_gzip or files.is_url(path)
        if is_copied:
            try:
                with file:
                    copy = self._copy(file)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise self._damaged_gzip(str(error)) from error
            if stamps.of_path(path) != self.stamp:
                raise source.changed(path)
            file = copy
        super().__init__(file, path)
        if not is_copied:
            self._open_stamp = self.stamp

    def _damaged_gzip(self, reason: str) -> StageError:
        return StageError(
            f"{self.path}: not a complete gzip file ({reason}); download or copy it again"
        )

    def _copy(self, file: BinaryIO) -> BinaryIO:
        """An unnamed local copy, decompressed."""
        copy = tempfile.TemporaryFile()
        if not self.is_gzip:
            shutil.copyfileobj(file, copy, _COPY_BYTES)
        else:
            num_compressed = file.seek(0, os.SEEK_END)
            file.seek(max(0, num_compressed - 4))
            last_size = int.from_bytes(file.read(4), "little")
            file.seek(0)
            with gzip.open(file) as gzip_file:
                if self._expected_size:
                    self._decompress(
                        gzip_file, copy, last_size=last_size, num_compressed=num_compressed
                    )
                else:
                    shutil.copyfileobj(gzip_file, copy, _COPY_BYTES)
        copy.flush()
        return copy

    def _decompress(
        self, gzip_file: BinaryIO, copy: BinaryIO, *, last_size: int, num_compressed: int
    ) -> None:
        """Decompresses the expected size, and one byte more to detect a longer file.

        Args:
          gzip_file: decompresses on read.
          copy: the output.
          last_size: the file's last four bytes: the size of its last gzip member, modulo 2**32.
          num_compressed: the compressed size in bytes.
        """
        head = gzip_file.read(HEAD_BYTES)
        num_bytes = self._expected_size(head)
        if num_bytes > _MAX_RATIO * num_compressed:
            raise self._damaged_gzip(
                f"its header states {num_bytes} bytes, but {num_compressed} compressed bytes hold "
                f"at most {_MAX_RATIO * num_compressed}"
            )
        # Parallel gzip programs write several members, so the last one may hold less.
        if last_size > num_bytes:
            raise self._damaged_gzip(f"its header states {num_bytes} bytes, its end {last_size}")
        head = head[: num_bytes + 1]
        copy.write(head)
        num_left = num_bytes + 1 - len(head)
        while num_left > 0 and (block := gzip_file.read(min(num_left, _COPY_BYTES))):
            copy.write(block)
            num_left -= len(block)
