"""One process at a time in a directory.

Locally by a lock of the kernel's, on an object store by a lease (lease.py).
"""

import contextlib
import errno
import os
from collections.abc import Iterator

from pipeline.cli.errors import StageError
from pipeline.storage import files, lease

# What the kernel says of a file system without locks, such as NFS whose lock daemon is not there.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def is_ours(name: str) -> bool:
    """Whether a file of that name is a lock's."""
    return name == lease.NAME or name.startswith(f"{lease.NAME}-")


@contextlib.contextmanager
def held(directory: str) -> Iterator[None]:
    """Holds `directory` for this process; a second holder gets a StageError.

    Locally the kernel drops the lock with its process. On an object store it is an object
    that only one process can create, and that its holder keeps changing. Who finds one waits
    until it has changed, and gives up, or has not for 40 s, and takes it. The one clock in this
    is its own. A dead process of the same machine is known at once.
    """
    with lease.held(directory) if files.is_url(directory) else _locked(directory):
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
                f"{directory}: its file system takes no lock ({error.strerror}), and two commands "
                "at once would spoil it; expected a file system with flock: for NFS start the lock "
                "daemon (rpc.statd), or mount it with local_lock=flock if only this machine writes "
                "there; or name a directory of another disk"
            ) from error
        yield
