"""Workers that meet before TensorFlow, as processes and as threads with real connections."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading

import pytest

from pipeline.cli.errors import Interrupted, StageError, UsageError
from tests.conftest import REPOSITORY, make_shards
from tests.engines.processes import free_ports
from trainer.cluster import peers, rendezvous, tf_config


class Result(threading.Thread):
    """A call in a thread of its own."""

    def __init__(self, call, *args):
        super().__init__(daemon=True)
        self._call, self._args, self.error = call, args, None
        self.start()

    def run(self) -> None:
        try:
            self._call(*self._args)
        except StageError as error:
            self.error = error

    def wait(self) -> StageError | None:
        """The error that it ended with, or None."""
        self.join(60)
        assert not self.is_alive()
        return self.error


class Cluster:
    """The rendezvous of some workers of this machine."""

    def __init__(self, num_workers: int):
        self._addresses = [
            tf_config.Worker("worker", number, "localhost", port)
            for number, port in enumerate(free_ports(num_workers))
        ]
        self.begin()

    def begin(self) -> None:
        """Begins anew, as after a restart."""
        self.workers = [
            (rendezvous.OtherWorker if index else rendezvous.FirstWorker)(
                tf_config.Cluster(self._addresses, index)
            )
            for index in range(len(self._addresses))
        ]

    def meet(self, index: int, *, timeout_secs: float = 60, **settings) -> Result:
        return Result(self.workers[index].meet, settings, timeout_secs)

    def connect(self) -> socket.socket:
        """A connection to the first worker, once it listens."""
        for _ in range(1000):
            try:
                return socket.create_connection(("localhost", self._addresses[0].port))
            except ConnectionRefusedError:
                threading.Event().wait(0.01)
        raise AssertionError("nobody listens")

    def close(self) -> None:
        for worker in self.workers:
            Result(worker.close)


def report_more_often(monkeypatch) -> None:
    monkeypatch.setattr(rendezvous, "_REPORT_EVERY_SECS", 0)
    monkeypatch.setattr(rendezvous, "_RETRY_SECS", 0.05)


def hello(index: object, settings: object = None) -> bytes:
    message = {"vae-pipeline rendezvous": 1, "index": index, "about": settings or {}}
    return json.dumps(message).encode() + b"\n"


def test_workers_meet_and_start_together_again_and_again_on_the_same_ports(monkeypatch):
    report_more_often(monkeypatch)
    cluster = Cluster(3)
    for _ in range(3):
        cluster.begin()
        met = [cluster.meet(index, seed=1) for index in (2, 0, 1)]
        assert [call.wait() for call in met] == [None] * 3
        started = [Result(cluster.workers[index].start) for index in (1, 2, 0)]
        assert [call.wait() for call in started] == [None] * 3
        closed = [Result(worker.close) for worker in cluster.workers]
        assert [call.wait() for call in closed] == [None] * 3


def test_those_who_are_missing_are_named_and_waited_for_no_longer_than_said(monkeypatch, capfd):
    report_more_often(monkeypatch)
    cluster = Cluster(3)
    met = [cluster.meet(0, timeout_secs=2), cluster.meet(1)]
    for error in (call.wait() for call in met):
        assert isinstance(error, Interrupted)
        assert re.match(
            r"worker 2 at localhost:\d+ did not come within 2 s \(--join_tim", str(error)
        )
    stderr = capfd.readouterr().err
    assert stderr.count("train: waiting for worker 2 at localhost:") > 1
    error = Cluster(2).meet(1, timeout_secs=0.3).wait()
    assert str(error).startswith("worker 0 at localhost:")
    assert "train: waiting for worker 0 at localhost:" in capfd.readouterr().err


@pytest.mark.parametrize(
    "junk",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\0" * 100 + b"\n",
        b"[" * 100_000 + b"\n",
        b"null\n",
        b'{"index": 1, "about": {}}\n',
        hello("1"),
        hello(-1),
        hello(True),
        hello(1, "text"),
        hello(float("inf")),
        hello(1)[:-1],  # Half a message.
        hello(1),  # A worker that ends again.
    ],
    ids=lambda junk: junk[:40].decode(errors="replace"),
)
def test_strangers_and_workers_that_end_again_are_forgotten(junk):
    cluster = Cluster(3)
    first = cluster.meet(0)
    with cluster.connect() as stranger, cluster.connect():  # And one who says nothing.
        stranger.sendall(junk)
        stranger.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):  # It had more to say.
            assert stranger.recv(100) == b""
        met = [first, cluster.meet(1), cluster.meet(2)]
        assert [call.wait() for call in met] == [None] * 3
    cluster.close()


def test_a_line_that_does_not_end_is_cut_off():
    cluster = Cluster(2)
    first = cluster.meet(0)
    with cluster.connect() as stranger, pytest.raises(ConnectionError):
        for _ in range(64):
            stranger.sendall(b"x" * (1 << 20))
    assert [call.wait() for call in (first, cluster.meet(1))] == [None] * 2
    cluster.close()


def test_a_worker_that_ends_between_the_points_ends_the_others():
    cluster = Cluster(3)
    met = [cluster.meet(index) for index in range(3)]
    assert [call.wait() for call in met] == [None] * 3
    waiting = [Result(cluster.workers[index].start) for index in (0, 2)]
    cluster.workers[1].close()
    for call in waiting:
        error = call.wait()
        assert isinstance(error, Interrupted)
        assert re.match(r"worker 1 at localhost:\d+ ended before TensorFlow's clu", str(error))


def test_the_first_worker_that_ends_between_the_points_is_named():
    cluster = Cluster(2)
    met = [cluster.meet(index) for index in range(2)]
    assert [call.wait() for call in met] == [None] * 2
    cluster.close()
    error = Result(cluster.workers[1].start).wait()
    assert isinstance(error, Interrupted)
    assert re.match(r"worker 0 at localhost:\d+ ended before TensorFlow's cluster", str(error))


def test_another_format_of_the_rendezvous_is_an_error_of_all():
    cluster = Cluster(2)
    first = cluster.meet(0)
    with cluster.connect() as newer:
        newer.sendall(b'{"vae-pipeline rendezvous": 2}\n')
        assert json.loads(newer.makefile().readline())["end"] == 2
    error = first.wait()
    assert isinstance(error, UsageError)
    assert "format 2 of the rendezvous, expected 1" in str(error)


def start(data_dir, tmp_path, ports, index, *flags) -> subprocess.Popen:
    """Starts a worker as a scheduler does."""
    addresses = [f"localhost:{port}" for port in ports]
    config = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "trainer.main", "--config=configs/smoke.py"),
            *(f"--config.data_dir={data_dir}", f"--workdir={tmp_path / 'run'}"),
            *("--config.strategy=multi_worker", *flags),
        ],
        cwd=REPOSITORY,
        env={**os.environ, "TF_CONFIG": json.dumps(config)},
        stderr=subprocess.PIPE,
        text=True,
    )


def ends_of(workers: list[subprocess.Popen]) -> list[tuple[int, str]]:
    outputs = [worker.communicate()[1] for worker in workers]
    return [(worker.returncode, text) for worker, text in zip(workers, outputs, strict=True)]


def test_workers_that_disagree_end_with_2_and_what_differs(data_dir, idx_dir, tmp_path):
    other_dir = tmp_path / "data"
    make_shards(f"idx:{idx_dir}", other_dir, seed=1)
    ports = free_ports(3)
    flags = ["--config.seed=7", "--config.beta=3", "--config.data_placement=memory_mapped"]
    workers = [
        start(data_dir, tmp_path, ports, 0),
        start(other_dir, tmp_path, ports, 1, *flags),
        # One that knows of a fourth.
        start(data_dir, tmp_path, [*ports, 1], 2, "--config.seed=7"),
    ]
    ids = [
        json.loads((d / "manifest.json").read_text())["dataset_id"] for d in (data_dir, other_dir)
    ]
    for status, text in ends_of(workers):
        assert (status, text.count("\n")) == (2, 1), text
        assert "address of worker 3 is missing at worker 0, worker 1 and " in text
        assert re.search(
            r"config\.beta is 0\.\d+ at worker 0, worker 2 and 3\.0 at worker 1;", text
        )
        assert "config.seed is 0 at worker 0 and 7 at worker 1, worker 2;" in text
        assert f'dataset_id is "{ids[0]}" at worker 0, worker 2 and "{ids[1]}" at worker 1;' in text
        assert "data_dir" not in text
        assert "data_placement" not in text
    assert not (tmp_path / "run").exists()


def test_two_processes_of_one_number_are_an_error_of_all(data_dir, tmp_path):
    ports = free_ports(3)
    workers = [start(data_dir, tmp_path, ports, index) for index in (0, 1, 1)]
    for status, text in ends_of(workers):
        assert (status, text.count("\n")) == (2, 1), text
        assert "train: two processes have joined as worker 1; start each worker of the" in text


def test_a_port_in_use_is_named(data_dir, tmp_path):
    with socket.create_server(("localhost", 0)) as taken:
        port = taken.getsockname()[1]
        ends = ends_of(
            [
                start(data_dir, tmp_path, [port, *free_ports(1)], 0),
                start(data_dir, tmp_path, [*free_ports(1), port], 1),
            ]
        )
    for index, (status, text) in enumerate(ends):
        assert (status, text.count("\n")) == (1, 1), text
        assert f"train: worker {index} at localhost:{port}: cannot listen on this port (" in text


def test_a_signal_ends_the_wait_at_once(data_dir, tmp_path):
    ports = free_ports(2)
    # The second worker waits for a first one that takes its message and says nothing.
    with socket.create_server(("localhost", ports[0])) as server:
        other = start(data_dir, tmp_path, ports, 1)
        with server.accept()[0] as connection:
            assert json.loads(connection.makefile().readline())["index"] == 1
            other.send_signal(signal.SIGTERM)
            ((status, text),) = ends_of([other])
            assert (status, text.count("stopped by SIGTERM")) == (75, 1)
    # The first one waits for the second, and hears a stranger meanwhile.
    first = start(data_dir, tmp_path, ports, 0)
    for _ in range(6000):
        try:
            stranger = socket.create_connection(("localhost", ports[0]))
            break
        except ConnectionRefusedError:
            threading.Event().wait(0.01)
    with stranger:
        stranger.sendall(b"junk\n")
        assert stranger.recv(100) == b""
        first.send_signal(signal.SIGINT)
        ((status, text),) = ends_of([first])
        assert (status, text.count("stopped by SIGINT")) == (75, 1)


def test_a_peer_that_never_stops_sending_does_not_delay_the_end(monkeypatch):
    monkeypatch.setattr(peers, "_FINISH_SECS", 0.3)
    server = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(server.getsockname())
    ended = threading.Event()

    def send() -> None:
        with contextlib.suppress(OSError):
            while not ended.wait(0.05):
                sender.send(b"x")

    thread = threading.Thread(target=send, daemon=True)
    thread.start()
    ender = threading.Thread(target=peers.Peer(server.accept()[0]).finish, daemon=True)
    ender.start()
    ender.join(60)
    assert not ender.is_alive()
    ended.set()
    thread.join()


@pytest.mark.parametrize(
    "value",
    [
        "",
        "{}",
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 1}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "evaluator", "index": 0}}',
        '{"cluster": {"worker": ["a:1"]}, "task": {"type": "worker", "index": 0.9}}',
        '{"cluster": {"worker": ["a"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": ["a:70000"]}, "task": {"type": "worker", "index": 0}}',
        '{"cluster": {"worker": [1]}, "task": {"type": "worker", "index": 0}}',
    ],
)
def test_a_malformed_tf_config_is_refused(monkeypatch, value):
    monkeypatch.setenv("TF_CONFIG", value)
    with pytest.raises(UsageError, match="TF_CONFIG=.*: expected"):
        tf_config.read()


def test_a_chief_comes_before_the_workers(monkeypatch):
    cluster = {"worker": ["[::1]:5", "b:6"], "chief": ["c:7"]}
    task = {"type": "worker", "index": 1}
    monkeypatch.setenv("TF_CONFIG", json.dumps({"cluster": cluster, "task": task}))
    workers, index = tf_config.read()
    assert [str(w) for w in workers] == ["chief 0 at c:7", "worker 0 at [::1]:5", "worker 1 at b:6"]
    assert (index, workers[1].host) == (2, "::1")
