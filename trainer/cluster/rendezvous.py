"""The workers of a cluster meet before TensorFlow starts.

TensorFlow waits an hour for a worker that never comes, and Python hears no signal in that time;
workers whose configs differ it trains to the end. So the workers meet here first, at two points:
`meet`, before TensorFlow is imported, is where all say what they are about to do, and `start`,
just before TensorFlow's cluster, is where all have come through what may fail on one of them
alone.

The first worker of the cluster listens on the port of its address, which TensorFlow takes over
afterwards; the others connect to it. Every message is one line of JSON. The first worker is sent

    {"index": 1, "about": {…}}   once, by a worker that comes to the first point
    {"ready": true}              once, by a worker that comes to the second point
    {}                           as the answer of a worker that waits

and sends to the workers that wait

    {"missing": ["worker 2 at host:port"]}   every 10 s
    {"go": true}                             when all have come
    {"end": 2, "text": "…"}                  when the cluster ends, with the exit status
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

_SAY_EVERY_SECS, _CONNECT_SECS, _RETRY_SECS = 10, 10, 0.5
# Keys that may differ: where the data lie on each machine.
_OWN_KEYS = ("data_dir", "data_placement")
_GO_ON = "start the job again, the run goes on from its newest checkpoint"


def _about(config: ml_collections.ConfigDict, cluster: tf_config.Cluster) -> dict[str, Any]:
    """What all workers have to agree on, key -> JSON value."""
    about = {f"config.{k}": v for k, v in config.to_dict().items() if k not in _OWN_KEYS}
    if config.data_dir:  # Else config_lib.check will say so, to each worker.
        manifest = manifest_lib.read_manifest(config.data_dir, "preprocess", "data_dir")
        about["dataset_id"] = manifest["dataset_id"]
    for package in ("vae-pipeline", "tensorflow", "keras"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            about[f"version of {package}"] = importlib.metadata.version(package)
    about |= {f"address of {worker.name}": worker.address for worker in cluster.workers}
    return manifest_lib.through_json(about)


def _differences(abouts: dict[str, dict[str, Any]]) -> str:
    """What differs between workers, name of a worker -> what it is about; "" if nothing does."""
    lines = []
    for key in sorted({key for about in abouts.values() for key in about}):
        values: dict[str, list[str]] = {}
        for name, about in abouts.items():
            text = json.dumps(about[key]) if key in about else "not there"
            values.setdefault(text, []).append(name)
        if len(values) > 1:
            sides = (f"{text} at {', '.join(names)}" for text, names in values.items())
            lines.append(f"{key} is {' and '.join(sides)}")
    return "; ".join(lines)


def _say_missing(names: list[str]) -> None:
    if names:
        print(f"train: waiting for {', '.join(names)}", file=sys.stderr, flush=True)


def _late(names: list[str], timeout_secs: float) -> Interrupted:
    return Interrupted(
        f"{', '.join(names)} did not come within {timeout_secs:g} s (--join_timeout_secs); {_GO_ON}"
    )


class First:
    """The rendezvous at the worker that the others connect to."""

    def __init__(self, cluster: tf_config.Cluster):
        """Takes the cluster; nothing listens yet."""
        self._workers = cluster.workers
        self._selector = selectors.DefaultSelector()
        self._strangers: set[peers.Peer] = set()  # Connected, and have not said who they are.
        self._peers: dict[int, peers.Peer] = {}  # By the index of a worker.
        self._rivals: dict[int, peers.Peer] = {}  # Say that they are a worker who is there.
        self._waiting: set[int] = set()  # Workers that have come to the point.
        self._have_met = False  # All of them, so that whoever goes now is missed.

    def meet(self, about: dict[str, Any], timeout_secs: float) -> None:
        """See `meet`; about is what all workers have to agree on, key -> JSON value."""
        with peers.listen(self._workers[0]) as listener, self._telling_others():
            self._selector.register(listener, selectors.EVENT_READ)
            self._wait(timeout_secs)
            self._selector.unregister(listener)
            for stranger in [*self._strangers]:
                self._drop(stranger)
            abouts = {self._workers[0].name: about}
            for index, peer in sorted(self._peers.items()):
                abouts[self._name(index)] = peer.about
            if differ := _differences(abouts):
                raise UsageError(
                    f"the workers of the cluster disagree: {differ}; start all of them with the "
                    "same flags, data set and packages"
                )
        self._have_met = True
        self._let_go()

    def start(self) -> None:
        """See `start`."""
        with self._telling_others():
            self._wait(None)
        self._let_go()

    def close(self) -> None:
        """Ends the connections; the port is free for TensorFlow then."""
        for peer in self._peers.values():
            peer.finish()
        self._selector.close()

    def _name(self, index: int) -> str:
        """Name of a worker, who may be none of this cluster by what TF_CONFIG says here."""
        return self._workers[index].name if index < len(self._workers) else f"worker no. {index}"

    def _missing(self) -> list[str]:
        return [str(w) for i, w in enumerate(self._workers) if i and i not in self._waiting]

    def _let_go(self) -> None:
        for index in self._waiting:
            with contextlib.suppress(OSError):  # Found at the next point, or by TensorFlow.
                self._peers[index].send(go=True)
        self._waiting.clear()

    @contextlib.contextmanager
    def _telling_others(self) -> Iterator[None]:
        """Passes an error on to the workers that wait, who end with the same."""
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
        """Hears the others until all have come to the point.

        Raises:
          Interrupted: they have not in time, or one has gone that had passed the first point.
          UsageError: two processes say that they are the same worker.
        """
        began = said = time.monotonic()
        while self._missing() or self._rivals:
            for key, _ in self._selector.select(1):
                if key.data:
                    self._hear(key.data)
                else:
                    self._accept(key.fileobj)
            now = time.monotonic()
            for peer in (*self._strangers, *(self._peers[index] for index in self._waiting)):
                if now - peer.heard > peers.PATIENCE_SECS:
                    self._drop(peer)
            missing = self._missing()
            if missing and timeout_secs and now - began > timeout_secs:
                raise _late(missing, timeout_secs)
            if now - said > _SAY_EVERY_SECS:
                said = now
                _say_missing(missing)
                for index in [*self._waiting]:
                    self._send_missing(self._peers[index], missing)

    def _send_missing(self, peer: peers.Peer, missing: list[str]) -> None:
        try:
            peer.send(missing=missing)
        except OSError:
            self._drop(peer)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # Who came is gone again.
            peer = peers.Peer(listener.accept()[0])
            self._strangers.add(peer)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _hear(self, peer: peers.Peer) -> None:
        try:
            for message in peer.hear():
                if peer.index is not None:
                    self._hear_known(peer, message)
                    continue
                index, peer.about = message["index"], dict(message["about"])
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
            # A worker that was started again, unless the one that is there still answers.
            self._send_missing(self._peers[peer.index], [])
        else:
            self._peers[peer.index] = peer
            self._waiting.add(peer.index)

    def _hear_known(self, peer: peers.Peer, message: dict[str, Any]) -> None:
        if message.get("ready"):
            self._waiting.add(peer.index)
        elif peer.index in self._rivals and self._peers.get(peer.index) is peer:
            raise UsageError(
                f"two processes say that they are {self._name(peer.index)}; start each worker of "
                "the cluster once (--index of trainer.join, else TF_CONFIG)"
            )

    def _drop(self, peer: peers.Peer) -> None:
        """Forgets a peer whose connection has ended, or that is none of ours."""
        if peer.connection.fileno() < 0:
            return  # Forgotten already, while other news of that moment were heard.
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
                f"{self._workers[peer.index]} ended before TensorFlow's cluster was up; {_GO_ON}"
            )
        if rival := self._rivals.pop(peer.index, None):
            self._admit(rival)


class Other:
    """The rendezvous at a worker that connects to the first one."""

    def __init__(self, cluster: tf_config.Cluster):
        """Takes the cluster; nothing is connected yet."""
        self._cluster, self._first = cluster, cluster.workers[0]
        self._peer: peers.Peer | None = None

    def meet(self, about: dict[str, Any], timeout_secs: float) -> None:
        """See `meet`; about is what all workers have to agree on, key -> JSON value."""
        peers.listen(self._cluster.workers[self._cluster.index]).close()  # TensorFlow's to be.
        began = said = time.monotonic()
        while (left := began + timeout_secs - time.monotonic()) > 0:
            address = self._first.host, self._first.port
            try:
                connection = socket.create_connection(address, min(left, _CONNECT_SECS))
                self._peer = peers.Peer(connection)
                self._peer.send(index=self._cluster.index, about=about)
                self._wait(until=began + timeout_secs)
                return
            except (OSError, ValueError):  # The first worker is not there yet, or gone again.
                self.close()
            if time.monotonic() - said > _SAY_EVERY_SECS:
                said = time.monotonic()
                _say_missing([str(self._first)])
            time.sleep(min(_RETRY_SECS, left))
        raise _late([str(self._first)], timeout_secs)

    def start(self) -> None:
        """See `start`."""
        try:
            self._peer.send(ready=True)
            self._wait(until=None)
        except (OSError, ValueError) as error:
            raise Interrupted(
                f"{self._first} ended before TensorFlow's cluster was up; {_GO_ON}"
            ) from error

    def close(self) -> None:
        """Ends the connection."""
        if self._peer:
            self._peer.connection.close()

    def _wait(self, until: float | None) -> None:
        """Answers the first worker until it lets this one go on, or ends it."""
        while until is None or time.monotonic() < until:
            left = peers.PATIENCE_SECS if until is None else until - time.monotonic()
            for message in self._peer.hear(min(left, peers.PATIENCE_SECS)):
                if message.get("go"):
                    return
                if "end" in message:
                    self.close()  # For which the first worker waits.
                    kinds = {kind.exit_status: kind for kind in (UsageError, Interrupted)}
                    raise kinds.get(message["end"], StageError)(str(message.get("text")))
                if missing := message.get("missing"):
                    _say_missing(missing)
                self._peer.send()


# Between `meet` and `start`; a process is a worker of one cluster.
_met: First | Other | None = None


def meet(config: ml_collections.ConfigDict, *, timeout_secs: float) -> None:
    """Waits for all workers that TF_CONFIG names, and compares what they are about to do.

    A signal ends the wait as command.run says. Who is missing is said every 10 s.

    Args:
      config: of this worker; where its data lie may be its own.
      timeout_secs: how long to wait.

    Raises:
      UsageError: TF_CONFIG is malformed, or the workers disagree; at all workers alike.
      StageError: the port of this worker is taken, or the data set is none.
      Interrupted: a worker did not come in time.
    """
    global _met
    cluster = tf_config.read()
    rendezvous = Other(cluster) if cluster.index else First(cluster)
    rendezvous.meet(_about(config, cluster), timeout_secs)
    _met = rendezvous


def start() -> None:
    """Waits until all workers that have met are about to start TensorFlow's cluster.

    Raises:
      Interrupted: one of them has ended since.
    """
    global _met
    if _met:
        _met.start()
        _met.close()
        _met = None
