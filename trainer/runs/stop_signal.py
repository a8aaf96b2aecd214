"""Handles SIGTERM and SIGINT while the main thread is busy inside TensorFlow."""

import os
import signal
import threading
from collections.abc import Callable

from pipeline.cli import command
from pipeline.cli.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignal:
    """A context in which the first SIGTERM or SIGINT stops the run; a SIGINT after it exits.

    A process that is no command does not exit: the next SIGINT raises a KeyboardInterrupt there.
    Outside of the main thread, where Python allows no handler, no signal is listened to.

    Python runs signal handlers only between two instructions of the main thread, which may be
    seconds apart. So a thread reads the signals' numbers from a pipe, to which the interpreter
    writes them at once.
    """

    def __init__(self, on_signal: Callable[[], None]):
        """`on_signal` is called in another thread when the first signal comes."""
        self._on_signal = on_signal
        self._num_passed = 0  # Calls of the handler of SIGINT.
        self.received = False

    def __enter__(self) -> "StopSignal":
        self._listens = threading.current_thread() is threading.main_thread()
        if not self._listens:
            return self
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        # The interpreter writes only the numbers of signals that have a Python handler.
        self._previous_handlers = {number: signal.signal(number, self._pass) for number in _SIGNALS}
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        if not self._listens:
            return
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        os.close(self._writer)  # Ends the thread.
        self._thread.join()
        os.close(self._reader)

    @property
    def _is_command(self) -> bool:
        """Whether SIGINT ends this process, as it does a command; else it interrupts the code."""
        return self._previous_handlers[signal.SIGINT] is not signal.default_int_handler

    def _pass(self, number: int, frame: object) -> None:
        """Leaves the first signal to the thread."""
        self._num_passed += number == signal.SIGINT
        if self._num_passed > 1 and not self._is_command:
            signal.default_int_handler(number, frame)

    def _listen(self) -> None:
        while number := os.read(self._reader, 1):
            if number[0] not in _SIGNALS:
                continue
            if self.received and number[0] == signal.SIGINT and self._is_command:
                os.write(2, b"\nstopped at once; run the same command to resume\n")
                command.end_at_once(Interrupted.exit_status)
            if not self.received:
                self.received = True
                self._on_signal()
