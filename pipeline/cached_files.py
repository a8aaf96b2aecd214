"""Files of a stage kept on the local disk: a job that starts again does not fetch them again."""

from collections.abc import Mapping
from typing import Any

from pipeline import stage, storage
from pipeline.errors import StageError, UsageError


def check(cache_dir: str | None) -> None:
    """Raises a UsageError for a directory that is no local one."""
    if cache_dir and storage.is_url(cache_dir):
        raise UsageError(
            f"--cache_dir={cache_dir}: is a URL; expected a directory of this machine, where what "
            "was fetched from one is kept"
        )


def read_file(directory: str, entry: Mapping[str, Any], cache_dir: str | None) -> bytes:
    """As `stage.read_file`, but a file of a URL is fetched only once.

    Args:
      directory: the stage's; local path or fsspec URL.
      entry: the file's, of the manifest.
      cache_dir: local directory that keeps what is fetched, each file under its sha256, so that
        it can serve any data sets and processes; nothing is ever removed from it. None for none.

    Raises:
      StageError: the file is missing, or its bytes are not the manifest's.
    """
    if not cache_dir or not storage.is_url(directory):
        return stage.read_file(directory, entry)
    try:
        return stage.read_file(cache_dir, {**entry, "name": entry["sha256"]})
    except StageError:
        pass  # Not there, or damaged.
    data = stage.read_file(directory, entry)
    storage.make_dirs(cache_dir)
    storage.write_bytes(storage.join(cache_dir, entry["sha256"]), data)
    return data
