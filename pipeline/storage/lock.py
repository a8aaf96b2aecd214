"""One process at a time in a directory.

Locally by a kernel lock, on an object store by a lease (lease.py).
"""

import contextlib
import errno
import os
from collections.abc import Iterator

from pipeline.cli.errors import StageError
from pipeline.storage import files, lease

# Errors of a file system without locks, such as NFS without its lock daemon.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def is_ours(name: str) -> bool:
    """Whether a file of this name belongs to a lock or a lease."""
    return name == lease.NAME or name.startswith(f"{lease.NAME}-")


@contextlib.contextmanager
def hold(directory: str) -> Iterator[None]:
    """Holds `directory` for this process.

    Locally the kernel drops the lock when the process ends. On an object store the lease is an
    object that only one process can create, and that its holder keeps changing. A second process
    watches the object: if the object changes, it gives up; if the object stays the same for 40 s,
    it takes over. The only clock is its own. A dead process of the same machine is noticed at once.

    Raises:
      StageError: another process holds the directory, or its file system has no locks.
    """
    is_url = files.is_url(directory)
    lock_file = os.path.join(directory, lease.NAME)
    with lease.hold(directory) if is_url else _locked(lock_file, directory):
        yield


def forget(directory: str) -> None:
    """Removes the lock file of a directory that nobody holds; a lease has removed itself."""
    if not files.is_url(directory):
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.path.join(directory, lease.NAME))


@contextlib.contextmanager
def hold_path(path: str) -> Iterator[None]:
    """Holds a path that is no directory of this program, as `hold` does; its parent exists."""
    if files.is_url(path):
        with lease.hold(f"{path}{lease.NAME}"):
            yield
        return
    parent, name = os.path.split(path)
    with _locked(os.path.join(parent, f".{name}{lease.NAME}"), path):
        yield


@contextlib.contextmanager
def _locked(lock_file: str, directory: str) -> Iterator[None]:
    """Holds a lock file; `directory` is what messages name."""
    import fcntl

    with open(lock_file, "a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise lease.refusal(directory, "") from error
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise OSError(error.errno, error.strerror, directory) from error
            raise StageError(
                f"{directory}: its file system has no locks ({error.strerror}), and two commands "
                "at once would damage the output; expected a file system with flock: for NFS start "
                "the lock daemon (rpc.statd), or mount with local_lock=flock if only this machine "
                "writes there; or name a directory on another disk"
            ) from error
        yield
