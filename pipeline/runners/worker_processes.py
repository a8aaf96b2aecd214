"""The worker processes of the in-process runner's multi_processing mode, as the command has them.

Beam starts such processes too, but would wait for ever for one that does not come, or that has
ended. What runs in them is in worker.py.
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

from pipeline.machine import gpus
from pipeline.runners import worker as worker_lib

# How long a worker that has not connected yet may be silent. Its imports take seconds, on a busy
# machine minutes, in which it tells every half second that it lives. Then Beam lets it try to
# connect for as long.
SILENCE_SECS = 60.0

_ending = threading.Lock()


def environment(num_workers: int) -> environments.Environment:
    """Makes the runner start its workers as this module does.

    Args:
      num_workers: how many the runner starts; they share this machine's GPUs.
    """
    WorkerProcess._num_workers = num_workers
    command = [sys.executable, "-m", "pipeline.runners.worker", str(os.getpid())]
    return environments.SubprocessSDKEnvironment.from_command_string(shlex.join(command))


@worker_handlers.WorkerHandler.register_environment(python_urns.SUBPROCESS_SDK, bytes)
class WorkerProcess(worker_handlers.GrpcWorkerHandler):
    """One worker process; Beam makes them, in place of its own class for such an environment."""

    _all: list["WorkerProcess"] = []
    _num_workers = 1

    def __init__(self, command: bytes, *of_runner: object):
        """Takes the command line, and what Beam gives every handler of a worker."""
        super().__init__(*of_runner)
        self._command = shlex.split(command.decode())
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
        self._link, its_end = socket.socketpair()
        self._link.settimeout(SILENCE_SECS)
        with its_end:
            self._process = subprocess.Popen(
                self._command, stdin=its_end, env={**os.environ, **variables}
            )
        self._all.append(self)
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _has_come(self) -> bool:
        return self.control_conn._state != worker_handlers.BeamFnControlServicer.UNSTARTED_STATE

    def _watch(self) -> None:
        """Ends the command if the process stays away, or ends before it is told to."""
        with self._link:
            try:
                while self._is_heard():
                    pass
            except TimeoutError:
                self._end_for_want(f"has been silent for {SILENCE_SECS:g} s")
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
        if not self._has_come():
            self._end_for_want(ended)
        for_want = ", perhaps for want of memory" * (status == -signal.SIGKILL)
        self._end_command(
            f"a Beam worker process {ended}{for_want}; expected all of them to live: run the same "
            "command again, with fewer --direct_num_workers or more shards"
        )

    def _is_heard(self) -> bool:
        """Waits for a sign of life; returns whether there may be more."""
        try:
            return bool(self._link.recv(64))
        except TimeoutError:
            if self._has_come() or self._is_closed:
                return True
            raise

    def _end_command(self, text: str) -> None:
        """Ends the command, whose main thread waits for the workers, and all of them."""
        with _ending:  # For good: where many end at once, the first is the one that says why.
            for worker in self._all:
                worker._process.kill()
            print(text, file=sys.stderr, flush=True)
            os._exit(1)

    def _end_for_want(self, what: str) -> None:
        workers = [worker for worker in self._all if not worker._is_closed]
        self._end_command(
            f"a Beam worker process {what}: {sum(worker._has_come() for worker in workers)} of the "
            f"{len(workers)} started have connected to this command; expected all of them, over "
            "localhost: see that this machine reaches itself by that name, or run with "
            "--direct_num_workers=1, which takes no connection"
        )

    def close(self) -> None:
        """Ends the connection, and with it the process."""
        self._is_closed = True
        if not self._has_come():
            self._process.kill()  # The end of a connection would not end it.
        super().close()

    def stop_worker(self) -> None:
        """Waits for the end of the process."""
        self._thread.join()
