"""A stamp: a text that differs after a file has changed (size and time, or an object's version)."""

import base64
import hashlib
import os
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

from pipeline.storage import files, retries

# Keys that tell an object from its replacement, best first.
_VERSIONS = (
    *("generation", "etag", "ETag", "updated", "LastModified", "last_modified"),
    *("mtime", "modified", "created"),
)


def of_status(status: os.stat_result) -> str:
    """The stamp of a local file: its size and time; for a pipe or a device, its kind.

    The inode is no part of it: inodes of a mounted bucket differ between machines.
    """
    return files.irregular(status) or f"{status.st_size} {status.st_mtime_ns}"


def of_object(entry: Mapping[str, Any]) -> str:
    """The stamp of an object: size, version, and the MD5 if the store lists one.

    Args:
      entry: the object's entry of fsspec's file system.
    """
    versions = (entry[key] for key in _VERSIONS if entry.get(key) is not None)
    stamp = f"{entry.get('size')} {next(versions, '')}"
    return f"{stamp} md5:{entry['md5Hash']}" if entry.get("md5Hash") else stamp


def of_path(path: str) -> str:
    """The current stamp of a path or URL; "" if no file exists."""
    try:
        if files.is_url(path):
            return retries.call(path, lambda fs, inner: of_object(fs.info(inner)))
        return of_status(os.stat(path))
    except OSError:
        return ""


def of_paths(paths: Iterable[str]) -> dict[str, str]:
    """Path or URL -> current stamp, for the files that exist."""
    stamps = {path: of_path(path) for path in paths}
    return {path: stamp for path, stamp in stamps.items() if stamp}


def of_open(file: BinaryIO) -> str:
    """The stamp of a file opened by `files.open_read`."""
    raw = getattr(file, "raw", None)
    if isinstance(raw, retries.File):
        return of_object(raw.entry())
    return of_status(os.fstat(file.fileno()))


def num_bytes(stamp: str) -> int | None:
    """The size in a stamp; None if the stamp has none."""
    size = stamp.partition(" ")[0]
    return int(size) if size.isdecimal() else None


def may_be_of(data: bytes, stamp: str) -> bool:
    """Whether an object with this stamp can hold these bytes."""
    _, _, md5 = stamp.partition(" md5:")
    digest = hashlib.md5(data, usedforsecurity=False).digest() if md5 else b""
    return num_bytes(stamp) in (None, len(data)) and base64.b64encode(digest).decode() == md5
