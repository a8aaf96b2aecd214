"""Starts and watches the worker processes of the in-process runner's multi_processing mode.

Beam itself would wait for ever for a process that does not connect, or that has ended. The
processes run worker.py.
"""

import os
import shlex
import signal
import socket
import subprocess
import sys
import threading

from apache_beam.portability import python_urns
from apache_beam.portability.api import endpoints_pb2
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.transforms import environments
from google.protobuf import json_format, text_format

from pipeline.cli import command
from pipeline.machine import gpus
from pipeline.runners import worker as worker_lib

# How long a worker that has not connected may be silent. Its imports take seconds, or minutes on a
# busy machine; meanwhile the worker sends a sign of life every half second. Then Beam lets the
# worker try to connect for 60 s.
SILENCE_SECS = 60.0

_ending = threading.Lock()


def environment(num_workers: int) -> environments.Environment:
    """The Beam environment whose workers are of this module.

    Args:
      num_workers: number of workers of the runner; they share this machine's GPUs.
    """
    WorkerProcess._num_workers = num_workers
    line = command.module_line("pipeline.runners.worker", str(os.getpid()))
    return environments.SubprocessSDKEnvironment.from_command_string(shlex.join(line))


@worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class WorkerProcess(worker_handlers.GrpcWorkerHandler):
    """One worker process; Beam creates it, because this class is registered for the environment."""

    _all: list["WorkerProcess"] = []
    _num_workers = 1

    def __init__(self, command_line: bytes, *runner_arguments: object):
        """Called by Beam.

        Args:
          command_line: of the process.
          *runner_arguments: the arguments of every GrpcWorkerHandler.
        """
        super().__init__(*runner_arguments)
        self._command = shlex.split(command_line.decode())
        self._is_closed = False

    def start_worker(self) -> None:
        """Starts the process."""
        control = endpoints_pb2.ApiServiceDescriptor(url=self.control_address)
        options = self.provision_info.provision_info.pipeline_options
        variables = {
            "CONTROL_API_SERVICE_DESCRIPTOR": text_format.MessageToString(control),
            "PIPELINE_OPTIONS": json_format.MessageToJson(options),
            "WORKER_ID": self.worker_id,
            **gpus.environment_of(len(self._all) % self._num_workers, self._num_workers),
        }
        self._link, worker_end = socket.socketpair()
        self._link.settimeout(SILENCE_SECS)
        with worker_end:
            self._process = subprocess.Popen(
                self._command, stdin=worker_end, env={**os.environ, **variables}
            )
        self._all.append(self)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _has_connected(self) -> bool:
        # Beam has no public name for this; tests/runners/test_worker_processes.py would fail.
        return self.control_conn._state != worker_handlers.BeamFnControlServicer.UNSTARTED_STATE

    def _watch(self) -> None:
        """Ends the command if the process does not connect, or ends too early."""
        with self._link:
            try:
                while self._awaits_signs():
                    pass
            except TimeoutError:
                self._end_unconnected(f"has been silent for {SILENCE_SECS:g} s")
        status = self._process.wait()
        if self._is_closed:
            return
        if status in (-signal.SIGTERM, -signal.SIGINT):  # Meant for the command as well.
            signal.pthread_kill(threading.main_thread().ident, -status)
            return
        ended = f"ended with status {status}"
        if status < 0:
            ended = f"was killed by {signal.Signals(-status).name}"
        if status == worker_lib.UNCONNECTED:
            ended = "has tried to connect for 60 s"
        if not self._has_connected():
            self._end_unconnected(ended)
        if status == -signal.SIGKILL:
            ended += ", perhaps because memory ran out"
        self._end_command(
            f"a Beam worker process {ended}; expected it to run until the job ends: run the same "
            "command again, with fewer --direct_num_workers or more shards"
        )

    def _awaits_signs(self) -> bool:
        """Waits for a sign of life; returns False when the process has ended."""
        try:
            return bool(self._link.recv(64))
        except TimeoutError:
            if self._has_connected() or self._is_closed:
                return True
            raise

    def _end_command(self, text: str) -> None:
        """Ends all workers, and the command, whose main thread waits for them."""
        with _ending:  # Never released: if several workers end, the first one prints its reason.
            for worker in self._all:
                worker._process.kill()
            print(text, file=sys.stderr, flush=True)
            command.end_at_once(1)

    def _end_unconnected(self, fault: str) -> None:
        workers = [worker for worker in self._all if not worker._is_closed]
        num_connected = sum(worker._has_connected() for worker in workers)
        self._end_command(
            f"a Beam worker process {fault}: {num_connected} of the {len(workers)} started have "
            "connected to this command; expected all of them, over localhost: check that this "
            "machine reaches itself by that name, or use --direct_num_workers=1, which needs no "
            "connection"
        )

    def close(self) -> None:
        """Closes the connection, which ends the process."""
        self._is_closed = True
        if not self._has_connected():
            self._process.kill()  # Without a connection, closing it ends nothing.
        super().close()

    def stop_worker(self) -> None:
        """Waits for the end of the process."""
        self._thread.join()
