"""A worker process of the in-process runner's multi_processing mode.

    python -m pipeline.runners.worker PID_OF_THE_COMMAND

worker_processes.py starts this process; the number shows in `ps` to which command it belongs. The
process is silent, since Beam's worker would log every step to the command's terminal; the command
raises the errors. The process ends when the command ends, in whatever way.
"""

import os
import sys
import threading

# Exit status of a process that could not connect for 60 s.
UNCONNECTED = 3
_TELL_EVERY_SECS = 0.5


def _tell_command() -> None:
    """Sends signs of life to the command, at the other end of standard input."""
    pause = threading.Event()
    while True:
        try:
            os.write(sys.stdin.fileno(), b".")
        except OSError:  # The command has ended.
            os._exit(1)
        pause.wait(_TELL_EVERY_SECS)


if __name__ == "__main__":
    threading.Thread(target=_tell_command, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Before the import, which also warns.
    import grpc
    from apache_beam.runners.worker import sdk_worker_main

    try:
        sdk_worker_main.main(sys.argv)
    except grpc.FutureTimeoutError:
        os._exit(UNCONNECTED)
