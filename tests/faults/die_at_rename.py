"""Runs one of the commands, and kills it before its n-th rename of a finished file.

    python -m tests.faults.die_at_rename N MODULE FLAG...

With N = 0 it is not killed. The switch of a pointer is a rename, too.
"""

import os
import runpy
import signal
import sys


def main() -> None:
    number, module = int(sys.argv[1]), sys.argv[2]
    renamed, replace = 0, os.replace

    def counting(*arguments, **options):
        nonlocal renamed
        renamed += 1
        if renamed == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(*arguments, **options)

    os.replace = counting
    sys.argv = [module, *sys.argv[3:]]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
