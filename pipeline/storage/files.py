"""Where files live: local paths and fsspec URLs, behind one set of functions.

A path is local unless it holds "://"; a URL goes to the file system that fsspec
knows for it (gs:// through gcsfs; retries.py says what happens when it fails). Every write
appears whole or not at all: locally by renaming a finished file, on an object store by one
upload.

A power cut may lose what a disk does not hold yet. A local file's bytes are on the disk before the
file gets its name; the name is on the disk once `sync` has returned for the file's directory.
With VAE_NOSYNC=1 nothing waits for the disk. An object store holds an object when the upload ends.
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
_TEMPORARY_NAME = re.compile(rf"{re.escape(_TEMPORARY)}(.*)-[0-9a-f]{{32}}", re.DOTALL)
# Characters that make a path a pattern to fsspec.
_MAGIC = re.compile(r"[*?[\]]")
# Bytes fetched from a URL for a reader that asks for a few at a time.
_READ_AT_ONCE = 1 << 20
# Parallel requests to an object store; a request costs little but waiting.
_REQUESTS_AT_ONCE = 16
# Names that file systems and desktops put into directories; never data.
_VOLUME_NAMES = (
    "lost+found",  # mkfs of ext2 to ext4, at the top; only root may read it.
    ".snapshot",  # NetApp and Isilon, in any directory: earlier states of it.
    ".DS_Store",  # macOS, in directories that were looked at.
)
_VOLUME_PREFIXES = (
    ".nfs",  # An NFS client: a file that was removed while a process had it open.
    ".Trash-",  # A desktop, at the top: the files that a user has thrown away.
    "._",  # macOS, beside files on a volume that takes no extended attributes.
)
# Errors of os.link where two places allow no hard link: other disks, file systems without links,
# protected files of another user, a file with too many links.
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS, errno.EACCES)
_COPY_BYTES = 1 << 20
_BLOCK_BYTES = 4096
# A full disk, or an account's full quota.
FULL = (errno.ENOSPC, errno.EDQUOT)
# Environment variable; if it is 1, nothing waits for the disk.
NOSYNC = "VAE_NOSYNC"
# Errors of fsync of a directory on file systems that cannot do it, such as CIFS.
_NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)

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
    """The results of `work` for each item; on an object store several calls run in parallel.

    Raises:
      The first error that `work` raises; remaining items are skipped.
    """
    if not is_url(directory):
        return list(map(work, items))
    pool = concurrent.futures.ThreadPoolExecutor(_REQUESTS_AT_ONCE)
    try:
        return list(pool.map(work, items))
    finally:
        pool.shutdown(cancel_futures=True)


def exists(path: str) -> bool:
    """Whether a file or a directory exists."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: bool(fs.exists(inner)))
    return os.path.exists(path)


def is_dir(path: str) -> bool:
    """Whether `path` is a directory (on an object store: a prefix with objects)."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: bool(fs.isdir(inner)))
    return os.path.isdir(path)


def is_within(path: str, directory: str) -> bool:
    """Whether `path` is `directory` or lies below it."""
    inner, outer = place(path), place(directory)
    if is_url(path) or is_url(directory):
        return f"{inner}/".startswith(f"{outer}/")
    return os.path.commonpath([inner, outer]) == outer


def place(directory: str) -> str:
    """A name that is equal for two paths of the same directory, from any working directory."""
    return directory.rstrip("/") if is_url(directory) else os.path.realpath(directory)


def is_same_place(directory: str, other: str) -> bool:
    """Whether two paths lead to the same directory."""
    return place(directory) == place(other)


def is_volume_file(name: str) -> bool:
    """Whether a file system or a desktop made a file of this name; such files are never data."""
    return name in _VOLUME_NAMES or name.startswith(_VOLUME_PREFIXES)


def list_names(directory: str) -> list[str]:
    """Sorted names in `directory`, without volume files; empty if the directory does not exist.

    Raises:
      StageError: an object has a name that leads out of `directory`.
    """
    if is_url(directory):
        entries = [check_object(directory, n) for n in retries.call(directory, _object_names)]
    else:
        entries = os.listdir(directory) if os.path.isdir(directory) else []
    return sorted(name for name in entries if not is_volume_file(name))


def _object_names(fs: Any, inner: str) -> list[str]:
    inner = inner.rstrip("/")
    if not fs.isdir(inner):
        return []
    paths = (path.rstrip("/") for path in fs.ls(inner, detail=False))
    # "Create folder" in a console makes an object with the directory's own name.
    return [os.path.basename(path) for path in paths if path != inner]


def check_object(directory: str, name: str) -> str:
    """Returns the name of an object if the name lies below `directory`.

    Raises:
      StageError: the name leads out of the directory; a bucket allows any text as a name.
    """
    return names.check(
        name,
        f"{directory}: holds an object named",
        "remove that object, or name another directory",
    )


def num_bytes(path: str) -> int:
    """Size of a file in bytes; raises FileNotFoundError."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: int(fs.size(inner)))
    return os.path.getsize(path)


def looks_whole(path: str, size: int) -> bool:
    """Whether a local file has a size in bytes, and its ends are written.

    Blocks that a file system has not written before a power cut read as zeros.
    """
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            first = file.read(_BLOCK_BYTES)
            file.seek(max(0, size - _BLOCK_BYTES))
            return not size or (any(first) and any(file.read(_BLOCK_BYTES)))
    except OSError:
        return False


def size_and_crc32c(url: str) -> tuple[int, str | None]:
    """What a store tells of an object, without reading it: size in bytes, and CRC32C.

    The CRC32C is that of https://cloud.google.com/storage/docs/hashes-etags: base64 of the 4
    bytes, the highest first. It is None of a store other than GCS. Raises FileNotFoundError.
    """
    info = retries.call(url, lambda fs, inner: dict(fs.info(inner)))
    return int(info["size"]), info.get("crc32c")


def make_dirs(directory: str) -> None:
    """Creates `directory` and its parents unless they exist; the disk then holds their names."""
    if is_url(directory):
        retries.call(directory, lambda fs, inner: fs.makedirs(inner, exist_ok=True))
        return
    if re.match(r"\w*:/", directory):
        raise StageError(
            f"{directory}: is no URL, and would make a directory named like one; expected two "
            "slashes after the colon, or another name"
        )
    new, path = [], os.path.realpath(directory)
    while not os.path.isdir(path):
        new.append(path)
        path = os.path.dirname(path)
    try:
        os.makedirs(directory, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise StageError(
            f"{directory}: cannot be a directory, a file is in the way ({error.strerror}); name "
            "another one"
        ) from error
    sync(*map(os.path.dirname, new))


def sync(*directories: str) -> None:
    """Waits until the disk holds the names in local directories, and no removed names.

    Subdirectories are not included. Does nothing for a URL or a missing directory.

    Raises:
      OSError: the disk failed.
    """
    for directory in dict.fromkeys(directories):
        if is_url(directory):
            continue
        try:
            descriptor = os.open(directory or ".", os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            continue
        try:
            _fsync(descriptor)
        except OSError as error:
            if error.errno not in _NO_SYNC:
                raise OSError(error.errno, error.strerror, directory) from error
        finally:
            os.close(descriptor)


def _fsync(descriptor: int) -> None:
    if os.environ.get(NOSYNC) != "1":
        os.fsync(descriptor)


def remove(path: str) -> None:
    """Removes a file or a whole directory, if it exists."""
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
    # `rm` would take the path for a pattern and remove other objects.
    for path in fs.find(inner):
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(path)


def remove_empty(directory: str) -> None:
    """Removes a directory if it is empty; a volume file counts."""
    if not is_url(directory):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
    elif not list_names(directory):
        remove(directory)


def link(path: str, target: str) -> None:
    """Makes a file appear at a second path without sending its bytes; replaces an existing file.

    Locally by a hard link, so both paths share their bytes; where the file systems allow no link,
    by a copy. On an object store the server copies.

    Raises:
      FileNotFoundError: no file at `path`.
    """
    if is_url(path) and is_url(target) and _same_store(path, target):
        inner_target = retries.file_system(target)[1]
        retries.call(path, lambda fs, inner: fs.cp_file(inner, inner_target))
        return
    if not (is_url(path) or is_url(target)):
        temporary = _temporary(target)
        try:
            os.link(path, temporary)
            os.replace(temporary, target)
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
        finally:
            # If both were links to one file already, the rename has done nothing.
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
    with open_read(path) as source, open_atomic(target) as file:
        shutil.copyfileobj(source, file, _COPY_BYTES)


def _same_store(path: str, other: str) -> bool:
    return path.partition("://")[0] == other.partition("://")[0]


def irregular(status: os.stat_result) -> str:
    """The kind of a path that is neither a file nor a directory, as text; "" for those two."""
    return _IRREGULAR.get(stat.S_IFMT(status.st_mode), "")


def open_read(path: str) -> BinaryIO:
    """A binary file open for reading.

    Raises:
      FileNotFoundError: no such file.
      StageError: the path is a pipe, a socket or a device; reading these may never end.
    """
    if is_url(path):
        return io.BufferedReader(retries.File(path), _READ_AT_ONCE)
    if kind := irregular(os.stat(path)):
        raise StageError(f"{path}: {kind}; expected a regular file: name another path")
    return open(path, "rb")


def read_bytes(path: str) -> bytes:
    """The bytes of a whole file; raises FileNotFoundError."""
    if is_url(path):
        return retries.call(path, lambda fs, inner: bytes(fs.cat_file(inner)))
    with open_read(path) as file:
        return file.read()


def _no_bucket(path: str, error: Exception) -> StageError:
    return StageError(
        f"{path}: cannot be written, because the bucket does not exist ({error}); create the "
        "bucket, or name another one"
    )


def _temporary(path: str) -> str:
    """A path beside a local path, for a file that is not finished."""
    directory, name = os.path.split(path)
    # Two workers, on two machines even, may write the same shard.
    return os.path.join(directory, f"{_TEMPORARY}{name}-{uuid.uuid4().hex}")


def swap_link(target: str, path: str) -> None:
    """Makes a local `path` a symbolic link to `target`, in one step; the caller holds `path`.

    Returns when the disk holds the link.
    """
    directory, name = os.path.split(path)
    leftover = re.compile(re.escape(f"{_TEMPORARY}{name}-") + "[0-9a-f]{32}")
    for existing in filter(leftover.fullmatch, os.listdir(directory or ".")):
        os.remove(os.path.join(directory, existing))  # Of a process that was killed here.
    temporary = _temporary(path)
    os.symlink(target, temporary)
    os.replace(temporary, path)
    sync(directory)


@contextlib.contextmanager
def open_atomic(path: str) -> Iterator[BinaryIO]:
    """A binary file to write, which appears at `path` only if the block succeeds.

    Neither a killed process nor a power cut leaves a torn file. After a power cut the file may be
    the one before, unless `sync` was called for its directory.
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
    temporary = _temporary(path)
    try:
        with _open_write(temporary, path=path) as file:
            yield file
            try:
                file.flush()
                _fsync(file.fileno())
            except OSError as error:
                raise _cannot_write(path, error) from error
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)
        raise


class _File(io.FileIO):
    """A local file to write; its errors name the path that the user knows."""

    def __init__(self, local: str, path: str):
        super().__init__(local, "wb")
        self._path = path

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            raise _cannot_write(self._path, error) from error


def _open_write(local: str, *, path: str) -> BinaryIO:
    """Creates a local file that holds what will be written to `path`."""
    try:
        return io.BufferedWriter(_File(local, path))
    except OSError as error:
        raise _cannot_write(path, error) from error


def _cannot_write(path: str, error: OSError) -> Exception:
    """The error to raise for a failed write; it must say all in its text, which is all that a
    runner's worker passes on.
    """
    if error.errno in FULL:
        return StageError(f"{path}: {error.strerror}; free some space on that disk")
    return OSError(error.errno, error.strerror, path)


def write_bytes(path: str, data: bytes) -> None:
    """Writes a whole file, atomically."""
    with open_atomic(path) as file:
        file.write(data)


def create(path: str, data: bytes) -> bool:
    """Writes a whole file of a URL unless the file exists; returns whether it was written."""
    try:
        retries.call(path, lambda fs, inner: fs.pipe_file(inner, data, mode="create"))
    except FileExistsError:
        return False
    except FileNotFoundError as error:
        raise _no_bucket(path, error) from error
    return True


def list_finished_names(directory: str) -> list[str]:
    """As `list_names`, without files that a killed process left half-written."""
    return [name for name in list_names(directory) if not is_unfinished(name)]


def is_unfinished(name: str) -> bool:
    """Whether a killed process left a file of this name half-written."""
    return name.startswith(_TEMPORARY)


def finished_name(name: str) -> str:
    """The name that a half-written file was to get; the name of any other file."""
    match = _TEMPORARY_NAME.fullmatch(name)
    return match[1] if match else name


def remove_unfinished(directory: str) -> None:
    """Removes files that a killed process left half-written in `directory`."""
    for name in list_names(directory):
        if is_unfinished(name):
            remove(join(directory, name))
