"""Ends a worker of a cluster if a call of its training or evaluation loop does not return.

TensorFlow notices a worker that is gone. A worker that is there and hangs lets all others wait for
ever, in a sum over the workers.
"""

import collections
import contextlib
import faulthandler
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from typing import NamedTuple

from pipeline.cli import command, quiet
from pipeline.cli.errors import Interrupted

_TICK_SECS = 1.0
# A call hangs if it takes longer than this many ticks and than this many times its usual time.
_LEAST_TICKS = 120
_TIMES_USUAL = 30
# A first call compiles, and connects GPUs.
_FIRST_TICKS = 1800
_NUM_REMEMBERED = 101  # calls of a kind, of whose times the median counts


class _Call(NamedTuple):
    """A call in progress."""

    name: str
    max_ticks: float
    usual_secs: float | None  # None for a first call


class Watchdog:
    """A thread that counts the seconds of one call at a time.

    The thread counts its own ticks and reads no clock: while a machine is suspended, or a process
    stopped, no tick passes.
    """

    def __init__(self):
        """Starts the thread."""
        self._secs_per_batch: dict[str, collections.deque[float]] = collections.defaultdict(
            lambda: collections.deque(maxlen=_NUM_REMEMBERED)
        )
        self._call: _Call | None = None
        self._num_ticks = 0
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    @contextlib.contextmanager
    def watch(self, name: str, num_batches: int) -> Iterator[None]:
        """Watches a call; if it takes too long, the process ends with status 75.

        Args:
          name: what the call does, in words; calls of one name take similar times per batch.
          num_batches: how many batches the call is for.
        """
        times = self._secs_per_batch[name]
        usual_secs = statistics.median(times) * num_batches if times else None
        max_ticks = _FIRST_TICKS
        if usual_secs is not None:
            max_ticks = max(_LEAST_TICKS, _TIMES_USUAL * usual_secs / _TICK_SECS)
        self._num_ticks = 0
        self._call = _Call(name, max_ticks, usual_secs)
        began = time.monotonic()
        try:
            yield
        finally:
            self._call = None
        times.append((time.monotonic() - began) / num_batches)

    def _run(self) -> None:
        while True:
            time.sleep(_TICK_SECS)
            self._tick()

    def _tick(self) -> None:
        call = self._call
        self._num_ticks += 1
        if call and self._num_ticks > call.max_ticks:
            _end(call, self._num_ticks * _TICK_SECS)


def _end(call: _Call, secs: float) -> None:
    """Says what every thread does, and ends the process."""
    usual = "a first call" if call.usual_secs is None else f"usually {call.usual_secs:.1f} s"
    print(
        f"train: {call.name} has not returned in {secs:.0f} s ({usual}): this worker hangs, or "
        "waits for a worker that does; start the job again, and it resumes from the newest "
        "checkpoint. What the threads of this worker do:",
        file=sys.stderr,
        flush=True,
    )
    faulthandler.dump_traceback(quiet.real_stderr)
    command.end_at_once(Interrupted.exit_status)
