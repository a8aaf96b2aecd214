"""Where files live: local paths and fsspec URLs, behind one set of functions.

A path is local unless it holds "://"; a URL goes to the file system that fsspec
knows for it (gs:// through gcsfs; retries.py says what happens when it fails). Every write
appears whole or not at all: locally by renaming a finished file, on an object store by one
upload.
"""

import concurrent.futures
import contextlib
import errno
import io
import os
import re
import shutil
import stat
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import Any, BinaryIO, TypeVar

from pipeline.cli.errors import StageError
from pipeline.storage import names, retries

_TEMPORARY = ".writing-"
# What makes a path a pattern to fsspec.
_MAGIC = re.compile(r"[*?[\]]")
# Of a URL, by one who reads a little at a time.
_READ_AT_ONCE = 1 << 20
# Of an object store, where each costs little but waiting.
_REQUESTS_AT_ONCE = 16
# What a volume, or a system that shows volumes, puts into directories; nobody's data.
_OF_VOLUMES = (
    "lost+found",  # mkfs of ext2 to ext4, at the top; only root may read it.
    ".snapshot",  # NetApp and Isilon, in any directory: its earlier states.
    ".DS_Store",  # macOS, in directories that were looked at.
)
_OF_VOLUMES_BEGIN = (
    ".nfs",  # An NFS client: a file that was removed while a process had it open.
    ".Trash-",  # A desktop, at the top: the files that a user has thrown away.
    "._",  # macOS, beside files on a volume that takes no extended attributes.
)
# A disk, or what an account may use of it.
FULL = (errno.ENOSPC, errno.EDQUOT)

_IRREGULAR = {
    stat.S_IFIFO: "is a pipe",
    stat.S_IFSOCK: "is a socket",
    stat.S_IFCHR: "is a device",
    stat.S_IFBLK: "is a device",
}

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def is_url(path: str) -> bool:
    """Whether `path` is an fsspec URL rather than a local path."""
    return "://" in path


def join(directory: str, *names: str) -> str:
    """`directory` and `names` as one path, with the separator that its kind uses."""
    if is_url(directory):
        return "/".join([directory.rstrip("/"), *names])
    return os.path.join(directory, *names)


def each(directory: str, work: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    """What `work` gives for each item; on an object store it is called for several at a time.

    Raises:
      What `work` raises; items that it was not called for by then are left out.
    """
    if not is_url(directory):
        return list(map(work, items))
    pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def exists(path: str) -> bool:
    """Whether a file or a directory is there."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: fs.exists(inner))
    return os.path.exists(path)


def is_dir(path: str) -> bool:
    """Whether `path` is a directory (on an object store: a prefix with objects)."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: fs.isdir(inner))
    return os.path.isdir(path)


def is_within(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or lies below it."""
    if is_url(path) or is_url(directory):
        return f"{path.rstrip('/')}/".startswith(f"{directory.rstrip('/')}/")
    inner, outer = os.path.realpath(path), os.path.realpath(directory)
    return os.path.commonpath([inner, outer]) == outer


def is_of_volume(name: str) -> bool:
    """Whether a file or directory of that name is a volume's own, and no output and no record."""
    return name in _OF_VOLUMES or name.startswith(_OF_VOLUMES_BEGIN)


def list_names(directory: str) -> list[str]:
    """Sorted names of what lies in `directory` but a volume's own; empty if it does not exist.

    Raises:
      StageError: an object has a name that leads out of `directory`.
    """
    if is_url(directory):
        found = [check_object(directory, n) for n in retries.call(directory, _names_of_objects)]
    else:
        found = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(name for name in found if not is_of_volume(name))


def _names_of_objects(fs: Any, inner: str) -> list[str]:
    inner = inner.rstrip("/")
    if not fs.isdir(inner):
        return []
    found = (path.rstrip("/") for path in fs.ls(inner, detail=False))
    # A console's "create folder" makes an object of the directory's own name.
    return [os.path.basename(path) for path in found if path != inner]


def check_object(directory: str, name: str) -> str:
    """Gives back the name of an object below `directory`, if it is that of a file there.

    Raises:
      StageError: the name leads out of the directory; in a bucket any text is a name.
    """
    return names.check(
        name,
        f"{directory}: holds an object named",
        "remove that object, or name another directory",
    )


def num_bytes(path: str) -> int:
    """Size of a file in bytes; raises FileNotFoundError."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: fs.size(inner))
    return os.path.getsize(path)


def make_dirs(directory: str) -> None:
    """Creates `directory` and its parents; nothing happens if it is there."""
    if is_url(directory):
        retries.call(directory, lambda fs, inner: fs.makedirs(inner, exist_ok=True))
        return
    if re.match(r"\w*:/", directory):
        raise StageError(
            f"{directory}: is no URL, and would make a directory named like one; expected two "
            "slashes after the colon, or another name"
        )
    try:
        os.makedirs(directory, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StageError(
            f"{directory}: cannot be a directory, a file is in the way ({error.strerror}); name "
            "another one"
        ) from error


def remove(path: str) -> None:
    """Removes a file or a whole directory; nothing happens if it is not there."""
    if is_url(path):
        with contextlib.suppress(FileNotFoundError):
            retries.call(path, _remove_objects)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.remove(path)


def _remove_objects(fs: Any, inner: str) -> None:
    if not _MAGIC.search(inner):
        fs.rm(inner, recursive=True)
        return
    # `rm` would take the path for a pattern, and remove what lies elsewhere.
    for found in fs.find(inner):
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(found)


def remove_empty(directory: str) -> None:
    """Removes a directory unless something is in it, a volume's own included."""
    if not is_url(directory):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    elif not list_names(directory):
        remove(directory)


def move(path: str, target: str) -> None:
    """Moves a file to another path of the same kind, in place of what is there.

    At once on a local disk; on an object store the file is copied, whole, and then removed.
    """
    if is_url(path):
        place = retries.file_system(target)[1]
        # Each by itself, since a call that is said to have failed may have had its effect.
        retries.call(path, lambda fs, inner: fs.cp_file(inner, place))
        with contextlib.suppress(FileNotFoundError):
            retries.call(path, lambda fs, inner: fs.rm_file(inner))
        return
    os.replace(path, target)


def irregular(status: os.stat_result) -> str:
    """What a path names if neither a file nor a directory; "" for those."""
    return _IRREGULAR.get(stat.S_IFMT(status.st_mode), "")


def open_read(path: str) -> BinaryIO:
    """A binary file open for reading.

    Raises:
      FileNotFoundError: no such file.
      StageError: a pipe, which would be waited for, or a device, which may have no end.
    """
    if is_url(path):
        return io.BufferedReader(retries.File(path), _READ_AT_ONCE)
    if kind := irregular(os.stat(path)):
        raise StageError(f"{path}: {kind}; expected a regular file: name another path")
    return open(path, "rb")


def read_bytes(path: str) -> bytes:
    """The whole of a file; raises FileNotFoundError."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: fs.cat_file(inner))
    with open_read(path) as file:
        return file.read()


def _no_bucket(path: str, error: Exception) -> StageError:
    return StageError(
        f"{path}: cannot be written, since there is no such bucket ({error}); make it, or name "
        "another"
    )


@contextlib.contextmanager
def publishing(path: str) -> Iterator[BinaryIO]:
    """A binary file to write, which appears at `path` only if the block ends well.

    No fsync: after a power cut a file may be torn, and the checksums that stand
    in markers and manifests say so. A killed process tears nothing.
    """
    if is_url(path):
        with tempfile.TemporaryDirectory() as scratch:
            local = os.path.join(scratch, "file")
            with _open_write(local, path=tempfile.gettempdir()) as file:
                yield file
            try:
                retries.call(path, lambda fs, inner: fs.put_file(local, inner))
            except FileNotFoundError as error:
                raise _no_bucket(path, error) from error
        return
    directory, name = os.path.split(path)
    # Two workers may have been handed the same shard, on two machines too.
    temporary = os.path.join(directory, f"{_TEMPORARY}{name}-{uuid.uuid4().hex}")
    try:
        with _open_write(temporary, path=path) as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


class _File(io.FileIO):
    """A local file to write whose errors, which name none, name a path."""

    def __init__(self, local: str, path: str):
        super().__init__(local, "wb")
        self._path = path

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _cannot_write(self._path, error) from error


def _open_write(local: str, *, path: str) -> BinaryIO:
    """A new local file, as part of what is to be written to `path`."""
    try:
        return io.BufferedWriter(_File(local, path))
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str, error: OSError) -> Exception:
    """What an error at a file means to who reads it: a worker of a runner passes on only text."""
    if error.errno in FULL:
        return StageError(f"{path}: {error.strerror}; make room on that disk")
    return OSError(error.errno, error.strerror, path)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file, atomically."""
    with publishing(path) as file:
        file.write(data)


def create(path: str, data: bytes) -> bool:
    """Writes a whole file of a URL unless there is one; returns whether it did."""
    try:
        retries.call(path, lambda fs, inner: fs.pipe_file(inner, data, mode="create"))
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise _no_bucket(path, error) from error
    return True


def list_finished_names(directory: str) -> list[str]:
    """As `list_names`, without what a killed process left half-written."""
    return [name for name in list_names(directory) if not name.startswith(_TEMPORARY)]


def remove_unfinished(directory: str) -> None:
    """Removes what a killed process left half-written in `directory`."""
    for name in list_names(directory):
        if name.startswith(_TEMPORARY):
            remove(join(directory, name))
