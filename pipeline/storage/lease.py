"""A lease: the object by which one process holds a directory on an object store.

A directory of a local disk is held by a lock of the kernel's, see lock.py.
"""

import contextlib
import hashlib
import json
import os
import platform
import sys
import threading
import time
import uuid
from collections.abc import Iterator

from pipeline.cli.errors import StageError
from pipeline.storage import files

# The file by which a process holds a directory; a local one stays, empty.
NAME = ".lock"
# A holder of a lease changes its object so often; one that has not changed for so long is dead.
_BEAT_SECS, _LEASE_SECS, _LOOK_EVERY_SECS = 10.0, 40.0, 1.0


def refusal(directory: str, who: str) -> StageError:
    """The error for a directory that another process holds."""
    return StageError(
        f"{directory}: another process is writing here{who}; wait for it to end, or name another "
        "directory"
    )


@contextlib.contextmanager
def held(directory: str) -> Iterator[None]:
    """Holds a directory of an object store; waits for a dead holder, see `_Lease`."""
    lease = _Lease(directory)
    lease.take()
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(_BEAT_SECS):
            lease.renew()

    renewal = threading.Thread(target=beat, daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        lease.drop()


def _this_process() -> dict[str, str]:
    """What names this process among all, as far as the system says."""
    return {
        "host": platform.node(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pids": _link("/proc/self/ns/pid"),  # Containers of one host count for themselves.
        "pid": str(os.getpid()),
        "started": _started(os.getpid()),
    }


def _read(path: str) -> str:
    with contextlib.suppress(OSError), open(path) as file:
        return file.read().strip()
    return ""


def _link(path: str) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return ""


def _started(pid: int) -> str:
    """When a process started, in ticks since the machine did; "" if there is none."""
    return (_read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""] * 20)[19]


class _Lease:
    """The object by which this process holds a directory on an object store."""

    def __init__(self, directory: str):
        self._directory, self._path = directory, files.join(directory, NAME)
        self._nonce, self._beats = uuid.uuid4().hex, 0
        self._seen_claims: dict[str, float] = {}  # When they were seen first.

    def _text(self) -> bytes:
        self._beats += 1
        state = {**_this_process(), "nonce": self._nonce, "beats": self._beats}
        return json.dumps(state).encode()

    def _there(self) -> dict | None:
        """What the object says; None if there is none."""
        try:
            found = json.loads(files.read_bytes(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}

    def _is_ours(self, found: dict | None) -> bool:
        return found is not None and found.get("nonce") == self._nonce

    def take(self) -> None:
        """Waits for the object to be free, or its holder to be known as dead, and creates it.

        Raises:
          StageError: its holder is alive.
        """
        seen, since = None, 0.0
        while not files.create(self._path, self._text()):
            found = self._there()
            if self._is_ours(found):
                return  # Created, and the answer was lost.
            if found is None:
                continue
            if seen is not None and found != seen:
                raise refusal(
                    self._directory, f" (process {found.get('pid')} of {found.get('host')})"
                )
            if seen is None:
                seen, since = found, time.monotonic()
                if not _is_dead(found):
                    print(
                        f"{self._path}: of process {found.get('pid')} of {found.get('host')}; "
                        f"waiting up to {_LEASE_SECS:.0f} s to see if it lives",
                        file=sys.stderr,
                    )
            if _is_dead(found) or time.monotonic() - since > _LEASE_SECS:
                self._remove_dead(found)
            time.sleep(_LOOK_EVERY_SECS)

    def _remove_dead(self, dead: dict) -> None:
        """Removes the object of a dead holder; of several that want to, one does.

        Else the slower of two would remove what the faster one has created since.
        """
        claim = f"{self._path}-{hashlib.sha256(json.dumps(dead).encode()).hexdigest()[:16]}"
        if not files.create(claim, self._text()):
            # Its owner is about to, unless it died at that; nobody waits for it longer than so.
            self._seen_claims.setdefault(claim, time.monotonic())
            if time.monotonic() - self._seen_claims[claim] > _LEASE_SECS:
                del self._seen_claims[claim]
                files.remove(claim)
            return
        if self._there() == dead:
            files.remove(self._path)
        files.remove(claim)

    def renew(self) -> None:
        """Changes the object; ends the process if it is another's by now, or gone."""
        try:
            found = self._there()
            if self._is_ours(found):
                files.write_bytes(self._path, self._text())
                return
        except StageError:
            return  # If the storage is gone for long, the work itself fails.
        # Gone: whoever took it has come to its end already.
        who = f"process {found.get('pid')} of {found.get('host')}" if found else "another process"
        text = (
            f"\n{self._directory}: this process was out of reach for so long that {who} has taken "
            "over; stopped\n"
        )
        os.write(2, text.encode())
        os._exit(StageError.exit_status)

    def drop(self) -> None:
        """Removes the object, if it is still ours."""
        with contextlib.suppress(StageError):
            if self._is_ours(self._there()):
                files.remove(self._path)


def _is_dead(found: dict) -> bool:
    """Whether a holder was a process of this machine, and is none any more."""
    here = _this_process()
    same_machine = all(
        here[key] and here[key] == found.get(key) for key in ("host", "boot", "pids")
    )
    pid = str(found.get("pid"))
    return same_machine and pid.isdigit() and _started(int(pid)) != found.get("started")
