"""Whole directories: listed with all that is below them, fetched, and published."""

import atexit
import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

from pipeline import remote, storage


def list_tree(directory: str) -> list[str]:
    """Sorted paths of all files below `directory`, relative to it, with slashes.

    What begins with a dot is left out, and so is a volume's own. Links to directories are
    followed, except to one that the link lies in.
    """
    if storage.is_url(directory):
        found = remote.call(directory, _files_of_objects)
        return sorted(p for p in found if not any(map(_is_left_out, p.split("/"))))
    return sorted(_files_below(directory, "", ()))


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or storage.is_of_volume(name)


def _files_of_objects(fs: Any, inner: str) -> list[str]:
    inner = inner.rstrip("/")
    return [path[len(inner) + 1 :] for path in fs.find(inner) if path.rstrip("/") != inner]


def _files_below(directory: str, prefix: str, above: tuple[str, ...]) -> Iterator[str]:
    """Local files below `directory`, with `prefix` before them; `above` are the real paths."""
    above = (*above, os.path.realpath(directory))
    with os.scandir(directory) as entries:
        for entry in entries:
            if _is_left_out(entry.name):
                continue
            if not entry.is_dir():
                if entry.is_file() or entry.is_symlink():  # No pipes and no devices.
                    yield prefix + entry.name
            elif os.path.realpath(entry.path) not in above:
                yield from _files_below(entry.path, f"{prefix}{entry.name}/", above)


@contextlib.contextmanager
def local_copy(path: str) -> Iterator[str]:
    """A local path with the contents of the file or directory at `path`.

    A local path is given back as it is; a URL is fetched into a scratch
    directory that goes when the block ends.
    """
    if not storage.is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory() as scratch:
        target = os.path.join(scratch, os.path.basename(path.rstrip("/")))
        remote.call(path, lambda fs, inner: _fetch(fs, inner, target))
        yield target


def _fetch(fs: Any, inner: str, target: str) -> None:
    if not fs.isdir(inner):
        fs.get_file(inner, target)
        return
    # One file at a time: `get` of a tree names its target differently
    # when the target exists, which differs between file systems.
    for name in _files_of_objects(fs, inner):
        file = os.path.join(target, name)
        os.makedirs(os.path.dirname(file), exist_ok=True)
        fs.get_file(f"{inner.rstrip('/')}/{name}", file)


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
