"""A file that a source reads from at any place, on the local disk and as it was when opened."""

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
# Bytes at the head of a packed file by which its format says how long the whole is.
HEAD_BYTES = 16
# Deflate makes no more of a byte (https://zlib.net/zlib_tech.html).
_MAX_RATIO = 1_032


class OpenFile:
    """An open local file, which is to stay as it is."""

    def __init__(self, file: BinaryIO, path: str):
        """Takes the file, flushed, and the path or URL of what it holds."""
        self.path, self._file = path, file
        status = os.fstat(file.fileno())
        self.num_bytes, self._held = status.st_size, stamps.of_status(status)

    def read(self, first: int, last: int) -> bytes:
        """The bytes first to last − 1.

        Raises:
          SourceChanged: they are not those of the file that was opened.
        """
        data = os.pread(self._file.fileno(), last - first, first)
        self.check_unchanged()
        return data

    def read_each(self, firsts: list[int], num_bytes: int) -> bytes:
        """So many bytes from each place, in a row; raises as `read`."""
        fd = self._file.fileno()
        data = b"".join([os.pread(fd, num_bytes, first) for first in firsts])
        self.check_unchanged()
        return data

    def blocks(self, num_bytes: int) -> Iterator[bytes]:
        """The whole file in blocks of so many bytes; raises as `read`."""
        for first in range(0, self.num_bytes, num_bytes):
            yield self.read(first, min(first + num_bytes, self.num_bytes))

    def check_unchanged(self) -> None:
        """Raises SourceChanged if the file is not as it was when it was opened."""
        if stamps.of_status(os.fstat(self._file.fileno())) != self._held:
            raise source.changed(self.path)


class LocalFile(OpenFile):
    """A file opened by its path; what is packed or far away is first copied to an unnamed one."""

    def __init__(self, path: str, *, promised: Callable[[bytes], int] | None = None):
        """Opens the file.

        Args:
          path: local path or URL; unpacked if it ends in .gz.
          promised: the first HEAD_BYTES of what is packed -> bytes of the whole, or a StageError;
            no more than that is unpacked. None where the format promises nothing.

        Raises:
          StageError: no such file, no regular one, no whole gzip file, or not of the size promised.
          SourceChanged: the file changed while it was copied.
        """
        self.path, self._promised = path, promised
        is_copied = path.endswith(".gz") or files.is_url(path)
        try:
            file = files.open_read(path)
            self.stamp = stamps.of_open(file)
            if is_copied:
                with file:
                    copy = self._copied(file)
                if stamps.of_path(path) != self.stamp:
                    raise source.changed(path)
                file = copy
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise self._not_whole(str(error)) from error
        except (FileNotFoundError, IsADirectoryError) as error:
            raise StageError(f"{path}: no such file; expected one to read images from") from error
        super().__init__(file, path)
        if not is_copied:
            self._held = self.stamp

    def _not_whole(self, why: str) -> StageError:
        return StageError(f"{self.path}: not a whole gzip file ({why}); fetch or copy it again")

    def _copied(self, file: BinaryIO) -> BinaryIO:
        plain = tempfile.TemporaryFile()
        if not self.path.endswith(".gz"):
            shutil.copyfileobj(file, plain, _COPY_BYTES)
        else:
            num_packed = file.seek(0, os.SEEK_END)
            file.seek(max(0, num_packed - 4))
            end = int.from_bytes(file.read(4), "little")
            file.seek(0)
            with gzip.open(file) as packed:
                if self._promised:
                    self._unpack_promised(packed, plain, end=end, num_packed=num_packed)
                else:
                    shutil.copyfileobj(packed, plain, _COPY_BYTES)
        plain.flush()
        return plain

    def _unpack_promised(
        self, packed: BinaryIO, plain: BinaryIO, *, end: int, num_packed: int
    ) -> None:
        """Unpacks as much as the head promises, and a byte more if there is one.

        Args:
          packed: the gzip file.
          plain: where its contents go.
          end: what its last four bytes say: the size of its last member, modulo 2**32.
          num_packed: its size as it is.
        """
        head = packed.read(HEAD_BYTES)
        num_bytes = self._promised(head)
        if num_bytes > _MAX_RATIO * num_packed:
            raise self._not_whole(
                f"its header promises {num_bytes} bytes, and {num_packed} hold no more than "
                f"{_MAX_RATIO * num_packed}"
            )
        # Files of several members are packed by programs that do so side by side: the last one
        # may hold less.
        if end > num_bytes:
            raise self._not_whole(f"its header promises {num_bytes} bytes, its end {end}")
        plain.write(head)
        left = num_bytes + 1 - len(head)
        while left > 0 and (block := packed.read(min(left, _COPY_BYTES))):
            plain.write(block)
            left -= len(block)
