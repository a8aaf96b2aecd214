"""Starts a training cluster on this machine: several workers of strategy multi_worker.

    python -m trainer.launch --num_workers=2 -- --config=configs/mnist.py --workdir=DIR …

What stands after -- are the trainer's flags. Each worker's lines come with its number before
them; SIGTERM and SIGINT are passed on to all. The exit status is 0 if all workers ended
with it, else that of the first that did not. On a cluster of machines the scheduler does this:
it sets TF_CONFIG and starts trainer.main with --config.strategy=multi_worker on each.
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
# How long the others may take to notice that one is gone, and to end by themselves.
_GRACE_SECS = 60


def _free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("localhost", 0))
        return [each.getsockname()[1] for each in sockets]


def _copy_lines(number: int, source: BinaryIO, target: BinaryIO) -> None:
    """Copies a worker's lines, its number before each."""
    for line in source:
        # In one call, so that lines of two workers don't mix.
        target.write(b"[%d] %s\n" % (number, line.rstrip(b"\r\n")))
        target.flush()


class _Worker:
    """One worker process, and the threads that copy its output."""

    def __init__(self, number: int, addresses: list[str], arguments: list[str]):
        # Of its own, since two workers on one GPU would wait for each other for ever.
        own_gpus = gpus.environment_of(number, len(addresses))
        task = {"type": "worker", "index": number}
        cluster = {"cluster": {"worker": addresses}, "task": task}
        self.number = number
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer.main", *arguments, "--config.strategy=multi_worker"],
            env={**os.environ, **own_gpus, "TF_CONFIG": json.dumps(cluster)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A terminal's ^C would reach it beside the one that is passed on, and count twice.
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
        """Waits for the end; returns the exit status, of a death by a signal that of its kind."""
        status = self.process.wait()
        for thread in self._threads:
            thread.join()
        if status in (-signal.SIGTERM, -signal.SIGINT):  # Before it listened to them.
            return Interrupted.exit_status
        if status < 0:
            name = signal.Signals(-status).name
            print(f"launch: worker {self.number} was killed by {name}", file=sys.stderr)
            return Interrupted.exit_status
        return status


def _wait(workers: list[_Worker]) -> int:
    """Waits for all workers; returns the status of the first that did not end with 0."""
    ended: list[_Worker] = []
    changed = threading.Condition()

    def wait_for(worker: _Worker) -> None:
        status = worker.join()
        with changed:
            ended.append(worker)
            statuses.append(status)
            changed.notify()

    statuses: list[int] = []
    for worker in workers:
        threading.Thread(target=wait_for, args=(worker,), daemon=True).start()
    with changed:
        changed.wait_for(lambda: len(ended) == len(workers) or any(statuses))
        if not changed.wait_for(lambda: len(ended) == len(workers), timeout=_GRACE_SECS):
            for worker in workers:
                if worker not in ended:
                    print(
                        f"launch: worker {worker.number} did not end within {_GRACE_SECS} s of "
                        "the first that failed; killing it",
                        file=sys.stderr,
                    )
                    worker.process.kill()
            changed.wait_for(lambda: len(ended) == len(workers))
    return next((status for status in statuses if status), 0)


def run(arguments: list[str]) -> None:
    """Starts the workers and waits for them."""
    if not arguments:
        raise UsageError("no flags for the trainer; expected them after --, as in --help")
    num_gpus = len(gpus.visible())
    if 0 < num_gpus < _NUM_WORKERS.value:
        raise UsageError(
            f"--num_workers={_NUM_WORKERS.value}: this machine has {num_gpus} GPU(s), and each "
            "worker takes at least one; start fewer workers, or set CUDA_VISIBLE_DEVICES= to train "
            "on the CPU"
        )
    if num_gpus % _NUM_WORKERS.value:
        print(
            f"launch: {num_gpus % _NUM_WORKERS.value} of {num_gpus} GPU(s) stay idle, since each "
            "worker takes as many as the others",
            file=sys.stderr,
        )
    addresses = [f"localhost:{port}" for port in _free_ports(_NUM_WORKERS.value)]
    workers: list[_Worker] = []

    def pass_on(number: int, _) -> None:
        for worker in workers:
            worker.process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    workers += [_Worker(number, addresses, arguments) for number in range(len(addresses))]
    status = _wait(workers)
    if status == Interrupted.exit_status:
        raise Interrupted("workers were interrupted; run the same command to go on")
    if status:
        error = StageError(
            "a worker failed, the lines above say why; mend that and run the same command again"
        )
        error.exit_status = status
        raise error


def main() -> None:
    """Entry point of `vae-launch`."""
    command.run(run, name="launch", doc=__doc__, module=__name__, beam=False, arguments=True)


if __name__ == "__main__":
    main()
