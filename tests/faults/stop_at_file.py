"""Runs one of the commands, and sends a SIGTERM when it writes a certain file.

    python -m tests.faults.stop_at_file NAME MODULE FLAG...

To itself; or, as STOP_SCRIPT says, to the process that started it, or to its whole process group
(`parent`, `group`), and then it waits for its own.
"""

import os
import runpy
import signal
import sys
import threading

from pipeline.storage import files


def main() -> None:
    name, module = sys.argv[1:3]
    open_atomic = files.open_atomic

    def stopping(path: str):
        if os.path.basename(path) == name:
            # A process group by the negative number of its leader.
            whom = {"parent": os.getppid(), "group": -os.getpgrp()}
            os.kill(whom.get(os.environ.get("STOP_SCRIPT"), os.getpid()), signal.SIGTERM)
            threading.Event().wait()
        return open_atomic(path)

    files.open_atomic = stopping
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
