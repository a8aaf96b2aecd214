"""A worker process of the in-process runner's multi_processing mode.

Silent, since Beam's own worker main logs its every step to the terminal that it
shares with the command; what fails here is raised there. And it ends with the
command that started it, whichever way that ended.
"""

import os
import sys
import threading

_LOOK_EVERY_SECS = 0.5


def _end_with_parent() -> None:
    """Ends this process once its parent has: then nobody wants its shard any more."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            threading.Event().wait(_LOOK_EVERY_SECS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    _end_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Before the import, which warns too.
    from apache_beam.runners.worker import sdk_worker_main

    sdk_worker_main.main(sys.argv)
