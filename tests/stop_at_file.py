"""Runs one of the commands, and sends a SIGTERM when it opens its n-th file for writing.

    python -m tests.stop_at_file N MODULE FLAG...

To itself, or where STOP_SCRIPT is set to the process that started it, and then it waits for its
own.
"""

import os
import runpy
import signal
import sys
import threading

from pipeline import storage


def main() -> None:
    number, module = int(sys.argv[1]), sys.argv[2]
    opened, publishing = 0, storage.publishing

    def counting(path: str):
        nonlocal opened
        opened += 1
        if opened == number:
            os.kill(os.getppid() if os.environ.get("STOP_SCRIPT") else os.getpid(), signal.SIGTERM)
            threading.Event().wait()
        return publishing(path)

    storage.publishing = counting
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
