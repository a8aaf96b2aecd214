"""Whole directories: listed with all that is below them, and published."""

import atexit
import heapq
import os
import shutil
import tempfile
from typing import Any, NamedTuple

from pipeline.storage import files, retries, stamps


class Tree(NamedTuple):
    """What is below a directory."""

    stamps: dict[str, str]  # Path of each file, relative and with slashes -> stamp; sorted.
    passed_over: list[str]  # Links to directories whose files stand under another path.


def read_tree(directory: str) -> Tree:
    """Lists all files below `directory` with their stamps (stamps.py).

    What begins with a dot is left out, and so is a volume's own. Links to directories are followed,
    but each directory is listed once: under its own path if that leads to it, else under the
    first link by path.

    Raises:
      FileNotFoundError: no such local directory.
      StageError: an object has a name that leads out of `directory`.
    """
    if files.is_url(directory):
        found = {
            files.check_object(directory, name): stamp
            for name, stamp in retries.call(directory, _stamps_of_objects).items()
            if name[-1:] not in ("", "/")  # A console's "create folder" makes such objects.
        }
        visible = [path for path in found if not any(map(_is_left_out, path.split("/")))]
        return Tree({path: found[path] for path in sorted(visible)}, [])
    return _read_local_tree(directory)


def _is_left_out(name: str) -> bool:
    return name.startswith(".") or files.is_of_volume(name)


def _stamps_of_objects(fs: Any, inner: str) -> dict[str, str]:
    inner = inner.rstrip("/")
    found = fs.find(inner, detail=True)
    return {path[len(inner) + 1 :]: stamps.of_object(entry) for path, entry in found.items()}


def _read_local_tree(directory: str) -> Tree:
    found: dict[str, str] = {}  # Path -> stamp.
    listed: set[str] = set()  # Real paths.
    passed_over: list[str] = []
    links = [""]  # A heap of those to follow; first the directory itself.
    while links:
        top = heapq.heappop(links)
        real_top = os.path.realpath(os.path.join(directory, top))
        if real_top in listed:
            passed_over.append(top)
            continue
        below = [(f"{top}/" if top else "", real_top)]
        while below:
            prefix, real = below.pop()
            if real in listed:  # Below a link, and reached by an earlier one.
                passed_over.append(prefix.rstrip("/"))
                continue
            listed.add(real)
            try:
                entries = os.scandir(real)
            except (FileNotFoundError, NotADirectoryError):
                if not prefix:
                    raise
                continue  # Removed just now.
            with entries:
                for entry in entries:
                    path = prefix + entry.name
                    if _is_left_out(entry.name):
                        continue
                    if not _is_dir(entry):
                        # No pipes and no devices, unless by a link, whose name is that of a file.
                        if entry.is_symlink() or entry.is_file():
                            found[path] = _stamp(entry)
                    elif entry.is_symlink():
                        heapq.heappush(links, path)
                    else:
                        below.append((f"{path}/", os.path.join(real, entry.name)))
    return Tree(dict(sorted(found.items())), sorted(passed_over))


def _is_dir(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _stamp(entry: os.DirEntry) -> str:
    try:
        return stamps.of_status(entry.stat())
    except OSError:  # A link to nowhere.
        return ""


def scratch_directory() -> str:
    """A new local directory that goes when the process ends."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def publish_tree(local_directory: str, directory: str) -> None:
    """Copies every file below `local_directory` to the same place below `directory`."""
    for root, _, names in sorted(os.walk(local_directory)):
        below = os.path.relpath(root, local_directory)
        target = directory if below == "." else files.join(directory, *below.split(os.sep))
        files.make_dirs(target)
        for name in sorted(names):
            with open(os.path.join(root, name), "rb") as source:
                with files.publishing(files.join(target, name)) as file:
                    shutil.copyfileobj(source, file)
