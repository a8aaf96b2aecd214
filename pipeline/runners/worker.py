"""A worker process of the in-process runner's multi_processing mode.

    python -m pipeline.runners.worker PID_OF_THE_COMMAND

worker_processes.py starts it; the number tells whoever looks at processes whose it is. Silent,
since Beam's own worker main logs its every step to the terminal that it shares with the command;
what fails here is raised there. And it ends with the command that started it, whichever way that
ended.
"""

import os
import sys
import threading

# Exit status of a process that Beam has let try to connect for 60 s.
UNCONNECTED = 3
_TELL_EVERY_SECS = 0.5


def _tell_command() -> None:
    """Tells the command, at the other end of standard input, that this process lives."""
    pause = threading.Event()
    while True:
        try:
            os.write(sys.stdin.fileno(), b".")
        except OSError:  # It has ended: nobody wants this process's shard any more.
            os._exit(1)
        pause.wait(_TELL_EVERY_SECS)


if __name__ == "__main__":
    threading.Thread(target=_tell_command, daemon=True).start()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Before the import, which warns too.
    import grpc
    from apache_beam.runners.worker import sdk_worker_main

    try:
        sdk_worker_main.main(sys.argv)
    except grpc.FutureTimeoutError:
        os._exit(UNCONNECTED)
