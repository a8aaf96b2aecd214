"""Files of a stage kept on the local disk: a job that starts again does not fetch them again."""

from collections.abc import Callable, Mapping
from typing import Any

from pipeline.cli.errors import StageError, UsageError
from pipeline.storage import files


def check(cache_dir: str | None) -> None:
    """Raises a UsageError if the directory is a URL."""
    if cache_dir and files.is_url(cache_dir):
        raise UsageError(
            f"--cache_dir={cache_dir}: is a URL; expected a local directory for fetched files"
        )


def read_file(
    read: Callable[[str, Mapping[str, Any]], bytes],
    directory: str,
    entry: Mapping[str, Any],
    cache_dir: str | None,
) -> bytes:
    """As `read`, but fetches each file of a URL only once.

    Args:
      read: takes a directory and an entry; gives bytes that have the entry's sha256, or
        raises a StageError.
      directory: the stage's; local path or fsspec URL.
      entry: the file's, of the manifest.
      cache_dir: local directory that keeps fetched files under their sha256, for any data sets
        and processes; nothing is ever removed from it. None: no cache.

    Raises:
      StageError: the file is missing, or its bytes are not the manifest's.
    """
    if not cache_dir or not files.is_url(directory):
        return read(directory, entry)
    try:
        return read(cache_dir, {**entry, "name": entry["sha256"]})
    except StageError:
        pass  # Not in the cache, or damaged.
    data = read(directory, entry)
    files.make_dirs(cache_dir)
    files.write_bytes(files.join(cache_dir, entry["sha256"]), data)
    return data
