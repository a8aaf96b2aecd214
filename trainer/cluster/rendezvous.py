"""The workers of a cluster meet before TensorFlow starts.

TensorFlow waits an hour for a worker that never comes, and Python handles no signal in that time.
TensorFlow also trains workers with different configs to the end. So the workers meet here first,
at two points. `meet`, before the import of TensorFlow, compares the workers' settings. `start`,
just before TensorFlow's cluster, waits until every worker has passed the steps that may fail on
one worker alone.

The first worker of the cluster listens on the port of its address, which TensorFlow uses
afterwards; the others connect to the first worker. Every message is one line of JSON. The first
worker receives

    {"index": 1, "about": {…}}   once from each worker, at the first point, with its settings
    {"ready": true}              once from each worker, at the second point
    {}                           from a waiting worker, as an answer

and sends to the waiting workers

    {"missing": ["worker 2 at host:port"]}   every 10 s
    {"go": true}                             when all workers have come to the point
    {"end": 2, "text": "…"}                  when the cluster ends, with exit status and error
"""

import contextlib
import importlib.metadata
import json
import selectors
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import ml_collections

from pipeline.cli.errors import Interrupted, StageError, UsageError
from pipeline.stages import manifest as manifest_lib
from trainer.cluster import peers, tf_config

_REPORT_EVERY_SECS, _CONNECT_SECS, _RETRY_SECS = 10, 10, 0.5
# Keys that may differ between workers: the data's path and placement on each machine.
_LOCAL_KEYS = ("data_dir", "data_placement")
_RESTART = "start the job again, and the run resumes from its newest checkpoint"


def _shared_settings(
    config: ml_collections.ConfigDict, cluster: tf_config.Cluster
) -> dict[str, Any]:
    """The settings that all workers have to agree on, key -> JSON value."""
    settings = {f"config.{k}": v for k, v in config.to_dict().items() if k not in _LOCAL_KEYS}
    if config.data_dir:  # Each worker's config_lib.check refuses an empty data_dir.
        manifest = manifest_lib.read_manifest(config.data_dir, "preprocess", "--data_dir")
        settings["dataset_id"] = manifest["dataset_id"]
    for package in ("vae-pipeline", "tensorflow", "keras"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            settings[f"version of {package}"] = importlib.metadata.version(package)
    settings |= {f"address of {worker.name}": worker.address for worker in cluster.workers}
    return manifest_lib.through_json(settings)


def _differences(settings_by_worker: dict[str, dict[str, Any]]) -> str:
    """The settings that differ between workers, as text; "" if all workers agree.

    Args:
      settings_by_worker: name of a worker -> its shared settings.
    """
    lines = []
    for key in sorted({key for settings in settings_by_worker.values() for key in settings}):
        names_by_value: dict[str, list[str]] = {}
        for name, settings in settings_by_worker.items():
            text = json.dumps(settings[key]) if key in settings else "missing"
            names_by_value.setdefault(text, []).append(name)
        if len(names_by_value) > 1:
            sides = (f"{text} at {', '.join(names)}" for text, names in names_by_value.items())
            lines.append(f"{key} is {' and '.join(sides)}")
    return "; ".join(lines)


def _report_missing(names: list[str]) -> None:
    if names:
        print(f"train: waiting for {', '.join(names)}", file=sys.stderr, flush=True)


def _timeout_error(names: list[str], timeout_secs: float) -> Interrupted:
    return Interrupted(
        f"{', '.join(names)} did not come within {timeout_secs:g} s (--join_timeout_secs); "
        f"{_RESTART}"
    )


class FirstWorker:
    """The rendezvous at the first worker, to which the others connect."""

    def __init__(self, cluster: tf_config.Cluster):
        """Prepares the rendezvous; `meet` opens the port."""
        self._workers = cluster.workers
        self._selector = selectors.DefaultSelector()
        self._strangers: set[peers.Peer] = set()  # Connections without a first message.
        self._peers: dict[int, peers.Peer] = {}  # By the index of a worker.
        self._rivals: dict[int, peers.Peer] = {}  # Have the index of a worker in `_peers`.
        self._waiting: set[int] = set()  # Workers that have come to the current point.
        self._have_met = False  # Whether all workers have met; an error if one ends after that.

    def meet(self, settings: dict[str, Any], timeout_secs: float) -> None:
        """See `meet`; settings are this worker's shared settings, key -> JSON value."""
        with peers.listen(self._workers[0]) as listener, self._passing_errors_on():
            self._selector.register(listener, selectors.EVENT_READ)
            self._wait(timeout_secs)
            self._selector.unregister(listener)
            for stranger in [*self._strangers]:
                self._drop(stranger)
            settings_by_worker = {self._workers[0].name: settings}
            for index, peer in sorted(self._peers.items()):
                settings_by_worker[self._name(index)] = peer.settings
            if differences := _differences(settings_by_worker):
                raise UsageError(
                    f"the workers of the cluster disagree: {differences}; start all workers with "
                    "the same flags, data set and packages"
                )
        self._have_met = True
        self._send_go()

    def start(self) -> None:
        """See `start`."""
        with self._passing_errors_on():
            self._wait(None)
        self._send_go()

    def close(self) -> None:
        """Ends the connections, so that the port is free for TensorFlow."""
        for peer in self._peers.values():
            peer.finish()
        self._selector.close()

    def _name(self, index: int) -> str:
        """Name of a worker, even of an index that is not in this worker's TF_CONFIG."""
        return self._workers[index].name if index < len(self._workers) else f"worker no. {index}"

    def _missing_names(self) -> list[str]:
        return [str(w) for i, w in enumerate(self._workers) if i and i not in self._waiting]

    def _send_go(self) -> None:
        for index in self._waiting:
            # The next point, or TensorFlow, will notice a lost worker.
            with contextlib.suppress(OSError):
                self._peers[index].send(go=True)
        self._waiting.clear()

    @contextlib.contextmanager
    def _passing_errors_on(self) -> Iterator[None]:
        """Sends an error to the connected workers, which end with the same error."""
        try:
            yield
        except StageError as error:
            everyone = {*self._peers.values(), *self._rivals.values(), *self._strangers}
            for peer in everyone:
                with contextlib.suppress(OSError):
                    peer.send(end=error.exit_status, text=str(error))
            for peer in everyone:
                peer.finish()
            raise

    def _wait(self, timeout_secs: float | None) -> None:
        """Receives messages until all workers have come to the current point.

        Raises:
          Interrupted: a worker has not come in time, or has ended after the first point.
          UsageError: two processes have the same index.
        """
        start_time = report_time = time.monotonic()
        while self._missing_names() or self._rivals:
            for key, _ in self._selector.select(1):
                if key.data:
                    self._receive(key.data)
                else:
                    self._accept(key.fileobj)
            now = time.monotonic()
            for peer in (*self._strangers, *(self._peers[index] for index in self._waiting)):
                if now - peer.last_message_time > peers.PATIENCE_SECS:
                    self._drop(peer)
            names = self._missing_names()
            if names and timeout_secs and now - start_time > timeout_secs:
                raise _timeout_error(names, timeout_secs)
            if now - report_time > _REPORT_EVERY_SECS:
                report_time = now
                _report_missing(names)
                for index in [*self._waiting]:
                    self._send_missing(self._peers[index], names)

    def _send_missing(self, peer: peers.Peer, names: list[str]) -> None:
        try:
            peer.send(missing=names)
        except OSError:
            self._drop(peer)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # The peer has already closed the connection.
            peer = peers.Peer(listener.accept()[0])
            self._strangers.add(peer)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _receive(self, peer: peers.Peer) -> None:
        try:
            for message in peer.receive():
                if peer.index is not None:
                    self._handle(message, peer)
                    continue
                index, peer.settings = message["index"], dict(message["about"])
                if type(index) is not int or index < 1:
                    raise ValueError(index)
                peer.index = index
                self._admit(peer)
        except (OSError, ValueError, KeyError, TypeError):
            self._drop(peer)

    def _admit(self, peer: peers.Peer) -> None:
        self._strangers.discard(peer)
        if peer.index in self._peers:
            self._rivals[peer.index] = peer
            # The worker was started again, unless the earlier process still answers.
            self._send_missing(self._peers[peer.index], [])
        else:
            self._peers[peer.index] = peer
            self._waiting.add(peer.index)

    def _handle(self, message: dict[str, Any], peer: peers.Peer) -> None:
        if message.get("ready"):
            self._waiting.add(peer.index)
        elif peer.index in self._rivals and self._peers.get(peer.index) is peer:
            raise UsageError(
                f"two processes have joined as {self._name(peer.index)}; start each worker of the "
                "cluster once (--index of trainer.join, or TF_CONFIG)"
            )

    def _drop(self, peer: peers.Peer) -> None:
        """Forgets a peer whose connection has ended, or that is not a worker."""
        if peer.connection.fileno() < 0:
            return  # An earlier message of the same round has dropped the peer.
        self._selector.unregister(peer.connection)
        peer.connection.close()
        self._strangers.discard(peer)
        if self._rivals.get(peer.index) is peer:
            del self._rivals[peer.index]
        if self._peers.get(peer.index) is not peer:
            return
        del self._peers[peer.index]
        self._waiting.discard(peer.index)
        if self._have_met:
            raise Interrupted(
                f"{self._workers[peer.index]} ended before TensorFlow's cluster was up; {_RESTART}"
            )
        if rival := self._rivals.pop(peer.index, None):
            self._admit(rival)


class OtherWorker:
    """The rendezvous at a worker that connects to the first worker."""

    def __init__(self, cluster: tf_config.Cluster):
        """Prepares the rendezvous; `meet` connects."""
        self._cluster, self._first = cluster, cluster.workers[0]
        self._peer: peers.Peer | None = None

    def meet(self, settings: dict[str, Any], timeout_secs: float) -> None:
        """See `meet`; settings are this worker's shared settings, key -> JSON value."""
        # Fails early if TensorFlow could not open this port later.
        peers.listen(self._cluster.workers[self._cluster.index]).close()
        report_time = time.monotonic()
        deadline = report_time + timeout_secs
        while (secs_left := deadline - time.monotonic()) > 0:
            address = self._first.host, self._first.port
            try:
                connection = socket.create_connection(address, min(secs_left, _CONNECT_SECS))
                self._peer = peers.Peer(connection)
                self._peer.send(index=self._cluster.index, about=settings)
                self._wait(deadline)
                return
            except (OSError, ValueError):  # The first worker does not listen yet, or has ended.
                self.close()
            if time.monotonic() - report_time > _REPORT_EVERY_SECS:
                report_time = time.monotonic()
                _report_missing([str(self._first)])
            time.sleep(min(_RETRY_SECS, secs_left))
        raise _timeout_error([str(self._first)], timeout_secs)

    def start(self) -> None:
        """See `start`."""
        try:
            self._peer.send(ready=True)
            self._wait(None)
        except (OSError, ValueError) as error:
            raise Interrupted(
                f"{self._first} ended before TensorFlow's cluster was up; {_RESTART}"
            ) from error

    def close(self) -> None:
        """Ends the connection."""
        if self._peer:
            self._peer.connection.close()

    def _wait(self, deadline: float | None) -> None:
        """Answers the first worker until it sends `go`; raises the error that it sends instead."""
        while deadline is None or time.monotonic() < deadline:
            secs_left = peers.PATIENCE_SECS if deadline is None else deadline - time.monotonic()
            for message in self._peer.receive(min(secs_left, peers.PATIENCE_SECS)):
                if message.get("go"):
                    return
                if "end" in message:
                    self.close()  # The first worker waits for this.
                    kinds = {kind.exit_status: kind for kind in (UsageError, Interrupted)}
                    raise kinds.get(message["end"], StageError)(str(message.get("text")))
                if names := message.get("missing"):
                    _report_missing(names)
                self._peer.send()


# Set between `meet` and `start`; a process belongs to one cluster.
_rendezvous: FirstWorker | OtherWorker | None = None


def meet(config: ml_collections.ConfigDict, *, timeout_secs: float) -> None:
    """Waits for all workers of TF_CONFIG, and compares their settings.

    A signal ends the wait, see command.run. Every 10 s the names of missing workers are printed.

    Args:
      config: this worker's config; data_dir and data_placement may differ between workers.
      timeout_secs: how long to wait.

    Raises:
      UsageError: TF_CONFIG is malformed, or the workers disagree; raised at all workers.
      StageError: the port of this worker is in use, or data_dir is not a finished data set.
      Interrupted: a worker did not come in time.
    """
    global _rendezvous
    cluster = tf_config.read()
    rendezvous = OtherWorker(cluster) if cluster.index else FirstWorker(cluster)
    rendezvous.meet(_shared_settings(config, cluster), timeout_secs)
    _rendezvous = rendezvous


def start() -> None:
    """Waits until all workers that have met are about to start TensorFlow's cluster.

    Raises:
      Interrupted: a worker has ended since `meet`.
    """
    global _rendezvous
    if _rendezvous:
        _rendezvous.start()
        _rendezvous.close()
        _rendezvous = None
