"""A worker process of the in-process runner's multi_processing mode.

    python -m pipeline.beam_worker PID_OF_THE_COMMAND

Silent, since Beam's own worker main logs its every step to the terminal that it
shares with the command; what fails here is raised there. And it ends with the
command that started it, whichever way that ended.
"""

import os
import sys
import threading

_LOOK_EVERY_SECS = 0.5


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
        with open(f"/proc/{process}/stat", "rb") as file:
            # Killed, and only not yet waited for by its parent, it counts as a process still.
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except ProcessLookupError:
        return False
    except OSError:
        return True  # No /proc on this system.


def _end_with(command: int) -> None:
    """Ends this process once the command has: then nobody wants its shard any more."""

    def watch() -> None:
        while True:
            if not _is_running(command):
                os._exit(1)
            threading.Event().wait(_LOOK_EVERY_SECS)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with(int(sys.argv.pop(1)))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Before the import, which warns too.
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
