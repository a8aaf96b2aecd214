"""Connections between the workers of a cluster before TensorFlow's, and the messages on them.

A message is one line of JSON; rendezvous.py says which there are.
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

# Every message has this key, with the number of its format.
_MAGIC, _FORMAT = "vae-pipeline rendezvous", 1
_MAX_BYTES = 1 << 20  # of a message
PATIENCE_SECS = 30  # For whoever waits, and does not answer; or has connected, and says nothing.
_FINISH_SECS = 5
# By which the kernel notices in half a minute that the machine of a peer is gone.
_KEEPALIVE = {
    "TCP_KEEPIDLE": 10,
    "TCP_KEEPINTVL": 10,
    "TCP_KEEPCNT": 2,
    "TCP_USER_TIMEOUT": 1000 * PATIENCE_SECS,
}


class Peer:
    """A connection to another worker, or to whoever has found the port."""

    def __init__(self, connection: socket.socket):
        self.connection, self._buffer = connection, b""
        self.heard = time.monotonic()
        self.index: int | None = None  # Until it is known.
        self.about: dict[str, Any] = {}
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has all of them.
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: Any) -> None:
        """Raises OSError where the peer is gone, or takes nothing for long."""
        self.connection.settimeout(PATIENCE_SECS)
        self.connection.sendall(json.dumps({_MAGIC: _FORMAT, **message}).encode() + b"\n")

    def hear(self, timeout_secs: float = PATIENCE_SECS) -> Iterator[dict[str, Any]]:
        """Yields the messages that have come, once some bytes have.

        Raises:
          OSError: the connection has ended, or nothing came in time.
          ValueError: what came is no message.
          UsageError: a message of another version of this program.
        """
        if b"\n" not in self._buffer:
            self.connection.settimeout(max(0.001, timeout_secs))
            data = self.connection.recv(1 << 16)
            if not data:
                raise ConnectionError("the connection has ended")
            self._buffer += data
            if len(self._buffer) > _MAX_BYTES:
                raise ValueError("a line that does not end")
        while b"\n" in self._buffer:
            line, _, self._buffer = self._buffer.partition(b"\n")
            message = _parse(line)
            self.heard = time.monotonic()
            yield message

    def finish(self) -> None:
        """Ends the connection once the peer has taken what was sent, and has ended it too."""
        with self.connection, contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            ends = time.monotonic() + _FINISH_SECS  # However often the peer sends something.
            while (left := ends - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(1 << 16):
                    return


def _parse(line: bytes) -> dict[str, Any]:
    try:
        message = json.loads(line)
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    found = message.get(_MAGIC) if isinstance(message, dict) else None
    if type(found) is not int:
        raise ValueError("not of this program")
    if found != _FORMAT:
        raise UsageError(
            f"a worker with another version of vae-pipeline has come (format {found} of the "
            f"rendezvous, expected {_FORMAT}); install one version on all workers"
        )
    return message


def listen(worker: tf_config.Worker) -> socket.socket:
    """A socket that listens on all of this machine's addresses, as TensorFlow's server does.

    Raises:
      StageError: the port cannot be had.
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
            "that listens there, or choose another port (--port of trainer.join, else TF_CONFIG)"
        ) from error
