"""Runs one of the commands, and a shell command when it first opens a certain file for writing.

    python -m tests.faults.change_at_file PART SHELL_COMMAND MODULE FLAG...

PART is a part of the file's path.
"""

import runpy
import subprocess
import sys

from pipeline.storage import files


def main() -> None:
    part, command, module = sys.argv[1:4]
    left, open_atomic = [command], files.open_atomic

    def changing(path: str):
        if left and part in path:
            subprocess.run(left.pop(), shell=True, check=True)
        return open_atomic(path)

    files.open_atomic = changing
    sys.argv = [module, *sys.argv[4:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
