"""The processes of a cluster on 127.0.0.1: none of them outlives who started it."""

import contextlib
import ctypes
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

from pipeline.cli.proxies import reach_directly

HOST = "127.0.0.1"
REPOSITORY = pathlib.Path(__file__).parents[2]
_READY_SECS = 120
_PR_SET_PDEATHSIG = 1

# What Java must open to Flink and to Spark, as their own start scripts have it.
JAVA_FLAGS = [
    *(
        f"--add-opens=java.base/{package}=ALL-UNNAMED"
        for package in (
            "java.lang java.lang.invoke java.lang.reflect java.io java.net java.nio java.text "
            "java.time java.util java.util.concurrent java.util.concurrent.atomic "
            "java.util.concurrent.locks sun.nio.ch sun.nio.cs sun.util.calendar"
        ).split()
    ),
    "--add-exports=java.base/sun.net.util=ALL-UNNAMED",
    "--add-exports=java.base/sun.nio.ch=ALL-UNNAMED",
    "-XX:+UseSerialGC",
]


class ClusterError(Exception):
    """A cluster cannot be started."""


def distribution(engine: str) -> pathlib.Path:
    """Where `make` puts what a cluster runs; FLINK_DIR and SPARK_DIR name other places.

    Raises:
      ClusterError: it is not there.
    """
    default = REPOSITORY / "build" / engine
    place = pathlib.Path(os.environ.get(f"{engine.upper()}_DIR", default))
    if not (place / "ready").exists():
        raise ClusterError(f"{place}: no {engine.title()} there; `make test-{engine}` fetches it")
    return place


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now."""
    with contextlib.ExitStack() as open_sockets:
        sockets = [open_sockets.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((HOST, 0))
        return [one.getsockname()[1] for one in sockets]


def listens(port: int) -> bool:
    """Whether somebody listens on a port here."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
        return True
    except OSError:
        return False


def _die_with_parent() -> None:
    """In a child: it is killed when whoever started it is gone, even if that was killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Processes:
    """Processes by name, each with a log; everything that they write lies in one directory."""

    def __init__(self, directory: pathlib.Path):
        """Takes an empty or new directory, for `conf/`, `log/` and `scratch/`."""
        self.conf, self._log, self.scratch = (
            directory / name for name in ("conf", "log", "scratch")
        )
        for place in (self.conf, self._log, self.scratch):
            place.mkdir(parents=True, exist_ok=True)
        self.processes: dict[str, subprocess.Popen] = {}
        reach_directly()  # Its parts talk over loopback.

    def start(self, name: str, command: list[str], **environment: str) -> None:
        """Starts one; again, if one of that name was killed."""
        with open(self._log / f"{name}.log", "ab") as file:
            self.processes[name] = subprocess.Popen(
                command,
                # Nothing may depend on where a worker stands.
                cwd=self.scratch,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env={**os.environ, "TMPDIR": str(self.scratch), **environment},
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def start_java(
        self,
        name: str,
        main: str,
        *arguments: str,
        jars: pathlib.Path,
        flags: list[str],
        **environment: str,
    ) -> None:
        """Starts one of Java's: a main class, with the jars of a directory."""
        command = ["java", "-Xmx768m", *JAVA_FLAGS, f"-Djava.io.tmpdir={self.scratch}", *flags]
        self.start(name, [*command, "-cp", f"{jars}/*", main, *arguments], **environment)

    def start_worker_pool(self, port: int) -> None:
        """Starts a pool of Beam's Python workers, as "worker-pool"."""
        self.start(
            "worker-pool",
            [sys.executable, "-m", "tests.engines.worker_pool", str(port)],
            PYTHONPATH=str(REPOSITORY),
            # The pool starts its workers as `python`.
            PATH=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        )

    def children(self, name: str) -> list[int]:
        """Processes that one has started itself."""
        pid = self.processes[name].pid
        tasks = pathlib.Path(f"/proc/{pid}/task").glob("*/children")
        return [int(number) for path in tasks for number in path.read_text().split()]

    def wait(self, is_ready: Callable[[], bool]) -> None:
        """Waits until the cluster takes jobs.

        Raises:
          ClusterError: a process ended, or it does not in two minutes.
        """
        pause, tick = threading.Event(), 0.1
        for _ in range(int(_READY_SECS / tick)):
            for name, process in self.processes.items():
                if process.poll() is not None:
                    raise ClusterError(f"{name} ended with {process.poll()}: {self._tail(name)}")
            if is_ready():
                return
            pause.wait(tick)
        raise ClusterError(f"not ready after {_READY_SECS} s; see {self._log}")

    def _tail(self, name: str) -> str:
        text = (self._log / f"{name}.log").read_text(errors="replace")
        return "\n".join(text.splitlines()[-10:])

    def kill(self, name: str) -> None:
        """Kills one, -9, and what it started."""
        process = self.processes[name]
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def stop(self) -> None:
        """Kills all: nothing of a cluster has any use after it."""
        for name in list(self.processes):
            self.kill(name)
