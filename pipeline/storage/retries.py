"""The fsspec file system behind a URL, and retries of its calls.

A failed call is retried for a minute, with growing pauses. A call that fails for good raises a
StageError that names the URL. So callers see StageError and FileNotFoundError only.
"""

import io
import logging
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pipeline.cli import signed_urls
from pipeline.cli.errors import StageError

# How long one call is retried; gcsfs itself retries for half of this time.
_PATIENCE_SECS = 60.0
_SILENCE_SECS = 30.0
_FIRST_PAUSE_SECS, _LONGEST_PAUSE_SECS = 0.5, 8.0
# The first are answers, the second are final errors; gcsfs reports 403 as one of the second.
_ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
_FINAL = (PermissionError, ValueError, TypeError, NotImplementedError, ImportError)
_TRY_AGAIN = (408, 429)

_Result = TypeVar("_Result")


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path within it.

    Raises:
      StageError: nothing serves such URLs.
    """
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        # gcsfs asks for the bucket's kind over gRPC, which an emulator never answers.
        os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    import fsspec  # Slow, and commands over local files do not need fsspec.

    # Other processes write to the same directories, so a cached listing would be out of date.
    options: dict[str, Any] = {"use_listings_cache": False}
    if path.startswith(("gs://", "gcs://")):
        import aiohttp

        # A server that accepts a request and never answers has failed, too.
        timeout = aiohttp.ClientTimeout(sock_connect=_SILENCE_SECS, sock_read=_SILENCE_SECS)
        options["requests_timeout"] = timeout
        # gcsfs also raises the errors that it logs.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    full_url = signed_urls.full(path)
    if full_url != path and path.startswith("http"):
        options["encoded"] = True  # A signature is of the URL as it was given.
    try:
        fs, inner = fsspec.core.url_to_fs(full_url, **options)
    except (ValueError, ImportError) as error:
        raise StageError(
            f"{path}: no file system for this URL ({error}); use a local path, gs://, or "
            "another scheme that an installed fsspec package serves"
        ) from error
    return fs, inner


def call(path: str, work: Callable[[Any, str], _Result]) -> _Result:
    """Calls `work` with the file system and the inner path of a URL until it succeeds.

    Args:
      path: the URL.
      work: may be called several times; a failed call may have taken effect.

    Raises:
      FileNotFoundError, or another answer of the file system.
      StageError: the call failed for good, or for a minute.
    """
    fs, inner = file_system(path)
    is_signed = signed_urls.full(path) != path  # Then the file system's errors hold secrets.
    started, pause = time.monotonic(), _FIRST_PAUSE_SECS
    while True:
        try:
            return work(fs, inner)
        except (*_ANSWERS, StageError) as error:
            if is_signed and isinstance(error, _ANSWERS):
                raise type(error)(path) from None
            raise
        except Exception as error:  # Each file system has errors of its own.
            tried_secs = time.monotonic() - started
            if _is_final(error):
                raise StageError(
                    f"{path}: {_text(error)}; expected a URL that this account may read and "
                    "write: check the URL and the credentials (for gs://: gcloud auth "
                    "application-default login)"
                ) from (None if is_signed else error)
            if tried_secs + pause > _PATIENCE_SECS:
                raise StageError(
                    f"{path}: the storage has failed for {tried_secs:.0f} s: {_text(error)}; run "
                    "the same command again when the storage answers; completed files are kept"
                ) from (None if is_signed else error)
        # Pauses differ between processes, so that workers do not retry all at once.
        time.sleep(pause * (1 + os.getpid() % 100 / 100))
        pause = min(2 * pause, _LONGEST_PAUSE_SECS)


def _is_final(error: Exception) -> bool:
    """Whether a retry is useless."""
    code = str(getattr(error, "code", None))
    if code.isdigit():
        return 400 <= int(code) < 500 and int(code) not in _TRY_AGAIN
    return isinstance(error, _FINAL) or str(error).startswith("Forbidden")


def _text(error: Exception) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


class File(io.RawIOBase):
    """A file of a URL open for reading; reading resumes where it failed."""

    def __init__(self, path: str):
        """Opens the file; raises FileNotFoundError."""
        self._path, self._offset = path, 0
        self._file = call(path, lambda fs, inner: fs.open(inner, "rb"))
        self._is_seekable: bool = self._file.seekable()
        self._size: int | None = getattr(self._file, "size", None)

    def entry(self) -> dict[str, Any]:
        """The file system's entry of the opened object."""
        details: dict[str, Any] | None = getattr(self._file, "details", None)
        if self._path.startswith("http"):  # An open file has no ETag there.
            details = None
        return details or call(self._path, lambda fs, inner: dict(fs.info(inner)))

    def readable(self) -> bool:
        """True."""
        return True

    def seekable(self) -> bool:
        """Whether the file system can seek."""
        return self._is_seekable

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves to a byte offset; reads nothing."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._offset, io.SEEK_END: self._size}[whence]
        if base is None:
            raise io.UnsupportedOperation(f"{self._path}: its file system does not tell its size")
        self._offset = base + offset
        return self._offset

    def tell(self) -> int:
        """Offset of the next byte."""
        return self._offset

    def readinto(self, buffer: Any) -> int:
        """Reads at most `len(buffer)` bytes."""
        data = call(self._path, lambda fs, inner: self._read(fs, inner, len(buffer)))
        buffer[: len(data)] = data
        self._offset += len(data)
        return len(data)

    def _read(self, fs: Any, inner: str, num_bytes: int) -> bytes:
        try:
            if self._file is None:
                self._file = fs.open(inner, "rb")
            if self._file.tell() != self._offset:
                self._file.seek(self._offset)
            data: bytes = self._file.read(num_bytes)
            return data
        except Exception:
            self._file = None
            raise

    def close(self) -> None:
        """Closes the file."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()
