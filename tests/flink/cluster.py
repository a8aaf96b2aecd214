"""A standalone Flink cluster with Beam's job server and Python workers, all on 127.0.0.1.

    python -m tests.flink.cluster DIRECTORY

starts it, prints the flags that a stage needs, and stops all of it on ^C. Everything that it
writes lies in DIRECTORY: `conf/`, `log/`, `scratch/`. `make test-flink` fetches what it
runs: a Flink distribution and the jars of Beam's runner. What Flink is told stands in
configuration.py.
"""

import contextlib
import ctypes
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator

from tests.flink import configuration
from tests.flink.configuration import HOST, JAVA_FLAGS

REPOSITORY = pathlib.Path(__file__).parents[2]
# Of two slots each, so that a job of two still has room when one of the two is gone.
NUM_TASK_MANAGERS = 2
NUM_SLOTS = 2
_READY_SECS = 120
_PR_SET_PDEATHSIG = 1


class ClusterError(Exception):
    """The cluster cannot be started."""


def distribution() -> pathlib.Path:
    """Where `make test-flink` puts what a cluster runs; FLINK_DIR names another place.

    Raises:
      ClusterError: it is not there.
    """
    place = pathlib.Path(os.environ.get("FLINK_DIR", REPOSITORY / "build" / "flink"))
    if not (place / "ready").exists():
        raise ClusterError(f"{place}: no Flink there; `make test-flink` fetches it")
    return place


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def _die_with_parent() -> None:
    """In a child: it is killed when whoever started it is gone, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class FlinkCluster:
    """Job manager, task managers, job server and worker pools, a process each."""

    def __init__(self, directory: pathlib.Path):
        """Takes an empty or new directory for configuration, logs and scratch files."""
        self.directory = directory
        self._place = distribution()
        self.processes: dict[str, subprocess.Popen] = {}
        ports = free_ports(7)
        self.rest_port, rpc_port, blob_port = ports[:3]
        self.job_port, self._artifact_port, self._expansion_port, self.pool_port = ports[3:]
        for name in ("conf", "log", "scratch"):
            (directory / name).mkdir(parents=True, exist_ok=True)
        configuration.write(
            directory,
            rpc_port=rpc_port,
            rest_port=self.rest_port,
            blob_port=blob_port,
            num_slots=NUM_SLOTS,
        )

    def flags(self) -> list[str]:
        """What a stage's command needs to run here."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint={HOST}:{self.job_port}",
            "--environment_type=EXTERNAL",
            f"--environment_config={HOST}:{self.pool_port}",
            f"--flink_master={HOST}:{self.rest_port}",
            "--parallelism=2",
        ]

    def _start(self, name: str, command: list[str], **environment: str) -> None:
        log = self.directory / "log" / f"{name}.log"
        with open(log, "ab") as file:
            self.processes[name] = subprocess.Popen(
                command,
                # Nothing may depend on where a worker stands.
                cwd=self.directory / "scratch",
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "TMPDIR": str(self.directory / "scratch"), **environment},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def _start_java(self, name: str, main: str, *arguments: object, jars: str, heap: str) -> None:
        conf, scratch = self.directory / "conf", self.directory / "scratch"
        command = ["java", f"-Xmx{heap}", *JAVA_FLAGS, f"-Djava.io.tmpdir={scratch}"]
        command += [f"-Dlog4j.configurationFile={conf / 'log4j.properties'}"]
        command += ["-cp", jars, main, *map(str, arguments)]
        self._start(name, command, FLINK_CONF_DIR=str(conf))

    def start_task_manager(self, number: int) -> None:
        """Starts one; again, if one of that number was killed."""
        self._start_java(
            f"task-manager-{number}",
            "org.apache.flink.runtime.taskexecutor.TaskManagerRunner",
            "--configDir",
            self.directory / "conf",
            jars=f"{self._place}/pyflink/lib/*",
            heap="768m",
        )

    def start_worker_pool(self) -> None:
        """Starts the pool of Python workers."""
        self._start(
            "worker-pool",
            [sys.executable, "-m", "tests.flink.worker_pool", str(self.pool_port)],
            PYTHONPATH=str(REPOSITORY),
            # The pool starts its workers as `python`.
            PATH=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )

    def start(self) -> None:
        """Starts everything and waits until it takes jobs.

        Raises:
          ClusterError: a process ended, or is not ready in two minutes.
        """
        conf = self.directory / "conf"
        flink = f"{self._place}/pyflink/lib/*"
        main = "org.apache.flink.runtime.entrypoint.StandaloneSessionClusterEntrypoint"
        self._start_java("job-manager", main, "--configDir", conf, jars=flink, heap="768m")
        for number in range(NUM_TASK_MANAGERS):
            self.start_task_manager(number)
        self._start_java(
            "job-server",
            "org.apache.beam.runners.flink.FlinkJobServerDriver",
            f"--flink-master={HOST}:{self.rest_port}",
            f"--flink-conf-dir={conf}",
            f"--job-host={HOST}",
            f"--job-port={self.job_port}",
            f"--artifact-port={self._artifact_port}",
            f"--expansion-port={self._expansion_port}",
            f"--artifacts-dir={self.directory / 'scratch' / 'artifacts'}",
            jars=f"{self._place}/job-server/*",
            heap="768m",
        )
        self.start_worker_pool()
        self.wait()

    def wait(self) -> None:
        """Until all task managers are registered, and job server and pool listen."""
        pause, tick = threading.Event(), 0.1
        for _ in range(int(_READY_SECS / tick)):
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise ClusterError(f"{name} ended with {process.poll()}: {self.log_tail(name)}")
            listening = all(map(_listens, (self.job_port, self.pool_port)))
            if listening and self.num_task_managers() == NUM_TASK_MANAGERS:
                return
            pause.wait(tick)
        raise ClusterError(f"not ready after {_READY_SECS} s; see {self.directory / 'log'}")

    def rest(self, path: str) -> dict:
        """What Flink's REST interface answers, as JSON."""
        with urllib.request.urlopen(f"http://{HOST}:{self.rest_port}{path}", timeout=10) as answer:
            return json.load(answer)

    def num_task_managers(self) -> int:
        """How many task managers the job manager knows."""
        try:
            return self.rest("/overview")["taskmanagers"]
        except OSError:
            return 0

    def jobs(self) -> dict[str, str]:
        """State of each job, by Flink's id."""
        return {job["id"]: job["status"] for job in self.rest("/jobs")["jobs"]}

    def log_tail(self, name: str) -> str:
        """The end of a process' log."""
        text = (self.directory / "log" / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-10:])

    def workers(self) -> list[int]:
        """Processes that the pool has started."""
        pool = self.processes["worker-pool"].pid
        children = pathlib.Path(f"/proc/{pool}/task").glob("*/children")
        return [int(number) for path in children for number in path.read_text().split()]

    def kill(self, name: str) -> None:
        """Kills one process, -9, and what it started."""
        process = self.processes[name]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Kills everything: nothing of it has any use after the cluster."""
        for name in list(self.processes):
            self.kill(name)


def _listens(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1).close()
        return True
    except OSError:
        return False


@contextlib.contextmanager
def running(directory: pathlib.Path) -> Iterator[FlinkCluster]:
    """A cluster for the time of a block; none of its processes lives on."""
    cluster = FlinkCluster(directory)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def main(directory: str) -> None:
    """Runs a cluster until ^C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with running(pathlib.Path(directory).absolute()) as cluster:
            print(
                f"flink: http://{HOST}:{cluster.rest_port} is up; ^C stops it. Flags for a stage:"
            )
            print(" ".join(cluster.flags()), flush=True)
            signal.pause()
    except KeyboardInterrupt:
        print("flink: stopped", file=sys.stderr)
    except ClusterError as error:
        raise SystemExit(f"flink: {error}") from error


if __name__ == "__main__":
    main(sys.argv[1])
