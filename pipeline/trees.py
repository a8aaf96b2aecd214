"""Whole directories: listed with all that is below them, and published."""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from pipeline import remote, storage


def list_tree(directory: str) -> list[str]:
    """Sorted paths of all files below `directory`, relative to it, with slashes.

    What begins with a dot is left out. Links to directories are followed, except to one
    that the link lies in.

    Raises:
      StageError: an object has a name that leads out of `directory`.
    """
    if storage.is_url(directory):
        found = [
            storage.check_object(directory, name)
            for name in remote.call(directory, _names_below)
            if name[-1:] not in ("", "/")  # A console's "create folder" makes such objects.
        ]
        return sorted(p for p in found if not any(part.startswith(".") for part in p.split("/")))
    return sorted(_files_below(directory, "", ()))


def _names_below(fs: Any, inner: str) -> list[str]:
    inner = inner.rstrip("/")
    return [path[len(inner) + 1 :] for path in fs.find(inner)]


def _files_below(directory: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Local files below `directory`, with `prefix` before them; `above` are the real paths."""
    above = (*above, os.path.realpath(directory))
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if not entry.is_dir():
                if entry.is_file() or entry.is_symlink():  # No pipes and no devices.
                    yield prefix + entry.name
            elif os.path.realpath(entry.path) not in above:
                yield from _files_below(entry.path, f"{prefix}{entry.name}/", above)


def scratch_directory() -> str:
    """A new local directory that goes when the process ends."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def publish_tree(local_directory: str, directory: str) -> None:
    """Copies every file below `local_directory` to the same place below `directory`."""
    for root, _, names in sorted(os.walk(local_directory)):
        below = os.path.relpath(root, local_directory)
        target = directory if below == "." else storage.join(directory, *below.split(os.sep))
        storage.make_dirs(target)
        for name in sorted(names):
            with open(os.path.join(root, name), "rb") as source:
                with storage.publishing(storage.join(target, name)) as file:
                    shutil.copyfileobj(source, file)
