"""The progress line of long work: done, total, rate, time left.

On a terminal the line updates in place; elsewhere a new line is printed every 10 s. Progress goes
to standard error, results go to standard output.
"""

import os
import sys
import time
from typing import TextIO

_TERMINAL_EVERY_SECS = 0.1
_PLAIN_EVERY_SECS = 10.0


def _clock(secs: float) -> str:
    minutes, seconds = divmod(int(secs + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class Progress:
    """Shows the progress of `total` units of work."""

    def __init__(self, label: str, *, total: int, unit: str, stream: TextIO | None = None):
        """Starts the clock.

        Args:
          label: first word of the line.
          total: number of units of work.
          unit: name of the units, in the plural.
          stream: standard error by default.
        """
        self.label, self._total, self._unit = label, total, unit
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._started = self._shown = time.monotonic()
        self._first: int | None = None
        self._width = 0

    def update(self, done: int, note: str = "") -> None:
        """Sets the number of finished units; prints the line if the last one is old enough.

        Args:
          done: finished units, those of earlier tries included.
          note: text for the end of the line.
        """
        now = time.monotonic()
        if self._first is None:
            # The rate excludes the units of earlier tries and the time before the first unit.
            self._first, self._started = done, now
        every = _TERMINAL_EVERY_SECS if self._terminal else _PLAIN_EVERY_SECS
        if now - self._shown >= every:
            self._shown = now
            self._write(self.line(done, note), end="")

    def line(self, done: int, note: str = "") -> str:
        """The text of the progress line."""
        secs = time.monotonic() - self._started
        rate = (done - (self._first or 0)) / secs if secs else 0.0
        text = f"{self.label} {done:,}/{self._total:,} {self._unit}"
        if rate > 0:
            left = (self._total - done) / rate
            text += f", {rate:,.{0 if rate >= 10 else 1}f}/s, {_clock(left)} left"
        return f"{text}, {note}" if note else text

    def close(self, text: str = "") -> None:
        """Ends the line: replaces it by `text`, or clears it."""
        if text or (self._terminal and self._width):
            self._write(text, end="\n" if text else "")
        self._width = 0

    def _write(self, text: str, *, end: str) -> None:
        if self._terminal:
            if not end:
                # A wrapped line could not be overwritten.
                text = text[: (os.get_terminal_size(self._stream.fileno()).columns or 1000) - 1]
            padding = " " * max(0, self._width - len(text))
            self._stream.write(f"\r{text}{padding}{end or chr(13)}")
            self._width = len(text)
        else:
            self._stream.write(f"{text}\n")
        self._stream.flush()
