"""Runs one of the commands, and kills it when it opens its n-th file for writing.

    python -m tests.faults.die_at_file N MODULE FLAG...

In place of a number, a part of the file's path.

A half-written file of that name is left behind, as a kill leaves it.
"""

import os
import runpy
import signal
import sys

from pipeline.storage import files


def main() -> None:
    which, module = sys.argv[1:3]
    opened, open_atomic = 0, files.open_atomic

    def counting(path: str):
        nonlocal opened
        opened += 1
        if opened == int(which) if which.isdecimal() else which in path:
            directory, name = os.path.split(path)
            with open(os.path.join(directory, f".writing-{name}-1"), "wb") as half:
                half.write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        return open_atomic(path)

    files.open_atomic = counting
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
