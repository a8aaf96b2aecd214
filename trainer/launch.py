"""Starts a training cluster on this machine: several workers of strategy multi_worker.

    python -m trainer.launch --num_workers=2 -- --config=configs/mnist.py --workdir=DIR …

The trainer's flags follow after --. Each line of a worker's output starts with the worker's
number. All workers receive SIGTERM and SIGINT. The exit status is 0 if all workers ended with
status 0, else the status of the first worker that failed. On a cluster of machines the scheduler
does this: it sets TF_CONFIG and starts trainer.main with --config.strategy=multi_worker on each.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from typing import BinaryIO

from absl import flags

from pipeline.cli import command
from pipeline.cli.errors import Interrupted, StageError, UsageError
from pipeline.machine import gpus

_NUM_WORKERS = flags.DEFINE_integer(
    "num_workers", 2, "Worker processes to start.", lower_bound=1, upper_bound=64
)
# Time for the other workers to notice that one has failed, and to end by themselves.
_GRACE_SECS = 60


def _free_ports(count: int) -> list[int]:
    """Ports of this machine that are free now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for socket_ in sockets:
            socket_.bind(("localhost", 0))
        return [socket_.getsockname()[1] for socket_ in sockets]


def _copy_lines(number: int, source: BinaryIO, target: BinaryIO) -> None:
    """Copies a worker's lines, with its number before each."""
    for line in source:
        # One write a line, so that lines of two workers don't mix.
        target.write(b"[%d] %s\n" % (number, line.rstrip(b"\r\n")))
        target.flush()


class _Worker:
    """One worker process, and the threads that copy its output."""

    def __init__(self, number: int, addresses: list[str], arguments: list[str]):
        # No GPU is shared, since two workers on one GPU would wait for each other forever.
        worker_gpus = gpus.environment_of(number, len(addresses))
        task = {"type": "worker", "index": number}
        cluster = {"cluster": {"worker": addresses}, "task": task}
        self.number = number
        self.process = subprocess.Popen(
            command.module_line("trainer.main", *arguments, "--config.strategy=multi_worker"),
            env={**os.environ, **worker_gpus, "TF_CONFIG": json.dumps(cluster)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Else a terminal's ^C would reach the worker twice: directly and through the launcher.
            start_new_session=True,
        )
        streams = (self.process.stdout, sys.stdout.buffer), (self.process.stderr, sys.stderr.buffer)
        self._threads = [
            threading.Thread(target=_copy_lines, args=(number, *pair), daemon=True)
            for pair in streams
        ]
        for thread in self._threads:
            thread.start()

    def join(self) -> int:
        """Waits for the worker to end; returns its exit status, 75 if a signal killed it."""
        status = self.process.wait()
        for thread in self._threads:
            thread.join()
        # Before the worker handles these signals, they kill it.
        if status in (-signal.SIGTERM, -signal.SIGINT):
            return Interrupted.exit_status
        if status < 0:
            name = signal.Signals(-status).name
            print(f"launch: worker {self.number} was killed by {name}", file=sys.stderr)
            return Interrupted.exit_status
        return status


def _wait(workers: list[_Worker]) -> int:
    """Waits for all workers; returns the status of the first worker that failed, else 0."""
    ended_workers: list[_Worker] = []
    statuses: list[int] = []  # in the order in which workers ended
    worker_ended = threading.Condition()

    def wait_for(worker: _Worker) -> None:
        status = worker.join()
        with worker_ended:
            ended_workers.append(worker)
            statuses.append(status)
            worker_ended.notify()

    def all_ended() -> bool:
        return len(ended_workers) == len(workers)

    for worker in workers:
        threading.Thread(target=wait_for, args=(worker,), daemon=True).start()
    with worker_ended:
        worker_ended.wait_for(lambda: all_ended() or any(statuses))
        if not worker_ended.wait_for(all_ended, timeout=_GRACE_SECS):
            for worker in workers:
                if worker not in ended_workers:
                    print(
                        f"launch: worker {worker.number} did not end within {_GRACE_SECS} s after "
                        "the first worker failed; killing it",
                        file=sys.stderr,
                    )
                    worker.process.kill()
            worker_ended.wait_for(all_ended)
    return next((status for status in statuses if status), 0)


def run(arguments: list[str]) -> None:
    """Starts the workers and waits for them."""
    if not arguments:
        raise UsageError("no flags for the trainer; expected flags after --, see --help")
    num_gpus = len(gpus.visible())
    if 0 < num_gpus < _NUM_WORKERS.value:
        raise UsageError(
            f"--num_workers={_NUM_WORKERS.value}: this machine has {num_gpus} GPU(s), and each "
            "worker needs at least one; start fewer workers, or set CUDA_VISIBLE_DEVICES= to train "
            "on the CPU"
        )
    if num_gpus % _NUM_WORKERS.value:
        print(
            f"launch: {num_gpus % _NUM_WORKERS.value} of {num_gpus} GPU(s) stay idle, since all "
            "workers take the same number of GPUs",
            file=sys.stderr,
        )
    addresses = [f"localhost:{port}" for port in _free_ports(_NUM_WORKERS.value)]
    workers: list[_Worker] = []

    def forward_signal(number: int, _) -> None:
        for worker in workers:
            worker.process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward_signal)
    workers += [_Worker(number, addresses, arguments) for number in range(len(addresses))]
    status = _wait(workers)
    if status == Interrupted.exit_status:
        raise Interrupted("workers were interrupted; run the same command to resume")
    if status:
        error = StageError(
            "a worker failed; fix the problem that its lines above describe, and run the same "
            "command again"
        )
        error.exit_status = status
        raise error


def main() -> None:
    """Entry point of `vae-launch`."""
    command.run(run, name="launch", doc=__doc__, module=__name__, beam=False, arguments=True)


if __name__ == "__main__":
    main()
