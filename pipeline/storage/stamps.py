"""What a change of a file shows by, as one text: that of a file is not the same after a change."""

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from pipeline.storage import files, retries

# By which of these a file system tells an object from the one that replaced it, best first.
_VERSIONS = (
    *("generation", "etag", "ETag", "updated", "LastModified", "last_modified"),
    *("mtime", "modified", "created"),
)


def of_status(status: os.stat_result) -> str:
    """The stamp of a local file: its size and time; of a pipe or a device, its kind.

    No inode: those of a bucket that is mounted as a directory differ from machine to machine.
    """
    return files.irregular(status) or f"{status.st_size} {status.st_mtime_ns}"


def of_object(entry: Mapping[str, Any]) -> str:
    """The stamp of an object: size, version, and MD5 where the store lists that.

    Args:
      entry: what fsspec's file system says of the object.
    """
    versions = (entry[key] for key in _VERSIONS if entry.get(key) is not None)
    stamp = f"{entry.get('size')} {next(versions, '')}"
    return f"{stamp} md5:{entry['md5Hash']}" if entry.get("md5Hash") else stamp


def of_path(path: str) -> str:
    """The stamp of the file that is at a path or URL now; "" if there is none."""
    try:
        if files.is_url(path):
            return retries.call(path, lambda fs, inner: of_object(fs.info(inner)))
        return of_status(os.stat(path))
    except OSError:
        return ""


def of_paths(paths: Iterable[str]) -> dict[str, str]:
    """Path or URL -> stamp of the files that are there now."""
    found = {path: of_path(path) for path in paths}
    return {path: stamp for path, stamp in found.items() if stamp}


def of_open(file: BinaryIO) -> str:
    """The stamp of a file that `files.open_read` has opened."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, retries.File):
        return of_object(raw.entry())
    return of_status(os.fstat(file.fileno()))


def num_bytes(stamp: str) -> int | None:
    """The size that a stamp says; None where it says none."""
    size = stamp.partition(" ")[0]
    return int(size) if size.isdecimal() else None


def may_be_of(data: bytes, stamp: str) -> bool:
    """Whether an object of this stamp may hold these bytes."""
    _, _, md5 = stamp.partition(" md5:")
    digest = hashlib.md5(data, usedforsecurity=False).digest() if md5 else b""
    return num_bytes(stamp) in (None, len(data)) and base64.b64encode(digest).decode() == md5
