"""Directory trees: listed with all files below, and copied."""

import atexit
import heapq
import os
import shutil
import tempfile
from typing import Any, NamedTuple

from pipeline.storage import files, retries, stamps


class Tree(NamedTuple):
    """All files below a directory."""

    stamps: dict[str, str]  # Relative path with slashes -> stamp; sorted by path.
    skipped_links: list[str]  # Links to directories that are listed under another path.


def read_tree(directory: str, *, hidden: bool = False) -> Tree:
    """Lists all files below `directory` with their stamps (stamps.py).

    Volume files are left out, and hidden files unless `hidden` is set. Links to directories are
    followed, but each directory is listed once: under its own path if that lies below `directory`,
    else under the link whose path sorts first.

    Raises:
      FileNotFoundError: no such local directory.
      StageError: an object has a name that leads out of `directory`.
    """
    if files.is_url(directory):
        stamp_by_path = {
            files.check_object(directory, name): stamp
            for name, stamp in retries.call(directory, _object_stamps).items()
            if name[-1:] not in ("", "/")  # "Create folder" in a console makes such objects.
        }
        visible = [
            path
            for path in stamp_by_path
            if not any(_is_left_out(name, hidden) for name in path.split("/"))
        ]
        return Tree({path: stamp_by_path[path] for path in sorted(visible)}, [])
    return _read_local_tree(directory, hidden)


def _is_left_out(name: str, hidden: bool) -> bool:
    return files.is_volume_file(name) or (name.startswith(".") and not hidden)


def _object_stamps(fs: Any, inner: str) -> dict[str, str]:
    inner = inner.rstrip("/")
    entries = fs.find(inner, detail=True)
    return {path[len(inner) + 1 :]: stamps.of_object(entry) for path, entry in entries.items()}


def _read_local_tree(directory: str, hidden: bool) -> Tree:
    stamp_by_path: dict[str, str] = {}
    listed: set[str] = set()  # Real paths of directories.
    skipped_links: list[str] = []
    links = [""]  # A heap of links to follow; the first is the directory itself.
    while links:
        top = heapq.heappop(links)
        real_top = os.path.realpath(os.path.join(directory, top))
        if real_top in listed:
            skipped_links.append(top)
            continue
        directories = [(f"{top}/" if top else "", real_top)]
        while directories:
            prefix, real = directories.pop()
            if real in listed:  # Below a link, and listed through an earlier link.
                skipped_links.append(prefix.rstrip("/"))
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
                    if _is_left_out(entry.name, hidden):
                        continue
                    if not _is_dir(entry):
                        # A pipe or a device is listed only through a link, as a file is.
                        if entry.is_symlink() or entry.is_file():
                            stamp_by_path[path] = _stamp(entry)
                    elif entry.is_symlink():
                        heapq.heappush(links, path)
                    else:
                        directories.append((f"{path}/", os.path.join(real, entry.name)))
    return Tree(dict(sorted(stamp_by_path.items())), sorted(skipped_links))


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # A link to itself.
        return False


def _stamp(entry: os.DirEntry[str]) -> str:
    try:
        return stamps.of_status(entry.stat())
    except OSError:  # A link to nowhere.
        return ""


def scratch_directory() -> str:
    """Creates a local directory that is removed when the process ends."""
    directory = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def copy_tree(local_directory: str, directory: str) -> None:
    """Copies every file below `local_directory` to the same path below `directory`."""
    for root, _, names in sorted(os.walk(local_directory)):
        relative = os.path.relpath(root, local_directory)
        target = directory if relative == "." else files.join(directory, *relative.split(os.sep))
        files.make_dirs(target)
        for name in sorted(names):
            with open(os.path.join(root, name), "rb") as source:
                with files.open_atomic(files.join(target, name)) as file:
                    shutil.copyfileobj(source, file)
