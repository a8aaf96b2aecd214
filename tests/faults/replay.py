"""A power cut after each operation of a command: the trees that a disk may hold then.

`Recorder` notes what a command does to the names of a directory, and each fsync. `Record.states`
gives the trees after a prefix of these operations. An operation on names is sure once its
directory is synced; any other may be lost, alone or with the rest. The bytes of a file that was
not synced may be missing, cut or zeros. Temporary files are left out, and so are files that the
pipeline does not rename into place: locks, and TensorBoard's events.
"""

import hashlib
import os
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from pipeline.storage import files

# Functions that wait for the disk in the name of their caller.
_HELPERS = ("_fsync", "sync", "sync_files")
_PATCHED = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "link", "symlink", "fsync")
_DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
}


class File(NamedTuple):
    """The bytes of a file, and who synced them; nobody: ""."""

    data: bytes
    site: str


class Link(NamedTuple):
    target: str


class Directory:
    """Equal to itself only: a directory that is made again is another one."""


Node = File | Link | Directory
Names = dict[tuple[Directory, str], Node]
Change = tuple[Directory, str, Node | None]  # A name, and what the name stands for then.
# Relative path -> bytes, target of a link, or None of a directory.
Tree = dict[str, bytes | Link | None]


class Operation(NamedTuple):
    """Names that change in one step, or a sync of a directory."""

    changes: tuple[Change, ...] = ()
    synced: Directory | None = None
    site: str = ""


class State(NamedTuple):
    what: str
    tree: Tree


def _tree(root: Directory, names: Names, prefix: str = "") -> Tree:
    tree: Tree = {}
    for (directory, name), node in names.items():
        if directory is root:
            if isinstance(node, Directory):
                tree[prefix + name] = None
                tree |= _tree(node, names, f"{prefix}{name}/")
            else:
                tree[prefix + name] = node.data if isinstance(node, File) else node
    return tree


def _apply(changes: Iterable[Change], names: Names) -> None:
    for directory, name, node in changes:
        names.pop((directory, name), None)
        if node:
            names[directory, name] = node


class Record:
    """The operations of a command in a directory."""

    def __init__(self, root: pathlib.Path):
        self.root = Directory()
        self.before: Names = {}
        self.operations: list[Operation] = []
        self._read(root, self.root)
        self.now = dict(self.before)

    def _read(self, path: pathlib.Path, directory: Directory) -> None:
        for entry in path.iterdir():
            if entry.is_symlink():
                self.before[directory, entry.name] = Link(os.readlink(entry))
            elif entry.is_dir():
                node = self.before[directory, entry.name] = Directory()
                self._read(entry, node)
            else:
                self.before[directory, entry.name] = File(entry.read_bytes(), "before")

    def tree(self, names: Names) -> Tree:
        """The tree of some names, such as `before` and `now`."""
        return _tree(self.root, names)

    def sites(self) -> list[str]:
        """Who has synced something."""
        nodes = [node for op in self.operations for _, _, node in op.changes]
        sites = {node.site for node in nodes if isinstance(node, File)}
        return sorted((sites | {op.site for op in self.operations}) - {"", "before"})

    def _sure_after(self, without: str) -> dict[int, int]:
        """Number of an operation that changes names -> number of the sync that makes it sure."""
        sure_after, unsure = {}, {}
        for number, operation in enumerate(self.operations):
            if operation.changes:
                unsure[number] = {directory for directory, _, _ in operation.changes}
            elif operation.site != without:
                for earlier in [n for n, dirs in unsure.items() if operation.synced in dirs]:
                    sure_after[earlier] = number
                    del unsure[earlier]
        return sure_after

    def states(self, end: int, *, without: str = "", few: bool = False) -> Iterator[State]:
        """What the disk may hold after the first `end` operations.

        Args:
          end: number of operations.
          without: a site that has not synced anything.
          few: whether to leave out the states where any one operation is kept alone or lost alone.
        """
        changes = [n for n in range(end) if self.operations[n].changes]
        sure_after = self._sure_after(without)
        unsure = [n for n in changes if sure_after.get(n, end) >= end]
        chosen = {"all kept": unsure, "all lost": [], "the last kept": unsure[-1:]}
        for n in [] if few else unsure:
            chosen |= {f"{n} kept": [n], f"{n} lost": [other for other in unsure if other != n]}
        for what, kept in chosen.items():
            names, lost = dict(self.before), set(unsure) - set(kept)
            for number in changes:
                if number not in lost:
                    _apply(self.operations[number].changes, names)
            yield from self._damaged(f"{end} operations, {what}", names, without)

    def _damaged(self, what: str, names: Names, without: str) -> Iterator[State]:
        unsynced = {
            key: node
            for key, node in names.items()
            if isinstance(node, File) and node.site in ("", without)
        }
        if not unsynced:
            yield State(what, _tree(self.root, names))
        for damage, change in _DAMAGES.items() if unsynced else ():
            torn = {key: File(change(node.data), "") for key, node in unsynced.items()}
            yield State(f"{what}, unsynced files {damage}", _tree(self.root, names | torn))


class Recorder:
    """Records what this process does below a directory while the block runs; syncs nothing."""

    def __init__(self, root: pathlib.Path):
        self._root = os.path.realpath(root)
        self.record = Record(root)
        self._lock = threading.RLock()
        self._synced: dict[str, str] = {}  # Path of a file -> who synced the file.
        self._temporary: dict[str, Node] = {}  # Path -> link.
        self._nosync = ""

    def __enter__(self) -> Record:
        self._originals = {name: getattr(os, name) for name in _PATCHED}
        self._nosync = os.environ.pop(files.NOSYNC, "")
        for name in _PATCHED:
            setattr(os, name, getattr(self, f"_{name}"))
        return self.record

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(os, name, original)
        if self._nosync:
            os.environ[files.NOSYNC] = self._nosync

    def _place(self, path: str, dir_fd: int | None = None) -> tuple[Directory, str] | None:
        """The directory and the name of a path; None outside of the recorded directory."""
        path = os.fspath(path)
        if dir_fd is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), path)
        parent, name = os.path.split(os.path.abspath(path))
        directory = self._directory(os.path.realpath(parent))
        return None if directory is None else (directory, name)

    def _directory(self, path: str) -> Directory | None:
        if os.path.commonpath([path, self._root]) != self._root:
            return None
        directory: Node | None = self.record.root
        for name in os.path.relpath(path, self._root).split(os.sep):
            if name != ".":
                directory = self.record.now.get((directory, name))
        return directory if isinstance(directory, Directory) else None

    def _change(self, *changes: tuple[tuple[Directory, str] | None, Node | None]) -> None:
        inside = [(*place, node) for place, node in changes if place]
        _apply(inside, self.record.now)
        if inside:
            self.record.operations.append(Operation(tuple(inside)))

    def _mkdir(self, path, *args, dir_fd=None, **options):
        with self._lock:
            self._originals["mkdir"](path, *args, dir_fd=dir_fd, **options)
            self._change((self._place(path, dir_fd), Directory()))

    def _removed(self, kind, path, dir_fd):
        with self._lock:
            place = self._place(path, dir_fd)
            self._originals[kind](path, dir_fd=dir_fd)
            if place in self.record.now:
                self._change((place, None))

    def _rmdir(self, path, *, dir_fd=None):
        self._removed("rmdir", path, dir_fd)

    def _unlink(self, path, *, dir_fd=None):
        self._removed("unlink", path, dir_fd)

    def _remove(self, path, *, dir_fd=None):
        self._removed("unlink", path, dir_fd)

    def _rename(self, source, target, **options):
        with self._lock:
            old, place = self._place(source), self._place(target)
            node = self.record.now.get(old) or self._temporary.pop(os.fspath(source), None)
            if node is None and place:
                site = self._synced.pop(os.path.realpath(source), "")
                node = File(pathlib.Path(source).read_bytes(), site)
            self._originals["rename"](source, target, **options)
            self._change(*[(old, None)] * (old in self.record.now), (place, node))

    _replace = _rename

    def _link(self, source, target, **options):
        with self._lock:
            self._originals["link"](source, target, **options)
            node = self.record.now.get(self._place(source))
            self._temporary[target] = node or File(pathlib.Path(source).read_bytes(), "before")

    def _symlink(self, source, target, **options):
        with self._lock:
            self._originals["symlink"](source, target, **options)
            self._temporary[target] = Link(source)

    def _fsync(self, descriptor):
        path, frame = os.readlink(f"/proc/self/fd/{descriptor}"), sys._getframe(1)
        while frame.f_code.co_name in _HELPERS:
            frame = frame.f_back
        code = frame.f_code
        module = pathlib.Path(code.co_filename).stem
        site = f"{module}.{code.co_name}:{frame.f_lineno - code.co_firstlineno}"
        with self._lock:
            if not os.path.isdir(path):
                self._synced[path] = site
            elif directory := self._directory(path):
                self.record.operations.append(Operation(synced=directory, site=site))


def build(tree: Tree, root: pathlib.Path) -> None:
    """Makes a directory hold a tree and nothing else."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    for path, content in sorted(tree.items()):
        if content is None:
            (root / path).mkdir()
        elif isinstance(content, Link):
            (root / path).symlink_to(content.target)
        else:
            (root / path).write_bytes(content)


def key(tree: Tree) -> bytes:
    """Equal for equal trees."""
    return hashlib.sha256(repr(sorted(tree.items())).encode()).digest()
