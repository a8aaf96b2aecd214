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
    with lease.hold(directory) if files.is_url(directory) else _locked(directory):
        yield


@contextlib.contextmanager
def _locked(directory: str) -> Iterator[None]:
    import fcntl

    with open(os.path.join(directory, lease.NAME), "a+b") as file:
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
