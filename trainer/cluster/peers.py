"""Connections between the workers of a cluster before TensorFlow starts, and their messages.

A message is one line of JSON; rendezvous.py lists the messages.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

from pipeline.cli.errors import StageError, UsageError
from trainer.cluster import tf_config

# Every message has this key; the value is the number of the message format.
_MAGIC, _FORMAT = "vae-pipeline rendezvous", 1
_MAX_BYTES = 1 << 20  # of a message
PATIENCE_SECS = 30  # For a silent peer: a waiting worker, or a connection without a first message.
_FINISH_SECS = 5
# With these the kernel notices within half a minute that a peer's machine is gone.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 2,
    "TCP_USER_TIMEOUT": 1000 * PATIENCE_SECS,
}


class Peer:
    """A connection to another worker, or to any program that has found the port."""

    def __init__(self, connection: socket.socket):
        self.connection, self._buffer = connection, b""
        self.last_message_time = time.monotonic()
        self.index: int | None = None  # The worker's index; None before its first message.
        self.settings: dict[str, Any] = {}  # what all workers have to agree on
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all of these options.
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Sends a message; raises OSError if the peer is gone or reads nothing for 30 s."""
        self.connection.settimeout(PATIENCE_SECS)
        self.connection.sendall(json.dumps({_MAGIC: _FORMAT, **message}).encode() + b"\n")

    def receive(self, timeout_secs: float = PATIENCE_SECS) -> Iterator[dict[str, Any]]:
        """Waits for bytes, then yields the messages that are complete.

        Raises:
          OSError: the connection has ended, or nothing came in time.
          ValueError: the bytes are not a message.
          UsageError: another version of this program has sent the message.
        """
        if b"\n" not in self._buffer:
            self.connection.settimeout(max(0.001, timeout_secs))
            data = self.connection.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection has ended")
            self._buffer += data
            if len(self._buffer) > _MAX_BYTES:
                raise ValueError("a line that is too long")
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            message = _parse(line)
            self.last_message_time = time.monotonic()
            yield message

    def finish(self) -> None:
        """Ends the connection after the peer has read all messages and closed it, or after 5 s."""
        with self.connection, contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + _FINISH_SECS  # Even if the peer keeps sending.
            while (secs_left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(secs_left)
                if not self.connection.recv(1 << 16):
                    return


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    format_number = message.get(_MAGIC) if isinstance(message, dict) else None
    if type(format_number) is not int:
        raise ValueError("not a message of this program")
    if format_number != _FORMAT:
        raise UsageError(
            "a worker with another version of vae-pipeline has connected (format "
            f"{format_number} of the rendezvous, expected {_FORMAT}); install the same version on "
            "all workers"
        )
    return message


def listen(worker: tf_config.Worker) -> socket.socket:
    """A socket that listens on all of this machine's addresses, as TensorFlow's server does.

    Raises:
      StageError: the port is in use or not allowed.
    """
    try:
        if socket.has_dualstack_ipv6():
            return socket.create_server(
                ("", worker.port), family=socket.AF_INET6, dualstack_ipv6=True
            )
        return socket.create_server(("", worker.port))
    except OSError as error:
        raise StageError(
            f"{worker}: cannot listen on this port ({os.strerror(error.errno)}); end the process "
            "that uses the port, or choose another port (--port of trainer.join, or TF_CONFIG)"
        ) from error
