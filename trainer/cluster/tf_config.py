"""Reads a cluster from the environment variable TF_CONFIG; does not import TensorFlow."""

import json
import os
from typing import NamedTuple

from pipeline.cli.errors import UsageError


class Worker(NamedTuple):
    """A worker of a cluster."""

    kind: str  # chief or worker
    number: int  # among the workers of its kind
    host: str
    port: int

    @property
    def name(self) -> str:
        """The worker's name without its address, for messages."""
        return f"{self.kind} {self.number}"

    @property
    def address(self) -> str:
        """The address in the form of TF_CONFIG."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.name} at {self.address}"


class Cluster(NamedTuple):
    """All workers, and the index of this process."""

    workers: list[Worker]  # the chief, which writes the files, comes first
    index: int  # of this process in `workers`


def _worker(kind: str, number: int, address: str) -> Worker:
    host, _, port = address.rpartition(":")
    if not host or not 0 < int(port) < 1 << 16:
        raise ValueError(address)
    return Worker(kind, number, host.strip("[]"), int(port))


def read() -> Cluster:
    """Parses TF_CONFIG.

    Raises:
      UsageError: TF_CONFIG is absent or malformed.
    """
    text = os.environ.get("TF_CONFIG", "")
    try:
        value = json.loads(text)
        workers = [
            _worker(kind, number, address)
            for kind in ("chief", "worker")
            for number, address in enumerate(value["cluster"].get(kind, ()))
        ]
        # str, since int(0.9) would be 0.
        task = value["task"]["type"], int(str(value["task"]["index"]))
        index = [(worker.kind, worker.number) for worker in workers].index(task)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"TF_CONFIG={text!r}: expected "
            '{"cluster": {"worker": ["host:port", …]}, "task": {"type": "worker", "index": 0}} for '
            "strategy multi_worker; python -m trainer.launch sets it for workers on one machine"
        ) from error
    return Cluster(workers, index)
