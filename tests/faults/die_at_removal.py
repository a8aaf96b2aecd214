"""Runs one of the commands, and kills it before it removes its n-th file or directory.

python -m tests.faults.die_at_removal N MODULE FLAG...
"""

import os
import runpy
import signal
import sys

from pipeline.storage import files


def main() -> None:
    number, module = int(sys.argv[1]), sys.argv[2]
    removed, remove = 0, files.remove

    def counting(path: str) -> None:
        nonlocal removed
        removed += 1
        if removed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        remove(path)

    files.remove = counting
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
