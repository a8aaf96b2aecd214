"""SIGTERM and SIGINT, heard while the main thread is busy inside TensorFlow."""

import os
import signal
import threading
from collections.abc import Callable

from pipeline.cli.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """Within it, SIGTERM and SIGINT ask the run to stop; a SIGINT after one ends the process.

    Python runs its handlers only between two instructions of the main thread, which may be
    seconds away. So a thread reads the numbers of the signals, which the interpreter writes to a
    pipe as they come.
    """

    def __init__(self, on_signal: Callable[[], None]):
        """Takes what to call, in another thread, when the first signal comes."""
        self._on_signal = on_signal
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # A handler of Python's has to be there, or nothing is written.
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        os.close(self._writer)  # Ends the thread.
        self._thread.join()
        os.close(self._reader)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] not in _SIGNALS:
                continue
            if self.received and number[0] == signal.SIGINT:
                os.write(2, b"\nstopped at once; run the same command to go on\n")
                os._exit(Interrupted.exit_status)
            if not self.received:
                self.received = True
                self._on_signal()
