"""A lease: an object by which one process holds a directory on an object store.

On a local disk a kernel lock holds the directory, see lock.py.
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
from typing import Any

from pipeline.cli import command
from pipeline.cli.errors import StageError
from pipeline.storage import files

# Name of the lock or lease; a local lock file stays, empty.
NAME = ".lock"
# A holder changes its object every _BEAT_SECS; a lease unchanged for _LEASE_SECS is dead.
_BEAT_SECS, _LEASE_SECS, _LOOK_EVERY_SECS = 10.0, 40.0, 1.0


def refusal(directory: str, who: str) -> StageError:
    """The error for a directory that another process holds.

    Args:
      directory: the directory.
      who: the process in brackets, or "".
    """
    return StageError(
        f"{directory}: another process is writing here{who}; wait for it to end, or name another "
        "path"
    )


@contextlib.contextmanager
def hold(directory: str) -> Iterator[None]:
    """Holds a directory of an object store; waits until a dead holder is known as dead."""
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
    """Identifies this process among all machines, as far as the system can tell."""
    return {
        "host": platform.node(),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "pids": _link("/proc/self/ns/pid"),  # Each container has process numbers of its own.
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
    """Start of a process in ticks since boot; "" if no such process exists."""
    return (_read(f"/proc/{pid}/stat").rpartition(")")[2].split() or [""] * 20)[19]


class _Lease:
    """The lease object of this process in one directory."""

    def __init__(self, directory: str):
        self._directory, self._path = directory, files.join(directory, NAME)
        self._nonce, self._beats = uuid.uuid4().hex, 0
        self._seen_claims: dict[str, float] = {}  # Claim -> time at which it was first seen.

    def _text(self) -> bytes:
        self._beats += 1
        state = {**_this_process(), "nonce": self._nonce, "beats": self._beats}
        return json.dumps(state).encode()

    def _read_state(self) -> dict[str, Any] | None:
        """The holder's state in the object; None if no object exists, {} if it is unreadable."""
        try:
            state = json.loads(files.read_bytes(self._path))
        except FileNotFoundError:
            return None
        except ValueError:
            state = {}
        return state if isinstance(state, dict) else {}

    def _is_ours(self, state: dict[str, Any] | None) -> bool:
        return state is not None and state.get("nonce") == self._nonce

    def take(self) -> None:
        """Creates the object, once no live process holds it.

        Raises:
          StageError: the holder is alive.
        """
        first_state, since = None, 0.0
        while not files.create(self._path, self._text()):
            state = self._read_state()
            if self._is_ours(state):
                return  # Created, but the answer was lost.
            if state is None:
                continue
            holder = f"process {state.get('pid')} of {state.get('host')}"
            if first_state is not None and state != first_state:
                raise refusal(self._directory, f" ({holder})")
            if first_state is None:
                first_state, since = state, time.monotonic()
                if not _is_dead(state):
                    print(
                        f"{self._path}: belongs to {holder}; waiting up to {_LEASE_SECS:.0f} s "
                        "for a sign of life",
                        file=sys.stderr,
                    )
            if _is_dead(state) or time.monotonic() - since > _LEASE_SECS:
                self._remove_dead(state)
            time.sleep(_LOOK_EVERY_SECS)

    def _remove_dead(self, dead: dict[str, Any]) -> None:
        """Removes the object of a dead holder; of several processes that try, one succeeds.

        Otherwise a slow process would remove the object that a faster one has created since.
        """
        claim = f"{self._path}-{hashlib.sha256(json.dumps(dead).encode()).hexdigest()[:16]}"
        if not files.create(claim, self._text()):
            # The claim's owner removes the object, unless it has died too.
            self._seen_claims.setdefault(claim, time.monotonic())
            if time.monotonic() - self._seen_claims[claim] > _LEASE_SECS:
                del self._seen_claims[claim]
                files.remove(claim)
            return
        if self._read_state() == dead:
            files.remove(self._path)
        files.remove(claim)

    def renew(self) -> None:
        """Changes the object; ends this process if another process holds the directory."""
        try:
            state = self._read_state()
            if self._is_ours(state):
                files.write_bytes(self._path, self._text())
                return
        except StageError:
            return  # If the storage stays unreachable, the work itself fails.
        # No object: the process that took over has ended already.
        who = f"process {state.get('pid')} of {state.get('host')}" if state else "another process"
        text = (
            f"\n{self._directory}: this process was unreachable for too long, and {who} has taken "
            "over; stopped\n"
        )
        os.write(2, text.encode())
        command.end_at_once(StageError.exit_status)

    def drop(self) -> None:
        """Removes the object if this process still holds it."""
        with contextlib.suppress(StageError):
            if self._is_ours(self._read_state()):
                files.remove(self._path)


def _is_dead(state: dict[str, Any]) -> bool:
    """Whether a holder was a process of this machine that has ended."""
    process = _this_process()
    same_machine = all(
        process[key] and process[key] == state.get(key) for key in ("host", "boot", "pids")
    )
    pid = str(state.get("pid"))
    return same_machine and pid.isdigit() and _started(int(pid)) != state.get("started")
