"""A cluster that takes Beam jobs, whichever engine it is, for a block or until ^C."""

import contextlib
import json
import pathlib
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator

from tests.engines.processes import HOST, ClusterError, Processes, free_ports, listens

NUM_WORKERS = 2


class Cluster(Processes):
    """An engine of two workers, Beam's job server and a pool of Python workers, all on loopback."""

    def __init__(self, directory: pathlib.Path):
        """Takes an empty or new directory for configuration, logs and scratch files."""
        super().__init__(directory)
        ports = free_ports(5)
        self._job_port, self._artifact_port, self._expansion_port, self._pool_port = ports[:4]
        self.page_port = ports[4]  # Where the engine says how it is.

    def flags(self) -> list[str]:
        """What a stage's command needs to run here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={HOST}:{self._job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config={HOST}:{self._pool_port}",
            # Else each step of a job starts Python workers of its own.
            "--environment_cache_millis=60000",
        ]

    def job_server_flags(self) -> list[str]:
        """What Beam's job server of any engine needs."""
        return [
            f"--job-host={HOST}",
            f"--job-port={self._job_port}",
            f"--artifact-port={self._artifact_port}",
            f"--expansion-port={self._expansion_port}",
            f"--artifacts-dir={self.scratch / 'artifacts'}",
        ]

    def start_engine(self) -> None:
        """Starts the engine without its workers, and the job server."""
        raise NotImplementedError

    def start_worker(self, number: int) -> None:
        """Starts "worker-0" or "worker-1"; again, if it was killed."""
        raise NotImplementedError

    def num_workers(self) -> int:
        """How many workers the engine knows; OSError if it does not answer."""
        raise NotImplementedError

    def jobs(self) -> list[str]:
        """State of each job there was."""
        raise NotImplementedError

    def start_pool(self) -> None:
        """Starts the pool of Python workers, again if it was killed."""
        self.start_worker_pool(self._pool_port)

    def start_all(self) -> None:
        """Starts everything and waits until it takes jobs; raises ClusterError."""
        self.start_engine()
        for number in range(NUM_WORKERS):
            self.start_worker(number)
        self.start_pool()
        self.wait_whole()

    def wait_whole(self) -> None:
        """Until all workers are registered, and job server and pool listen."""
        self.wait(self._is_whole)

    def _is_whole(self) -> bool:
        with contextlib.suppress(OSError):  # It does not answer yet.
            ports = (self._job_port, self._pool_port)
            return self.num_workers() == NUM_WORKERS and all(map(listens, ports))
        return False

    def page(self, path: str) -> dict:
        """What the engine says of itself, as JSON."""
        url = f"http://{HOST}:{self.page_port}{path}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return json.load(answer)


@contextlib.contextmanager
def running(
    cluster_class: Callable[[pathlib.Path], Cluster], directory: pathlib.Path
) -> Iterator[Cluster]:
    """A cluster for the time of a block; none of its processes lives on.

    Raises:
      ClusterError: it cannot be started.
    """
    cluster = cluster_class(directory)
    try:
        cluster.start_all()
        yield cluster
    finally:
        cluster.stop()


def main(name: str, cluster_class: Callable[[pathlib.Path], Cluster]) -> None:
    """Runs a cluster until ^C or SIGTERM, with its files in the directory that argv names."""
    if len(sys.argv) != 2:
        raise SystemExit(f"{name}: expected one argument, a directory for the cluster's files")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(cluster_class, pathlib.Path(sys.argv[1]).absolute()) as cluster:
            print(f"{name}: http://{HOST}:{cluster.page_port} is up; ^C stops it. Flags:")
            print(" ".join(cluster.flags()), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
    except ClusterError as error:
        raise SystemExit(f"{name}: {error}") from error
